"""Transcoders: every kind that sae-lens has, saved here or there, and where each belongs."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.core.hooks import activations as streams
from saesteer.core.hooks import capture
from saesteer.core.model import HookPoint, unembedding
from saesteer.core.sae import Conventions, Sae, check_fits, load_sae
from saesteer.core.sae_formats import TRANSCODERS
from saesteer.errors import HookPointError, ModelError, SaeError
from saesteer.features.weights import logit_lens
from saesteer.run import Run
from tests.test_sae import D_IN, D_SAE, POINT, activations, make_sae
from tests.tiny import WIDTH, random_ids, tiny_model, tiny_tokenizer

# Importing sae_lens raises a warning of transformer_lens's.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning")
]

D_OUT = 9
OUT = HookPoint(2, "mlp_out")
NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")
CASES = [(name, norm) for name in TRANSCODERS for norm in NORMALIZATIONS]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_transcoder(name: str, norm: str = "none", **changes: Any) -> Sae:
    """name: SAELens's."""
    architecture, skips = TRANSCODERS[name]
    values: dict[str, Any] = {
        "W_dec": normal(D_SAE, D_OUT, seed=4),
        "b_dec": normal(D_OUT, seed=5),
        "hook_point_out": OUT,
        "W_skip": normal(D_OUT, D_IN, seed=6) if skips else None,
    }
    return make_sae(architecture, Conventions(False, norm), **(values | changes))


@pytest.fixture(params=CASES, ids=lambda c: "-".join(c))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Sae, Any]]:
    """A transcoder, and sae-lens's own class loaded from the folder that it saved."""
    from sae_lens import SAE

    sae = make_transcoder(*request.param)
    sae.save(tmp_path / "sae")
    oracle = SAE.load_from_disk(tmp_path / "sae")
    assert oracle.cfg.architecture() == request.param[0]
    assert oracle.cfg.metadata.hook_name_out == "blocks.2.hook_mlp_out"
    yield sae, oracle


def test_a_saved_transcoder_encodes_and_reconstructs_as_in_sae_lens(
    pair: tuple[Sae, Any],
) -> None:
    sae, oracle = pair
    x = activations(7, 9)
    with torch.no_grad():
        expected, y = oracle.encode(x), oracle(x)
    codes = sae.encode(x)
    torch.testing.assert_close(
        codes.dense(D_SAE), expected.reshape(-1, D_SAE), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(sae.activation(x, range(D_SAE)), expected, atol=1e-5, rtol=1e-5)
    assert len(codes.values) > 100
    # In float64 the sums differ by the formula only; float32 adds their order.
    torch.testing.assert_close(sae.decode(codes, x), y.reshape(-1, D_OUT), atol=1e-4, rtol=1e-5)
    sae, oracle, x = sae.to("cpu", torch.float64), oracle.to(torch.float64), x.double()
    with torch.no_grad():
        y = oracle(x)
    torch.testing.assert_close(
        sae.decode(sae.encode(x), x), y.reshape(-1, D_OUT), atol=1e-9, rtol=1e-9
    )


def test_write_is_the_change_of_the_output_when_the_code_changes(pair: tuple[Sae, Any]) -> None:
    sae, oracle = pair[0].to("cpu", torch.float64), pair[1].to(torch.float64)
    x, features = activations(5, 8).double(), [2, 17, 31]
    target = torch.tensor([4.0, 0.0, 1.5], dtype=torch.float64).expand(5, 8, 3)
    with torch.no_grad():
        code = oracle.encode(x)
        edited = code.clone()
        edited[..., features] = target
        expected = oracle.decode(edited) - oracle.decode(code)
    written = sae.write(target - sae.activation(x, features), features, x)
    torch.testing.assert_close(written, expected, atol=1e-9, rtol=1e-9)
    assert written.abs().max() > 0.1


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_a_transcoder_made_by_sae_lens_loads(tmp_path: Path, name: str, norm: str) -> None:
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class

    kind, config = get_sae_class(name)
    made: SAE = kind(
        config.from_dict(
            {
                "architecture": name,
                "d_in": D_IN,
                "d_sae": D_SAE,
                "d_out": D_OUT,
                "apply_b_dec_to_input": False,
                "normalize_activations": norm,
                "metadata": {
                    "hook_name": "blocks.1.hook_resid_post",
                    "hook_name_out": "blocks.2.hook_mlp_out",
                    "model_name": "gpt2",
                },
            }
        )
    )
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=i))
    made.save_model(tmp_path / "theirs")
    sae, x = load_sae(tmp_path / "theirs"), activations(11)
    assert (sae.architecture, sae.W_skip is not None) == TRANSCODERS[name]
    assert (sae.hook_point, sae.hook_point_out, sae.write_point) == (POINT, OUT, OUT)
    with torch.no_grad():
        expected, y = made.encode(x), made(x)
    codes = sae.encode(x)
    torch.testing.assert_close(codes.dense(D_SAE), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(codes, x), y, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", TRANSCODERS)
def test_everything_survives_saving(tmp_path: Path, name: str) -> None:
    sae = make_transcoder(name, "layer_norm", model_fingerprint="abc", notes={"steps": 10})
    sae.save(tmp_path / "sae")
    loaded = load_sae(tmp_path / "sae")
    assert loaded.hash == sae.hash
    for field in ("hook_point", "hook_point_out", "model_fingerprint", "conventions", "notes"):
        assert getattr(loaded, field) == getattr(sae, field)
    moved = loaded.to("cpu", torch.float64)
    assert moved.W_skip is None or moved.W_skip.dtype == torch.float64


def test_hash_tells_a_transcoder_from_an_autoencoder_and_sees_the_skip() -> None:
    square = {"W_dec": normal(D_SAE, D_IN, seed=4), "b_dec": normal(D_IN, seed=5)}
    sae = make_transcoder("transcoder", **square)
    skips = replace(sae, W_skip=torch.ones(D_IN, D_IN))
    hashes = {replace(sae, hook_point_out=None).hash, sae.hash, skips.hash}
    assert len(hashes) == 3


def test_nothing_to_encode() -> None:
    for name in TRANSCODERS:
        sae, x = make_transcoder(name), torch.zeros(0, D_IN)
        assert sae.decode(sae.encode(x), x).shape == (0, D_OUT)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("topk", {}, "topk transcoder.*batchtopk"),
        ("gated", {}, "gated transcoder"),
        ("standard", {"conventions": Conventions()}, "transcoder with apply_b_dec_to_input"),
        (
            "standard",
            {"conventions": Conventions(False, center_writing_weights=True)},
            "transcoder with center_writing_weights",
        ),
        ("standard", {"W_skip": torch.zeros(D_IN, D_OUT)}, "W_skip is of shape"),
    ],
)
def test_a_transcoder_that_cannot_be_held_is_refused_when_it_is_made(
    kind: str, changes: dict[str, Any], named: str
) -> None:
    values = {"W_dec": normal(D_SAE, D_OUT, seed=4), "b_dec": normal(D_OUT, seed=5)}
    values |= {"hook_point_out": OUT, "conventions": Conventions(False)}
    with pytest.raises(SaeError, match=named):
        make_sae(kind, **(values | changes))


def test_two_widths_at_one_place_are_not_saved(tmp_path: Path) -> None:
    sae = replace(make_transcoder("transcoder"), hook_point_out=None)
    with pytest.raises(SaeError, match="reads 12 dimensions and writes 9 at one place"):
        sae.save(tmp_path / "sae")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "metadata", "named"),
    [
        ({}, {"hook_name_out": None}, "does not say where it writes"),
        ({}, {"hook_name_out": "blocks.1.ln2.hook_normalized"}, "ln2.hook_normalized"),
        ({}, {"hook_name": "blocks.1.hook_mlp_in"}, "hook_mlp_in"),
        ({"d_out": 768}, {}, "d_out=768"),
        ({"architecture": "skip_transcoder"}, {}, "lacks W_skip"),
        ({"apply_b_dec_to_input": True}, {}, "apply_b_dec_to_input"),
        ({"normalize_activations": "expected_average_only_in"}, {}, "expected_average_only_in"),
        ({"reshape_activations": "hook_z"}, {}, "hook_z"),
    ],
)
def test_folders_not_reproduced_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], metadata: dict[str, Any], named: str
) -> None:
    make_transcoder("transcoder").save(tmp_path / "sae")
    path = tmp_path / "sae" / "cfg.json"
    config = json.loads(path.read_text()) | changes
    config["metadata"] |= metadata
    path.write_text(json.dumps(config))
    with pytest.raises(SaeError) as raised:
        load_sae(path.parent)
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


# --- in a model ----------------------------------------------------------------------------------


def fitting(d_in: int = WIDTH, d_out: int = WIDTH, out: HookPoint = OUT) -> Sae:
    return make_transcoder(
        "transcoder",
        W_enc=normal(d_in, D_SAE, seed=1),
        W_dec=normal(D_SAE, d_out, seed=2),
        b_dec=normal(d_out, seed=3),
        hook_point_out=out,
        model_id="tiny",
    )


def test_check_fits_looks_at_both_ends() -> None:
    model = tiny_model("llama")
    check_fits(fitting(), model, POINT, model_id="tiny")
    with pytest.raises(SaeError, match=r"reads 12 dimensions at layers\.1\.resid_post.*has 32"):
        check_fits(fitting(d_in=12), model, POINT, model_id="tiny")
    with pytest.raises(SaeError, match=r"writes 9 dimensions at layers\.2\.mlp_out.*has 32"):
        check_fits(fitting(d_out=9), model, POINT, model_id="tiny")
    with pytest.raises(HookPointError):
        check_fits(fitting(out=HookPoint(7, "mlp_out")), model, POINT, model_id="tiny")
    with pytest.raises(SaeError, match=r"not at layers\.2\.mlp_out"):
        check_fits(fitting(), model, OUT, model_id="tiny")


def test_a_run_of_a_transcoder_adds_and_clamps_where_it_writes(tmp_path: Path) -> None:
    model, ids = tiny_model("llama"), random_ids(2, 7)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    sae = replace(fitting(), model_id=str(tmp_path / "model"))
    sae.save(tmp_path / "sae")
    run = Run.from_sae(tmp_path / "run", str(tmp_path / "sae"), str(tmp_path / "model"))
    assert Run.open(tmp_path / "run").sae.hash == sae.hash
    before = streams(run.model, [OUT], ids)[OUT]
    with torch.no_grad(), run.steer(add={3: 2.0}), capture(run.model, [OUT]) as found:
        run.model(ids)
    assert torch.equal(found[OUT], before + 2 * sae.direction(3))
    x = streams(run.model, [sae.hook_point], ids)[sae.hook_point]
    with torch.no_grad(), run.steer(clamp={3: 2.0}) as receipt, capture(run.model, [OUT]) as found:
        run.model(ids)
    clamped = before + (2 - sae.activation(x, [3])) * sae.direction(3)
    torch.testing.assert_close(found[OUT][ids > 3], clamped[ids > 3], atol=1e-4, rtol=0)
    assert receipt.edits[0].after_mean == 2.0


def test_a_logit_lens_reads_rows_that_write_to_the_stream_and_refuses_others() -> None:
    model = tiny_model("llama")
    lens = logit_lens(model, fitting().W_dec, top=3)
    assert lens.promoted.shape == (D_SAE, 3)
    assert lens.promoted.max() < len(unembedding(model))
    with pytest.raises(ModelError, match="width 9"):
        logit_lens(model, fitting(d_out=9).W_dec)
