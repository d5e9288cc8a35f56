"""eval, push: what an SAE is worth, on screen, in plots and on the Hub."""

import dataclasses
import json
import math
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from saesteer import config as configuration
from saesteer.cli.arguments import RunFolder, check_seed
from saesteer.errors import SaeError, SaesteerError
from saesteer.run import Run

BAR = 36  # the longest bar of a histogram that keeps a line within 80 columns


def eval(
    run: RunFolder,
    *,
    text: str | None = None,
    tokens: int = 200_000,
    plots: Literal["svg", "png", "both", "none"] = "svg",
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Measure the SAE on held-out text: explained variance, L0, dead features, CE and KL, beside
    a random dictionary and a PCA of the same L0; on the embedded model, planted concepts too.

    Args:
        run: The run folder.
        text: A file, folder or `datasets` name; by default the run's own held-out activations.
        tokens: At most so many tokens.
        plots: What to draw into RUN/plots.
        seed: Of the random dictionary and the planted stories.
        device: Where the model runs.
        dtype: float32, bfloat16 or float16.
        json_: Print one JSON object.
    """
    from saesteer import stages

    check_seed(seed)
    opened = Run.open(run, device=device, dtype=dtype)
    figures = stages.evaluate(opened, text=text, tokens=tokens, seed=seed)
    print(json.dumps(figures) if json_ else evaluation_table(figures))
    if plots == "none":
        return
    from saesteer.training import plots as drawing

    try:
        drawing.evaluation(
            figures,
            run / "metrics.jsonl",
            run / "plots",
            kinds=("svg", "png") if plots == "both" else (plots,),
        )
    except SaesteerError as error:  # the figures are what was asked for first
        print(f"saesteer: no plots: {error}", file=sys.stderr)
        return
    if not json_:
        print(f"plots in {run / 'plots'}")


def evaluation_table(figures: Mapping[str, Any]) -> str:
    """Everything an evaluation found, within 80 columns."""
    lines = [
        f"on {figures['tokens']:,} tokens ({figures['text']})",
        f"  explained variance   {figures['explained_variance']:.4f}  (FVU {figures['fvu']:.4f})",
        f"  L0                   {figures['l0']:.2f}",
        f"  dead features        {figures['dead_fraction']:.2%}",
        f"  CE recovered         {_share(figures['ce_recovered'])}  against zero ablation",
        f"                       {_share(figures['ce_recovered_mean'])}  against mean ablation",
        f"  CE, nats a token     clean {figures['ce_clean']:.4f}, reconstructed "
        f"{figures['ce_reconstructed']:.4f},",
        f"                       zero {figures['ce_zero']:.4f}, mean {figures['ce_mean']:.4f}",
        f"  KL, nats a token     reconstructed {figures['kl']:.4f}, "
        f"zero {figures['kl_zero']:.4f}, mean {figures['kl_mean']:.4f}",
    ]
    lines += ["", *_against_baselines(figures)]
    if "planted" in figures:
        lines += ["", *_planted(figures["planted"])]
    lines += ["", "  features by density (the share of tokens that they fire on)"]
    density = figures["density_histogram"]
    labels = [
        f"{10**low:8.2%} – {10**high:7.2%}"
        for low, high in zip(density["log10_edges"], density["log10_edges"][1:], strict=False)
    ]
    lines += _bars(labels, density["counts"])
    cosine = figures["nearest_cosine_histogram"]
    if cosine is not None:
        quantiles = figures["nearest_cosine_quantiles"]
        lines += [
            "",
            "  features by cosine of their decoder row to its nearest neighbour, "
            f"median {quantiles['0.5']:.2f}",
        ]
        pairs = zip(cosine["edges"], cosine["edges"][1:], strict=False)
        lines += _bars([f"    {low:.2f} – {high:.2f}    " for low, high in pairs], cosine["counts"])
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "– (the ablation does no harm)" if value is None else f"{value:.4f}"


def _against_baselines(figures: Mapping[str, Any]) -> list[str]:
    rows = {"this SAE": figures, **figures["baselines"]}
    names = {"random": "random dictionary", "pca": "PCA"}
    fitted = next(iter(figures["baselines"].values()))
    lines = [
        f"  beside baselines fitted on {fitted['fitted_tokens']:,} "
        f"{fitted['fitted_on'].removeprefix('the ')}",
        f"  {'':<19}{'L0':>8}{'explained':>12}{'CE recovered':>15}{'KL':>9}",
    ]
    for name, row in rows.items():
        recovered = "–" if row["ce_recovered"] is None else f"{row['ce_recovered']:.4f}"
        lines.append(
            f"  {names.get(name, name):<19}{row['l0']:>8.2f}{row['explained_variance']:>12.4f}"
            f"{recovered:>15}{row['kl']:>9.4f}"
        )
    return lines


def _planted(planted: Mapping[str, Any]) -> list[str]:
    seen = [c for c in planted["concepts"] if c["auroc"] is not None]
    found = sum(c["recovered"] for c in seen)
    lines = [
        f"  planted concepts, on {planted['tokens']:,} words of fresh stories",
        f"  recovered            {found} of {len(seen)} ({planted['recovered']:.0%}): AUROC ≥ .9 "
        "by a feature of their own",
        f"  mean best AUROC      {planted['mean_auroc']:.3f}",
        f"  distinct features    {planted['distinct']:.0%} of as many as there are concepts",
    ]
    missed = [f"{c['concept']} {c['auroc']:.2f}" for c in seen if not c["recovered"]]
    lines += _wrapped("  not recovered        ", missed)
    for case in planted["absorption"]:
        rate = "not measurable" if case["rate"] is None else f"{case['rate']:.0%}"
        lines.append(
            f"  absorption           {rate} of {case['parent']} by {case['child']}"
            + (": flagged" if case["flagged"] else "")
        )
    return lines


def _wrapped(head: str, words: list[str]) -> list[str]:
    """The words after a head of its own width, over as many lines as they need."""
    kept = ", ".join(word.replace(" ", "\xa0") for word in words)  # no break within one of them
    rows = textwrap.wrap(kept, 78 - len(head))
    heads = [head, *[" " * len(head)] * len(rows)]
    return [left + row.replace("\xa0", " ") for left, row in zip(heads, rows, strict=False)]


def _bars(labels: list[str], counts: list[int]) -> list[str]:
    most = max([*counts, 1])
    return [
        f"    {label}  {count:>7,}  {'█' * math.ceil(BAR * count / most)}"
        for label, count in zip(labels, counts, strict=True)
        if count
    ]


def push(
    run: RunFolder,
    repo: Annotated[str, tyro.conf.Positional],
    *,
    dry_run: bool = False,
    private: bool = False,
    license: str = "unknown",
) -> None:
    """Publish a measured SAE on the Hugging Face Hub, in SAELens format with a model card.

    Args:
        run: The run folder.
        repo: The Hub repository, owner/name; it is made where there is none.
        dry_run: Write the folder that would be published to RUN/hub, and stop there.
        private: Make the repository private where it is made.
        license: The Hub's name of the license that you give it.
    """
    from saesteer.core.sae import load_sae
    from saesteer.training import card

    opened = Run.open(run)
    if not (run / "sae").is_dir():
        raise SaeError(f"{run} has no SAE yet; run `saesteer train {run}`")
    sae = load_sae(run / "sae")
    folder = card.write_folder(
        run / "hub",
        dataclasses.replace(sae, model_id=sae.model_id and without_folders(sae.model_id)),
        card.read_figures(run / "evaluation.json"),
        repo=repo,
        trained_tokens=None if opened.config.sae.source else opened.config.train.tokens,
        architecture=opened.config.sae.architecture,
        license=license,
    )
    configuration.write(folder / "config.toml", published(opened.config))
    if dry_run:
        print(f"{folder} holds what would be published as {repo}; nothing was uploaded")
        return
    print(card.upload(folder, repo, private=private))


def published(config: configuration.Config) -> configuration.Config:
    """The configuration without the folders of this machine."""
    source = config.sae.source
    return dataclasses.replace(
        config,
        run=without_folders(config.run),
        model=dataclasses.replace(config.model, id=without_folders(config.model.id)),
        text=dataclasses.replace(config.text, source=without_folders(config.text.source)),
        sae=dataclasses.replace(config.sae, source=source and without_folders(source)),
    )


def without_folders(name: str) -> str:
    """The last part of a path on this machine; any other name as it is."""
    path = Path(name)
    return path.name if path.is_absolute() or path.exists() else name
