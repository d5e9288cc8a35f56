"""A feature as a page that opens offline: one file, nothing fetched, no script."""

from collections.abc import Mapping
from html import escape
from typing import Any

from saesteer import __version__
from saesteer.features import outputs
from saesteer.features.page_parts import STYLE, examples, histogram, table
from saesteer.features.records import Feature, Neighbour, TokenStat
from saesteer.features.view_parts import (
    clean,
    figures,
    label_figures,
    places,
    quoted,
    shown_name,
    tenths,
    times,
)

# What is fetched: nothing. What runs: nothing but, in a gallery, its own search.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_TOKENS, _OF_EACH_TENTH = 10, 5
SHADED = '<p class="soft">Shaded: how strongly it fires on a token; point at one for its value.</p>'


def page(
    record: Feature,
    *,
    beside: Mapping[int, str] | None = None,
    about: Mapping[str, str] | None = None,
    measured_with: Mapping[str, Any] | None = None,
) -> str:
    """The whole document of one feature; what was not measured isn't shown.

    Everything that comes from a model, a text or the user is escaped.

    Args:
        beside: labels of its neighbours, by number (those of `view.others`).
        about: what the index was made of, name → value, said at the foot.
        measured_with: the settings of its effects (see `outputs`).
    """
    labels = beside or {}
    sections = [head(record)]
    if measured_with is not None and (record.output_score, record.own_effect) != (None, None):
        how = escape(clean(outputs.told(measured_with)))
        sections.append(f'<p class="soft">Output score and own effect measured {how}.</p>')
    sections.append(_sides(record))
    if record.n_fired:
        sections += [_shape(record), _examples(record)]
    sections.append(
        '<div class="sides wide">'
        + _others("Nearest decoder rows", "cosine", record.neighbours, labels)
        + _others("Fire on the same tokens", "times chance", record.coactive, labels)
        + "</div>"
    )
    sections.append(foot(about or {}))
    return document(f"Feature {record.id}: {clean(shown_name(record))}", "\n".join(sections))


def document(title: str, body: str, *, script: str = "") -> str:
    """A page: `title` is text, `body` and `script` are written as they are."""
    policy = _POLICY + ("; script-src 'unsafe-inline'" if script else "")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n{f'<script>{script}</script>' if script else ''}</body>\n</html>\n"
    )


def head(record: Feature, *, level: int = 1) -> str:
    """Name, label, tags, remark and figures of a feature."""
    note = record.note
    star = '<span title="starred">★</span> ' if note and note.starred else ""
    name = escape(clean(shown_name(record)))
    parts = [f'<h{level}>{star}<span class="soft">{record.id}</span> {name}</h{level}>']
    if note and note.name:
        parts.append(
            f'<p class="soft">Named by you; its label is {escape(clean(record.label))}.</p>'
        )
    if note and note.tags:
        tags = " ".join(f'<span class="tag">{escape(clean(tag))}</span>' for tag in note.tags)
        parts.append(f"<p>{tags}</p>")
    if note and note.text:
        parts.append(f'<p class="remark">{escape(note.text)}</p>')
    told = [label_figures(record), *(f"{name} {value}" for name, value in figures(record))]
    parts.append(f'<p class="figures">{" · ".join(map(escape, told))}</p>')
    return "\n".join(parts)


def foot(about: Mapping[str, str]) -> str:
    """What something was made of, and by which version."""
    given = {**about, "written by": f"saesteer {__version__}"}
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(clean(v))}</dd>" for k, v in given.items())
    return f"<footer><dl>{rows}</dl></footer>"


def _sides(record: Feature) -> str:
    """What it fires on, what follows, what it promotes and suppresses: side by side."""
    parts = []
    if record.tokens:
        rows = [_token_row(t) for t in record.tokens[:_TOKENS]]
        parts.append(_side("Fires on", table(["token", "share", "lift"], rows)))
    elif record.words:
        rows = [[w.text, f"{w.share:.1%}", f"{w.lift:.1f}"] for w in record.words[:_TOKENS]]
        parts.append(_side("Fires on", table(["word", "share", "lift"], rows)))
    if record.next_tokens:
        rows = [_token_row(t) for t in record.next_tokens]
        parts.append(_side("Followed by", table(["token", "share", "lift"], rows)))
    for title, logits in (("Promotes", record.promotes), ("Suppresses", record.suppresses)):
        if logits:
            rows = [[quoted(text), f"{value:.3g}"] for text, value in logits]
            parts.append(_side(title, table(["token", "logit"], rows)))
    return f'<div class="sides">{"".join(parts)}</div>'


def _token_row(token: TokenStat) -> list[str]:
    return [quoted(token.text), f"{token.share:.1%}", f"{token.lift:.1f}"]


def _side(title: str, inside: str) -> str:
    return f'<section class="side"><h2>{title}</h2>\n{inside}</section>\n'


def _shape(record: Feature) -> str:
    parts = []
    if record.activations is not None:
        parts.append(_side("Activations", histogram(record.activations, "activations")))
    if record.logits is not None:
        parts.append(_side("Logits", histogram(record.logits, "logits of all tokens")))
    at = places(record.positions)
    if at:
        rows = [[name, f"{times(ratio)}×"] for name, ratio in at]
        parts.append(_side("Place in the context", table(["token", "as often as anywhere"], rows)))
    return f'<div class="sides">{"".join(parts)}</div>'


def _examples(record: Feature) -> str:
    strongest = [x for x in record.examples if x.group == "top"]
    drawn = tenths(record.examples, _OF_EACH_TENTH)
    parts = [SHADED] if strongest or drawn else []
    if strongest:
        parts.append(f"<h2>Strongest examples</h2>\n{examples(strongest, record.max_act)}")
    if drawn:
        parts.append(
            "<h2>Examples from each tenth of its activations</h2>\n"
            '<p class="soft">Drawn at random from all tokens on which it fires, the highest tenth '
            f"first.</p>\n{examples(drawn, record.max_act)}"
        )
    return "\n".join(parts)


def _others(title: str, unit: str, near: tuple[Neighbour, ...], labels: Mapping[int, str]) -> str:
    if not near:
        return ""
    rows = [
        [str(other.feature), clean(labels.get(other.feature, "")), f"{other.value:.3g}"]
        for other in near
    ]
    return _side(title, table(["feature", "label", unit], rows, words=2))
