"""cache, train, new, eval: from text to a measured SAE."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import tyro

from saesteer.config import Config
from saesteer.run import Run

RunFolder = Annotated[Path, tyro.conf.Positional]


def cache(config: Config) -> None:
    """Cache the activations that a configuration asks for; what is there already is kept."""
    from saesteer import stages

    run = Run.create(config)
    shards = stages.cache(run)
    run.save_config()
    print(f"{shards.n_tokens:,} tokens of {config.cache.hook_point} in {shards.folder}")
    print(f"next: saesteer train {config.run}")


def train(config: Config) -> None:
    """Cache what is missing, then train a sparse autoencoder; a killed run goes on."""
    from saesteer import stages

    run = Run.create(config)
    sae = stages.train(run)
    print(
        f"{config.sae.architecture} SAE, {sae.d_sae} features at {sae.hook_point}, "
        f"in {run.path / 'sae'}"
    )
    print(f"next: saesteer eval {run.path} · saesteer index {run.path}")


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


def eval(
    run: RunFolder,
    *,
    text: str | None = None,
    tokens: int = 200_000,
    device: str | None = None,
    dtype: str | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Measure the SAE on held-out text: explained variance, L0, dead features, CE recovered.

    Args:
        run: The run folder.
        text: A file, folder or `datasets` name; by default the run's own held-out activations.
        tokens: At most so many tokens.
        device: Where the model runs.
        dtype: float32, bfloat16 or float16.
        json_: Print one JSON object.
    """
    from saesteer import stages

    figures = stages.evaluate(Run.open(run, device=device, dtype=dtype), text=text, tokens=tokens)
    if json_:
        print(json.dumps(figures))
        return
    print(evaluation_table(figures))


def evaluation_table(figures: dict[str, Any]) -> str:
    """The main figures of an evaluation, a line each, and the histogram of densities."""

    def share(value: float | None) -> str:
        return "– (the ablation does no harm)" if value is None else f"{value:.4f}"

    lines = [
        f"on {figures['tokens']:,} tokens ({figures['text']})",
        f"  explained variance   {figures['explained_variance']:.4f}  (FVU {figures['fvu']:.4f})",
        f"  L0                   {figures['l0']:.2f}",
        f"  dead features        {figures['dead_fraction']:.2%}",
        f"  CE recovered         {share(figures['ce_recovered'])}  against zero ablation",
        f"                       {share(figures['ce_recovered_mean'])}  against mean ablation",
        f"  CE, nats a token     clean {figures['ce_clean']:.4f}, reconstructed "
        f"{figures['ce_reconstructed']:.4f},",
        f"                       zero {figures['ce_zero']:.4f}, mean {figures['ce_mean']:.4f}",
        "  features by density (the share of tokens that they fire on)",
    ]
    histogram = figures["density_histogram"]
    edges, counts = histogram["log10_edges"], histogram["counts"]
    most = max([*counts, 1])
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            bar = "█" * math.ceil(40 * count / most)
            lines.append(f"    {10**low:8.2%} – {10**high:7.2%}  {count:>7,}  {bar}")
    return "\n".join(lines)
