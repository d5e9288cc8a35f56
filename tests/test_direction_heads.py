"""Methods that choose heads: inference-time intervention and function vectors."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from saesteer.core.hooks import capture
from saesteer.core.model import HookPoint, load_model
from saesteer.directions import function_vector, iti
from saesteer.directions.answers import answer_activations
from saesteer.directions.groups import groups_of
from saesteer.directions.heads import all_heads, output_weight
from saesteer.directions.margin import margins
from saesteer.directions.pairs import Pair
from saesteer.effects.apply import edits
from saesteer.errors import HookPointError, PairsError
from saesteer.steering.edits import Add
from saesteer.steering.engine import steer
from saesteer.steering.positions import Positions
from tests.some_pairs import planted_pairs, tiny_pairs
from tests.tiny import LAYERS, WIDTH, random_ids, tiny_model, tiny_tokenizer

POINT = HookPoint(1, "resid_post")
EVERY = [HookPoint(layer, "resid_post") for layer in range(LAYERS)]
HEADS = 4
COPIES = HookPoint(1, "head.2")
ANSWERS = "sea wave boat sail sun moon star cloud".split()  # noqa: SIM905


def planted_sides(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two sides [n, 8] a shift apart, in noise that is large along some dimensions."""
    rng = torch.Generator().manual_seed(seed)
    shift = torch.nn.functional.normalize(torch.randn(8, generator=rng), dim=0)
    noise = torch.randn(2, n, 8, generator=rng) * torch.tensor([2.0, 2, 1, 1, 0.5, 0.5, 0.2, 0.2])
    return noise[0] + shift / 2, noise[1] - shift / 2, shift


class TestProbe:
    def test_mass_mean_is_nearer_to_a_planted_shift_than_the_probe(self) -> None:
        cosines = {"mass-mean": 0.0, "probe": 0.0}
        for seed in range(10):
            chosen, rejected, shift = planted_sides(256, seed)
            for how in cosines:
                theta = iti.head_probe(chosen, rejected, direction=how).theta
                cosines[how] += float(theta @ shift) / 10
        assert cosines["mass-mean"] > cosines["probe"] > 0.3
        assert cosines["mass-mean"] > 0.9

    @pytest.mark.parametrize("how", ["mass-mean", "probe"])
    def test_theta_has_length_one_and_sigma_is_the_spread_along_it(self, how) -> None:  # type: ignore[no-untyped-def]
        chosen, rejected, _ = planted_sides(64, 0)
        found = iti.head_probe(chosen, rejected, direction=how)
        assert float(found.theta.norm()) == pytest.approx(1, abs=1e-6)
        along = torch.cat([chosen, rejected]) @ found.theta
        assert found.sigma == pytest.approx(float(along.std(correction=0)), rel=1e-5)
        turned = iti.head_probe(rejected, chosen, direction=how)
        torch.testing.assert_close(turned.theta, -found.theta, rtol=1e-3, atol=1e-3)

    def test_accuracy_is_of_pairs_that_were_not_seen(self) -> None:
        rng = torch.Generator().manual_seed(0)
        # With as many dimensions as texts, a probe can learn any labels by heart.
        noise = torch.randn(2, 40, 100, generator=rng)
        assert abs(iti.head_probe(noise[0], noise[1]).accuracy - 0.5) < 0.3
        apart = iti.head_probe(noise[0] + 3, noise[1])
        assert apart.accuracy == 1

    def test_log_likelihood_is_of_the_labels_of_the_same_unseen_pairs(self) -> None:
        chosen, rejected, shift = planted_sides(50, 3)
        found = iti.head_probe(chosen, rejected, seed=1)
        order = np.random.default_rng(1).permutation(50)
        seen, held = order[10:], order[:10]
        x = torch.cat([chosen[seen], rejected[seen]]).double().numpy()
        probe = LogisticRegression(max_iter=1000).fit(x, [1] * 40 + [0] * 40)
        # Columns are the labels 0 and 1.
        right = probe.predict_log_proba(chosen[held].double().numpy())[:, 1]
        wrong = probe.predict_log_proba(rejected[held].double().numpy())[:, 0]
        assert found.log_likelihood == pytest.approx(np.concatenate([right, wrong]).mean())
        # A wider gap can't be told apart better than perfectly, but it is likelier.
        near, far = (iti.head_probe(chosen + k * shift, rejected) for k in (20, 40))
        assert near.accuracy == far.accuracy == 1
        assert near.log_likelihood < far.log_likelihood < 0

    @pytest.mark.parametrize("how", ["mass-mean", "probe"])
    def test_sides_that_are_the_same_give_no_direction(self, how) -> None:  # type: ignore[no-untyped-def]
        same = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
        with pytest.raises(PairsError, match="the same mean activation"):
            iti.head_probe(same, same, direction=how)

    def test_one_pair_is_too_few(self) -> None:
        with pytest.raises(PairsError, match="needs 2"):
            iti.head_probe(torch.ones(1, 8), torch.zeros(1, 8))


class TestIti:
    def test_takes_the_most_accurate_heads_and_adds_alpha_sigma_theta(self) -> None:
        model, tokenizer, pairs = tiny_model(), tiny_tokenizer(), tiny_pairs(64)
        parts = iti.fit(model, tokenizer, pairs, EVERY, heads=3, alpha=7.0)
        candidates = all_heads(model, range(LAYERS))
        assert len(candidates) == LAYERS * HEADS
        read = answer_activations(model, tokenizer, pairs, candidates, read="answer-last")
        groups = groups_of(pairs)
        assert len(set(groups)) == 32  # two of each prompt
        probes = {head: iti.head_probe(*read[head], groups) for head in candidates}
        accuracies = sorted((probe.accuracy for probe in probes.values()), reverse=True)
        assert [part.provenance["accuracy"] for part in parts] == accuracies[:3]
        for part in parts:
            probe = probes[part.point]
            torch.testing.assert_close(part.vector, 7 * probe.sigma * probe.theta)
        ids = random_ids(1, 6)
        with torch.no_grad():
            with capture(model, candidates) as found:
                model(ids)
            plain = dict(found)
            with steer(model, edits(parts[:1])), capture(model, candidates) as found:
                model(ids)
        first = parts[0]
        for head in candidates:
            if head.layer < first.point.layer or (
                head.layer == first.point.layer and head != first.point
            ):
                assert torch.equal(found[head], plain[head])
        moved = found[first.point] - plain[first.point]
        torch.testing.assert_close(moved, first.vector.expand_as(moved), rtol=1e-4, atol=1e-4)

    def test_heads_that_tie_come_likelier_first_and_are_counted(self) -> None:
        model, tokenizer, pairs = tiny_model(), tiny_tokenizer(), tiny_pairs(32)
        candidates = all_heads(model, range(LAYERS))
        read = answer_activations(model, tokenizer, pairs, candidates, read="answer-last")
        probes = {head: iti.head_probe(*read[head]) for head in candidates}
        best = max(probe.accuracy for probe in probes.values())
        tied = [head for head in candidates if probes[head].accuracy == best]
        likeliest = sorted(tied, key=lambda head: probes[head].log_likelihood, reverse=True)
        assert len(tied) > 2 and likeliest[0] != tied[0]  # or there is nothing to break
        for heads in (1, 2):
            parts = iti.fit(model, tokenizer, pairs, EVERY, heads=heads)
            assert [part.point for part in parts] == likeliest[:heads]
            for part in parts:
                assert part.provenance["tied_at_cut"] == len(tied)
                assert part.provenance["log_likelihood"] == probes[part.point].log_likelihood
        (*_, last) = iti.fit(model, tokenizer, pairs, EVERY, heads=len(tied) + 1)
        same = [p for p in probes.values() if p.accuracy == last.provenance["accuracy"]]
        assert last.provenance["accuracy"] < best and last.provenance["tied_at_cut"] == len(same)

    def test_by_default_a_twentieth_of_the_heads_at_least_one(self) -> None:
        model, tokenizer, pairs = tiny_model(), tiny_tokenizer(), tiny_pairs(32)
        assert len(iti.fit(model, tokenizer, pairs, EVERY)) == 1
        wide = tiny_model(num_hidden_layers=12, num_attention_heads=4)
        every = [HookPoint(layer, "resid_post") for layer in range(12)]
        assert len(iti.fit(wide, tokenizer, pairs, every)) == 48 // 20

    def test_head_points_narrow_the_choice(self) -> None:
        model, tokenizer, pairs = tiny_model(), tiny_tokenizer(), tiny_pairs(32)
        points = [HookPoint(2, "head.3"), HookPoint(0, "head.1")]
        parts = iti.fit(model, tokenizer, pairs, points, heads=2)
        assert {part.point for part in parts} == set(points)
        with pytest.raises(PairsError, match="there are 2"):
            iti.fit(model, tokenizer, pairs, points, heads=3)
        with pytest.raises(PairsError, match="did you mean 'probe'"):
            iti.fit(model, tokenizer, pairs, points, direction="prob")

    def test_on_the_planted_language_mass_mean_steers_no_worse_than_the_probe(self) -> None:
        model, tokenizer = load_model("planted")
        every = [HookPoint(layer, "resid_post") for layer in range(4)]
        gains = {"mass-mean": 0.0, "probe": 0.0}
        for concept in ("sea", "kitchen", "music", "anger"):
            pairs = planted_pairs(concept, 96)
            held = pairs[64:]
            with torch.no_grad():
                before = float(margins(model, tokenizer, held).mean())
                for how in gains:
                    parts = iti.fit(model, tokenizer, pairs[:64], every, heads=4, direction=how)
                    with steer(model, edits(parts), tokenizer=tokenizer):
                        gains[how] += float(margins(model, tokenizer, held).mean()) - before
        assert gains["mass-mean"] >= gains["probe"]
        assert gains["mass-mean"] > 0.05


def a_model_that_copies() -> torch.nn.Module:
    """A tiny GPT-2 in which one head looks at all tokens alike and says the words it finds there.

    The words of `tiny_pairs`' answers have eight dimensions to themselves, which that head reads
    and writes back; other words and other heads stay random, and say little.
    """
    model, words = tiny_model("gpt2"), tiny_tokenizer().convert_tokens_to_ids(ANSWERS)
    basis = torch.linalg.qr(torch.randn(WIDTH, 8, generator=torch.Generator().manual_seed(0)))[0]
    columns = slice(8 * COPIES.head, 8 * COPIES.head + 8)
    block = model.transformer.h[COPIES.layer]
    with torch.no_grad():
        # No biases and no positions, which would speak for some of the words by chance.
        for name, each in model.named_parameters():
            if name.endswith("bias") or "wpe" in name or "mlp.c_proj" in name:
                each.zero_()
            elif "ln_" in name:
                each.fill_(1)
            elif "attn.c_proj" in name:
                each.mul_(0.1)
        embeddings = model.transformer.wte.weight
        embeddings -= embeddings @ basis @ basis.T
        embeddings[words] = basis.T
        weight = block.attn.c_attn.weight.view(WIDTH, 3, -1)
        weight[:, :2, columns] = 0  # no query and no key: it looks everywhere
        weight[:, 2, columns] = basis
        block.attn.c_proj.weight[columns] = 3 * basis.T
    return model


def one_answer_each(n: int) -> list[Pair]:
    """Pairs whose chosen answer is always the same word, and the rejected one another."""
    return [Pair(pair.prompt, " sea sea", " sun sun") for pair in tiny_pairs(n)]


class TestFunctionVector:
    def test_recovers_a_planted_copy_head(self) -> None:
        model, tokenizer = a_model_that_copies(), tiny_tokenizer()
        pairs = one_answer_each(24)
        (part,) = function_vector.fit(model, tokenizer, pairs, [POINT], heads=3)
        ranked = part.provenance["heads"]
        assert ranked[0][:2] == [COPIES.layer, COPIES.head]
        effects = [effect for _, _, effect in ranked]
        assert effects[0] > 0.01
        assert effects[0] > 3 * abs(effects[1])
        # Alone it says what it was shown: more of the chosen word, with nothing shown.
        (alone,) = function_vector.fit(model, tokenizer, pairs, [POINT], heads=1)
        with torch.no_grad():
            before = margins(model, tokenizer, pairs).mean()
            with steer(model, edits(alone), tokenizer=tokenizer):
                after = margins(model, tokenizer, pairs).mean()
        assert after > before + 0.5

    def test_is_the_sum_of_what_the_output_projection_makes_of_the_means(self) -> None:
        model, tokenizer, pairs = tiny_model("gpt2"), tiny_tokenizer(), tiny_pairs(16)
        every = LAYERS * HEADS
        (part,) = function_vector.fit(model, tokenizer, pairs, [POINT], heads=every, trials=4)
        made = function_vector._trials(model, tokenizer, pairs, 10, 4, "rejected", "\n\n", 0)
        # The heads of a block together are what its attention adds, but for the bias.
        points = [HookPoint(layer, "attn_out") for layer in range(LAYERS)]
        total = torch.zeros(WIDTH)
        for trial in made:
            with torch.no_grad(), capture(model, points) as found:
                model(torch.tensor([trial.clean]))
            for point in points:
                bias = model.transformer.h[point.layer].attn.c_proj.bias
                total += (found[point][0, -1] - bias) / 4
        torch.testing.assert_close(part.vector, total, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("arch", ["llama", "gpt2"])
    def test_a_heads_effect_is_that_of_writing_its_mean_at_the_last_token(self, arch: str) -> None:
        model, tokenizer, pairs = tiny_model(arch), tiny_tokenizer(), tiny_pairs(16)
        made = function_vector._trials(model, tokenizer, pairs, 3, 3, "rejected", "\n\n", 0)
        mean = torch.randn(8, generator=torch.Generator().manual_seed(0))
        (effect,) = function_vector.indirect_effects(model, {COPIES: mean}, made, 2).values()
        expected = 0.0
        for trial in made:
            # By hand: what W_O makes of the change is what the half's output changes by.
            ids = torch.tensor([trial.corrupted])
            half = HookPoint(COPIES.layer, "attn_out")
            with torch.no_grad(), capture(model, [COPIES]) as found:
                before = model(ids).logits[0, -1].softmax(-1)[trial.answer]
            change = output_weight(model, COPIES) @ (mean - found[COPIES][0, -1])
            place = len(trial.corrupted) - 1
            where = Positions(spans=((place, place + 1),))
            with torch.no_grad(), steer(model, Add(change, 1.0, half, where=where)):
                after = model(ids).logits[0, -1].softmax(-1)[trial.answer]
            expected += float(after - before) / len(made)
        assert effect == pytest.approx(expected, rel=1e-3, abs=1e-7)

    def test_wrong_demonstrations(self) -> None:
        model, tokenizer, pairs = tiny_model(), tiny_tokenizer(), tiny_pairs(8)
        for corrupt in ("rejected", "shuffled"):
            for trial in function_vector._trials(model, tokenizer, pairs, 4, 6, corrupt, ".", 0):
                assert len(trial.clean) == len(trial.corrupted)
                assert trial.clean != trial.corrupted
                assert trial.shots == 4
                words = tokenizer.decode(trial.corrupted)
                assert ("sea" in words or "boat" in words) == (corrupt == "shuffled")

    def test_as_many_demonstrations_as_the_contexts_hold(self) -> None:
        model, tokenizer = tiny_model(max_position_embeddings=20), tiny_tokenizer()
        pairs = tiny_pairs(8)
        (part,) = function_vector.fit(model, tokenizer, pairs, [POINT], trials=2)
        assert part.provenance["shots"] == 3
        model = tiny_model(max_position_embeddings=8)
        with pytest.raises(PairsError, match="too few for pair"):
            function_vector.fit(model, tokenizer, pairs, [POINT], trials=2)

    def test_pairs_that_it_can_do_nothing_with_are_refused(self) -> None:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        with pytest.raises(PairsError, match="one contrast pair"):
            function_vector.fit(model, tokenizer, tiny_pairs(1), [POINT])
        with pytest.raises(PairsError, match="neither is the other's beginning"):
            pairs = [Pair("the boy", " saw", " saw rain"), Pair("the girl", " saw rain", " saw")]
            function_vector.fit(model, tokenizer, pairs, [POINT])
        with pytest.raises(HookPointError, match="added to the stream"):
            function_vector.fit(model, tokenizer, tiny_pairs(4), [COPIES])
        with pytest.raises(PairsError, match="trials=0"):
            function_vector.fit(model, tokenizer, tiny_pairs(4), [POINT], trials=0)
