"""The index file and keyword search over it."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saesteer.errors import FeatureError, IndexingError
from saesteer.features import store
from saesteer.features.rank import Firing, aboutness, rank
from saesteer.features.search import Index, marked, strength
from saesteer.features.store import Entry, Example, Feature, TokenStat, WordStat

SEA = ["sea", "boat", "wave", "sail", "harbour", "anchor", "shell"]
SEA += ["sailor", "fish", "net", "oar", "shore", "deck"]


def a_feature(
    id: int,
    words: dict[str, float],
    *,
    label: str = "",
    context: str = "they saw it",
    max_act: float = 4.0,
    density: float = 0.02,
    lift: float = 40.0,
) -> Entry:
    """A feature that fires on `words` (word -> share), whose example is «first word» + context."""
    first = next(iter(words), "")
    pieces = (f" {first}", *(f" {word}" for word in context.split()))
    tokens = tuple(range(len(pieces)))
    example = Example(max_act, 3, 0, 7, 0, tokens, pieces, (max_act,) * len(pieces))
    feature = Feature(
        id,
        label or ", ".join(list(words)[:3]) or "(never fired)",
        0.5,
        density if words else 0.0,
        max_act / 2,
        max_act if words else 0.0,
        100 if words else 0,
        float(len(words)),
        min(3.0, len(words)),
        tokens=tuple(
            TokenStat(i, f" {w}", s, 10, lift, 0.01) for i, (w, s) in enumerate(words.items())
        ),
        words=tuple(WordStat(w, s, lift, 0.01) for w, s in words.items()),
        promotes=((" ocean", 1.5), (" water", 1.0)) if words else (),
        suppresses=((" desert", -1.5),) if words else (),
        examples=(example,) if words else (),
    )
    texts = {
        "label": feature.label if words else "",
        "words": " ".join(words),
        "near": first,
        "promotes": "ocean water" if words else "",
        "contexts": "".join(pieces) if words else "",
    }
    return Entry(feature, texts)


ENTRIES = [
    a_feature(0, dict.fromkeys(SEA, 1 / len(SEA)), label="sea, boat, wave"),
    a_feature(1, {"boat": 0.97}, label="'boat'", density=0.002),
    a_feature(2, {"the": 0.9, "boat": 0.001}, density=0.3, lift=1.1, context="boat boat boat sank"),
    a_feature(3, {"kitchen": 0.4, "bread": 0.4}, context="was near a boat and a boat"),
    a_feature(4, {}),
    a_feature(5, {"golden": 0.5}),
    a_feature(6, {"gate": 0.5}),
    a_feature(7, {"golden": 0.4, "gate": 0.4}),
    a_feature(8, {"waving": 0.9}, label="'waving'"),
    a_feature(9, {"naïve": 0.5, "海": 0.4}),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "a run's folder" / "features.sqlite"
    store.write(path, ENTRIES, {"sae_hash": "abc", "n_tokens": 5000})
    return path


@pytest.fixture
def index(path: Path) -> Iterator[Index]:
    with Index.open(path) as index:
        yield index


def ids(index: Index, query: str, limit: int = 10) -> list[int]:
    return [hit.id for hit in index.search(query, limit)]


def test_a_record_comes_back_as_it_was_written(index: Index) -> None:
    for entry in ENTRIES:
        assert index.feature(entry.feature.id) == entry.feature
    assert index.meta == {"sae_hash": "abc", "n_tokens": 5000, "n_features": 10, "n_alive": 9}


def test_the_concept_comes_first_then_the_word_then_mere_mentions(index: Index) -> None:
    found = ids(index, "boat")
    assert found[:2] == [0, 1]
    assert set(found[2:]) == {2, 3}


def test_any_of_a_concepts_words_finds_it(index: Index) -> None:
    for word in SEA:
        assert ids(index, word)[0] == 0, word


def test_a_feature_with_both_words_comes_before_those_with_one(index: Index) -> None:
    assert ids(index, "golden gate") == [7, 5, 6] or ids(index, "golden gate") == [7, 6, 5]


def test_words_are_stemmed(index: Index) -> None:
    assert ids(index, "BOATS")[0] == 0
    assert 8 in ids(index, "waves")
    assert 0 in ids(index, "waved")
    assert ids(index, "naive") == [9]


def test_beginnings_fill_up_a_short_list_after_whole_words(index: Index) -> None:
    assert ids(index, "kitch") == [3]
    assert ids(index, "sail")[0] == 0
    assert ids(index, "gat") == ids(index, "gate")
    assert ids(index, "bo") == []  # too short to be a beginning


def test_promoted_tokens_are_found(index: Index) -> None:
    assert 4 not in ids(index, "ocean")
    assert set(ids(index, "ocean")) == {0, 1, 2, 3, 5, 6, 7, 8, 9}


def test_a_hit_says_what_and_why(index: Index) -> None:
    hit = index.search("boat", 1)[0]
    assert hit.label == "sea, boat, wave"
    assert hit.top_tokens[:2] == ("sea", "boat")
    assert hit.example == "«sea» they saw it"
    assert "'boat'" in hit.why
    assert (hit.max_act, hit.density) == (4.0, 0.02)
    assert "examples" in index.search("near", 1)[0].why


def test_limits(index: Index) -> None:
    assert len(index.search("ocean", 3)) == 3
    assert index.search("ocean", 0) == []
    assert index.search("zzzz") == []


HOSTILE = [
    "",
    " \n\t",
    '"',
    '"boat',
    "boat*",
    "NEAR(boat, 2)",
    "boat AND",
    "NOT",
    "OR OR",
    "label:boat",
    "^boat",
    "-boat",
    "boat\0sea",
    "'; DROP TABLE features; --",
    "😀",
    "😀 boat",
    "\ud800",
    "a" * 10_000,
    "boat " * 5_000,
    '"' * 10_000,
    "({[<",
    "\u202eboat",
    "é́́",
]


@pytest.mark.parametrize("query", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_queries_are_words_or_nothing(index: Index, query: str) -> None:
    found = index.search(query)
    if "boat" in query and "aaaa" not in query:
        assert 0 in [hit.id for hit in found]


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(query=st.text(max_size=40) | st.text(alphabet='"*^():-+ANDORTNE{}\0', max_size=20))
def test_no_query_is_an_error(index: Index, query: str) -> None:
    assert isinstance(index.search(query), list)


def test_unknown_features(index: Index) -> None:
    for wrong in (-1, 10, 10**30, True, "3", 2.0):
        with pytest.raises(FeatureError, match="features 0 to 9"):
            index.feature(wrong)  # type: ignore[arg-type]
    assert index.max_act(1) == 4.0
    assert index.max_act(4) == 0.0


def test_strengths(index: Index) -> None:
    assert index.strength(1, "8x") == 32.0
    assert index.strength(1, "-2.5X") == -10.0
    assert index.strength(1, " .5 x ") == 2.0
    assert index.strength(1, 12) == 12.0
    assert index.strength(1, "1e1") == 10.0
    assert index.strength(4, "3") == 3.0
    with pytest.raises(FeatureError, match="feature 4 never fired"):
        index.strength(4, "8x")
    with pytest.raises(FeatureError, match="saesteer index"):
        strength("8x", None)
    for wrong in ("", "x", "8 times", "nan", "nanx", "inf", "-infx", "1e999", "8xx", "--8", "８x"):
        with pytest.raises(FeatureError, match="highest activation"):
            strength(wrong, 1.0)
    for number in (float("nan"), float("inf"), True, None):
        with pytest.raises(FeatureError):
            strength(number, 1.0)  # type: ignore[arg-type]
    with pytest.raises(FeatureError, match="too large"):
        strength("1e308x", 100.0)


def test_the_firing_token_is_marked() -> None:
    example = Example(1.0, 0, 0, 0, 1, (1, 2, 3), (" a", " boat", "s"), (0.0, 1.0, 0.0))
    assert marked(example) == "a «boat»s"
    assert marked(replace(example, pieces=(" a", "\n", "s"))) == "a\n«»s"


def test_damaged_files_are_refused_in_one_line(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    other = tmp_path / "other.sqlite"
    sqlite3.connect(other).execute("CREATE TABLE t (a)").connection.close()
    newer = tmp_path / "newer.sqlite"
    newer.write_bytes(whole)
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    cases = {
        "there is no feature index": None,
        "is no feature index;": b"not a database at all" * 100,
        "is cut off": whole[: len(whole) // 2],
        "no feature index but another SQLite file": other.read_bytes(),
        "has version 99, expected 1": newer.read_bytes(),
        "is no feature index": b"",
    }
    for message, data in cases.items():
        file = tmp_path / "features.sqlite"
        file.unlink(missing_ok=True)
        if data is not None:
            file.write_bytes(data)
        with pytest.raises(IndexingError, match=message) as raised:
            Index.open(file)
        assert "saesteer index" in str(raised.value)
        assert "\n" not in str(raised.value)


def test_rot_inside_is_an_error_of_ours(path: Path, tmp_path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)  # the schema page is whole
    rotten = tmp_path / "rotten.sqlite"
    rotten.write_bytes(data)
    with pytest.raises(IndexingError, match="damaged"), Index.open(rotten) as index:
        index.search("boat")


def test_a_failed_write_leaves_the_old_index(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "features.sqlite"
    file.write_bytes(path.read_bytes())

    def broken() -> Iterator[Entry]:
        yield ENTRIES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write(file, broken(), {})
    assert file.read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["features.sqlite"]


def test_lone_surrogates_and_nul_in_text_are_stored(tmp_path: Path) -> None:
    odd = a_feature(0, {"bo\0at": 0.5, "\ud800x": 0.4}, label="\0\ud800")
    store.write(tmp_path / "i.sqlite", [odd], {})
    with Index.open(tmp_path / "i.sqlite") as index:
        assert index.feature(0).n_fired == 100


def test_search_imports_nothing_heavy(path: Path) -> None:
    code = (
        "import sys; from saesteer.features.search import Index\n"
        f"hits = Index.open({str(path)!r}).search('boat')\n"
        "heavy = {'torch', 'numpy', 'transformers', 'sae_lens'} & set(sys.modules)\n"
        "assert hits and not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_rank_is_monotone_in_its_evidence() -> None:
    good = Firing(share=0.08, lift=30, recall=0.95)
    assert rank(0.5, [good], 13, 3) > rank(0.4, [good], 13, 3) > rank(0.4, [good], 1, 3)
    assert rank(0.4, [good], 13, 3) > rank(0.4, [good], 13, 1)
    assert rank(0, [good, good], 5, 1) > rank(0, [good, Firing()], 5, 1)
    for worse in (replace(good, recall=0.2), replace(good, lift=2), replace(good, share=0.001)):
        assert aboutness(worse) < aboutness(good)
    assert aboutness(Firing(share=1, lift=1, recall=1)) == 0
    assert rank(0, [], 0, 0) == 0


def test_a_concept_beats_its_word_and_a_word_beats_a_part_of_speech() -> None:
    concept = rank(0.8, [Firing(share=1 / 13, lift=40, recall=0.97)], 13, 2.5)
    word = rank(1.0, [Firing(share=0.97, lift=500, recall=0.97)], 1, 1)
    mixture = rank(1.0, [Firing(share=1 / 13, lift=40, recall=0.97)], 13, 1.1)
    noun = rank(0.3, [Firing(share=0.001, lift=4, recall=0.97)], 16, 3)
    assert concept > mixture > word > noun
