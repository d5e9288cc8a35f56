"""The cases of benchmarks/steering.py: edits at one block's output, what runs, their floor."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peers.steering_base import calls
from peers.steering_task import random_sae
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from saesteer import Add, Clamp, Feature, Positions, Sae, When, bake, steer
from saesteer.core.blocks import d_model, decoder_layers
from saesteer.core.model import HookPoint
from saesteer.errors import SteeringError

STRENGTH, VALUE = 4.0, 8.0
ROWS = 64
# From this width on an SAE has so many latents, below it fewer.
WIDE, LATENTS, FEWER = 768, 16384, 2048


@dataclass(frozen=True)
class Case:
    """One way to steer: its name, the SAE's architecture ("none") and size, the batches it runs at,
    the context it runs in, the model that runs, and the SAE whose x · W_enc is its floor."""

    name: str
    architecture: str
    d_sae: int
    batches: tuple[int, ...]
    steered: Callable[[], AbstractContextManager[Any]]
    model: PreTrainedModel
    floor: Sae | None = None


@contextmanager
def cases(model: PreTrainedModel) -> Iterator[tuple[list[Case], dict[str, str]]]:
    """Every case on a model, and those that can't be run with the reason; the baked model's folder
    lasts as long as the context."""
    d = d_model(model)
    point = HookPoint(len(decoder_layers(model)) // 2, "resid_post")
    d_sae = LATENTS if d >= WIDE else FEWER
    jumprelu, topk = (random_sae(name, point, d, d_sae) for name in ("jumprelu", "topk"))
    vector = torch.randn(d, generator=torch.Generator().manual_seed(1))
    add = Add(vector, STRENGTH, point)
    both = (1, 32)

    def case(
        name: str, edits: Any, sae: Sae | None, batches: tuple[int, ...] = both,
        floor: Sae | None = None,
    ) -> Case:  # fmt: skip
        size = ("none", 0) if sae is None else (sae.architecture, sae.d_sae)
        return Case(name, *size, batches, lambda: steer(model, edits), model, floor)

    found = [
        Case("nothing", "none", 0, both, nullcontext, model),
        case("1 clamp", [Clamp(jumprelu, 0, VALUE)], jumprelu),
        case("8 clamps", [Clamp(jumprelu, i, VALUE) for i in range(8)], jumprelu),
        case("64 clamps", [Clamp(jumprelu, i, VALUE) for i in range(64)], jumprelu),
        case("1 clamp", [Clamp(topk, 0, VALUE)], topk, floor=topk),
        case("1 add", [add], None),
        case("a clamp of its own in each row", [[Clamp(jumprelu, row, VALUE)] for row in
             range(ROWS)], jumprelu, (ROWS,)),
        case("1 add under a condition", [Add(vector, STRENGTH, point, when=When(Feature(jumprelu,
             0)))], jumprelu),
    ]  # fmt: skip
    not_run = {}
    with tempfile.TemporaryDirectory() as folder:
        baked = Add(vector, STRENGTH, point, where=Positions(special=True))
        try:
            bake(model, baked, f"{folder}/baked")
        except SteeringError as error:
            not_run["1 add, baked"] = str(error)
        else:
            other = AutoModelForCausalLM.from_pretrained(f"{folder}/baked", dtype=model.dtype)
            other.eval().requires_grad_(False)
            found.append(Case("1 add, baked", "none", 0, both, nullcontext, other))
        yield found, not_run


def generate(model: PreTrainedModel, ids: Tensor, tokens: int) -> None:
    """Greedy, so many new tokens in every row."""
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1,
        max_new_tokens=tokens, min_new_tokens=tokens,
    )  # fmt: skip


def call_us(case: Case, plain: PreTrainedModel, ids: Tensor, tokens: int, repeats: int) -> float:
    """What a steer adds to the edited block's own call in a decode step, in µs.

    The least of the medians of some runs, steered less unsteered. The clock's tick, which is a
    hook on the whole model and not on the block, is not in it.
    """
    medians: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * repeats):
        steered = number % 4 in (1, 2)
        model = case.model if steered else plain
        block = decoder_layers(model)[len(decoder_layers(model)) // 2]
        with case.steered() if steered else nullcontext():
            times = calls(block, lambda model=model: generate(model, ids, tokens))
        medians[steered].append(statistics.median(times[1:]))  # the prompt's pass is no step
    return 1e6 * (min(medians[True]) - min(medians[False]))


def floor_us(sae: Sae, batch: int, repeats: int = 9) -> float:
    """Microseconds of one x · W_enc for `batch` tokens, without which no TopK clamp can be."""
    x = torch.randn(batch, sae.d_in, generator=torch.Generator().manual_seed(2))
    seconds: list[float] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        x @ sae.W_enc
        seconds.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(seconds)


def hook_us(
    steered: Sequence[float], unsteered: Sequence[float], work: int, forwards: int
) -> float:
    """(steered − unsteered seconds) / forward passes in µs, from tokens a second; one edited layer.

    The median over rounds of what stood side by side; work: tokens a run.
    """
    differences = [work / a - work / b for a, b in zip(steered, unsteered, strict=True)]
    return 1e6 * statistics.median(differences) / forwards
