"""A `Diagnosis` for a terminal, within 80 columns."""

import textwrap
from collections.abc import Sequence

from saesteer.directions.pairs import FEWEST
from saesteer.effects.decompose import CAVEAT, Decomposition, Nearest, Pursuit
from saesteer.effects.diagnose import Contexts, Diagnosis, Side
from saesteer.effects.diagnose_pairs import Halves, PairFigures, Spread
from saesteer.features.view_parts import clean, cut, highlighted, percent, quoted

WIDTH = 80
_HEAD = 22
# Residuals are shown after so many features of a decomposition.
_STEPS = (1, 2, 4, 8, 16, 32, 64, 128)


def shown(diagnosis: Diagnosis, *, examples: int = 3, colour: bool = False) -> str:
    """Everything a diagnosis found, at most 80 columns wide.

    examples: contexts shown on either side.
    """
    pairs = diagnosis.pairs
    lines = [
        cut(f"{diagnosis.method} at {diagnosis.point}, {pairs.n_pairs} pairs", WIDTH),
        cut(f"read on {clean(diagnosis.read)}", WIDTH),
        "",
        *_pair_lines(pairs, diagnosis.layer_norm),
    ]
    if diagnosis.tokens is not None:
        named = (
            ("promotes", diagnosis.tokens.promotes),
            ("suppresses", diagnosis.tokens.suppresses),
        )
        lines += ["", "by the logit lens"]
        for name, tokens in named:
            lines += _wrapped(name, [f"{quoted(text)} {logit:+.2g}" for text, logit in tokens])
    if diagnosis.features is not None:
        lines += ["", *_feature_lines(diagnosis.features)]
    if diagnosis.contexts is not None:
        lines += ["", *_context_lines(diagnosis.contexts, examples, colour)]
    return "\n".join(line.rstrip() for line in lines)


def _pair_lines(pairs: PairFigures, layer_norm: float | None) -> list[str]:
    cosine = "–" if pairs.mean_cosine is None else f"{pairs.mean_cosine:.3f}"
    equal = f" ({pairs.n_equal} with equal sides left out)" if pairs.n_equal else ""
    apart = pairs.separability
    d_prime = "" if apart.d_prime is None else f", d′ {apart.d_prime:.2f}"
    lines = [
        _line("cosine among pairs", f"{cosine}, mean over couples of differences{equal}"),
        _line("separability", f"AUROC {apart.auroc:.3f}{d_prime}, on the pairs it was fitted on"),
    ]
    if pairs.halves is None:
        lines.append(_line("split halves", "not measured: needs a method of pairs, and 4 prompts"))
    else:
        lines += _half_lines(pairs.halves)
    if layer_norm is not None:
        lines.append(
            _line(
                "‖v‖", f"{pairs.norm:.3g}, {pairs.norm / layer_norm:.1%} of the layer's mean norm"
            )
        )
    else:
        share = f"{pairs.norm / pairs.read_norm:.1%}" if pairs.read_norm else "–"
        lines.append(_line("‖v‖", f"{pairs.norm:.3g}, {share} of the mean norm read on the pairs"))
    if pairs.growth:
        told = [f"{n}: {one.mean:.2f}" for n, one in pairs.growth]
        lines += _wrapped("cos(v_n, v) by n", told)
    if pairs.n_pairs < FEWEST:
        lines.append(
            _line("few pairs", f"under {FEWEST} a direction is mostly noise; 128 are a good number")
        )
    return lines


def _half_lines(halves: Halves) -> list[str]:
    d_prime = "" if halves.d_prime is None else f", d′ {halves.d_prime.mean:.2f}"
    return [
        _line("  on the other half", f"AUROC {_spread(halves.auroc)}{d_prime}"),
        _line("split-half cosine", f"{_spread(halves.cosine)}, halves of {halves.pairs} pairs"),
        _line("", f"(in brackets: 95% of {halves.cosine.n} splits)"),
    ]


def _feature_lines(found: Decomposition) -> list[str]:
    lines = ["in terms of the SAE's features"]
    lines += _nearest_lines(found.nearest)
    for name, pursuit in (("non-negative", found.nonnegative), ("signed", found.signed)):
        lines += _pursuit_lines(name, pursuit)
    if found.encoded is not None:
        encoded = found.encoded
        parts = zip(encoded.features, encoded.activations, strict=True)
        lines += _wrapped(
            "encoding it",
            [f"{feature}: {value:.3g}" for feature, value in parts][:8] or ["nothing"],
        )
        lines.append(
            _line("", f"{encoded.n_fired} fire, {encoded.residual:.2f} of ‖v‖ is left; but")
        )
        lines += textwrap.wrap(
            CAVEAT, WIDTH, initial_indent=" " * _HEAD, subsequent_indent=" " * _HEAD
        )
    return lines


def _nearest_lines(found: Nearest) -> list[str]:
    sides = (("nearest", found.along), ("most against", found.against))
    lines = []
    for name, listed in sides:
        lines += _wrapped(name, [f"{feature} ({cosine:+.2f})" for feature, cosine in listed])
    lines.append(
        _line("", f"(the nearest to a random direction has {found.by_chance:+.2f} on average)")
    )
    return lines


def _pursuit_lines(name: str, pursuit: Pursuit) -> list[str]:
    if not pursuit.features:
        return [_line(name, "no feature points along it")]
    parts = zip(pursuit.features, pursuit.activations, strict=True)
    lines = _wrapped(name, [f"{value:+.3g} × {feature}" for feature, value in parts][:8])
    n = len(pursuit.residuals)
    steps = [*(k for k in _STEPS if k < n), n]
    told = [f"{k}: {pursuit.residuals[k - 1]:.2f}" for k in steps]
    return [*lines, *_wrapped("  ‖rest‖/‖v‖ by n", told)]


def _context_lines(found: Contexts, examples: int, colour: bool) -> list[str]:
    lines = [f"in {found.n_tokens:,} tokens of text, from x·v/‖v‖ = {found.zero:.3g}"]
    for name, side in (("above", found.above), ("below", found.below)):
        lines += _side_lines(name, side, examples, colour)
    return lines


def _side_lines(name: str, side: Side, examples: int, colour: bool) -> list[str]:
    lines = _wrapped(f"{name} {percent(side.density)}", [quoted(word) for word in side.words])
    for one in side.examples[:examples]:
        lines.append(f"{one.value:>9.3g}  {highlighted(one, WIDTH - 11, colour)}")
    return lines


def _spread(one: Spread) -> str:
    return f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]"


def _line(head: str, text: str) -> str:
    return cut(f"{head:<{_HEAD}}{text}", WIDTH)


def _wrapped(head: str, parts: Sequence[str]) -> list[str]:
    """The parts behind a head, over as many lines as they need."""
    kept = ", ".join(part.replace(" ", "\xa0") for part in parts)  # no break within one of them
    rows = textwrap.wrap(kept, WIDTH - _HEAD) or [""]
    heads = [head, *[""] * len(rows)]
    return [
        f"{left:<{_HEAD}}{row}".replace("\xa0", " ") for left, row in zip(heads, rows, strict=False)
    ]
