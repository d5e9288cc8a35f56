"""The norm-preserving turn of in-context vectors."""

import pytest
import torch

from saesteer.core.hooks import capture
from saesteer.core.model import HookPoint
from saesteer.directions import icv
from saesteer.effects.apply import edits
from saesteer.steering.edits import Lean
from saesteer.steering.engine import steer
from tests.some_pairs import tiny_pairs
from tests.tiny import BOS, random_ids, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("strength", [-3.0, 0.0, 1.0, 10.0])
def test_in_context_vectors_keep_every_norm(strength: float) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    (part,) = icv.fit(model, tokenizer, tiny_pairs(5), [HookPoint(0, "resid_post")])
    (edit,) = edits(part, strength)
    assert isinstance(edit, Lean)
    assert edit.strength == pytest.approx(0.1 * strength)
    ids = torch.cat([torch.full((2, 1), BOS), random_ids(2, 7)], 1)
    with torch.no_grad():
        with capture(model, [part.point]) as found:
            model(ids)
        plain = found[part.point]
        with steer(model, edit), capture(model, [part.point]) as found:
            model(ids)
    steered = found[part.point]
    torch.testing.assert_close(steered.norm(dim=-1), plain.norm(dim=-1), rtol=1e-6, atol=0)
    unit = part.vector / part.vector.norm()
    x = plain / plain.norm(dim=-1, keepdim=True)
    away = (x @ -unit).clamp(min=0)[..., None]
    want = x + 0.1 * strength * (1 + away) * unit
    want = want / want.norm(dim=-1, keepdim=True) * plain.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(steered[:, 1:], want[:, 1:], rtol=1e-5, atol=1e-6)
    assert torch.equal(steered[:, 0], plain[:, 0])
    assert torch.equal(steered, plain) == (strength == 0)
