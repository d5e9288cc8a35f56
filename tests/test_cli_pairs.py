"""`saesteer pairs`: from templates, written by a model, and checked."""

import json
import shlex
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from saesteer.directions.pairs import Pair, parse_pairs, write_pairs
from tests.command import run

TEMPLATES = """
prompt = "the {name} saw the {place}. he was"
chosen = " {mood} then"
rejected = " {mood} then"
choices = %s
[slots]
name = ["boy", "man", "king", "cook"]
place = ["sea", "ship", "house", "garden", "hill"]
mood = [["happy", "sad"], ["good", "bad"]]
"""


# What the embedded model knows.
KNOWN = "boat cat cloud cow dragon castle fairy doctors cook coin crowned bats".split()  # noqa: SIM905


class Answers(BaseHTTPRequestHandler):
    """Writes a pair about the number of the item that is asked for."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        i = int(body["messages"][0]["content"].split("This is item ")[1].split(":")[0])
        shows, opposite = (KNOWN[(i + j) % len(KNOWN)] for j in (0, 5))
        text = f"Prompt: What of {i}?\nShows: {shows}\nOpposite: {opposite}"
        answer = {
            "choices": [{"message": {"content": text}}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 4},
        }
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address():
    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def read(path: Path) -> list[Pair]:
    return [pair for _, pair in parse_pairs(path)]


def put(path: Path, choices: str = "false") -> Path:
    path.write_text(TEMPLATES % choices)
    return path


def test_templates_are_filled_and_checked(capsys, tmp_path):
    made = put(tmp_path / "t.toml")
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    out, err = run(capsys, f"pairs {test} --template {made} --n 8 --seed 7")
    assert "8 pairs" in out and "under 32" in err
    out, err = run(capsys, f"pairs {train} --template {made} --n 20 --against {test}", code=0)
    assert f"saesteer vector RUN --pairs {train}" in out
    pairs = read(train)
    assert Counter(pair.chosen for pair in pairs) == {" happy then": 10, " good then": 10}
    out, _ = run(capsys, f"pairs --check {train} --against {test}")
    assert "few: 20 pairs" in out and f"20 pairs in {train}" in out
    assert json.loads((tmp_path / "train.cost.json").read_text())["writing"]["calls"] == 0
    _, err = run(capsys, f"pairs {train} --template {made} --n 9 --seed 1", code=2)
    assert "begun with another n and seed and against" in err and read(train) == pairs
    _, err = run(capsys, f"pairs {train} --template {made} --n 9 --against {test}", code=2)
    assert "begun with another n (20, now 9)" in err and "train.cost.json" in err
    assert read(train) == pairs
    _, err = run(capsys, f"pairs {tmp_path / 'x.jsonl'} --template {made}", code=2)
    assert "make 40 distinct pairs, but 128 were asked for" in err


def test_what_a_check_finds_is_listed_and_ends_with_2(capsys, tmp_path):
    path, other = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    good = [Pair(f"the boy saw {i}", " a storm", " a boat") for i in range(40)]
    write_pairs(path, [*good, Pair("q", " ", "b"), Pair("the sea", " blorb", " grix")])
    write_pairs(other, good[:2])
    out, err = run(capsys, f"pairs --check {path} --against {other} --model planted", code=2)
    said = out.splitlines()
    assert any(line.startswith("error  empty") and "(pair 41)" in line for line in said)
    assert any(line.startswith("error  leaked pair") and "(pairs 1, 2)" in line for line in said)
    assert any(line.startswith("error  same tokens") and "(pairs 41, 42)" in line for line in said)
    assert any(line.startswith("warning  unknown words") for line in said)
    assert "3 of what was found must be mended" in err
    write_pairs(path, good)
    assert run(capsys, f"pairs --check {path}")[0] == f"40 pairs in {path}, nothing found\n"


def test_an_address_writes_and_the_cost_is_kept(capsys, tmp_path, address):
    path = tmp_path / "p.jsonl"
    line = f"pairs {path} --behaviour 'is kind' --address {address} --name m --choices"
    out, _ = run(capsys, f"{line} --n 32")
    assert f"32 pairs in {path}, of 32 items; dropped: none" in out
    assert "32 calls, 288 tokens in, 128 out" in out and "not filtered" in out
    assert Counter(pair.chosen for pair in read(path)) == {" (A)": 16, " (B)": 16}
    first = read(path)
    out, _ = run(capsys, f"{line} --n 40")
    assert read(path)[:32] == first and "40 pairs" in out
    cost = json.loads((tmp_path / "p.cost.json").read_text())
    assert cost["writing"]["calls"] == 40 and cost["settings"]["behaviour"] == "is kind"
    _, err = run(capsys, f"{line} --n 40 --temperature 0", code=2)
    assert "begun with another writer" in err
    judged = tmp_path / "j.jsonl"
    out, _ = run(
        capsys,
        f"pairs {judged} --behaviour 'dragon castle' --address {address} --name m --n 4 "
        "--filter planted",
    )
    filtering = json.loads((tmp_path / "j.cost.json").read_text())["filtering"]
    assert filtering["calls"] >= 16 and filtering["tokens_in"] > 5 * filtering["calls"]
    assert len(read(judged)) == 4 and "not filtered" not in out


def test_a_model_that_cannot_write_pairs_is_given_up(capsys, tmp_path):
    path = tmp_path / "p.jsonl"
    line = f"pairs {path} --behaviour 'is kind' --model planted --n 1 --max-tokens 4"
    _, err = run(capsys, line, code=2)
    assert "0 of 1 pairs after 8 items (8 malformed)" in err and not path.exists()
    cost = json.loads((tmp_path / "p.cost.json").read_text())["writing"]
    assert cost["calls"] == 8 and cost["tokens_in"] > 8 and cost["seconds"] > 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pairs", "either a file to make"),
        ("pairs o.jsonl --check p.jsonl", "either a file to make"),
        ("pairs o.jsonl", "give one of --template and --behaviour"),
        ("pairs o.jsonl --template t --behaviour b", "give one of --template and --behaviour"),
        ("pairs o.jsonl --behaviour b", "who is to write"),
        ("pairs o.jsonl --behaviour b --address http://x", "goes with --name"),
        ("pairs o.jsonl --behaviour b --address http://x --name n --model m", "without --model"),
        ("pairs o.jsonl --behaviour b --model planted --filter m", "goes with --address"),
        ("pairs o.jsonl --behaviour b --address x --name n", "is no address"),
        ("pairs --check none.jsonl", "there is no file of pairs none.jsonl"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    out, err = run(capsys, line, code=2)
    assert message in err and out == "" and err.count("\n") == 1, shlex.split(line)
