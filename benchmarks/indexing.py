"""Describing all features of an SAE: our tokens a second against SAEDashboard's, and memory.

Both are given the same model, JumpReLU SAE and token ids, and are timed from these to the finished
description of every feature: ours in its index file, SAEDashboard's in memory (it could write .6 MB
of JSON a feature, which would take it longer). They run in turn, each time in a new process with
the same number of threads; loading is left out. The SAE's latents fire on 0.01% to 10% of the
tokens, on tokens like one that was drawn; both must find the same densities to 1e-5. SAEDashboard
is set as it is fastest here: JumpReLU, the model's activations kept in files, its own 256 features
at a time (fewer or more are no faster).

ours_tok_s, peer_tok_s: medians over the rounds; ratio: that of the ratios round by round, low and
high their range. Peak memory is that of the whole process, its libraries and the model in it
(…_loaded_mb of it before the work begins), the highest of all rounds. "more" is ours on 4 and 16
times as many tokens, once each: up to 262,144 tokens the codes of all are kept for co-activation,
from there on those of a sample of that size. SAEDashboard's memory grows with the features that it
holds at the end, some 5 MB each; who describes them in parts needs less.

What the two describe differs. Both: top contexts, examples from ranges of the activation,
histograms of activations and logits, density, top and bottom logits. SAEDashboard besides: the
neurons and latents that correlate with it. Ours besides: top tokens and words with their lift, next
tokens, positions, co-activating features, decoder neighbours, token sets, a label, and full-text
search.

The model is the one in the folder SAESTEER_TEST_MODEL, else the embedded one; the text is the file
SAESTEER_TEST_TEXT, else told by `saesteer.world.corpus`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import results
import torch
from caching import planted_text, quietly
from peers.apart import HERE, NotInstalledError
from peers.indexing_task import CONTEXT, written
from peers.venvs import python_of

from saesteer.core.model import EMBEDDED

TITLE = "Indexing: our tokens a second / SAEDashboard's"
PEER, PEER_NAME = "saedashboard", "SAEDashboard"
# How many times the tokens of a run are indexed, to see that memory stays as it is.
MORE = (4, 16)
AGREE = 1e-5


class FailedError(Exception):
    """What a program said as it ended, in a line."""


def run(python: str, name: str, folder: Path, tokens: int, threads: int) -> dict[str, Any]:
    """What `peers/indexing_worker.py` answers of its one run.

    Raises:
        FailedError: it ended without an answer.
    """
    done = subprocess.run(
        [python, "-W", "ignore", str(HERE / "indexing_worker.py"), name, str(folder),
         str(threads), str(tokens // CONTEXT)],
        capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise FailedError(lines[-1] if lines else f"ended with {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def difference(ours: list[float], theirs: list[float]) -> float:
    """The largest difference of two programs' densities.

    Raises:
        SystemExit: it is over 1e-5, so that the two didn't do the same work.
    """
    largest, feature = max(
        (abs(a - b), i) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
    )
    if not largest <= AGREE:
        raise SystemExit(
            f"feature {feature} has density {ours[feature]:.6f} with us and "
            f"{theirs[feature]:.6f} with {PEER_NAME}, expected within {AGREE:g}: they were not "
            "given the same work, so their times can't be compared"
        )
    return largest


def measured(
    model_id: str,
    source: str,
    folder: Path,
    *,
    d_sae: int,
    tokens: int,
    more: Sequence[int],
    rounds: int,
    install: bool,
) -> dict[str, Any]:
    """Everything, as it is printed."""
    threads = torch.get_num_threads()
    given = {"d_sae": d_sae, "tokens": tokens, "most_tokens": max(1, *more) * tokens}
    l0 = quietly(lambda: written(folder, model_id, source, **given))
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []

    def side(python: str, name: str, kept: list[dict[str, Any]]) -> Callable[[], float]:
        def one() -> float:
            kept.append(run(python, name, folder, tokens, threads))
            return float(tokens / kept[-1]["seconds"])

        return one

    sides = {"ours": side(sys.executable, "ours", ours)}
    not_run = {}
    try:
        python = python_of(PEER, install=install)
        # A look at whether it runs, on one context; it also fills the disk's cache.
        run(python, PEER, folder, CONTEXT, threads)
    except (NotInstalledError, FailedError) as error:
        not_run[PEER_NAME] = str(error)
    else:
        sides[PEER_NAME] = side(python, PEER, theirs)
    speeds = results.alternating(sides, rounds, say)
    longer = []
    for n in (times * tokens for times in more):
        one = run(sys.executable, "ours", folder, n, threads)
        longer.append(
            {"tokens": n, "ours_tok_s": n / one["seconds"], "ours_peak_mb": one["peak_mb"]}
        )
        say(f"{n:,} tokens: {longer[-1]['ours_peak_mb']:,.0f} MB")
    found: dict[str, Any] = {
        "model": Path(model_id).name, "d_sae": d_sae, "l0": l0, "tokens": tokens,
        "ours_tok_s": statistics.median(speeds["ours"]),
        "peer": PEER_NAME, "peer_version": None, "peer_tok_s": None,
        "ratio": None, "low": None, "high": None, "density_difference": None,
        **memory("ours", ours), "peer_peak_mb": None, "peer_loaded_mb": None,
        "more": longer,
        "index_mb": ours[-1]["size_mb"], "not_run": not_run,
    }  # fmt: skip
    if theirs:
        found |= {
            "peer_version": theirs[0]["version"],
            "peer_tok_s": statistics.median(speeds[PEER_NAME]),
            **results.ratio(speeds["ours"], speeds[PEER_NAME]),
            "density_difference": difference(ours[0]["density"], theirs[0]["density"]),
            **memory("peer", theirs),
        }
    return found


def memory(who: str, runs: list[dict[str, Any]]) -> dict[str, float]:
    """The highest of all runs, at the peak and before the work."""
    return {
        f"{who}_{when}_mb": max(one[f"{when}_mb"] for one in runs) for when in ("peak", "loaded")
    }


def markdown(found: dict[str, Any], rounds: int) -> str:
    """The section of RESULTS.md."""
    speed = (
        "model", "d_sae", "l0", "tokens", "ours_tok_s", "peer_tok_s", "ratio", "low", "high",
        "density_difference",
    )  # fmt: skip
    space = (
        "ours_loaded_mb", "ours_peak_mb", "peer_loaded_mb", "peer_peak_mb", "index_mb",
    )  # fmt: skip
    peer = f"{PEER_NAME} {found['peer_version'] or 'not run'}"
    parts = [
        f"`benchmarks/indexing.py`. {results.machine('sae-lens')} {peer}. {rounds} rounds.",
        *(" ".join(part.split()) for part in (__doc__ or "").strip().split("\n\n")[1:4]),
        *(results.table([{n: show(found[n]) for n in names}]) for names in (speed, space)),
        *([results.table(found["more"])] if found["more"] else []),
        *(f"Not run: {name} ({why})." for name, why in found["not_run"].items()),
    ]
    return "\n\n".join(parts)


def show(value: Any) -> Any:
    """An empty cell for what was not measured."""
    return "" if value is None else value


def say(line: str) -> None:
    """A line for whoever is waiting; --json leaves stdout to the figures."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, print, and put the tables into RESULTS.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--d-sae", type=int, default=1024, help="latents, all of which both describe")
    add("--tokens", type=int, default=2**16, help="tokens of a run, in whole contexts")
    add("--rounds", type=int, default=3)
    add("--more", type=int, nargs="*", default=MORE, help="times the tokens that ours reads too")
    add("--threads", type=int, default=2)
    add("--no-install", action="store_true", help="leave the peer out if it isn't installed yet")
    add("--json", action="store_true", help="print JSON and write nothing")
    args = parser.parse_args()
    if min(args.d_sae, args.rounds, *args.more) < 1 or args.tokens < CONTEXT:
        parser.error(f"--d-sae, --rounds and --more are at least 1, --tokens at least {CONTEXT}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(args.threads)
    model_id = os.environ.get("SAESTEER_TEST_MODEL", EMBEDDED)
    tokens = args.tokens // CONTEXT * CONTEXT
    with tempfile.TemporaryDirectory() as folder:
        source = os.environ.get("SAESTEER_TEST_TEXT") or planted_text(
            Path(folder), max(1, *args.more) * tokens
        )
        found = measured(
            model_id, source, Path(folder), d_sae=args.d_sae, tokens=tokens, more=args.more,
            rounds=args.rounds, install=not args.no_install,
        )  # fmt: skip
    if model_id == EMBEDDED:
        found["not_run"]["a real model"] = "SAESTEER_TEST_MODEL is not set"
    if args.json:
        print(json.dumps(found))
        return
    text = markdown(found, args.rounds)
    results.write_section(TITLE, text)
    print(text)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries', which would mix with the figures
        main()
