"""Features and hits in a terminal: what is shown, how wide it is, what never reaches it."""

import re
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from some_features import SOME, features

from saesteer.features import view
from saesteer.features.hit import hit
from saesteer.features.records import Example, Feature, Histogram, Neighbour, Note, TokenStat
from saesteer.features.view_parts import (
    around_mark,
    bars,
    clean,
    columns,
    cut,
    fit,
    highlighted,
    places,
    tenths,
    trimmed,
)

SEA = SOME[0].feature
FIRED = replace(
    SEA,
    decoder_norm=1.25,
    output_score=0.321,
    own_effect=0.654,
    token_set="names of ships",
    token_set_score=5.5,
    next_tokens=(TokenStat(9, " sailed", 0.5, 10, 7.5, 0.01),),
    suppresses=((" land", -1.0),),
    activations=Histogram((0.0, 1.0, 2.0, 3.0, 4.0), (100, 25, 4, 0)),
    logits=Histogram((-1.0, 0.0, 1.0), (3, 4)),
    positions=(0.25, 0.0, 0.75, 0.0),
    neighbours=(Neighbour(7, 0.5),),
    coactive=(Neighbour(8, 12.0, 30),),
    note=Note("the sea", ("water", "blue"), True, "look at\nthe waves"),
)


def plain(text: str) -> str:
    return re.sub(r"\033\[\d*m", "", text)


def example(*pieces: str, firing: int = 0, value: float = 4.0, **given) -> Example:
    n = len(pieces)
    return Example(value, 0, 0, None, firing, tuple(range(n)), pieces, (value,) * n, **given)


def test_everything_measured_is_shown() -> None:
    shown = view.feature(FIRED, beside={7: "boats", 8: "harbours"})
    for expected in (
        "★ feature 0: the sea",
        "named by you; its label is sea, boat, wave",
        "#water #blue",
        "look at↵the waves",
        "label confidence 0.50",
        "fires on 2.00% of tokens (100)",
        "max 4",
        "mean 2",
        "output score 0.321",
        "own effect 0.654",
        "decoder norm 1.25",
        "promotes the set names of ships (z 5.5)",
        "·sailed 7.5",
        "·ocean",
        "·land",
        "«sea»",
        "   0.5  feature 7  boats",
        "    12  feature 8  harbours",
    ):
        assert expected in shown, f"{expected!r} not in:\n{shown}"


def test_what_was_not_measured_is_not_shown() -> None:
    shown = view.feature(replace(SEA, mean_act=0.0))
    for absent in ("output score", "own effect", "decoder norm", "the set", "mean", "followed"):
        assert absent not in shown
    assert not any(word in shown for word in ("activations ", "logits ", "place", "nearest", "#"))
    dead = view.feature(SOME[2].feature)
    assert dead.startswith("feature 2: (never fired)") and "max" not in dead and "«" not in dead
    assert "·ocean" in dead


def test_label_of_a_judge_has_its_score_not_the_evidence_s() -> None:
    shown = view.feature(replace(SEA, label_source="judge", label_score=0.875))
    assert "label by a judge, scored 0.88" in shown and "confidence" not in shown
    shown = view.feature(replace(SEA, label_source="judge"))
    assert "label by a judge · fires" in shown


@st.composite
def histograms(draw: st.DrawFn) -> Histogram | None:
    counts = draw(st.lists(st.integers(0, 2**40), max_size=40))
    low, step = draw(st.floats(-1e6, 1e6)), draw(st.floats(0, 1e6))
    edges = tuple(low + i * step for i in range(len(counts) + 1))
    return Histogram(edges, tuple(counts)) if counts else None


SHOWN = st.builds(replace, features(), activations=histograms(), logits=histograms())


@settings(derandomize=True, max_examples=150)
@given(SHOWN, st.sampled_from([80, 81, 133]), st.booleans())
def test_any_feature_fits_the_terminal(record: Feature, width: int, colour: bool) -> None:
    labels = dict.fromkeys(view.others(record), "a long label " * 20)
    shown = view.feature(record, colour=colour, width=width, beside=labels, of_each_tenth=2)
    assert ("\033" in shown) == colour
    for line in plain(shown).split("\n"):
        assert columns(line) <= width
        assert line == clean(line)
    found = view.hits([hit(record, 1.0, "why " * 40)], "x", colour=colour, width=width)
    assert all(columns(line) <= width for line in plain(found).split("\n"))


@settings(derandomize=True)
@given(st.text(max_size=40), st.integers(1, 30))
def test_cut_is_a_prefix_that_fits(text: str, width: int) -> None:
    short = cut(text, width)
    assert columns(short) <= width
    assert short == text or (short.endswith("…") and text.startswith(short[:-1]))
    assert columns(fit(text, width)) == width
    assert columns(around_mark(f"{text} «x» {text}", width + 5, False)) <= width + 5


def test_control_characters_never_reach_the_terminal() -> None:
    evil = "\033[2Jx\r\n\u202e\0"
    note = Note(evil, (evil,), True, evil)
    record = replace(FIRED, label=evil, note=note, token_set=evil, promotes=((evil, 1.0),))
    record = replace(
        record, examples=(example(evil, evil),), tokens=(replace(SEA.tokens[0], text=evil),)
    )
    texts = [
        view.feature(record, beside={7: evil}),
        view.hits([hit(record, 1.0, evil)], evil, note=evil),
        view.hits([], evil, suggestions=[evil], note=evil),
    ]
    for text in texts:
        assert not any(not c.isprintable() and c != "\n" for c in text)


def test_firing_token_is_marked_and_the_farther_ones_are_dropped() -> None:
    pieces = tuple(f" word{i}" for i in range(30))
    shown = highlighted(example(*pieces, firing=15), 40, False)
    assert "«word15»" in shown and "word14" in shown and "word16" in shown
    assert shown.startswith("…") and shown.endswith("…") and columns(shown) <= 40
    acts = (4.0, 0.5, 2.0, 0.0)
    coloured = highlighted(replace(example("a", "b", "c", "d"), activations=acts), 40, True)
    assert coloured == "\033[1ma\033[0mb\033[4mc\033[0md"
    assert columns(highlighted(example("海" * 300), 40, False)) <= 40


def test_one_example_of_each_tenth_the_highest_first() -> None:
    drawn = [example("a", value=v, group=g) for v, g in ((9.0, 9), (8.0, 9), (1.0, 0), (3.0, 4))]
    assert [x.value for x in tenths([example("t"), *drawn], 1)] == [9.0, 3.0, 1.0]
    assert len(tenths(drawn, 2)) == 4


def test_bars_are_as_high_as_the_counts() -> None:
    assert bars([0, 1, 4, 8]) == " ▂▅█"
    assert bars([]) == "" and bars([0.0, 0.0]) == "  "
    assert trimmed(Histogram((0, 1, 2, 3, 4), (0, 2, 0, 0))) == Histogram((1, 2), (2,))
    assert trimmed(Histogram((0, 0, 0), (0, 0))) == Histogram((0, 0), (0,))


def test_places_are_powers_of_two_and_the_last_is_open() -> None:
    assert places((0.5, 0.25, 0.0, 0.25, 0.0, 0.0)) == [
        ("0", 0.5), ("1", 0.25), ("2–3", 0.0), ("4–7", 0.25)
    ]  # fmt: skip
    assert places((0.0,) * 11 + (1.0,))[-1] == ("1024+", 1.0)
    assert places(()) == [] and places((0.0, 0.0)) == []


def test_hits_say_who_wrote_the_label_and_what_was_measured() -> None:
    one = hit(replace(FIRED, note=replace(FIRED.note, name="ships")), 1.0, "fires on 'sea'")
    shown = view.hits([one], "sea", width=100)
    assert shown.startswith(" 1. ★ feature 0  ships")
    told = "fires on 'sea' · output 0.32 · own 0.65 · named by you · #water · #blue"
    assert told in shown
    bare = view.hits([hit(SEA, 1.0, "why")], "sea")
    assert bare.split("\n")[1] == "    why"


def test_of_a_hit_the_reason_is_cut_before_the_figures_and_the_tags_before_both():
    record = replace(FIRED, output_score=-0.00012, own_effect=-0.00034, note=None)
    why = "fires on 100% of 'scared', on 99% of 'scare', promotes 'scary', names 'frightened'"
    line = view.hits([hit(record, 1.0, why)], "x").split("\n")[1]
    assert line.startswith("    fires on 100% of 'scared', ") and columns(line) <= 80
    assert line.endswith("… · output -0.00012 · own -0.00034")
    tagged = replace(record, note=Note(None, ("animals", "at-the-seaside", "x"), False, ""))
    line = view.hits([hit(tagged, 1.0, "fires on 'sea'")], "x").split("\n")[1]
    assert "fires on 'sea' · output -0.00012 · own -0.00034 · #animals" in line
    assert columns(line) == 80 and line.endswith("…")


def test_how_effects_were_measured_is_said_where_they_are_shown():
    how = {"prompts": ["From my experience,"], "amplification": 0.5, "top": 20}
    shown = view.feature(FIRED, measured_with=how)
    assert "effects measured by adding 0.5x after 'From my experience,'" in shown
    assert "effects" not in view.feature(FIRED)
    bare = replace(FIRED, output_score=None, own_effect=None)
    assert "effects" not in view.feature(bare, measured_with=how)
    how["prompts"] = ["x" * 100, "y"]
    shown = view.feature(FIRED, measured_with=how)
    assert "adding 0.5x after 2 prompts, the first '…xxx" in " ".join(shown.split())
    assert max(map(columns, shown.split("\n"))) <= view.WIDTH
    assert "the index doesn't say" in view.feature(FIRED, measured_with={})


def test_places_and_how_often_it_fires_there_stand_above_one_another():
    """Twelve places fit into 80 columns."""
    ratios = (0.0, 4.2, 0.04, 1.0, 37.6, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 9.96)
    lines = view.feature(replace(SEA, positions=ratios)).split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith("how often it fires by place"))
    token, times = lines[at + 1 : at + 3]
    assert token.split() == ["token", *(name for name, _ in places(ratios))]
    assert token.split()[-1] == "1024+"
    assert times.split()[:6] == ["times", "0", "4.2", "<.1", "1.0", "38"]
    assert times.split()[-1] == "10" and len(token) == len(times) <= 80
    assert token.index("2–3") + 3 == times.index("<.1") + 3


def test_nothing_found_suggests_and_the_query_s_reading_is_said_first() -> None:
    shown = view.hits(
        [], "bota", suggestions=["boat", "bolt"], advice="try another", note="read as words"
    )
    assert shown.split("\n") == [
        "read as words",
        "no feature matches 'bota'; try another",
        "did you mean 'boat' or 'bolt'?",
    ]
    assert view.hits([], "zz").count("\n") == 0


def test_no_figure_of_a_feature_is_forgotten() -> None:
    """A field that is added to the records must be shown, or be named here."""
    inner = {
        "id",
        "examples",
        "breadth",
        "company",
        "label_source",
        "label_score",
        "token_set_score",
    }
    bare = replace(SEA, mean_act=0.0)
    for field in fields(Feature):
        value = getattr(FIRED, field.name)
        if field.name in inner or value == getattr(SEA, field.name):
            continue
        changed = view.feature(replace(bare, **{field.name: value}))
        assert changed != view.feature(bare), f"{field.name} isn't shown"


@pytest.mark.parametrize("width", [80, 120])
def test_histogram_is_wider_where_there_is_room(width: int) -> None:
    many = Histogram(tuple(float(i) for i in range(33)), (1,) * 32)
    line = next(
        line
        for line in view.feature(replace(SEA, activations=many), width=width).split("\n")
        if "activations  " in line
    )
    assert line.count("█") == (32 if width == 80 else 64)
