"""How strong an addition is, in units that compare: the layer's mean norm, or nats of KL.

"8x"     8 × the feature's max_act, or 8 times a vector as it is
"0.5n"   a change half as long as the layer's activations are on average
"kl0.1"  what moves the next-token distribution of neutral text by a mean of 0.1 nats
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from saesteer.errors import CacheError, IndexingError, SteeringError, TextError

if TYPE_CHECKING:
    from torch import Tensor

    from saesteer.core.model import HookPoint
    from saesteer.core.shards import Shards
    from saesteer.features.search import Index
    from saesteer.run import Run

# Contexts of neutral text on which a KL is measured.
CONTEXTS = 16


def checked(run: "Run") -> "Index":
    """The index, checked against the SAE and the model that it is to be used with.

    Raises:
        IndexingError: there is none, or it was made of another SAE or model.
    """
    from saesteer.core.model import fingerprint

    meta = run.index.meta
    for key, what, ours in (
        ("sae_hash", "SAE", run.sae.hash),
        ("model_fingerprint", "model", fingerprint(run.model)),
    ):
        if meta.get(key) != ours:  # its figures would mean nothing here
            raise IndexingError(
                f"the index of {run.path} was made for another {what} ({meta.get(key)}) than the "
                f"run's ({ours}); run `saesteer index {run.path}` again"
            )
    return run.index


def of_feature(run: "Run", feature: int, value: str | float) -> float:
    """The raw activation that "8x" or a plain number means.

    Raises:
        FeatureError: no such feature, or a strength that is none.
        IndexingError: "8x" without an index, or with one of another SAE or model.
    """
    from saesteer.features.search import strength

    if not (isinstance(value, str) and value.strip().lower().endswith("x")):
        return strength(value, None, feature=feature)
    return checked(run).strength(feature, value)


def added(
    run: "Run",
    vector: "Tensor",
    point: "HookPoint",
    value: str | float,
    *,
    feature: int | None = None,
) -> float:
    """The factor on `vector` [d_model] at a point that any of these strengths means.

    feature: whose direction the vector is; without one "8x" is 8 times the vector.

    Raises:
        SteeringError: not such a strength, or a KL that no strength reaches.
        CacheError, TextError: the run has no activations at that point, or no held-out tokens.
        FeatureError, IndexingError: see `of_feature`.
    """
    from saesteer.effects.calibrate import iso_kl
    from saesteer.features.search import strength
    from saesteer.steering.edits import Add

    text = str(value).strip().lower()
    if not (text.startswith("kl") or text.endswith("n")):
        if feature is not None:
            return of_feature(run, feature, value)
        return strength(text.removesuffix("x") if isinstance(value, str) else value, None)
    try:
        number = float(text.removeprefix("kl").removesuffix("n"))
    except ValueError:
        raise SteeringError(
            f"strength {value!r} is none: write 8x, 0.5n, kl0.1 or a plain number"
        ) from None
    if text.startswith("kl"):
        return iso_kl(
            run.model,
            run.tokenizer,
            lambda strength: [Add(vector, strength, point)],
            neutral_tokens(run, CONTEXTS),
            number,
        )
    norm = float(vector.norm())
    if norm == 0:
        raise SteeringError("the vector to add is zero, and so has no length to scale")
    return number * _shards_at(run, point).statistics.mean_norm / norm


def neutral_tokens(run: "Run", most: int) -> Sequence[list[int]]:
    """Up to so many contexts of the run's held-out tokens, as rows of ids.

    Raises:
        TextError: it has none.
    """
    from saesteer.training import rows

    if run.config.rows.live or not (run.path / "activations" / "manifest.json").exists():
        raise TextError(
            f"{run.path} has no held-out tokens to measure costs on; `saesteer dose` takes neutral "
            "text with --texts FILE, or cache some with `saesteer cache`"
        )
    first = rows.first_evaluated(run.shards.n_contexts, run.config.cache.held_out)
    batches = run.shards.contexts(first, first + most)
    return [[int(token) for token in row] for batch in batches for row in batch.tokens]


def _shards_at(run: "Run", point: "HookPoint") -> "Shards":
    if run.hook_point != point:
        raise CacheError(
            f"the mean norm at {point} isn't known: this run's activations are of "
            f"{run.hook_point}; give a plain number"
        )
    return run.shards
