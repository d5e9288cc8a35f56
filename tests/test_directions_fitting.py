"""Fitting by name: reads, layers, batches, dtypes, noise and the cache."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from saesteer.core.hooks import capture, edit
from saesteer.core.model import HookPoint, load_model
from saesteer.directions import answers
from saesteer.directions.answers import answer_activations
from saesteer.directions.direction import Direction, Map
from saesteer.directions.fitting import FOLDS, fit_direction, fit_method, fit_reader
from saesteer.directions.groups import folds, groups_of
from saesteer.directions.methods import METHODS
from saesteer.directions.pairs import Pair
from saesteer.errors import ConfigError, HookPointError, PairsError
from saesteer.world import corpus
from tests.test_directions import some_pairs
from tests.tiny import LAYERS, WIDTH, tiny_model, tiny_tokenizer

POINT = HookPoint(1, "resid_post")
POINTS = [
    HookPoint(2, "resid_post"),
    HookPoint(0, "resid_pre"),
    HookPoint(1, "mlp_out"),
    HookPoint(1, "attn_out"),
    HookPoint(1, "head.2"),
    POINT,
]
AB = [Pair(f"the {word} : ", "the boy", "the girl") for word in ("sea", "sun", "old cat")]


@pytest.fixture(scope="module")
def told() -> tuple[Any, Any, list[Pair]]:
    """The embedded model, its tokenizer, and 64 pairs about the sea."""
    model, tokenizer = load_model("planted")
    return model, tokenizer, [Pair(**pair) for pair in corpus.pairs("sea", 64, 0)]


@pytest.fixture(scope="module")
def more(told: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Pair], Tensor, Path]:
    """128 other pairs about the sea, the mean difference of 256 further ones, and a cache."""
    model, tokenizer, _ = told
    pairs, others = ([Pair(**p) for p in corpus.pairs("sea", n, n)] for n in (128, 256))
    truth = fit_direction("mean-difference", model, tokenizer, others, POINT).vector
    return pairs, truth, tmp_path_factory.mktemp("cache")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of sequences with every batch that the model is run on."""
    found: list[int] = []
    plain = answers._read_batch

    def counted(read: Any, texts: Any) -> Any:
        found.append(len(texts))
        return plain(read, texts)

    monkeypatch.setattr(answers, "_read_batch", counted)
    return found


def row(model: Any, tokenizer: Any, text: str, column: int) -> Tensor:
    """The activation of one token of a text after BOS, without any batching."""
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    with torch.no_grad(), capture(model, [POINT]) as found:
        model(torch.tensor([ids]))
    return found[POINT][0, column]


def test_several_points_in_one_pass_equal_one_by_one(passes: list[int]) -> None:
    model, tokenizer, pairs = tiny_model("llama"), tiny_tokenizer(), some_pairs(33)
    together = answer_activations(model, tokenizer, pairs, POINTS, batch_size=100)
    assert len(passes) == 1
    assert list(together) == POINTS
    assert together[POINTS[4]][0].shape == (33, 8)
    for point in POINTS:
        alone = answer_activations(model, tokenizer, pairs, point, batch_size=100)
        assert torch.equal(together[point][0], alone[0])
        assert torch.equal(together[point][1], alone[1])


def test_which_token_is_read() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()

    def read(how: str, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
        return answer_activations(model, tokenizer, pairs, POINT, read=how)

    pair = Pair("the old sea", " saw the boy .", " saw the girl .")
    told = {
        "prompt-last": (3, 3),
        "answer-token": (6, 6),  # "saw the" is on both sides
        "answer-last": (7, 7),
        "after:the old": (3, 3),
        "after:sea": (4, 4),
        "after:the": (6, 6),  # the last one
        "after: saw the": (6, 6),
    }
    for how, columns in told.items():
        for side, answer, column in zip(
            read(how, [pair]), (pair.chosen, pair.rejected), columns, strict=True
        ):
            expected = row(model, tokenizer, pair.prompt + answer, column)
            torch.testing.assert_close(side[0], expected, rtol=1e-4, atol=1e-5)
    # Of answers that part at once, the first token.
    first = read("answer-token", [Pair("the", " sea sun", " sun")])[0][0]
    torch.testing.assert_close(first, row(model, tokenizer, "the sea", 2), rtol=1e-4, atol=1e-5)


def test_reads_that_find_nothing_are_refused() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()

    def read(how: str, pair: Pair) -> None:
        answer_activations(model, tokenizer, [AB[0], pair], POINT, read=how)

    with pytest.raises(PairsError, match="pair 2 has no prompt"):
        read("prompt-last", Pair("", "sea", "sun"))
    with pytest.raises(PairsError, match="pair 2 holds no ' : '"):
        read("after: : ", Pair("the", " sea", " sun"))
    with pytest.raises(PairsError, match="pair 2: nothing follows 'sea'"):
        read("after:sea", Pair("the sea :", " the sea", " the sea"))
    with pytest.raises(PairsError, match="pair 2: one answer begins with the whole other"):
        read("answer-token", Pair("the", " sea", " sea sun"))
    with pytest.raises(PairsError, match="unknown read 'after:'"):
        read("after:", AB[0])
    with pytest.raises(PairsError, match="no hook point"):
        answer_activations(model, tokenizer, AB, [])


def test_a_prompt_is_read_alike_on_both_sides_and_gives_no_direction() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    pairs = [Pair("the sea", " saw" * n, " sun") for n in range(1, 34)]
    chosen, rejected = answer_activations(model, tokenizer, pairs, POINT, read="prompt-last")
    assert torch.equal(chosen, rejected)
    with pytest.raises(PairsError, match="is for methods without a contrast"):
        fit_direction("mean-difference", model, tokenizer, pairs, POINT, read="prompt-last")
    for name in METHODS.keys() - {"ccs"}:  # which of them read where they are told to?
        takes = inspect.signature(METHODS[name].fit).parameters
        if METHODS[name].kind != "pairs-many" and (
            METHODS[name].kind != "model" or "read" in takes
        ):
            with pytest.raises(PairsError, match="'prompt-last': the two sides of a pair share"):
                fit_method(name, model, tokenizer, pairs, [POINT], read="prompt-last")
    with pytest.raises(PairsError, match="'prompt-last': the two sides of a pair share"):
        fit_reader("ccs", model, tokenizer, pairs, [POINT], read="prompt-last")
    # Both sides together are as good as the prompts.
    prompts = [Pair(f"the {word}", " sea", " sun") for word in ("boy", "girl", "cat", "dog")]
    parts = fit_method(
        "pca-activations", model, tokenizer, prompts * 8, [POINT], read="prompt-last"
    )
    assert parts[POINT]


def test_equal_texts_are_run_once(passes: list[int]) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    pairs = [Pair("the", f" {word}", " sun") for word in ("sea", "rain", "sea")]
    chosen, rejected = answer_activations(model, tokenizer, pairs, POINT)
    assert sum(passes) == 3
    assert torch.equal(chosen[0], chosen[2])
    assert not torch.equal(chosen[0], chosen[1])
    assert torch.equal(rejected[0], rejected[1])


def test_every_method_on_activations_fits_at_every_layer(told: Any, tmp_path: Path) -> None:
    model, tokenizer, pairs = told
    points = [HookPoint(layer, "resid_post") for layer in range(model.config.num_hidden_layers)]
    expected = {"pairs": 1, "map": 1, "pairs-many": 2}
    for one in METHODS.values():
        if one.kind in expected:
            found = fit_method(one.name, model, tokenizer, pairs, points, seed=3, cache=tmp_path)
            assert list(found) == points
            for point, parts in found.items():
                assert len(parts) == expected[one.kind]
                for part in parts:
                    assert isinstance(part, Map if one.kind == "map" else Direction)
                    facts = (part.point, part.method, part.n_pairs, part.read)
                    assert facts == (point, one.name, 64, "answer-mean")
                    assert part.use.how == ("map" if one.kind == "map" else "add")
                    assert part.provenance["seed"] == 3


def test_how_well_a_direction_reads_is_told(told: Any) -> None:
    model, tokenizer, pairs = told

    def reads(name: str, pairs: list[Pair] = pairs) -> float:
        found = fit_direction(name, model, tokenizer, pairs, POINT)
        return float(found.provenance["held_out_auroc"])

    assert reads("logistic-probe") > 0.9
    assert reads("mean-difference") > 0.9
    assert 0.2 < reads("random") < 0.8
    # Sides that say the same can't be told apart but where they are fitted.
    other = [
        Pair(pair.prompt, pair.rejected, another["rejected"])
        for pair, another in zip(pairs, corpus.pairs("sea", 64, 1), strict=True)
    ]
    assert 0.2 < reads("logistic-probe", other) < 0.8


def test_the_auroc_is_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a method that looks at no pair, so that every part is scored alike."""
    model, tokenizer, pairs = tiny_model("llama"), tiny_tokenizer(), some_pairs(50)
    line = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)).round()
    monkeypatch.setattr("saesteer.directions.lat.fit", lambda chosen, rejected, *, seed: line)
    chosen, rejected = (x.round() for x in answer_activations(model, tokenizer, pairs, POINT))
    monkeypatch.setattr(
        "saesteer.directions.fitting.answer_activations",
        lambda *_, **__: {POINT: (chosen, rejected)},
    )
    found = fit_direction("lat", model, tokenizer, pairs, POINT).provenance["held_out_auroc"]
    count, own = folds(groups_of(pairs), FOLDS, np.random.default_rng([0, 2]))
    assert count == FOLDS
    fold = torch.from_numpy(own)
    parts = [(chosen[fold == k] @ line, rejected[fold == k] @ line) for k in range(FOLDS)]
    expected = [
        roc_auc_score([1] * len(part[0]) + [0] * len(part[0]), torch.cat(part).numpy())
        for part in parts
    ]
    assert found == pytest.approx(np.mean(expected))


def test_a_direction_says_where_its_sides_lie(told: Any) -> None:
    model, tokenizer, pairs = told
    found = fit_direction("mean-difference", model, tokenizer, pairs, POINT)
    apart = found.provenance["chosen_mean"] - found.provenance["rejected_mean"]
    assert apart == pytest.approx(float(found.vector.norm()), rel=1e-4)


def test_ccs_reads_and_makes_nothing_to_steer_with(told: Any) -> None:
    model, tokenizer, pairs = told
    reader, auroc = fit_reader("ccs", model, tokenizer, pairs, [POINT], steps=100, starts=2)[POINT]
    chosen, rejected = answer_activations(model, tokenizer, pairs, POINT)
    assert reader.score(chosen).mean() > reader.score(rejected).mean()
    assert auroc is not None
    assert 0 <= auroc <= 1
    with pytest.raises(ConfigError, match="ccs only reads"):
        fit_method("ccs", model, tokenizer, pairs, [POINT])
    with pytest.raises(ConfigError, match="lat is no reader"):
        fit_reader("lat", model, tokenizer, pairs, [POINT])


# Under 10 % a probe falls further: what it needs a few labels to be right for is what it overfits.
@pytest.mark.parametrize(
    ("name", "kept"), [("mean-difference", 0.8), ("lat", 0.8), ("logistic-probe", 0.3)]
)
def test_wrong_labels_wear_a_direction_down_little_by_little(
    name: str, kept: float, told: Any, more: tuple[list[Pair], Tensor, Path]
) -> None:
    model, tokenizer, _ = told
    pairs, truth, cache = more
    means = []
    for noise in (0.0, 0.1, 0.25, 0.5):
        found = [
            fit_direction(name, model, tokenizer, pairs, POINT, noise=noise, seed=seed, cache=cache)
            for seed in range(3)
        ]
        assert all(one.provenance["noise"] == noise for one in found)
        cosines = [torch.cosine_similarity(one.vector, truth, dim=0) for one in found]
        means.append(float(torch.stack(cosines).mean()))
    assert means == sorted(means, reverse=True)
    assert means[0] > 0.5
    assert means[1] > kept * means[0]
    assert means[3] < 0.7 * means[0]


def test_noise_swaps_that_share_of_the_pairs_and_all_of_it_turns_round(told: Any) -> None:
    model, tokenizer, pairs = told
    plain = fit_direction("mean-difference", model, tokenizer, pairs, POINT).vector
    turned = fit_direction("mean-difference", model, tokenizer, pairs, POINT, noise=1.0).vector
    torch.testing.assert_close(turned, -plain)
    quarter = fit_direction("mean-difference", model, tokenizer, pairs, POINT, noise=0.25).vector
    chosen, rejected = answer_activations(model, tokenizer, pairs, POINT)
    # v − v' = 2/n · the sum over the 16 swapped pairs, which a least squares on all 64 finds.
    gap = (plain - quarter).double() * 64 / 2
    best = torch.linalg.lstsq((chosen - rejected).double().T, gap[:, None]).solution
    assert best.sum() == pytest.approx(16, abs=3)
    with pytest.raises(ConfigError, match=r"noise=1\.5"):
        fit_direction("mean-difference", model, tokenizer, pairs, POINT, noise=1.5)


def test_options_are_the_methods_own() -> None:
    model, tokenizer, pairs = tiny_model("llama"), tiny_tokenizer(), some_pairs(33)
    parts = fit_method("pca-activations", model, tokenizer, pairs, [POINT], components=3)[POINT]
    assert len(parts) == 6
    assert parts[0].provenance["options"] == {"components": 3}
    with pytest.raises(ConfigError, match=r"'centre' .did you mean 'centred'"):
        fit_method("lat", model, tokenizer, pairs, [POINT], centre=True)
    with pytest.raises(ConfigError, match="it has none"):
        fit_method("mean-difference", model, tokenizer, pairs, [POINT], components=3)
    with pytest.raises(ConfigError, match="gives 2 parts"):
        fit_direction("pca-activations", model, tokenizer, pairs, POINT)
    with pytest.raises(HookPointError, match=f"{LAYERS} blocks"):
        fit_method("lat", model, tokenizer, pairs, [HookPoint(9, "resid_post")])


def test_methods_that_run_the_model_are_handed_what_they_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a stand-in, since each of them has tests of its own."""
    seen: dict[str, Any] = {}

    def of_pairs(
        model: Any, tokenizer: Any, pairs: Any, points: Any, *, seed: int = 0, read: str = "x",
        radius: float = 1.0,
    ) -> list[Direction]:  # fmt: skip
        seen.update(pairs=pairs, read=read, radius=radius, seed=seed)
        points = [points[0], HookPoint(2, "head.1"), points[0]]
        return [Direction(torch.ones(2), p, "icv", len(pairs), read, "f", {"k": 1}) for p in points]

    def of_prompts(
        model: Any, tokenizer: Any, prompts: Any, points: Any, *, seed: int = 0
    ) -> list[Direction]:
        seen.update(prompts=prompts)
        return []

    monkeypatch.setattr("saesteer.directions.icv.fit", of_pairs)
    monkeypatch.setattr("saesteer.directions.melbo.fit", of_prompts)
    found = fit_method("icv", None, None, AB, [POINT], radius=2.0, seed=5, noise=1.0)  # type: ignore[arg-type]
    assert seen["read"] == "x"
    assert (seen["radius"], seen["seed"]) == (2.0, 5)
    assert seen["pairs"] == [Pair(p.prompt, p.rejected, p.chosen) for p in AB]
    assert [len(parts) for parts in found.values()] == [2, 1]
    assert found[POINT][0].provenance == {
        "seed": 5, "noise": 1.0, "options": {"radius": 2.0}, "k": 1
    }  # fmt: skip
    fit_method("icv", None, None, AB, [POINT], read="answer-last")  # type: ignore[arg-type]
    assert seen["read"] == "answer-last"
    fit_method("melbo", None, None, AB, [POINT])  # type: ignore[arg-type]
    assert seen["prompts"] == [pair.prompt for pair in AB]
    with pytest.raises(ConfigError, match=r"no option 'radios' .did you mean 'radius'"):
        fit_method("icv", None, None, AB, [POINT], radios=2.0)  # type: ignore[arg-type]


def test_the_cache_is_used_the_second_time(tmp_path: Path, passes: list[int]) -> None:
    model, tokenizer, pairs = tiny_model("llama"), tiny_tokenizer(), some_pairs(33)
    plain = answer_activations(model, tokenizer, pairs, POINTS)
    passes.clear()
    first = answer_activations(model, tokenizer, pairs, POINTS, cache=tmp_path)
    assert sum(passes) > 0
    passes.clear()
    again = answer_activations(tiny_model("llama"), tokenizer, pairs, POINTS, cache=tmp_path)
    one = answer_activations(model, tokenizer, pairs, POINT, cache=tmp_path, batch_size=3)
    fit_method("lat", model, tokenizer, pairs, POINTS, cache=tmp_path)
    assert passes == []
    for point in POINTS:
        for side in (0, 1):
            assert torch.equal(plain[point][side], first[point][side])
            assert torch.equal(plain[point][side], again[point][side])
    assert torch.equal(one[0], plain[POINT][0])
    assert list(again) == POINTS


def test_anything_else_misses_the_cache(tmp_path: Path, passes: list[int]) -> None:
    model, tokenizer, pairs = tiny_model("llama"), tiny_tokenizer(), some_pairs(4)

    def run(model: Any = model, pairs: Any = pairs, point: HookPoint = POINT, **how: Any) -> int:
        passes.clear()
        answer_activations(model, tokenizer, pairs, point, cache=tmp_path, **how)
        return sum(passes)

    assert run() > 0
    assert run() == 0
    larger = tiny_model("llama")
    larger.get_output_embeddings().weight.mul_(2)  # the fingerprint sees signs alone
    turned = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    others = {
        "model": {"model": tiny_model("llama", seed=1)},
        "size": {"model": larger},
        "configuration": {"model": turned},
        "dtype": {"model": tiny_model("llama").bfloat16()},
        "pairs": {"pairs": pairs[:3]},
        "order": {"pairs": pairs[::-1]},
        "read": {"read": "answer-last"},
        "point": {"point": HookPoint(2, "resid_post")},
    }
    for name, other in others.items():
        assert run(**other) > 0, name
        assert run(**other) == 0, name
    assert run() == 0


def test_a_damaged_cache_file_is_made_again(tmp_path: Path, passes: list[int]) -> None:
    model, tokenizer, pairs = tiny_model("llama"), tiny_tokenizer(), some_pairs(4)
    plain = answer_activations(model, tokenizer, pairs, POINT, cache=tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    for damaged in (b"", whole[:40], whole[:-4], b"x" * len(whole)):
        path.write_bytes(damaged)
        passes.clear()
        found = answer_activations(model, tokenizer, pairs, POINT, cache=tmp_path)
        assert sum(passes) > 0
        assert torch.equal(found[0], plain[0])
        assert path.read_bytes() == whole


def test_edited_activations_are_not_cached(tmp_path: Path, passes: list[int]) -> None:
    model, tokenizer, pairs = tiny_model("llama"), tiny_tokenizer(), some_pairs(4)
    plain = answer_activations(model, tokenizer, pairs, POINT, cache=tmp_path)[0]
    with edit(model, {HookPoint(0, "resid_post"): lambda x, tokens: x + 1}):
        edited = answer_activations(model, tokenizer, pairs, POINT, cache=tmp_path)[0]
    assert not torch.allclose(plain, edited)
    passes.clear()
    assert torch.equal(answer_activations(model, tokenizer, pairs, POINT, cache=tmp_path)[0], plain)
    assert passes == []


def test_the_leace_library_is_imported_without_its_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        METHODS["leace"].fit(torch.eye(4), torch.zeros(4, 4))


def test_widths() -> None:
    model, tokenizer, pairs = tiny_model("gpt2"), tiny_tokenizer(), some_pairs(33)
    found = fit_method("lat", model, tokenizer, pairs, POINTS)
    assert [len(parts[0].vector) for parts in found.values()] == [WIDTH] * 4 + [8, WIDTH]  # type: ignore[union-attr]
