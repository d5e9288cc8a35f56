"""demo: the whole job on the embedded model, offline, ending in a report."""

import dataclasses
import json
import sys
import textwrap
import time
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from saesteer import config as configuration
from saesteer.core.files import written_aside
from saesteer.run import Run

if TYPE_CHECKING:
    from saesteer.effects.planted import PlantedReport

STORIES = 5_500  # a little more than the tokens that configs/demo.toml asks for
SHOWN = ("sea", "castle", "music")
STEERED = "music"
PROMPT = "Story A. Once there was a girl named Lily. It was Monday. The man"
NEW_TOKENS = 36
COLUMN = 38  # two of them and a gap make 80


def demo(
    *,
    run: Path = Path("runs/demo"),
    seed: int = 0,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Cache, train, evaluate, index, search and steer on the embedded model, and say how it went.

    Args:
        run: The run folder to leave behind.
        seed: Of the stories, the training and the prompts.
        json_: Print one JSON object in place of the report.
    """
    from saesteer.effects import planted

    begin = time.monotonic()
    made, figures = make(run, seed)
    report = planted.measure(made.model, made.tokenizer, made.sae, made.index, seed=seed)
    summary = {
        "sae": {
            "explained_variance": figures["explained_variance"],
            "l0": figures["l0"],
            "ce_recovered": figures["ce_recovered"],
            "dead_fraction": figures["dead_fraction"],
        },
        "search": {"precision_at_1": report.search.precision_at_1, "mrr": report.search.mrr},
        "steer": report.steer,
        "seconds": round(time.monotonic() - begin, 1),
    }
    if json_:
        print(json.dumps(summary))
        return
    print_report(made, summary, report)


def make(run: Path, seed: int) -> tuple[Run, dict[str, Any]]:
    """The demo's run: cached, trained, evaluated (with what that measured) and indexed."""
    from saesteer import fitting, stages

    config = demo_config(run, seed)
    # Activations rounded from float64, like the training, are the same on every machine.
    exact = dataclasses.replace(config.model, dtype="float64")
    trained = Run.create(dataclasses.replace(config, model=exact))
    write_stories(Path(config.text.source), seed)
    fitting.train(trained)
    made = Run(run, config)
    made.save_config()
    figures = stages.evaluate(made)
    stages.index(made)
    return made, figures


def demo_config(run: Path, seed: int) -> configuration.Config:
    """configs/demo.toml, for this run folder and seed."""
    source = resources.files("saesteer.configs") / "demo.toml"
    with resources.as_file(source) as path:
        config = configuration.read(path)
    return dataclasses.replace(
        config,
        run=str(run),
        text=dataclasses.replace(config.text, source=str(run / "stories.txt")),
        train=dataclasses.replace(config.train, seed=seed),
    )


def write_stories(path: Path, seed: int) -> None:
    """The demo's text: stories of the planted language."""
    from saesteer.world import corpus

    with written_aside(path) as aside:
        aside.write_text(
            f"\n{corpus.DOCUMENT_SEPARATOR}\n".join(
                corpus.text(story.words) for story in corpus.stories(STORIES, seed)
            ),
            encoding="utf-8",
        )


def print_report(run: Run, summary: dict[str, Any], report: "PlantedReport") -> None:
    """The figures, three searches, texts side by side, and what to try next."""
    from saesteer.effects.planted_score import closed
    from saesteer.features import view

    sae, search, steer = summary["sae"], summary["search"], summary["steer"]
    print(f"\nThe SAE: {run.sae.d_sae} features at {run.hook_point}, on text it was not trained on")
    print(f"  explained variance  {sae['explained_variance']:.3f}")
    print(f"  L0                  {sae['l0']:.1f} features fire on a token")
    print(f"  CE-loss recovered   {sae['ce_recovered']:.3f} (1: as good as the model itself)")
    print(f"  dead features       {sae['dead_fraction']:.1%}")

    print("\nSearch: a word, the feature it finds, and why")
    for word in SHOWN:
        print(f'\n  saesteer search {run.path} "{word}"')
        hits = view.hits(run.search(word, limit=1), word, colour=sys.stdout.isatty(), width=78)
        print(textwrap.indent(hits, "  "))
    print(
        f"\n  over all ordinary concepts: the first hit is right {search['precision_at_1']:.0%} of "
        f"the time (mean reciprocal rank {search['mrr']:.2f})"
    )

    chosen = next(c.chosen for c in report.concepts if c.concept == STEERED)
    print(f"\nSteering towards {STEERED!r}, strengths chosen on validation prompts")
    baseline = run.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    for title, steered in steered_texts(run, report, chosen).items():
        print("\n" + side_by_side("baseline", baseline, title, steered))

    print("\nHow far each goes, over all causal concepts: KL from the exact answer in nats")
    for arm, title in (
        ("none", "no edit"),
        ("random", "20 random directions"),
        ("clamp", "clamp a feature"),
        ("add", "add a feature's direction"),
        ("mean_difference_128", "128-pair mean difference"),
        ("ceiling", "ceiling: the concept is really on"),
    ):
        share = closed(steer, arm)
        bar = "█" * round(20 * min(1.0, max(0.0, share)))
        print(f"  {title:<34}{steer[arm]:.3f}  {share:>5.0%}  {bar}")

    feature = chosen["clamp"].partition("=")[0]
    print(f"\nDone in {summary['seconds']:.0f} s. Everything is in {run.path}. Try next:")
    print(f'  saesteer search {run.path} "wizard"')
    print(f"  saesteer feature {run.path} {feature}")
    print(f'  saesteer steer {run.path} --clamp {chosen["clamp"]} --prompt "{PROMPT}"')
    print("  saesteer train configs/gpt2-small.toml")


def steered_texts(run: Run, report: "PlantedReport", chosen: dict[str, str]) -> dict[str, str]:
    """The prompt continued under each kind of edit, by a title that says what it is."""
    from saesteer.steering.edits import Add

    texts = {}
    for arm in ("clamp", "add"):
        feature, _, strength = chosen[arm].partition("=")
        setting = {int(feature): strength}
        edits = run.edits(clamp=setting) if arm == "clamp" else run.edits(add=setting)
        with run.steer(edits=edits):
            title = f"{arm} feature {feature} at {strength}"
            texts[title] = run.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    strength = chosen["mean_difference_128"]
    times = float(strength.removesuffix("x"))
    with run.steer(edits=[Add(report.vectors[STEERED], times, run.sae.hook_point)]):
        title = f"mean difference, 128 pairs, {strength}"
        texts[title] = run.generate(PROMPT, max_new_tokens=NEW_TOKENS)
    return texts


def side_by_side(left_title: str, left: str, right_title: str, right: str) -> str:
    """Two texts in two columns."""
    columns = [
        [title[:COLUMN], "─" * COLUMN, *textwrap.wrap(text, COLUMN)]
        for title, text in ((left_title, left), (right_title, right))
    ]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(f"  {a:<{COLUMN}}  {b}".rstrip() for a, b in rows)
