"""Methods that run the model: activation addition, projection, ablation, in-context vectors."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from saesteer.core.hooks import capture
from saesteer.core.model import HookPoint, fingerprint
from saesteer.directions import ablate, act_add, icv, refusal
from saesteer.directions.answers import answer_activations
from saesteer.directions.pairs import Pair
from saesteer.effects.apply import edits
from saesteer.errors import HookPointError, NothingSteeredError, PairsError
from saesteer.steering.bake import ablation_everywhere, bake
from saesteer.steering.bake_changes import writes
from saesteer.steering.engine import steer
from tests.some_pairs import tiny_pairs
from tests.tiny import BOS, LAYERS, WIDTH, random_ids, tiny_model, tiny_tokenizer

PRE, POINT = HookPoint(1, "resid_pre"), HookPoint(1, "resid_post")
EVERY = [HookPoint(layer, "resid_post") for layer in range(LAYERS)]


def stream(model, ids, points, parts=(), strength=1.0):  # type: ignore[no-untyped-def]
    """Activations [seq, d] of one text at points, with directions on the model."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        if not parts:
            with capture(model, points) as found:
                model(ids)
        else:
            with steer(model, edits(parts, strength)), capture(model, points) as found:
                model(ids)
    return {point: x[0] for point, x in found.items()}


def marking_tokenizer(*, space: bool, marker: str = "▁") -> PreTrainedTokenizerFast:
    """Characters after a marker, as SentencePiece has them; space: " " is a token of its own."""
    vocab = {"<unk>": 0, "<bos>": BOS, marker: 4, "a": 5, "b": 6} | ({" ": 7} if space else {})
    inner = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    steps = [normalizers.Prepend(marker)]
    if not space:
        steps.append(normalizers.Replace(" ", marker))
    inner.normalizer = normalizers.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<bos>")


class TestActAdd:
    def test_is_the_difference_at_each_place_from_where_the_sides_part(self) -> None:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        pair = Pair("the boy", " saw rain then", " liked sun then")
        found = act_add.fit(model, tokenizer, [pair], [PRE])
        plus, minus = (
            [BOS, *tokenizer.encode(text, add_special_tokens=False)]
            for text in ("the boy saw rain then", "the boy liked sun then")
        )
        expected = stream(model, plus, [PRE])[PRE] - stream(model, minus, [PRE])[PRE]
        assert [part.use.position for part in found] == [2, 3, 4]
        for part in found:
            assert part.use.where == "prompt"
            torch.testing.assert_close(part.vector, expected[part.use.position + 1])
        # The places before are left out because nothing differs there.
        assert expected[:3].abs().max() < 1e-6

    def test_edits_the_prompts_own_places_and_nothing_that_is_generated(self) -> None:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        found = act_add.fit(model, tokenizer, [Pair("", "rain then", "sun then")], [PRE])
        ids = torch.cat([torch.tensor([[BOS]]), random_ids(1, 5)], 1)
        passes = []
        model.generation_config.eos_token_id = None
        with (
            torch.no_grad(),
            steer(model, edits(found, 4.0)),
            capture(model, [PRE, HookPoint(0, "resid_post")]) as seen,
        ):
            hook = model.register_forward_hook(lambda *_: passes.append(dict(seen)))
            model.generate(ids, max_new_tokens=4, do_sample=False)
            hook.remove()
        assert len(passes) == 4
        # What leaves block 0 enters block 1: the edit is the difference between the two.
        changes = [(p[PRE] - p[HookPoint(0, "resid_post")])[0] for p in passes]
        for part in found:
            place = part.use.position + 1
            torch.testing.assert_close(changes[0][place], 4 * part.vector, rtol=1e-4, atol=1e-4)
        assert changes[0][0].abs().max() == 0
        assert changes[0][1 + len(found) :].abs().max() == 0
        for later in changes[1:]:
            assert later.shape == (1, WIDTH)
            assert later.abs().max() == 0

    def test_the_shorter_side_is_filled_up_with_spaces(self) -> None:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        pair = Pair("", "rain then was calm", "sun")
        with pytest.raises(PairsError, match="no token for a space"):
            act_add.fit(model, tokenizer, [pair], [PRE])
        # As tokenizers of bytes have it: " " is a token.
        encode, space = tokenizer.encode, 77
        object.__setattr__(
            tokenizer, "encode", lambda text, **how: [space] if text == " " else encode(text, **how)
        )
        found = act_add.fit(model, tokenizer, [pair], [PRE])
        plus = [BOS, *encode("rain then was calm", add_special_tokens=False)]
        minus = [BOS, *encode("sun", add_special_tokens=False), space, space, space]
        expected = stream(model, plus, [PRE])[PRE] - stream(model, minus, [PRE])[PRE]
        torch.testing.assert_close(torch.stack([part.vector for part in found]), expected[1:])

    @pytest.mark.parametrize(
        "its_own", [False, True], ids=["the marker twice", "a token of its own"]
    )
    def test_a_lone_space_after_a_llama_like_marker_is_a_space(self, its_own: bool) -> None:
        tokenizer = marking_tokenizer(space=its_own)
        assert len(tokenizer.encode(" ", add_special_tokens=False)) == 2
        space = tokenizer.convert_tokens_to_ids(" " if its_own else "▁")
        model = tiny_model()
        (*_, last) = found = act_add.fit(model, tokenizer, [Pair("", "a b a b", "a")], [PRE])
        plus, minus = (
            [BOS, *tokenizer.encode(t, add_special_tokens=False)] for t in ("a b a b", "a")
        )
        minus += [space] * (len(plus) - len(minus))
        expected = stream(model, plus, [PRE])[PRE] - stream(model, minus, [PRE])[PRE]
        assert last.use.position == len(plus) - 2
        torch.testing.assert_close(torch.stack([part.vector for part in found]), expected[4:])

    def test_a_space_that_is_other_tokens_is_refused(self) -> None:
        tokenizer = marking_tokenizer(space=True, marker="_")
        assert len(tokenizer.encode(" ", add_special_tokens=False)) == 2
        with pytest.raises(PairsError, match="no token for a space"):
            act_add.fit(tiny_model(), tokenizer, [Pair("", "a b a b", "a")], [PRE])

    def test_without_bos_places_count_from_the_first_token(self) -> None:
        model, tokenizer = tiny_model(), tiny_tokenizer(bos=False)
        found = act_add.fit(model, tokenizer, [Pair("", "rain then", "sun then")], [PRE])
        assert [part.use.position for part in found] == [0, 1]
        ids = random_ids(1, 4)[0].tolist()
        plain, steered = stream(model, ids, [PRE])[PRE], stream(model, ids, [PRE], found)[PRE]
        expected = torch.stack([*[part.vector for part in found], *torch.zeros(2, WIDTH)])
        torch.testing.assert_close(steered - plain, expected, rtol=1e-4, atol=1e-5)

    def test_places_beyond_a_short_prompt_are_left_out(self) -> None:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        pair = Pair("the", " rain then was calm", " sun then was old")
        found = act_add.fit(model, tokenizer, [pair], [PRE])
        assert [part.use.position for part in found] == [1, 2, 3, 4]
        ids = torch.cat([torch.full((2, 1), BOS), random_ids(2, 7)], 1)
        mask = torch.ones_like(ids)
        ids[1, 4:] = mask[1, 4:] = 0  # BOS and 3 tokens, the last two of which have a place
        seen = []
        for parts in ([], edits(found)):
            with torch.no_grad(), steer(model, parts) if parts else nullcontext():
                with capture(model, [PRE]) as x:
                    model(ids, attention_mask=mask)
                seen.append(x[PRE])
        moved = seen[1] - seen[0]
        vectors = torch.stack([part.vector for part in found])
        torch.testing.assert_close(moved[0, 2:6], vectors, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moved[1, 2:4], vectors[:2], rtol=1e-4, atol=1e-5)
        moved[0, 2:6] = moved[1, 2:] = 0
        assert moved.abs().max() == 0
        # Where none of its places is there, nothing would be steered at all.
        with pytest.raises(NothingSteeredError, match="touched no token in any row"):
            stream(model, [BOS, 9], [PRE], found)

    def test_what_it_is_not_for_is_refused(self) -> None:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        pair = Pair("", "rain", "sun")
        with pytest.raises(PairsError, match="takes one pair and was given 2"):
            act_add.fit(model, tokenizer, [pair, pair], [PRE])
        with pytest.raises(HookPointError, match=r"use layers\.2\.resid_pre"):
            act_add.fit(model, tokenizer, [pair], [POINT])
        with pytest.raises(PairsError, match="same tokens"):
            act_add.fit(model, tokenizer, [Pair("", "rain", "rain ")], [PRE])


@pytest.mark.parametrize("points", [[POINT], EVERY], ids=["one layer", "all layers"])
def test_refusal_projection_puts_every_token_at_the_chosen_sides_mean(
    points: list[HookPoint],
) -> None:
    model, tokenizer, pairs = tiny_model(), tiny_tokenizer(), tiny_pairs(32)
    parts = refusal.fit(model, tokenizer, pairs, points)
    ids = random_ids(1, 9)[0].tolist()
    plain, steered = stream(model, ids, points), stream(model, ids, points, parts)
    assert [part.point for part in parts] == points
    for part in parts:
        chosen, rejected = answer_activations(model, tokenizer, pairs, part.point)
        torch.testing.assert_close(part.vector, (chosen - rejected).mean(0))
        unit = part.vector / part.vector.norm()
        assert part.use.to == pytest.approx(float((chosen @ unit).mean()), rel=1e-4)
        on = steered[part.point] @ unit
        torch.testing.assert_close(on, torch.full_like(on, part.use.to), rtol=1e-4, atol=1e-4)
        assert (plain[part.point] @ unit - on).abs().max() > 0.1
    # Of the first of the points, where nothing before it was edited, the rest stays.
    unit = parts[0].vector / parts[0].vector.norm()
    moved = steered[points[0]] - plain[points[0]]
    torch.testing.assert_close(
        moved - (moved @ unit)[:, None] * unit, torch.zeros_like(moved), rtol=0, atol=1e-5
    )


def test_refusal_projection_cannot_be_read_where_the_sides_are_the_same() -> None:
    with pytest.raises(PairsError, match="'prompt-last': the two sides of a pair share"):
        refusal.fit(tiny_model(), tiny_tokenizer(), tiny_pairs(32), [POINT], read="prompt-last")


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_ablation_equals_orthogonalised_weights_loaded_again(arch: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = tiny_model(arch), tiny_tokenizer()
    (part,) = ablate.fit(model, tokenizer, tiny_pairs(32), [POINT])
    assert ablate.writes(model) == writes(model)
    baked = bake(model, edits(part), tmp_path / "ablated")
    copy = AutoModelForCausalLM.from_pretrained(baked.folder).eval()
    ids = torch.cat([torch.full((3, 1), BOS), random_ids(3, 12)], 1)
    with torch.no_grad():
        plain = model(ids).logits
        with steer(model, edits(part)):
            steered = model(ids).logits
        torch.testing.assert_close(copy(ids).logits, steered, rtol=1e-4, atol=1e-4)
        with steer(model, ablation_everywhere(model, part.vector)):
            assert torch.equal(model(ids).logits, steered)
    assert (plain - steered).abs().max() > 0.05
    unit = part.vector / part.vector.norm()
    for x in stream(model, ids[0].tolist(), EVERY, [part]).values():
        assert (x @ unit).abs().max() < 1e-4


def test_a_heads_direction_is_not_one_of_the_stream() -> None:
    with pytest.raises(HookPointError, match="only a direction of the stream"):
        ablate.fit(tiny_model(), tiny_tokenizer(), tiny_pairs(32), [HookPoint(1, "head.0")])


class TestIcv:
    def test_is_the_first_component_and_the_mean_over_all_layers(self) -> None:
        model, tokenizer, pairs = tiny_model(), tiny_tokenizer(), tiny_pairs(5)
        parts = icv.fit(model, tokenizer, pairs, EVERY)
        read = answer_activations(model, tokenizer, pairs, EVERY, read="answer-last")
        long = torch.cat([read[p][0] - read[p][1] for p in EVERY], 1).double()
        from sklearn.decomposition import PCA

        component = torch.from_numpy(PCA(1).fit(long.numpy()).components_[0])
        found = torch.cat([part.vector for part in parts]).double()
        rest = found - long.mean(0)
        assert float(rest.norm()) == pytest.approx(1, abs=1e-5)
        assert abs(float(rest @ component)) == pytest.approx(1, abs=1e-5)
        assert [str(part.point) for part in parts] == [f"layers.{i}.mlp_out" for i in range(LAYERS)]
        assert {part.use.how for part in parts} == {"icv"}

    def test_swapping_the_sides_turns_it_round(self) -> None:
        differences = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            icv.in_context_vectors(-differences), -icv.in_context_vectors(differences)
        )

    def test_of_one_pair_or_equal_ones_it_is_the_difference(self) -> None:
        one = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
        for same in (one, one.expand(4, 3, 8)):
            torch.testing.assert_close(icv.in_context_vectors(same), one[0])


def test_they_say_where_they_come_from() -> None:
    model, tokenizer, pairs = tiny_model(), tiny_tokenizer(), tiny_pairs(32)
    for method, module in (("refusal-projection", refusal), ("ablate", ablate), ("icv", icv)):
        (part,) = module.fit(model, tokenizer, pairs, [POINT])
        assert (part.method, part.n_pairs) == (method, 32)
        assert part.model_fingerprint == fingerprint(model)
