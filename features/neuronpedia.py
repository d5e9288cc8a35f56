"""Features as Neuronpedia's export: a folder that an instance of one's own imports.

    model.jsonl, release.jsonl, sourceset.jsonl, source.jsonl     one line each
    features/batch-N.jsonl.gz       index, maxActApprox, frac_nonzero, freq_hist_* and logits_hist_*
                                    (middles and heights of the bars), pos_*, neg_*, topkCosSim*
    activations/batch-N.jsonl.gz    tokens, values, maxValue, qualifyingTokenIndex, bin*: an example
    explanations/batch-N.jsonl.gz   description: the user's name for a feature, else its label

The layout and the names are those of Neuronpedia's public exports and of its converter of
SAEDashboard's output (both in its repository). What an index doesn't hold stays empty: neuron
alignment, correlated neurons, decoder weights, vectors. `neuronpedia_import` reads such a folder.
"""

import gzip
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from saesteer.core.files import written_aside
from saesteer.features.records import Example, Feature, Histogram
from saesteer.features.view_parts import shown_name

# Features in a file; Neuronpedia's own exports have as many.
BATCH = 1024
# In `binMin` and `binContains` of an example that is among the strongest.
TOP = -1
_EMPTY = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_pearson",
    "correlated_neurons_l1",
    "correlated_features_indices",
    "correlated_features_pearson",
    "correlated_features_l1",
    "decoder_weights_dist",
    "vector",
)


def export(
    folder: Path,
    features: Iterable[Feature],
    *,
    model: str,
    source: str,
    hook: str | None = None,
    dataset: str = "",
    creator: str = "saesteer",
) -> int:
    """Write the export of one SAE, and say how many features it holds.

    Features are read once, `BATCH` at a time.

    Args:
        folder: where MODEL/SOURCE would stand in Neuronpedia's exports.
        model: the model's name on the instance, say "gpt2-small".
        source: the SAE's, "LAYER-SET", say "6-mine".
        hook: in TransformerLens's names, say "blocks.6.hook_resid_post".
        dataset: the text that was indexed.
        creator: the id of the instance's user who is to own it (its DEFAULT_CREATOR_ID).

    Raises:
        RunError: the folder can't be written.
    """
    made = datetime.now(UTC).isoformat()
    common = {"creatorId": creator, "createdAt": made}
    _, _, set_name = source.partition("-")
    for name, about in (
        (
            "model",
            {"id": model, "displayName": model, "displayNameShort": model, "updatedAt": made},
        ),
        (
            "release",
            {"name": set_name or source, "description": source, "descriptionShort": source}
            | {"urls": [], "creatorName": creator, "creatorNameShort": creator},
        ),
        (
            "sourceset",
            {"modelId": model, "name": set_name or source, "description": source}
            | {"creatorName": creator, "releaseName": set_name or source, "visibility": "PUBLIC"},
        ),
        (
            "source",
            {"id": source, "modelId": model, "setName": set_name or source, "dataset": dataset}
            | {"visibility": "PUBLIC"},
        ),
    ):
        _write(folder / f"{name}.jsonl", [about | common])
    place = {"modelId": model, "layer": source, "creatorId": creator, "createdAt": made}
    n, rest = 0, iter(features)
    while batch := list(islice(rest, BATCH)):
        file = f"batch-{n // BATCH}.jsonl.gz"
        _write(folder / "features" / file, [place | _feature(f, set_name, hook) for f in batch])
        rows = [
            place | {"id": f"{source}-{f.id}-{i}", "index": str(f.id)} | row
            for f in batch
            for i, row in enumerate(_activations(f))
        ]
        _write(folder / "activations" / file, rows)
        rows = [
            place | {"id": f"{source}-{f.id}"} | _explanation(f, creator)
            for f in batch
            if f.n_fired
        ]
        _write(folder / "explanations" / file, rows)
        n += len(batch)
    return n


def _feature(f: Feature, set_name: str, hook: str | None) -> dict[str, Any]:
    return {
        "index": str(f.id),
        "sourceSetName": set_name,
        "maxActApprox": f.max_act,
        "frac_nonzero": f.density,
        **_bars("freq_hist_data", f.activations),
        **_bars("logits_hist_data", f.logits),
        "pos_str": [text for text, _ in f.promotes],
        "pos_values": [value for _, value in f.promotes],
        "neg_str": [text for text, _ in f.suppresses],
        "neg_values": [value for _, value in f.suppresses],
        "topkCosSimIndices": [n.feature for n in f.neighbours],
        "topkCosSimValues": [n.value for n in f.neighbours],
        **{name: [] for name in _EMPTY},
        "hasVector": False,
        "vectorLabel": None,
        "vectorDefaultSteerStrength": None,
        "hookName": hook,
    }


def _bars(name: str, histogram: Histogram | None) -> dict[str, list[float]]:
    """A histogram as the middles of its bars and their heights, as many of the one as the other."""
    edges, counts = (histogram.edges, histogram.counts) if histogram else ((), ())
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    return {f"{name}_bar_values": middles, f"{name}_bar_heights": list(counts)}


def _activations(f: Feature) -> list[dict[str, Any]]:
    tenths: dict[int, list[float]] = {}
    for example in f.examples:
        if example.group != "top":
            tenths.setdefault(example.group, []).append(example.value)
    return [_activation(example, f.max_act, tenths) for example in f.examples]


def _activation(
    example: Example, max_act: float, tenths: Mapping[int, list[float]]
) -> dict[str, Any]:
    values = list(example.activations)
    highest = max(range(len(values)), key=values.__getitem__)
    if example.group == "top":
        interval = {"binMin": TOP, "binMax": max_act, "binContains": TOP}
    else:
        drawn = tenths[example.group]
        interval = {"binMin": min(drawn), "binMax": max(drawn), "binContains": 0.1}
    return {
        "tokens": list(example.pieces),
        "values": values,
        "maxValue": values[highest],
        "maxValueTokenIndex": highest,
        "minValue": min(values),
        "qualifyingTokenIndex": example.firing,
        **interval,
        "dataIndex": None,
        "dataSource": None,
        "dfaValues": [],
        "dfaMaxValue": None,
        "dfaTargetIndex": None,
        "lossValues": [],
        "logitContributions": None,
    }


def _explanation(f: Feature, creator: str) -> dict[str, Any]:
    return {
        "index": str(f.id),
        "authorId": creator,
        "description": shown_name(f),
        "typeName": None,
        "explanationModelName": None if f.label_source == "evidence" else f.label_source,
    }


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line, gzipped where the name says so; the same rows, the same bytes."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with written_aside(path) as aside:
        aside.write_bytes(gzip.compress(text, 5, mtime=0) if path.suffix == ".gz" else text)
