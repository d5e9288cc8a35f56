"""The report's plots: told apart in grey, every point within the picture."""

import re

from hypothesis import example, given, settings
from hypothesis import strategies as st

from saesteer.compare import report_plots as plots


def test_lines_differ_by_dash_and_marker() -> None:
    """A grey print tells them apart: no two styles share both."""
    looks = {re.sub(r'class="[^"]*"', "", plots.key(style)) for style in range(plots.STYLES)}
    assert len(looks) == plots.STYLES


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(0, 1e3)), max_size=8),
    st.booleans(),
)
def test_every_point_is_drawn_within_the_plot(
    given: list[tuple[float, float, float]], log: bool
) -> None:
    points = [plots.Point(x, y, y - half, y + half) for x, y, half in given]
    svg = plots.lines(
        [plots.Line(points, 0)], x_label="x", y_label="y", name="a plot", x_log=log, y_log=log
    )
    kept = [p for p in points if not log or min(p.x, p.y) > plots.LEAST]
    assert bool(svg) == bool(kept)
    places = re.findall(r'<circle[^>]*cx="([^"]+)" cy="([^"]+)"', svg)
    assert len(places) == len(kept)
    assert all(0 <= float(x) <= 480 and 0 <= float(y) <= 300 for x, y in places)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
@example([-0.01, 1.0])
def test_bars_below_zero_hold_the_anti_steerable(values: list[float]) -> None:
    svg = plots.histogram(values, ends=(min(values), max(values)), name="slopes")
    drawn = re.findall(r'class="(below|above)"[^>]*height="([^"]+)"', svg)
    below = sum(float(h) for kind, h in drawn if kind == "below")
    assert (below > 0) == any(value < 0 for value in values)
