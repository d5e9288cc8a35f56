"""core/sae.py against sae-lens's inference classes, and a clamp against its definition."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.core import sae as sae_module
from saesteer.core.model import HookPoint, fingerprint
from saesteer.core.sae import Conventions, Sae, check_fits, load_sae
from saesteer.errors import FeatureError, SaeError
from tests.tiny import tiny_model

# Importing sae_lens raises warnings of its own and of transformer_lens; constructing one of its
# SAEs with centred writing weights warns too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs"),
]

D_IN, D_SAE, K = 12, 40, 5
POINT = HookPoint(1, "resid_post")
ARCHITECTURES = ["standard", "topk", "jumprelu", "gated"]
CONVENTIONS = {
    "plain": Conventions(),
    "b_dec kept in": Conventions(apply_b_dec_to_input=False),
    "layer_norm": Conventions(normalize_activations="layer_norm"),
    "layer_norm, b_dec kept in": Conventions(False, "layer_norm"),
    "constant_norm": Conventions(normalize_activations="constant_norm_rescale"),
}
CASES = [(a, c) for a in ARCHITECTURES for c in CONVENTIONS.values()]
CASES += [("topk", replace(c, rescale_acts_by_decoder_norm=True)) for c in CONVENTIONS.values()]


def make_sae(kind: str, conventions: Conventions | None = None, **changes: Any) -> Sae:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    values: dict[str, Any] = {
        "W_enc": normal(D_IN, D_SAE),
        "b_enc": normal(D_SAE) * 0.3,
        "W_dec": normal(D_SAE, D_IN),  # rows of different norms
        "b_dec": normal(D_IN),
        "architecture": kind,
        "hook_point": POINT,
        "model_id": "gpt2",
        "k": K if kind == "topk" else None,
        "threshold": normal(D_SAE) if kind == "jumprelu" else None,  # negative ones too
        "context_size": 16,
        "conventions": conventions or Conventions(),
    }
    if kind == "gated":
        values |= {"r_mag": normal(D_SAE) * 0.5, "b_mag": normal(D_SAE)}  # gate and size disagree
    return Sae(**(values | changes))


def activations(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, D_IN, generator=generator) * 3 + 1


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Sae, Any]]:
    """An Sae, and sae-lens's own class loaded from the folder that it saved."""
    from sae_lens import SAE

    sae = make_sae(*request.param)
    sae.save(tmp_path / "sae")
    yield sae, SAE.load_from_disk(tmp_path / "sae")


def test_encode_and_decode_equal_sae_lens(pair: tuple[Sae, Any]) -> None:
    sae, oracle = pair
    x = activations(7, 9)
    with torch.no_grad():
        expected = oracle.encode(x)
    codes = sae.encode(x)
    torch.testing.assert_close(
        codes.dense(D_SAE), expected.reshape(-1, D_SAE), atol=1e-5, rtol=1e-5
    )
    # In float64 the sums of a decode differ by the formula only, not by their order.
    sae, oracle, x = sae.to("cpu", torch.float64), oracle.to(torch.float64), x.double()
    with torch.no_grad():
        decoded = oracle.decode(oracle.encode(x))
    codes = sae.encode(x)
    torch.testing.assert_close(
        sae.decode(codes, x), decoded.reshape(-1, D_IN), atol=1e-9, rtol=1e-9
    )
    assert (codes.values > 0).all()
    assert len(codes.values) > 0
    order = codes.rows * D_SAE + codes.latents
    assert (order.diff() > 0).all()


def test_activation_of_chosen_features_equals_the_full_encode(pair: tuple[Sae, Any]) -> None:
    sae, oracle = pair
    x = activations(4, 6)
    features = [3, 0, 39, 3]  # unordered, with one asked for twice
    with torch.no_grad():
        expected = oracle.encode(x)[..., features]
    torch.testing.assert_close(sae.activation(x, features), expected, atol=1e-5, rtol=1e-5)
    everything = sae.activation(x, range(D_SAE))
    torch.testing.assert_close(
        everything.reshape(-1, D_SAE), sae.encode(x).dense(D_SAE), atol=1e-5, rtol=1e-5
    )


def test_write_equals_replacing_in_the_code_and_adding_back_the_error(
    pair: tuple[Sae, Any],
) -> None:
    """DESIGN law 1: x + write(t - a) is decode(code with t) + (x - decode(code)), by sae-lens.

    In float64, so that what is compared is the formula and not its rounding.
    """
    sae, oracle = pair[0].to("cpu", torch.float64), pair[1].to(torch.float64)
    x = activations(5, 8).double()
    features = [2, 17, 31]
    target = torch.tensor([4.0, 0.0, 1.5], dtype=torch.float64).expand(5, 8, 3)
    with torch.no_grad():
        code = oracle.encode(x)
        error = x - oracle.decode(code)
        oracle.encode(x)  # decode forgets the statistics of the input: set them again
        edited = code.clone()
        edited[..., features] = target
        expected = oracle.decode(edited) + error
    delta = target - sae.activation(x, features)
    result = x + sae.write(delta, features, x)
    torch.testing.assert_close(result, expected, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(result, x)


def test_encode_is_the_same_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for architecture in ARCHITECTURES:
        sae, x = make_sae(architecture), activations(23)
        whole, some = sae.encode(x), sae.activation(x, [1, 5])
        with monkeypatch.context() as patch:
            patch.setattr(sae_module, "_CHUNK", 4 * D_SAE)
            parts = sae.encode(x)
            torch.testing.assert_close(sae.activation(x, [1, 5]), some)
        assert torch.equal(whole.rows, parts.rows)
        assert torch.equal(whole.latents, parts.latents)
        torch.testing.assert_close(whole.values, parts.values)


def test_nothing_to_encode_and_rows_where_nothing_fires() -> None:
    for architecture in ARCHITECTURES:
        sae = make_sae(architecture)
        empty = sae.encode(torch.zeros(0, D_IN))
        assert empty.n_rows == 0
        assert sae.decode(empty, torch.zeros(0, D_IN)).shape == (0, D_IN)
        assert sae.activation(torch.zeros(0, D_IN), [1]).shape == (0, 1)
        silent = make_sae(architecture, b_enc=torch.full((D_SAE,), -1e6))
        codes = silent.encode(activations(3))
        assert codes.n_rows == 3
        assert len(codes.values) == 0
        torch.testing.assert_close(
            silent.decode(codes, activations(3)), silent.b_dec.expand(3, D_IN)
        )


def test_a_zero_vector_stays_finite() -> None:
    x = torch.zeros(2, D_IN)
    for conventions in CONVENTIONS.values():
        sae = make_sae("standard", conventions)
        codes = sae.encode(x)
        assert torch.isfinite(codes.values).all()
        assert torch.isfinite(sae.decode(codes, x)).all()
        assert torch.isfinite(sae.write(torch.ones(2, 1), [0], x)).all()


def test_an_sae_narrowed_to_some_features_computes_the_same() -> None:
    x, features = activations(6), [7, 3, 30]
    for kind in ("standard", "jumprelu", "gated"):
        sae = make_sae(kind, log10_density=torch.arange(float(D_SAE)))
        few = sae.narrowed(features)
        torch.testing.assert_close(few.activation(x, range(3)), sae.activation(x, features))
        torch.testing.assert_close(few.direction(1), sae.direction(3))
        assert few.log10_density is not None
        assert few.log10_density.tolist() == features
    with pytest.raises(FeatureError, match="topk"):
        make_sae("topk").narrowed(features)


def test_a_gate_may_be_open_where_the_size_is_zero_and_closed_where_it_is_not() -> None:
    """Both happen in the gated SAE of these tests, or a code without a gate would pass them."""
    sae, x = make_sae("gated", Conventions(False)), activations(50)
    assert sae.r_mag is not None
    assert sae.b_mag is not None
    u = x @ sae.W_enc
    gate, size = u + sae.b_enc > 0, u * sae.r_mag.exp() + sae.b_mag > 0
    assert (gate & ~size).any()
    assert (~gate & size).any()
    assert torch.equal(sae.encode(x).dense(D_SAE) > 0, gate & size)


def test_gradients_flow_through_activation_and_write() -> None:
    for architecture, conventions in CASES:
        sae = make_sae(architecture, conventions).to("cpu", torch.float64)
        x = activations(3).double().requires_grad_()

        def clamp(x: Tensor, sae: Sae = sae) -> Tensor:
            return x + sae.write(5.0 - sae.activation(x, [4]), [4], x)

        assert torch.autograd.gradcheck(clamp, (x,))


def test_write_and_activation_accept_half_precision() -> None:
    sae, x = make_sae("standard"), activations(3).bfloat16()
    assert sae.activation(x, [0]).dtype == torch.float32
    assert sae.write(torch.ones(3, 1), [0], x).dtype == torch.bfloat16


def test_direction_is_what_one_unit_writes() -> None:
    x = activations(1)
    for conventions in (Conventions(), Conventions(rescale_acts_by_decoder_norm=True)):
        sae = make_sae("topk", conventions)
        written = sae.write(torch.ones(1, 1), [7], x)[0]
        torch.testing.assert_close(sae.direction(7), written)


def test_unknown_feature_is_named() -> None:
    sae = make_sae("standard")
    for use in (
        lambda: sae.activation(activations(1), [D_SAE]),
        lambda: sae.direction(-1),
        lambda: sae.write(torch.ones(1, 1), [99], activations(1)),
    ):
        with pytest.raises(FeatureError, match=r"does not exist.*0 to 39"):
            use()


def test_hash_follows_weights_and_conventions() -> None:
    sae = make_sae("topk")
    changed = sae.W_dec.clone()
    changed[0, 0] += 1
    others = [
        replace(sae, W_dec=changed),
        replace(sae, k=K + 1),
        replace(sae, conventions=Conventions(False)),
    ]
    assert sae.hash == make_sae("topk").hash
    assert len({sae.hash, *(other.hash for other in others)}) == 4
    gated = make_sae("gated")
    assert gated.hash != replace(gated, r_mag=torch.zeros(D_SAE)).hash
    assert sae.hash == replace(sae, log10_density=torch.zeros(D_SAE)).hash


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architecture": "temporal"}, "'temporal'"),
        ({"architecture": "gated"}, "r_mag is missing"),
        ({"threshold": torch.zeros(D_SAE)}, "a topk SAE has no threshold"),
        ({"log10_density": torch.zeros(3)}, "log10_density is of shape"),
        ({"W_skip": torch.zeros(D_IN, D_IN)}, "W_skip and no hook_point_out"),
        (
            {"W_dec": torch.zeros(D_SAE, 9), "b_dec": torch.zeros(9)},
            "reads 12 dimensions and writes 9",
        ),
        ({"conventions": Conventions(normalize_activations="whiten")}, "whiten"),
        ({"b_enc": torch.zeros(3)}, "b_enc"),
        ({"k": None}, "k is None"),
        ({"k": D_SAE + 1}, "k is 41"),
        ({"architecture": "jumprelu"}, "threshold is missing"),
        (
            {
                "architecture": "standard",
                "conventions": Conventions(rescale_acts_by_decoder_norm=True),
            },
            "rescale_acts_by_decoder_norm",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SaeError, match=named):
        make_sae("topk", **changes)


# --- an SAE trained on a stream minus its mean -------------------------------------------------


def centred_twin(model: Any) -> Any:
    """The same GPT-2 with what writes to the stream centred over d, as TransformerLens does."""
    import copy

    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in (twin.transformer.wte.weight, twin.transformer.wpe.weight):
            weight -= weight.mean(-1, keepdim=True)
        for block in twin.transformer.h:
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                projection.weight -= projection.weight.mean(-1, keepdim=True)
                projection.bias -= projection.bias.mean()
    return twin


def test_centred_writing_weights_are_reproduced_on_the_plain_model(tmp_path: Path) -> None:
    plain = tiny_model("gpt2")
    with torch.no_grad():  # a stream with a mean worth the name
        for name, parameter in plain.named_parameters():
            if "wte" in name or "c_proj" in name:
                parameter += 0.5
    tokens = torch.arange(3, 27).reshape(2, 12)
    streams = []
    for model in (plain, centred_twin(plain)):
        output = model(tokens, output_hidden_states=True)
        streams.append(output.hidden_states[1].detach())
    x, x_centred = streams
    width = x.shape[-1]
    assert x.mean(-1).abs().min() > 0.05
    assert x_centred.mean(-1).abs().max() < 1e-5

    generator = torch.Generator().manual_seed(0)
    weights = {
        "W_enc": torch.randn(width, D_SAE, generator=generator),
        "b_enc": torch.zeros(D_SAE),
        "W_dec": torch.randn(D_SAE, width, generator=generator),
        "b_dec": torch.randn(width, generator=generator),
    }
    centred = make_sae(
        "topk", Conventions(center_writing_weights=True), hook_point=HookPoint(0, "resid_post"),
        **weights,
    )  # fmt: skip
    as_trained = replace(centred, conventions=Conventions())
    features = [0, 7, 30]
    codes, expected = centred.encode(x), as_trained.encode(x_centred)
    torch.testing.assert_close(codes.dense(D_SAE), expected.dense(D_SAE), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        centred.activation(x, features),
        as_trained.activation(x_centred, features),
        atol=1e-4,
        rtol=1e-4,
    )
    # The reconstruction gets its mean back, and what a clamp writes needs none.
    mean = x.mean(-1, keepdim=True)
    torch.testing.assert_close(
        centred.decode(codes, x).reshape(x.shape) - mean,
        as_trained.decode(expected, x_centred).reshape(x.shape),
        atol=1e-4,
        rtol=1e-4,
    )
    delta = torch.ones(2, 12, 3)
    torch.testing.assert_close(
        centred.write(delta, features, x), as_trained.write(delta, features, x_centred)
    )
    check_fits(centred, plain, HookPoint(0, "resid_post"), model_id="openai-community/gpt2")

    centred.save(tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    kwargs = config["metadata"]["model_from_pretrained_kwargs"]
    assert kwargs == {"center_writing_weights": True}
    assert load_sae(tmp_path / "sae").conventions.center_writing_weights


def test_centred_writing_weights_are_refused_where_norms_see_the_mean() -> None:
    model = tiny_model("llama")
    width = model.config.hidden_size
    sae = make_sae(
        "standard",
        Conventions(center_writing_weights=True),
        W_enc=torch.zeros(width, D_SAE),
        W_dec=torch.zeros(D_SAE, width),
        b_dec=torch.zeros(width),
        model_id="some/llama",
    )
    with pytest.raises(SaeError, match=r"center_writing_weights.*RMSNorm"):
        check_fits(sae, model, POINT, model_id="llama")


# --- does it belong here? -----------------------------------------------------------------------


def sae_for(model: Any, **changes: Any) -> Sae:
    width = model.config.hidden_size
    return make_sae(
        "standard",
        W_enc=torch.zeros(width, D_SAE),
        W_dec=torch.zeros(D_SAE, width),
        b_dec=torch.zeros(width),
        **changes,
    )


def test_check_fits_by_fingerprint() -> None:
    model, other = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    sae = sae_for(model, model_fingerprint=fingerprint(model), model_id="anything")
    check_fits(sae, model, POINT)
    check_fits(sae, model, POINT, model_id="a local name")
    for force in (False, True):
        with pytest.raises(SaeError, match="other weights"):
            check_fits(sae, other, POINT, model_id="anything", force=force)


@pytest.mark.parametrize(
    ("trained_on", "loaded", "fits"),
    [
        ("gpt2", "openai-community/gpt2", True),
        ("gpt2-small", "gpt2", True),
        ("Pythia-70m", "EleutherAI/pythia-70m", True),
        ("gpt2", "/models/gpt2/", True),
        ("gpt2", "gpt2-medium", False),
        ("gpt2", "", False),
        (None, "gpt2", False),
    ],
)
def test_check_fits_by_name(trained_on: str | None, loaded: str, fits: bool) -> None:
    model = tiny_model("llama")
    sae = sae_for(model, model_id=trained_on)
    if fits:
        check_fits(sae, model, POINT, model_id=loaded)
        return
    with pytest.raises(SaeError, match="trained on") as raised:
        check_fits(sae, model, POINT, model_id=loaded)
    assert "\n" not in str(raised.value)
    check_fits(sae, model, POINT, model_id=loaded, force=True)


def test_check_fits_refuses_another_place_or_width() -> None:
    model = tiny_model("llama")
    sae = sae_for(model)
    check_fits(sae, model, HookPoint(2, "resid_pre"), model_id="gpt2")  # the same place
    with pytest.raises(SaeError, match=r"layers\.1\.resid_post, not at layers\.1\.mlp_out"):
        check_fits(sae, model, HookPoint(1, "mlp_out"), model_id="gpt2")
    with pytest.raises(SaeError, match=f"reads 12 dimensions.*{model.config.hidden_size}"):
        check_fits(make_sae("standard"), model, POINT, model_id="gpt2")


def test_import_does_not_pull_in_sae_lens() -> None:
    import subprocess
    import sys

    program = (
        "import sys, saesteer.core.sae; "
        "sys.exit('sae_lens' in sys.modules or 'transformer_lens' in sys.modules)"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
