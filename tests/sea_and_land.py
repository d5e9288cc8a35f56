"""Contexts about the sea and about the land, and an SAE whose features fire on their words."""

import numpy as np
import torch

from saesteer.core.model import HookPoint, unembedding
from saesteer.core.sae import Sae
from saesteer.core.shards import ContextBatch
from saesteer.features.words import Pieces
from saesteer.features.words_in import Lexicon
from tests.tiny import BOS, VOCAB, WIDTH, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LEXICON = Lexicon(Pieces(TOKENIZER), VOCAB)
SEA_WORDS = ["sea", "wave", "fish", "boat", "sail", "harbour"]
LAND_WORDS = ["tree", "garden", "bird", "road", "hill", "stone"]
COMMON = ["the", "a", "saw", "liked", "."]
SEA, BOAT, THE, DEAD, LAND = range(5)


def word_id(word: str) -> int:
    return int(TOKENIZER.convert_tokens_to_ids(word))


# Each word has a coordinate of its own in the stream.
AXES = {word_id(word): i for i, word in enumerate(SEA_WORDS + LAND_WORDS + COMMON)}


def an_sae() -> Sae:
    """Features that fire on the sea's words, on "boat", on "the", on nothing, on the land's."""
    encoder = torch.zeros(WIDTH, 5)
    for feature, words in enumerate([SEA_WORDS, ["boat"], ["the"], [], LAND_WORDS]):
        for word in words:
            encoder[AXES[word_id(word)], feature] = 1.0
    model = tiny_model("llama")
    decoder = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    decoder[SEA] = unembedding(model)[word_id("anchor")] * 100
    bias, centre = torch.full((5,), -0.5), torch.zeros(WIDTH)
    return Sae(encoder, bias, decoder, centre, "standard", HookPoint(1, "resid_post"), "tiny")


def some_batches(n: int = 40) -> list[ContextBatch]:
    """Contexts of one document each: about the sea, or about the land."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((n, 24), np.int32)
    for i in range(n):
        own = SEA_WORDS if i % 2 else LAND_WORDS
        words = [rng.choice(own if rng.random() < 0.4 else COMMON) for _ in range(23)]
        tokens[i] = [BOS, *map(word_id, words)]
    documents = np.repeat(np.arange(n, dtype=np.int32)[:, None], 24, axis=1)
    documents[:, 0] = -1
    x, noise = torch.zeros(n, 24, WIDTH), torch.Generator().manual_seed(0)
    for token, axis in AXES.items():
        x[..., axis] = torch.from_numpy(tokens == token) * (1 + torch.rand(n, 24, generator=noise))
    x[:, 0] = 50.0
    cuts = [slice(i, i + 8) for i in range(0, n, 8)]
    return [ContextBatch(tokens[c], documents[c], x[c], c.start) for c in cuts]
