"""The commands on an index: every way to search, to look, to note and to exchange."""

import csv
import dataclasses
import io
import json
import re
import shlex
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from saesteer.cli.main import main
from saesteer.effects import output_score
from saesteer.effects.planted_causes import neutral_prompts
from saesteer.run import Run
from tests.tiny import tiny_model, tiny_tokenizer

TEXT = "Once there was a girl named Lily. The man saw a boat."


@pytest.fixture
def folder(small_run, tmp_path):
    """A copy of the small run that a test may change."""
    shutil.copytree(small_run.path, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def say(capsys):
    """What a command line prints, on success."""

    def run(line: str) -> str:
        capsys.readouterr()
        code = main(shlex.split(line))
        out = capsys.readouterr()
        assert code == 0, out.err
        return out.out

    return run


def test_every_search_is_the_same_in_json_and_in_python(say, small_run, tmp_path):
    run = Run.open(small_run.path)
    (tmp_path / "pos").write_text(f"{TEXT}\n{TEXT} Soon it was dark.\n")
    (tmp_path / "neg").write_text("The king sat.\n\nThe queen sang a song.\n")
    sides = [(tmp_path / name).read_text().split("\n") for name in ("pos", "neg")]
    positive, negative = ([text for text in side if text] for side in sides)
    for line, hits in (
        ("the", run.search("the", 4)),
        ("'the AND boat density<50%'", run.search("the AND boat density<50%", 4)),
        (f"--like '{TEXT}'", run.like(TEXT, 4)),
        ("--near 3", run.near(3, 4)),
        (f"--pos {tmp_path / 'pos'} --neg {tmp_path / 'neg'}", run.contrast(positive, negative, 4)),
    ):
        found = json.loads(say(f"search {run.path} {line} --limit 4 --json"))
        assert len(found) == len(hits) > 0
        expected = [dataclasses.asdict(hit) | {"measured_with": None} for hit in hits]
        assert found == json.loads(json.dumps(expected))
        shown = say(f"search {run.path} {line} --limit 4")
        assert [f"feature {hit.id}  " in shown for hit in hits] == [True] * len(hits)


def test_a_misspelled_word_and_a_broken_expression_are_told(say, small_run):
    assert "did you mean 'boat'" in say(f"search {small_run.path} baot")
    note = say(f"search {small_run.path} 'boat AND ('").splitlines()[0]
    assert "words" in note


def test_effects_are_shown_once_they_are_measured_and_with_what(say, folder, tmp_path):
    assert "· output" not in say(f"search {folder} the")
    for line in (f"search {folder} the --sort effect", f"search {folder} the"):
        shown = say(line)
        assert " · output " in shown and " · own " in shown
        assert max(map(len, shown.splitlines())) <= 80
    (first, *_) = json.loads(say(f"search {folder} the --json"))
    how = first["measured_with"]
    assert how == output_score.settings(neutral_prompts()) and first["output_score"] is not None
    i = first["id"]
    assert json.loads(say(f"feature {folder} {i} --json"))["measured_with"] == how
    told = f"measured by adding {how['amplification']}x after {len(how['prompts'])} prompts"
    assert told in say(f"feature {folder} {i}")
    say(f"feature {folder} {i} --html {tmp_path / 'page.html'}")
    assert told in (tmp_path / "page.html").read_text()
    rows = list(csv.DictReader(io.StringIO(say(f"export {folder} -"))))
    assert json.loads(rows[i]["measured_with"]) == how
    assert all((row["measured_with"] == "") == (row["output_score"] == "") for row in rows)


def test_words_may_begin_with_a_dash(say, small_run):
    run = Run.open(small_run.path)
    for words in ("-zzzz boat", "-is:dead the", "-tag:x boat", "-is:dead"):
        hits = [hit.id for hit in run.search(words, 3)]
        assert hits
        for line in (
            f"'{words}' --limit 3 --json",
            f"--json --limit 3 '{words}'",
            f"--limit=3 --json -- '{words}'",
        ):
            assert [hit["id"] for hit in json.loads(say(f"search {run.path} {line}"))] == hits
    tokens = run.read("-boat", 3)
    assert len(say(f"read {run.path} -boat").splitlines()) == len(tokens)
    with pytest.raises(SystemExit) as left:
        main(["search", str(run.path), "-h"])
    assert left.value.code == 0
    for mistake in (["boat", "--limt", "3"], ["--limit", "-dog"]):
        with pytest.raises(SystemExit) as left:
            main(["search", str(run.path), *mistake])
        assert left.value.code == 2


def test_where_filters_alone_find_nothing_no_other_word_is_asked_for(say, small_run):
    said = say(f"search {small_run.path} 'is:starred max_act>3'")
    assert (
        "no feature matches 'is:starred max_act>3'; loosen a filter" in said and "word" not in said
    )
    assert "try a word" in say(f"search {small_run.path} zzzz")
    assert "or leave the filters out" in say(f"search {small_run.path} 'zzzz is:dead'")


def test_index_measures_effects_and_writes_a_gallery(say, folder, tmp_path):
    out = say(f"index {folder} --effects 3 --html {tmp_path / 'gallery'} --top 2 --neighbours 0")
    assert "effects of 3 features measured" in out
    front = (tmp_path / "gallery" / "index.html").read_text()
    assert front.startswith("<!doctype html>") and "measured</dt><dd>by adding 0.5x after" in front
    index = Run.open(folder).index
    record = index.feature(3)
    assert not record.neighbours
    assert sum(example.group == "top" for example in record.examples) <= 2
    assert sum(index.feature(i).output_score is not None for i in range(128)) == 3


def test_what_takes_long_where_features_are_many_shows_how_far_it_is(capsys, folder, tmp_path):
    for line, bars in (
        (
            f"index {folder} --html {tmp_path / 'gallery'}",
            [r"write .* 3.00/3.00", r"gallery .* 128/128"],
        ),
        (f"export {folder} {tmp_path / 'x.csv'}", [r"export .* 128/128"]),
    ):
        assert main(shlex.split(line)) == 0
        err = capsys.readouterr().err
        assert all(re.search(bar, err) for bar in bars), err


def test_without_tantivy_the_index_is_made_and_the_missing_engine_named(
    capsys, folder, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tantivy", None)
    assert main(["index", str(folder), "--tantivy"]) == 2
    assert "saesteer[search]" in capsys.readouterr().err
    assert Run.open(folder).search("the")


def test_a_feature_in_the_terminal_on_a_page_and_as_json(say, small_run, tmp_path):
    page = tmp_path / "feature.html"
    assert say(f"feature {small_run.path} 3 --html {page}").strip() == str(page)
    record = Run.open(small_run.path).index.feature(3)
    text = page.read_text()
    assert text.startswith("<!doctype html>") and "http" not in text.split("</style>")[1]
    found = json.loads(say(f"feature {small_run.path} 3 --json"))
    assert found == json.loads(json.dumps(dataclasses.asdict(record) | {"measured_with": None}))
    shown = say(f"feature {small_run.path} 3")
    assert record.label in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_read_lists_a_token_a_line(say, small_run):
    tokens = Run.open(small_run.path).read(TEXT, 3)
    lines = say(f"read {small_run.path} '{TEXT}'").splitlines()
    assert len(lines) == len(tokens)
    for line, token in zip(lines, tokens, strict=True):
        assert all(f"{one.feature} " in line for one in token.fired)
    rows = json.loads(say(f"read {small_run.path} '{TEXT}' --json"))
    labels = {f.feature: small_run.index.feature(f.feature).label for t in tokens for f in t.fired}
    for row, token in zip(rows, tokens, strict=True):
        assert row["text"] == token.text
        assert [one["label"] for one in row["fired"]] == [labels[f.feature] for f in token.fired]


def test_notes_are_found_outlive_a_new_index_and_travel(say, folder, small_run, tmp_path):
    assert "nothing noted" in say(f"notes {folder}")
    say(f"notes {folder} 3 --name 'my boats' --tag sea --tag wet --star --remark 'look again'")
    say(f"index {folder}")
    assert "★ my boats #sea #wet  look again" in say(f"notes {folder}")
    (hit,) = json.loads(say(f"search {folder} tag:sea --json"))
    assert (hit["id"], hit["label"], hit["starred"], hit["source"]) == (3, "my boats", True, "user")
    say(f"notes {folder} --export {tmp_path / 'notes.json'}")
    other = tmp_path / "other"
    shutil.copytree(small_run.path, other)
    assert "1 features" in say(f"notes {other} --import {tmp_path / 'notes.json'}")
    assert say(f"notes {other}") == say(f"notes {folder}")
    say(f"notes {other} 3 --name '' --untag sea --untag wet --unstar --remark ''")
    assert "nothing noted" in say(f"notes {other}")


def test_csv_has_a_row_a_feature(say, small_run, tmp_path):
    say(f"export {small_run.path} {tmp_path / 'all.csv'}")
    text = (tmp_path / "all.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [int(row["id"]) for row in rows] == list(range(128))
    assert say(f"export {small_run.path} -") == text


def test_neuronpedia_s_format_goes_out_and_comes_back(say, small_run, tmp_path):
    say(f"export {small_run.path} {tmp_path / 'out'} --format neuronpedia --source 1-mine")
    (source,) = (tmp_path / "out" / "source.jsonl").read_text().splitlines()
    assert json.loads(source)["id"] == "1-mine"
    assert "128 features" in say(f"import {tmp_path / 'back'} {tmp_path / 'out'}")
    shown = say(f"feature {tmp_path / 'back'} 3")
    assert small_run.index.feature(3).label in shown
    assert "feature" in say(f"search {tmp_path / 'back'} the")


def test_a_judge_at_an_address_labels_scores_and_goes_on(say, folder, monkeypatch):
    asked = []

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((body["model"], self.headers["Authorization"]))
            text = "yes" if "yes or no" in body["messages"][0]["content"] else "a kind of boat"
            answer = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("JUDGE", "secret")
    with HTTPServer(("localhost", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        line = f"judge {folder} --features 3,5 --address http://localhost:{server.server_port}/v1"
        line += " --name small --key-variable JUDGE"
        out = say(line)
        n = len(asked)
        assert out == say(line) and len(asked) == n
        server.shutdown()
    assert "a kind of boat  (0.50)" in out and "2 of 2 features" in out
    assert set(asked) == {("small", "Bearer secret")}
    (*_, hit) = json.loads(say(f"search {folder} 'label:\"kind of boat\"' --json"))
    assert hit["source"] == "judge"
    assert "a kind of boat" in say(f"feature {folder} 3")


def test_a_judge_can_be_a_local_model(say, folder, tmp_path):
    tiny_model("llama", seed=1, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    out = say(f"judge {folder} --features 1 --model {tmp_path / 'model'} --no-score")
    assert f"1 of 1 features have a label by {tmp_path / 'model'}" in out
