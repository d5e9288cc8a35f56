"""export, import: an index as other programs write and read it."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from saesteer.cli.arguments import RunFolder
from saesteer.cli.index import every_feature
from saesteer.core.files import written_aside
from saesteer.errors import ConfigError
from saesteer.run import Run


def export(
    run: RunFolder,
    to: Annotated[Path, tyro.conf.Positional],
    *,
    format: Literal["csv", "neuronpedia"] = "csv",
    model: str | None = None,
    source: str | None = None,
) -> None:
    """Write all features as CSV, one row each, or as a folder that Neuronpedia imports.

    Args:
        run: The run folder.
        to: The CSV file, - for the screen; or the folder.
        format: csv or neuronpedia.
        model: What Neuronpedia calls the model; by default the last part of its id.
        source: What Neuronpedia calls the SAE, LAYER-NAME; by default by layer and run folder.
    """
    opened = Run.open(run)
    index = opened.index
    if format == "neuronpedia":
        from saesteer.features import neuronpedia

        if str(to) == "-":
            raise ConfigError("Neuronpedia's format is a folder of files; name a folder")
        point = opened.hook_point if opened.config.cache.hook_point else None
        n = neuronpedia.export(
            to,
            every_feature(index, "export"),
            model=model or opened.config.model.id.rsplit("/", 1)[-1],
            source=source or f"{point.layer if point else 0}-{run.resolve().name}",
            hook=point.to_saelens() if point and point.head is None else None,
            dataset=str(index.meta.get("text") or ""),
        )
    else:
        from saesteer.features import outputs, table

        if model is not None or source is not None:
            raise ConfigError("--model and --source go with --format neuronpedia")
        how = outputs.measured_with(index.path)
        if str(to) == "-":
            table.write(sys.stdout, every_feature(index, "export"), how)
            return
        with written_aside(to) as aside, aside.open("w", encoding="utf-8", newline="") as file:
            n = table.write(file, every_feature(index, "export"), how)
    print(f"{n} features in {to}")


def import_(run: RunFolder, folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Make a run to look at from a Neuronpedia export: it can be searched and shown, not steered.

    Args:
        run: The run folder to make.
        folder: MODEL/SOURCE of the exports: features/, activations/, explanations/.
    """
    made = Run.from_export(run, folder)
    print(f"{made.index.n_features} features in {run}")
    print(f'next: saesteer search {run} "a word"')
