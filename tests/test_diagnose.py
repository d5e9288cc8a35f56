"""Diagnostics of a direction: figures by brute force, and what random data looks like."""

import itertools
import json

import numpy as np
import pytest
import torch

from saesteer.core.model import HookPoint
from saesteer.core.shards import ContextBatch
from saesteer.directions import mean_difference
from saesteer.directions.direction import Direction
from saesteer.effects.decompose import CAVEAT, decompose
from saesteer.effects.diagnose import diagnose, lens_tokens, top_contexts
from saesteer.effects.diagnose_pairs import mean_cosine, pair_figures, separability
from saesteer.effects.diagnose_view import shown
from saesteer.errors import PairsError, SaeError
from saesteer.features.weights import logit_lens
from tests.tiny import BOS, PAD, WIDTH, random_ids, tiny_model, tiny_sae, tiny_tokenizer

POINT = HookPoint(1, "resid_post")
fit = mean_difference.fit


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shifted(n: int, d: int, size: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sides of n pairs: noise, and on the chosen side `size` along the first dimension."""
    chosen, rejected = normal(n, d, seed=seed), normal(n, d, seed=seed + 1)
    chosen[:, 0] += size
    return chosen, rejected


def direction(vector: torch.Tensor, point: HookPoint = POINT) -> Direction:
    return Direction(vector, point, "mean-difference", 40, "answer-mean", "0123456789abcdef")


def some_text(d: int = WIDTH, *, contexts: int = 12, length: int = 16) -> ContextBatch:
    tokens = random_ids(contexts, length).numpy().astype(np.int32)
    tokens[:, 0] = BOS
    documents = np.repeat(np.arange(contexts), length).reshape(contexts, length)
    return ContextBatch(tokens, documents, normal(contexts, length, d, seed=9) + 0.3, 0)


def test_mean_cosine_is_that_of_all_couples():
    rows = normal(9, 5).double() + 0.5
    pairs = itertools.combinations(range(9), 2)
    each = [float(torch.cosine_similarity(rows[i], rows[j], dim=0)) for i, j in pairs]
    assert mean_cosine(rows) == pytest.approx(np.mean(each), abs=1e-12)
    assert mean_cosine(rows[:1]) is None


def test_separability_by_brute_force_and_ties_count_half():
    a, b = normal(13).round(decimals=1) + 0.4, normal(17, seed=2).round(decimals=1)
    assert len(set(a.tolist()) & set(b.tolist())) > 0
    wins = [1.0 if x > y else 0.5 if x == y else 0.0 for x in a.tolist() for y in b.tolist()]
    found = separability(a, b)
    assert found.auroc == pytest.approx(np.mean(wins), abs=1e-12)
    spread = ((a.double().var() + b.double().var()) / 2).sqrt()
    assert found.d_prime == pytest.approx(float((a.double().mean() - b.double().mean()) / spread))
    turned = separability(b, a)
    assert turned.auroc == pytest.approx(1 - found.auroc)
    assert turned.d_prime == pytest.approx(-found.d_prime)
    assert separability(a[:1], b[:1]).d_prime is None
    assert separability(torch.ones(3), torch.zeros(3)).d_prime is None


def test_a_planted_shift_is_reliable():
    chosen, rejected = shifted(128, 32, 3.0)
    vector = fit(chosen, rejected)
    found = pair_figures(vector, chosen, rejected, fit)
    assert found.halves is not None and found.halves.pairs == 64
    assert found.halves.cosine.mean > 0.75 and found.halves.cosine.low > 0.6
    assert found.halves.auroc.mean > 0.95 and found.halves.d_prime.mean > 2.5
    assert found.mean_cosine > 0.08
    means = [one.mean for _, one in found.growth]
    assert [n for n, _ in found.growth] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert means == sorted(means) and means[-1] == pytest.approx(1) and means[0] < 0.6
    assert found.norm == pytest.approx(float(vector.norm()))
    both = torch.cat([chosen, rejected]).double()
    assert found.read_norm == pytest.approx(float(both.norm(dim=-1).mean()))


def test_random_pairs_lie_apart_only_where_they_were_fitted():
    """With more dimensions than pairs anything separates; split halves tell."""
    chosen, rejected = shifted(32, 512, 0.0)
    found = pair_figures(fit(chosen, rejected), chosen, rejected, fit)
    assert found.separability.auroc > 0.99
    assert found.halves.auroc.low < 0.5 < found.halves.auroc.high
    assert abs(found.halves.auroc.mean - 0.5) < 0.1
    assert abs(found.halves.cosine.mean) < 0.1
    assert abs(found.mean_cosine) < 0.02


def test_swapping_the_sides_turns_nothing_but_the_direction():
    chosen, rejected = shifted(40, 16, 1.0)
    one = pair_figures(fit(chosen, rejected), chosen, rejected, fit)
    other = pair_figures(fit(rejected, chosen), rejected, chosen, fit)
    assert one.mean_cosine == pytest.approx(other.mean_cosine)
    assert one.halves.cosine.mean == pytest.approx(other.halves.cosine.mean)
    assert one.separability.auroc == pytest.approx(other.separability.auroc)
    against = pair_figures(-fit(chosen, rejected), chosen, rejected, fit)
    assert against.separability.auroc == pytest.approx(1 - one.separability.auroc)
    assert against.growth[-1][1].mean == pytest.approx(-1)


def test_the_seed_decides_and_scale_does_not():
    chosen, rejected = shifted(40, 16, 1.0)
    vector = fit(chosen, rejected)
    first = pair_figures(vector, chosen, rejected, fit, splits=20, seed=3)
    assert first == pair_figures(vector, chosen, rejected, fit, splits=20, seed=3)
    assert first.halves != pair_figures(vector, chosen, rejected, fit, splits=20, seed=4).halves
    large = pair_figures(100 * vector, chosen, rejected, fit, splits=20, seed=3)
    assert large.separability.auroc == first.separability.auroc
    assert large.growth[0][1].mean == pytest.approx(first.growth[0][1].mean)
    assert large.norm == pytest.approx(100 * first.norm)


def test_few_and_equal_pairs():
    chosen, rejected = shifted(5, 8, 1.0)
    rejected[2] = chosen[2]
    found = pair_figures(fit(chosen, rejected), chosen, rejected, fit)
    assert found.n_equal == 1 and found.mean_cosine is not None
    one_of = dict(found.growth)[1]
    assert one_of.n < 20  # a pair with equal sides alone gives no direction
    single = pair_figures(chosen[0] - rejected[0], chosen[:1], rejected[:1], fit)
    assert single.mean_cosine is None and single.halves is None
    assert single.separability.d_prime is None and len(single.growth) == 1
    unfitted = pair_figures(chosen[0], chosen, rejected, None)
    assert unfitted.halves is None and unfitted.growth == ()


def test_what_does_not_belong_together_is_refused():
    chosen, rejected = shifted(5, 8, 1.0)
    with pytest.raises(PairsError, match=r"shape \(5, 8\) and \(4, 8\)"):
        pair_figures(chosen[0], chosen, rejected[:4], fit)
    with pytest.raises(PairsError, match="activations of width 8"):
        pair_figures(torch.ones(9), chosen, rejected, fit)
    with pytest.raises(PairsError, match=r"norm 0\.0"):
        pair_figures(torch.zeros(8), chosen, rejected, fit)
    with pytest.raises(SaeError, match=r"features that write at layers\.1\.resid_post"):
        diagnose(
            direction(torch.ones(WIDTH), HookPoint(0, "resid_post")),
            *shifted(5, WIDTH, 1.0),
            tiny_model(),
            tiny_tokenizer(),
            sae=tiny_sae(),
        )


def test_top_contexts_are_the_tokens_farthest_along_and_against():
    model, tokenizer, text = tiny_model(), tiny_tokenizer(), some_text()
    vector, zero = normal(WIDTH, seed=4), 0.5
    found = top_contexts(vector, zero, [text], model, tokenizer, top=5)
    read = (text.activations @ (vector / vector.norm()) - zero).numpy()
    plain = text.tokens != BOS
    assert found.n_tokens == plain.sum()
    assert found.above.density == pytest.approx((read[plain] > 0).mean(), rel=1e-3)
    assert found.below.density == pytest.approx((read[plain] < 0).mean(), rel=1e-3)
    for side, sign in ((found.above, 1), (found.below, -1)):
        signed = np.where(plain, sign * read, -np.inf)
        best = signed.max(1).argsort()[::-1][:5]  # each example is of another document
        assert [x.context for x in side.examples] == best.tolist()
        assert [x.position for x in side.examples] == signed[best].argmax(1).tolist()
        np.testing.assert_allclose([x.value for x in side.examples], signed[best].max(1), rtol=1e-5)
        for x in side.examples:
            assert x.tokens[x.firing] == text.tokens[x.context, x.position]


def test_tokens_are_those_of_the_logit_lens_without_special_ones():
    model, tokenizer, vector = tiny_model(), tiny_tokenizer(), normal(WIDTH)
    found = lens_tokens(vector, model, tokenizer, top=90)
    expected = logit_lens(model, vector[None], top=90, exclude=range(4)).promoted[0]
    words = [text.strip() for text, _ in found.promotes]
    assert words == tokenizer.convert_ids_to_tokens(expected.tolist())
    assert not {"<pad>", "<bos>", "<eos>", "<unk>"} & set(words)
    turned = lens_tokens(-3 * vector, model, tokenizer, top=5)
    assert [t for t, _ in turned.promotes] == [t for t, _ in found.suppresses[:5]]


def test_a_whole_diagnosis_is_json_and_fits_a_terminal():
    model, tokenizer, sae = tiny_model(), tiny_tokenizer(), tiny_sae()
    chosen, rejected = shifted(40, WIDTH, 2.0)
    text = some_text()
    found = diagnose(
        direction(fit(chosen, rejected)),
        chosen,
        rejected,
        model,
        tokenizer,
        fit=fit,
        text=[text],
        sae=sae,
    )
    norms = text.activations.norm(dim=-1)[torch.from_numpy(text.tokens != BOS)]
    assert found.layer_norm == pytest.approx(float(norms.mean()))
    assert found.features == decompose(
        direction(fit(chosen, rejected)).vector, sae, nearest_features=10
    )
    kept = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert kept["encoded_caveat"] == CAVEAT and kept["pairs"]["n_pairs"] == 40
    view = shown(found)
    assert max(map(len, view.splitlines())) <= 80
    for part in (
        "cosine among pairs",
        "split-half cosine",
        "out of",
        "‖rest‖/‖v‖",
        "of the layer's",
    ):
        assert part in view


def test_a_head_has_no_tokens_and_what_was_not_given_is_left_out():
    chosen, rejected = shifted(40, 8, 2.0)
    head = direction(fit(chosen, rejected), HookPoint(1, "head.2"))
    found = diagnose(head, chosen, rejected, tiny_model(), tiny_tokenizer())
    assert (found.tokens, found.contexts, found.features, found.layer_norm) == (None,) * 4
    view = shown(found)
    assert "not measured" in view and "of the mean norm read on the pairs" in view
    few = diagnose(head, chosen[:8], rejected[:8], tiny_model(), tiny_tokenizer(), fit=fit)
    assert "under 32" in shown(few) and "under 32" not in view


def test_padding_tokens_are_not_read():
    model, tokenizer, text = tiny_model(), tiny_tokenizer(), some_text()
    vector = normal(WIDTH)
    text.tokens[:, -1] = PAD
    text.activations[:, -1] = 50 * vector
    found = top_contexts(vector, 0.0, [text], model, tokenizer)
    assert max(x.value for x in found.above.examples) < 50
