"""Models spread over devices, or partly on disk: steered as one in one place, to the bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForCausalLM

from saesteer.core.hooks import activations
from saesteer.core.hooks import edit as edit_activations
from saesteer.core.model import HookPoint, fingerprint
from saesteer.core.tokens import Tokens
from saesteer.errors import ModelError, SteeringError
from saesteer.steering.bake import EVERYWHERE, bake
from saesteer.steering.conditions import Feature, Gate, Projection, When
from saesteer.steering.edits import Add, Affine, Clamp, Project, Rotate
from saesteer.steering.engine import steer
from saesteer.steering.positions import Positions
from saesteer.steering.schedules import Decay
from tests.test_steering_rows import GREEDY, transcoder
from tests.tiny import BOS, PAD, WIDTH, random_ids, tiny_model, tiny_sae, tiny_tokenizer

MIDDLE = HookPoint(1, "resid_post")


def vector(seed: int = 0, width: int = WIDTH) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


ADD = Add(vector(), 2.0, MIDDLE)


def prompts() -> tuple[Tensor, Tensor]:
    """Three rows, the first padded on the left, with their mask."""
    ids = random_ids(3, 6).clamp(min=4)
    mask = torch.ones_like(ids)
    mask[0, :2], ids[0, :2] = 0, PAD
    ids[0, 2] = ids[1:, 0] = BOS
    return ids, mask


def every_kind() -> dict[str, Any]:
    """An edit of each kind, at and after the place where a model is parted in two."""
    topk, earlier = tiny_sae("topk"), Projection(vector(4), "layers.0.resid_post")
    return {
        "add": ADD,
        "clamp": Clamp(tiny_sae(), 5, 8.0),
        "topk": Clamp(topk, 5, 4.0),
        "feature": Add(vector(), 1.0, MIDDLE, when=When(Feature(tiny_sae(), 7), 0.2)),
        "feature of topk": Add(vector(), 1.0, MIDDLE, when=When(Feature(topk, 7), 0.1)),
        "from earlier": Clamp(tiny_sae(), 5, 8.0, when=When(earlier, 0.5, "from")),
        "until": Add(vector(), 1.0, MIDDLE, when=When(Projection(vector(4), MIDDLE), 6.0, "until")),
        "rows": [
            [Add(vector(), 1.0, "layers.0.resid_post"), Add(vector(), 1.0, MIDDLE)],
            [Clamp(tiny_sae(), 5, 8.0), Project(vector(), MIDDLE)],
            [Add(vector(), 1.0, MIDDLE), Add(vector(1), 1.0, "layers.2.mlp_out")],
        ],
        "head": Add(vector(0, 8), 1.0, "layers.1.head.3"),
        "resid_pre": Add(vector(), 1.0, "layers.1.resid_pre"),
        "attn_out": Add(vector(), 1.0, "layers.1.attn_out", keep_norm=True),
        "mlp_out": Affine(torch.eye(WIDTH) / 2, vector(), "layers.1.mlp_out", schedule=Decay(2.0)),
        "rotate": Rotate(vector(), vector(1), 0.5, MIDDLE, where=Positions(special=True)),
        "last": Add(vector(), 1.0, MIDDLE, where=Positions(last=2)),
        "after": Add(vector(), 1.0, MIDDLE, where=Positions(after="the")),
        "spans": Clamp(tiny_sae(), 5, 8.0, where=Positions(spans=((1, 9),), every=2)),
        "transcoder": Clamp(transcoder("jumprelu", apply_b_dec_to_input=False), 5, 3.0),
    }


def outcome(model: Any, edits: Any) -> tuple[Tensor, list[list[int]], Any]:
    """Logits of a bare pass, what `generate` writes, and the receipt of both."""
    ids, mask = prompts()
    tokenizer = tiny_tokenizer()
    ids[:, 3] = tokenizer("the").input_ids[0]
    settings = {**GREEDY, "min_new_tokens": 5, "max_new_tokens": 5}
    with torch.no_grad(), steer(model, edits, tokenizer=tokenizer) as receipt:
        logits = model(input_ids=ids, attention_mask=mask).logits
        texts = model.generate(input_ids=ids, attention_mask=mask, **settings).tolist()
    return logits, texts, (receipt.to_dict(), receipt.traces())


def assert_same(first: tuple[Any, ...], second: tuple[Any, ...]) -> None:
    torch.testing.assert_close(first[0], second[0], atol=0, rtol=0)
    assert first[1:] == second[1:]


# --- weights on disk -----------------------------------------------------------------------------


def from_disk(folder: Path, parts: list[str]) -> Any:
    """A saved tiny model of which accelerate keeps some parts on disk between calls."""
    pytest.importorskip("accelerate")
    plain = tiny_model()
    plain.save_pretrained(folder / "saved")
    names = ["embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1", "layers.2"]
    places = {f"model.{name}": "disk" if name in parts else "cpu" for name in names}
    model = AutoModelForCausalLM.from_pretrained(
        folder / "saved",
        device_map={**places, "lm_head": "cpu"},
        offload_folder=str(folder / "aside"),
    )
    model.generation_config = plain.generation_config
    return model.eval()


def attributes(model: nn.Module) -> Any:
    return {
        name: (set(vars(part)), list(part._forward_hooks), list(part._forward_pre_hooks))
        for name, part in model.named_modules()
    }


@pytest.mark.filterwarnings("ignore:.*never applied")
@pytest.mark.parametrize(
    "parts",
    [
        ["layers.1"],
        ["embed_tokens", "layers.0", "layers.1", "layers.2"],
    ],
)
def test_weights_that_wait_on_disk_are_steered_to_the_bit(tmp_path: Path, parts: list[str]) -> None:
    whole, model = tiny_model(), from_disk(tmp_path, parts)
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    before, ids = attributes(model), prompts()[0]
    plain = model(ids).logits
    for edits in every_kind().values():
        assert_same(outcome(model, edits), outcome(whole, edits))
    assert attributes(model) == before
    assert torch.equal(model(ids).logits, plain)


def test_a_model_partly_on_disk_is_read_but_has_no_fingerprint_and_is_not_baked(
    tmp_path: Path,
) -> None:
    model, ids = from_disk(tmp_path, ["layers.1"]), random_ids(2, 4)
    read = activations(model, [MIDDLE], ids)[MIDDLE]
    assert torch.equal(read, activations(tiny_model(), [MIDDLE], ids)[MIDDLE])
    with pytest.raises(SteeringError, match="not in memory"):
        bake(model, Add(vector(), 1.0, MIDDLE, where=EVERYWHERE), tmp_path / "baked")
    with pytest.raises(ModelError, match="kept outside of memory"):
        fingerprint(model)


# --- two devices ---------------------------------------------------------------------------------


FAR = torch.device("lazy:0")  # a device that torch knows by name and has nothing behind


class Far(Tensor):
    """A CPU tensor that says it is on another device, and doesn't mix with those that don't."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, near.shape, strides=near.stride(), dtype=near.dtype, device=FAR
        )
        made.near = near
        return made

    def tolist(self) -> Any:
        return self.near.tolist()

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple):  # a list would become a tensor where no mode sees it
            index = tuple(Far(torch.tensor(i)) if isinstance(i, list) else i for i in index)
        return super().__getitem__(index)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_its_device(func, args, kwargs or {})


def on_its_device(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the CPU; RuntimeError where a true second device would refuse it."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    name, target = func.overloadpacket.__name__, kwargs.get("device")
    far = any(isinstance(one, Far) for one in tensors)
    near = any(one.dim() and not isinstance(one, Far) for one in tensors)
    if far and near and name not in ("_to_copy", "copy_"):
        raise RuntimeError(f"{name}: tensors on two devices")
    if target is not None:
        far, kwargs = torch.device(target) == FAR, {**kwargs, "device": "cpu"}
    args, kwargs = tree_map_only(Far, lambda one: one.near, (args, kwargs))
    out = func(*args, **kwargs)
    if name.endswith("_"):  # in place
        return tensors[0]
    return tree_map_only(Tensor, Far, out) if far else out


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_its_device(func, args, kwargs or {})


class _Constants(TorchFunctionMode):
    """torch.tensor(…, device=FAR), which makes its tensor below the operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == FAR:
            return Far(torch.tensor(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


@contextmanager
def two_devices() -> Iterator[None]:
    with _Operations(), _Constants():
        yield


def parted(model: Any) -> Any:
    """The model with all blocks after the first far away, parted as accelerate does it."""

    def bring(module: nn.Module, device: Any) -> None:
        forward = module.forward

        def moved(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree_map_only(Tensor, lambda one: one.to(device), (args, kwargs))
            return forward(*args, **kwargs)

        module.forward = moved  # type: ignore[method-assign]

    for module in (*model.model.layers[1:], model.model.norm):
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    part._parameters[name] = nn.Parameter(Far(weight.data), requires_grad=False)
        bring(module, FAR)
    bring(model.lm_head, "cpu")
    return model


def test_the_second_device_of_these_tests_refuses_what_a_real_one_refuses() -> None:
    with two_devices():
        far, near = torch.ones(2, 3).to(FAR), torch.ones(2, 3)
        assert (far + 1).device == FAR and (far + far).to("cpu").tolist() == (near + 1).tolist()
        for wrong in (
            lambda: far + near,
            lambda: far @ near.T,
            lambda: torch.where(near > 0, far, far),
            lambda: torch.cat([far, near]),
        ):
            with pytest.raises(RuntimeError, match="two devices"):
                wrong()


@pytest.mark.parametrize("lasting", ["while", "from", "until"])
@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_a_condition_goes_where_the_activations_are(architecture: str, lasting: Any) -> None:
    """Read on another device than the tokens', it answers on theirs, and as it would there."""
    model, seen = tiny_model(), []

    def see(x: Tensor, tokens: Tokens) -> Tensor:
        seen.append((x, tokens))
        return x

    with torch.no_grad(), edit_activations(model, {MIDDLE: see}):
        model(random_ids(3, 6).clamp(min=4))
    ((x, tokens),) = seen
    when = When(Feature(tiny_sae(architecture), 7), 0.2, lasting)
    here, there = (Gate(when, torch.device("cpu")) for _ in range(2))
    here.read(x, tokens)
    with two_devices():
        there.read(x.to(FAR), tokens)
        assert there.holds(tokens).tolist() == here.holds(tokens).tolist()
    assert bool(here.holds(tokens).any()) and not bool(here.holds(tokens).all())


@pytest.mark.filterwarnings("ignore:.*never applied")
def test_a_model_on_two_devices_is_steered_as_one_on_one() -> None:
    whole = tiny_model(attn_implementation="eager")
    model = parted(tiny_model(attn_implementation="eager"))
    ids, mask = prompts()
    with two_devices():
        plain = model(input_ids=ids, attention_mask=mask).logits
    for edits in every_kind().values():
        expected = outcome(whole, edits)
        with two_devices():
            assert_same(outcome(model, edits), expected)
    with two_devices():
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, plain)
