"""Output scores, against the same computed by hand, one feature at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.core.hooks import activations
from saesteer.core.points import HookPoint
from saesteer.effects import output_score
from saesteer.effects.output_score import Output, output_scores, own_tokens, power
from saesteer.errors import FeatureError, SteeringError, TextError
from saesteer.features.records import Feature, TokenStat
from saesteer.steering.edits import Add, Clamp
from saesteer.steering.engine import steer
from tests.tiny import BOS, PAD, VOCAB, tiny_model, tiny_sae, tiny_tokenizer

PROMPTS = ("once upon a time", "the boy saw the big")
OWN = {3: [10, 11], 5: [20], 7: []}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def measured(model, tokenizer, sae, features, **changes) -> list[Output]:
    arguments = {
        "max_act": lambda feature: 0.0 if feature == 9 else 1.0 + feature / 10,
        "own_tokens": lambda feature: OWN.get(feature, [feature]),
        "prompts": PROMPTS,
        "amplification": 4.0,
    } | changes
    return list(output_scores(model, tokenizer, sae, features, **arguments))


def test_power_by_hand():
    # p = .5, .25, .125, .125: the best of tokens 1 and 2 is 1, with one token before it of four.
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert power(logits, torch.tensor([[2, 1]])).tolist() == pytest.approx([(1 - 1 / 4) * 0.25])
    assert power(logits, torch.tensor([[0, 3]])).tolist() == pytest.approx([0.5])
    # Of equals none ranks before another: two tokens before it, not three.
    assert power(logits, torch.tensor([[3, 3]])).tolist() == pytest.approx([(1 - 2 / 4) * 0.125])


@settings(derandomize=True, max_examples=50)
@given(st.lists(st.floats(-20, 20), min_size=4, max_size=12), st.floats(-5, 5), st.randoms())
def test_power_lies_between_0_and_1_and_knows_no_order_or_level(numbers, level, random):
    logits = torch.tensor([numbers], dtype=torch.float64)
    tokens = torch.tensor([[0, 2]])
    found = power(logits, tokens)
    assert 0 <= float(found) <= 1
    torch.testing.assert_close(power(logits + level, tokens), found, rtol=1e-6, atol=1e-12)
    order = list(range(len(numbers)))
    random.shuffle(order)
    moved = torch.tensor([[order.index(0), order.index(2)]])
    torch.testing.assert_close(power(logits[:, order], moved), found, rtol=1e-9, atol=0)


def test_the_whole_by_hand(model, tokenizer):
    """Plain hooks, a plain softmax, and the definition word by word."""
    sae = tiny_sae()
    (found,) = measured(model, tokenizer, sae, [3])
    d = sae.W_dec[3]
    norm, unembedding = model.model.norm.weight, model.lm_head.weight
    lens = (unembedding * norm) @ d
    lens[[0, 1, 2, 3]] = -torch.inf  # special tokens are never shown
    promoted = lens.topk(20).indices.tolist()

    def p_next(ids: list[int], change: torch.Tensor) -> np.ndarray:
        def add(_, __, output):
            output = output.clone()
            output[0, 1:] += change  # all but BOS
            return output

        hook = model.model.layers[1].register_forward_hook(add)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        hook.remove()
        return logits.softmax(-1).numpy()

    def definition(p: np.ndarray) -> float:
        best = max(promoted, key=lambda token: p[token])
        rank = sorted(range(VOCAB), key=lambda token: -p[token]).index(best)
        return (1 - rank / VOCAB) * p[best]

    scores, effects = [], []
    for text in PROMPTS:
        ids = [BOS, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        base = p_next(ids, torch.zeros_like(d))
        steered = p_next(ids, 4.0 * 1.3 * d)
        scores.append(definition(steered) - definition(base))
        effects.append(sum(steered[t] - base[t] for t in OWN[3]))
    assert found.score == pytest.approx(np.mean(scores), abs=1e-6)
    assert found.own == pytest.approx(np.mean(effects), abs=1e-6)
    assert abs(found.score) > 1e-3 and abs(found.own) > 1e-4  # there is something to compare


def test_many_at_once_are_one_after_the_other(model, tokenizer, monkeypatch):
    sae = tiny_sae()
    features = [5, 3, 9, 7, 60, 5]
    together = measured(model, tokenizer, sae, iter(features))
    monkeypatch.setattr(output_score, "_ROWS", 2)
    apart = measured(model, tokenizer, sae, features)
    assert [one.feature for one in together] == features == [one.feature for one in apart]
    for one, two in zip(together, apart, strict=True):
        assert one.score == pytest.approx(two.score, abs=1e-6)
        assert one.own == pytest.approx(two.own, abs=1e-6)
    assert together[0] == together[-1]


def test_what_cannot_be_told_is_none(model, tokenizer):
    dead, without = measured(model, tokenizer, tiny_sae(), [9, 7])
    assert dead == Output(9, None, None)
    assert without.score is not None and without.own is None


@pytest.mark.parametrize(
    "kind", ["plain", "layer_norm", "constant_norm_rescale", "rescale_acts_by_decoder_norm"]
)
def test_on_one_token_adding_is_a_clamp_to_that_much_more(model, tokenizer, kind):
    """Also where a unit of the feature is worth another vector on each token."""
    if kind == "plain":
        sae = tiny_sae()
    elif kind == "rescale_acts_by_decoder_norm":
        sae = tiny_sae("topk", rescale_acts_by_decoder_norm=True)
    else:
        sae = tiny_sae(normalize_activations=kind)
    row = [BOS, 10]
    x = activations(model, [sae.hook_point], torch.tensor([row]))[sae.hook_point][0, -1]
    for feature in (2, 5, 40):
        is_now = float(sae.activation(x, [feature])[0])
        with torch.no_grad():
            prompt = output_score._Prompt(model, tokenizer, sae, row, {BOS})
            found = prompt.steered([feature], [2.5])
            with steer(model, [Clamp(sae, feature, is_now + 2.5)]):
                logits = model(torch.tensor([row])).logits[:, -1]
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


def test_on_many_tokens_a_normalising_sae_adds_the_mean_of_what_each_is_worth(model, tokenizer):
    sae = tiny_sae(normalize_activations="constant_norm_rescale")
    row = [BOS, 10, 20, 30]
    x = activations(model, [sae.hook_point], torch.tensor([row]))[sae.hook_point][0, 1:]
    size = (x.norm(dim=-1) / x.shape[-1] ** 0.5).mean()
    with torch.no_grad():
        found = output_score._Prompt(model, tokenizer, sae, row, {BOS}).steered([4], [2.0])
        with steer(model, [Add(sae.W_dec[4], 2.0 * float(size), sae.hook_point)]):
            logits = model(torch.tensor([row])).logits[:, -1]
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


def test_the_model_and_its_steering_are_left_alone(model, tokenizer):
    ids = torch.tensor([[BOS, 10, 20]])
    before = model(ids).logits
    waiting = output_scores(
        model, tokenizer, tiny_sae(), [*range(64)] * 5, max_act=lambda _: 1.0,
        own_tokens=lambda _: [5], prompts=PROMPTS,
    )  # fmt: skip
    next(waiting)  # half done
    assert torch.equal(model(ids).logits, before)


def test_special_and_unused_tokens_are_not_promoted(tokenizer):
    """A direction that writes straight at BOS promotes other tokens, as far as is shown."""
    model = tiny_model(vocab_size=VOCAB + 8)  # 8 rows that the tokenizer doesn't know
    sae = tiny_sae()
    towards = model.lm_head.weight[[BOS, PAD, VOCAB + 3]].sum(0) / model.model.norm.weight
    sae.W_dec[4] = towards / towards.norm()
    (found,) = measured(model, tokenizer, sae, [4], amplification=50.0)
    assert found.score < 0.5  # were BOS among its tokens, it would be near 1


def test_own_tokens_are_those_that_tell_most():
    tokens = (
        TokenStat(1, " the", 0.5, 50, 1.5, 0.1),
        TokenStat(2, " sea", 0.2, 20, 90.0, 0.001),
        TokenStat(3, " wave", 0.25, 25, 4.0, 0.01),
        *(TokenStat(10 + i, "x", 0.001, 1, 2.5, 0.001) for i in range(30)),
    )
    feature = Feature(0, "", 0.5, 0.01, 1.0, 2.0, 100, 1.0, 1.0, tokens=tokens)
    found = own_tokens(feature)
    assert found[:2] == [2, 3] and len(found) == 20 and 1 not in found
    assert own_tokens(Feature(0, "", 0.5, 0.01, 1.0, 2.0, 100, 1.0, 1.0)) == []


def test_what_is_wrong_is_told(model, tokenizer):
    sae = tiny_sae()
    for error, changes in (
        (TextError, {"prompts": ()}),
        (TextError, {"prompts": ([BOS],)}),
        (TextError, {"prompts": ("the " * 200,)}),
        (SteeringError, {"amplification": 0}),
        (SteeringError, {"amplification": float("nan")}),
    ):
        with pytest.raises(error):
            measured(model, tokenizer, sae, [3], **changes)
    with pytest.raises(FeatureError):
        measured(model, tokenizer, sae, [64])


def test_settings_are_json_that_says_what_was_measured():
    assert output_score.settings(["a"], 2.0) == {"prompts": ["a"], "amplification": 2.0, "top": 20}


def test_points_elsewhere_are_measured_too(model, tokenizer):
    sae = tiny_sae(point=HookPoint(2, "mlp_out"))
    (found,) = measured(model, tokenizer, sae, [3])
    assert found.score is not None and np.isfinite(found.score)


def test_ids_past_the_tokenizers_are_no_tokens(model, tokenizer):
    """The unembedding is padded to a round number: its last rows promote nothing."""
    sae = tiny_sae()
    short = tiny_tokenizer()
    wide = tiny_model()
    wide.resize_token_embeddings(VOCAB + 8)
    with torch.no_grad():
        wide.lm_head.weight[:VOCAB] = model.lm_head.weight
        wide.model.embed_tokens.weight[:VOCAB] = model.model.embed_tokens.weight
        wide.lm_head.weight[VOCAB:] = 50 * sae.W_dec[3]
    assert len(short) == VOCAB
    (found,), (padded,) = measured(model, short, sae, [3]), measured(wide, short, sae, [3])
    # They take probability away from every token that the feature promotes.
    assert padded.score is not None and padded.score < 0 < found.score
