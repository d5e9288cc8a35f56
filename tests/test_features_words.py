"""Tokens as text, whole words, and labels, through three kinds of tokenizer."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saesteer.features import labels
from saesteer.features.labels import NEVER, Completions
from saesteer.features.store import Example, TokenStat, WordStat
from saesteer.features.words import Pieces, is_whole, word_at


def sentencepiece() -> PreTrainedTokenizerFast:
    """'▁' before a word, bytes for what is not in the vocabulary, as in Llama."""
    words = ["<unk>", "▁", "▁a", "a", "▁bo", "at", "▁boat", "▁the", ".", "▁The", "n", "'", "t"]
    vocab = {w: i for i, w in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    merges = [("▁", "a")]
    inner = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def byte_level() -> PreTrainedTokenizerFast:
    """'Ġ' for a space, as in GPT-2."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {w: i for i, w in enumerate([*letters, "Ġbo", "at", "Ġboat", "Ġthe", "Ċ"])}
    inner = Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def wordpiece() -> PreTrainedTokenizerFast:
    """'##' before what goes on with a word, as in BERT."""
    words = ["[UNK]", "a", "bo", "##at", "boat", "the", "."]
    inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


TOKENIZERS = {
    "sentencepiece": (sentencepiece, ["▁the", "▁bo", "at", "▁boat"]),
    "byte-level": (byte_level, ["Ġthe", "Ġbo", "at", "Ġboat"]),
    "wordpiece": (wordpiece, ["the", "bo", "##at", "boat"]),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_read_as_in_the_middle_of_a_text(kind: str) -> None:
    make, spelled = TOKENIZERS[kind]
    tokenizer = make()
    ids = tokenizer.convert_tokens_to_ids(spelled)
    pieces = Pieces(tokenizer)
    assert pieces.texts(ids) == [" the", " bo", "at", " boat"]
    assert "".join(pieces.window(ids)) == " the boat boat"
    assert [word_at(pieces.window(ids), i) for i in range(4)] == ["the", "boat", "boat", "boat"]
    assert [is_whole(pieces.window(ids), i) for i in range(4)] == [True, False, False, True]


@pytest.mark.parametrize("make", [sentencepiece, byte_level])
def test_characters_of_several_tokens(make: type) -> None:
    tokenizer = make()
    spell = {
        sentencepiece: [f"<0x{b:02X}>" for b in "é🙂".encode()],
        byte_level: tokenizer.convert_ids_to_tokens(tokenizer.encode("é🙂")),
    }[make]
    ids = tokenizer.convert_tokens_to_ids(spell)
    assert len(ids) == 6
    pieces = Pieces(tokenizer)
    window = pieces.window([*ids, *ids[:1]])
    assert len(window) == 7
    assert [text for text in window if text] == ["é", "🙂", "\ufffd"]  # the last is cut off


def test_words_around_pieces() -> None:
    assert word_at([" don", "'", "t", " go"], 2) == "don't"
    assert word_at([" don", "'", "t", " go"], 0) == "don't"
    assert word_at(["sea", "-", "side"], 0) == "sea"
    assert word_at([" boat", "."], 1) == "."
    assert word_at([" a", "\n"], 1) == "\n"
    assert word_at(["海" * 20, "船", "浜" * 20], 1) == "船"
    assert word_at([" half", ""], 0) == "half"
    assert word_at([" x y"], 0) == "x"


def example(pieces: list[str], firing: int, value: float = 1.0, **more: float) -> Example:
    activations = [0.0] * len(pieces)
    activations[firing] = value
    ids = tuple(hash(piece) % 10_000 for piece in pieces)
    return Example(value, 0, firing, 0, firing, ids, tuple(pieces), tuple(activations))


def token(text: str, share: float, lift: float = 50.0, base: float = 1e-3) -> TokenStat:
    return TokenStat(hash(text) % 10_000, text, share, 10, lift, base)


def named(tokens: list[TokenStat], examples: list[Example]) -> tuple[str, float]:
    words = labels.words_of(tokens, examples, Completions({}))
    return labels.label(words, examples)


def test_label_names_what_carries_the_activation_and_is_not_frequent() -> None:
    tokens = [token(" the", 0.4, lift=1.1, base=0.05)]
    tokens += [token(" sea", 0.25), token(" boat", 0.2), token(" wave", 0.14)]
    label, confidence = named(tokens, [])
    assert label == "sea, boat, wave"
    assert confidence == pytest.approx(0.59 * (1 - 1 / 50))


def test_spellings_of_a_word_are_merged() -> None:
    label, confidence = named([token(" Boat", 0.3), token("boat", 0.2), token(" boat", 0.4)], [])
    assert label == "'boat'"
    assert confidence == pytest.approx(0.9 * (1 - 1 / 50))


def test_function_words_are_named_only_where_nothing_else_carries_the_feature() -> None:
    assert named([token(" of", 0.5, lift=30), token(" boat", 0.3)], [])[0] == "boat"
    assert named([token(" of", 0.6, lift=30), token(" to", 0.39, lift=30)], [])[0] == "of, to"
    assert named([token(".", 0.5, lift=9), token(",", 0.5, lift=8)], [])[0] == "., ,"


def test_one_word_features_say_where_it_stands() -> None:
    pieces = [" saw", " a", " boat", " now"]
    same = [example(pieces, 2)] * 3
    assert named([token(" boat", 1.0)], same)[0] == "'boat' after 'a'"
    others = [example([f" w{i}", " boat", f" v{i}"], 1) for i in range(4)]
    assert named([token(" boat", 1.0)], others)[0] == "'boat'"
    before = [example([f" w{i}", " boat", " sank"], 1) for i in range(4)]
    assert named([token(" boat", 1.0)], before)[0] == "'boat' before 'sank'"


def test_pieces_are_labelled_by_the_words_they_are_part_of() -> None:
    examples = [example([" the", " bo", "at"], 1)] * 3 + [example([" a", " bo", "wl"], 1)]
    words = labels.words_of([token(" bo", 1.0)], examples, Completions({}))
    assert [(w.text, round(w.share, 2)) for w in words] == [("boat", 0.75), ("bowl", 0.25)]
    # A token that is in none of the feature's own examples: as it was seen elsewhere.
    seen = Completions.of([([token(" bo", 1).id, 1, 2], [" bo", "at", "."])])
    words = labels.words_of([token(" bo", 1.0)], [], seen)
    assert [w.text for w in words] == ["boat"]


def test_a_dead_feature_says_so() -> None:
    assert named([], []) == (NEVER, 0.0)


def test_confidence_is_low_where_words_are_as_frequent_as_anywhere() -> None:
    assert named([token(" x", 0.5, lift=1.0), token(" y", 0.4, lift=1.2)], [])[1] < 0.1


def test_breadth_counts_own_words() -> None:
    assert labels.breadth([]) == 0
    assert labels.breadth([WordStat("boat", 0.5, 20, 0.1)]) == pytest.approx(1)
    even = [WordStat(f"w{i}", 0.05, 20, 0.1) for i in range(13)]
    assert labels.breadth(even) == pytest.approx(13)
    assert labels.breadth([*even, WordStat("the", 0.35, 1.1, 0.1)]) == pytest.approx(13)


def test_company_counts_own_words_that_fire_together() -> None:
    own = [WordStat(w, 0.3, 20, 0.1) for w in ("sea", "boat", "wave")]
    alone = Example(1, 0, 0, 0, 1, (1, 2), (" the", " boat"), (0.0, 1.0))
    together = Example(1, 0, 0, 0, 0, (1, 2, 3), (" boat", " sea", " the"), (1.0, 0.5, 0.1))
    assert labels.company(own, [alone]) == 1
    assert labels.company(own, [alone, together]) == 1.5  # "the" is no word of its own
    assert labels.company(own, []) == 0
