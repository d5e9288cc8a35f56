"""vector: directions from contrast pairs, by every method."""

import inspect
import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from saesteer.errors import ConfigError
from saesteer.run import Run

if TYPE_CHECKING:
    from saesteer.directions.direction import Part
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
    diagnose: bool = False,
    list_: Annotated[bool, tyro.conf.arg(name="list")] = False,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Fit a direction on contrast pairs by any method, and keep it in the run.

    Args:
        run: The run folder.
        pairs: A file of pairs (JSONL or JSON of prompt, chosen and rejected, or of the CAA sets;
            parquet), or a `datasets` name. 128 are a good number.
        name: What to call it; `steer --vector NAME=STRENGTH` uses it.
        method: How it is fitted; --list says which there are.
        layer: A hook point, several with commas between, or all; by default the SAE's.
        read: Where activations are read: answer-mean, answer-last, answer-token, prompt-last or
            after:TEXT; by default as the method is published.
        noise: Swap the sides of this share of the pairs first.
        seed: Of what the method draws.
        set_: OPTION=VALUE, an option of the method's own. May be repeated.
        diagnose: Say what pairs, text and SAE tell of each direction before anyone steers with it.
        list_: List the methods, with their papers.
        json_: Print JSON.
        device: Where the model runs.
        dtype: float32, bfloat16 or float16.
    """
    if list_:
        print(_listed(json_))
        return
    if run is None or pairs is None:
        raise ConfigError("give a run folder and --pairs FILE; --list says which methods there are")
    from saesteer import vectors
    from saesteer.directions.direction import Direction
    from saesteer.directions.methods import method as known_method
    from saesteer.directions.pairs import read_pairs
    from saesteer.effects.diagnose_view import shown

    chosen = known_method(method)
    options = dict(_option(text) for text in set_)
    for option, value in options.items():
        known = inspect.signature(chosen.fit).parameters.get(option)
        usual = None if known is None else known.default
        if isinstance(usual, int | float) and not isinstance(value, int | float):
            raise ConfigError(f"--set {option}={value}: expected a number, as {usual}")
    if chosen.kind != "reader" and name is None:
        raise ConfigError("give the direction a name with --name NAME")
    if diagnose and (chosen.kind not in ("pairs", "pairs-many") or noise):
        raise ConfigError(
            "--diagnose is for methods fitted on activations, of pairs as they are: leave it out, "
            "or --noise"
        )
    opened = Run.open(run, device=device, dtype=dtype)
    given = read_pairs(pairs, opened.tokenizer)
    how: dict[str, Any] = {
        "method": method,
        "layers": layer,
        "read": read,
        "noise": noise,
        "seed": seed,
        "options": options,
    }
    if chosen.kind == "reader":
        found = vectors.read_with(opened, given, **how)
        rows = [{"point": str(p), "held_out_auroc": auroc} for p, (_, auroc) in found.items()]
        print(json.dumps(rows) if json_ else "\n".join(_read_line(method, row) for row in rows))
        return
    assert name is not None
    kept = vectors.fit(opened, given, name=name, **how)
    told = {
        one.name: [
            vectors.diagnose(opened, given, p) for p in one.parts if isinstance(p, Direction)
        ]
        for one in kept
        if diagnose
    }
    if json_:
        facts = [_facts(one) for one in kept]
        for one in facts:
            if diagnose:
                one["diagnoses"] = [found.to_dict() for found in told[one["name"]]]
        print(json.dumps(facts))
        return
    for own in kept:
        print(_line(own))
        for diagnosis in told.get(own.name, ()):
            print(shown(diagnosis, colour=sys.stdout.isatty()))
    print(f'next: saesteer steer {run} --vector {kept[0].name}=1 --prompt "…"')


def _listed(as_json: bool) -> str:
    from saesteer.directions.methods import METHODS

    if as_json:
        return json.dumps(
            [{"name": m.name, "line": m.line, "paper": m.paper} for m in METHODS.values()]
        )
    lines: list[str] = []
    for one in METHODS.values():
        lines += [one.name, *_wrapped(one.line), *_wrapped(one.paper)]
        first = 4 if one.kind == "model" else 2
        own = [
            f"{option.name}={option.default}"
            for option in list(inspect.signature(one.fit).parameters.values())[first:]
            if option.name not in ("seed", "read", "batch_size", "cache")
        ]
        lines += _wrapped(f"--set {' '.join(own)}") if own else []
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 80, initial_indent="    ", subsequent_indent="      ")


def _option(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ConfigError(f"--set {text!r}: expected OPTION=VALUE, such as alpha=15")
    for read in (json.loads, float):
        try:
            return name, read(value)
        except ValueError:
            continue
    return name, value  # a word


def _line(kept: "Kept") -> str:
    """One line about what was kept."""
    first = kept.parts[0]
    many = f"{len(kept.parts)} parts, the first " if len(kept.parts) > 1 else ""
    auroc = first.provenance.get("held_out_auroc")
    reads = "" if auroc is None else f", tells held-out sides apart with AUROC {auroc:.3f}"
    return (
        f"{kept.name}: {first.method} of {first.n_pairs} pairs, {many}at {first.point}, "
        f"{_size(first)}{reads}, in {kept.path}"
    )


def _size(part: "Part") -> str:
    from saesteer.directions.direction import Map

    if isinstance(part, Map):
        return f"a map of {len(part.shift)} dimensions"
    return f"length {float(part.vector.norm()):.4g}"


def _facts(kept: "Kept") -> dict[str, Any]:
    return {
        "name": kept.name,
        "path": str(kept.path),
        "parts": [
            {"point": str(p.point), "method": p.method, "n_pairs": p.n_pairs, "use": vars(p.use)}
            | {"provenance": dict(p.provenance)}
            for p in kept.parts
        ],
    }


def _read_line(method: str, row: dict[str, Any]) -> str:
    auroc = row["held_out_auroc"]
    told = "too few pairs to hold some out" if auroc is None else f"held-out AUROC {auroc:.3f}"
    return f"{method} at {row['point']}: {told}; it reads, and steers nothing"
