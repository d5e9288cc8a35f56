"""SAE folders: SAELens (new and old), sparsify, releases; and every way one can be unfit."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from saesteer.core.model import HookPoint
from saesteer.core.sae import Conventions, Sae, check_fits, load_sae
from saesteer.core.sae_files import CHECKSUM
from saesteer.errors import SaeError
from tests.test_sae import ARCHITECTURES, D_IN, D_SAE, K, activations, make_sae
from tests.tiny import tiny_model

# Importing sae_lens raises a warning of transformer_lens's; its SAEs warn of loading options.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs"),
]


def saved(tmp_path: Path, kind: str = "topk", **changes: Any) -> Path:
    make_sae(kind, **changes).save(tmp_path / "sae")
    return tmp_path / "sae"


def overwrite(weights: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other weights, as if they had been saved: without the checksum of what was there."""
    save_file(tensors, weights)
    config = json.loads((weights.parent / "cfg.json").read_text())
    config.pop(CHECKSUM, None)
    (weights.parent / "cfg.json").write_text(json.dumps(config))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    metadata = changes.pop("metadata", {})
    config |= changes
    config["metadata"] |= metadata
    (folder / "cfg.json").write_text(json.dumps(config))


def refused(source: Path | str) -> str:
    """The one line with which `source` is refused."""
    with pytest.raises(SaeError) as raised:
        load_sae(source)
    message = str(raised.value)
    assert "\n" not in message
    return message


# --- what is saved is what is loaded -------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_everything_survives_saving(tmp_path: Path, kind: str) -> None:
    sae = make_sae(
        kind,
        Conventions(False, "layer_norm", kind == "topk", True),
        model_fingerprint="abc123",
        prepend_bos=False,
        notes={"steps": 10},
    )
    sae.save(tmp_path / "sae")
    loaded = load_sae(tmp_path / "sae")
    assert loaded.hash == sae.hash
    for name in ("architecture", "hook_point", "model_id", "k", "model_fingerprint"):
        assert getattr(loaded, name) == getattr(sae, name)
    for name in ("prepend_bos", "context_size", "conventions", "notes"):
        assert getattr(loaded, name) == getattr(sae, name)


def test_saving_again_replaces_the_whole_folder_and_leaves_nothing_beside(tmp_path: Path) -> None:
    saved(tmp_path)
    make_sae("jumprelu").save(tmp_path / "sae")
    assert load_sae(tmp_path / "sae").architecture == "jumprelu"
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


def test_a_failed_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path)
    before = load_sae(folder).hash

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saesteer.core.sae_files.save_file", full)
    with pytest.raises(SaeError, match=r"cannot write .*No space"):
        make_sae("jumprelu").save(folder)
    assert load_sae(folder).hash == before
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


def test_an_sae_saved_by_sae_lens_loads(tmp_path: Path) -> None:
    from sae_lens import SAE

    for kind in ARCHITECTURES:
        sae = make_sae(kind)
        sae.save(tmp_path / "ours")
        SAE.load_from_disk(tmp_path / "ours").save_model(tmp_path / "theirs")
        loaded = load_sae(tmp_path / "theirs")
        assert loaded.hash == sae.hash
        assert loaded.hook_point == sae.hook_point


def test_an_old_flat_configuration_loads_as_sae_lens_loads_it(tmp_path: Path) -> None:
    """The layout of SAELens before 6, as most published GPT-2 SAEs have it."""
    from sae_lens import SAE

    base = {
        "model_name": "gpt2-small",
        "hook_point": "blocks.2.hook_resid_pre",
        "hook_point_layer": 2,
        "hook_point_head_index": None,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "torch.float32",
        "device": "cpu",
        "context_size": 128,
        "prepend_bos": True,
        "normalize_activations": False,
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
    }
    cases: list[dict[str, Any]] = [
        {},
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
        {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False},
    ]
    for case in cases:
        folder = saved(tmp_path, "standard")
        (folder / "cfg.json").write_text(json.dumps(base | case))
        sae, oracle, x = load_sae(folder), SAE.load_from_disk(folder), activations(9)
        assert sae.hook_point == HookPoint(2, "resid_pre")
        assert sae.conventions.center_writing_weights
        assert (sae.model_id, sae.context_size) == ("gpt2-small", 128)
        # sae-lens leaves it to its user to centre the stream; here that is part of the SAE.
        expected = oracle.encode(x - x.mean(-1, keepdim=True))
        torch.testing.assert_close(sae.encode(x).dense(D_SAE), expected, atol=1e-5, rtol=1e-5)


def test_an_unfolded_input_scale_is_folded_or_refused(tmp_path: Path) -> None:
    from sae_lens import SAE

    folder = saved(tmp_path, "standard")
    edit_config(folder, normalize_activations="expected_average_only_in")
    assert "activation_scaler.json" in refused(folder)

    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.37}))
    sae, oracle, x = load_sae(folder), SAE.load_from_disk(folder), activations(9)
    oracle.fold_activation_norm_scaling_factor(0.37)
    assert sae.conventions.normalize_activations == "none"
    expected = oracle.encode(x)
    codes = sae.encode(x)
    torch.testing.assert_close(codes.dense(D_SAE), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(codes, x), oracle.decode(expected), atol=1e-5, rtol=1e-5)


# --- conventions refused by name -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architecture": "abstopk"}, "'abstopk'"),
        ({"architecture": "temporal"}, "'temporal'"),
        ({"architecture": "matching_pursuit"}, "'matching_pursuit'"),
        ({"architecture": "transcoder"}, "hook_name_out"),
        ({"architecture": None}, "no architecture"),
        ({"reshape_activations": "hook_z"}, "hook_z"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ({"metadata": {"hook_name": "blocks.1.attn.hook_z"}}, "hook_z"),
        ({"metadata": {"hook_name": None}}, "hook point"),
        ({"metadata": {"hook_head_index": 3}}, "hook_head_index=3"),
        ({"metadata": {"hook_name_out": "blocks.1.hook_mlp_out"}}, "no transcoder"),
        (
            {"metadata": {"model_from_pretrained_kwargs": {"checkpoint_index": 4}}},
            "checkpoint_index=4",
        ),
        ({"metadata": {"model_from_pretrained_kwargs": {"rescale_x": True}}}, "rescale_x=True"),
        ({"d_in": 768}, "d_in=768"),
        ({"d_sae": 7}, "d_sae=7"),
        ({"k": 0}, "k is 0"),
        ({"k": "many"}, "malformed"),
        ({"metadata": {"model_from_pretrained_kwargs": 3}}, "malformed"),
    ],
)
def test_conventions_not_reproduced_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    folder = saved(tmp_path)
    edit_config(folder, **changes)
    assert named in refused(folder)


def test_loading_options_that_leave_the_stream_alone_are_accepted(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    harmless = {"fold_ln": True, "center_unembed": True, "center_writing_weights": False}
    edit_config(folder, metadata={"model_from_pretrained_kwargs": harmless})
    assert not load_sae(folder).conventions.center_writing_weights


def test_old_activation_functions_and_scaling_factors_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "standard")
    tensors = load((folder / "sae_weights.safetensors").read_bytes())
    weights = folder / "sae_weights.safetensors"
    overwrite(weights, tensors | {"scaling_factor": torch.ones(D_SAE)})
    load_sae(folder)  # all ones: it changes nothing
    overwrite(weights, tensors | {"scaling_factor": torch.full((D_SAE,), 2.0)})
    assert "finetuning scaling_factor" in refused(folder)
    overwrite(weights, tensors)
    old = {"hook_point": "blocks.1.hook_resid_post", "activation_fn_str": "tanh-relu"}
    (folder / "cfg.json").write_text(json.dumps(old))
    assert "tanh-relu" in refused(folder)


# --- damaged or missing --------------------------------------------------------------------------


def test_damaged_folders_are_one_line(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    weights, config = folder / "sae_weights.safetensors", folder / "cfg.json"
    whole, text = weights.read_bytes(), config.read_text()
    tensors = load(whole)

    for part in (0, 5, 100, len(whole) - 8):
        weights.write_bytes(whole[:part])
        assert "truncated or damaged" in refused(folder)
    weights.write_bytes(b"x" * 4096)
    assert "truncated or damaged" in refused(folder)
    weights.unlink()
    assert "sae_weights.safetensors is missing" in refused(folder)

    overwrite(weights, {k: v for k, v in tensors.items() if k != "b_enc"})
    assert "lacks b_enc" in refused(folder)
    overwrite(weights, tensors | {"r_mag": torch.ones(D_SAE)})
    assert "r_mag" in refused(folder)
    overwrite(weights, tensors | {"W_dec": tensors["W_dec"][:3].contiguous()})
    assert "W_dec is of shape (3, 12)" in refused(folder)
    overwrite(weights, tensors | {"b_dec": torch.full((D_IN,), math.nan)})
    assert "b_dec holds NaN" in refused(folder)
    weights.write_bytes(whole)

    for broken in ("", text[:40], "[1, 2]", "\x00"):
        config.write_text(broken)
        assert "cfg.json" in refused(folder)
    config.unlink()
    assert "no cfg.json" in refused(folder)


def test_missing_sources_say_what_was_expected(tmp_path: Path) -> None:
    for source in (tmp_path / "nothing", "./nothing/here", "nothing"):
        assert "no SAE at" in refused(source)
    saved(tmp_path)
    assert "it holds sae" in refused(tmp_path)


# --- sparsify ------------------------------------------------------------------------------------


def sparsify_folder(tmp_path: Path, name: str = "layers.1", **config: Any) -> tuple[Path, Sae]:
    """A folder as sparsify's `save_to_disk` writes it, and the same SAE in our terms."""
    sae = make_sae("topk")
    folder = tmp_path / "run" / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            "encoder.weight": sae.W_enc.T.contiguous(),
            "encoder.bias": sae.b_enc,
            "W_dec": sae.W_dec,
            "b_dec": sae.b_dec,
        },
        folder / "sae.safetensors",
    )
    plain = {"d_in": D_IN, "num_latents": D_SAE, "k": K, "activation": "topk"}
    (folder / "cfg.json").write_text(json.dumps(plain | config))
    run = {"model": "EleutherAI/pythia-70m", "ctx_len": 64}
    (tmp_path / "run" / "config.json").write_text(json.dumps(run))
    return folder, sae


def test_a_sparsify_folder_loads(tmp_path: Path) -> None:
    """Its encoder is TopK of relu((x - b_dec) W_enc + b_enc), whatever normalize_decoder says."""
    for extra in ({}, {"normalize_decoder": True, "multi_topk": True}):
        folder, ours = sparsify_folder(tmp_path, **extra)
        sae, x = load_sae(folder), activations(11)
        assert sae.hook_point == HookPoint(1, "resid_post")
        assert (sae.model_id, sae.context_size, sae.k) == ("EleutherAI/pythia-70m", 64, K)
        pre = ((x - ours.b_dec) @ ours.W_enc + ours.b_enc).relu()
        values, latents = pre.topk(K)
        expected = torch.zeros(11, D_SAE).scatter(1, latents, values)
        codes = sae.encode(x)
        torch.testing.assert_close(codes.dense(D_SAE), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            sae.decode(codes, x), expected @ ours.W_dec + ours.b_dec, atol=1e-4, rtol=1e-5
        )


def test_a_sparsify_folder_equals_sae_lens_where_that_subtracts_b_dec(tmp_path: Path) -> None:
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader

    folder, ours = sparsify_folder(tmp_path, normalize_decoder=False)
    # sae-lens expects the decoder of early versions, an nn.Linear.
    tensors = load((folder / "sae.safetensors").read_bytes())
    del tensors["W_dec"]
    tensors["decoder.weight"] = ours.W_dec.T.contiguous()
    save_file(tensors, folder / "sae.safetensors")
    oracle = SAE.load_from_disk(folder, converter=sparsify_disk_loader, dtype="float32")
    x = activations(11)
    torch.testing.assert_close(
        load_sae(folder).encode(x).dense(D_SAE), oracle.encode(x), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "config", "named"),
    [
        ("layers.1", {"transcode": True}, "transcode=True"),
        ("layers.1", {"skip_connection": True}, "skip_connection=True"),
        ("layers.1", {"activation": "groupmax"}, "groupmax"),
        ("layers.1", {"signed": True}, "signed=True"),
        ("layers.1", {"k": None}, "k is None"),
        ("embed_tokens", {}, "embed_tokens"),
        ("layers.1", {"d_in": 99}, "d_in=99"),
    ],
)
def test_sparsify_conventions_not_reproduced_are_refused(
    tmp_path: Path, name: str, config: dict[str, Any], named: str
) -> None:
    folder, _ = sparsify_folder(tmp_path, name, **config)
    assert named in refused(folder)


def test_a_sparsify_mlp_is_refused_where_a_norm_follows_it(tmp_path: Path) -> None:
    folder, _ = sparsify_folder(tmp_path, "layers.1.mlp")
    point = HookPoint(1, "mlp_out")
    sae = load_sae(folder)
    assert sae.hook_point == point
    for arch, fits in (("llama", True), ("gemma2", False)):
        model = tiny_model(arch)
        width = model.config.hidden_size
        wide = replace(
            sae,
            W_enc=torch.zeros(width, D_SAE),
            W_dec=torch.zeros(D_SAE, width),
            b_dec=torch.zeros(width),
        )
        if fits:
            check_fits(wide, model, point, model_id="pythia-70m")
        else:
            with pytest.raises(SaeError, match=r"layers\.1\.mlp.*post"):
                check_fits(wide, model, point, model_id="pythia-70m")


# --- releases ------------------------------------------------------------------------------------


def test_a_release_goes_through_sae_lens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens import SAE

    folder = saved(tmp_path, "jumprelu")
    asked: list[tuple[str, str]] = []

    def from_pretrained(release: str, sae_id: str) -> Any:
        asked.append((release, sae_id))
        return SAE.load_from_disk(folder)

    monkeypatch.setattr(SAE, "from_pretrained", from_pretrained)
    loaded = load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert asked == [("gpt2-small-res-jb", "blocks.8.hook_resid_pre")]
    assert loaded.hash == make_sae("jumprelu").hash

    def fails(release: str, sae_id: str) -> Any:
        raise ValueError(f"ID {sae_id} not found\nin release {release}")

    monkeypatch.setattr(SAE, "from_pretrained", fails)
    assert "ID nonsense not found in release" in refused("gpt2-small-res-jb/nonsense")


def test_a_hub_repository_is_read_like_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = sparsify_folder(tmp_path)
    asked: list[Any] = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(folder.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_sae("owner/some-saes/layers.1").hash == load_sae(folder).hash
    assert asked == [("owner/some-saes", ["layers.1/*", "cfg.json", "config.json"])]

    def fails(repository: str, allow_patterns: list[str]) -> str:
        raise OSError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    message = refused("gpt2-small-res-j/blocks.8.hook_resid_pre")
    assert "did you mean 'gpt2-small-res-jb'" in message
    assert "no connection" in message
