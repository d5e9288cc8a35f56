"""A pass that is stopped goes on where it was, ranks share one, and its memory stays flat."""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from saesteer.core.shards import ContextBatch
from saesteer.errors import IndexingError
from saesteer.features import collect as module
from saesteer.features.checkpoint import Checkpoint, gathered
from saesteer.features.collect import Statistics, collect
from tests.test_features_collect import LEXICON, SPECIAL, an_sae, assert_same, some_batches

ABOUT = {"sae_hash": "abc", "text": "stories", "ranks": [0, 1]}
WINDOW = {"top_contexts": 3, "sampled": 4, "before": 2, "after": 2}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_BLOCK", 100)
    monkeypatch.setattr(module, "_LARGEST_BLOCK", 200)
    monkeypatch.setattr(module, "_A_FEATURE", 0)


def collected(batches: Iterable[ContextBatch], checkpoint: Checkpoint | None = None) -> Statistics:
    return collect(
        batches,
        an_sae(),
        special_ids=SPECIAL,
        lexicon=LEXICON,
        checkpoint=checkpoint,
        **WINDOW,
    )


class Killed(BaseException):
    """What no handler of errors catches."""


def killed_after(batches: list[ContextBatch], n: int) -> Iterator[ContextBatch]:
    yield from batches[:n]
    raise Killed


@pytest.fixture(scope="module")
def whole() -> Statistics:
    return collected(some_batches(30))


@pytest.mark.parametrize("n", range(11))
def test_a_pass_that_was_killed_goes_on(tmp_path: Path, whole: Statistics, n: int) -> None:
    path, batches = tmp_path / "pass.npz", some_batches(30)
    with pytest.raises(Killed):
        collected(killed_after(batches, n), Checkpoint(path, ABOUT, every=0))
    found = Checkpoint(path, ABOUT).load()
    assert (found is not None) == (n >= 1)
    if found is not None:
        assert 0 < found.next_context <= 3 * n
        assert not found.done
        assert found.statistics.n_contexts == found.next_context
    assert_same(collected(batches, Checkpoint(path, ABOUT, every=0)), whole)


def test_killed_at_every_block_and_gone_on_in_other_batches(
    tmp_path: Path, whole: Statistics
) -> None:
    path = tmp_path / "pass.npz"
    for n in range(3, 10):
        with pytest.raises(Killed):
            collected(killed_after(some_batches(30), n), Checkpoint(path, ABOUT, every=0))
    found = Checkpoint(path, ABOUT).load()
    assert found is not None
    assert found.next_context % 5 != 0
    # some_batches draws the same contexts whatever the batch.
    assert_same(collected(some_batches(30, batch=5), Checkpoint(path, ABOUT)), whole)


def test_a_later_start_of_the_stream_is_as_good(tmp_path: Path, whole: Statistics) -> None:
    checkpoint = Checkpoint(tmp_path / "pass.npz", ABOUT, every=0)
    batches = some_batches(30)
    with pytest.raises(Killed):
        collected(killed_after(batches, 5), checkpoint)
    found = checkpoint.load()
    assert found is not None
    later = [batch for batch in batches if batch.first_context >= found.next_context]
    assert 0 < len(later) < len(batches)
    assert_same(collected(later, checkpoint), whole)


def test_a_finished_pass_is_not_made_again(tmp_path: Path, whole: Statistics) -> None:
    checkpoint = Checkpoint(tmp_path / "pass.npz", ABOUT)
    assert_same(collected(some_batches(30), checkpoint), whole)
    assert_same(collected(killed_after([], 0), checkpoint), whole)


def test_nothing_is_saved_before_it_is_due(tmp_path: Path) -> None:
    path = tmp_path / "pass.npz"
    with pytest.raises(Killed):
        collected(killed_after(some_batches(30), 9), Checkpoint(path, ABOUT, every=1e6))
    assert not path.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    path, batches = tmp_path / "pass.npz", some_batches(9)
    collected(batches, Checkpoint(path, ABOUT))
    with pytest.raises(IndexingError, match=r"sae_hash 'abc', expected 'xyz'.*--restart"):
        collected(batches, Checkpoint(path, ABOUT | {"sae_hash": "xyz"}))
    with pytest.raises(IndexingError, match=r"ranks \[0, 1\], expected \[0, 2\].*--restart"):
        collected(batches, Checkpoint(path, ABOUT | {"ranks": (0, 2)}))
    with pytest.raises(IndexingError, match=r"special_ids .*expected \[0\].*--restart"):
        collect(
            batches,
            an_sae(),
            special_ids=[0],
            lexicon=LEXICON,
            checkpoint=Checkpoint(path, ABOUT),
            **WINDOW,
        )


@pytest.mark.parametrize("damage", ["truncated", "rotten", "empty", "text"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    checkpoint, batches = Checkpoint(tmp_path / "pass.npz", ABOUT), some_batches(9)
    collected(batches, checkpoint)
    data = bytearray(checkpoint.path.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 255
    written = {
        "truncated": data[:middle],
        "rotten": data,
        "empty": b"",
        "text": b"not a checkpoint",
    }
    checkpoint.path.write_bytes(written[damage])
    with pytest.raises(IndexingError, match=r"pass\.npz can't be read .*--restart"):
        collected(batches, checkpoint)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_ranks_share_a_pass(
    tmp_path: Path, whole: Statistics, size: int, interleaved: bool
) -> None:
    batches = some_batches(30)
    ranks = [Checkpoint(tmp_path / f"rank-{r}.npz", ABOUT | {"rank": r}) for r in range(size)]
    for r, rank in enumerate(ranks):
        if interleaved:
            own = batches[r::size]
        else:
            own = batches[r * len(batches) // size : (r + 1) * len(batches) // size]
        collected(own, rank)
    assert_same(gathered(ranks), whole)
    assert_same(gathered(ranks[::-1]), whole)


def test_a_rank_that_is_not_ready_is_told(tmp_path: Path) -> None:
    ranks = [Checkpoint(tmp_path / f"rank-{r}.npz", ABOUT, every=0) for r in range(2)]
    collected(some_batches(9), ranks[0])
    with pytest.raises(IndexingError, match=r"rank-1\.npz is missing.*run the same command"):
        gathered(ranks)
    with pytest.raises(Killed):
        collected(killed_after(some_batches(9), 3), ranks[1])
    with pytest.raises(IndexingError, match=r"rank-1\.npz is unfinished"):
        gathered(ranks)


# Cheap codes, 4 a token, of 100,000 tokens and then of 1,000,000; prints the peaks of resident
# memory before, after the first, and after both, in MB.
_PASSES = """
import resource
import numpy as np, torch
from saesteer.core.sae import Codes
from saesteer.core.shards import ContextBatch
from saesteer.features.collect import collect
from saesteer.features.words import Pieces
from saesteer.features.words_in import Lexicon
from tests.tiny import tiny_tokenizer

FEATURES, FIRE, VOCAB = 1024, 4, 128
rng = np.random.default_rng(0)

class Cheap:
    d_sae = FEATURES
    def encode(self, x):
        rows = np.repeat(np.arange(4096), FIRE)
        part = FEATURES // FIRE
        latents = np.arange(FIRE) * part + rng.integers(0, part, (4096, FIRE))
        values = rng.random(4096 * FIRE, np.float32) + np.float32(0.1)
        return Codes(*map(torch.from_numpy, (rows, latents.reshape(-1), values)), 4096)

def batches(n):
    for first in range(0, n // 128, 32):
        tokens = rng.integers(0, VOCAB, (32, 128)).astype(np.int32)
        documents = np.repeat(first + np.arange(32, dtype=np.int32)[:, None], 128, 1)
        yield ContextBatch(tokens, documents, torch.zeros(32, 128, 1), first)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

print(peak())
for n in (100_000, 1_000_000):
    lexicon = Lexicon(Pieces(tiny_tokenizer()), VOCAB)
    found = collect(batches(n), Cheap(), special_ids=[], lexicon=lexicon)
    assert n <= found.n_tokens < n + 4096
    del found
    print(peak())
"""


def test_memory_does_not_grow_with_the_text() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PASSES], capture_output=True, text=True, check=True
    )
    before, short, long = map(float, done.stdout.split())
    assert long >= short >= before > 100
    # What a tenfold text adds to is the tokens sampled for co-activation, up to their bound, 12 MB
    # and its copy; the codes of all of it would be 80 MB.
    assert long - short < 60, done.stdout
