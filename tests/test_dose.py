"""Dose and breakage: the figures by hand, the sweep against one strength at a time, iso-KL."""

import json
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from saesteer.cli.main import COMMANDS, main
from saesteer.core.hooks import activations
from saesteer.core.model import load_model, special_token_ids
from saesteer.core.points import HookPoint
from saesteer.core.sae import Sae
from saesteer.effects import damage, dose_plot
from saesteer.effects.continuations import (
    Continuation,
    continuations,
    feature_activation,
    projection,
    text_ce,
    word_share,
)
from saesteer.effects.damage import Cost, Reference
from saesteer.effects.dose import (
    Dose,
    DoseRow,
    Interval,
    breaking_points,
    dose,
    interval,
    iso_kl,
    mean_norm,
    suggested,
)
from saesteer.errors import NothingSteeredError, SteeringError, TextError
from saesteer.steering.edits import Add, Clamp, Edit
from saesteer.steering.engine import steer
from saesteer.steering.positions import Positions
from saesteer.world import corpus
from tests.tiny import generate, tiny_model, tiny_sae, tiny_tokenizer

POINT = HookPoint(1, "resid_post")
TEXTS = [
    corpus.text(story.words[:n])
    for story, n in zip(corpus.stories(3, seed=5), (40, 25, 33), strict=True)
]
PROMPTS = [corpus.text(story.words[:7]) for story in corpus.stories(3, seed=9)]


@pytest.fixture(scope="module")
def lm() -> tuple[Any, Any]:
    return load_model("planted")


@pytest.fixture(scope="module")
def vector(lm: tuple[Any, Any]) -> torch.Tensor:
    found = torch.randn(64, generator=torch.Generator().manual_seed(2))
    return found * mean_norm(*lm, POINT, TEXTS) / found.norm()


def adding(vector: torch.Tensor) -> Callable[[float], list[Edit]]:
    return lambda strength: [Add(vector, strength, POINT)]


# --- figures by hand ------------------------------------------------------------------------------


def test_kl_entropy_and_cross_entropy_by_hand() -> None:
    clean = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]).log()
    steered = torch.tensor([[0.25, 0.75, 0.0], [0.25, 0.25, 0.5]]).log()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert damage.kl(clean, steered).tolist() == pytest.approx([expected, 0.0])
    assert damage.kl(clean, clean).tolist() == [0.0, 0.0]
    assert damage.entropy(clean).tolist() == pytest.approx([math.log(2), 1.5 * math.log(2)])
    targets = torch.tensor([1, 2])
    found = damage.cross_entropy(steered, targets).tolist()
    assert found == pytest.approx([-math.log(0.75), math.log(2)])


def test_distinct_n_and_repetition_by_hand() -> None:
    assert damage.distinct_n([[1, 2, 1, 2], [1, 2]], 1) == 2 / 6
    assert damage.distinct_n([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4  # 12 21 12 | 12
    assert damage.distinct_n([[1], []], 2) is None
    # 1234 2341 3412 4123 1234: one of five stood before; the other text repeats nothing.
    assert damage.repetition([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)
    assert damage.repetition([[1, 2, 3, 4, 1, 2, 3, 4], [1, 2, 3, 4], [1]]) == pytest.approx(0.1)
    assert damage.repetition([[1, 2, 3]]) is None


def test_intervals() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, 200)
    found = interval(values, seed=1)
    assert found == interval(values, seed=1)
    assert found.mean == pytest.approx(values.mean()) and found.n == 200
    assert found.low is not None and found.high is not None
    error = 1.96 * values.std() / math.sqrt(200)
    assert found.low == pytest.approx(values.mean() - error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + error, abs=0.15 * error)
    assert interval(np.array([2.0]), seed=0) == Interval(2.0, None, None, 1)
    assert interval(np.full(5, 2.0), seed=0) == Interval(2.0, 2.0, 2.0, 5)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ({1: 0.1, 2: 0.5, 4: 0.51, 8: 0.2, 16: 3.0}, (None, 4)),
        ({-8: 2.0, -4: 0.9, -1: 0.2, 0: 0.0, 1: 0.4}, (-4, None)),
        ({-4: 0.6, 0: 0.7, 4: 0.9}, (-4, 0)),
        ({-1: 0.0, 1: math.inf}, (None, 1)),
        ({1: 0.5}, (None, None)),
    ],
)
def test_alpha_break_of_a_made_up_curve(curve: dict[float, float], expected: Any) -> None:
    assert breaking_points(list(curve), list(curve.values())) == expected
    backwards = dict(reversed(curve.items()))
    assert breaking_points(list(backwards), list(backwards.values())) == expected


def row(strength: float | None, gain: float, kl: float) -> DoseRow:
    one = Interval(gain, gain - 0.1, gain + 0.1, 8)
    cost = Cost(100, 2.0 + kl, kl, kl, 3.0, 0.5)
    return DoseRow(strength, one, one, None, cost, 0.1, (0.9, 0.8, None), None, 0, ("",))


def test_the_suggested_strength_is_the_best_within_the_budget() -> None:
    rows = [row(-1.0, -0.4, 0.2), row(1.0, 0.3, 0.1), row(2.0, 0.6, 0.5), row(4.0, 2.0, 0.51)]
    assert suggested(rows, 0.5) == 2.0
    assert suggested(rows, 0.3) == 1.0
    assert suggested(rows, 9.0) == 4.0
    assert suggested(rows, 0.5, "less") == -1.0
    assert suggested(rows, 0.05) is None
    assert suggested(rows[:1], 0.5) is None  # nothing is gained


# --- costs on neutral text ------------------------------------------------------------------------


def test_what_changes_nothing_costs_nothing_to_the_bit(
    lm: tuple[Any, Any], vector: torch.Tensor
) -> None:
    reference = Reference(*lm, TEXTS, batch_size=2)
    sae = tiny_sae(d_in=64)
    for edits in ([Add(vector, 0.0, POINT)], [Clamp(sae, 3, 1.0, "scale")]):
        cost = reference.cost(edits)
        assert (cost.kl, cost.delta_ce) == (0.0, 0.0)
    baseline = reference.cost()
    assert (cost.ce, cost.entropy) == (baseline.ce, baseline.entropy)
    assert baseline.relative_size == 0.0


def test_costs_are_those_of_texts_read_one_by_one(
    lm: tuple[Any, Any], vector: torch.Tensor
) -> None:
    model, tokenizer = lm
    special = special_token_ids(model, tokenizer)
    cost = Reference(model, tokenizer, TEXTS, batch_size=2).cost([Add(vector, 0.3, POINT)])
    kl, ce, ce_0, entropy, sizes = [], [], [], [], []
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            clean = model(ids).logits[0, :-1].double().log_softmax(-1)
            with steer(model, [Add(vector, 0.3, POINT)], tokenizer=tokenizer):
                now = model(ids).logits[0, :-1].double().log_softmax(-1)
        x = activations(model, [POINT], ids)[POINT][0]
        for i, target in enumerate(ids[0, 1:].tolist()):
            if target in special:
                continue
            kl.append(float((clean[i].exp() * (clean[i] - now[i])).sum()))
            ce.append(-float(now[i, target]))
            ce_0.append(-float(clean[i, target]))
            entropy.append(-float((now[i].exp() * now[i]).sum()))
            sizes.append(float(0.3 * vector.norm() / x[i + 1].norm()))
    assert cost.n_tokens == len(kl)
    assert cost.kl == pytest.approx(np.mean(kl), rel=1e-4) and cost.kl > 0.001
    assert cost.ce == pytest.approx(np.mean(ce), rel=1e-5)
    assert cost.delta_ce == pytest.approx(np.mean(ce) - np.mean(ce_0), rel=1e-3)
    assert cost.entropy == pytest.approx(np.mean(entropy), rel=1e-4)
    assert cost.relative_size == pytest.approx(np.mean(sizes), rel=1e-4)


def test_long_texts_whose_logits_are_not_kept_cost_the_same(
    lm: tuple[Any, Any], vector: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = [Add(vector, 0.3, POINT)]
    kept = Reference(*lm, TEXTS).cost(edits)
    monkeypatch.setattr(damage, "_KEPT", 0)
    monkeypatch.setattr(damage, "_CHUNK", 5000)
    again = Reference(*lm, TEXTS).cost(edits)
    assert again.kl == pytest.approx(kept.kl, rel=1e-6) and again.ce == pytest.approx(kept.ce)


def test_edits_of_generated_tokens_need_a_prompt_length(
    lm: tuple[Any, Any], vector: torch.Tensor
) -> None:
    edits = [Add(vector, 0.3, POINT, where=Positions(prompt=False))]
    with pytest.raises(NothingSteeredError, match="touched no token"):
        Reference(*lm, TEXTS).cost(edits)
    everywhere = Reference(*lm, TEXTS).cost([Add(vector, 0.3, POINT)])
    assert Reference(*lm, TEXTS, prompt_length=0).cost(edits).kl == everywhere.kl
    assert 0 < Reference(*lm, TEXTS, prompt_length=12).cost(edits).kl < everywhere.kl


def test_logits_that_are_no_numbers_are_refused() -> None:
    model, tokenizer = tiny_model().half(), tiny_tokenizer()
    with pytest.raises(SteeringError, match="not finite numbers with add 1e"):
        Reference(model, tokenizer, ["the boy walked"]).cost([Add(torch.ones(32), 1e9, POINT)])


def test_texts_without_anything_to_predict_are_refused(lm: tuple[Any, Any]) -> None:
    with pytest.raises(TextError, match="no text"):
        Reference(*lm, [])
    with pytest.raises(TextError, match="no plain token"):
        Reference(*lm, [[1], [1, 1]])


# --- generated text -------------------------------------------------------------------------------


def test_readings_are_of_the_generated_tokens_alone_and_unsteered(
    lm: tuple[Any, Any], vector: torch.Tensor
) -> None:
    model, tokenizer = lm
    rows = [[1, *tokenizer(prompt)["input_ids"]] for prompt in PROMPTS[:2]]
    texts = continuations(
        model, tokenizer, rows, [[], [Add(vector, 0.5, POINT)]], max_new_tokens=9, seeds=[0, 1]
    )
    texts.append(Continuation(tuple(rows[0]), (), ""))
    sae, unit = tiny_sae(d_in=64), vector / vector.norm()
    features, projections, losses = [], [], []
    for one in texts[:2]:
        ids = torch.tensor([[*one.prompt, *one.new]])
        x = activations(model, [POINT], ids)[POINT][0, len(one.prompt) :]
        features.append(float(sae.activation(x, [7]).mean()))
        projections.append(float((x @ unit).mean()))
        with torch.no_grad():
            log_p = model(ids).logits[0, len(one.prompt) - 1 : -1].log_softmax(-1)
        losses += [-float(p[i]) for p, i in zip(log_p, one.new, strict=True)]
    found = feature_activation(model, sae, 7)(texts)
    assert found == pytest.approx([*features, 0.0], rel=1e-4) and features[0] > 0
    assert projection(model, vector, POINT)(texts) == pytest.approx([*projections, 0.0], rel=1e-4)
    assert text_ce(model, texts) == pytest.approx(np.mean(losses), rel=1e-5)
    assert text_ce(model, texts[2:]) is None


def test_words_are_whole_words_in_any_case() -> None:
    texts = [Continuation((1,), (), t) for t in ("The Sea.", "a seagull", "under sea", "")]
    assert word_share(["sea", " ship "])(texts) == [1.0, 0.0, 1.0, 0.0]
    assert word_share(["a seagull"])(texts) == [0.0, 1.0, 0.0, 0.0]
    with pytest.raises(TextError, match="no words"):
        word_share([" "])


def test_texts_end_where_the_model_ends_them_and_hold_no_special_tokens() -> None:
    model = tiny_model(pad_token_id=None)
    tokenizer = tiny_tokenizer(bos=False, pad=False, eos=False)
    model.generation_config.pad_token_id = None

    def written(n: int) -> tuple[int, ...]:
        rows = [[1, 5, 9], [1, 20, 30, 40]]  # the second goes on when the first has ended
        texts = continuations(
            model, tokenizer, rows, [[], []], max_new_tokens=n, seeds=[3, 4], temperature=2.0
        )
        return texts[0].new

    whole = written(6)
    assert len(set(whole)) == 6  # so that each stands for itself below
    model.generation_config.bos_token_id = whole[1]
    assert written(6) == (whole[0], *whole[2:])
    model.generation_config.eos_token_id = [2, whole[3]]
    assert written(6) == (whole[0], whole[2])  # the rest is padding, of an id like any other
    with pytest.raises(TextError, match="128 positions"):
        written(126)


# --- the sweep ------------------------------------------------------------------------------------


def sweep(lm: tuple[Any, Any], vector: torch.Tensor, **changes: Any) -> Dose:
    arguments: dict[str, Any] = {
        "prompts": PROMPTS, "neutral_texts": TEXTS, "effect": projection(lm[0], vector, POINT),
        "max_new_tokens": 8, "temperature": 0.0,
    }  # fmt: skip
    return dose(*lm, adding(vector), [2.0, -0.5, 0.0, 0.25], **(arguments | changes))


def test_one_generate_equals_one_generate_a_strength(
    lm: tuple[Any, Any], vector: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = lm
    calls: list[int] = []
    original = model.generate

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(kwargs["input_ids"]))
        return original(*args, **kwargs)

    monkeypatch.setitem(model.__dict__, "generate", counting)
    found = sweep(lm, vector)
    assert calls == [15]  # three prompts, four strengths and the baseline
    monkeypatch.undo()
    assert [one.strength for one in found.rows] == [-0.5, 0.0, 0.25, 2.0]
    same = {"max_new_tokens": 8, "temperature": 0.0}
    plain = generate(model, tokenizer, PROMPTS, **same)
    assert [p + t for p, t in zip(PROMPTS, found.baseline.texts, strict=True)] == plain
    for one in found.rows:
        assert one.strength is not None
        with steer(model, [Add(vector, one.strength, POINT)], tokenizer=tokenizer):
            alone = generate(model, tokenizer, PROMPTS, **same)
        assert [p + t for p, t in zip(PROMPTS, one.texts, strict=True)] == alone
        assert one.cost == Reference(*lm, TEXTS).cost([Add(vector, one.strength, POINT)])
    assert found.rows[3].texts != found.baseline.texts
    assert sweep(lm, vector, rows_at_once=5) == found


def test_the_baseline_stands_apart_and_strength_zero_is_a_point_of_its_own(
    lm: tuple[Any, Any], vector: torch.Tensor
) -> None:
    found = sweep(lm, vector, words=["the", "a"], temperature=1.0)
    base, zero = found.baseline, found.rows[1]
    assert base.strength is None and base.gain is None and zero.strength == 0.0
    assert (zero.texts, zero.cost.kl, zero.cost.delta_ce) == (base.texts, 0.0, 0.0)
    assert zero.gain is not None and (zero.gain.mean, zero.gain.low) == (0.0, 0.0)
    assert base.words is not None and 0 <= base.words.mean <= 1
    strongest = found.rows[3]
    assert strongest.gain is not None and strongest.cost.delta_ce > 0.5
    assert strongest.gain.mean == pytest.approx(strongest.effect.mean - base.effect.mean)
    assert found.break_positive == 2.0
    assert json.loads(json.dumps(found.to_dict()))["rows"][1]["cost"]["kl"] == 0.0
    sae = tiny_sae(d_in=64)
    ablation = dose(
        *lm, lambda s: [Clamp(sae, 7, s)], [0.0], prompts=PROMPTS, neutral_texts=TEXTS,
        effect=feature_activation(lm[0], sae, 7), max_new_tokens=3,
    )  # fmt: skip
    assert ablation.rows[0].cost.kl > 0


def test_bad_doses_are_refused(lm: tuple[Any, Any], vector: torch.Tensor) -> None:
    for strengths in ([], [1.0, 1.0], [math.nan]):
        with pytest.raises(SteeringError, match="strengths"):
            dose(*lm, adding(vector), strengths, prompts=PROMPTS, neutral_texts=TEXTS,
                 effect=word_share(["a"]))  # fmt: skip
    with pytest.raises(SteeringError, match="KL budget of 0"):
        sweep(lm, vector, kl_budget=0.0)
    with pytest.raises(TextError, match="no text"):
        sweep(lm, vector, prompts=[])


# --- strengths of equal cost ----------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.01, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("hi", [None, 6.0, -6.0])
def test_iso_kl_hits_its_budget(
    lm: tuple[Any, Any], vector: torch.Tensor, budget: float, hi: float | None
) -> None:
    found = iso_kl(*lm, adding(vector), TEXTS, budget, hi=hi)
    assert found < 0 if hi == -6.0 else found > 0
    assert Reference(*lm, TEXTS).cost([Add(vector, found, POINT)]).kl == pytest.approx(
        budget, rel=0.01
    )
    assert found == iso_kl(*lm, adding(vector), TEXTS, budget, hi=hi)


def test_iso_kl_finds_the_first_of_several_crossings(
    lm: tuple[Any, Any], vector: torch.Tensor
) -> None:
    def waves(strength: float) -> list[Edit]:
        return [Add(vector, math.sin(strength), POINT)]

    found = iso_kl(*lm, waves, TEXTS, 0.1, hi=4 * math.pi, grid=24)
    straight = iso_kl(*lm, adding(vector), TEXTS, 0.1, hi=1.0)
    assert 0 < found < math.pi / 2
    assert math.sin(found) == pytest.approx(straight, rel=0.02)


def test_iso_kl_says_why_a_budget_cannot_be_met(lm: tuple[Any, Any], vector: torch.Tensor) -> None:
    with pytest.raises(SteeringError, match=r"no strength from 0 to 0\.1 costs 5 nats"):
        iso_kl(*lm, adding(vector), TEXTS, 5.0, hi=0.1)
    with pytest.raises(SteeringError, match="nats of KL already"):
        iso_kl(*lm, adding(vector), TEXTS, 0.01, lo=1.0, hi=2.0)
    with pytest.raises(SteeringError, match="KL jumps over"):
        iso_kl(*lm, lambda s: adding(vector)(float(s > 0.3)), TEXTS, 0.1, hi=1.0)
    with pytest.raises(SteeringError, match="KL budget of -1"):
        iso_kl(*lm, adding(vector), TEXTS, -1.0)
    at_once = iso_kl(*lm, adding(vector), TEXTS, 0.5, hi=2.0)
    assert iso_kl(*lm, adding(vector), TEXTS, 0.5, lo=at_once, hi=3.0) == at_once


def test_mean_norm_leaves_special_tokens_and_padding_out(lm: tuple[Any, Any]) -> None:
    model, tokenizer = lm
    special = special_token_ids(model, tokenizer)
    norms = []
    for text in TEXTS:
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        x = activations(model, [POINT], torch.tensor([ids]))[POINT][0]
        norms += [float(v.norm()) for v, i in zip(x, ids, strict=True) if i not in special]
    assert mean_norm(*lm, POINT, TEXTS, batch_size=2) == pytest.approx(np.mean(norms), rel=1e-5)
    with pytest.raises(SteeringError, match="special one"):
        mean_norm(*lm, POINT, [[1]])


# --- the figure and the command -------------------------------------------------------------------


def test_figures_of_any_strengths(tmp_path: Path) -> None:
    def draw(name: str, *strengths: float) -> Path:
        rows = tuple(row(s, 0.1 * s, abs(s) / 4) for s in strengths)
        found = Dose(row(None, 0.0, 0.0), rows, None, 4.0, None, 0.5, "more")
        return dose_plot.draw(found, tmp_path / name, effect="activation")

    first = draw("dose.svg", -2.0, 0.0, 2.0).read_bytes()
    assert ElementTree.fromstring(first).tag.endswith("svg")
    assert draw("again.svg", -2.0, 0.0, 2.0).read_bytes() == first
    assert draw("one.png", 1.0).read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[[str], tuple[int, str, str]]:
    monkeypatch.setitem(COMMANDS, "dose", ("saesteer.cli.dose", "what each strength does"))

    def run(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["dose", *shlex.split(line)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture(scope="module")
def folder(small_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the small run, with a direction that is a feature's decoder row."""
    from saesteer.core.model import fingerprint
    from saesteer.directions import Direction

    path = tmp_path_factory.mktemp("dosed") / "run"
    shutil.copytree(small_run.path, path)
    sae: Sae = small_run.sae
    Direction(
        vector=sae.direction(3), point=sae.hook_point, method="mean-difference", read="answer-mean",
        n_pairs=1, model_fingerprint=fingerprint(small_run.model),
    ).save(path / "steers" / "row3.safetensors")  # fmt: skip
    return path


def test_the_command_prints_a_table_and_leaves_figure_and_json(
    command: Any, folder: Path, small_run: Any
) -> None:
    code, out, err = command(f"{folder} --clamp 3 --words boat,ship --max-new-tokens 6 --seed 2")
    assert code == 0, err
    lines = out.splitlines()
    assert max(map(len, lines[:-1])) <= 80, out  # the last names the run
    assert lines[3].split()[:3] == ["strength", "effect", "95%"] and "words" in lines[3]
    table = [line.split()[0] for line in lines[4:11]]
    assert table == ["baseline", "0", "1", "2", "4", "8", "16"]
    assert "α_break: " in out and "suggested: " in out
    made = folder / "doses" / "clamp-3"
    assert {p.name for p in made.iterdir()} == {"dose.json", "dose.svg"}
    found = json.loads((made / "dose.json").read_text())
    assert found["unit"] == "× max_act" and found["seed"] == 2
    # Four times the highest activation is four times the highest activation.
    expected = Reference(
        small_run.model, small_run.tokenizer, neutral_of(small_run)
    ).cost(small_run.edits(clamp={3: "4x"}))  # fmt: skip
    measured = next(one for one in found["rows"] if one["strength"] == 4.0)
    assert measured["cost"]["kl"] == pytest.approx(expected.kl, rel=1e-6)
    assert measured["gain"]["mean"] > 0


def neutral_of(run: Any) -> list[list[int]]:
    """The second half of the held-out contexts."""
    from saesteer.training.rows import first_evaluated

    first = first_evaluated(run.shards.n_contexts, run.config.cache.held_out)
    return [list(map(int, one)) for one in run.shards.tokens[first:][:32]]


def test_the_command_with_files_a_vector_and_json(
    command: Any, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "neutral.txt").write_text(f"\n{corpus.DOCUMENT_SEPARATOR}\n".join(TEXTS))
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS))
    prompts = "".join(json.dumps({"prompt": one}) + "\n" for one in PROMPTS)
    (tmp_path / "prompts.jsonl").write_text(prompts)
    line = (
        f"{folder} --vector row3 --strengths=-1,1 --texts {tmp_path / 'neutral.txt'} "
        f"--max-new-tokens 4 --json --out {tmp_path / 'out'} --kl-budget 0.25 --want less"
    )
    code, out, err = command(f"{line} --prompts {tmp_path / 'prompts.txt'}")
    assert code == 0, err
    found = json.loads(out)
    assert found["effect"].startswith("projection on row3") and found["kl_budget"] == 0.25
    assert [one["strength"] for one in found["rows"]] == [-1.0, 1.0]
    assert found["baseline"]["effect"]["n"] == len(PROMPTS)
    assert json.loads((tmp_path / "out" / "dose.json").read_text()) == found
    again = json.loads(command(f"{line} --prompts {tmp_path / 'prompts.jsonl'}")[1])
    assert again["rows"] == found["rows"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{run}", "a dose is of one edit"),
        ("{run} --clamp 3 --add 4", "a dose is of one edit"),
        ("{run} --clamp 3 --strengths 1,x", "'1,x' is no list of numbers"),
        ("{run} --clamp 3 --strengths nan", "is no list of numbers"),
        ("{run} --clamp 999", "feature 999 does not exist"),
        ("{run} --vector nothing", "no vector 'nothing'"),
        ("{run} --clamp 3 --texts {run}/none.txt", "none.txt"),
        ("{run} --clamp 3 --prompts {run}/none.txt", "none.txt"),
        ("{run} --clamp 3 --n-texts 0", "both must be above 0"),
        ("{run} --clamp 3 --kl-budget 0", "a KL budget of 0.0 nats"),
        ("{bare} --clamp 3", "no held-out tokens"),
    ],
)
def test_mistakes_of_the_command(
    command: Any, folder: Path, tmp_path: Path, line: str, message: str
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("activations", "doses"))
    code, out, err = command(line.format(run=folder, bare=bare))
    said = [x for x in err.splitlines() if x.startswith("saesteer: ")]
    assert code == 2 and not out, err
    assert len(said) == 1 and message in said[0]
