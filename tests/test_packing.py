"""Packing long documents: in pieces, with nothing lost at the cuts."""

import numpy as np
import pytest

from saesteer.training import packing
from saesteer.training.packing import pack
from tests.tiny import tiny_tokenizer

WORDS = [*"the boy walked to the sea and saw a red boat then he slept".split(), ".", ".\n"]  # noqa: SIM905


def documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=n)) for n in lengths]


@pytest.mark.parametrize("piece", [12, 50, 400])
def test_documents_cut_into_pieces_give_the_same_contexts(monkeypatch, piece):
    texts = documents([3, 200, 1, 77, 130])
    tokenizer = tiny_tokenizer()
    whole = list(pack(texts, tokenizer, 16))
    monkeypatch.setattr(packing, "_PIECE_CHARACTERS", piece)
    cut = list(pack(texts, tokenizer, 16))
    assert len(cut) == len(whole) > 20
    for a, b in zip(cut, whole, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.documents, b.documents)


def test_no_text_longer_than_a_piece_reaches_the_tokenizer(monkeypatch):
    monkeypatch.setattr(packing, "_PIECE_CHARACTERS", 40)
    real, seen = packing._token_ids, []

    def watched(tokenizer, texts):
        seen.extend(texts)
        return real(tokenizer, texts)

    monkeypatch.setattr(packing, "_token_ids", watched)
    texts = [*documents([100, 5, 60]), "x" * 95]
    list(pack(texts, tiny_tokenizer(), 16))
    assert max(map(len, seen)) <= 40
    assert "".join(seen) == "".join(texts)
