"""A fair sample of what was seen, the same however the stream is cut: the smallest hashes."""

import numpy as np
from numpy.typing import NDArray

from saesteer.features.examples import Examples
from saesteer.features.tally import rank_in_group

# Features worked on at a time.
_FEATURES = 2**15


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Numbers [n] that look random, another for each x (splitmix64: Steele, Lea, Flood 2014)."""
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def token_keys(contexts: NDArray[np.int64], positions: NDArray[np.integer]) -> NDArray[np.uint64]:
    """The hash of each token, from its context's number and its place in it; both [n]."""
    place = (contexts.astype(np.uint64) << np.uint64(24)) | positions.astype(np.uint64)
    return mixed(place)


def firing_keys(tokens: NDArray[np.uint64], features: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The hash of each feature's firing on a token, from the token's hash; both [n]."""
    return mixed(tokens ^ features.astype(np.uint64))


def smallest_hashes(
    features: NDArray[np.int64],
    values: NDArray[np.float32],
    documents: NDArray[np.int64],
    contexts: NDArray[np.int64],
    positions: NDArray[np.int32],
    n: int,
) -> NDArray[np.int64]:
    """Which n firings of each feature are its sample, ordered by feature.

    A bottom-n sketch: n firings drawn uniformly without replacement, and the sample of two
    streams is that of their samples.
    """
    keys = firing_keys(token_keys(contexts, positions), features)
    order = np.lexsort((keys, features))
    return order[rank_in_group(features[order]) < n]


def ceilings(sample: Examples) -> NDArray[np.uint64]:
    """The highest hash in each feature's sample, [d_sae]; the highest of all where it has room."""
    found = np.full(len(sample.values), 2**64 - 1, np.uint64)
    full = np.flatnonzero((sample.values > 0).all(1))
    for start in range(0, len(full), _FEATURES):
        part = full[start : start + _FEATURES]
        keys = firing_keys(token_keys(sample.contexts[part], sample.positions[part]), part[:, None])
        found[part] = keys.max(1)
    return found
