"""Steering: what it costs in `generate`, and how it stands beside others.

Tokens a second of greedy `generate` to a fixed length, steered at the middle block's output and
unsteered, in alternating runs, at least --rounds of each and for at least --seconds; entering and
leaving the context is in the steered time. ratio_to_unsteered is the median of the ratios round by
round, low and high their quartiles. The case "nothing" is the unsteered model against itself: how
far its ratio is from 1 is how far any other's may be by chance.

Two figures say what a hook costs, in µs for one edited layer and one forward pass:

hook_us_per_layer_step  from the same runs: (steered − unsteered seconds) / forward passes, the
    median over rounds. All costs are in it (the clock, the receipt, the context), and so is the
    noise of two whole runs, which on a large model is greater than what is measured.
call_us  measured directly: the edited block's own call, hooks included, in the decode steps of
    `generate`, steered less unsteered, each the least of some runs' medians. Steadier; without the
    clock's tick, the receipt's adding up and the context.

floor_us, beside TopK, is one x · W_enc, without which nobody knows which k latents fire.

Peers (steering-vectors, repeng, sae-lens's HookedSAETransformer) and ours run in processes of
their own, in turn, on a random two-block GPT-2 of --width that knows 96 tokens. step_us there is
the whole model's call in a decode step of `generate`, the median over steps, steered less each
one's own unsteered; hook_us_per_layer_step adds entering and leaving the context, shared out among
the tokens of one `generate`. Medians over rounds; low and high are the quartiles of peer − ours
round by round (above 0: ours costs less). The prompt's own pass and what `generate` does outside of
the model are not in it, nor is reading the receipt, which the peers don't have. repeng's unsteered
model keeps its wrapper, which favours it.

Models: "planted", the embedded one; a folder; "random:LAYERSxWIDTH", a random-init GPT-2 that knows
50,257 tokens, or so many as a further "xVOCABULARY" says. By default the embedded one,
SAESTEER_TEST_MODEL where set, and random:12x768.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results
import torch
from peers.steering_apart import PEERS
from peers.steering_cases import (
    FEWER,
    LATENTS,
    WIDE,
    Case,
    call_us,
    cases,
    floor_us,
    generate,
    hook_us,
)
from peers.steering_side_by_side import compared
from peers.steering_task import prompts, random_gpt2
from transformers import PreTrainedModel

from saesteer.core.blocks import d_model
from saesteer.core.model import EMBEDDED, load_model

TITLE = "Steering: steered tokens a second / unsteered"
JUDGED = "random:12x768"


def loaded(name: str) -> PreTrainedModel:
    """The model of that name, in float32 on the CPU."""
    if name.startswith("random:"):
        return random_gpt2(*map(int, name.removeprefix("random:").split("x")))
    return load_model(name, dtype="float32")[0]


def row(
    name: str, plain: PreTrainedModel, case: Case, batch: int, tokens: int, rounds: int,
    seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """One case at one batch size, in turn with the unsteered model."""
    ids = prompts(batch, plain.config.vocab_size)

    def unsteered() -> float:
        begin = time.perf_counter()
        generate(plain, ids, tokens)
        return batch * tokens / (time.perf_counter() - begin)

    def steered() -> float:
        begin = time.perf_counter()
        with case.steered():
            generate(case.model, ids, tokens)
        return batch * tokens / (time.perf_counter() - begin)

    sides: dict[str, Callable[[], float]] = {"unsteered": unsteered, "steered": steered}
    for warm in sides.values():
        warm()
    begin = time.perf_counter()
    for side in sides.values():
        side()
    rounds = max(rounds, round(seconds / (time.perf_counter() - begin)))
    say(f"{name}: {case.name} ({case.architecture}), batch {batch}, {rounds} rounds")
    found = results.alternating(sides, rounds, _quiet)
    ratios = [a / b for a, b in zip(found["steered"], found["unsteered"], strict=True)]
    low, high = results.quartiles(ratios)
    answer: dict[str, Any] = {
        "model": name,
        "d_model": d_model(plain),
        "architecture": case.architecture,
        "d_sae": case.d_sae,
        "case": case.name,
        "batch": batch,
        "ours_tok_s": statistics.median(found["steered"]),
        "unsteered_tok_s": statistics.median(found["unsteered"]),
        "ratio_to_unsteered": statistics.median(ratios),
        "low": low,
        "high": high,
        "hook_us_per_layer_step": hook_us(
            found["steered"], found["unsteered"], batch * tokens, tokens
        ),
        "call_us": call_us(case, plain, ids, tokens, min(rounds, 9)),
    }
    if case.floor is not None:
        answer["floor_us"] = floor_us(case.floor, batch)
    return answer


def rows_of(
    name: str, tokens: int, rounds: int, seconds: float
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Every case on one model, and what can't be run there."""
    plain, shown = loaded(name), name if name.startswith("random:") else Path(name).name
    with cases(plain) as (found, not_run):
        rows = [
            row(shown, plain, case, batch, tokens, rounds, seconds)
            for case in found
            for batch in case.batches
        ]
    return rows, {f"{case} on {shown}": why for case, why in not_run.items()}


def markdown(found: dict[str, Any], rounds: int, tokens: int) -> str:
    """The section of RESULTS.md."""
    about = results.machine("transformers", "sae-lens")
    parts = [
        f"`benchmarks/steering.py`. {about} Greedy `generate` of {tokens} tokens, {rounds} or "
        'more rounds; low and high are quartiles of the ratios round by round; "nothing" is the '
        "unsteered model against itself. hook_us_per_layer_step: from the same runs, all costs and "
        "all noise in it; call_us: the edited block's own call measured directly; floor_us: one "
        "x · W_enc.",
        results.table([each | {"floor_us": each.get("floor_us", "")} for each in found["rows"]]),
    ]
    if found["peers"]:
        parts += [
            "Beside others, on a random two-block model: µs that steering adds to the whole "
            "model's call in a decode step (step_us), and with entering and leaving shared out "
            f"among {tokens} tokens (hook_us_per_layer_step); low and high are the quartiles of "
            "peer − ours round by round (above 0: ours costs less).",
            results.table(found["peers"]),
        ]
    if found["agreement"]:
        parts += [
            "Where the others are right, the largest difference of logits from ours, steered and "
            "unsteered, and how far steering moves them.",
            results.table(found["agreement"]),
        ]
    if found["known_cases"]:
        parts += [
            "Known cases, each run here. sae-lens can be told to leave special tokens out "
            "(exclude_special_tokens); this is its default.",
            results.table(found["known_cases"]),
        ]
    parts += [f"Not run: {name} ({why})." for name, why in found["not_run"].items()]
    return "\n\n".join(parts)


def _quiet(_: str) -> None:
    pass


def say(line: str) -> None:
    """A line for whoever is waiting; --json leaves stdout to the figures."""
    print(line, file=sys.__stderr__, flush=True)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for: {"rows", "peers", "agreement", "known_cases", "not_run"}."""
    rows: list[dict[str, Any]] = []
    not_run: dict[str, str] = {}
    for name in args.models:
        more, reasons = rows_of(name, args.tokens, args.rounds, args.seconds)
        rows, not_run = rows + more, not_run | reasons
    found: dict[str, Any] = {"peers": [], "agreement": [], "known_cases": [], "not_run": {}}
    if args.peers:
        found = compared(
            args.peers, width=args.width, d_sae=LATENTS if args.width >= WIDE else FEWER,
            batches=(1, 32), tokens=args.tokens, rounds=args.rounds, install=not args.no_install,
            say=say,
        )  # fmt: skip
    return {"rows": rows, **found, "not_run": not_run | found["not_run"]}


def main() -> None:
    """Measure, print, and put the tables into RESULTS.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    other = os.environ.get("SAESTEER_TEST_MODEL")
    add = parser.add_argument
    add("--models", nargs="*", default=[EMBEDDED, *([other] if other else []), JUDGED])
    add("--rounds", type=int, default=9)
    add("--seconds", type=float, default=12.0, help="more rounds until so long is measured")
    add("--tokens", type=int, default=16, help="new tokens of each row in a run")
    add("--width", type=int, default=768, help="d_model of the model beside the peers")
    add("--peers", nargs="*", choices=PEERS, default=PEERS)
    add("--no-install", action="store_true", help="leave out peers that aren't installed yet")
    add("--threads", type=int, default=2)
    add("--json", action="store_true", help="print JSON and write nothing")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(args.threads)
    # transformers' progress bars would mix with the figures.
    with contextlib.redirect_stderr(io.StringIO()) if args.json else contextlib.nullcontext():
        found = measured(args)
    if args.json:
        print(json.dumps(found))
        return
    if not other:
        found["not_run"]["a real model"] = "SAESTEER_TEST_MODEL is not set"
    text = markdown(found, args.rounds, args.tokens)
    results.write_section(TITLE, text)
    print(text)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an edit's condition that never holds is no news here
        main()
