"""Directions trained by gradient: MELBO and one added vector."""

import pytest
import torch

from saesteer.core.hooks import capture
from saesteer.core.model import HookPoint, fingerprint, load_model
from saesteer.directions import bias_only, melbo
from saesteer.directions.margin import margins
from saesteer.effects.apply import edits
from saesteer.errors import HookPointError, PairsError
from saesteer.steering.edits import Add
from saesteer.steering.engine import steer
from tests.some_pairs import planted_pairs, tiny_pairs
from tests.tiny import BOS, LAYERS, WIDTH, tiny_model, tiny_tokenizer

POINT = HookPoint(0, "resid_post")
LAST = HookPoint(LAYERS - 1, "resid_post")
PROMPTS = ["the boy saw the sea", "once upon a time there was a king", "rain"]


def effect(model, tokenizer, vector, power=2.0, root=2.0) -> float:  # type: ignore[no-untyped-def]
    """(Σ_t ‖ΔZ_t‖^p)^(1/q), one prompt at a time."""
    total = 0.0
    for prompt in PROMPTS:
        ids = torch.tensor([[BOS, *tokenizer.encode(prompt, add_special_tokens=False)]])
        with torch.no_grad():
            with capture(model, [LAST]) as found:
                model(ids)
            plain = found[LAST]
            with steer(model, Add(vector, 1.0, POINT)), capture(model, [LAST]) as found:
                model(ids)
        moved = (found[LAST] - plain)[0, 1:].norm(dim=-1)
        total += float((moved**power).sum() ** (1 / root))
    return total


class TestMelbo:
    @pytest.mark.parametrize(("power", "root"), [(2.0, 2.0), (4.0, 1.0)])
    def test_does_more_than_random_vectors_of_the_same_norm(
        self, power: float, root: float
    ) -> None:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        how = {"n": 2, "steps": 25, "target": LAST.layer, "power": power, "root": root}
        found = melbo.fit(model, tokenizer, PROMPTS, [POINT], radius=2.0, **how)
        rng = torch.Generator().manual_seed(1)
        chance = []
        for _ in range(30):
            vector = torch.randn(WIDTH, generator=rng)
            chance.append(effect(model, tokenizer, 2 * vector / vector.norm(), power, root))
        for part in found:
            assert float(part.vector.norm()) == pytest.approx(2, rel=1e-5)
            own = effect(model, tokenizer, part.vector, power, root)
            assert part.provenance["effect"] == pytest.approx(own, rel=1e-3)
            assert part.provenance["target"] == str(LAST)
        assert found[0].provenance["effect"] > 1.2 * max(chance)
        mean = sum(chance) / len(chance)
        assert found[0].provenance["random_effect"] == pytest.approx(mean, rel=0.25)

    def test_each_is_orthogonal_to_the_ones_before(self) -> None:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        points = [POINT, HookPoint(1, "resid_pre")]
        found = melbo.fit(model, tokenizer, PROMPTS, points, n=4, steps=4)
        assert [part.point for part in found] == [points[0]] * 4 + [points[1]] * 4
        for own in (found[:4], found[4:]):
            units = torch.stack([part.vector / part.vector.norm() for part in own])
            torch.testing.assert_close(units @ units.T, torch.eye(4), rtol=0, atol=1e-5)

    def test_more_steps_find_no_less(self) -> None:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        found = [
            melbo.fit(model, tokenizer, PROMPTS, [POINT], n=1, steps=steps)[0].provenance["effect"]
            for steps in (1, 5, 20)
        ]
        assert found[0] < found[1] < found[2]

    def test_batches_and_padding_change_nothing(self) -> None:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        one, other = (
            melbo.fit(model, tokenizer, PROMPTS, [POINT], n=1, steps=5, batch_size=size)[0]
            for size in (1, 8)
        )
        torch.testing.assert_close(one.vector, other.vector, rtol=1e-3, atol=1e-4)

    def test_the_control_is_fitted_on_random_weights(self) -> None:
        model, tokenizer = load_model("planted")
        state = torch.random.get_rng_state()
        untrained = melbo.with_random_weights(model, 0)
        assert torch.equal(torch.random.get_rng_state(), state)
        shapes = {name: each.shape for name, each in model.named_parameters()}
        assert {name: each.shape for name, each in untrained.named_parameters()} == shapes
        how = {"n": 1, "steps": 5, "most_prompts": 2}
        prompts = [pair.prompt for pair in planted_pairs("sea", 2)]
        (control,) = melbo.fit(model, tokenizer, prompts, [POINT], random_init=True, **how)
        (real,) = melbo.fit(model, tokenizer, prompts, [POINT], **how)
        assert control.model_fingerprint == fingerprint(untrained) != fingerprint(model)
        assert real.model_fingerprint == fingerprint(model)
        assert (control.provenance["random_init"], real.provenance["random_init"]) == (True, False)
        for part in (control, real):
            assert part.provenance["effect"] > part.provenance["random_effect"]

    def test_what_cannot_be_is_refused(self) -> None:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        with pytest.raises(PairsError, match="no prompts"):
            melbo.fit(model, tokenizer, [], [POINT])
        with pytest.raises(PairsError, match="prompt 2: '' has no tokens"):
            melbo.fit(model, tokenizer, ["rain", ""], [POINT])
        with pytest.raises(PairsError, match="steps=0"):
            melbo.fit(model, tokenizer, PROMPTS, [POINT], steps=0)
        with pytest.raises(HookPointError, match="choose a target from 2 to 2"):
            melbo.fit(model, tokenizer, PROMPTS, [HookPoint(1, "resid_post")], target=1)
        with pytest.raises(HookPointError, match="can't be measured"):
            melbo.fit(model, tokenizer, PROMPTS, [LAST])
        with pytest.raises(HookPointError, match="32 dimensions"):
            melbo.fit(model, tokenizer, PROMPTS, [POINT], n=33)


class TestBiasOnly:
    def test_the_margin_of_held_out_pairs_rises_and_no_weight_changes(self) -> None:
        model, tokenizer = load_model("planted")
        before = {name: each.clone() for name, each in model.named_parameters()}
        pairs = planted_pairs("sea", 64)
        point = HookPoint(1, "resid_post")
        (part,) = bias_only.fit(model, tokenizer, pairs[:32], [point], steps=12, learning_rate=0.05)
        for name, each in model.named_parameters():
            assert torch.equal(each, before[name])
            assert each.grad is None
        with torch.no_grad():
            plain = margins(model, tokenizer, pairs[32:])
            with steer(model, edits(part), tokenizer=tokenizer):
                steered = margins(model, tokenizer, pairs[32:])
        assert float((steered - plain).mean()) > 0.2
        assert float((steered > plain).float().mean()) > 0.7

    def test_its_margins_are_those_that_steering_with_it_gives(self) -> None:
        model, tokenizer, pairs = tiny_model(), tiny_tokenizer(), tiny_pairs(32)
        (part,) = bias_only.fit(model, tokenizer, pairs, [POINT], steps=5)
        with torch.no_grad():
            plain = float(margins(model, tokenizer, pairs).mean())
            with steer(model, edits(part), tokenizer=tokenizer):
                steered = float(margins(model, tokenizer, pairs).mean())
        assert part.provenance["margin_before"] == pytest.approx(plain, abs=1e-5)
        assert part.provenance["margin_after"] == pytest.approx(steered, abs=1e-5)
        assert steered > plain

    def test_is_the_same_by_seed_and_wherever_else_one_is_trained(self) -> None:
        model, tokenizer, pairs = tiny_model(), tiny_tokenizer(), tiny_pairs(32)
        how = {"steps": 4, "pairs_a_step": 5}
        alone = bias_only.fit(model, tokenizer, pairs, [POINT], **how)[0]
        both = bias_only.fit(model, tokenizer, pairs, [LAST, POINT], **how)
        other = bias_only.fit(model, tokenizer, pairs, [POINT], seed=1, **how)[0]
        assert torch.equal(alone.vector, both[1].vector)
        assert not torch.equal(alone.vector, other.vector)

    def test_a_head_can_be_trained_too(self) -> None:
        model, tokenizer, pairs = tiny_model(), tiny_tokenizer(), tiny_pairs(32)
        (part,) = bias_only.fit(model, tokenizer, pairs, [HookPoint(1, "head.2")], steps=5)
        assert part.vector.shape == (8,)
        assert part.provenance["margin_after"] > part.provenance["margin_before"]

    def test_no_pairs_or_steps_are_refused(self) -> None:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        with pytest.raises(PairsError, match="no contrast pairs"):
            bias_only.fit(model, tokenizer, [], [POINT])
        with pytest.raises(PairsError, match="steps=0"):
            bias_only.fit(model, tokenizer, tiny_pairs(32), [POINT], steps=0)
