"""Hook point names, loading, special tokens, fingerprints, and where things are in a model."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from saesteer.core import model as model_module
from saesteer.core.model import (
    EMBEDDED,
    SITES,
    HookPoint,
    d_model,
    decoder_layers,
    final_norm,
    fingerprint,
    load_model,
    site_module,
    special_token_ids,
    unembedding,
)
from saesteer.errors import HookPointError, ModelError
from tests.tiny import (
    ARCHITECTURES,
    BOS,
    EOS,
    LAYERS,
    PAD,
    UNK,
    VOCAB,
    WIDTH,
    tiny_model,
    tiny_tokenizer,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model with its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
def test_names_go_there_and_back(site: str) -> None:
    point = HookPoint(6, site)
    assert str(point) == f"layers.6.{site}"
    assert HookPoint.parse(str(point)) == point
    assert HookPoint.from_saelens(point.to_saelens()) == point


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.6.hook_resid_post", "layers.6.resid_post"),
        ("blocks.0.hook_attn_out", "layers.0.attn_out"),
        ("layers.3", "layers.3.resid_post"),
        ("h.5", "layers.5.resid_post"),
        ("model.layers.12", "layers.12.resid_post"),
        ("gpt_neox.layers.2.mlp", "layers.2.mlp_out"),
        ("layers.3.mlp", "layers.3.mlp_out"),
        ("transformer.h.4.attn", "layers.4.attn_out"),
        ("layers.3.resid_pre", "layers.3.resid_pre"),
    ],
)
def test_names_of_others(name: str, expected: str) -> None:
    assert str(HookPoint.from_saelens(name)) == expected


@pytest.mark.parametrize(
    "name", ["blocks.3.attn.hook_z", "blocks.3.hook_resid_mid", "layers.3.mlp.up_proj", "embed"]
)
def test_places_without_a_name_here_are_refused(name: str) -> None:
    with pytest.raises(HookPointError, match=name.replace(".", r"\.")):
        HookPoint.from_saelens(name)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("layers.6.resid_pots", "did you mean 'resid_post'"),
        ("blocks.6.hook_resid_post", "did you mean 'layers.6.resid_post'"),
        ("6.resid_post", "layers.<layer>.<site>"),
        ("layers.-1.resid_post", "layers.<layer>.<site>"),
        ("", "layers.<layer>.<site>"),
    ],
)
def test_a_wrong_name_says_what_is_right(text: str, hint: str) -> None:
    with pytest.raises(HookPointError, match=hint):
        HookPoint.parse(text)


def test_points_sort_by_depth() -> None:
    assert max(HookPoint(2, "attn_out"), HookPoint(10, "attn_out")).layer == 10


# --- loading -----------------------------------------------------------------------------------


def test_load_gives_a_frozen_model_in_eval_mode(folder: Path) -> None:
    model, tokenizer = load_model(str(folder))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert fingerprint(model) == fingerprint(tiny_model("llama"))
    assert tokenizer.bos_token_id == BOS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_load_in_a_dtype(folder: Path, dtype: str) -> None:
    assert load_model(str(folder), dtype=dtype)[0].dtype == getattr(torch, dtype)


@pytest.mark.parametrize(("stored", "loaded"), [("float16", "float32"), ("bfloat16", "bfloat16")])
def test_by_default_as_stored_but_not_half_on_a_cpu(
    tmp_path: Path, stored: str, loaded: str
) -> None:
    tiny_model("llama").to(getattr(torch, stored)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[0].dtype == getattr(torch, loaded)


def test_a_missing_folder_is_named_with_its_neighbour(folder: Path) -> None:
    with pytest.raises(ModelError, match="did you mean 'tiny-llama'"):
        load_model(str(folder.parent / "tiny-lama"))


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(ModelError, match="is a file"):
        (tmp_path / "model.bin").touch()
        load_model(str(tmp_path / "model.bin"))


def test_a_folder_without_weights_or_tokenizer(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(str(tmp_path / "a"))
    tiny_model("llama").save_pretrained(tmp_path / "b")
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_model(str(tmp_path / "b"))


def test_damaged_weights(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(str(tmp_path / "m"))


def test_incomplete_weights_are_not_filled_with_noise(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"incomplete.*layers\.1\.mlp\.up_proj"):
        load_model(str(tmp_path / "m"))


def test_an_unknown_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise OSError("nobody/nothing is not a valid model identifier\nand much more text")

    monkeypatch.setattr(model_module.AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(ModelError, match=r"nobody/nothing.*local folder") as caught:
        load_model("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_bad_arguments(folder: Path) -> None:
    with pytest.raises(ModelError, match="did you mean 'float32'"):
        load_model(str(folder), dtype="float23")
    with pytest.raises(ModelError, match="unknown device 'gpu'"):
        load_model(str(folder), device="gpu")
    with pytest.raises(ModelError, match="no model given"):
        load_model(" ")


def test_the_embedded_model_is_a_folder_of_the_package(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "_EMBEDDED_FOLDER", folder)
    assert load_model(EMBEDDED)[0].config.model_type == "llama"
    monkeypatch.setattr(model_module, "_EMBEDDED_FOLDER", tmp_path / "gone")
    with pytest.raises(ModelError, match="embedded model"):
        load_model(EMBEDDED)


# --- special tokens and fingerprints -----------------------------------------------------------


def test_special_ids_of_configuration_and_tokenizer() -> None:
    model = tiny_model("llama")
    assert special_token_ids(model) == {PAD, BOS, EOS}
    assert special_token_ids(model, tiny_tokenizer()) == {PAD, BOS, EOS, UNK}
    model.generation_config.eos_token_id = [EOS, 40]  # chat models end in several ways
    assert special_token_ids(model) == {PAD, BOS, EOS, 40}


def test_special_ids_where_nothing_is_declared() -> None:
    model = tiny_model("llama", pad_token_id=None, bos_token_id=None, eos_token_id=None)
    for name in ("pad", "bos", "eos"):
        setattr(model.config, f"{name}_token_id", None)
        setattr(model.generation_config, f"{name}_token_id", None)
    assert special_token_ids(model) == frozenset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fingerprint_survives_rounding(dtype: torch.dtype) -> None:
    model = tiny_model("gpt2")
    expected = fingerprint(model)
    assert fingerprint(model.to(dtype)) == expected


def test_a_fingerprint_tells_models_apart() -> None:
    model = tiny_model("gpt2")
    before = fingerprint(model)
    assert before == fingerprint(tiny_model("gpt2"))
    assert before != fingerprint(tiny_model("gpt2", seed=1))
    assert before != fingerprint(tiny_model("gpt2", vocab_size=80))
    with torch.no_grad():  # as little as a short fine-tuning: 1% of the weights' size
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(0)) * 1e-3)
    assert before != fingerprint(model)


# --- where things are --------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_parts_of_every_architecture(arch: str) -> None:
    model = tiny_model(arch)
    layers = decoder_layers(model)
    assert len(layers) == LAYERS
    assert d_model(model) == WIDTH
    assert unembedding(model).shape == (VOCAB, WIDTH)
    assert isinstance(final_norm(model), nn.Module)
    assert final_norm(model) not in set(layers.modules())
    for site in SITES:
        module, side = site_module(model, HookPoint(1, site))
        assert module in set(layers[1].modules())
        assert side == ("input" if site == "resid_pre" else "output")
    # A base model has the same blocks.
    assert len(decoder_layers(model.base_model)) == LAYERS


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(HookPointError, match=r"3 blocks, layers\.0 to layers\.2"):
        site_module(tiny_model("llama"), HookPoint(3, "resid_post"))


def test_a_model_without_blocks_says_what_was_looked_for() -> None:
    model = nn.Module()
    model.config = tiny_model("llama").config  # type: ignore[assignment]
    model.towers = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ModelError, match=r"ModuleList of 3 blocks.*towers \(1\)"):
        decoder_layers(model)


def test_the_text_decoder_of_a_multimodal_model() -> None:
    """Its vision tower has as many blocks, and comes first."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    small = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**small, "intermediate_size": 48, "head_dim": 8, "vocab_size": VOCAB},
        vision_config={**small, "intermediate_size": 48, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    model = Gemma3ForConditionalGeneration(config)
    names = {module: name for name, module in model.named_modules()}
    assert "language_model" in names[decoder_layers(model)]
    assert d_model(model) == 32
    assert "language_model" in names[final_norm(model)]


def test_other_towers_are_passed_over_however_near_they_stand() -> None:
    model = nn.Module()
    model.config = tiny_model("llama").config  # type: ignore[assignment]
    model.vision = nn.Module()
    model.vision.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(LAYERS))
    model.text = tiny_model("llama")
    assert decoder_layers(model) is model.text.model.layers


def test_scaled_halves_are_refused_by_name() -> None:
    model = tiny_model("granite", residual_multiplier=0.5)
    with pytest.raises(HookPointError, match=r"residual_multiplier=0\.5"):
        site_module(model, HookPoint(1, "mlp_out"))
    assert site_module(model, HookPoint(1, "resid_post"))[1] == "output"
