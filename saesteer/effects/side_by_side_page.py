"""A page of texts beside one another that opens offline: one file, nothing fetched, no script."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from saesteer import __version__
from saesteer.effects.side_by_side import Comparison, Side
from saesteer.steering import show
from saesteer.steering.receipt import Receipt

# Texts go under one another where the window is a phone's; wide tables scroll in their own box.
_STYLE = """
:root { color-scheme: light dark; --line: #d6d3d1; --soft: #57534e; --card: #fafaf9;
  --back: #fff; --ink: #1c1917; }
@media (prefers-color-scheme: dark) { :root { --line: #44403c; --soft: #a8a29e; --card: #292524;
  --back: #1c1917; --ink: #f5f5f4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--back); color: var(--ink);
  font: 1rem/1.6 system-ui, sans-serif; }
h1 { font-size: 1.4rem; line-height: 1.3; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; }
dt, .soft { color: var(--soft); font-size: .9rem; }
dd { margin: 0; font-size: .9rem; overflow-wrap: anywhere; white-space: pre-line; }
.sides { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.side { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .75rem 1rem; min-width: 0; }
.side p { margin: .5rem 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem .25rem 0; text-align: right;
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
details { margin-top: 1rem; }
summary { cursor: pointer; }
"""
_Group = tuple[Sequence[tuple[str, Comparison]], Receipt]


def page(groups: Sequence[_Group], tokenizer: Any, *, title: str, facts: Mapping[str, str]) -> str:
    """The whole document.

    groups: comparisons, each with its prompt as it was given, and the receipt of all in the group.
    facts: what it was made with, name → value. Everything that comes from a model, a tokenizer or
    the user is escaped.
    """
    parts = [_head(title, facts)]
    readings = {one.reading for group, _ in groups for _, one in group if one.reading}
    parts.append(_legend(sorted(readings)))
    for group, receipt in groups:
        for prompt, one in group:
            heading = f"{show.clean(prompt) or 'no prompt'}"
            parts.append(f'<h2>{escape(heading)} <span class="soft">seed {one.seed}</span></h2>')
            if len(one.sides) > 2:
                parts.append(_sweep(one))
            sides = "".join(_side(side, one, tokenizer) for side in one.sides)
            parts.append(f'<div class="sides">{sides}</div>')
        parts.append(_receipt(receipt))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _head(title: str, facts: Mapping[str, str]) -> str:
    given = {**facts, "written by": f"saesteer {__version__}"}
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in given.items())
    return f"<h1>Steered with {escape(title)}</h1>\n<dl>{rows}</dl>"


def _legend(readings: Sequence[str]) -> str:
    marked = '<span style="border-bottom:2px solid #c2410c">Underlined</span>: steered tokens.'
    if not readings:
        return f'<p class="soft">{marked}</p>'
    shade = '<span style="background:rgba(234,88,12,.5)">Shaded</span>'
    return (
        f'<p class="soft">{marked} {shade}: {escape(", ".join(readings))}, as the unsteered model '
        "reads the text; the strongest shade is the highest of the texts beside one another.</p>"
    )


def _side(side: Side, one: Comparison, tokenizer: Any) -> str:
    found = side.measures
    told = [f"CE {number(found.ce)} nats", f"distinct-2 {number(found.distinct_2)}"]
    if one.reading:
        told.append(f"{one.reading} {number(found.activation)}")
    figures = f"{found.n_tokens} generated tokens, read unsteered: {', '.join(told)}"
    text = show.html(side.trace, tokenizer, top=one.top)
    name = escape(_name(side, len(one.sides) > 2))
    return (
        f'<section class="side"><h3>{name}</h3>\n<span class="soft">{escape(figures)}</span>\n'
        f"{text}</section>\n"
    )


def _sweep(one: Comparison) -> str:
    header = ["strength", "CE", "distinct-2", *([one.reading] if one.reading else []), "tokens"]
    rows = []
    for side in one.sides:
        found = side.measures
        cells = [_name(side, True), number(found.ce), number(found.distinct_2)]
        cells += [number(found.activation)] if one.reading else []
        rows.append([*cells, str(found.n_tokens)])
    return f"{_table(header, rows)}\n<p></p>"


def _receipt(receipt: Receipt) -> str:
    header = ["edit", "for", "edited", "changed", "before", "after", "‖Δ‖/‖x‖"]
    rows = [
        [
            edit.edit,
            *map(str, (edit.n_eligible, edit.n_edited, edit.n_changed)),
            *map(number, (edit.before_mean, edit.after_mean, edit.relative_size)),
        ]
        for edit in receipt.edits
    ]
    about = (
        "Tokens that each edit was for, edited and changed; mean activation before and after; "
        "mean size of the change."
    )
    return (
        f"<details open><summary>Receipt</summary>\n{_table(header, rows)}\n"
        f'<p class="soft">{about}</p></details>'
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}</table></div>'


def _name(side: Side, swept: bool) -> str:
    if side.strength is None:
        return "baseline"
    return f"{side.strength:g}×" if swept else "steered"


def number(value: float | None) -> str:
    """Three decimals; a dash for what could not be measured."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"
