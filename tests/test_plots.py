"""training/plots.py: files that say what they should, to the byte the same each time."""

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from saesteer.errors import SaesteerError
from saesteer.training import plots

FIGURES: dict[str, Any] = {
    "l0": 7.0,
    "explained_variance": 0.91,
    "ce_recovered": 0.97,
    "kl": 0.02,
    "density": [0.0, 1e-4, 0.003, 0.02, 0.02, 0.3],
    "nearest_cosine": [-0.1, 0.2, 0.3, 0.95, 1.0],
    "baselines": {
        "random": {"explained_variance": -0.4, "ce_recovered": None, "kl": 2.0},
        "pca": {"explained_variance": 0.6, "ce_recovered": 0.7, "kl": 1.0},
    },
}
LINES = [
    {"tokens": 1000 * i, "loss": 2.0 / i, "ev": 1 - 0.5 / i, "l0": 8.0, "dead_fraction": 0.1 / i}
    for i in range(1, 30)
]
POINTS = [
    {
        "architecture": architecture,
        "d_sae": d_sae,
        "l0": float(k),
        "explained_variance": 0.5 + 0.1 * i,
        "ce_recovered": None if d_sae == 256 else 0.6 + 0.1 * i,
    }
    for architecture, d_sae in (("topk", 128), ("topk", 256), ("batchtopk", 128))
    for i, k in enumerate((8, 16, 32))
]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is drawn, as it is drawn."""
    from matplotlib.text import Text

    drawn: list[str] = []
    before = Text.draw

    def draw(self: Any, renderer: Any) -> None:
        if self.get_text() and self.get_visible():
            drawn.append(self.get_text())
        before(self, renderer)

    monkeypatch.setattr(Text, "draw", draw)
    return drawn


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)) + '\n{"tokens": 3')  # killed half-way
    return path


def test_an_evaluation_is_drawn_whole_and_alike_twice(tmp_path: Path, metrics: Path) -> None:
    made = plots.evaluation(FIGURES, metrics, tmp_path / "a")
    names = {"density.svg", "nearest-cosine.svg", "baselines.svg", "training.svg"}
    assert {p.name for p in made} == {p.name for p in (tmp_path / "a").iterdir()} == names
    again = plots.evaluation(FIGURES, metrics, tmp_path / "b")
    for one, other in zip(made, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
        assert ElementTree.parse(one).getroot().tag.endswith("svg")
        assert "dc:date" not in one.read_text()


def test_png_on_request(tmp_path: Path) -> None:
    figures = {"density": FIGURES["density"]}
    one, other = (
        plots.evaluation(figures, tmp_path / "none", tmp_path / name, kinds=("png",))[0]
        for name in "ab"
    )
    assert one.name == "density.png" and one.read_bytes().startswith(b"\x89PNG")
    assert one.read_bytes() == other.read_bytes()


def test_what_is_not_there_is_not_drawn(tmp_path: Path) -> None:
    made = plots.evaluation(
        {**FIGURES, "nearest_cosine": None}, tmp_path / "none.jsonl", tmp_path / "a"
    )
    assert [p.name for p in made] == ["density.svg", "baselines.svg"]


def test_the_figures_stand_in_the_plots(tmp_path: Path, texts: list[str]) -> None:
    plots.density(FIGURES["density"], tmp_path / "d.svg")
    assert "6 features, 1 of them dead" in texts
    plots.nearest_cosine(FIGURES["nearest_cosine"], tmp_path / "n.svg")
    assert "median 0.30, 40.0% above 0.9" in texts
    plots.baselines(FIGURES, tmp_path / "b.svg")
    assert {"0.910", "-0.400", "0.600", "0.970", "–", "2.000", "at L0 = 7.0"} <= set(texts)


def test_training_curves_hold_the_lines(tmp_path: Path, texts: list[str], metrics: Path) -> None:
    lines = plots.read_metrics(metrics)
    assert lines == LINES
    plots.training(lines, tmp_path / "t.svg")
    assert {"loss", "L0", "explained variance of the batch", "dead features, share"} <= set(texts)
    assert "tokens, millions" in texts
    # a flat L0 is not zoomed into, to ticks of 8.0000001
    assert {"7.5", "8.0", "8.5"} <= set(texts) or {"7.50", "8.00", "8.50"} <= set(texts)


def test_a_pareto_plot_has_a_line_a_family(tmp_path: Path, texts: list[str]) -> None:
    plots.pareto(POINTS, tmp_path / "p.svg")
    assert {"topk, 128", "topk, 256", "batchtopk, 128"} <= set(texts)
    assert {"8", "16", "32", "explained variance", "CE recovered"} <= set(texts)
    first = (tmp_path / "p.svg").read_bytes()
    plots.pareto(POINTS[::-1], tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_bytes() == first  # whatever their order
    plots.pareto(POINTS[:1], tmp_path / "one.png")
    plots.pareto([], tmp_path / "none.png")


def test_all_dead_and_one_feature_are_drawn_too(tmp_path: Path, texts: list[str]) -> None:
    plots.density([0.0, 0.0], tmp_path / "d.svg")
    assert "2 features, 2 of them dead" in texts
    plots.density([1.0], tmp_path / "d.svg")
    assert "1 features, 0 of them dead" in texts


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SaesteerError, match=r"saesteer\[plots\]"):
        plots.density([0.1], tmp_path / "d.svg")
    assert not list(tmp_path.iterdir())


def test_the_user_s_own_settings_are_left_alone(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 31.0}):
        plots.density(FIGURES["density"], tmp_path / "a.svg")
        assert matplotlib.rcParams["font.size"] == 31.0
    plots.density(FIGURES["density"], tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
