"""Parts of pages about features: the style, examples with shaded tokens, histograms, tables."""

from collections.abc import Sequence
from html import escape

from saesteer.features.records import Example, Histogram
from saesteer.features.view_parts import clean, trimmed

# Cards go under one another where the window is a phone's; wide tables scroll in their own box.
STYLE = """
:root { color-scheme: light dark; --line: #d6d3d1; --soft: #57534e; --card: #fafaf9;
  --back: #fff; --ink: #1c1917; --mark: 234,88,12; }
@media (prefers-color-scheme: dark) { :root { --line: #44403c; --soft: #a8a29e; --card: #292524;
  --back: #1c1917; --ink: #f5f5f4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--back); color: var(--ink);
  font: 1rem/1.6 system-ui, sans-serif; }
h1 { font-size: 1.4rem; line-height: 1.3; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
.side h2 { font-size: 1rem; margin: 0 0 .25rem; }
.soft, dt, th, .figures { color: var(--soft); }
.soft, .figures, dl { font-size: .9rem; }
p { margin: .25rem 0; overflow-wrap: anywhere; }
.remark { white-space: pre-wrap; border-left: 3px solid var(--line); padding-left: .75rem; }
.tag { border: 1px solid var(--line); border-radius: 1rem; padding: 0 .6rem; font-size: .85rem; }
.sides { display: grid; gap: 1rem; margin-top: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr)); }
.sides.wide { grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.side { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .75rem 1rem; min-width: 0; overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums;
  width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .15rem .75rem .15rem 0; text-align: right;
  vertical-align: top; }
th { font-weight: 600; }
td:last-child, th:last-child { padding-right: 0; }
.word { text-align: left; overflow-wrap: anywhere; white-space: pre-wrap; }
ol { list-style: none; margin: 0; padding: 0; }
ol li { display: grid; grid-template-columns: 3.5rem minmax(0, 1fr); gap: .75rem;
  border-bottom: 1px solid var(--line); padding: .2rem 0; }
li b { font-weight: 400; color: var(--soft); font-size: .85rem; text-align: right;
  font-variant-numeric: tabular-nums; line-height: 1.9; }
li span { white-space: pre-wrap; overflow-wrap: anywhere; }
mark { color: inherit; border-radius: .2rem; background: rgba(var(--mark), var(--a)); }
mark.on { font-weight: 600; text-decoration: underline; text-underline-offset: .2em; }
svg { display: block; width: 100%; height: 5rem; fill: rgb(var(--mark)); }
.ends { display: flex; justify-content: space-between; font-size: .85rem; color: var(--soft); }
a { color: inherit; }
input { font: inherit; }
nav { margin: 1rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
footer { margin-top: 2rem; border-top: 1px solid var(--line); padding-top: .5rem; }
"""
# The shade of a token that fires as strongly as the feature ever does; text stays readable on it.
_DARKEST, _LIGHTEST = 0.7, 0.08


def examples(chosen: Sequence[Example], top: float) -> str:
    """A list of examples, tokens shaded by their activation against `top`, the darkest."""
    rows = (
        f"<li><b>{example.value:.3g}</b><span>{text(example, top)}</span></li>\n"
        for example in chosen
    )
    return f"<ol>\n{''.join(rows)}</ol>"


def text(example: Example, top: float) -> str:
    """An example, each token that fires shaded, with its activation as its title."""
    shown = ""
    for i, (piece, value) in enumerate(zip(example.pieces, example.activations, strict=True)):
        piece = clean(piece)
        if value <= 0 and i != example.firing:
            shown += escape(piece)
            continue
        bare = piece.lstrip() or piece
        share = min(1.0, max(0.0, value / top)) if top > 0 else 0.0
        shade = _LIGHTEST + (_DARKEST - _LIGHTEST) * share
        on = ' class="on"' if i == example.firing else ""
        shown += (
            f"{piece[: len(piece) - len(bare)]}<mark{on} "
            f'style="--a:{shade:.2f}" title="{value:.3g}">{escape(bare)}</mark>'
        )
    return shown.strip()


def histogram(given: Histogram, name: str) -> str:
    """Bars of a histogram, as high as the root of their counts; each bar's title tells it."""
    shown = trimmed(given)
    highest = max(1, *shown.counts) ** 0.5
    n = len(shown.counts)
    bars = ""
    for i, count in enumerate(shown.counts):
        if count:
            height = max(1.0, 100 * count**0.5 / highest)
            low, high = shown.edges[i], shown.edges[i + 1]
            bars += (
                f'<rect x="{i + 0.05:.2f}" y="{100 - height:.1f}" width=".9" '
                f'height="{height:.1f}"><title>{low:.3g} to {high:.3g}: {count:,}</title></rect>'
            )
    return (
        f'<svg viewBox="0 0 {n} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(name)}, from {shown.edges[0]:.3g} to {shown.edges[-1]:.3g}">{bars}'
        f'</svg>\n<div class="ends"><span>{shown.edges[0]:.3g}</span>'
        f"<span>bars: root of the count</span><span>{shown.edges[-1]:.3g}</span></div>"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A table of text; the first `words` columns stand to the left, figures to the right."""
    head = "".join(f"<th{_kind(i, words)}>{escape(cell)}</th>" for i, cell in enumerate(header))
    body = "".join(
        "<tr>"
        + "".join(f"<td{_kind(i, words)}>{escape(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>\n"
        for row in rows
    )
    return f"<table>\n<tr>{head}</tr>\n{body}</table>"


def _kind(column: int, words: int) -> str:
    return ' class="word"' if column < words else ""
