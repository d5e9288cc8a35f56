"""vector: directions and arms made from contrast pairs, by every method."""

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from saesteer.cli.arguments import check_seed
from saesteer.errors import ConfigError
from saesteer.run import Run

if TYPE_CHECKING:
    from saesteer.directions.pairs import Pair
    from saesteer.vectors import Kept

Several = tyro.conf.UseAppendAction[tuple[str, ...]]


def vector(
    run: Annotated[Path | None, tyro.conf.Positional] = None,
    *,
    pairs: str | None = None,
    name: str | None = None,
    method: str = "mean-difference",
    layer: Annotated[str | None, tyro.conf.arg(aliases=["--layers"])] = None,
    read: str | None = None,
    noise: float = 0.0,
    seed: int = 0,
    set_: Annotated[Several, tyro.conf.arg(name="set")] = (),
    validation: str | None = None,
    diagnose: bool = False,
    list_: Annotated[bool, tyro.conf.arg(name="list")] = False,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Make a direction, edits, a prompt or an adapter of contrast pairs, and keep it in the run.

    Args:
        run: The run folder.
        pairs: A file of pairs (JSONL or JSON of prompt, chosen and rejected, or of the CAA sets;
            parquet), or a `datasets` name. 128 are a good number.
        name: What to call it; `steer --vector NAME=STRENGTH` uses a direction, `steer --load NAME`
            edits made of features. A prompt needs none.
        method: How it is made; --list says which there are.
        layer: A hook point, several with commas between, or all; by default the SAE's.
        read: Where activations are read: answer-mean, answer-last, answer-token or after:TEXT;
            prompt-last without a contrast (pca-activations). By default as it is published.
        noise: Swap the sides of this share of the pairs first.
        seed: Of what the method draws.
        set_: OPTION=VALUE, an option of the method's own. May be repeated.
        validation: A file of pairs held out, on which margins without and with it are printed, and
            settings chosen. Without it a direction is fitted on all pairs and no margin printed;
            for any other method a quarter of the pairs is held out.
        diagnose: Say what pairs, text and SAE tell of each direction before anyone steers with it.
        list_: List the methods, with their papers and options.
        json_: Print JSON.
        device: Where the model runs.
        dtype: float32, bfloat16 or float16.
    """
    if list_:
        from saesteer.cli.vector_view import listed

        print(listed(json_))
        return
    if run is None or pairs is None:
        raise ConfigError("give a run folder and --pairs FILE; --list says which methods there are")
    from saesteer import arming, vectors
    from saesteer.cli import vector_view
    from saesteer.cli.vector_options import values
    from saesteer.compare.held_out import read_held_out
    from saesteer.directions.methods import ALIASES, METHODS
    from saesteer.directions.pairs import FEWEST, read_pairs

    check_seed(seed)
    method = ALIASES.get(method, method)
    arming.options_of(method)  # a method that there isn't is told first
    chosen = METHODS.get(method)
    if chosen is not None and chosen.kind != "reader" and name is None:
        raise ConfigError("give the direction a name with --name NAME")
    vectors.check_noise(method, noise)
    if diagnose and (chosen is None or chosen.kind not in ("pairs", "pairs-many") or noise):
        raise ConfigError(
            "--diagnose is for methods fitted on activations, of pairs as they are: leave it out, "
            "or --noise"
        )
    if validation is not None and chosen is not None and chosen.kind == "reader":
        raise ConfigError(
            f"--validation is for what steers, and {method} only reads: leave it out; the AUROC "
            "printed is of pairs held out in turn"
        )
    opened = Run.open(run, device=device, dtype=dtype)
    how: dict[str, Any] = {
        "method": method,
        "layers": layer,
        "read": read,
        "noise": noise,
        "seed": seed,
        "options": values(method, set_, opened),
    }
    if chosen is None:
        arming.check_asked(opened, method, name, how["options"], layers=layer, read=read)
    given = read_pairs(pairs, opened.tokenizer)
    held = None if validation is None else read_held_out(validation, opened.tokenizer)
    with warnings.catch_warnings():
        if len(given) < FEWEST:  # told on reading them; fitting would tell it again
            warnings.filterwarnings("ignore", r"\d+ contrast pairs?: under")
        if chosen is not None and chosen.kind != "reader":
            assert name is not None
            facts, lines = _directions(opened, given, held, name, diagnose, how)
        elif chosen is not None:
            found = vectors.read_with(opened, given, **how)
            facts = [{"point": str(p), "held_out_auroc": auroc} for p, (_, auroc) in found.items()]
            lines = [line for row in facts for line in vector_view.read_lines(method, row)]
        else:
            armed = arming.make(opened, given, name=name, validation=held, **how)
            facts = [vector_view.armed_facts(armed, name)]
            lines = vector_view.armed_lines(armed, name, run)
    print(json.dumps(facts) if json_ else "\n".join(lines))


def _directions(
    run: Run,
    pairs: "tuple[Pair, ...]",
    held: "tuple[Pair, ...] | None",
    name: str,
    diagnose: bool,
    how: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Fit and keep directions; what is said of all of them: for programs, and in lines."""
    from saesteer import arming, vectors
    from saesteer.cli import vector_view
    from saesteer.compare.held_out import check_apart

    if held is not None:
        check_apart(pairs, held)
    facts: list[dict[str, Any]] = []
    lines: list[str] = []
    usable = []
    for own in vectors.fit(run, pairs, name=name, **how):
        about, said = _told(run, pairs, own, held, diagnose)
        facts.append(about)
        lines += said
        usable += [own] if arming.fits(run, own.parts) else []
    return facts, [*lines, vector_view.next_line(run.path, usable)]


def _told(
    run: Run,
    pairs: "tuple[Pair, ...]",
    kept: "Kept",
    held: "tuple[Pair, ...] | None",
    diagnose: bool,
) -> tuple[dict[str, Any], list[str]]:
    """What is said of a direction that was kept: for programs, and in lines."""
    from saesteer import arming, vectors
    from saesteer.cli import vector_view
    from saesteer.directions.direction import Direction
    from saesteer.effects.diagnose_view import shown

    facts, lines = vector_view.kept_facts(kept), vector_view.kept_lines(kept)
    if held is not None:
        margins = arming.measured(run, arming.applied(run, kept.parts), held)
        facts |= vector_view.margins_facts(margins)
        lines += vector_view.margins_lines(margins)
    if diagnose:
        found = [vectors.diagnose(run, pairs, p) for p in kept.parts if isinstance(p, Direction)]
        facts["diagnoses"] = [one.to_dict() for one in found]
        lines += [shown(one, colour=sys.stdout.isatty()) for one in found]
    return facts, lines
