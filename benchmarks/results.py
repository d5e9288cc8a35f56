"""RESULTS.md: each benchmark rewrites its own section of it and leaves the others alone."""

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "RESULTS.md"
HEAD = """# Results

Each section is written by the benchmark that its first line names. Medians of alternating runs; the
machines may be shared, so quote ratios.
"""


def alternating(
    sides: Mapping[str, Callable[[], float]], rounds: int, shown: Callable[[str], None] = print
) -> dict[str, list[float]]:
    """Run every side once a round, forwards and backwards in turn; what each returned, by side."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(sides[name]())
        latest = ", ".join(f"{name} {values[-1]:,.0f}" for name, values in found.items())
        shown(f"round {number + 1} of {rounds}: {latest}")
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The median of the ratios of runs that stood side by side, and their range."""
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    return {"ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of a single value, twice that."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def machine(*packages: str) -> str:
    """One line: processor, threads, Python, torch and the versions of these packages."""
    versions = [f"torch {torch.__version__}"]
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} not installed")
    return (
        f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; Python "
        f"{platform.python_version()}, {', '.join(versions)}."
    )


def write_section(title: str, body: str, path: Path = RESULTS) -> None:
    """Put `## title` and its body into the file, in place of the section of that title."""
    text = path.read_text(encoding="utf-8") if path.exists() else HEAD
    head, *sections = text.split("\n## ")
    kept = {section.partition("\n")[0]: section.partition("\n")[2] for section in sections}
    kept[title] = f"\n{body.strip()}\n"
    parts = [f"\n## {name}\n{text.rstrip()}\n" for name, text in kept.items()]
    path.write_text(head.rstrip() + "\n" + "".join(parts), encoding="utf-8")


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table with the first row's keys as its head."""
    lines = [f"| {' | '.join(rows[0])} |", "|" + " --- |" * len(rows[0])]
    for row in rows:
        lines.append(f"| {' | '.join(_cell(row[key]) for key in rows[0])} |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _processor() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    return f"{platform.machine()}" + (f" ({names[0]})" if names else "")
