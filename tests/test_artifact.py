"""Edits saved and loaded do the same to the bit, and a file that can't be trusted is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from saesteer.core.model import HookPoint, fingerprint
from saesteer.core.sae import Sae
from saesteer.errors import RunError, SteeringError
from saesteer.steering import artifact
from saesteer.steering.artifact import load_edits, read_document, save_edits
from saesteer.steering.conditions import Feature, Projection, When
from saesteer.steering.edits import Add, Affine, Clamp, Edit, Project, Rotate
from saesteer.steering.engine import steer
from saesteer.steering.positions import Positions
from saesteer.steering.schedules import Decay, Linear
from tests.tiny import WIDTH, random_ids, tiny_model, tiny_sae, tiny_tokenizer

MIDDLE = HookPoint(1, "resid_post")
EARLIER = HookPoint(0, "resid_post")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


def vector(seed: int = 0, size: int = WIDTH) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, edits: list[Edit]) -> Tensor:
    ids = random_ids(2, 12)
    with torch.no_grad(), steer(model, edits, tokenizer=tiny_tokenizer(), prompt_length=5):
        return model(ids).logits


def saved(tmp_path: Path, model: PreTrainedModel, edits: Any, **kwargs: Any) -> Path:
    path = tmp_path / "edits.safetensors"
    save_edits(path, edits, model, **kwargs)
    return path


def same(tmp_path: Path, model: PreTrainedModel, edits: list[Edit], **given: Any) -> list[Edit]:
    """Save, load, compare what they do, and give what was loaded."""
    loaded = load_edits(saved(tmp_path, model, edits), model, **given)
    before = logits(model, edits)
    with torch.no_grad():
        plain = model(random_ids(2, 12)).logits
    assert not torch.equal(before, plain)
    assert torch.equal(logits(model, loaded), before)
    assert [type(each) for each in loaded] == [type(each) for each in edits]
    return loaded


KINDS: dict[str, Callable[..., Edit]] = {
    "add": lambda **scope: Add(vector(), 1.7, MIDDLE, **scope),
    "add at a head": lambda **scope: Add(vector(size=8), 3.0, "layers.1.head.2", **scope),
    "add bfloat16": lambda **scope: Add(vector().bfloat16(), 0.1, "layers.2.mlp_out", **scope),
    "add float64": lambda **scope: Add(vector().double(), 0.1, "layers.0.resid_pre", **scope),
    "project": lambda **scope: Project(vector(), "layers.1.attn_out", 0.3, **scope),
    "affine": lambda **scope: Affine(
        vector(2, WIDTH**2).view(WIDTH, -1), vector(), MIDDLE, **scope
    ),
    "rotate": lambda **scope: Rotate(vector(), vector(1), 0.7, MIDDLE, "to", **scope),
    "set": lambda **scope: Clamp(tiny_sae(), 7, 2.5, **scope),
    "min": lambda **scope: Clamp(tiny_sae("jumprelu"), 63, 1.5, "min", **scope),
    "max": lambda **scope: Clamp(tiny_sae("gated"), 0, 0.05, "max", **scope),
    "scale": lambda **scope: Clamp(tiny_sae(), 3, 1 / 3, "scale", "layers.2.resid_pre", **scope),
}
SCOPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "keeps norm": {"keep_norm": True},
    "linear": {"schedule": Linear(1.5, 0.25, 3)},
    "decay": {"schedule": Decay(math.pi)},
    "ends": {"where": Positions(first=2, last=1, special=True, generated=False)},
    "spans": {"where": Positions(spans=((1, 3), (5, None)), every=2, prompt=False)},
    "after": {"where": Positions(after=" ")},
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_with_every_option_comes_back(
    kind: str, scope: str, tmp_path: Path, model: PreTrainedModel
) -> None:
    edit = KINDS[kind](**SCOPES[scope])
    (loaded,) = same(tmp_path, model, [edit])
    assert (loaded.where, loaded.schedule) == (edit.where, edit.schedule)
    assert loaded.point == edit.point and loaded.keep_norm is edit.keep_norm


def conditions() -> dict[str, When]:
    return {
        "feature": When(Feature(tiny_sae(), 9), 0.1),
        "feature elsewhere": When(Feature(tiny_sae("gated", seed=3), 9, EARLIER), 0.1, "from"),
        "projection": When(Projection(vector(), MIDDLE, offset=0.2), 0.1, "until"),
        "always": When(Projection(vector(), EARLIER), -math.inf),
    }


@pytest.mark.parametrize("name", conditions())
def test_conditions_come_back(name: str, tmp_path: Path, model: PreTrainedModel) -> None:
    same(tmp_path, model, [Add(vector(), 2.0, MIDDLE, when=conditions()[name])])


def test_what_edits_share_they_share_again(tmp_path: Path, model: PreTrainedModel) -> None:
    sae, when, other = tiny_sae(), conditions()["projection"], conditions()["projection"]
    edits: list[Edit] = [
        Clamp(sae, 40, 2.0, when=when),
        Clamp(sae, 2, 1.0, when=when),
        Add(vector(), 1.0, MIDDLE, when=other),
        Project(vector(5), MIDDLE, when=When(Feature(sae, 11), 0.0)),
    ]
    loaded = same(tmp_path, model, edits)
    first, second, third, fourth = loaded
    assert first.when is second.when and first.when is not third.when
    assert isinstance(first, Clamp) and isinstance(second, Clamp) and first.sae is second.sae
    assert fourth.when is not None and isinstance(fourth.when.reads, Feature)
    assert fourth.when.reads.sae is first.sae
    # The features used and no others, under their old numbers.
    assert first.sae.d_sae == 3
    features = first.sae.notes["narrowed_from"]["features"]
    assert [features[i] for i in (first.feature, second.feature, fourth.when.reads.feature)] == [
        40,
        2,
        11,
    ]


CONVENTIONS: list[dict[str, Any]] = [
    {"apply_b_dec_to_input": False},
    {"normalize_activations": "layer_norm"},
    {"normalize_activations": "constant_norm_rescale"},
    {"center_writing_weights": True},
]


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
@pytest.mark.parametrize("conventions", CONVENTIONS, ids=str)
def test_all_that_changes_a_code_comes_back(
    architecture: str, conventions: dict[str, Any], tmp_path: Path, model: PreTrainedModel
) -> None:
    sae = tiny_sae(architecture, **conventions)
    (loaded,) = same(tmp_path, model, [Clamp(sae, 5, 2.0)])
    assert isinstance(loaded, Clamp)
    assert loaded.sae.conventions == sae.conventions
    assert loaded.sae.hash == sae.narrowed([5]).hash
    assert (loaded.sae.model_id, loaded.sae.hook_point) == (sae.model_id, sae.hook_point)


def test_an_sae_at_a_head_comes_back(tmp_path: Path, model: PreTrainedModel) -> None:
    sae = tiny_sae(point=HookPoint(1, "head.2"), d_in=8, d_sae=16)
    (loaded,) = same(tmp_path, model, [Clamp(sae, 5, 9.0)])
    assert isinstance(loaded, Clamp) and loaded.sae.hook_point == HookPoint(1, "head.2")


def test_a_transcoder_in_a_condition_comes_back(tmp_path: Path, model: PreTrainedModel) -> None:
    plain = tiny_sae(apply_b_dec_to_input=False, point=HookPoint(1, "resid_pre"))
    parts = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
    parts |= {"hook_point_out": HookPoint(1, "mlp_out"), "W_skip": torch.randn(WIDTH, WIDTH)}
    when = When(Feature(Sae(**parts), 4), 0.05)
    (loaded,) = same(tmp_path, model, [Add(vector(), 1.0, MIDDLE, when=when)])
    assert loaded.when is not None and isinstance(loaded.when.reads, Feature)
    assert loaded.when.reads.sae.hook_point_out == HookPoint(1, "mlp_out")


def test_saved_again_features_keep_their_old_numbers(
    tmp_path: Path, model: PreTrainedModel
) -> None:
    sae = tiny_sae()
    once = same(tmp_path, model, [Clamp(sae, 40, 2.0), Clamp(sae, 7, 1.0)])
    (twice,) = same(tmp_path, model, [once[1]])
    assert isinstance(twice, Clamp)
    origin = twice.sae.notes["narrowed_from"]
    assert (origin["hash"], origin["features"]) == (sae.hash, [7])
    # The whole SAE fits the file all the same, and then the numbers are its own.
    (whole,) = same(tmp_path, model, [twice], sae=sae)
    assert isinstance(whole, Clamp) and whole.sae is sae and whole.feature == 7


def test_an_sae_changed_after_loading_counts_as_one_of_its_own(
    tmp_path: Path, model: PreTrainedModel
) -> None:
    sae = tiny_sae()
    (first, _) = same(tmp_path, model, [Clamp(sae, 40, 2.0), Clamp(sae, 7, 1.0)])
    assert isinstance(first, Clamp)
    turned = first.sae.narrowed([1, 0])
    (loaded,) = same(tmp_path, model, [Clamp(turned, 0, 1.0)])
    assert isinstance(loaded, Clamp)
    assert loaded.sae.notes["narrowed_from"]["hash"] == turned.hash
    assert loaded.sae.notes["narrowed_from"]["features"] == [0]


def test_a_topk_sae_is_asked_for_by_its_hash(tmp_path: Path, model: PreTrainedModel) -> None:
    sae = tiny_sae("topk", rescale_acts_by_decoder_norm=True)
    edits: list[Edit] = [Clamp(sae, 40, 3.0)]
    (loaded,) = same(tmp_path, model, edits, sae=sae)
    assert isinstance(loaded, Clamp) and loaded.sae is sae and loaded.feature == 40
    path = saved(tmp_path, model, edits)
    with safe_open(path, "pt") as file:
        assert not list(file.keys())
    with pytest.raises(SteeringError, match=rf"topk SAE.*{sae.hash}.*sae="):
        load_edits(path, model)
    with pytest.raises(SteeringError, match=f"hash {tiny_sae('topk', seed=1).hash}.*{sae.hash}"):
        load_edits(path, model, sae=tiny_sae("topk", seed=1))
    both: list[Edit] = [*edits, Clamp(tiny_sae("topk", seed=1), 1, 3.0)]
    same(tmp_path, model, both, sae=[tiny_sae("topk", seed=1), sae])


def test_an_sae_that_no_edit_uses_is_refused(tmp_path: Path, model: PreTrainedModel) -> None:
    path = saved(tmp_path, model, [Add(vector(), 1.0, MIDDLE)])
    with pytest.raises(SteeringError, match="made with none"):
        load_edits(path, model, sae=tiny_sae())


def test_the_document_says_where_the_edits_come_from(
    tmp_path: Path, model: PreTrainedModel
) -> None:
    sae = tiny_sae()
    path = saved(
        tmp_path,
        model,
        Clamp(sae, 3, 1.0),
        note="8x of «ocean»",
        provenance={"method": "search", "n": 3},
    )
    document = read_document(path)
    assert document["note"] == "8x of «ocean»" and document["units"] == "raw"
    assert document["provenance"] == {"method": "search", "n": 3}
    assert document["model"]["fingerprint"] == fingerprint(model)
    (entry,) = document["saes"]
    assert (entry["hash"], entry["model_id"], entry["features"]) == (sae.hash, "tiny", [3])
    assert document["edits"][0]["feature"] == 3


def test_numbers_of_numpy_and_torch_are_kept(tmp_path: Path, model: PreTrainedModel) -> None:
    above, offset = torch.tensor(0.25), vector().numpy()[0]
    when = When(Projection(vector(), MIDDLE, offset=offset), above)  # type: ignore[arg-type]
    (loaded,) = same(tmp_path, model, [Add(vector(), 1.0, MIDDLE, when=when)])
    assert loaded.when is not None and loaded.when.above == 0.25


def test_another_model_is_refused_unless_forced(tmp_path: Path, model: PreTrainedModel) -> None:
    path = saved(tmp_path, model, [Add(vector(), 1.0, MIDDLE)])
    other = tiny_model(seed=1)
    with pytest.raises(SteeringError, match=f"{fingerprint(other)}.*{fingerprint(model)}.*force"):
        load_edits(path, other)
    (forced,) = load_edits(path, other, force=True)
    assert isinstance(forced, Add) and torch.equal(forced.vector, vector())


def test_weights_that_are_only_larger_are_other_weights(tmp_path: Path) -> None:
    """No sign of them differs, which is all that the fingerprint goes by; rounding is no change."""
    model = tiny_model()
    path = saved(tmp_path, model, [Add(vector(), 1.0, MIDDLE)])
    for rounded in (torch.bfloat16, torch.float16):
        load_edits(path, tiny_model().to(rounded))
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.mul_(1.03)
    with pytest.raises(SteeringError, match="1 of its parameters are of another size"):
        load_edits(path, model)


def rewritten(
    path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None], *, sealed: bool
) -> None:
    """Change a file's document or tensors; sealed: with a digest that fits."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        document = json.loads((file.metadata() or {})["saesteer"])
    change(document, tensors)
    if sealed:
        document.pop("sha256")
        document["sha256"] = artifact._digest(document, tensors)
    save_file(tensors, path, metadata={"saesteer": json.dumps(document)})


def _stronger(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    document["edits"][0]["strength"] = 100.0


def _turned(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["tensors.0"][3] *= -1


def _renamed(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["other"] = tensors.pop("tensors.0")


@pytest.mark.parametrize("change", [_stronger, _turned, _renamed])
def test_a_tampered_file_is_refused(
    change: Callable[..., None], tmp_path: Path, model: PreTrainedModel
) -> None:
    path = saved(tmp_path, model, [Add(vector(), 1.0, MIDDLE)])
    rewritten(path, lambda document, tensors: None, sealed=False)
    load_edits(path, model)  # rewriting alone does no harm
    rewritten(path, change, sealed=False)
    with pytest.raises(SteeringError, match=r"damaged.*SHA-256.*again"):
        load_edits(path, model)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(length: int, tmp_path: Path, model: PreTrainedModel) -> None:
    path = saved(tmp_path, model, [Add(vector(), 1.0, MIDDLE)])
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(SteeringError, match=r"truncated or damaged.*again"):
        load_edits(path, model)


def _newer(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    document |= {"version": 2, "saesteer": "9.0"}


def _warp(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    document["edits"][0]["kind"] = "Warp"


def _odd_field(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    document["edits"][0]["colour"] = "red"


def _odd_tensor(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    document["edits"][0]["vector"] = {"tensor": "tensors.7"}


def _no_edits(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    del document["edits"]


def _odd_point(document: dict[str, Any], _: dict[str, Tensor]) -> None:
    document["edits"][0]["point"] = "layers.1.nowhere"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_newer, r"version 2 .*saesteer 9\.0.*install"),
        (_warp, "holds a Warp.*knows.*Clamp.*install"),
        (_odd_field, "colour"),
        (_odd_tensor, r"tensors\.7"),
        (_no_edits, "edits"),
        (_odd_point, "nowhere"),
    ],
)
def test_what_is_not_understood_is_refused(
    change: Callable[..., None], message: str, tmp_path: Path, model: PreTrainedModel
) -> None:
    path = saved(tmp_path, model, [Add(vector(), 1.0, MIDDLE)])
    rewritten(path, change, sealed=True)
    with pytest.raises(SteeringError, match=message):
        load_edits(path, model)


def test_other_files_are_refused(tmp_path: Path, model: PreTrainedModel) -> None:
    with pytest.raises(SteeringError, match="no file"):
        load_edits(tmp_path / "none.safetensors", model)
    foreign = tmp_path / "weights.safetensors"
    save_file({"weight": vector()}, foreign)
    with pytest.raises(SteeringError, match="no file of edits"):
        load_edits(foreign, model)


def test_what_cannot_be_kept_is_refused_and_nothing_is_written(
    tmp_path: Path, model: PreTrainedModel
) -> None:
    path, edit = tmp_path / "edits.safetensors", Add(vector(), 1.0, MIDDLE)
    with pytest.raises(SteeringError, match="no edits"):
        save_edits(path, [], model)
    with pytest.raises(SteeringError, match=r"list can't be saved.*one row"):
        save_edits(path, [[edit]], model)  # type: ignore[list-item]
    with pytest.raises(SteeringError, match="JSON"):
        save_edits(path, edit, model, provenance={"model": model})
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError):
        save_edits(tmp_path / "file" / "edits.safetensors", edit, model)


def test_the_file_is_replaced_whole(tmp_path: Path, model: PreTrainedModel) -> None:
    saved(tmp_path, model, [Add(vector(), 1.0, MIDDLE)])
    path = saved(tmp_path, model, [Add(vector(1), 2.0, MIDDLE)])
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    (loaded,) = load_edits(path, model)
    assert isinstance(loaded, Add) and loaded.strength == 2.0
