"""Figures of a run as SVG or PNG, by the file's ending; the same figures make the same bytes.

matplotlib comes with the `plots` extra and is imported here only where something is drawn.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saesteer.core.files import written_aside
from saesteer.errors import SaesteerError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by lightness too, so that they survive a grey print.
COLOURS = ("#0b4f8a", "#d1782a", "#3f8f5f", "#8a3b78", "#7a7a7a", "#b8a11e")
MARKERS = "osD^vPX*"
_STYLE = {
    "svg.hashsalt": "saesteer",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def evaluation(
    figures: Mapping[str, Any], metrics: Path, folder: Path, *, kinds: Sequence[str] = ("svg",)
) -> list[Path]:
    """Draw what `training.evaluate` measured and, where there are any, the training curves.

    Args:
        metrics: the run's metrics.jsonl, which need not exist.
        kinds: "svg", "png".

    Returns:
        The files written: density, nearest-cosine, baselines, training.

    Raises:
        SaesteerError: matplotlib is missing. RunError: the folder can't be written.
    """
    drawn: list[Path] = []
    for kind in kinds:
        drawn.append(density(figures["density"], folder / f"density.{kind}"))
        if figures.get("nearest_cosine"):
            path = folder / f"nearest-cosine.{kind}"
            drawn.append(nearest_cosine(figures["nearest_cosine"], path))
        if figures.get("baselines"):
            drawn.append(baselines(figures, folder / f"baselines.{kind}"))
        lines = read_metrics(metrics)
        if len(lines) > 1:
            drawn.append(training(lines, folder / f"training.{kind}"))
    return drawn


def density(values: Sequence[float], path: Path) -> Path:
    """Histogram of the features' densities [d_sae] on a log axis; the dead are counted apart."""
    all_ = np.asarray(values, dtype=np.float64)
    alive = all_[all_ > 0]
    lowest = float(np.floor(np.log10(alive.min()))) if len(alive) else -6.0
    with drawn(path, (5.2, 3.2)) as figure:
        axes = figure.subplots()
        bins = np.logspace(min(lowest, -1.0), 0, int(-min(lowest, -1.0) * 6) + 1)
        axes.hist(alive, bins=bins.tolist(), color=COLOURS[0])
        axes.set_xscale("log")
        axes.set_xlabel("density: share of tokens on which a feature fires")
        axes.set_ylabel("features")
        dead = len(all_) - len(alive)
        axes.set_title(f"{len(all_):,} features, {dead:,} of them dead", loc="left")
    return path


def nearest_cosine(values: Sequence[float], path: Path) -> Path:
    """Histogram of each decoder row's cosine to the row nearest to it, [d_sae]."""
    all_ = np.asarray(values, dtype=np.float64)
    with drawn(path, (5.2, 3.2)) as figure:
        axes = figure.subplots()
        axes.hist(all_.clip(0, 1), bins=np.linspace(0, 1, 41).tolist(), color=COLOURS[0])
        axes.set_xlim(0, 1)
        axes.set_xlabel("cosine of a decoder row to the row nearest to it")
        axes.set_ylabel("features")
        median = float(np.median(all_))
        axes.set_title(f"median {median:.2f}, {np.mean(all_ > 0.9):.1%} above 0.9", loc="left")
    return path


def baselines(figures: Mapping[str, Any], path: Path) -> Path:
    """Explained variance, CE recovered and KL of the SAE beside a PCA and a random dictionary."""
    rows = {"this SAE": figures, **figures["baselines"]}
    names = [{"pca": "PCA", "random": "random\ndictionary"}.get(name, name) for name in rows]
    shown = (
        ("explained_variance", "explained variance"),
        ("ce_recovered", "CE recovered"),
        ("kl", "KL, nats a token"),
    )
    with drawn(path, (7.6, 3.0)) as figure:
        for axes, (key, title) in zip(figure.subplots(1, 3), shown, strict=True):
            values = [row[key] for row in rows.values()]
            heights = [0.0 if value is None else float(value) for value in values]
            bars = axes.bar(names, heights, color=COLOURS[: len(rows)], width=0.65)
            labels = ["–" if value is None else f"{value:.3f}" for value in values]
            axes.bar_label(bars, labels, padding=2, fontsize=8)
            axes.set_title(title, loc="left")
            axes.tick_params(axis="x", labelsize=8, length=0)
            axes.grid(False, axis="x")
            axes.margins(y=0.14)
            axes.axhline(0, color="black", linewidth=0.8)
        figure.suptitle(f"at L0 = {figures['l0']:.1f}", x=0.01, ha="left", fontsize=9)
    return path


def training(lines: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Loss, explained variance, L0 and dead features over tokens, from metrics.jsonl."""
    shown = (
        ("loss", "loss", "log"),
        ("ev", "explained variance of the batch", "linear"),
        ("l0", "L0", "linear"),
        ("dead_fraction", "dead features, share", "linear"),
    )
    with drawn(path, (7.6, 4.8)) as figure:
        for axes, (key, title, scale) in zip(
            figure.subplots(2, 2, sharex=True).flat, shown, strict=True
        ):
            points = [(line["tokens"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                tokens, values = zip(*points, strict=True)
                axes.plot(np.asarray(tokens) / 1e6, values, color=COLOURS[0], linewidth=1.2)
                _fit(axes, values, scale)
            axes.set_title(title, loc="left")
        for axes in figure.axes[2:]:
            axes.set_xlabel("tokens, millions")
    return path


def pareto(points: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """L0 against explained variance and CE recovered: a line for each (architecture, d_sae).

    Args:
        points: one SAE each: architecture, d_sae, l0, explained_variance, and ce_recovered, which
            may be None or missing.

    Raises:
        SaesteerError: matplotlib is missing.
    """
    families = sorted({(str(p["architecture"]), int(p["d_sae"])) for p in points})
    shown = (("explained_variance", "explained variance"), ("ce_recovered", "CE recovered"))
    with drawn(path, (7.6, 3.8)) as figure:
        for axes, (key, title) in zip(figure.subplots(1, 2), shown, strict=True):
            seen = []
            for number, (architecture, d_sae) in enumerate(families):
                own = sorted(
                    (float(p["l0"]), float(p[key]))
                    for p in points
                    if (p["architecture"], p["d_sae"]) == (architecture, d_sae)
                    and p.get(key) is not None
                    and p["l0"] > 0
                )
                seen += [x for x, _ in own]
                axes.plot(
                    [x for x, _ in own],
                    [y for _, y in own],
                    color=COLOURS[number % len(COLOURS)],
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=4.5,
                    linewidth=1.2,
                    label=f"{architecture}, {d_sae:,}",
                )
            _log_ticks(axes, seen)
            axes.set_xlabel("L0: features that fire on a token")
            axes.set_title(title, loc="left")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(4, max(1, len(labels))),
            title="architecture, d_sae",
        )  # fmt: skip
    return path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, none where there is no such file; half a line is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue  # the last line of a run that was killed
    return lines


def _fit(axes: "Axes", values: Sequence[float], scale: str) -> None:
    """Plain numbers on the y axis, and no zooming into a line that is all but flat."""
    low, high = min(values), max(values)
    if scale == "log" and low > 0:
        from matplotlib.ticker import LogLocator

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        return
    margin = max(abs(high) * 0.1, 0.01)
    if high - low < margin / 2:
        axes.set_ylim(low - margin, high + margin)


def _log_ticks(axes: "Axes", values: Sequence[float]) -> None:
    """A log axis labelled in plain numbers at powers of two, as k is usually swept."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    if not values:
        return
    low, high = np.floor(np.log2(min(values))), np.ceil(np.log2(max(values)))
    step = max(1, round((high - low) / 6))
    axes.xaxis.set_major_locator(FixedLocator([2.0**i for i in np.arange(low, high + 1, step)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


@contextmanager
def drawn(path: Path, inches: tuple[float, float]) -> Iterator["Figure"]:
    """A figure to draw on, written to `path` when the body succeeds."""
    figure_of, context = _matplotlib()
    with context(_STYLE):
        figure = figure_of(figsize=inches, layout="constrained")
        yield figure
        kind = path.suffix.removeprefix(".")
        # Neither the date nor the version of the program is part of the figure.
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        with written_aside(path) as aside:
            figure.savefig(aside, format=kind, dpi=150, metadata=metadata)


def _matplotlib() -> tuple[Callable[..., "Figure"], Callable[..., Any]]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SaesteerError(
            "plots need matplotlib, which is not installed; install it with "
            "`pip install 'saesteer[plots]'`"
        ) from error

    def context(style: Mapping[str, Any]) -> Any:
        # The user's own matplotlibrc would change the bytes.
        plain = {k: v for k, v in matplotlib.rcParamsDefault.items() if k != "backend"}
        return matplotlib.rc_context({**plain, **style})

    return Figure, context
