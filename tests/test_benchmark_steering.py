"""benchmarks/steering.py at a tiny shape: what it prints, how it reckons, what its peers answer."""

import contextlib
import importlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import random_ids, tiny_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("peers.steering_cases")


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("peers.steering_apart")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What everyone is given, 32 wide."""
    folder = tmp_path_factory.mktemp("given")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        importlib.import_module("peers.steering_task").written(folder, width=64, d_sae=128)
        yield folder


@pytest.fixture(scope="module")
def us(given: Path) -> Iterator[Any]:
    """Our own process."""
    with importlib.import_module("peers.steering_apart").Apart("ours", given) as program:
        yield program


def test_prints_what_it_promises_and_writes_nothing() -> None:
    written = BENCHMARKS / "RESULTS.md"
    before = written.read_bytes() if written.exists() else None
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "steering.py", "--json", "--models", "random:2x32x96",
         "--rounds", "1", "--seconds", "0", "--tokens", "3", "--threads", "1", "--peers"],
        capture_output=True, text=True, timeout=300, cwd=BENCHMARKS.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peers"] == [] and found["not_run"] == {}
    rows = found["rows"]
    assert [(row["case"], row["architecture"], row["batch"]) for row in rows] == [
        ("nothing", "none", 1), ("nothing", "none", 32),
        *[(case, "jumprelu", batch)
          for case in ("1 clamp", "8 clamps", "64 clamps") for batch in (1, 32)],
        ("1 clamp", "topk", 1), ("1 clamp", "topk", 32),
        ("1 add", "none", 1), ("1 add", "none", 32),
        ("a clamp of its own in each row", "jumprelu", 64),
        ("1 add under a condition", "jumprelu", 1), ("1 add under a condition", "jumprelu", 32),
        ("1 add, baked", "none", 1), ("1 add, baked", "none", 32),
    ]  # fmt: skip
    for row in rows:
        assert (row["model"], row["d_model"]) == ("random:2x32x96", 32)
        assert row["d_sae"] == (0 if row["architecture"] == "none" else 2048)
        assert row["ratio_to_unsteered"] == pytest.approx(
            row["ours_tok_s"] / row["unsteered_tok_s"]
        )
        assert row["low"] == row["high"] == row["ratio_to_unsteered"]
        # One round: its seconds for each of the three passes.
        work = 3 * row["batch"]
        more = work / row["ours_tok_s"] - work / row["unsteered_tok_s"]
        assert row["hook_us_per_layer_step"] == pytest.approx(1e6 * more / 3)
        assert math.isfinite(row["call_us"])
        assert (row["architecture"] == "topk") == ("floor_us" in row)
    assert (written.read_bytes() if written.exists() else None) == before


def test_a_hooks_cost_is_the_median_of_rounds(bench: ModuleType) -> None:
    # 8 tokens a run, 4 passes: 2 s steered and 1 s unsteered; then 4 and 2; then 8 and 1.
    got = bench.hook_us([4.0, 2.0, 1.0], [8.0, 4.0, 8.0], 8, 4)
    assert got == pytest.approx(1e6 * 2 / 4)


def test_the_blocks_own_calls_are_timed_with_their_hooks_and_nothing_stays(
    bench: ModuleType,
) -> None:
    model = tiny_model("gpt2")
    block = model.transformer.h[1]
    before = set(block.__dict__)
    ids = random_ids(2, 5)

    def run() -> None:
        bench.generate(model, ids, 4)

    plain = bench.calls(block, run)
    assert len(plain) == 4  # the prompt's pass, and three steps
    slow = block.register_forward_hook(lambda *_: time.sleep(0.02))
    hooked = bench.calls(block, run)
    slow.remove()
    assert len(hooked) == 4 and min(hooked) >= 0.02
    with pytest.raises(ZeroDivisionError):
        bench.calls(block, lambda: 1 / 0)
    assert set(block.__dict__) == before


def test_ours_and_sae_lens_agree_and_differ_at_bos(
    apart: ModuleType, us: Any, given: Path, tmp_path: Path
) -> None:
    with apart.Apart("sae-lens", given) as them:
        assert them.cases == us.cases
        for case in them.cases:
            _agree(us, them, case, tmp_path)
        asked: dict[str, Any] = {"case": "1 add", "batch": 2, "tokens": 2, "repeats": 1}
        for program in (us, them):
            seconds = program.ask("time", **asked)
            assert sorted(seconds) == ["around", "steered", "unsteered"]
            assert all(value > 0 for value in seconds.values())
        (bos,) = them.wrong
        assert us.ask("wrong", case=bos)["got"] == "logits at BOS moved by 0"
        assert float(them.ask("wrong", case=bos)["got"].rpartition(" ")[2]) > 0.01
        with pytest.raises(apart.PeerFailedError, match="KeyError"):
            us.ask("wrong", case="no such case")
        # Ours comes through every known case.
        answers = {case: us.ask("wrong", case=case)["got"] for case in us.wrong}
        assert len(answers) == 5
        for case, text in answers.items():
            if case.startswith("a layer"):
                assert text == "raises HookPointError; the model as before, to the bit"
            else:
                assert float(text.partition(" by ")[2].split()[0]) < 1e-4, (case, text)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("steering-vectors", ("not steered at all", "logits off by 0.", "still steered")),
     ("repeng", ("raises RuntimeError: shape",))],
)  # fmt: skip
def test_a_peer_with_its_own_environment(
    apart: ModuleType, us: Any, given: Path, tmp_path: Path, name: str, wrong: tuple[str, ...]
) -> None:
    with contextlib.ExitStack() as stack:
        try:
            them = stack.enter_context(apart.Apart(name, given, install=False))
        except importlib.import_module("peers.apart").NotInstalledError as error:
            pytest.skip(f"{name}: {error}")
        assert them.cases == ["1 add"]
        _agree(us, them, "1 add", tmp_path)
        for case, said in zip(them.wrong, wrong, strict=True):
            assert said in them.ask("wrong", case=case)["got"]


def test_a_peer_that_cannot_be_had_is_told_with_its_reason(
    apart: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = importlib.import_module("peers.apart").NotInstalledError
    venvs = importlib.import_module("peers.venvs")
    monkeypatch.setattr(venvs, "INSTALLED", tmp_path)
    with pytest.raises(gone, match="not installed"):
        apart.python_of("repeng", install=False)
    monkeypatch.setattr(venvs, "_run", _refused)
    with pytest.raises(gone, match="no such package"):
        apart.python_of("repeng")
    with pytest.raises(gone, match="it doesn't start"):
        apart.Apart("ours", tmp_path / "nothing here")


def _refused(*command: str) -> None:
    raise importlib.import_module("peers.apart").NotInstalledError("no such package")


def _agree(us: Any, them: Any, case: str, folder: Path) -> None:
    """Steered logits agree to 1e-4, and steering does something."""
    read = []
    for at, program in enumerate((us, them)):
        program.ask("write_logits", case=case, batch=1, to=str(folder / f"{at}"))
        read.append(load_file(folder / f"{at}"))
    torch.testing.assert_close(read[0]["steered"], read[1]["steered"], atol=1e-4, rtol=0)
    assert float((read[0]["steered"] - read[0]["plain"]).abs().max()) > 0.05


def test_the_section_has_whole_tables_and_says_what_was_not_run(bench: ModuleType) -> None:
    steering = importlib.import_module("steering")
    found = {
        "rows": [{"case": "1 add", "batch": 1}, {"case": "TopK", "batch": 1, "floor_us": 7.0}],
        "peers": [{"peer": "repeng", "low": -1.0}],
        "agreement": [],
        "known_cases": [{"peer": "repeng", "case": "a batch", "the peer": "raises", "ours": "0"}],
        "not_run": {"sae-lens": "no such package"},
    }
    text = steering.markdown(found, 1, 2)
    assert text.endswith("Not run: sae-lens (no such package).")
    assert "| 1 add | 1 |  |\n| TopK | 1 | 7 |" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1
