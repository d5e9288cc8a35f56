"""A browsable gallery of features: a folder of pages that open offline, and a search box.

`index.html` holds the name of every feature and a few lines of script that search them; features
stand on pages of up to 500. Nothing is fetched. For the full page of one feature see `page`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from saesteer.core.files import written_aside
from saesteer.features.page import SHADED, document, foot, head
from saesteer.features.page_parts import examples
from saesteer.features.records import Feature
from saesteer.features.view_parts import clean, percent, quoted, shown_name

A_PAGE = 500
# Of each feature: examples, promoted tokens, and words that the search box finds it by.
_EXAMPLES, _TOKENS, _WORDS = 5, 10, 12
# Lines [number, name, words, density] of all features that fire; all words of the query must occur,
# and those in whose name they do come first.
_SEARCH = """
const list = [FEATURES];
const box = document.getElementById("query"), found = document.getElementById("found");
const PAGE = A_PAGE, MOST = 200;
const folded = list.map(f => (f[0] + " " + f[1] + " " + f[2]).toLowerCase());
function show() {
  const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
  const named = [], others = [];
  for (let i = 0; i < list.length; i++)
    if (words.every(w => folded[i].includes(w)))
      (words.every(w => list[i][1].toLowerCase().includes(w)) ? named : others).push(list[i]);
  const hits = named.concat(others), n = hits.length;
  found.replaceChildren(...hits.slice(0, MOST).map(f => {
    const item = document.createElement("li"), number = document.createElement("b"),
      text = document.createElement("span"), link = document.createElement("a"),
      about = document.createElement("span");
    number.textContent = f[0];
    link.href = "page-" + Math.floor(f[0] / PAGE) + ".html#f" + f[0];
    link.textContent = f[1];
    about.className = "soft";
    about.textContent = "  " + f[3];
    text.append(link, about);
    item.append(number, text);
    return item;
  }));
  document.getElementById("count").textContent =
    n + (n === 1 ? " feature" : " features") + (n > MOST ? ", the first " + MOST + " shown" : "");
}
box.addEventListener("input", show);
show();
"""


def write(folder: Path, features: Iterable[Feature], about: Mapping[str, str]) -> int:
    """Write a gallery, and say how many features it holds.

    Features are read once and one page is held at a time; the list in `index.html` takes some 100
    bytes a feature. Pages of an earlier gallery in `folder` are replaced; its other files stay.

    Args:
        features: by ascending number (`index.feature(i)` of each).
        about: what the index was made of, name → value.

    Raises:
        RunError: the folder can't be written.
    """
    lines: list[str] = []
    pages: list[int] = []
    total = 0
    before: list[Feature] = []
    for number, group in groupby(features, lambda record: record.id // A_PAGE):
        # A page links to the next, so that it is written when there is one.
        _put_page(folder, before, pages, number, about)
        before = list(group)
        pages.append(number)
        total += len(before)
        lines += (_line(record) for record in before if record.n_fired)
    _put_page(folder, before, pages, None, about)
    _put(folder / "index.html", _front(lines, pages, total, about))
    for old in folder.glob("page-*.html"):
        if old.stem[5:].isdecimal() and int(old.stem[5:]) not in pages:
            old.unlink()
    return total


def _front(lines: list[str], pages: list[int], total: int, about: Mapping[str, str]) -> str:
    script = _SEARCH.replace("A_PAGE", str(A_PAGE)).replace("FEATURES", ",\n".join(lines))
    dead = total - len(lines)
    never = f", of which {dead:,} never fired" if dead else ""
    body = [
        "<h1>Features</h1>",
        f'<p class="soft">{total:,} features{never}.</p>',
        '<p><label>Find by name, word or number <input id="query" type="search" autofocus></label>'
        ' <span id="count" class="soft"></span></p>',
        '<ol id="found"></ol>',
        f"<h2>All pages</h2>\n<p>{' '.join(map(_link, pages))}</p>",
        foot(about),
    ]
    return document("Features", "\n".join(body), script=script)


def _put_page(
    folder: Path,
    records: Sequence[Feature],
    pages: Sequence[int],
    after: int | None,
    about: Mapping[str, str],
) -> None:
    if not records:
        return
    around = [*pages[-2:-1], *([] if after is None else [after])]
    links = " · ".join(['<a href="index.html">all features</a>', *map(_link, around)])
    title = f"Features {records[0].id} to {records[-1].id}"
    body = [f"<nav>{links}</nav>", f"<h1>{title}</h1>", SHADED]
    body += map(_card, records)
    body += [f"<nav>{links}</nav>", foot(about)]
    _put(folder / f"page-{pages[-1]}.html", document(title, "\n".join(body)))


def _card(record: Feature) -> str:
    parts = [head(record, level=2)]
    if record.promotes:
        promoted = "  ".join(quoted(text) for text, _ in record.promotes[:_TOKENS])
        parts.append(f'<p class="soft">promotes {escape(promoted)}</p>')
    strongest = [example for example in record.examples if example.group == "top"][:_EXAMPLES]
    if strongest:
        parts.append(examples(strongest, record.max_act))
    return f'<section id="f{record.id}">{"".join(parts)}</section>'


def _line(record: Feature) -> str:
    """A line of the list that is searched: JSON that can stand within a script element."""
    words = " ".join(clean(word.text) for word in record.words[:_WORDS])
    line = [record.id, clean(shown_name(record)), words, percent(record.density)]
    return json.dumps(line).replace("<", "\\u003c")


def _link(number: int) -> str:
    return f'<a href="page-{number}.html">{number * A_PAGE}–{(number + 1) * A_PAGE - 1}</a>'


def _put(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="replace")
