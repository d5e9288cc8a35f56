"""`saesteer steer`: texts side by side, sweeps, chats, positions, pages, edits that are kept."""

import re
import shutil
from html.parser import HTMLParser

import pytest

from saesteer.cli.steer_options import Scoped
from saesteer.core.model import load_model
from saesteer.effects import side_by_side
from saesteer.run import Run
from tests.command import as_terminal, rows, run

PROMPT = "Story A. The boy named Max"
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ ' ' + m['role'] + ' . ' + m['content'] + '.' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' The boy' }}{% endif %}"
)


@pytest.fixture
def folder(small_run, tmp_path):
    """A copy of the small run that a test may change."""
    for name in ("config.toml", "features.sqlite"):
        (tmp_path / "run").mkdir(exist_ok=True)
        shutil.copy(small_run.path / name, tmp_path / "run" / name)
    shutil.copytree(small_run.path / "sae", tmp_path / "run" / "sae")
    return tmp_path / "run"


@pytest.fixture
def templated(monkeypatch):
    """The run's tokenizer, with a chat template."""
    tokenizer = load_model("planted")[1]
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(Run, "tokenizer", property(lambda self: tokenizer))
    return tokenizer


def test_pairs_by_prompt_and_seed(capsys, folder):
    line = f'steer {folder} --clamp 3=4x --prompt "{PROMPT}" --max-new-tokens 6'
    found = rows(capsys, f'{line} --prompt "Story B." --seed 3 --seed 4')
    assert [(row["prompt"], row["seed"]) for row in found] == [
        (prompt, seed) for prompt in (PROMPT, "Story B.") for seed in (3, 4)
    ]
    assert found[0]["baseline"] != found[1]["baseline"]
    assert found[1]["measures"]["baseline"]["n_tokens"] > 0 and found[0]["reading"] == "feature 3"
    (alone,) = rows(capsys, f"{line} --seed 4")
    assert {k: v for k, v in alone.items() if k != "receipt"} == found[1]
    out, _ = run(capsys, f"{line} --seed 3 --seed 4")
    assert "seed 3\nbaseline  Story A." in out and out.count("unsteered CE ") == 2


def test_a_sweep_is_a_table_that_fits(capsys, folder, monkeypatch):
    line = f'steer {folder} --clamp 3=1x --add 5=.5x --prompt "{PROMPT}" --sweep 0,2,4 --seed 2'
    (row,) = rows(capsys, line)
    assert [one["strength"] for one in row["sweep"]] == [None, 0, 2, 4]
    (twice,) = rows(capsys, line.replace("1x", "2x").replace(".5x", "1x").replace("0,2,4", "1"))
    texts = [one["text"] for one in row["sweep"]]
    assert [one["text"] for one in twice["sweep"]] == [texts[0], texts[2]]
    (pair,) = rows(
        capsys, line.replace("1x", "4x").replace(".5x", "2x").replace("--sweep 0,2,4", "")
    )
    assert (pair["baseline"], pair["steered"]) == (texts[0], texts[3])
    out, _ = run(capsys, line)
    reply = " ".join(texts[3].removeprefix(PROMPT).split())
    assert re.search(rf"(?m)^4× .* {re.escape(reply)}$", out)
    as_terminal(monkeypatch, 70)
    out, _ = run(capsys, f"{line} --show")
    plain = re.sub("\033\\[[0-9;]*m", "", out)
    assert max(map(len, plain.splitlines())) <= 70 and "…" in plain
    assert "\033[4m" in out and "steered tokens underlined; bars: feature 3" in plain


def test_a_terminal_shows_text_while_it_is_written(capsys, folder, monkeypatch):
    line = f'steer {folder} --clamp 3=4x --prompt "{PROMPT}"'
    (row,) = rows(capsys, line)
    as_terminal(monkeypatch, 66)
    written = []
    original = side_by_side.write

    def spy(*args, **kwargs):
        written.append(kwargs["streamer"])
        return original(*args, **kwargs)

    monkeypatch.setattr(side_by_side, "write", spy)
    out, _ = run(capsys, line)
    assert len(written) == 2 and all(written)
    baseline, steered = out.split("unsteered CE")[0].split("steered   ")
    assert baseline.removeprefix("baseline  ").split() == row["baseline"].split()
    assert steered.split() == row["steered"].split()
    assert max(map(len, out.splitlines())) <= 80
    assert max(map(len, out.split("unsteered CE")[0].splitlines())) <= 66
    # Several texts can't be streamed: they stand in two columns.
    out, _ = run(capsys, f"{line} --seed 1 --seed 2")
    assert not any(written[2:]) and re.search(r"(?m)^  baseline +steered$", out)
    assert max(map(len, out.split("unsteered CE")[0].splitlines())) <= 66


def test_show_marks_what_the_receipt_counts(capsys, folder):
    line = f'steer {folder} --clamp 3=4x --prompt "{PROMPT}" --where generated --show'
    out, _ = run(capsys, line)
    text = out.split("steered\n")[1]
    assert re.search(r"Max ?«[^»]+»", text.split("steered tokens")[0])
    assert "bars: feature 3" in out and "█" in out


@pytest.mark.parametrize(
    ("options", "positions"),
    [
        ("", [1, 2, 3, 4, 5, 6, 7]),
        ("--where prompt", [1, 2, 3, 4, 5, 6, 7]),
        ("--where generated", []),
        ("--first 2", [1, 2]),
        ("--first 1 --last 2", [1, 6, 7]),
        ("--every 3", [3, 6]),
        ("--special --last 1 --first 1", [0, 7]),
        ("--after boy", [6, 7]),
    ],
)
def test_positions(capsys, folder, options, positions):
    line = f'steer {folder} --clamp 3=4x --prompt "{PROMPT}" --max-new-tokens 4 {options}'
    receipt = rows(capsys, line)[0]["receipt"]["edits"][0]
    assert receipt["positions"] == [[positions]]
    generated = receipt["counts"][0][0] - len(positions)
    assert (generated > 0) == ("prompt" not in options)


def test_a_condition_is_in_the_units_of_the_index(capsys, folder, small_run):
    highest = small_run.index.max_act(3)
    line = f'steer {folder} --add 5=1 --prompt "{PROMPT}" --max-new-tokens 30'
    raw = rows(capsys, f"{line} --if '3>{highest * 0.1!r}'")[0]
    times = rows(capsys, f"{line} --if '3 > .1x'")[0]
    assert raw == times
    always = rows(capsys, f"{line} --if '3>-1'")[0]["receipt"]["edits"][0]
    assert raw["receipt"]["edits"][0]["n_edited"] < always["n_edited"] == always["n_eligible"]
    until = rows(capsys, f"{line} --if '3>-1' --lasting until")[0]["receipt"]["edits"][0]
    assert until["n_edited"] == 0 and "until feature 3 > -1" not in until["edit"]


def test_fading_and_keeping_the_norm(capsys, folder):
    line = f'steer {folder} --clamp 5=30 --prompt "{PROMPT}" --max-new-tokens 20 --where generated'
    plain, linear, decay = (
        rows(capsys, f"{line} {more}")[0]["receipt"]["edits"][0]
        for more in ("", "--fade linear:5", "--fade decay:2")
    )
    assert plain["after_mean"] == pytest.approx(30)
    assert linear["n_edited"] == 5 < plain["n_edited"]
    assert decay["after_mean"] < 15
    opened = Run.open(folder)
    for keep in (True, False):
        (edit,) = Scoped(keep_norm=keep).applied(opened.edits(clamp={5: 30}), opened)
        assert edit.keep_norm == keep


def test_edits_are_kept_and_used_again(capsys, folder):
    line = f'steer {folder} --prompt "{PROMPT}" --max-new-tokens 10 --seed 5'
    out, _ = run(capsys, f"{line} --clamp 3=4x --add 5=2 --where generated --save sea")
    assert "--load sea" in out
    kept = folder / "steers" / "sea.steer.safetensors"
    assert kept.is_file()
    before = rows(capsys, f"{line} --clamp 3=4x --add 5=2 --where generated")[0]
    for name in ("sea", str(kept)):
        after = rows(capsys, f"{line} --load {name}")[0]
        assert after["steered"] == before["steered"] and after["reading"] == "feature 3"
    both = rows(capsys, f"{line} --load sea --add 7=3")[0]["receipt"]["edits"]
    assert len(both) == 3 and both[0]["edit"].startswith("add 3 ")
    assert both[0]["positions"][0][0] and not both[1]["positions"][0][0]
    # Without a prompt they are only kept.
    assert "edits in" in run(capsys, f"steer {folder} --clamp 3=1 --save other")[0]
    _, err = run(capsys, f"steer {folder} --clamp 3=1 --save other --html page.html", code=2)
    assert "nothing to continue" in err
    _, err = run(capsys, f"{line} --load see", code=2)
    assert "no edits at" in err and "keeps other, sea" in err
    _, err = run(capsys, f"{line} --load sea --where prompt", code=2)
    assert "brings its own positions" in err


def test_a_chat_is_what_the_template_writes(capsys, folder, templated):
    line = f'steer {folder} --clamp 3=4x --chat --prompt "The king" --prompt "The king named Max"'
    found = rows(capsys, f'{line} --system "The sea" --roles user --max-new-tokens 5')
    ids = templated.apply_chat_template(
        [{"role": "system", "content": "The sea"}, {"role": "user", "content": "The king"}],
        add_generation_prompt=True, tokenize=True, return_dict=False,
    )  # fmt: skip
    assert ids.count(templated.bos_token_id) == 1
    assert [row["prompt"] for row in found] == ["The king", "The king named Max"]
    assert not any(row["baseline"].startswith("The king") for row in found)
    first, second = (edit["positions"][0] for edit in found[1]["receipt"]["edits"])
    word = templated("The king", add_special_tokens=False)["input_ids"]
    king = next(i for i in range(len(ids)) if ids[i : i + len(word)] == word) + len(word) - 1
    assert king in first[0] and not first[1] and not second[0]
    assert len(second[1]) == len(first[0]) + 2
    assert max(first[0]) < len(ids) - 2  # the generation prompt is the assistant's
    counts = [edit["counts"][0] for edit in found[1]["receipt"]["edits"]]
    assert counts == [[len(first[0]), 0], [0, len(second[1])]]
    out, _ = run(capsys, f"{line} --roles user,assistant --max-new-tokens 5")
    assert "prompt    The king\nbaseline" in out
    _, err = run(capsys, f"{line} --roles user --where generated", code=2)
    assert "add assistant to --roles" in err
    _, err = run(capsys, f"{line} --roles system", code=2)
    assert "no message of system; the chat has user" in err
    templated.chat_template = "{{ raise_exception('no system here') }}"
    _, err = run(capsys, f"{line} --system x", code=2)
    assert "no system here" in err and "without --system" in err


class Page(HTMLParser):
    """What a page holds: its tags, what they point at, the marked and the shaded text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("sweep", ["", "--sweep 0,4"])
def test_the_page_opens_offline_and_escapes_what_it_is_given(capsys, folder, tmp_path, sweep):
    file = tmp_path / "page.html"
    prompt = "Story A. <script>alert(1)</script>"
    out, _ = run(
        capsys, f"steer {folder} --clamp 3=4x --prompt '{prompt}' --html {file} {sweep} --seed 1"
    )
    assert f"page in {file}" in out
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and not page.links and not {"script", "link", "img"} & set(page.tags)
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert prompt in page.text and "feature 3 set" in page.text and "‖Δ‖/‖x‖" in page.text
    assert page.tags.count("section") == (3 if sweep else 2)
    assert ("4×" in page.text) == bool(sweep) and "set to" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--clamp 3=4x --sweep 1,two", "--sweep '1,two' is no list of numbers"),
        ("--clamp 3=4x --sweep nan", "no list of numbers"),
        ("--clamp 3=4x --if 88", "write it in quotes"),
        ("--clamp 3=4x --if '3>high'", "'high' is no strength for feature 3"),
        ("--clamp 3=4x --if '999>1'", "999"),
        ("--clamp 3=4x --lasting from", "--lasting from is about a condition"),
        ("--clamp 3=4x --fade slow", "--fade 'slow' is not linear:TOKENS"),
        ("--clamp 3=4x --fade linear:0", "--fade 'linear:0' is not linear:TOKENS"),
        ("--clamp 3=4x --where generated --first 2", "switched off"),
        ("--clamp 3=4x --every 0", "every=0"),
        ("--clamp 3=4x --after zebra", "touched no token"),
        ("--clamp 3=4x --system x", "give --chat too"),
        ("--clamp 3=4x --roles user", "give --chat too"),
        ("--clamp 3=4x --chat", "has no chat template"),
        ("--clamp 3=4x --chat --roles nobody", "name some of system, user, assistant"),
        ("--clamp 3=4x --chat --roles user --save a", "--save can't keep --roles"),
        ("--clamp 3=4x --save a/b", "is not a name for edits"),
        ("--load nothing", "keeps none"),
        ("--load a/nothing.gguf", "no edits at a/nothing.gguf"),
        ("--load {run}/sae", "give a name, or a .safetensors"),
        ("--load {run}/sae/sae_weights.safetensors", "is no file of edits"),
    ],
)
def test_a_mistake_is_one_line(capsys, folder, options, message):
    out, err = run(capsys, f"steer {folder} --prompt x {options.format(run=folder)}", code=2)
    said = [x for x in err.splitlines() if x.startswith("saesteer: ")]
    assert len(said) == 1 and message in said[0] and not out
    assert not (folder / "steers").exists()
