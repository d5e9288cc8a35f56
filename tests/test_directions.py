"""Mean difference: equal to the difference of means, whatever the batching."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from saesteer.core.hooks import capture
from saesteer.core.model import HookPoint, fingerprint
from saesteer.directions import Direction, mean_difference
from saesteer.directions.answers import answer_activations, side_tokens
from saesteer.directions.fitting import fit_direction
from saesteer.directions.pairs import Pair
from saesteer.errors import HookPointError, PairsError, RunError, SteeringError
from tests.tiny import BOS, EOS, PAD, VOCAB, WIDTH, tiny_model, tiny_tokenizer

POINT = HookPoint(1, "resid_post")
WORDS = [
    "sea",
    "ship",
    "boat",
    "sail",
    "fish",
    "wave",
    "storm",
    "rain",
    "sun",
    "wind",
    "cloud",
    "sand",
    "music",
    "song",
    "drum",
]


def fit(*given: Any, **how: Any) -> Direction:
    """The mean difference of a model, a tokenizer and pairs, at a point."""
    return fit_direction("mean-difference", *given, **how)


def some_pairs(n: int, *, seed: int = 0) -> list[Pair]:
    """Prompts and answers of many lengths."""
    rng = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=rng))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=rng))

    return [Pair(words(0, 6), f" {words(1, 7)}", f" {words(1, 7)} .") for _ in range(n)]


def one_at_a_time(model, tokenizer, pairs, point, read):  # type: ignore[no-untyped-def]
    """The mean difference with one forward pass a side and no padding."""
    differences = []
    for pair in pairs:
        means = []
        for answer in (pair.chosen, pair.rejected):
            prompt = [BOS, *tokenizer.encode(pair.prompt, add_special_tokens=False)]
            own = tokenizer.encode(answer, add_special_tokens=False)
            with torch.no_grad(), capture(model, [point]) as found:
                model(torch.tensor([prompt + own]))
            x = found[point][0, len(prompt) :].double()
            means.append(x.mean(0) if read == "answer-mean" else x[-1])
        differences.append(means[0] - means[1])
    return torch.stack(differences).mean(0).float()


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("read", ["answer-mean", "answer-last"])
def test_equals_the_difference_of_means_taken_one_at_a_time(arch: str, read: str) -> None:
    model, tokenizer, pairs = tiny_model(arch), tiny_tokenizer(), some_pairs(33)
    direction = fit(model, tokenizer, pairs, POINT, read=read, batch_size=7)
    expected = one_at_a_time(model, tokenizer, pairs, POINT, read)
    torch.testing.assert_close(direction.vector, expected, rtol=1e-4, atol=1e-5)
    assert direction.vector.norm() > 0.01
    assert (direction.method, direction.n_pairs, direction.read) == ("mean-difference", 33, read)
    assert direction.point == POINT
    assert direction.model_fingerprint == fingerprint(model)


@pytest.mark.parametrize("site", ["resid_pre", "mlp_out", "attn_out"])
def test_other_sites(site: str) -> None:
    model, tokenizer, pairs = tiny_model("llama"), tiny_tokenizer(), some_pairs(32)
    point = HookPoint(2, site)
    expected = one_at_a_time(model, tokenizer, pairs, point, "answer-mean")
    direction = fit(model, tokenizer, pairs, point)
    torch.testing.assert_close(direction.vector, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    model, tokenizer, pairs = tiny_model("llama"), tiny_tokenizer(), some_pairs(40)
    one = fit(model, tokenizer, pairs, POINT, batch_size=batch_size)
    other = fit(model, tokenizer, pairs, POINT, batch_size=16)
    torch.testing.assert_close(one.vector, other.vector, rtol=0, atol=1e-5)


def test_swapping_the_sides_turns_it_round() -> None:
    model, tokenizer, pairs = tiny_model("llama"), tiny_tokenizer(), some_pairs(32)
    swapped = [Pair(p.prompt, p.rejected, p.chosen) for p in pairs]
    one, other = fit(model, tokenizer, pairs, POINT), fit(model, tokenizer, swapped, POINT)
    torch.testing.assert_close(one.vector, -other.vector)


def test_the_direction_settles_as_pairs_are_added() -> None:
    """On activations with a planted shift, cos(v_n, v_all) rises with n, towards the shift."""
    rng = torch.Generator().manual_seed(0)
    n, d = 512, 64
    shift = torch.nn.functional.normalize(torch.randn(d, generator=rng), dim=0)
    rejected = torch.randn(n, d, generator=rng)
    chosen = torch.randn(n, d, generator=rng) + 1.5 * shift
    sizes = (1, 8, 32, 128, 512)
    curve = [mean_difference.fit(chosen[:size], rejected[:size]) for size in sizes]
    to_all = [torch.cosine_similarity(v, curve[-1], dim=0).item() for v in curve]
    assert to_all == sorted(to_all)
    assert to_all[0] < 0.4
    assert to_all[3] > 0.8
    assert torch.cosine_similarity(curve[-1], shift, dim=0) > 0.9


def test_few_pairs_are_warned_of() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.warns(UserWarning, match="under 32"):
        assert fit(model, tokenizer, some_pairs(8), POINT).n_pairs == 8


def test_special_tokens_of_an_answer_are_not_read() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    plain = [Pair("the boy", " saw sea", " saw sun")] * 32
    closed = [Pair("the boy", " saw sea <eos>", " saw sun <eos> <pad>")] * 32
    assert side_tokens(tokenizer, "", closed[0].rejected).ids[-2:] == [EOS, PAD]
    for read in ("answer-mean", "answer-last"):
        one = fit(model, tokenizer, plain, POINT, read=read)
        other = fit(model, tokenizer, closed, POINT, read=read)
        torch.testing.assert_close(one.vector, other.vector)


def test_bos_is_put_first_once_and_only_where_there_is_one() -> None:
    the, sea = tiny_tokenizer().convert_tokens_to_ids(["the", "sea"])
    assert side_tokens(tiny_tokenizer(), "the", " sea") == ([BOS, the, sea], 2)
    assert side_tokens(tiny_tokenizer(adds_bos=True), "the", " sea") == ([BOS, the, sea], 2)
    assert side_tokens(tiny_tokenizer(), "<bos> the", " sea") == ([BOS, the, sea], 2)
    assert side_tokens(tiny_tokenizer(), "", "sea") == ([BOS, sea], 1)
    assert side_tokens(tiny_tokenizer(bos=False), "the", " sea") == ([the, sea], 1)


def test_a_tokenizer_without_bos_or_pad() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(bos=False, pad=False, eos=False)
    pairs = [Pair("", " sea ship", " sun"), Pair("the boy saw", " rain", " cloud cloud cloud")]
    chosen, rejected = answer_activations(model, tokenizer, pairs, POINT)
    assert chosen.shape == rejected.shape == (2, WIDTH)
    assert chosen.isfinite().all()


def test_bad_arguments_are_refused() -> None:
    model, tokenizer, pairs = tiny_model("llama"), tiny_tokenizer(), some_pairs(32)
    with pytest.raises(HookPointError, match="3 blocks"):
        fit(model, tokenizer, pairs, HookPoint(9, "resid_post"))
    with pytest.raises(PairsError, match="did you mean 'answer-last'"):
        fit(model, tokenizer, pairs, POINT, read="answer-lst")
    with pytest.raises(PairsError, match="no contrast pairs"):
        fit(model, tokenizer, [], POINT)
    with pytest.raises(PairsError, match="batch_size 0"):
        fit(model, tokenizer, pairs, POINT, batch_size=0)
    with pytest.raises(PairsError, match="pair 2: '<eos>' has no tokens"):
        fit(model, tokenizer, [pairs[0], Pair("the", "<eos>", " sea")], POINT)
    with pytest.raises(PairsError, match="pair 1: 203 tokens, but the model's contexts hold 128"):
        fit(model, tokenizer, [Pair("the", " sea", " sun" * 201)], POINT)


def test_activations_that_are_not_finite_are_refused() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("sun")] = torch.nan
    pairs = [Pair("the", " sea", " rain"), Pair("the", " sea", " sun")]
    with pytest.raises(PairsError, match=r"pair 2: .* hold NaN"):
        answer_activations(model, tokenizer, pairs, POINT)


def test_the_model_is_left_as_it_was() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    ids = torch.arange(4, 12)[None]
    before = model(ids).logits
    fit(model, tokenizer, some_pairs(32), POINT)
    assert torch.equal(model(ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def a_direction() -> Direction:
    return Direction(
        torch.arange(5.0), POINT, "mean-difference", 128, "answer-mean", "f00d", {"file": "p.jsonl"}
    )


def test_a_saved_direction_comes_back(tmp_path: Path) -> None:
    a_direction().save(tmp_path / "deep" / "sea.safetensors")
    found = Direction.load(tmp_path / "deep" / "sea.safetensors", model_fingerprint="f00d")
    assert torch.equal(found.vector, torch.arange(5.0))
    assert {**vars(found), "vector": 0} == {**vars(a_direction()), "vector": 0}


def test_another_models_direction_is_refused_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "sea.safetensors"
    a_direction().save(path)
    with pytest.raises(SteeringError, match="was fitted on another model"):
        Direction.load(path, model_fingerprint="beef")
    assert Direction.load(path, model_fingerprint="beef", force=True).n_pairs == 128
    assert Direction.load(path).n_pairs == 128


def test_damaged_directions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sea.safetensors"
    with pytest.raises(SteeringError, match="there is no direction"):
        Direction.load(path)
    a_direction().save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(SteeringError, match="damaged"):
        Direction.load(path)
    save_file({"vector": torch.zeros(VOCAB)}, path)
    with pytest.raises(SteeringError, match="its format is None"):
        Direction.load(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError):
        a_direction().save(tmp_path / "folder")
