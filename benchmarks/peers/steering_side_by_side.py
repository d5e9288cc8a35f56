"""Ours beside the peers on one model: what a hook costs, whether logits agree, what goes wrong."""

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import results
from peers.apart import NotInstalledError
from peers.steering_apart import Apart, PeerFailedError
from peers.steering_task import written
from safetensors.torch import load_file

REPEATS = 4

Rows = list[dict[str, Any]]


def compared(
    names: Sequence[str],
    *,
    width: int,
    d_sae: int,
    batches: Sequence[int],
    tokens: int,
    rounds: int,
    install: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """{"peers", "agreement", "known_cases", "not_run"}: three tables, and reasons by peer."""
    found: dict[str, Any] = {"peers": [], "agreement": [], "known_cases": [], "not_run": {}}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        given = Path(folder)
        written(given, width=width, d_sae=d_sae)
        us = stack.enter_context(Apart("ours", given))
        for name in names:
            try:
                peer = stack.enter_context(Apart(name, given, install=install))
            except NotInstalledError as error:
                found["not_run"][name] = str(error)
                say(f"{name} is not run: {error}")
                continue
            for case in peer.cases:
                for batch in batches:
                    about = {"peer": name, "version": peer.version, "case": case, "batch": batch}
                    say(f"{name} {peer.version}: {case}, batch {batch}")
                    try:
                        found["peers"].append(about | _timed(us, peer, case, batch, tokens, rounds))
                    except PeerFailedError as error:
                        found["not_run"][f"{name}, {case}, batch {batch}"] = str(error)
                found["agreement"].append(
                    {"peer": name, "case": case, **_logits(us, peer, case, given)}
                )
            for case in peer.wrong:
                found["known_cases"].append(
                    {
                        "peer": f"{name} {peer.version}",
                        "case": case,
                        "the peer": peer.ask("wrong", case=case)["got"],
                        "ours": us.ask("wrong", case=case)["got"],
                    }
                )
    return found


def _timed(us: Apart, peer: Apart, case: str, batch: int, tokens: int, rounds: int) -> Any:
    """Microseconds a step over each one's own unsteered model, in turn; and the quartiles of what
    the peer's are above ours round by round."""
    asked = {"case": case, "batch": batch, "tokens": tokens, "repeats": REPEATS}
    steps: dict[str, list[float]] = {"ours": [], "peer": []}
    whole: dict[str, list[float]] = {"ours": [], "peer": []}

    def side(name: str, program: Apart) -> Callable[[], float]:
        def run() -> float:
            seconds = program.ask("time", **asked)
            steps[name].append(1e6 * (seconds["steered"] - seconds["unsteered"]))
            whole[name].append(steps[name][-1] + 1e6 * seconds["around"] / tokens)
            return whole[name][-1]

        return run

    results.alternating({"ours": side("ours", us), "peer": side("peer", peer)}, rounds, _quiet)
    more = [b - a for a, b in zip(whole["ours"], whole["peer"], strict=True)]
    low, high = results.quartiles(more)
    return {
        "hook_us_per_layer_step": statistics.median(whole["peer"]),
        "ours_us": statistics.median(whole["ours"]),
        "low": low,
        "high": high,
        "step_us": statistics.median(steps["peer"]),
        "ours_step_us": statistics.median(steps["ours"]),
    }


def _logits(us: Apart, peer: Apart, case: str, folder: Path) -> dict[str, float]:
    """How far the peer's logits are from ours on one prompt, and how far steering moves them."""
    read = {}
    for name, program in (("ours", us), ("peer", peer)):
        path = folder / f"{name}.safetensors"
        program.ask("write_logits", case=case, batch=1, to=str(path))
        read[name] = load_file(path)

    def most(a: tuple[str, str], b: tuple[str, str]) -> float:
        return float((read[a[0]][a[1]] - read[b[0]][b[1]]).abs().max())

    return {
        "largest difference": most(("ours", "steered"), ("peer", "steered")),
        "unsteered": most(("ours", "plain"), ("peer", "plain")),
        "effect": most(("ours", "steered"), ("ours", "plain")),
    }


def _quiet(_: str) -> None:
    pass
