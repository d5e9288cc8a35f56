"""What is added to an index that is there: effects by steering, labels by a language model."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from saesteer.core.model import EMBEDDED
from saesteer.core.progress import progress
from saesteer.core.writers import Write
from saesteer.effects import output_score
from saesteer.effects.planted_causes import neutral_prompts
from saesteer.features import judge as judging
from saesteer.features import judge_scores, store
from saesteer.features.judge_silence import Silence
from saesteer.features.words import Pieces
from saesteer.units import checked

if TYPE_CHECKING:
    from saesteer.core.shards import ContextBatch
    from saesteer.features.records import Feature
    from saesteer.features.search import Index
    from saesteer.run import Run

# Effects are kept after so many features: what is stopped goes on from there.
_KEPT_AT_ONCE = 256
# A label that rests on so many firings is half as sure as its confidence says.
_FEW = 20


def effects(run: "Run", features: Iterable[int]) -> int:
    """Measure output scores and own effects, keep them in the index, and say of how many features.

    Those measured before with the same prompts and amplification are left out.

    Raises:
        IndexingError: no index, one of another SAE or model, or one that can't be written.
        ModelError, SteeringError, FeatureError: see `effects.output_score`.
    """
    index = checked(run)
    embedded = run.config.model.id == EMBEDDED
    prompts = neutral_prompts() if embedded else output_score.NEUTRAL
    settings = output_score.settings(prompts)
    kept = store.measured(index.path, settings)
    asked = [feature for feature in dict.fromkeys(features) if feature not in kept]
    measured = output_score.output_scores(
        run.model,
        run.tokenizer,
        run.sae,
        asked,
        max_act=index.max_act,
        own_tokens=lambda feature: output_score.own_tokens(index.feature(feature)),
        prompts=prompts,
    )
    with progress("effects", len(asked), unit="feature") as bar:
        while some := list(islice(measured, _KEPT_AT_ONCE)):
            store.keep_outputs(index.path, [(o.feature, o.score, o.own) for o in some], settings)
            bar.update(len(some))
    return len(asked)


def best_labelled(index: "Index", most: int) -> list[int]:
    """The features whose labels are surest, of those that fire; the surest first.

    A label's confidence counts the less, the fewer firings it rests on.
    """
    alive = [f for f in index.features(range(index.n_features)) if f.n_fired]

    def sure(feature: "Feature") -> float:
        return feature.confidence * feature.n_fired / (feature.n_fired + _FEW)

    return [f.id for f in sorted(alive, key=lambda f: (-sure(f), f.id))[:most]]


def labels(
    run: "Run",
    features: Iterable[int],
    write: Write,
    *,
    model: str,
    contexts: "Iterable[ContextBatch] | None" = None,
) -> Iterator[int]:
    """Have features labelled by a model, score the labels, and yield each feature when it is done.

    Args:
        write: asked for labels and for yes or no, under the name `model`.
        contexts: text with activations at the run's hook point (`run_text.batches`), in which
            windows are looked for where a feature is silent; None: no label is scored.

    Raises:
        IndexingError: no index, one of another SAE or model, no answer, it can't be written, or
            no text to score on.
    """
    index = checked(run)
    asked = list(dict.fromkeys(features))
    silence = None
    if contexts is not None:
        silence = Silence(contexts, run.sae, Pieces(run.tokenizer), run.special_ids)
    labelled = judging.label_features(
        index.path,
        (index.feature(feature) for feature in asked),
        write,
        model=model,
        n_features=len(asked),
    )
    for judged in labelled:
        if silence is not None:
            record = index.feature(judged.feature)
            if not judge_scores.is_scored(index.path, judged.feature, judged.key):
                deque(
                    judge_scores.score_features(index.path, [(record, judged.key)], silence, write),
                    maxlen=0,
                )
        yield judged.feature
