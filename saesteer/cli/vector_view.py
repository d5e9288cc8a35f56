"""What `saesteer vector` prints: the list of methods, and what was fitted, made and measured."""

import json
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saesteer.arming import Armed, Margins, options_of, rows
from saesteer.cli.directions_view import counted
from saesteer.cli.vector_options import shown
from saesteer.compare.arms import ARMS
from saesteer.directions.direction import Map, Part
from saesteer.directions.methods import METHODS
from saesteer.steering.edits import Add, Clamp
from saesteer.vectors import Kept

# Characters of a changed prompt that are printed: its beginning and its end.
_BEGINNING, _END = 240, 80
# What stands where the prompt does.
_PROMPT = "PROMPT"


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
    return "\n".join(lines)


def _entry(name: str, group: str) -> dict[str, Any]:
    about = METHODS[name] if name in METHODS else ARMS[name]
    own = [shown(option) for option in options_of(name).values()]
    return {"name": name, "group": group, "line": about.line, "paper": about.paper, "options": own}


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, 80, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False
    )


def kept_line(kept: Kept) -> str:
    """One line about a direction that was kept."""
    first = kept.parts[0]
    many = f"{len(kept.parts)} parts, the first " if len(kept.parts) > 1 else ""
    auroc = first.provenance.get("held_out_auroc")
    reads = "" if auroc is None else f", tells held-out sides apart with AUROC {auroc:.3f}"
    return (
        f"{kept.name}: {first.method} of {counted(first)}, {many}at {first.point}, "
        f"{_size(first)}{reads}, in {kept.path}"
    )


def _size(part: Part) -> str:
    if isinstance(part, Map):
        return f"a map of {len(part.shift)} dimensions"
    return f"length {float(part.vector.norm()):.4g}"


def next_line(run: Path, names: Sequence[str]) -> str:
    """The command that uses the first of the directions that this run's model can be steered with.

    MELBO's control is fitted on random weights, and a run's model isn't steered with it.
    """
    if not names:
        return "a control, fitted on random weights: this run's model can't be steered with it"
    return f'next: saesteer steer {shlex.quote(str(run))} --vector {names[0]}=1 --prompt "…"'


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


def read_line(method: str, row: dict[str, Any]) -> str:
    """One line about what only reads."""
    auroc = row["held_out_auroc"]
    told = "too few pairs to hold some out" if auroc is None else f"held-out AUROC {auroc:.3f}"
    return f"{method} at {row['point']}: {told}; it reads, and steers nothing"


def margins_line(margins: Margins, looks: int = 0) -> str:
    """What something does to held-out margins. looks: settings that it chose among by them."""
    chose = f"; it chose among {looks} settings by these, so this is no test" if looks > 1 else ""
    return (
        f"margin on {margins.n} held-out pairs: {margins.without:+.4f} without, "
        f"{margins.under:+.4f} with it (nats a token){chose}"
    )


def margins_facts(margins: Margins) -> dict[str, Any]:
    """The same for programs."""
    return {
        "n_held_out": margins.n,
        "margin_without": margins.without,
        "margin_with": margins.under,
    }


def armed_lines(armed: Armed, name: str | None, run: Path) -> Sequence[str]:
    """What an arm chose, what it does, where it is kept and how it is used."""
    notes = armed.prepared.notes
    features = notes.get("features", [])
    of = f", feature{'s' * (len(features) > 1)} {', '.join(map(str, features))}" if features else ""
    rate = f", learning rate {notes['learning_rate']:g}" if "learning_rate" in notes else ""
    begins = f"{name}: " if armed.path is not None else ""
    lines = [f"{begins}{armed.prepared.arm} of {armed.n_pairs} pairs{of}{rate}"]
    lines.append(margins_line(armed.margins, notes.get("validation_looks", 0)))
    if armed.path is None:
        text = armed.prepared.prompt_transform(_PROMPT)
        if len(text) > _BEGINNING + _END:
            text = f"{text[:_BEGINNING]} … {text[-_END:]}"
        return [*lines, f"the model is given, kept nowhere: {text!r}"]
    if ARMS[armed.method].makes == "model":
        load = f'peft.PeftModel.from_pretrained(saesteer.Run.open("{run}").model, "{armed.path}")'
        return [*lines, f"adapter in {armed.path}", f"next, in Python: {load}"]
    edits = armed.prepared.edits(1.0)
    # Those of a map have no strength to multiply.
    sweeps = all(isinstance(edit, Add | Clamp) for edit in edits)
    return [
        *lines,
        *(f"  {edit}" for edit in edits[:3]),
        f"edits at strength 1 in {armed.path}" + "; --sweep 0,1,2,4 multiplies it" * sweeps,
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
