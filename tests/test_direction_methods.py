"""Each method that needs only activations, held to what shows that it is faithful."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

from saesteer.directions import (
    ccs,
    lat,
    leace,
    logistic_probe,
    mean_difference,
    mean_difference_unpaired,
    mimic,
    pca_activations,
    random_control,
    shuffled,
    sides,
)
from saesteer.directions.methods import METHODS, method
from saesteer.errors import ConfigError, PairsError

ON_ACTIVATIONS = [m for m in METHODS.values() if m.kind != "model"]


def planted(n: int, d: int, size: float, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen and rejected [n, d], noise of variance 1 around a shift of `size` along a unit [d]."""
    rng = torch.Generator().manual_seed(seed)
    line = torch.nn.functional.normalize(torch.randn(d, generator=rng), dim=0)
    rejected = torch.randn(n, d, generator=rng)
    return torch.randn(n, d, generator=rng) + size * line, rejected, line


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.double(), b.double(), dim=0))


def vectors(name: str, chosen: Tensor, rejected: Tensor) -> list[Tensor]:
    made = METHODS[name].fit(chosen, rejected)
    return made if isinstance(made, list) else [made]


def test_the_mean_difference_is_the_difference_of_means() -> None:
    chosen, rejected, _ = planted(50, 16, 1.0)
    expected = chosen.double().mean(0) - rejected.double().mean(0)
    torch.testing.assert_close(mean_difference.fit(chosen, rejected).double(), expected)
    torch.testing.assert_close(mean_difference_unpaired.fit(chosen, rejected).double(), expected)
    torch.testing.assert_close(
        mean_difference_unpaired.fit(chosen, rejected[:7]).double(),
        chosen.double().mean(0) - rejected[:7].double().mean(0),
    )


@pytest.mark.parametrize("name", ["mean-difference", "mean-difference-unpaired", "lat"])
def test_turning_the_labels_turns_the_direction(name: str) -> None:
    chosen, rejected, _ = planted(64, 16, 2.0)
    (one,), (other,) = vectors(name, chosen, rejected), vectors(name, rejected, chosen)
    torch.testing.assert_close(one, -other)
    assert one.norm() > 0.5


def test_turning_the_labels_turns_a_probe_and_a_readers_scores() -> None:
    chosen, rejected, _ = planted(64, 16, 2.0)
    one, other = logistic_probe.fit(chosen, rejected), logistic_probe.fit(rejected, chosen)
    # The solver stops within its tolerance.
    assert cosine(one, other) < -0.999
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(5))
    first, second = ccs.fit(chosen, rejected).score(x), ccs.fit(rejected, chosen).score(x)
    assert first.std() > 0.1
    assert torch.corrcoef(torch.stack([first, second]))[0, 1] < -0.99


def test_lat_loses_the_contrast_when_the_differences_are_centred() -> None:
    """METHODS' table: centred .09/.04/.03, uncentred .87/.97/.98, mean difference .90/.97/.99."""
    for n, uncentred, mean in ((32, 0.87, 0.90), (128, 0.97, 0.97), (256, 0.98, 0.99)):
        found = []
        for seed in range(10):
            chosen, rejected, line = planted(n, 64, 4.0, seed=seed)
            found.append(
                (
                    cosine(lat.fit(chosen, rejected, centred=True), line),
                    cosine(lat.fit(chosen, rejected), line),
                    cosine(mean_difference.fit(chosen, rejected), line),
                )
            )
        means = np.mean(found, 0)
        assert abs(means[0]) < 0.2  # a random line of 64 dimensions has |cos| .1 on average
        assert means[1] == pytest.approx(uncentred, abs=0.02)
        assert means[2] == pytest.approx(mean, abs=0.02)


def test_lat_is_the_first_singular_vector_of_the_differences() -> None:
    chosen, rejected, _ = planted(40, 8, 1.0)
    differences = (chosen - rejected).double()
    line = lat.fit(chosen, rejected).double()
    line = line / line.norm()
    # No other line catches more of the differences.
    best = torch.linalg.eigvalsh(differences.T @ differences)[-1]
    assert float((differences @ line).square().sum()) == pytest.approx(float(best), rel=1e-5)


def test_pca_gives_both_signs_of_what_varies_most() -> None:
    rng = torch.Generator().manual_seed(0)
    spread = torch.ones(12)
    spread[3], spread[7] = 6.0, 4.0
    chosen, rejected = (torch.randn(400, 12, generator=rng) * spread for _ in range(2))
    chosen[:, 0] += 1.0
    found = pca_activations.fit(chosen, rejected, components=2)
    assert len(found) == 4
    assert torch.equal(found[0], -found[1])
    assert torch.equal(found[2], -found[3])
    assert found[0].abs().argmax() == 3
    assert found[2].abs().argmax() == 7
    # Norm-matched random lines catch less of the variance.
    x = torch.cat([chosen, rejected])
    caught = (x @ found[0]).var()
    for seed in range(20):
        control = random_control.fit(chosen, rejected, seed=seed)
        torch.testing.assert_close(control.norm(), found[0].norm())
        assert (x @ control).var() < caught


def test_a_direction_is_as_long_as_the_mean_difference() -> None:
    chosen, rejected, _ = planted(64, 16, 2.0)
    long = mean_difference.fit(chosen, rejected).norm()
    for name in ("lat", "logistic-probe", "pca-activations", "random"):
        for vector in vectors(name, chosen, rejected):
            torch.testing.assert_close(vector.norm(), long)
            assert vector.dtype == torch.float32


def test_a_probe_reads_well_and_points_elsewhere() -> None:
    """Where the noise is uneven the weights undo it, off the line on which the classes lie."""
    rng = torch.Generator().manual_seed(0)
    n, d = 400, 16
    # Two coordinates share a large noise; the classes differ in the first of them alone.
    noise = torch.randn(2, 2 * n, d, generator=rng)
    noise[..., 1] = 0.2 * noise[..., 1] + 4 * noise[..., 0]
    noise[..., 0] *= 4
    chosen, rejected = noise[0].clone(), noise[1]
    chosen[:, 0] += 2.0
    probe = logistic_probe.fit(chosen[:n], rejected[:n])
    mean = mean_difference.fit(chosen[:n], rejected[:n])

    def auroc(v: Tensor) -> float:
        held = torch.cat([chosen[n:], rejected[n:]]) @ v
        return float(roc_auc_score(np.repeat([1, 0], n), held.numpy()))

    assert auroc(probe) > 0.99
    assert auroc(mean) < 0.75
    assert cosine(probe, mean) < 0.9


def test_a_probe_does_not_depend_on_the_size_of_the_stream() -> None:
    chosen, rejected, _ = planted(64, 16, 2.0)
    one, other = (logistic_probe.fit(s * chosen, s * rejected) for s in (1.0, 1000.0))
    torch.testing.assert_close(1000 * one, other, rtol=1e-2, atol=1.0)
    assert cosine(one, other) > 0.9999


def probe_accuracy(fitted_on: list[Tensor], read_on: list[Tensor]) -> float:
    """Of a logistic probe of the first of two sides against the second."""
    probe = LogisticRegression(max_iter=2000)
    probe.fit(torch.cat(fitted_on).numpy(), np.repeat([1, 0], len(fitted_on[0])))
    return float(probe.score(torch.cat(read_on).numpy(), np.repeat([1, 0], len(read_on[0]))))


@pytest.mark.parametrize("add", [0.0, 0.5])
def test_after_leace_a_probe_is_at_chance(add: float) -> None:
    n, d = 4000, 16
    rng = torch.Generator().manual_seed(1)
    mixing = torch.randn(d, d, generator=rng) / d**0.5
    chosen, rejected, _ = planted(2 * n, d, 3.0)
    chosen, rejected = chosen @ mixing, rejected @ mixing
    matrix, shift = leace.fit(chosen[:n], rejected[:n], add=add)
    before = [[x[:n] for x in (chosen, rejected)], [x[n:] for x in (chosen, rejected)]]
    after = [[x @ matrix.T + shift for x in part] for part in before]
    assert probe_accuracy(*before) > 0.9
    assert probe_accuracy(*after) == pytest.approx(0.5, abs=0.02)
    # A new probe, which may look for what the erasure left in data it wasn't fitted on.
    half = n // 2
    fresh = probe_accuracy([x[:half] for x in after[1]], [x[half:] for x in after[1]])
    assert fresh == pytest.approx(0.5, abs=0.04)
    # Exact where it was fitted: both sides have one mean, the middle of both (plus the shift).
    middle = torch.cat(before[0]).mean(0) + add * mean_difference.fit(*before[0])
    for side in after[0]:
        torch.testing.assert_close(side.mean(0), middle, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [160, 4000])
def test_mimic_matches_mean_and_covariance(n: int) -> None:
    d = 16
    rng = torch.Generator().manual_seed(2)
    first, second = (torch.randn(d, d, generator=rng) / d**0.5 + torch.eye(d) for _ in range(2))
    rejected = torch.randn(n, d, generator=rng) @ first
    chosen = torch.randn(n, d, generator=rng) @ second + 2
    matrix, shift = mimic.fit(chosen, rejected)
    moved = rejected @ matrix.T + shift
    torch.testing.assert_close(moved.mean(0), chosen.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cov(moved.T), torch.cov(chosen.T), rtol=1e-3, atol=1e-4)
    # Of all maps that do it, the optimal one is symmetric and positive definite.
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix)[0] > 0


def test_mimic_matches_the_shrunk_covariances_of_few_pairs() -> None:
    n, d = 10, 24
    chosen, rejected, _ = planted(n, d, 3.0)
    matrix, shift = (x.double().numpy() for x in mimic.fit(2 * chosen, rejected))
    cov_a, cov_b = (ledoit_wolf(x.double().numpy())[0] for x in (rejected, 2 * chosen))
    np.testing.assert_allclose(matrix @ cov_a @ matrix.T, cov_b, rtol=1e-4, atol=1e-4)
    root = sqrtm(cov_a).real
    inverse = np.linalg.inv(root)
    paper = inverse @ sqrtm(root @ cov_b @ root).real @ inverse
    np.testing.assert_allclose(matrix, paper, rtol=1e-4, atol=1e-5)
    moved = rejected.double().numpy() @ matrix.T + shift
    np.testing.assert_allclose(moved.mean(0), 2 * chosen.double().mean(0).numpy(), atol=1e-4)


def test_ccs_finds_the_planted_truth_without_labels() -> None:
    n, d = 256, 16
    chosen, rejected, line = planted(2 * n, d, 4.0)
    found = ccs.fit(chosen[:n], rejected[:n])
    assert found.losses[-1] < 0.25 * found.losses[0]
    assert found.losses[-1] < 0.05
    right = torch.cat([found.score(chosen[n:]) > 0, found.score(rejected[n:]) < 0])
    best = torch.cat([chosen[n:] @ line > 2, rejected[n:] @ line < 2])
    assert right.float().mean() > 0.9
    assert right.float().mean() > best.float().mean() - 0.05


def test_the_loss_of_ccs() -> None:
    """p⁺ = .8 and p⁻ = .3: (.8 + .3 − 1)² + .3² = .1."""
    odds = torch.tensor([[0.8], [0.3]], dtype=torch.float64).logit()
    torch.testing.assert_close(ccs._losses(odds[:1], odds[1:]).item(), 0.1)


def test_random_directions_are_centred_on_none() -> None:
    chosen, rejected, line = planted(128, 64, 3.0)
    found = [random_control.fit(chosen, rejected, seed=seed) for seed in range(20)]
    cosines = torch.tensor([cosine(v, line) for v in found])
    # 1/√64 is their standard deviation.
    assert abs(cosines.mean()) < 3 * 0.125 / 20**0.5
    assert cosines.std() == pytest.approx(0.125, abs=0.06)
    assert cosine(found[0], found[1]) < 0.5
    assert torch.equal(found[3], random_control.fit(chosen, rejected, seed=3))


def test_shuffled_labels_have_no_shift() -> None:
    chosen, rejected, line = planted(128, 64, 3.0)
    found = torch.stack([shuffled.fit(chosen, rejected, seed=seed) for seed in range(20)])
    along = found @ line
    assert abs(along.mean()) < 0.15
    assert along.abs().max() < 0.5
    assert mean_difference.fit(chosen, rejected) @ line > 2.5
    # A difference that all pairs share cancels entirely.
    torch.testing.assert_close(
        shuffled.fit(torch.ones(8, 4), torch.zeros(8, 4)), torch.zeros(4), rtol=0, atol=0
    )


@pytest.mark.parametrize("chosen", ON_ACTIVATIONS, ids=lambda m: m.name)
def test_a_seed_gives_one_result_and_leaves_the_random_state(chosen) -> None:  # type: ignore[no-untyped-def]
    a, b, _ = planted(40, 8, 2.0)
    state = torch.random.get_rng_state()
    one, other = (chosen.fit(a, b, seed=7) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    if chosen.kind == "reader":
        one, other = one.score(a), other.score(a)
    for x, y in zip(
        one if isinstance(one, list | tuple) else [one],
        other if isinstance(other, list | tuple) else [other],
        strict=True,
    ):
        assert torch.equal(x, y)
        assert x.isfinite().all()


@pytest.mark.parametrize("chosen", ON_ACTIVATIONS, ids=lambda m: m.name)
def test_bad_activations_are_refused(chosen) -> None:  # type: ignore[no-untyped-def]
    a, b, _ = planted(40, 8, 2.0)
    with pytest.raises(PairsError, match=r"\[40, 8\].*\[40, 7\]"):
        chosen.fit(a, b[:, :7])
    with pytest.raises(PairsError):
        chosen.fit(a[:0], b[:0])
    broken = a.clone()
    broken[3, 2] = torch.nan
    with pytest.raises(PairsError, match="NaN or infinity"):
        chosen.fit(broken, b)


@pytest.mark.parametrize(
    "name", ["mean-difference", "mean-difference-unpaired", "lat", "logistic-probe", "random"]
)
def test_sides_that_are_one_give_no_direction(name: str) -> None:
    a, _, _ = planted(40, 8, 2.0)
    with pytest.raises(PairsError, match="the same mean activation"):
        METHODS[name].fit(a, a)


def test_bad_options_are_refused() -> None:
    a, b, _ = planted(40, 8, 2.0)
    with pytest.raises(PairsError, match="9 components"):
        pca_activations.fit(a, b, components=9)
    with pytest.raises(PairsError, match="C=0"):
        logistic_probe.fit(a, b, C=0)
    with pytest.raises(PairsError, match="add=nan"):
        leace.fit(a, b, add=float("nan"))
    with pytest.raises(PairsError, match="0 steps"):
        ccs.fit(a, b, steps=0)
    with pytest.raises(PairsError, match="chosen side are all the same"):
        mimic.fit(torch.ones_like(a), b)
    with pytest.raises(PairsError, match="1 contrast pairs, where this method needs 2"):
        sides.checked(a[:1], b[:1], fewest=2)


def test_every_method_is_listed_once_with_its_line_and_paper() -> None:
    assert len({m.module for m in METHODS.values()}) == len(METHODS)
    for name, one in METHODS.items():
        assert method(name) is one
        assert name == one.name
        assert one.line
        assert one.paper
        assert len(one.line) <= 80
    with pytest.raises(ConfigError, match="did you mean 'mean-difference'"):
        method("mean-diference")
