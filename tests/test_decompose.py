"""A direction in terms of decoder rows: exact where it is made of them, honest where it isn't."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.core.model import HookPoint
from saesteer.effects.decompose import decompose, encode, nearest, pursuit
from saesteer.errors import SaeError, SteeringError
from tests.tiny import WIDTH, tiny_sae


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_what_is_made_of_rows_is_found_exactly():
    rows = normal(64, 256)
    vector = 3 * rows[5] + 2 * rows[9] + rows[40]
    for signed in (False, True):
        found = pursuit(vector, rows, 10, signed=signed)
        # Greedily the first are right; then nothing is left, and it ends.
        assert found.features == (5, 9, 40)
        np.testing.assert_allclose(found.activations, (3, 2, 1), rtol=1e-5)
        assert found.residuals[-1] < 1e-6 and found.residuals[0] > 0.5


def test_only_the_signed_pursuit_takes_away():
    rows = torch.linalg.qr(normal(16, 16))[0]
    vector = 2 * rows[3] - rows[7]
    signed, positive = (pursuit(vector, rows, 4, signed=s) for s in (True, False))
    assert signed.features == (3, 7)
    np.testing.assert_allclose(signed.activations, (2, -1), rtol=1e-5)
    assert positive.features == (3,)
    assert positive.residuals[-1] == pytest.approx(1 / 5**0.5, abs=1e-6)  # ‖−d₇‖ / ‖v‖
    none = pursuit(-rows[3], rows[3:4], 4, signed=False)
    assert none.features == () and none.residuals == ()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.integers(1, 12))
def test_pursuit_gets_closer_with_every_row(seed, signed, k):
    rows, vector = normal(40, 24, seed=seed), normal(24, seed=seed + 1)
    rows[7] = 0  # a dead feature
    found = pursuit(vector, rows, k, signed=signed)
    assert len(set(found.features)) == len(found.features) <= k and 7 not in found.features
    assert list(found.residuals) == sorted(found.residuals, reverse=True)
    assert signed or min(found.activations) >= 0
    made = rows[list(found.features)].double().T @ torch.tensor(
        found.activations, dtype=torch.float64
    )
    left = float((vector.double() - made).norm() / vector.double().norm())
    assert found.residuals[-1] == pytest.approx(left, abs=1e-9)
    # What is left can't be lessened with the rows that were taken.
    slopes = rows[list(found.features)].double() @ (vector.double() - made)
    used = torch.tensor(found.activations) != 0
    assert float(slopes[used].abs().max()) < 1e-6
    assert signed or float(slopes.max()) < 1e-6


def test_the_size_of_a_vector_scales_activations_alone():
    rows, vector = normal(40, 24), normal(24, seed=1)
    one, many = (pursuit(size * vector, rows, 6, signed=True) for size in (1, 1024))
    assert one.features == many.features
    np.testing.assert_allclose(many.residuals, one.residuals, rtol=1e-9)
    np.testing.assert_allclose(many.activations, np.multiply(one.activations, 1024), rtol=1e-6)


@pytest.mark.parametrize(
    "sae", [tiny_sae("topk"), tiny_sae("topk", rescale_acts_by_decoder_norm=True)]
)
def test_activations_are_in_the_features_own_units(sae):
    vector = 2 * sae.direction(11)
    found = decompose(vector, sae, features=1)
    for one in (found.nonnegative, found.signed):
        assert one.features == (11,)
        assert one.activations == pytest.approx((2,), rel=1e-5)
    assert found.nearest.along[0] == (11, pytest.approx(1))
    assert decompose(-vector, sae).nearest.against[0] == (11, pytest.approx(-1))


def test_encoding_a_difference_loses_what_it_takes_away():
    """Tied orthonormal rows without biases: the encoder reads off what is added, and no minus."""
    rows = torch.linalg.qr(normal(WIDTH, WIDTH))[0]
    nothing = torch.zeros(WIDTH)
    sae = replace(
        tiny_sae(d_sae=WIDTH), W_enc=rows.T.contiguous(), W_dec=rows, b_enc=nothing, b_dec=nothing
    )
    found = encode(3 * rows[4] - 4 * rows[9] + 1e-3 * rows[2], sae, 8)
    assert found.features[0] == 4 and 9 not in found.features
    assert found.activations[0] == pytest.approx(3, rel=1e-5)
    assert found.residual == pytest.approx(4 / 5, rel=1e-5)
    # Biases for whole activations: now a feature fires that the difference doesn't hold.
    biased = replace(sae, b_enc=torch.where(torch.arange(WIDTH) == 20, 9.0, 0.0))
    assert encode(3 * rows[4] - 4 * rows[9], biased, 8).features[:2] == (20, 4)
    assert encode(3 * rows[4] - 4 * rows[9], biased, 8).residual > 1


def test_cosines_are_held_against_chance():
    rows, vector = normal(300, 16, seed=5), normal(16, seed=1)
    found = nearest(vector, rows, 5)
    cosines = torch.cosine_similarity(rows, vector[None])
    assert [f for f, _ in found.along] == cosines.argsort(descending=True)[:5].tolist()
    assert [f for f, _ in found.against] == cosines.argsort()[:5].tolist()
    np.testing.assert_allclose([c for _, c in found.along], cosines.topk(5)[0], atol=1e-6)
    # A random direction is no nearer than other random directions are.
    assert abs(found.by_chance - found.along[0][1]) < 0.2
    assert found == nearest(8 * vector, rows, 5)


def test_a_transcoder_is_not_asked_to_encode():
    sae = replace(tiny_sae(apply_b_dec_to_input=False), hook_point_out=HookPoint(2, "mlp_out"))
    assert decompose(normal(WIDTH), sae).encoded is None


def test_what_is_refused():
    with pytest.raises(SaeError, match=r"shape \(5,\) for an SAE whose features write 32"):
        decompose(torch.ones(5), tiny_sae())
    with pytest.raises(SteeringError, match=r"norm 0\.0 has no parts"):
        decompose(torch.zeros(WIDTH), tiny_sae())
    with pytest.raises(SteeringError, match="norm nan"):
        decompose(torch.full((WIDTH,), float("nan")), tiny_sae())
