"""What `saesteer vector` prints: the list of methods, and what was fitted, made and measured."""

import json
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saesteer.arming import Armed, Margins, options_of, rows
from saesteer.cli.directions_view import counted
from saesteer.cli.lines import number_of, wrapped
from saesteer.cli.vector_options import shown
from saesteer.compare.arms import ARMS
from saesteer.directions.direction import Map, Part
from saesteer.directions.methods import ALIASES, METHODS
from saesteer.named import in_python
from saesteer.steering.edits import Add, Clamp
from saesteer.vectors import Kept

# Characters of a changed prompt that are printed: its beginning and its end.
_BEGINNING, _END = 240, 80
# What stands where the prompt does.
_PROMPT = "PROMPT"
_MORE = (
    "--noise SHARE swaps the sides of so many pairs first (weak supervision), with any row. Rows "
    "are combined in Python by saesteer.compare.combine.combined, finetuning and steering too; "
    "kept directions by saesteer directions RUN --make."
)


def listed(as_json: bool) -> str:
    """Every method and arm, in groups: what it does, its paper, its options."""
    groups = rows()
    if as_json:
        return json.dumps([_entry(name, group) for name, group in groups.items()])
    lines: list[str] = []
    last = ""
    for name, group in groups.items():
        if group != last:
            lines += [""] * bool(lines) + [f"{group}:"]
            last = group
        entry = _entry(name, group)
        lines += [name, *_wrapped(entry["line"]), *_wrapped(entry["paper"])]
        own = " ".join(entry["options"])
        lines += _wrapped(f"--set {own}") if own else []
        lines += _wrapped(f"also called {', '.join(entry['also'])}") if "also" in entry else []
    return "\n".join([*lines, "", *textwrap.wrap(_MORE, 80)])


def _entry(name: str, group: str) -> dict[str, Any]:
    about = METHODS[name] if name in METHODS else ARMS[name]
    own = [shown(option) for option in options_of(name).values()]
    also = [other for other, known in ALIASES.items() if known == name]
    told = {"name": name, "group": group, "line": about.line, "paper": about.paper, "options": own}
    return {**told, "also": also} if also else told


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, 80, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False
    )


def kept_lines(kept: Kept) -> list[str]:
    """What was kept, of what, where it belongs and how well it reads."""
    first = kept.parts[0]
    many = f"{len(kept.parts)} parts, the first " if len(kept.parts) > 1 else ""
    auroc = first.provenance.get("held_out_auroc")
    reads = "" if auroc is None else f", tells held-out sides apart with AUROC {auroc:.3f}"
    return wrapped(
        f"{kept.name}: {first.method} of {counted(first)}, {many}at {first.point}, "
        f"{_size(first)}{reads}, in {kept.path}"
    )


def _size(part: Part) -> str:
    if isinstance(part, Map):
        return f"a map of {len(part.shift)} dimensions"
    return f"length {float(part.vector.norm()):.4g}"


def next_line(run: Path, usable: Sequence[Kept]) -> str:
    """The command that uses one of the directions that this run's model can be steered with: the
    one that tells held-out sides apart best, or the first where that isn't known.

    MELBO's control is fitted on random weights, and a run's model isn't steered with it.
    """
    if not usable:
        return "a control, fitted on random weights: this run's model can't be steered with it"
    best = max(usable, key=lambda kept: kept.parts[0].provenance.get("held_out_auroc") or 0.0)
    return f'next: saesteer steer {shlex.quote(str(run))} --vector {best.name}=1 --prompt "…"'


def kept_facts(kept: Kept) -> dict[str, Any]:
    """The same for programs."""
    return {
        "name": kept.name,
        "path": str(kept.path),
        "parts": [
            {"point": str(p.point), "method": p.method, "n_pairs": p.n_pairs, "use": vars(p.use)}
            | {"provenance": dict(p.provenance)}
            for p in kept.parts
        ],
    }


def read_lines(method: str, row: dict[str, Any]) -> list[str]:
    """How well what only reads does at a point."""
    auroc = row["held_out_auroc"]
    told = "too few pairs to hold some out" if auroc is None else f"held-out AUROC {auroc:.3f}"
    return wrapped(f"{method} at {row['point']}: {told}; it reads, and steers nothing")


def margins_lines(margins: Margins, looks: int = 0) -> list[str]:
    """What something does to held-out margins. looks: settings that it chose among by them."""
    chose = f"; it chose among {looks} settings by these, so this is no test" if looks > 1 else ""
    return wrapped(
        f"margin on {number_of(margins.n, 'held-out pair')}: {margins.without:+.4f} without, "
        f"{margins.under:+.4f} with it (nats a token){chose}"
    )


def margins_facts(margins: Margins) -> dict[str, Any]:
    """The same for programs."""
    return {
        "n_held_out": margins.n,
        "margin_without": margins.without,
        "margin_with": margins.under,
    }


def armed_lines(armed: Armed, name: str | None, run: Path) -> list[str]:
    """What an arm chose, what it does, where it is kept and how it is used."""
    notes = armed.prepared.notes
    features = notes.get("features", [])
    of = f", feature{'s' * (len(features) > 1)} {', '.join(map(str, features))}" if features else ""
    rate = f", learning rate {notes['learning_rate']:g}" if "learning_rate" in notes else ""
    begins = f"{name}: " if armed.path is not None else ""
    pairs = number_of(armed.n_pairs, "pair")
    lines = wrapped(f"{begins}{armed.prepared.arm} of {pairs}{of}{rate}")
    lines += margins_lines(armed.margins, notes.get("validation_looks", 0))
    if armed.path is None:
        text = armed.prepared.prompt_transform(_PROMPT)
        if len(text) > _BEGINNING + _END:
            text = f"{text[:_BEGINNING]} … {text[-_END:]}"
        return [*lines, *wrapped(f"the model is given, kept nowhere: {text!r}")]
    if ARMS[armed.method].makes == "model":
        return [
            *lines,
            *wrapped(f"adapter in {armed.path}"),
            f"next, in Python: {in_python(run, armed.path)}",
        ]
    edits = armed.prepared.edits(1.0)
    # Those of a map have no strength to multiply.
    sweeps = all(isinstance(edit, Add | Clamp) for edit in edits)
    return [
        *lines,
        *(f"  {edit}" for edit in edits[:3]),
        *wrapped(
            f"edits at strength 1 in {armed.path}" + "; --sweep 0,1,2,4 multiplies it" * sweeps
        ),
        f'next: saesteer steer {shlex.quote(str(run))} --load {name} --prompt "…"',
    ]


def armed_facts(armed: Armed, name: str | None) -> dict[str, Any]:
    """The same for programs."""
    facts = {
        "name": name if armed.path is not None else None,
        "method": armed.method,
        "makes": ARMS[armed.method].makes,
        "n_pairs": armed.n_pairs,
        "path": None if armed.path is None else str(armed.path),
        "notes": dict(armed.prepared.notes),
    }
    if ARMS[armed.method].makes == "prompt":
        facts["prompt"] = armed.prepared.prompt_transform(_PROMPT)
    return facts | margins_facts(armed.margins)
