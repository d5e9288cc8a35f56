"""training/evaluate.py against dense recomputation, and SAEs whose figures are known."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saesteer.core.hooks import activations
from saesteer.core.model import HookPoint
from saesteer.core.sae import Conventions, Sae
from saesteer.core.shards import ContextBatch
from saesteer.errors import TrainingError
from saesteer.training import baselines
from saesteer.training import evaluate as evaluation
from saesteer.training.evaluate import evaluate, nearest_cosine
from tests.tiny import BOS, EOS, WIDTH, random_ids, tiny_model

POINT = HookPoint(1, "resid_post")
SPECIAL = frozenset({BOS, EOS})
CONTEXTS, SIZE = 6, 10


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    ids = random_ids(CONTEXTS, SIZE).numpy().astype(np.int32)
    ids[:, 0] = BOS
    ids[2, 5], ids[4, 3] = EOS, BOS  # a document ends within these
    return ids


def batches_of(model: Any, tokens: np.ndarray, size: int = 4) -> list[ContextBatch]:
    x = activations(model, [POINT], torch.from_numpy(tokens).long())[POINT]
    return [
        ContextBatch(tokens[i : i + size], np.zeros_like(tokens[i : i + size]), x[i : i + size], i)
        for i in range(0, len(tokens), size)
    ]


def sae_of(W_enc: Tensor, W_dec: Tensor, b_dec: Tensor, **changes: Any) -> Sae:
    values: dict[str, Any] = {
        "W_enc": W_enc,
        "b_enc": torch.zeros(W_enc.shape[1]),
        "W_dec": W_dec,
        "b_dec": b_dec,
        "architecture": "standard",
        "hook_point": POINT,
        "model_id": "tiny",
        "conventions": Conventions(apply_b_dec_to_input=False),
    }
    return Sae(**(values | changes))


def some_sae(**changes: Any) -> Sae:
    generator = torch.Generator().manual_seed(5)
    W_dec = torch.randn(48, WIDTH, generator=generator) * 0.2
    return sae_of(W_dec.T.clone(), W_dec, torch.randn(WIDTH, generator=generator) * 0.1, **changes)


def plain_rows(model: Any, tokens: np.ndarray) -> Tensor:
    x = activations(model, [POINT], torch.from_numpy(tokens).long())[POINT]
    return x[torch.from_numpy(~np.isin(tokens, list(SPECIAL)))]


@pytest.mark.parametrize("changes", [{}, {"architecture": "topk", "k": 6}], ids=["relu", "topk"])
def test_figures_agree_with_a_dense_recomputation(
    model: Any, tokens: np.ndarray, changes: dict[str, Any]
) -> None:
    sae = some_sae(**changes)
    figures = evaluate(model, sae, batches_of(model, tokens), special_ids=SPECIAL)
    x = plain_rows(model, tokens)
    pre = x @ sae.W_enc
    code = pre.relu()
    if sae.k:
        values, latents = pre.topk(sae.k, dim=-1)
        code = torch.zeros_like(pre).scatter(1, latents, values.relu())
    error = (x - (code @ sae.W_dec + sae.b_dec)).double()
    fvu = float(error.square().sum() / (x - x.mean(0)).double().square().sum())
    assert figures["fvu"] == pytest.approx(fvu, rel=1e-5)
    assert figures["explained_variance"] == pytest.approx(1 - fvu, abs=1e-5)
    assert figures["tokens"] == len(x) == CONTEXTS * SIZE - CONTEXTS - 2
    assert figures["l0"] == pytest.approx(float((code > 0).sum()) / len(x))
    density = (code > 0).double().mean(0)
    assert figures["density"] == pytest.approx(density.tolist())
    assert figures["dead_fraction"] == pytest.approx(float((density == 0).double().mean()))
    assert sum(figures["density_histogram"]["counts"]) == int((density > 0).sum())
    json.dumps(figures, allow_nan=False)


def by_hand(model: Any, tokens: np.ndarray, make: Any) -> tuple[float, float]:
    """Cross-entropy, and KL from the model itself, with activations replaced by a hook of our own,
    counted in a plain loop."""
    ids = torch.from_numpy(tokens).long()

    def hook(module: Any, args: Any, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        new = x.clone()
        for c in range(CONTEXTS):
            for p in range(SIZE):
                if tokens[c, p] not in SPECIAL:
                    new[c, p] = make(x[c, p])
        return new if isinstance(output, Tensor) else (new, *output[1:])

    handle = model.model.layers[POINT.layer].register_forward_hook(hook)
    try:
        logits = model(ids).logits
    finally:
        handle.remove()
    clean = model(ids).logits.double().log_softmax(-1)
    logits = logits.double().log_softmax(-1)
    losses, divergences = [], []
    for c in range(CONTEXTS):
        for p in range(SIZE - 1):
            if int(ids[c, p + 1]) not in SPECIAL:
                losses.append(-float(logits[c, p, ids[c, p + 1]]))
                each = clean[c, p].exp() * (clean[c, p] - logits[c, p])
                divergences.append(float(each.sum()))
    return sum(losses) / len(losses), sum(divergences) / len(divergences)


def test_losses_agree_with_a_splice_by_hand(model: Any, tokens: np.ndarray) -> None:
    sae = some_sae()
    figures = evaluate(model, sae, batches_of(model, tokens), special_ids=SPECIAL, batch_size=4)
    mean = plain_rows(model, tokens).mean(0)
    fitted = baselines.moments((x, x) for x in [plain_rows(model, tokens)])
    k = round(figures["l0"])
    random = baselines.random_dictionary(fitted, sae.d_sae, k, seed=0, at=POINT)
    pca = baselines.principal_components(fitted, k)
    others = figures["baselines"]
    ways = {
        "clean": (lambda x: x, figures["ce_clean"], 0.0),
        "reconstructed": (
            lambda x: sae.decode(sae.encode(x[None]), x[None])[0],
            figures["ce_reconstructed"],
            figures["kl"],
        ),
        "zero": (torch.zeros_like, figures["ce_zero"], figures["kl_zero"]),
        "mean": (lambda x: mean, figures["ce_mean"], figures["kl_mean"]),
        "random": (
            lambda x: random.decode(random.encode(x[None]), x[None])[0],
            others["random"]["ce_reconstructed"],
            others["random"]["kl"],
        ),
        "pca": (lambda x: pca(x[None])[0], others["pca"]["ce_reconstructed"], others["pca"]["kl"]),
    }
    for name, (make, *found) in ways.items():
        assert found == pytest.approx(by_hand(model, tokens, make), rel=1e-4, abs=1e-9), name
    assert figures["ce_tokens"] == figures["tokens"]  # each context's first token is BOS
    for kind, key in (("zero", "ce_recovered"), ("mean", "ce_recovered_mean")):
        worth = figures[f"ce_{kind}"] - figures["ce_clean"]
        if worth > 0:
            expected = (figures[f"ce_{kind}"] - figures["ce_reconstructed"]) / worth
            assert figures[key] == pytest.approx(expected)
        else:
            assert figures[key] is None
    assert figures["ce_zero"] != pytest.approx(figures["ce_clean"], rel=1e-3)


def test_known_saes_have_known_figures(model: Any, tokens: np.ndarray) -> None:
    both = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    batches = batches_of(model, tokens)
    perfect = evaluate(
        model, sae_of(both.T.clone(), both, torch.zeros(WIDTH)), batches, special_ids=SPECIAL
    )
    assert perfect["explained_variance"] == pytest.approx(1, abs=1e-6)
    assert perfect["l0"] == WIDTH
    assert perfect["ce_reconstructed"] == pytest.approx(perfect["ce_clean"], rel=1e-5)

    nothing = torch.zeros(4, WIDTH)
    silent = evaluate(
        model, sae_of(nothing.T.clone(), nothing, torch.zeros(WIDTH)), batches, special_ids=SPECIAL
    )
    assert silent["dead_fraction"] == 1
    assert silent["ce_reconstructed"] == pytest.approx(silent["ce_zero"])

    mean = plain_rows(model, tokens).mean(0)
    average = evaluate(
        model, sae_of(nothing.T.clone(), nothing, mean), batches, special_ids=SPECIAL
    )
    assert average["explained_variance"] == pytest.approx(0, abs=1e-5)
    assert average["ce_reconstructed"] == pytest.approx(average["ce_mean"], rel=1e-5)


def test_recovered_is_one_for_a_perfect_sae_and_zero_for_ablation(
    model: Any, tokens: np.ndarray
) -> None:
    """On targets that the model predicts well, so that ablation hurts."""
    ids = torch.from_numpy(tokens).long()
    for position in range(1, SIZE):  # the model writes the contexts itself, greedily
        ids[:, position] = model(ids[:, :position]).logits[:, -1, 4:].argmax(-1) + 4
    easy = ids.numpy().astype(np.int32)
    batches = batches_of(model, easy)
    both = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    perfect = sae_of(both.T.clone(), both, torch.zeros(WIDTH))
    figures = evaluate(model, perfect, batches, special_ids=SPECIAL)
    assert figures["ce_recovered"] == pytest.approx(1, abs=1e-4)
    assert figures["ce_recovered_mean"] == pytest.approx(1, abs=1e-4)
    silent = sae_of(torch.zeros(WIDTH, 4), torch.zeros(4, WIDTH), torch.zeros(WIDTH))
    figures = evaluate(model, silent, batches, special_ids=SPECIAL)
    assert figures["ce_recovered"] == pytest.approx(0, abs=1e-4)


def test_fewer_predictions_can_be_asked_for(model: Any, tokens: np.ndarray) -> None:
    figures = evaluate(
        model,
        some_sae(),
        batches_of(model, tokens),
        special_ids=SPECIAL,
        ce_tokens=10,
        batch_size=1,
    )
    assert 10 <= figures["ce_tokens"] < 10 + SIZE
    assert figures["tokens"] == 52


def test_the_model_is_left_as_it_was(model: Any, tokens: np.ndarray) -> None:
    ids = torch.from_numpy(tokens).long()
    before = model(ids).logits
    evaluate(model, some_sae(), batches_of(model, tokens), special_ids=SPECIAL)
    assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_input_is_named(model: Any, tokens: np.ndarray) -> None:
    for nothing in ([], batches_of(model, np.full((2, 4), BOS, dtype=np.int32))):
        with pytest.raises(TrainingError, match="no held-out token"):
            evaluate(model, some_sae(), nothing, special_ids=SPECIAL)
    batch = batches_of(model, tokens)[0]
    batch.activations[1, 4, 0] = math.nan
    with pytest.raises(TrainingError, match="hold NaN"):
        evaluate(model, some_sae(), [batch], special_ids=SPECIAL)


def test_baselines_are_fitted_elsewhere_and_measured_here(model: Any, tokens: np.ndarray) -> None:
    sae = some_sae(architecture="topk", k=5)
    elsewhere = random_ids(20, SIZE, seed=9).numpy().astype(np.int32)
    figures = evaluate(
        model,
        sae,
        batches_of(model, tokens),
        special_ids=SPECIAL,
        training=iter(batches_of(model, elsewhere)),
        seed=4,
    )
    x, other = plain_rows(model, tokens), plain_rows(model, elsewhere)
    fitted = baselines.moments([(other, other)])
    random = baselines.random_dictionary(fitted, sae.d_sae, 5, seed=4, at=POINT)
    expected = {
        "random": random.decode(random.encode(x), x),
        "pca": baselines.principal_components(fitted, 5)(x),
    }
    for name, given in expected.items():
        found = figures["baselines"][name]
        fvu = float((x - given).square().sum() / (x - x.mean(0)).square().sum())
        assert found["fvu"] == pytest.approx(fvu, rel=1e-3), name
        assert found["explained_variance"] == pytest.approx(1 - fvu, abs=1e-3)
        assert (found["l0"], found["fitted_on"]) == (5, "training tokens")
        assert found["fitted_tokens"] == len(other)
    here = evaluate(model, sae, batches_of(model, tokens), special_ids=SPECIAL)["baselines"]
    assert here["pca"]["fitted_on"] == "the evaluated tokens"
    assert here["pca"]["fvu"] < figures["baselines"]["pca"]["fvu"]


def test_nearest_cosine_in_chunks_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = torch.randn(37, 8, generator=torch.Generator().manual_seed(0))
    decoder[5] = 3 * decoder[30]
    decoder[7] = 0
    unit = F.normalize(decoder, dim=-1)
    expected = (unit @ unit.T).fill_diagonal_(-2).max(-1).values
    for chunk in (1, 100, 37 * 37, 2**24):
        monkeypatch.setattr(evaluation, "_CHUNK", chunk)
        torch.testing.assert_close(nearest_cosine(decoder), expected)
    assert float(expected[5]) == pytest.approx(1) and float(expected[7]) == 0


def test_nearest_cosines_are_listed_and_counted(model: Any, tokens: np.ndarray) -> None:
    sae = some_sae()
    figures = evaluate(model, sae, batches_of(model, tokens), special_ids=SPECIAL)
    expected = nearest_cosine(sae.W_dec)
    assert figures["nearest_cosine"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert sum(figures["nearest_cosine_histogram"]["counts"]) == sae.d_sae
    median = float(expected.double().quantile(0.5))
    assert figures["nearest_cosine_quantiles"]["0.5"] == pytest.approx(median)
    alone = sae_of(sae.W_enc[:, :1], sae.W_dec[:1], sae.b_dec)
    figures = evaluate(model, alone, batches_of(model, tokens), special_ids=SPECIAL)
    assert figures["nearest_cosine"] is None
    json.dumps(figures, allow_nan=False)


def test_a_transcoder_is_measured_where_it_writes(model: Any, tokens: np.ndarray) -> None:
    """A random one from the stream to an MLP's output, against a splice by hand."""
    out = HookPoint(1, "mlp_out")
    ids = torch.from_numpy(tokens).long()
    plain = torch.from_numpy(~np.isin(tokens, list(SPECIAL)))
    read = HookPoint(1, "resid_pre")
    both = activations(model, [read, out], ids)
    x, y = both[read][plain], both[out][plain]
    generator = torch.Generator().manual_seed(2)
    W_enc = torch.randn(WIDTH, 20, generator=generator)
    W_dec = torch.randn(20, WIDTH, generator=generator) * 0.05
    sae = sae_of(W_enc, W_dec, y.mean(0), hook_point=read, hook_point_out=out)
    batches = [ContextBatch(tokens, np.zeros_like(tokens), both[read], 0)]
    figures = evaluate(model, sae, batches, special_ids=SPECIAL)
    given = (x @ W_enc).relu() @ W_dec + y.mean(0)
    fvu = float((y - given).square().sum() / (y - y.mean(0)).square().sum())
    assert figures["fvu"] == pytest.approx(fvu, rel=1e-4)

    def hook(module: Any, args: Any, output: Any) -> Any:
        new = output.clone()
        new[plain] = given
        return new

    handle = model.model.layers[1].mlp.register_forward_hook(hook)
    try:
        logits = model(ids).logits[:, :-1]
    finally:
        handle.remove()
    counts = ~torch.isin(ids[:, 1:], torch.tensor(sorted(SPECIAL)))
    loss = float(F.cross_entropy(logits[counts], ids[:, 1:][counts]))
    assert figures["ce_reconstructed"] == pytest.approx(loss, rel=1e-5)
    rank = round(figures["l0"])
    fitted = baselines.moments([(x, y)])
    best = baselines.principal_components(fitted, rank)(x)
    pca = float((y - best).square().sum() / (y - y.mean(0)).square().sum())
    assert figures["baselines"]["pca"]["fvu"] == pytest.approx(pca, rel=1e-3)
