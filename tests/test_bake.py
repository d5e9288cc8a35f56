"""Baked edits: stock weights that do what the steered model does, or a refusal that says why."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from saesteer.core.hooks import capture
from saesteer.core.model import EMBEDDED, HookPoint, load_model
from saesteer.errors import HookPointError, SteeringError
from saesteer.steering import bake as bake_module
from saesteer.steering import bake_changes
from saesteer.steering.bake import EVERYWHERE, ablation_everywhere, bake
from saesteer.steering.bake_changes import Changes, without_direction
from saesteer.steering.bake_check import Agreement
from saesteer.steering.conditions import Projection, When
from saesteer.steering.edits import Add, Affine, Clamp, Edit, Project, Rotate, place
from saesteer.steering.engine import steer
from saesteer.steering.positions import Positions
from saesteer.steering.schedules import Linear
from tests.test_hooks import unchanged
from tests.tiny import (
    ARCHITECTURES,
    BOS,
    EOS,
    LAYERS,
    PAD,
    WIDTH,
    random_ids,
    tiny_model,
    tiny_sae,
    tiny_tokenizer,
)

VECTOR = torch.randn(WIDTH, generator=torch.Generator().manual_seed(5))
KINDS = ("attn_out", "resid_post", "ablation")
NO_BIAS = "and no setting of its configuration gives it one"
NORMED = "was normed after the last matrix"
MIXED = "is no linear layer's output"
# What can't be baked, and why. Everything else can.
REFUSED: dict[str, dict[str, str]] = {
    "bloom": {"ablation": "word_embeddings_layernorm comes between"},
    "gemma": {"resid_post": NO_BIAS},
    "gemma2": dict.fromkeys(KINDS, NORMED),
    "gemma3_text": dict.fromkeys(KINDS, NORMED),
    "mistral": {"attn_out": NO_BIAS, "resid_post": NO_BIAS},
    "mixtral": {"attn_out": NO_BIAS, "resid_post": MIXED},
    "mpt": {"attn_out": NO_BIAS, "resid_post": NO_BIAS},
    "olmo2": dict.fromkeys(KINDS, NORMED),
    "phi3": {"attn_out": NO_BIAS, "resid_post": NO_BIAS},
    "qwen2": {"attn_out": NO_BIAS, "resid_post": NO_BIAS},
    "qwen3": {"resid_post": NO_BIAS},
    "qwen3_moe": {"resid_post": MIXED},
    "stablelm": {"attn_out": NO_BIAS, "resid_post": NO_BIAS},
}


def add(point: str, strength: float = 2.0, vector: Tensor = VECTOR, **scope: Any) -> Add:
    return Add(vector, strength, point, **{"where": EVERYWHERE, **scope})


def edits_of(kind: str, model: PreTrainedModel) -> list[Edit]:
    if kind == "ablation":
        return ablation_everywhere(model, VECTOR)
    return [add(f"layers.1.{kind}")]


@cache
def shared_model(arch: str) -> PreTrainedModel:
    return tiny_model(arch)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def no_trace(folder: Path) -> bool:
    return list(folder.parent.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_architecture_bakes_or_is_refused(arch: str, kind: str, tmp_path: Path) -> None:
    model, folder = shared_model(arch), tmp_path / "baked"
    edits = edits_of(kind, model)
    if reason := REFUSED.get(arch, {}).get(kind):
        with unchanged(model), pytest.raises(SteeringError, match=reason) as refused:
            bake(model, edits, folder)
        assert type(model).__name__ in str(refused.value)
        assert no_trace(folder)
        return
    with unchanged(model):
        baked = bake(model, edits, folder)
    assert baked.folder == folder
    assert baked.error < 1e-4
    assert baked.effect > 100 * baked.error
    # Apart from bake's own check: other texts, and generation.
    stock, ids = load(folder), random_ids(3, 11, seed=7)
    ids[:, 0] = BOS
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    how["attention_mask"] = torch.ones_like(ids)
    with steer(model, edits):
        wanted = model(ids).logits
        text = model.generate(ids, **how)
    assert torch.allclose(stock(ids).logits, wanted, atol=1e-4)
    assert not torch.allclose(model(ids).logits, wanted, atol=1e-2)
    assert torch.equal(stock.generate(ids, **how), text)


def test_a_place_is_the_bias_that_writes_there(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    before = dict(model.named_parameters())
    for n, (point, name) in enumerate(
        {
            "layers.1.resid_post": "transformer.h.1.mlp.c_proj.bias",
            "layers.2.resid_pre": "transformer.h.1.mlp.c_proj.bias",
            "layers.1.mlp_out": "transformer.h.1.mlp.c_proj.bias",
            "layers.0.attn_out": "transformer.h.0.attn.c_proj.bias",
        }.items()
    ):
        baked = bake(model, add(point), tmp_path / str(n))
        assert baked.changed == (name,)
        assert baked.settings == {}
        after = load(baked.folder).state_dict()
        assert torch.allclose(after[name], before[name] + 2 * VECTOR)
        for other, parameter in before.items():
            assert other == name or torch.equal(after[other], parameter)


def test_several_additions_add_up(tmp_path: Path) -> None:
    model = tiny_model("llama")
    other = VECTOR.flip(0).requires_grad_()
    edits = [
        add("layers.0.resid_post"),
        add("layers.1.resid_pre", -0.5, other),
        add("layers.2.attn_out", 1.5, other),
        add("layers.1.head.3", 3.0, VECTOR[:8]),
    ]
    baked = bake(model, edits, tmp_path / "baked")
    assert baked.error < 1e-4
    assert baked.settings == {"attention_bias": True, "mlp_bias": True}
    after = load(baked.folder)
    biases = {n: p for n, p in after.named_parameters() if n.endswith(".bias")}
    assert len(biases) == LAYERS * (4 + 3)
    assert {n for n, p in biases.items() if p.any()} == set(baked.changed)
    mlp = biases["model.layers.0.mlp.down_proj.bias"]
    assert torch.allclose(mlp, 2 * VECTOR - 0.5 * other.detach())
    projection = model.get_parameter("model.layers.1.self_attn.o_proj.weight")
    head = biases["model.layers.1.self_attn.o_proj.bias"]
    assert torch.allclose(head, 3 * projection[:, 24:] @ VECTOR[:8], atol=1e-5)


def test_parallel_halves_lend_each_other_their_bias(tmp_path: Path) -> None:
    baked = bake(tiny_model("gptj"), add("layers.1.attn_out"), tmp_path / "baked")
    assert baked.changed == ("transformer.h.1.mlp.fc_out.bias",)


@pytest.mark.parametrize("arch", ["gpt2", "opt", "llama", "gemma"])
def test_ablated_weights_never_write_the_direction(arch: str, tmp_path: Path) -> None:
    model = tiny_model(arch)
    vector = (7 * VECTOR).requires_grad_()
    baked = bake(model, ablation_everywhere(model, vector), tmp_path / "baked")
    after = load(baked.folder)
    points = [HookPoint(n, site) for n in range(LAYERS) for site in ("resid_pre", "resid_post")]
    unit = VECTOR / VECTOR.norm()
    with capture(after, points) as stream, torch.no_grad():
        after(random_ids(2, 6))
    for x in stream.values():
        assert float((x @ unit).abs().max()) < 1e-5 * float(x.norm(dim=-1).max())
    # The unembedding reads the stream and writes nothing: it stays, untied.
    head = after.get_output_embeddings().weight
    assert torch.equal(head, model.get_output_embeddings().weight)
    assert head is not after.get_input_embeddings().weight
    assert baked.settings == ({} if arch == "llama" else {"tie_word_embeddings": False})
    table = after.get_input_embeddings().weight
    assert torch.allclose(table, without_direction(model.get_input_embeddings().weight, unit, 1))


MOE: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": WIDTH},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
}


@pytest.mark.parametrize("arch", MOE)
def test_every_expert_is_orthogonalised(arch: str, tmp_path: Path) -> None:
    """With d_ff = d_model in one, whose experts' matrices lie the other way round, with biases;
    with an expert that all tokens share in the other."""
    model = tiny_model(arch, num_experts_per_tok=2, num_key_value_heads=2, **MOE[arch])
    baked = bake(model, ablation_everywhere(model, VECTOR), tmp_path / "baked")
    assert baked.error < 1e-4
    own = {"gpt_oss": "experts.down_proj_bias", "qwen2_moe": "shared_expert.down_proj.weight"}
    assert f"model.layers.2.mlp.{own[arch]}" in baked.changed


def test_ablation_everywhere_is_at_every_write() -> None:
    edits = ablation_everywhere(tiny_model("gemma2"), VECTOR)
    assert all(isinstance(edit, Project) and edit.to == 0 for edit in edits)
    assert [str(edit.point) for edit in edits] == [
        "layers.0.resid_pre",
        *(f"layers.{n}.{site}" for n in range(LAYERS) for site in ("attn_out", "mlp_out")),
    ]
    # At run time it works in architectures too whose weights can't hold it.
    model, unit = tiny_model("gemma2"), VECTOR / VECTOR.norm()
    last = HookPoint(LAYERS - 1, "resid_post")
    with steer(model, edits), capture(model, [last]) as stream:
        model(random_ids(2, 6))
    assert float((stream[last] @ unit).abs().max()) < 1e-5


def test_a_complete_list_may_say_more(tmp_path: Path) -> None:
    model = tiny_model("llama")
    edits = ablation_everywhere(model, VECTOR)
    edits[2] = Project(-3 * VECTOR, place(edits[2]), where=EVERYWHERE)
    edits.append(Project(VECTOR, "layers.1.resid_post", where=EVERYWHERE))
    assert bake(model, edits, tmp_path / "baked").error < 1e-4


def test_padding_beside_a_text_changes_nothing(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    edits = [add("layers.0.attn_out"), add("layers.1.resid_post")]
    stock = load(bake(model, edits, tmp_path / "baked").folder)
    ids = random_ids(2, 9)
    ids[0, :4], mask = PAD, torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    call = {"input_ids": ids, "attention_mask": mask}
    call["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with steer(model, edits):
        wanted = model(**call).logits
    assert torch.allclose(stock(**call).logits[mask == 1], wanted[mask == 1], atol=1e-4)


@pytest.mark.parametrize("kind", ["resid_post", "ablation"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("gpt2").to(dtype)
    baked = bake(model, edits_of(kind, model), tmp_path / "baked")
    assert 0 < baked.relative_error < (0.1 if dtype == torch.bfloat16 else 0.02)
    after = load(baked.folder)
    assert {parameter.dtype for parameter in after.parameters()} == {dtype}


def test_the_embedded_model_with_its_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = load_model(EMBEDDED)
    width = model.config.hidden_size
    vector = torch.randn(width, generator=torch.Generator().manual_seed(1))
    edits = [Add(vector, 1.0, "layers.1.resid_post", where=EVERYWHERE)]
    baked = bake(model, edits, tmp_path / "deep" / "baked", tokenizer=tokenizer)
    assert baked.relative_error < 1e-5
    text = "The boy walked to"
    again = AutoTokenizer.from_pretrained(baked.folder)
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    kept = load(baked.folder).generation_config
    assert kept.eos_token_id == model.generation_config.eos_token_id


def test_doing_nothing_is_baked_as_nothing(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    baked = bake(model, add("layers.1.resid_post", 0.0), tmp_path / "baked")
    assert (baked.error, baked.effect) == (0, 0)


UNBAKEABLE: dict[str, tuple[Any, str]] = {
    "no edits": ([], "no edits given"),
    "no edit": (["layers.1"], "str is not an edit"),
    "rows": ([[add("layers.1.mlp_out")], []], "lists of edits for each row"),
    "clamp": (Clamp(tiny_sae(), 3, 1.0, where=EVERYWHERE), "depends on what the SAE reads"),
    "affine": (Affine(torch.eye(WIDTH), VECTOR, "layers.1.mlp_out", where=EVERYWHERE), "affine"),
    "rotate": (Rotate(VECTOR, VECTOR.flip(0), 1.0, "layers.1.mlp_out"), "a rotation depends"),
    "positions": (Add(VECTOR, 1.0, "layers.1.mlp_out"), r"where=Positions\(special=True\)"),
    "some tokens": (
        add("layers.1.mlp_out", where=Positions(special=True, first=2)),
        "the prompt's first 2, and weights act on every token",
    ),
    "condition": (
        add("layers.1.mlp_out", when=When(Projection(VECTOR, "layers.0.resid_post"), above=0.0)),
        "its condition is worked out on each token",
    ),
    "schedule": (add("layers.1.mlp_out", schedule=Linear()), "its schedule counts"),
    "norm": (add("layers.1.mlp_out", keep_norm=True), "keep_norm depends on the activation"),
    "entrance": (add("layers.0.resid_pre"), "embeddings write it, which have no bias"),
    "value": (Project(VECTOR, "layers.1.mlp_out", 2.0, where=EVERYWHERE), "a value other than 0"),
    "one place": (
        Project(VECTOR, "layers.1.mlp_out", where=EVERYWHERE),
        "these lack: layers.0.resid_pre, layers.0.attn_out, layers.0.mlp_out, layers.1.attn_out "
        "and 2 more; use ablation_everywhere",
    ),
    "directions": (
        [Project(v, "layers.1.mlp_out", where=EVERYWHERE) for v in (VECTOR, VECTOR.flip(0))],
        "several directions",
    ),
    "head": (Project(VECTOR[:8], "layers.1.head.2", where=EVERYWHERE), "a head's output"),
    "both": (
        [add("layers.1.mlp_out"), Project(VECTOR, "layers.1.mlp_out", where=EVERYWHERE)],
        "additions and projections can't be baked at once",
    ),
    "width": (add("layers.1.mlp_out", vector=VECTOR[:5]), "made for 5 dimensions"),
}


@pytest.mark.parametrize("name", UNBAKEABLE)
def test_what_weights_cannot_hold(name: str, tmp_path: Path) -> None:
    edits, reason = UNBAKEABLE[name]
    model, folder = tiny_model("gpt2"), tmp_path / "baked"
    with unchanged(model), pytest.raises(SteeringError, match=reason):
        bake(model, edits, folder)
    assert no_trace(folder)


def test_one_write_left_out(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    edits = ablation_everywhere(model, VECTOR)
    del edits[4]
    with pytest.raises(SteeringError, match=r"these lack: layers\.1\.mlp_out; use"):
        bake(model, edits, tmp_path / "baked")


def test_models_that_cannot_be_baked(tmp_path: Path) -> None:
    folder, edit = tmp_path / "baked", add("layers.1.resid_post")

    def refused(model: Any, reason: str, edits: Any = edit) -> None:
        with pytest.raises(SteeringError, match=reason):
            bake(model, edits, folder)
        assert no_trace(folder)

    refused(tiny_model("gpt2").train(), "training mode")
    refused(nn.Sequential(tiny_model("gpt2")), "Sequential can't be baked: it is no transformers")
    quantized = tiny_model("gpt2")
    quantized.is_quantized = True
    refused(quantized, "quantised")
    absent = tiny_model("gpt2")
    absent.transformer.ln_f.to("meta")
    refused(absent, "not in memory")
    scaled = tiny_model("granite", residual_multiplier=0.5)
    refused(scaled, r"GraniteForCausalLM .*residual_multiplier=0.5")
    after = tiny_model("opt", do_layer_norm_before=False)
    refused(after, "OPTForCausalLM can't be baked: .* is not what it adds to the stream; steer at")
    narrow = tiny_model("opt", word_embed_proj_dim=16)
    refused(narrow, r"project_in comes between", ablation_everywhere(narrow, VECTOR))
    sines = tiny_model(
        "xglm", d_model=WIDTH, ffn_dim=48, num_layers=LAYERS, attention_heads=4, dropout=0
    )
    refused(sines, "not a sum of embeddings", ablation_everywhere(sines, VECTOR))
    with pytest.raises(HookPointError, match="3 blocks"):
        bake(tiny_model("gpt2"), add("layers.7.resid_post"), folder)


def test_a_wrong_bake_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = tiny_model("gpt2"), tmp_path / "baked"

    def backwards(model: PreTrainedModel, edits: Any) -> Changes:
        right = bake_changes.additions(model, edits)
        held = dict(model.named_parameters())
        return Changes({n: 2 * held[n] - t for n, t in right.tensors.items()}, right.settings)

    monkeypatch.setattr(bake_module, "additions", backwards)
    with unchanged(model), pytest.raises(SteeringError, match=r"differ by up to [1-9]\.\d+ "):
        bake(model, add("layers.1.resid_post"), folder)
    assert no_trace(folder)
    # So small that it would pass by the tolerance alone.
    with pytest.raises(SteeringError, match=r"\(0.000\d+ standard deviations, 0.001 are allowed"):
        bake(model, add("layers.1.resid_post", 2e-5), folder)
    assert no_trace(folder)


@pytest.mark.parametrize("forgotten", ["wpe.weight", "h.1.attn.c_proj.bias", "h.2.mlp.c_proj.wei"])
def test_a_forgotten_write_is_caught(
    forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt2")

    def incomplete(model: PreTrainedModel, edits: Any) -> Changes:
        right = bake_changes.ablation(model, edits)
        tensors = {n: t for n, t in right.tensors.items() if forgotten not in n}
        assert len(tensors) == len(right.tensors) - 1
        return Changes(tensors, right.settings)

    monkeypatch.setattr(bake_module, "ablation", incomplete)
    with pytest.raises(SteeringError, match="the baked model is not the steered one"):
        bake(model, ablation_everywhere(model, VECTOR), tmp_path / "baked")
    assert no_trace(tmp_path / "baked")


def test_weights_that_stock_code_does_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder whose config.json makes other parameters than were written."""
    inner = bake_module._save

    def forgetful(model: PreTrainedModel, changes: Changes, folder: Path) -> None:
        inner(model, changes, folder)
        model.config.save_pretrained(folder)

    monkeypatch.setattr(bake_module, "_save", forgetful)
    with pytest.raises(SteeringError, match=r"not what stock LlamaForCausalLM reads: \d+ weights"):
        bake(tiny_model("llama"), add("layers.1.resid_post"), tmp_path / "baked")
    assert no_trace(tmp_path / "baked")


def test_when_models_agree() -> None:
    def holds(error: float, effect: float) -> bool:
        return Agreement(error, spread=2.0, effect=effect, tolerance=0.01).holds

    assert holds(0.0, 0.0)
    assert holds(0.015, 1.0)
    assert not holds(0.021, 1.0)
    assert not holds(0.015, 0.02)
    assert not holds(float("nan"), 1.0)


def test_the_folder(tmp_path: Path) -> None:
    model, edit = tiny_model("gpt2"), add("layers.1.resid_post")
    (tmp_path / "empty").mkdir()
    assert bake(model, edit, tmp_path / "empty").error < 1e-4
    with pytest.raises(SteeringError, match="is there already"):
        bake(model, edit, tmp_path / "empty")
    assert load(tmp_path / "empty") is not None
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(SteeringError, match="file"):
            bake(model, edit, path)
    assert {each.name for each in tmp_path.iterdir()} == {"empty", "file"}


def test_the_model_is_told_to_stop_as_before(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    baked = bake(model, add("layers.1.mlp_out"), tmp_path / "baked", tokenizer=tokenizer)
    after = load(baked.folder)
    assert (after.generation_config.eos_token_id, after.config.eos_token_id) == (EOS, EOS)
    assert not model.config.mlp_bias
    assert after.config.mlp_bias
