"""`saesteer attribute` on the embedded model."""

import json
import warnings

import pytest

from saesteer.directions.pairs import Pair, write_pairs
from saesteer.world import corpus
from tests.command import run


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "sea.jsonl"
    write_pairs(path, [Pair(**pair) for pair in corpus.pairs("sea", 12, 0)])
    return path


def test_ranks_nodes_and_features_and_checks_them(capsys, small_run, pairs):
    command = f"attribute {small_run.path} --pairs {pairs} --features --limit 6"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, _ = run(capsys, f"{command} --check --json")
    found = json.loads(out)
    assert found["n_pairs"] == 12 and found["replaced_by"] == "mean"
    assert found["corrupt_margin"] is None
    assert len(found["nodes"]) == 4 * (1 + 4 + 1) and len(found["features"]) == 6
    for group in ("nodes", "features"):
        sizes = [abs(row["attribution"]["mean"]) for row in found[group]]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0
        assert all(row["patched"] is not None for row in found[group])
        assert -1 <= found["rank_correlation"][group] <= 1
    assert {row["node"]["point"] for row in found["features"]} == {"layers.1.resid_post"}
    table, _ = run(capsys, command)
    assert max(map(len, table.splitlines())) <= 80
    assert f"feature {found['features'][0]['node']['feature']} " in table
    assert "6 of 24" in table and "patched" not in table


def test_corrupt_prompts_are_taken_from_the_pairs(capsys, small_run, tmp_path):
    path = tmp_path / "pairs.jsonl"
    records = [
        {"prompt": f"The {one} {verb} the", "corrupt": f"The {other} {verb} the",
         "chosen": " boat", "rejected": " pot"}
        for one, other in (("sailor", "cook"), ("sailors", "cooks"))
        for verb in ("saw", "held")
    ]  # fmt: skip
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    out, _ = run(capsys, f"attribute {small_run.path} --pairs {path} --nodes heads,mlps --json")
    found = json.loads(out)
    assert found["replaced_by"] == "corrupt" and found["features"] == []
    assert found["corrupt_margin"]["mean"] != found["margin"]["mean"]
    assert {row["node"]["kind"] for row in found["nodes"]} == {"head", "mlp"}
    assert found["rank_correlation"] == {"nodes": None, "features": None}


def test_what_is_refused(capsys, small_run, pairs):
    command = f"attribute {small_run.path} --pairs {pairs}"
    assert "did you mean 'heads'" in run(capsys, f"{command} --nodes head", 2)[1]
    assert "nothing to rank" in run(capsys, f"{command} --nodes none", 2)[1]
    assert "--limit 0" in run(capsys, f"{command} --limit 0", 2)[1]
    assert "no file of pairs" in run(capsys, f"attribute {small_run.path} --pairs no.jsonl", 2)[1]
