"""What `saesteer compare --world` prints."""

import textwrap
from collections.abc import Mapping
from typing import Any

_BAR = 20


def shown(found: Mapping[str, Any]) -> str:
    """What `world.measure` found, in at most 80 columns."""
    kl, arms = found["kl"], found["arms"]
    lines = [
        f"How far each way to steer goes, over {found['concepts']} planted concepts: 0 is no edit "
        f"({kl['none']:.3f}",
        f"nats from the exact answer), 1 the concept really on ({kl['ceiling']:.3f})",
        "",
        f"{'arm':<20}{'score':>6}  {'95% interval':<16}{'anti':>5}{'ΔCE':>7}",
    ]
    for name, arm in sorted(arms.items(), key=lambda item: -item[1]["score"]):
        bar = "█" * round(_BAR * min(1.0, max(0.0, arm["score"])))
        lines.append(
            f"{name:<20}{arm['score']:>6.3f}  [{arm['low']:>6.3f}, {arm['high']:>5.3f}] "
            f"{arm['anti_steerable']:>5.0%}{arm['delta_ce']:>7.3f} {bar}"
        )
    lines += ["", "mean difference by number of pairs"]
    lines += [
        f"{point['n']:>8}  {point['score']:>6.3f}  [{point['low']:>6.3f}, {point['high']:>5.3f}]"
        for point in found["n_curve"]
    ]
    lines += ["", *textwrap.wrap(_n_star(found), 80), "", "planted failures"]
    for flag in found["flag_statistics"]:
        mark = "flagged" if flag["flagged"] else "-"
        lines.append(f"  {flag['failure']:<18}{mark}")
        lines += textwrap.wrap(flag["why"], 80, initial_indent="    ", subsequent_indent="    ")
    lines += ["", "controls (flagged: the model or the dictionary is no better than chance)"]
    for flag in found["controls"]:
        mark = "flagged" if flag["flagged"] else "-"
        lines.append(f"  {flag['failure']:<18}{mark}")
        lines += textwrap.wrap(flag["why"], 80, initial_indent="    ", subsequent_indent="    ")
    lines += [f"not run: {one['what']}: {one['why']}" for one in found.get("not_run", ())]
    return "\n".join([*lines, "", f"{found['seconds']:.0f} s"])


def _n_star(found: Mapping[str, Any]) -> str:
    feature, margin = found["best_feature"], found["margin"]
    if feature is None:
        return "n*: no arm of features took part."
    if found["n_star"] is None:
        return (
            f"n*: at no number of pairs tried was the mean difference, with 95% confidence, no "
            f"worse than {feature} by more than {margin:g}."
        )
    return (
        f"n* = {found['n_star']}: from so many pairs on the mean difference is, with 95% "
        f"confidence, no worse than {feature} (a single feature) by more than {margin:g}."
    )
