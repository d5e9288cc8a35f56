"""An `Attribution` for a terminal, within 80 columns."""

from collections.abc import Sequence

from saesteer.effects.attribution import Attribution, Effect, Score
from saesteer.effects.patching import rank_correlation

_REPLACED = {
    "corrupt": "by what it holds on the corrupt prompt",
    "mean": "by its mean over the pairs' tokens",
}

# An attribution so many times the measured effect, or so many times less, is marked.
_FACTOR = 3


def shown(found: Attribution, *, limit: int = 20, measured: bool = False) -> str:
    """The strongest nodes and features, how much each matters, and how far the two ways agree.

    limit: nodes shown of all that were ranked. measured: whether effects were patched too; the
    order is then by these.
    """
    corrupt = found.corrupt_margin
    after = "" if corrupt is None else f", {_number(corrupt)} after the corrupt prompts"
    lines = [
        f"{found.n_pairs} pairs; margin: log p(chosen) − log p(rejected), mean over tokens",
        f"margin {_number(found.margin)}{after}, nats",
        "effect: what becomes of the margin where a node is replaced on every plain",
        f"token, {_REPLACED[found.replaced_by]} (± standard error over pairs)",
    ]
    groups = (
        (f"nodes, {min(limit, len(found.nodes))} of {len(found.nodes)}", found.nodes),
        (f"features, {len(found.features)} of {found.n_features:,}", found.features),
    )
    for name, effects in groups:
        if effects:
            lines += ["", *_table(name, effects, limit, measured)]
    return "\n".join(lines)


def _table(name: str, effects: Sequence[Effect], limit: int, measured: bool) -> list[str]:
    lines = [f"{name:<30}{'attributed':>20}{'patched' if measured else '':>20}".rstrip()]
    if measured:
        effects = sorted(effects, key=lambda one: -abs(one.patched.mean) if one.patched else 0.0)
    for one in effects[:limit]:
        patched = _number(one.patched) if one.patched is not None else ""
        mark = " *" if measured and _off(one) else ""
        lines.append(f"{one.node!s:<30}{_number(one.attribution):>20}{patched:>20}{mark}".rstrip())
    if measured:
        if any(_off(one) for one in effects[:limit]):
            lines.append(f"* attributed is off by more than a factor of {_FACTOR}, or in sign")
        rho = rank_correlation(effects)
        told = "can't be told of so few" if rho is None else f"{rho:.2f}"
        lines.append(f"Spearman's ρ of attributed and patched, {len(effects)} of them: {told}")
    return lines


def _off(one: Effect) -> bool:
    """Whether the attribution of a measured effect is far from it."""
    if one.patched is None:
        return False
    told, found = one.attribution.mean, one.patched.mean
    return told * found <= 0 < max(abs(told), abs(found)) or not (
        abs(told) <= _FACTOR * abs(found) and abs(found) <= _FACTOR * abs(told)
    )


def _number(one: Score) -> str:
    return f"{one.mean:+.3f}" + ("" if one.se is None else f" ±{one.se:.3f}")
