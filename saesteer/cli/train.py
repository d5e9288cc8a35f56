"""cache, train, new: from text to an SAE."""

from collections.abc import Mapping, Sequence
from typing import Any

from saesteer.cli.arguments import RunFolder
from saesteer.config import Config
from saesteer.errors import SaesteerError
from saesteer.run import Run


def cache(config: Config) -> None:
    """Cache the activations that a configuration asks for; what is there already is kept."""
    from saesteer import fitting, stages

    run, ranks = fitting.joined(Run.create(config))
    shards, *_ = stages.cache(run, ranks)
    if not ranks.first:
        return
    if not (run.path / "sae").exists():  # else it tells what the SAE was trained on
        run.save_config()
    print(f"{shards.n_tokens:,} tokens of {config.cache.hook_point} in {shards.folder}")
    print(f"next: saesteer train {config.run}")


def train(config: Config) -> None:
    """Cache what is missing, then train a sparse autoencoder; a killed run goes on."""
    from saesteer import fitting

    run = Run.create(config)
    sae = fitting.train(run)
    if sae is None:  # the first of torchrun's processes says it for all
        return
    kind = "transcoder" if sae.hook_point_out else "SAE"
    print(
        f"{config.sae.architecture} {kind}, {sae.d_sae} features at {sae.hook_point}, "
        f"in {run.path / 'sae'}"
    )
    print(f"next: saesteer eval {run.path} · saesteer index {run.path}")


def sweep(config: Config) -> None:
    """Train every combination of [sweep] on one pass of the activations, and compare them."""
    from saesteer import fitting
    from saesteer.training import plots

    run = Run.create(config)
    members = fitting.sweep(run)
    if not members:
        return
    table = fitting.evaluate_sweep(run, members)
    print(sweep_table(table))
    try:
        print(f"\nplot: {plots.pareto(table, run.path / 'sweep' / 'pareto.svg')}")
    except SaesteerError as error:  # without matplotlib the table is still worth having
        print(f"\nno plot: {error}")
    print(f"each is a run: saesteer index {members[0].path} …")


def sweep_table(table: Sequence[Mapping[str, Any]]) -> str:
    """A sweep's SAEs, a line each, by L0."""
    width = max(len(row["name"]) for row in table)
    lines = [f"{'':<{width}}     L0      EV  CE recovered   dead"]
    for row in sorted(table, key=lambda row: float(row["l0"])):
        recovered = row["ce_recovered"]
        shown = "–" if recovered is None else f"{recovered:.4f}"
        lines.append(
            f"{row['name']:<{width}} {row['l0']:>6.1f}  {row['explained_variance']:.4f}  "
            f"{shown:>12}  {row['dead_fraction']:>5.1%}"
        )
    return "\n".join(lines)


def new(
    run: RunFolder,
    *,
    sae: str,
    model: str,
    revision: str | None = None,
    force: bool = False,
) -> None:
    """Make a run from an SAE that someone else trained.

    Args:
        run: The run folder to make.
        sae: SAELens "release/id", a Hub repository, or a folder (SAELens or sparsify format).
        model: Hugging Face id or folder of the model that the SAE was trained on.
        revision: Commit, tag or branch of the model.
        force: Take the SAE although it names another model.
    """
    made = Run.from_sae(run, sae, model, revision=revision, force=force)
    print(f"{made.sae.d_sae} features at {made.sae.hook_point} of {model}, in {run}")
    print(f"next: saesteer index {run} --text FILE")
