"""Directions for a terminal: the table of those kept, and what each does to generation."""

import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from saesteer.cli.lines import columns, number_of
from saesteer.directions.direction import Direction, Part
from saesteer.effects.generating import SHARE, Doing, Seen
from saesteer.features.view_parts import clean, cut, quoted

WIDTH = 80
_NARROWEST = 6
_HEAD = 17
_COLUMNS = ("name", "method", "of", "at", "length", "use")


def counted(part: Part) -> str:
    """What a part was fitted on: "32 pairs", or "8 prompts" of MELBO, which has no answers; of a
    sum the fewest of each."""
    found: dict[str, int] = {}
    for method, n in _leaves(part.method, part.n_pairs, part.provenance):
        what = "prompt" if method == "melbo" else "pair"
        found[what] = min(n, found.get(what, n))
    return ", ".join(number_of(n, what) for what, n in found.items())


def _leaves(method: str, n: int, provenance: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Method and number of pairs of all that a direction was made of, or its own."""
    made_of = provenance.get("made_of")
    if not made_of:
        yield method, n
    for one in made_of or ():
        yield from _leaves(one["method"], one["n_pairs"], one["provenance"])


def facts(name: str, parts: Sequence[Part], ours: str | None = None) -> dict[str, Any]:
    """What the table says of what is kept under a name; JSON.

    ours: the fingerprint of the run's model, None where it isn't known.
    """
    first = parts[0]
    return {
        "name": name,
        "method": first.method,
        "expression": first.provenance.get("expression"),
        "of": counted(first),
        "points": list(dict.fromkeys(str(part.point) for part in parts)),
        "lengths": [float(p.vector.norm()) if isinstance(p, Direction) else None for p in parts],
        "uses": [vars(part.use) for part in parts],
        "control": bool(first.provenance.get("random_init")),
        "foreign": ours is not None and any(part.model_fingerprint != ours for part in parts),
        "model_fingerprint": first.model_fingerprint,
    }


def foreign(parts: Sequence[Part]) -> str:
    """Why parts of another model can't be shown."""
    if parts[0].provenance.get("random_init"):
        return "a control, fitted on random weights: it steers nothing"
    return f"fitted on another model (fingerprint {parts[0].model_fingerprint})"


def melbo(kept: Mapping[str, Sequence[Part]]) -> dict[str, dict[str, Any]]:
    """Of each direction of MELBO: its effect, that of random ones of the same R, their ratio, and
    the same ratio of the controls on random weights that are kept for its place and target."""
    found = {
        name: parts[0]
        for name, parts in kept.items()
        if parts[0].method == "melbo" and "random_effect" in parts[0].provenance
    }

    def ratio(part: Part) -> float:
        return float(part.provenance["effect"]) / float(part.provenance["random_effect"])

    figures = ("radius", "effect", "random_effect", "random_most", "n_random", "target")
    return {
        name: {figure: part.provenance.get(figure) for figure in figures}
        | {"ratio": ratio(part), "control": bool(part.provenance.get("random_init"))}
        | {
            "ratio_on_random_weights": {
                other: ratio(one)
                for other, one in found.items()
                if one.provenance.get("random_init")
                and not part.provenance.get("random_init")
                and (one.point, one.provenance["target"]) == (part.point, part.provenance["target"])
            }
        }
        for name, part in found.items()
    }


def listed(
    run: str,
    rows: Sequence[Mapping[str, Any]],
    of_melbo: Mapping[str, Mapping[str, Any]],
    others: Mapping[str, str],
) -> str:
    """The table of all, MELBO's figures, and what else lies in the folder."""
    lines = [table(rows)] if rows else [f"{run} keeps no directions yet; saesteer vector fits one"]
    if of_melbo:
        lines += ["", "melbo: effect on a later layer"]
        for name, found in of_melbo.items():
            lines += _wrapped(clean(name), melbo_line(found))
    if others:
        lines += ["", "not listed"]
        lines += [line for name, why in others.items() for line in _wrapped(clean(name), why)]
    return "\n".join(lines)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One row each, over several lines where its cells are too long for the terminal."""
    cells = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = _fitting(cells, columns())
    lines = []
    for row in cells:
        parts = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for line in itertools.zip_longest(*parts, fillvalue=""):
            padded = (part.ljust(width) for part, width in zip(line, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _fitting(cells: Sequence[Sequence[str]], most: int) -> list[int]:
    """The columns' widths: the widest are narrowed, as far as no word is broken if that will do.

    Names are to be typed, and are left whole.
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    words = [
        max(len(word) for cell in column for word in re.split(r"\s+|(?<=-)", cell))
        for column in zip(*cells, strict=True)
    ]
    for least in (words, [_NARROWEST] * len(widths)):
        while sum(widths) + 2 * (len(widths) - 1) > most:
            able = [i for i in range(1, len(widths)) if widths[i] > least[i]]
            if not able:
                break
            widths[max(able, key=lambda i: widths[i])] -= 1
    return widths


def melbo_line(found: Mapping[str, Any]) -> str:
    """Effect against random of the same R, and against the controls."""
    n, most = found["n_random"], found["random_most"]
    drawn = "" if n is None else f" (mean of {n}, at most {most:.3g})"
    line = (
        f"{found['effect']:.3g}, random of the same R {found['random_effect']:.3g}{drawn}: "
        f"{found['ratio']:.2f} ×"
    )
    if found["control"]:
        return f"{line}; a control, on random weights"
    ratios = [f"{ratio:.2f} ×" for ratio in found["ratio_on_random_weights"].values()]
    if ratios:
        return f"{line}; on random weights {', '.join(ratios)}"
    return f"{line}; on random weights not fitted (vector --method melbo --set random_init=true)"


def shown(
    found: Seen,
    kept: Mapping[str, Sequence[Part]],
    of_melbo: Mapping[str, Mapping[str, Any]],
    foreign: Mapping[str, str],
) -> str:
    """What each does, within 80 columns."""
    text = "held-out text of the run" if found.own_text else "text that the model wrote unsteered"
    about = (
        f"KL(p_0‖p_α){' and ΔCE' if found.own_text else ''} in nats a token, on "
        f"{found.n_tokens:,} tokens of {text}; distinct-2 and repetition of "
        f"{len(found.prompts)} continuations, without in brackets; the largest KL at equal length "
        f"comes first"
    )
    lines = [*textwrap.wrap(about, WIDTH), *_wrapped("prompt", _end(found.prompts[0]))]
    for row in found.rows:
        lines += ["", *_doing(row, found, kept[row.name], of_melbo.get(row.name))]
    for name, why in {**found.failed, **foreign}.items():
        figures = [melbo_line(of_melbo[name])] if name in of_melbo else []
        lines += ["", clean(name), *_wrapped("  not shown", why)]
        lines += [line for one in figures for line in _wrapped("  melbo", one)]
    return "\n".join(lines)


def _doing(
    row: Doing, found: Seen, parts: Sequence[Part], of_melbo: Mapping[str, Any] | None
) -> list[str]:
    first = parts[0]
    what = first.provenance.get("expression") or first.method
    lines = [cut(clean(f"{row.name}: {what} of {counted(first)} at {first.point}"), WIDTH)]
    long = "" if row.length is None else f", length {row.length:.3g}"
    missed = ", since no strength costs the KL asked for" if row.missed else ""
    lines += _wrapped("  strength", f"{row.strength:.3g}{long}{missed}")
    ce = "" if row.delta_ce is None else f", ΔCE {row.delta_ce:+.3f}"
    lines += _wrapped("  cost", f"KL {row.kl:.3f}{ce}")
    if row.chance is not None and row.kl_at_length is not None:
        chance = row.chance
        lines += _wrapped(
            "  at equal length",
            f"KL {row.kl_at_length:.3f} at {SHARE:g} of the layer's norm, length "
            f"{chance.length:.3g}; {chance.n} random ones {chance.mean:.3f}, at most "
            f"{chance.most:.3f}",
        )
    if of_melbo is not None:
        lines += _wrapped("  melbo", melbo_line(of_melbo))
    if row.promotes is not None:
        lines += _wrapped("  promotes", ", ".join(quoted(token) for token, _ in row.promotes))
    plain, own = found.plain, row.written
    lines += _wrapped(
        "  generation",
        f"distinct-2 {_number(own.distinct_2)} ({_number(plain.distinct_2)}), repetition "
        f"{_number(own.repetition)} ({_number(plain.repetition)})",
    )
    lines += _wrapped("  without", clean(plain.texts[0]).strip())
    lines += _wrapped("  with", clean(own.texts[0]).strip())
    return lines


def _end(prompt: str) -> str:
    """The end of a prompt, by which it is known."""
    most = WIDTH - _HEAD - 2
    told = clean(prompt)
    return told if len(told) <= most else f"…{told[1 - most :]}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    points, lengths, uses = row["points"], row["lengths"], row["uses"]
    more = f" (+{len(points) - 1})" if len(points) > 1 else ""
    known = [length for length in lengths if length is not None]
    length = f"{min(known):.4g}" if known else "–"
    if known and max(known) != min(known):
        length += f"–{max(known):.4g}"
    notes = [_use(uses[0])]
    if len(uses) > 1:
        notes.append(f"{len(uses)} parts")
    if row["control"]:
        notes.append("a control")
    elif row["foreign"]:
        notes.append("fitted on another model")
    method = clean(row["expression"] or row["method"])
    return (clean(row["name"]), cut(method, 30), row["of"], points[0] + more, length,
            ", ".join(notes))  # fmt: skip


def _use(use: Mapping[str, Any]) -> str:
    told = f"{use['how']} to {use['to']:.3g}" if use["to"] is not None else str(use["how"])
    if use["position"] is not None:
        return f"{told}, by token of the prompt"
    return told if use["where"] == "all" else f"{told}, {use['where']} tokens"


def _wrapped(head: str, text: str) -> list[str]:
    """Text behind a head, over as many lines as it needs."""
    # A number and its sign stay together.
    rows = textwrap.wrap(text.replace(" ×", "\xa0×"), WIDTH - _HEAD - 2) or [""]
    heads = [head, *[""] * (len(rows) - 1)]
    if len(head) > _HEAD:
        heads, rows = [head, *[""] * len(rows)], ["", *rows]
    return [
        f"{left:<{_HEAD}}  {row}".replace("\xa0", " ").rstrip()
        for left, row in zip(heads, rows, strict=True)
    ]
