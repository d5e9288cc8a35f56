"""Parts of the report's page: the document and its style, figures with captions, tables."""

from collections.abc import Sequence
from html import escape

from saesteer.compare.report_plots import key
from saesteer.features.page_parts import STYLE

# What is fetched: nothing. What runs: nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
# Dark colours are for screens only; what is folded is printed unfolded.
_STYLE = """
:root { --c0: #0b4f8a; --c1: #c2601a; --c2: #2f7d50; --c3: #8a3b78; --c4: #6b6b6b; --c5: #8a7400; }
@media screen and (prefers-color-scheme: dark) { :root { --c0: #6db3f2; --c1: #f0a160;
  --c2: #7fd0a0; --c3: #d993c8; --c4: #b0b0b0; --c5: #d8c24a; } }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-top: 1px solid var(--line);
  padding-top: 1rem; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
h4 { font-size: .95rem; margin: 1rem 0 .25rem; overflow-wrap: anywhere; }
nav a { margin-right: .9rem; white-space: nowrap; }
.verdict { background: var(--card); border-left: .3rem solid var(--c0); padding: .75rem 1rem;
  margin: 1rem 0; }
.verdict h3 { margin-top: 0; }
.said { font-size: 1.1rem; margin: .5rem 0; } .limits { margin: .5rem 0; }
ul { margin: .25rem 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
.verdict .scroll { margin: .5rem 0; }
ul.told { font-size: .95rem; }
.plots { display: grid; gap: 1.5rem 2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
figure { margin: .5rem 0; min-width: 0; max-width: 40rem; }
figure h3, figure h4, .limits h3 { margin: 0 0 .25rem; }
figcaption { font-size: .9rem; color: var(--soft); overflow-wrap: anywhere; }
svg { height: auto; fill: none; }
svg text { fill: var(--soft); font-size: 13px; stroke: var(--back); stroke-width: 3px;
  paint-order: stroke; }
svg text.axis, svg text.note { fill: var(--ink); }
.rule { stroke: var(--soft); } .dashed { stroke-dasharray: 3 3; } .grid { stroke: var(--line); }
.line { stroke-width: 2; } .thin { stroke-width: 1.3; } .band { opacity: .14; }
.above { fill: var(--c0); } .below { stroke: var(--c1); fill: var(--c1); fill-opacity: .25; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); }
.s3 { stroke: var(--c3); } .s4 { stroke: var(--c4); } .s5 { stroke: var(--c5); }
.f0 { fill: var(--c0); } .f1 { fill: var(--c1); } .f2 { fill: var(--c2); }
.f3 { fill: var(--c3); } .f4 { fill: var(--c4); } .f5 { fill: var(--c5); }
.hollow { fill: var(--back); stroke-width: 2; } path.s5.mark { stroke-width: 2; fill: none; }
.key { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; font-size: .9rem; }
.key span { display: inline-flex; align-items: center; gap: .4rem; }
.key svg { width: 2.5rem; flex: none; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll table { width: auto; min-width: min(100%, 30rem); }
td, th { white-space: nowrap; }
.scroll .word { white-space: nowrap; }
.scroll td:first-child, .scroll th:first-child { position: sticky; left: 0;
  background: var(--back); min-width: 7.5rem; max-width: 11rem; white-space: normal;
  overflow-wrap: break-word; }
.verdict td:first-child, .verdict th:first-child { background: var(--card); min-width: 5.5rem; }
.side { margin: .75rem 0; } .side p { margin: .5rem 0; white-space: pre-wrap; }
.side b { color: var(--soft); font-weight: 600; font-size: .85rem; }
@media (max-width: 30rem) { svg text { font-size: 15.5px; } }
summary { cursor: pointer; padding: .25rem 0; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; padding: .75rem 1rem; font-size: .85rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
@media print { :root { --line: #bbb; --soft: #444; --card: #fff; --back: #fff; --ink: #000; }
  body { max-width: none; font-size: .8rem; } nav { display: none; }
  figure, .side, tr { break-inside: avoid; } .scroll { overflow: visible; }
  .plots { grid-template-columns: 1fr 1fr; gap: 1rem; }
  details::details-content { content-visibility: visible; height: auto; } }
"""


def document(title: str, body: str) -> str:
    """A page: `title` is text, `body` is written as it is."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def figure(
    title: str,
    svg: str,
    caption: str,
    names: Sequence[tuple[str, int]] = (),
    level: int = 4,
    *,
    solid: bool = False,
) -> str:
    """A plot with its legend (name, style) and caption; "" where there is no plot.

    solid: the plot's lines aren't dashed.
    """
    if not svg:
        return ""
    keys = "".join(f"<span>{key(style, solid=solid)}{escape(name)}</span>" for name, style in names)
    legend = f'<div class="key">{keys}</div>\n' if keys else ""
    return (
        f"<figure>\n<h{level}>{escape(title)}</h{level}>\n{svg}\n{legend}"
        f"<figcaption>{escape(caption)}</figcaption>\n</figure>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A table that scrolls in its own box; the first `words` columns stand to the left."""
    head = "".join(f"<th{_kind(i, words)}>{escape(cell)}</th>" for i, cell in enumerate(header))
    body = "".join(
        "<tr>"
        + "".join(f"<td{_kind(i, words)}>{escape(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}</table></div>\n'


def folded(summary: str, inside: str) -> str:
    """What is shown on demand. `inside` is written as it is."""
    return f"<details><summary>{escape(summary)}</summary>\n{inside}</details>\n" if inside else ""


def soft(text: str) -> str:
    """A remark."""
    return f'<p class="soft">{escape(text)}</p>\n' if text else ""


def items(lines: Sequence[str]) -> str:
    """A list of sentences."""
    return f'<ul class="told">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>\n'


def _kind(column: int, words: int) -> str:
    return ' class="word"' if column < words else ""
