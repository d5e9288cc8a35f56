"""Pages, galleries and tables of features: whole, escaped, offline."""

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from some_features import SOME, features, read_only

from saesteer.errors import RunError
from saesteer.features import gallery, table, view
from saesteer.features.page import page
from saesteer.features.page_parts import text
from saesteer.features.records import Example, Feature, Histogram, Neighbour, Note, TokenStat
from saesteer.features.view_parts import clean

VOID = {"meta", "input"}
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\0\u202e"
SEA = SOME[0].feature
FULL = replace(
    SEA,
    output_score=0.321,
    next_tokens=(TokenStat(9, " sailed", 0.5, 10, 7.5, 0.01),),
    suppresses=((" land", -1.0),),
    activations=Histogram((0.0, 1.0, 2.0, 3.0, 4.0), (100, 25, 4, 0)),
    logits=Histogram((-1.0, 0.0, 1.0), (3, 4)),
    positions=(0.25, 0.0, 2.5, 0.0),
    neighbours=(Neighbour(7, 0.5),),
    coactive=(Neighbour(8, 12.0, 30),),
    note=Note("the sea", ("water", "blue"), True, "look at\nthe waves"),
)


class Parsed(HTMLParser):
    """A page's elements, text and scripts; an element that isn't closed in order fails."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        self.text = " ".join("".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.texts.append(data)


def check_offline(parsed: Parsed, *, scripts: int = 0) -> None:
    """Nothing is fetched, nothing runs but the gallery's own script."""
    assert len(parsed.scripts) == scripts
    for tag, attributes in parsed.elements:
        assert tag not in {"link", "img", "iframe", "base", "object"}
        assert not any(name.startswith("on") or name == "src" for name in attributes)
        assert re.fullmatch(r"((index|page-\d+)\.html)?(#f\d+)?", attributes.get("href") or "")
    policy = next(a for _, a in parsed.elements if a.get("http-equiv"))["content"]
    assert policy and policy.startswith("default-src 'none'")


def test_everything_measured_is_on_the_page() -> None:
    parsed = Parsed(page(FULL, beside={7: "boats", 8: "docks"}, about={"model": "tiny"}))
    check_offline(parsed)
    for expected in (
        "★ 0 the sea", "Named by you; its label is sea, boat, wave.", "water blue",
        "look at the waves", "fires on 2.00% of tokens (100)", "output score 0.321", "·sailed",
        "·ocean", "·land", "Activations", "Logits", "2–3 2.5×", "Strongest examples",
        "7 boats 0.5", "8 docks 12", "model tiny",
    ):  # fmt: skip
        # Cells stand next to each other in a page's text.
        assert expected.replace(" ", "") in parsed.text.replace(" ", ""), expected
    assert "prefers-color-scheme: dark" in page(FULL)


def test_what_was_not_measured_is_not_on_the_page() -> None:
    parsed = Parsed(page(replace(SEA, mean_act=0.0)))
    for absent in (
        "output score",
        "own effect",
        "mean",
        "Logits",
        "Followed",
        "Suppresses",
        "Near",
    ):
        assert absent not in parsed.text
    dead = Parsed(page(SOME[2].feature))
    assert "(never fired)" in dead.text and "examples" not in dead.text and "max" not in dead.text


def test_how_effects_were_measured_is_on_the_page_and_in_the_table() -> None:
    how = {"prompts": [EVIL], "amplification": 0.5, "top": 20}
    shown = Parsed(page(FULL, measured_with=how))
    check_offline(shown)
    assert "Output score and own effect measured by adding 0.5x after" in shown.text
    assert "effect" not in Parsed(page(replace(FULL, output_score=None), measured_with=how)).text
    file = io.StringIO(newline="")
    table.write(file, [FULL, SOME[2].feature], {0: how})
    sea, dead = csv.DictReader(io.StringIO(file.getvalue(), newline=""))
    assert json.loads(sea["measured_with"]) == how and dead["measured_with"] == ""


def test_nothing_from_outside_becomes_markup() -> None:
    example = Example(4.0, 0, 0, None, 0, (0, 1), (EVIL, EVIL), (4.0, 1.0))
    stat = replace(SEA.tokens[0], text=EVIL)
    record = replace(
        FULL, label=EVIL, note=Note(EVIL, (EVIL,), True, EVIL), tokens=(stat,), next_tokens=(stat,),
        promotes=((EVIL, 1.0),), token_set=EVIL, label_source=EVIL, examples=(example,),
    )  # fmt: skip
    clean_one = Parsed(page(FULL, beside={7: "a"}, about={"a": "b"}))
    evil = Parsed(page(record, beside={7: EVIL}, about={EVIL: EVIL}))
    check_offline(evil)
    assert {tag for tag, _ in evil.elements} <= {tag for tag, _ in clean_one.elements}
    assert "alert(1)" in evil.text


@settings(derandomize=True, max_examples=60)
@given(features())
def test_any_feature_makes_a_whole_page(record: Feature) -> None:
    record = replace(record, activations=None, logits=None)
    check_offline(Parsed(page(record, beside=dict.fromkeys(view.others(record), record.label))))


def test_tokens_are_shaded_by_their_activation() -> None:
    pieces, values = (" a", " b", " c", " d"), (0.0, 1.0, 4.0, 0.0)
    shown = text(Example(4.0, 0, 0, None, 2, (0, 1, 2, 3), pieces, values), 4.0)
    marks = [a for tag, a in Parsed(shown).elements if tag == "mark"]
    assert [mark["title"] for mark in marks] == ["1", "4"]
    shades = [float((mark["style"] or "").removeprefix("--a:")) for mark in marks]
    assert 0 < shades[0] < shades[1] == 0.7
    assert [mark.get("class") for mark in marks] == [None, "on"]
    assert Parsed(shown).text == "a b c d"
    # Above the highest that is known (an import), no darker than the darkest.
    assert "--a:0.70" in text(Example(9.0, 0, 0, None, 0, (0,), ("a",), (9.0,)), 4.0)


@pytest.mark.parametrize("n", [1, 500, 501, 1200])
def test_gallery_holds_every_feature_once(tmp_path: Path, n: int) -> None:
    records = (replace(SOME[i % 4].feature, id=i) for i in range(n))
    assert gallery.write(tmp_path, records, {"model": "tiny"}) == n
    front = Parsed((tmp_path / "index.html").read_text())
    check_offline(front, scripts=1)
    pages = sorted(tmp_path.glob("page-*.html"))
    assert len(pages) == -(-n // gallery.A_PAGE)
    found = []
    for path in pages:
        parsed = Parsed(path.read_text())
        check_offline(parsed)
        found += [a["id"] for _, a in parsed.elements if a.get("id")]
        for _, attributes in parsed.elements:
            if href := attributes.get("href"):
                assert (tmp_path / href).exists(), f"{path} links to {href}"
    assert sorted(found) == sorted(f"f{i}" for i in range(n))
    lines = listed(front)
    assert [line[0] for line in lines] == [i for i in range(n) if i % 4 != 2]
    assert lines[0][1:3] == ["sea, boat, wave", "sea boat wave"]


def listed(front: Parsed) -> list[list]:
    (lines,) = re.findall(r"const list = (\[.*?\]);\nconst box", front.scripts[0], re.S)
    return json.loads(lines)


def test_gallery_escapes_and_replaces_an_older_one(tmp_path: Path) -> None:
    gallery.write(tmp_path, (replace(SEA, id=i) for i in range(600)), {})
    (tmp_path / "page-notes.html").write_text("mine")
    evil = replace(SEA, label=EVIL, note=Note(EVIL), promotes=((EVIL, 1.0),))
    assert gallery.write(tmp_path, [evil], {EVIL: EVIL}) == 1
    front = Parsed((tmp_path / "index.html").read_text())
    check_offline(front, scripts=1)
    assert (
        clean(EVIL) in json.loads(re.findall(r"list = (\[.*?\]);\n", front.scripts[0], re.S)[0])[0]
    )
    check_offline(Parsed((tmp_path / "page-0.html").read_text()))
    assert not (tmp_path / "page-1.html").exists() and (tmp_path / "page-notes.html").exists()


def test_gallery_of_nothing_and_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    assert gallery.write(tmp_path / "empty", [], {}) == 0
    assert "0 features." in Parsed((tmp_path / "empty" / "index.html").read_text()).text
    with read_only(tmp_path), pytest.raises(RunError):
        gallery.write(tmp_path / "other", [SEA], {})


def rows(records: list[Feature]) -> list[dict[str, str]]:
    file = io.StringIO(newline="")
    assert table.write(file, iter(records)) == len(records)
    return list(csv.DictReader(io.StringIO(file.getvalue(), newline="")))


def test_table_has_a_row_a_feature_and_no_zero_for_what_is_missing() -> None:
    sea, dead = rows([FULL, SOME[2].feature])
    assert (sea["id"], sea["label"], sea["name"]) == ("0", "sea, boat, wave", "the sea")
    assert (sea["starred"], sea["tags"], sea["output_score"]) == ("1", "water blue", "0.321")
    assert (sea["words"], sea["suppresses"], sea["own_effect"]) == ("sea boat wave", "land", "")
    assert sea["example"] == "«sea» boat wave" and float(sea["density"]) == 0.02
    assert (dead["label"], dead["max_act"], dead["n_fired"]) == ("(never fired)", "", "0")


@settings(derandomize=True)
@given(st.text(max_size=20), st.sampled_from(["", "=", "+", "-", "@", " =", "\t=", "\r@", "\n-"]))
def test_no_cell_is_a_formula_or_breaks_a_row(given: str, start: str) -> None:
    label = start + given
    (row,) = rows([replace(SEA, label=label, note=Note(label), promotes=((label, 1.0),))])
    assert set(row) == set(table.COLUMNS)
    for cell in (row["label"], row["name"], row["promotes"]):
        assert not cell.lstrip().startswith(("=", "+", "-", "@"))
        assert not any(not c.isprintable() for c in cell)
    assert row["label"].removeprefix("'") == clean(label).removeprefix("'")
