"""What was seen of every feature: sums, histograms, examples; each exactly mergeable.

Memory does not grow with the number of tokens. Special tokens are left out of everything: BOS
activations are often an order of magnitude above all others, and "8x" would mean nothing.
"""

from copy import deepcopy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saesteer.errors import IndexingError
from saesteer.features.block import Block
from saesteer.features.coactive import TokenSample
from saesteer.features.examples import Examples, Firings, Window, strongest
from saesteer.features.histogram import Histograms
from saesteer.features.sample import ceilings, firing_keys, smallest_hashes, token_keys
from saesteer.features.tally import UNIT, TokenTally
from saesteer.features.words_in import NONE, WORDS

# Bins of a token's place in its context: 0; 1; 2 and 3; 4 to 7; …; from 1024 on.
PLACES = 12
# Different words of the text that are told apart: past it the rarest are forgotten.
_MOST_WORDS = 2**20


@dataclass(frozen=True)
class Settings:
    """What statistics must have in common to be merged.

    special_ids: tokens that are left out; top_contexts: strongest examples kept a feature, each
    from another document; sampled: firings kept a feature as a fair sample; before, after: tokens
    kept around the one on which an example fires.
    """

    d_sae: int
    vocab_size: int
    special_ids: tuple[int, ...] = ()
    top_contexts: int = 20
    sampled: int = 30
    before: int = 12
    after: int = 8

    @property
    def window(self) -> Window:
        return Window(self.before, self.after)


@dataclass
class Statistics:
    """What was seen of every feature, over the tokens that are not special.

    n_tokens, n_contexts: how many were seen; token_counts [vocab]: how often each token occurred;
    next_counts [vocab]: how often as the next one of a token in its document; position_counts
    [PLACES]: tokens by their place in the context.
    fired [d_sae]: tokens on which a feature fired; mass [d_sae]: the sum of its activations, in
    units of 2^-20; next_fired, next_mass [d_sae]: the same over tokens that have a next one;
    positions [d_sae, PLACES]: its firings by place; tally, next_tally: by token and by next one.
    words: its firings by whole word, an occurrence counted once; word_counts: occurrences of each
    word, as of one feature that fires on all, each worth a mass of 1; both by the words' hashes,
    which spellings have.
    examples: its strongest contexts; sample: firings drawn fairly; token_sample: what fired on
    tokens drawn fairly.
    """

    settings: Settings
    n_tokens: int
    n_contexts: int
    token_counts: NDArray[np.int64]
    next_counts: NDArray[np.int64]
    position_counts: NDArray[np.int64]
    fired: NDArray[np.int64]
    mass: NDArray[np.int64]
    next_fired: NDArray[np.int64]
    next_mass: NDArray[np.int64]
    positions: NDArray[np.int64]
    histograms: Histograms
    tally: TokenTally
    next_tally: TokenTally
    words: TokenTally
    word_counts: TokenTally
    spellings: dict[int, str]
    examples: Examples
    sample: Examples
    token_sample: TokenSample

    @classmethod
    def empty(cls, settings: Settings) -> "Statistics":
        n, vocab = settings.d_sae, settings.vocab_size
        return cls(
            settings,
            0,
            0,
            np.zeros(vocab, np.int64),
            np.zeros(vocab, np.int64),
            np.zeros(PLACES, np.int64),
            np.zeros(n, np.int64),
            np.zeros(n, np.int64),
            np.zeros(n, np.int64),
            np.zeros(n, np.int64),
            np.zeros((n, PLACES), np.int64),
            Histograms.empty(n),
            TokenTally.empty(n, vocab),
            TokenTally.empty(n, vocab),
            TokenTally.empty(n, WORDS),
            TokenTally.empty(1, WORDS, _MOST_WORDS),
            {},
            Examples.empty(n, settings.top_contexts, settings.window, vocab),
            Examples.empty(n, settings.sampled, settings.window, vocab),
            TokenSample.empty(),
        )

    @property
    def d_sae(self) -> int:
        return len(self.fired)

    @property
    def before(self) -> int:
        return self.settings.before

    @property
    def density(self) -> NDArray[np.float64]:
        """Share of the tokens on which each feature fires, [d_sae]."""
        return self.fired / max(1, self.n_tokens)

    @property
    def mean_act(self) -> NDArray[np.float64]:
        """Mean activation where it fires, 0 where it never does, [d_sae]."""
        return self.mass * UNIT / np.maximum(1, self.fired)

    @property
    def max_act(self) -> NDArray[np.float32]:
        """Highest activation, 0 for a feature that never fires, [d_sae]."""
        return self.examples.values.max(1)

    def merge(self, other: "Statistics") -> "Statistics":
        """Statistics of both streams, the same as one pass over both, in whatever order.

        Exactly so, but for the tallies once they were pruned (see `TokenTally`). Documents and
        contexts must be numbered across the streams (as shards number them).

        Raises:
            IndexingError: of another SAE, vocabulary, or number of contexts.
        """
        both = deepcopy(self)
        both.absorb(other)
        return both

    def absorb(self, other: "Statistics") -> None:
        """`merge` in place.

        Raises:
            IndexingError: as `merge`.
        """
        if self.settings != other.settings:
            raise IndexingError(
                f"statistics of {self.settings} and of {other.settings} can't be merged; collect "
                "both with the same SAE, tokenizer and settings"
            )
        self.n_tokens += other.n_tokens
        self.n_contexts += other.n_contexts
        for name in (
            "token_counts", "next_counts", "position_counts", "fired", "mass", "next_fired",
            "next_mass", "positions",
        ):  # fmt: skip
            total = getattr(self, name)
            total += getattr(other, name)
        self.histograms.absorb(other.histograms)
        self.tally.absorb(other.tally)
        self.next_tally.absorb(other.next_tally)
        self.words.absorb(other.words)
        self.word_counts.absorb(other.word_counts)
        self.spellings |= other.spellings
        for firings in other.examples.firings():
            self.examples.absorb(firings, strongest)
        for firings in other.sample.firings():
            self.sample.absorb(firings, smallest_hashes)
        self.token_sample.absorb(other.token_sample)
        self.settle()

    def settle(self) -> None:
        """Put what is kept into its order, as readers expect it."""
        self.tally.settle()
        self.next_tally.settle()
        self.words.settle()
        self.word_counts.settle()
        if len(self.spellings) > len(self.word_counts.keys):
            kept = set(self.word_counts.keys.tolist())
            self.spellings = {key: word for key, word in self.spellings.items() if key in kept}
        self.examples.sort()
        self.sample.sort()
        self.token_sample.settle()

    def add(self, block: Block) -> None:
        """Take in a block of the stream, in place; `settle` after the last."""
        vocab_size = self.settings.vocab_size
        is_special = np.isin(np.arange(vocab_size), self.settings.special_ids)
        length = block.tokens.shape[1]
        tokens = block.tokens.reshape(-1).astype(np.int64)
        documents = block.documents.reshape(-1)
        position = np.tile(np.arange(length), len(block.contexts))
        place = np.minimum(np.frexp(position)[1], PLACES - 1)
        counts = ~is_special[tokens]
        following = np.roll(tokens, -1)
        has_next = counts & np.roll(counts, -1) & (documents == np.roll(documents, -1))
        has_next[position == length - 1] = False
        self.n_tokens += int(counts.sum())
        self.n_contexts += len(block.contexts)
        self.token_counts += np.bincount(tokens[counts], minlength=vocab_size)
        self.next_counts += np.bincount(following[has_next], minlength=vocab_size)
        self.position_counts += np.bincount(place[counts], minlength=PLACES)
        occurring = np.sort(block.words[block.begins])
        self.word_counts.add(occurring, np.ones_like(occurring))

        sizes = np.bincount(block.rows, minlength=len(tokens)).astype(np.int32)
        hashes = token_keys(np.repeat(block.contexts, length), position)
        drawn = counts[block.rows]
        self.token_sample.add(hashes[counts], sizes[counts], block.features[drawn].astype(np.int32))
        if len(block.rows) == 0:
            return
        self._count(block, tokens, following, has_next, place)
        floor = self.examples.values.min(1)
        above = np.flatnonzero(block.values > floor[block.features])
        self.examples.absorb(self._firings(block, above), strongest)
        keys = firing_keys(hashes[block.rows], block.features)
        low = np.flatnonzero(keys <= ceilings(self.sample)[block.features])
        self.sample.absorb(self._firings(block, low), smallest_hashes)

    def _firings(self, block: Block, chosen: NDArray[np.int64]) -> Firings:
        return block.firings(chosen, self.settings.window, self.settings.vocab_size)

    def _count(
        self,
        block: Block,
        tokens: NDArray[np.int64],
        following: NDArray[np.int64],
        has_next: NDArray[np.bool_],
        place: NDArray[np.int64],
    ) -> None:
        """Add up a block's firings; tokens, following, has_next, place: of each row [rows]."""
        keys = block.features * self.settings.vocab_size + tokens[block.rows]
        order = np.argsort(keys)
        features, values, rows = block.features[order], block.values[order], block.rows[order]
        mass = np.rint(values / UNIT).astype(np.int64)
        which, starts = _groups(features)
        fired = np.diff(starts, append=len(features))
        self.fired[which] += fired
        self.mass[which] += np.add.reduceat(mass, starts)
        self.histograms.add(which, starts, values)
        line = np.repeat(np.arange(len(which)) * PLACES, fired) + place[rows]
        found = np.bincount(line, minlength=len(which) * PLACES)
        self.positions[which] += found.reshape(-1, PLACES)
        self.tally.add(keys[order], mass)
        self._count_words(block)

        followed = has_next[rows]
        if not followed.any():
            return
        features, rows, mass = features[followed], rows[followed], mass[followed]
        which, starts = _groups(features)
        self.next_fired[which] += np.diff(starts, append=len(features))
        self.next_mass[which] += np.add.reduceat(mass, starts)
        keys = features * self.settings.vocab_size + following[rows]
        order = np.argsort(keys)
        self.next_tally.add(keys[order], mass[order])

    def _count_words(self, block: Block) -> None:
        """Add up a block's firings by word, those on the tokens of one occurrence as one."""
        word = block.words.reshape(-1)[block.rows]
        inside = word != NONE
        rows, features = block.rows[inside], block.features[inside]
        mass = np.rint(block.values[inside] / UNIT).astype(np.int64)
        occurrence = (np.cumsum(block.begins) - 1)[rows]
        # Firings are ordered by row: only words of several tokens need another order.
        order = np.lexsort((features, occurrence))
        features, occurrence = features[order], occurrence[order]
        if len(order) == 0:
            return
        other = (np.diff(features, prepend=-1) != 0) | (np.diff(occurrence, prepend=-1) != 0)
        new = np.flatnonzero(other)
        keys = features[new] * WORDS + word[inside][order][new]
        mass = np.add.reduceat(mass[order], new)
        order = np.argsort(keys)
        self.words.add(keys[order], mass[order])


def _groups(features: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The features that occur in `features` [n], which is sorted, and where each begins."""
    starts = np.flatnonzero(np.concatenate([[True], features[1:] != features[:-1]]))
    return features[starts], starts
