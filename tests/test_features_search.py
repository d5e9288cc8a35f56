"""Keyword search over an index."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saesteer.errors import FeatureError, IndexingError
from saesteer.features import notes, store
from saesteer.features.hit import by_effect
from saesteer.features.migrate import writing
from saesteer.features.rank import MOST_RAISED, aboutness, rank
from saesteer.features.records import Entry, Example, Feature, Neighbour, TokenStat, WordStat
from saesteer.features.search import Index, marked, strength

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


def test_hits_are_json(index: Index) -> None:
    first = json.loads(json.dumps([asdict(hit) for hit in index.search("boat")]))[0]
    assert (first["id"], first["source"], first["output_score"]) == (0, "evidence", None)


def test_limits(index: Index) -> None:
    assert len(index.search("ocean", 3)) == 3
    assert index.search("ocean", 0) == []
    assert index.search("zzzz") == []


def test_an_expression_decides_what_is_found(index: Index) -> None:
    assert ids(index, "golden AND gate") == [7]
    assert ids(index, "golden -gate") == [5]
    assert ids(index, "golden NOT (gate OR boat)") == [5]
    assert set(ids(index, "gate OR kitchen")) == {3, 6, 7}
    assert ids(index, '"near a boat"') == [3]
    assert ids(index, '"a near boat"') == []
    assert ids(index, "kitch*") == [3]
    assert set(ids(index, "golden (gate OR kitchen)")) == {7}


def test_the_order_within_an_expression_is_that_of_its_words(index: Index) -> None:
    assert ids(index, "boat AND boat") == ids(index, "boat")
    assert ids(index, "boat -kitchen") == [i for i in ids(index, "boat") if i != 3]


def test_fields_restrict(index: Index) -> None:
    assert set(ids(index, "label:boat")) == {0, 1, 2}
    assert set(ids(index, "context:boat")) == {1, 2, 3}
    assert set(ids(index, "token:boat")) == {0, 1, 2}
    assert len(ids(index, "promotes:ocean")) == 9
    assert ids(index, "promotes:boat") == []
    assert ids(index, "promotes:ocean token:bread") == [3]
    assert ids(index, "label:ocean OR token:bread") == [3]


def test_filters_hold_beside_words_and_alone(index: Index) -> None:
    assert ids(index, "boat density<1%") == [1]
    assert ids(index, "boat density>=0.3") == [2]
    assert ids(index, "density>25%") == [2]
    assert ids(index, "is:dead") == [4]
    assert ids(index, "boat max_act>4") == []
    assert 4 not in ids(index, "-is:dead")
    for figure in ("output_score", "own_effect"):
        with pytest.raises(IndexingError, match=f"no {figure} was measured .*--effects"):
            index.search(f"boat {figure}>-1")
    with pytest.raises(IndexingError, match=r"say output_score .* or own_effect"):
        index.search("effect>.1")
    with pytest.raises(IndexingError, match=r"density<1%"):
        index.search("boat density<much")


def test_effect_puts_first_what_causes_what_it_fires_on(tmp_path: Path) -> None:
    effects = {0: -0.01, 1: 0.6, 3: 0.1, 5: 0.9, 6: 0.0}
    entries = [
        replace(e, feature=replace(e.feature, own_effect=own, output_score=own and own / 2))
        for e in ENTRIES
        for own in [effects.get(e.feature.id)]
    ]
    store.write(tmp_path / "i.sqlite", entries, {})
    with Index.open(tmp_path / "i.sqlite") as index:
        assert [hit.id for hit in index.search("boat")] == [0, 1, 2, 3]
        # 0 causes nothing of the kind, 2 wasn't measured, the others don't match.
        found = index.search("boat", sort="effect")
        assert [hit.id for hit in found] == [1, 3, 0, 2]
        assert [hit.own_effect for hit in found] == [0.6, 0.1, -0.01, None]
        assert [hit.output_score for hit in found] == [0.3, 0.05, -0.005, None]
        assert [hit.id for hit in index.search("boat", 2, sort="effect")] == [1, 3]
        assert [hit.id for hit in index.search("own_effect>-1", sort="effect")] == [5, 1, 3, 0, 6]
        assert [hit.id for hit in index.search("boat output_score>=.3")] == [1]
        with pytest.raises(IndexingError, match="sort"):
            index.search("boat", sort="size")  # type: ignore[arg-type]


def test_what_a_user_wrote_comes_first_and_filters(tmp_path: Path) -> None:
    path = tmp_path / "i.sqlite"
    store.write(path, ENTRIES, {"sae_hash": "abc"})
    with Index.open(path) as index:
        notes.rename(path, 3, "boat house")
        notes.tag(path, 3, ["Home"])
        notes.star(path, 1)
        assert ids(index, "boat")[0] == 3
        assert ids(index, "house") == [3]
        assert ids(index, "label:house") == [3]
        assert ids(index, "promotes:house") == []
        assert ids(index, "tag:home") == ids(index, 'boat tag:"home"') == [3]
        assert ids(index, "is:starred") == [1]
        assert ids(index, "boat -is:starred -tag:home") == [0, 2]
        first = index.search("boat", 1)[0]
        assert (first.label, first.source, first.tags) == ("boat house", "user", ("home",))
        assert "you wrote" in first.why
        assert index.search("is:starred")[0].starred


def test_neighbours_and_coactive_features_are_hits(tmp_path: Path) -> None:
    near = (Neighbour(6, 0.9), Neighbour(7, 0.5))
    feature = replace(ENTRIES[5].feature, neighbours=near, coactive=(Neighbour(7, 12.0, 40),))
    entries = [*ENTRIES[:5], replace(ENTRIES[5], feature=feature), *ENTRIES[6:]]
    store.write(tmp_path / "i.sqlite", entries, {})
    with Index.open(tmp_path / "i.sqlite") as index:
        assert [(hit.id, round(hit.score, 6)) for hit in index.neighbours(5)] == [
            (6, 0.9),
            (7, 0.5),
        ]
        assert index.neighbours(5, 1)[0].why == "decoder cosine 0.90"
        assert [hit.id for hit in index.coactive(5)] == [7]
        assert index.coactive(6) == []
        with pytest.raises(FeatureError):
            index.neighbours(99)


def test_misspelled_words_get_suggestions(index: Index) -> None:
    assert index.suggest("kichen") == ["kitchen"]
    assert index.suggest("Golden gaet") == ["Golden gate"]
    assert index.suggest("harbuor sial")[0] == "harbour sail"
    assert index.suggest("-label:kichen bread") == []  # what isn't wanted needn't be known
    assert index.suggest('"goldne" AND gate') == ['"golden" AND gate']
    assert index.suggest("boat") == index.suggest("zzzzzzzz") == index.suggest("") == []


def test_a_new_index_is_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "i.sqlite"
    store.write(path, ENTRIES, {})
    with Index.open(path) as index:
        assert ids(index, "kitchen") == [3]
        store.write(path, ENTRIES[:3], {})
        assert ids(index, "kitchen") == []
        assert index.n_features == 3


def test_threads_ask_one_index(index: Index) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ids(index, "boat"), range(16)))
    assert answers == [ids(index, "boat")] * 16


def test_words_in_thousands_of_features_rank_alike(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saesteer.features.frequent._LEAST", 0)
    path = tmp_path / "i.sqlite"
    store.write(path, ENTRIES, {})
    with Index.open(path) as other:
        for query in ("boat", "boat AND sea", "golden gate", "a -boat", "boat density<10%", "zz"):
            mine, theirs = index.search(query), other.search(query)
            assert [hit.id for hit in mine] == [hit.id for hit in theirs], query
            scores = [hit.score for hit in mine]
            assert scores == pytest.approx([hit.score for hit in theirs], rel=1e-5), query


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
    "boat AND AND sea",
    "(boat",
    "boat) OR (sea",
    "(" * 500 + "boat" + ")" * 500 + " OR sea",
    "boat OR " * 40 + "sea",
    '"" boat',
    '"!" AND boat',
    "NOT boat",
    "label: boat",
    "label:'boat'",
    "near : boat",
    "{label} : boat",
    "tag: boat",
    "boat is: dead",
    "boat\ntag:",
    "boat density max_act",
    "boat OR \0",
    "boat* OR *",
    'label:"boat" OR boat\0*',
]


@pytest.mark.parametrize("query", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_queries_are_words_or_nothing(index: Index, query: str) -> None:
    found = index.search(query)
    if "boat" in query and "aaaa" not in query:
        assert 0 in [hit.id for hit in found]


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(query=st.text(max_size=40) | st.text(alphabet='"*^():-+ANDORTNEab {}\0', max_size=20))
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


def test_search_imports_nothing_heavy(path: Path) -> None:
    code = (
        "import sys; from saesteer.features.search import Index\n"
        f"hits = Index.open({str(path)!r}).search('boat')\n"
        "heavy = {'torch', 'numpy', 'transformers', 'sae_lens'} & set(sys.modules)\n"
        "assert hits and not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_rank_is_monotone_in_its_evidence() -> None:
    firing = {"share": 0.08, "lift": 30, "recall": 0.95}
    good = aboutness(**firing)
    assert rank(0.5, good, 13, 3) > rank(0.4, good, 13, 3) > rank(0.4, good, 1, 3)
    assert rank(0.4, good, 13, 3) > rank(0.4, good, 13, 1)
    assert rank(0, good, 5, 1) > rank(0, good / 2, 5, 1)
    assert rank(1, 0, 0, 0, note=1) > rank(1, 0, 0, 0, written=1) > rank(1, 0, 0, 0)
    for worse in ({"recall": 0.2}, {"lift": 2}, {"share": 0.001}):
        assert aboutness(**{**firing, **worse}) < good
    assert aboutness(share=1, lift=1, recall=1) == 0
    assert rank(0, 0, 0, 0) == 0
    assert rank(0, good, 1e9, 1e9) == pytest.approx(MOST_RAISED * rank(0, good, 0, 0))


def test_a_concept_beats_its_word_and_a_word_beats_a_part_of_speech() -> None:
    a_word = aboutness(share=1 / 13, lift=40, recall=0.97)
    concept = rank(0.8, a_word, 13, 2.5)
    word = rank(1.0, aboutness(share=0.97, lift=500, recall=0.97), 1, 1)
    mixture = rank(1.0, a_word, 13, 1.1)
    noun = rank(0.3, aboutness(share=0.001, lift=4, recall=0.97), 16, 3)
    assert concept > mixture > word > noun


def test_what_is_dropped_early_is_not_among_the_best(tmp_path: Path) -> None:
    rng = random.Random(5)
    entries = []
    for i in range(60):
        words = {word: rng.random() for word in rng.sample(SEA, 3)}
        entry = a_feature(i, words, density=rng.random() / 40, lift=rng.choice([1.1, 3, 40]))
        wide = replace(entry.feature, breadth=20 * rng.random(), company=4 * rng.random())
        entries.append(replace(entry, feature=wide))
    store.write(tmp_path / "i.sqlite", entries, {})
    with Index.open(tmp_path / "i.sqlite") as index:
        for query in ("boat", "boat sea", "boat OR sea", "boat -sea", "wave promotes:ocean"):
            every = ids(index, query, 1000)
            assert len(every) > 5
            assert ids(index, query, 5) == every[:5]
            assert ids(index, query, 1) == every[:1]


def test_a_rare_form_does_not_vouch_for_a_frequent_one(tmp_path: Path) -> None:
    """Feature 0 fires on all of "scare" and nothing of "scared"; feature 1 the other way round."""
    scare, scared = WordStat("scare", 0.3, 50, 0.001), WordStat("scared", 0.3, 50, 0.009)
    entries = [
        replace(e, feature=replace(e.feature, words=(word,)))
        for e, word in (
            (a_feature(0, {"scare": 0.3}), scare),
            (a_feature(1, {"scared": 0.3}), scared),
        )
    ]
    store.write(tmp_path / "i.sqlite", entries, {})
    with Index.open(tmp_path / "i.sqlite") as index:
        for query in ("scared", "scare", "scar*"):
            first, second = index.search(query)
            assert (first.id, second.id) == (1, 0)
            assert first.why.startswith("fires on 90% of 'scared', 'scare' (30%")
            assert second.why.startswith("fires on 10% of 'scared', 'scare' (30%")


def test_a_star_does_not_make_a_judges_label_the_users(tmp_path: Path) -> None:
    path = tmp_path / "i.sqlite"
    store.write(path, [a_feature(0, {"sea": 0.5}), a_feature(1, {"ships": 0.5})], {})
    with writing(path) as connection:
        connection.execute("UPDATE features SET label = 'ship', label_source = 'judge'")
        notes.lay(connection, 0)
    with Index.open(path) as index:
        before = [(hit.id, hit.score, hit.why) for hit in index.search("ship")]
        notes.star(path, 0)
        notes.tag(path, 0, ["animals"])
        assert [(hit.id, hit.score, hit.why) for hit in index.search("ship")] == before
        assert index.search("animals")[0].why == "in what you wrote about it"
        notes.rename(path, 0, "ships")
        assert index.search("ship")[0].why == "in what you wrote about it"


def test_as_many_are_found_as_are_asked_for(tmp_path: Path) -> None:
    store.write(tmp_path / "i.sqlite", [a_feature(i, {"sea": 0.5}) for i in range(450)], {})
    with Index.open(tmp_path / "i.sqlite") as index:
        for query in ("sea", "sea AND water", "token:sea"):
            assert len(ids(index, query, 400)) == 400


def test_effects_are_weighed_by_their_root() -> None:
    assert by_effect(2.0, 0.25) == 1.0
    assert by_effect(2.0, -0.25) == by_effect(2.0, 0.0) == by_effect(2.0, None) == 0.0
