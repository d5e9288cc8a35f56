"""Training one SAE: our step against those of sae-lens, dictionary_learning and a dense torch loop.

Everyone is given the same activations in the same order (`peers.task.SparseFeatures`, fixed seed),
the same first weights and the same constant learning rate, without AuxK; nobody's data loading is
timed. First ours and sae-lens's default trainer learn for --steps steps, which gives losses and the
explained variance (EV) of the SAEs as saved, read back with sae-lens, on rows that nobody has seen.
Then everyone is given the weights that ours has arrived at, and steps are timed side by side,
forwards and backwards in turn; all first losses must agree. sae-lens is timed with every one of its
settings that bears on speed, and the fastest is what `sae_lens_ms` is.

`floor_ms` is what no TopK step can do without: the encoder's product in the dtype that ours makes
it in, a few rows at a time as ours does, and four passes of k · batch · d multiply-adds over
gathered rows (the code decoded, its gradient, and those of decoder and encoder), each at the speed
at which ours decodes.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import results
import torch
from peers.apart import DictionaryLearning, NotInstalledError
from peers.dense import Dense
from peers.ours import Given, Shape, activations, floor, our_trainer, shape, task_of
from peers.quality import agree, learn

from saesteer.core.progress import progress
from saesteer.training.trainer import Trainer

TITLE = "A training step: sae-lens's time / ours"
SHAPES = ("192x2048x16x4096", "288x2304x32x4096", "768x16384x32x4096")
STEPS = (200, 200, 24)
ROUNDS = (12, 12, 4)
CHOOSING = ("topk", "batchtopk")
OTHERS = ("standard", "jumprelu", "gated", "matryoshka")
# At so many of the shapes the others are timed too.
OTHERS_AT = 2
PEERS = ("dense", "dictionary_learning")


def stepper(step: Callable[[Any], float], xs: Iterator[Any], losses: list[float]) -> Callable:
    """A call that makes one step on the next batch, keeps its loss, and returns milliseconds."""

    def run() -> float:
        x = next(xs)
        begin = time.perf_counter()
        loss = step(x)
        ms = 1000 * (time.perf_counter() - begin)
        losses.append(loss)
        return ms

    return run


def timed(
    trainer: Trainer,
    float32: Trainer | None,
    about: Shape,
    given: Given,
    rounds: int,
    peers: tuple[str, ...],
) -> dict[str, Any]:
    """Median milliseconds of everyone's steps, side by side, from the weights ours has now."""
    from peers.sae_lens_trainer import SaeLens, ways

    task = task_of(trainer, about)
    scaled = [batch.x * trainer.scales.x for batch in given.batches]
    losses: dict[str, list[float]] = {}
    sides: dict[str, Callable[[], float]] = {}
    not_run: dict[str, str] = {}

    def side(name: str, step: Callable[[Any], float], xs: list[Any]) -> None:
        sides[name] = stepper(step, itertools.cycle(xs), losses.setdefault(name, []))

    for way in ways(task.architecture):
        side(f"sae-lens {way}", SaeLens(task, trainer.weights, way).step, scaled)
    with contextlib.ExitStack() as stack:
        if "dictionary_learning" in peers:
            try:
                other = DictionaryLearning(task, trainer.weights, torch.stack(scaled))
            except NotInstalledError as error:
                not_run["dictionary_learning"] = str(error)
            else:
                stack.callback(other.close)
                kept = losses.setdefault("dictionary_learning", [])

                def apart() -> float:
                    ms, loss = other.step()
                    kept.append(loss)
                    return ms

                sides["dictionary_learning"] = apart
        if "dense" in peers:
            side("dense", Dense(task, trainer.weights).step, scaled)
        if trainer.plan.architecture.chooses and not trainer.plan.architecture.nested:
            sides["floor"] = floor(trainer, itertools.cycle(given.batches))
        side("ours", lambda batch: trainer.step(batch)["loss"], given.batches)
        if float32 is not None:
            for name, tensor in float32.weights.items():
                tensor.copy_(trainer.weights[name])
            side("ours float32", lambda batch: float32.step(batch)["loss"], given.batches)
        dropped = max(1, rounds // 6)
        found = results.alternating(sides, rounds + dropped, say)
    agree(losses)
    times = {name: each[dropped:] for name, each in found.items()}
    medians = {name: statistics.median(each) for name, each in times.items()}
    fastest = min(
        (name for name in medians if name.startswith("sae-lens")), key=medians.__getitem__
    )
    low, high = results.quartiles(
        [a / b for a, b in zip(times[fastest], times["ours"], strict=True)]
    )
    answer: dict[str, Any] = {
        "ours_ms": medians["ours"],
        "sae_lens_ms": medians[fastest],
        "ratio": medians[fastest] / medians["ours"],
        "interval": [low, high],
        "products": str(trainer.plan.dtype).removeprefix("torch."),
        "sae_lens_way": fastest.removeprefix("sae-lens "),
        "default_ratio": medians["sae-lens default"] / medians["ours"],
        "float32_ratio": medians["sae-lens default"] / medians.get("ours float32", medians["ours"]),
        "peers": {name: medians[name] for name in PEERS if name in medians},
        "not_run": not_run,
    }
    if "floor" in medians:
        answer |= {
            "floor_ms": medians["floor"],
            "floor_fraction": medians["floor"] / medians["ours"],
        }
    return answer


def row(
    architecture: str,
    about: Shape,
    given: Given,
    *,
    steps: int,
    rounds: int,
    lr: float | None,
    peers: tuple[str, ...],
) -> dict[str, Any]:
    """TopK or BatchTopK at one shape: what is learnt, then what a step takes."""
    say(f"{architecture} {named(about)}")
    trainer = our_trainer(architecture, about, given, lr)
    float32 = None
    if trainer.plan.dtype != torch.float32:
        float32 = our_trainer(architecture, about, given, lr, products="float32")
    learnt = learn(trainer, float32, about, given, steps)
    found = timed(trainer, float32, about, given, rounds, peers)
    return {"architecture": architecture, "shape": list(about), "lr": trainer.lr, **found, **learnt}


def other(
    architecture: str, about: Shape, given: Given, *, steps: int, rounds: int, lr: float | None
) -> dict[str, Any]:
    """Another architecture at one shape, from the first weights and from those after some steps.

    Half of a penalised architecture's latents fire at first and few later, which our step makes use
    of: `ratio` is the later one, where a run spends its time.
    """
    say(f"{architecture} {named(about)}")
    trainer = our_trainer(architecture, about, given, lr)
    start = timed(trainer, None, about, given, max(2, rounds // 3), ())
    batches = itertools.islice(itertools.cycle(given.batches), steps)
    l0 = 0.0
    for batch in progress("learn", steps, unit="step", iterable=batches):
        l0 = trainer.step(batch)["l0"]
    found = timed(trainer, None, about, given, rounds, ())
    return {
        "architecture": architecture,
        "shape": list(about),
        **{name: found[name] for name in ("ours_ms", "sae_lens_ms", "ratio", "interval")},
        "ratio_at_start": start["ratio"],
        "l0": l0,
        "products": found["products"],
        "sae_lens_way": found["sae_lens_way"],
        "default_ratio": found["default_ratio"],
    }


def named(about: Shape) -> str:
    """A shape as it is written on the command line."""
    return "x".join(map(str, about))


def flat(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with one cell a figure, for a table."""
    out = []
    for each in rows:
        cells = {**each, "shape": named(each["shape"])}
        low, high = cells.pop("interval")
        cells["ratio"] = f"{cells['ratio']:.2f} ({low:.2f} – {high:.2f})"
        cells.pop("not_run", None)
        cells |= {f"{name}_ms": ms for name, ms in cells.pop("peers", {}).items()}
        out.append(cells)
    return out


def markdown(rows: list[dict[str, Any]], others: list[dict[str, Any]], rounds: int) -> str:
    """The section of RESULTS.md."""
    about = results.machine("sae-lens")
    speed = (
        "architecture", "shape", "ours_ms", "sae_lens_ms", "ratio", "sae_lens_way",
        "default_ratio", "float32_ratio", "floor_ms", "floor_fraction", "dense_ms",
        "dictionary_learning_ms", "products",
    )  # fmt: skip
    learnt = (
        "architecture", "shape", "steps", "lr", "loss_ratio_at_equal_steps",
        "loss_ratio_to_float32", "ev_ours", "ev_sae_lens", "ev_sae_lens_in_training", "l0_ours",
        "l0_sae_lens",
    )  # fmt: skip
    head = (
        f"`benchmarks/training.py`. {about} Median milliseconds of {rounds} steps side by side; "
        "ratios of medians, with the quartiles of the ratios round by round. The first ratio is to "
        "the fastest of sae-lens's settings (sae_lens_way), default_ratio to its default, and "
        "float32_ratio is that with our products in float32 too. floor_ms: the encoder's product "
        "and four passes over k · batch gathered rows. Nobody has AuxK on."
    )
    about_quality = (
        "Losses are means of the last tenth of the steps, ours / sae-lens's default; EV and L0 are "
        "those of the SAEs as saved, on rows nobody has seen. sae-lens saves a BatchTopK's "
        "threshold as a moving average from 0, so after few steps far too many latents fire: "
        "ev_sae_lens_in_training is its EV with the choice that it learnt with."
    )
    parts = [head]
    if rows:
        parts += [columns(flat(rows), speed), about_quality, columns(flat(rows), learnt)]
    if others:
        parts += [
            "The other architectures, after some steps and (ratio_at_start) before the first.",
            results.table(flat(others)),
        ]
    reasons = {name: why for each in rows for name, why in each["not_run"].items()}
    parts += [f"Not run: {name} ({why})." for name, why in reasons.items()]
    return "\n\n".join(parts)


def columns(rows: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    """A table of those of the columns that there are."""
    kept = [name for name in names if any(name in each for each in rows)]
    return results.table([{name: each.get(name, "") for name in kept} for each in rows])


def say(line: str) -> None:
    """A line for whoever is waiting; --json leaves stdout to the figures."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, print, and put the tables into RESULTS.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", type=shape, nargs="+", default=[shape(text) for text in SHAPES],
        help="d x d_sae x k x batch of each")  # fmt: skip
    add("--steps", type=int, nargs="+", default=list(STEPS),
        help="steps of learning, of each shape or of all")  # fmt: skip
    add("--rounds", type=int, nargs="+", default=list(ROUNDS),
        help="timed rounds, of each shape or of all")  # fmt: skip
    add("--architectures", nargs="+", choices=(*CHOOSING, *OTHERS), default=(*CHOOSING, *OTHERS))
    add("--peers", nargs="*", choices=PEERS, default=PEERS, help="besides sae-lens")
    add("--lr", type=float, help="everyone's learning rate; by default ours")
    add("--threads", type=int, default=2)
    add("--json", action="store_true", help="print JSON and write nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    steps, rounds = (
        each * len(args.shapes) if len(each) == 1 else each for each in (args.steps, args.rounds)
    )
    if not len(args.shapes) <= min(len(steps), len(rounds)):
        parser.error("--steps and --rounds take one number, or one for each shape")
    for number, about in enumerate(args.shapes):
        given = activations(about)
        common = {"steps": steps[number], "rounds": rounds[number], "lr": args.lr}
        for architecture in args.architectures:
            if architecture in CHOOSING:
                rows.append(row(architecture, about, given, **common, peers=tuple(args.peers)))
            elif number < OTHERS_AT:
                others.append(other(architecture, about, given, **common))
    if args.json:
        print(json.dumps({"rows": rows, "others": others}))
        return
    text = markdown(rows, others, min(rounds))
    results.write_section(TITLE, text)
    print(text)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sae_lens's and torch's, which would mix with the figures
        main()
