"""index, judge: describe every feature, and have the descriptions written by a language model."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saesteer.cli.arguments import RunFolder
from saesteer.errors import ConfigError, IndexingError
from saesteer.run import Run

if TYPE_CHECKING:
    from saesteer.features.records import Feature
    from saesteer.features.search import Index

# Contexts of text in which a label's score looks for windows where the feature is silent.
_CONTEXTS = 256


def index(
    run: RunFolder,
    *,
    text: str | None = None,
    tokens: int = 1_000_000,
    top: int = 20,
    neighbours: int = 10,
    effects: str | None = None,
    html: Path | None = None,
    tantivy: bool = False,
    restart: bool = False,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Describe every feature: what it fires on, what it promotes, a label.

    A killed index goes on with the same command. Under torchrun the processes share the text.

    Args:
        run: The run folder.
        text: A file, folder or `datasets` name; by default the run's cached activations.
        tokens: At most so many tokens of `text`.
        top: Strongest examples kept a feature, each from another document.
        neighbours: Nearest decoder rows kept a feature; 0 where looking for them takes too long.
        effects: Measure what adding a feature does: of "all", or of so many with the surest labels.
        html: Also write a gallery to browse, into this folder.
        tantivy: Also make a tantivy index, which is faster where features are a million.
        restart: Begin anew where an unfinished index of something else was left.
        device: Where the model runs.
        dtype: float32, bfloat16 or float16.
    """
    from saesteer import enrich, fitting, stages

    n_effects = _number(effects)
    opened, ranks = fitting.joined(Run.open(run, device=device, dtype=dtype))
    built = stages.index(
        opened,
        text=text,
        tokens=tokens,
        top=top,
        neighbours=neighbours,
        restart=restart,
        ranks=ranks,
    )
    if not ranks.first:
        return
    print(f"{built.n_features} features in {run / 'features.sqlite'}")
    if n_effects is not None:
        most = built.n_features if n_effects == 0 else n_effects
        measured = enrich.effects(opened, enrich.best_labelled(built, most))
        print(f"effects of {measured} features measured")
    if tantivy:
        from saesteer.features import tantivy_engine
        from saesteer.features.stored_texts import stored_texts

        pairs = ((one.id, stored_texts(one)) for one in every_feature(built, "tantivy"))
        tantivy_engine.build(built.path, pairs, built.meta)
    if html is not None:
        from saesteer.features import gallery, outputs

        told = about(built.meta)
        how = {outputs.told(one) for one in outputs.measured_with(built.path).values()}
        if how:
            told["effects measured"] = "; ".join(sorted(how))
        gallery.write(html, every_feature(built, "gallery"), told)
        print(f"gallery: {html / 'index.html'}")
    print(f'next: saesteer search {run} "a word"')


def judge(
    run: RunFolder,
    *,
    features: str = "100",
    model: str | None = None,
    address: str | None = None,
    name: str | None = None,
    key_variable: str = "SAESTEER_JUDGE_KEY",
    text: str | None = None,
    score: bool = True,
    device: str | None = None,
) -> None:
    """Have features labelled by a language model, and the labels scored.

    What was labelled is kept: the same command goes on where it stopped.

    Args:
        run: The run folder.
        features: "all", so many with the surest labels, or numbers of features: "3,17".
        model: A Hugging Face id or folder, loaded here.
        address: Or an OpenAI-compatible address, such as http://localhost:8000/v1.
        name: What the model is called at the address.
        key_variable: Environment variable that holds the key for the address, if it wants one.
        text: Where contexts in which a feature is silent are drawn from; by default the run's
            held-out tokens.
        score: Score each label: does it tell where the feature fires?
        device: Where the models run.
    """
    from saesteer import enrich, run_text
    from saesteer.core.model import load_model
    from saesteer.core.writers import address_writer, local_writer

    if (model is None) == (address is None):
        raise ConfigError("who is to judge? give one of --model ID and --address URL")
    opened = Run.open(run, device=device)
    found = opened.index
    chosen = _features(features, opened)
    if address is not None:
        if name is None:
            raise ConfigError("the model at the address needs a name; give --name")
        key = os.environ.get(key_variable)
        write = address_writer(address, name, key=key)
    else:
        assert model is not None
        name = model
        write = local_writer(*load_model(model, device=opened.config.model.device))
    contexts = None
    if score:
        tokens = _CONTEXTS * opened.config.cache.context_size
        contexts = run_text.batches(opened, text, tokens, held_out=True)
    done = 0
    for feature in enrich.labels(opened, chosen, write, model=name, contexts=contexts):
        record = found.feature(feature)
        scored = "" if record.label_score is None else f"  ({record.label_score:.2f})"
        print(f"{feature:>7}  {record.label}{scored}")
        done += 1
    print(f"{done} of {len(chosen)} features have a label by {name}")


def every_feature(index: "Index", what: str) -> "Iterator[Feature]":
    """Every feature's full record, one at a time; a bar says how far `what` is."""
    from saesteer.core.progress import progress

    n = index.n_features
    for feature in progress(what, n, unit="feature", iterable=range(n)):
        yield index.feature(feature)


def about(meta: Mapping[str, Any]) -> dict[str, str]:
    """What a page says of what its index was made of."""
    named = {
        "model_id": "model",
        "hook_point": "hook point",
        "sae_hash": "SAE",
        "text": "text",
        "n_tokens": "tokens",
        "made": "made",
        "imported_from": "imported from",
    }
    return {name: str(meta[key]) for key, name in named.items() if meta.get(key) is not None}


def _number(effects: str | None) -> int | None:
    """--effects as a number, 0 for all of them."""
    if effects is None or effects == "all":
        return None if effects is None else 0
    if not effects.isdecimal() or int(effects) == 0:
        raise ConfigError(f'--effects {effects!r}; expected "all" or a number from 1 up')
    return int(effects)


def _features(text: str, run: Run) -> list[int]:
    from saesteer.enrich import best_labelled

    parts = [part.strip() for part in text.split(",")]
    if text == "all":
        return list(range(run.index.n_features))
    if not all(part.isdecimal() for part in parts):
        raise IndexingError(f'--features {text!r}; expected "all", a number, or numbers as 3,17')
    if len(parts) == 1:
        return best_labelled(run.index, int(parts[0]))
    return [int(part) for part in parts]
