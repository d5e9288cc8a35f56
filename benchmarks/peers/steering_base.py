"""What every steering program has in common, in whatever environment it runs: times and logits."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STRENGTH, VALUE, LAYER, BOS, N_NEW = 4.0, 8.0, 0, 1, 12
CLAMPS = {f"{n} clamp{'s' * (n > 1)}, JumpReLU": ("jumprelu", n) for n in (1, 8, 64)}
CLAMPS["1 clamp, TopK"] = ("topk", 1)
CACHE, PADDING = "generated tokens only, KV cache", "from a row's third token on, left padding"
LEFT, BATCH = "a layer that isn't there", "a batch of two, plain forward"
SPECIAL = "the BOS token"


class Steerer:
    """A program that steers: `steered` is its own way in, the rest is the same for all."""

    package = ""

    def __init__(self, folder: Path):
        given = load_file(folder / "tensors.safetensors")
        self.vector, self.ids = given["vector"], given["ids"]
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        self.cases: dict[str, Any] = {"1 add": None}
        self.wrong: dict[str, Callable[[], str]] = {}

    def steered(self, case: str) -> Any:
        """A context in which the model is steered."""
        raise NotImplementedError

    def generate(self, ids: Tensor, tokens: int, **more: Any) -> Any:
        """Greedy, so many new tokens."""
        return self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=tokens, min_new_tokens=tokens, **more,
        )  # fmt: skip

    def logits(self, ids: Tensor, **more: Any) -> Tensor:
        """[batch, seq, vocabulary] of one pass."""
        return self.model(ids, **more).logits

    def time(self, case: str, batch: int, tokens: int, repeats: int) -> dict[str, float]:
        """Seconds of the whole model's call in a decode step of `generate`, the median of all
        steps: unsteered and steered; and of entering and leaving the context, the least."""
        ids = self.ids[:batch]
        steps: dict[str, list[float]] = {"unsteered": [], "steered": []}
        around = float("inf")
        for number in range(2 * repeats):
            if number % 4 in (1, 2):
                begin = time.perf_counter()
                with self.steered(case):
                    entered = time.perf_counter()
                    steps["steered"] += self.steps(ids, tokens)
                    ended = time.perf_counter()
                around = min(around, entered - begin + time.perf_counter() - ended)
            else:
                steps["unsteered"] += self.steps(ids, tokens)
        medians = {name: statistics.median(seconds) for name, seconds in steps.items()}
        return {**medians, "around": around}

    def steps(self, ids: Tensor, tokens: int) -> list[float]:
        """Seconds of each call of the model in a `generate` but the first, the prompt's."""
        return calls(self.called, lambda: self.generate(ids, tokens))[1:]

    @property
    def called(self) -> Any:
        """The module that `generate` calls once a token."""
        return self.model

    def write_logits(self, case: str, batch: int, to: str) -> dict[str, float]:
        """Logits of a steered and of an unsteered pass, written to a file."""
        ids = self.ids[:batch]
        plain = self.logits(ids)
        with self.steered(case):
            steered = self.logits(ids)
        save_file({"plain": plain.contiguous(), "steered": steered.contiguous()}, to)
        return {}

    def cached(self, steered: Callable[[], Any], whole: Callable[[], Any]) -> str:
        """`generate` with a KV cache against one pass over its text, both steered."""
        ids = self.ids[:1]
        with steered():
            out = self.generate(ids, N_NEW, return_dict_in_generate=True, output_logits=True)
        got, text = torch.stack(out.logits, 1), out.sequences[:, :-1]
        plain = self.logits(text)[:, ids.shape[1] - 1 :]
        with whole():
            wanted = self.logits(text)[:, ids.shape[1] - 1 :]
        if torch.allclose(got, plain, atol=1e-4) and not torch.allclose(wanted, plain, atol=1e-2):
            return f"not steered at all: logits off by {_most(got, wanted)}, the whole effect"
        return f"logits off by {_most(got, wanted)} of an effect of {_most(wanted, plain)}"

    def padded(self, steered: Callable[[], Any]) -> str:
        """A short row alone against the same row beside a longer one, left-padded."""
        long = self.ids[:2]
        short = long[:1, 8:]
        ids = torch.cat([torch.cat([torch.zeros_like(short), short], 1)[:, -16:], long[1:]])
        mask = torch.ones_like(ids)
        mask[0, :8] = 0
        where = (mask.cumsum(1) - 1).clamp(min=0)
        with steered():
            alone = self.logits(short)[0]
        with steered():
            beside = self.logits(ids, attention_mask=mask, position_ids=where)[0, 8:]
        effect = _most(alone, self.logits(short)[0])
        return f"logits off by {_most(alone, beside)} of an effect of {effect}"

    def after_a_bad_layer(self, steered: Callable[[], Any]) -> str:
        """What is left of a context that names a layer that isn't there, once it has raised."""
        before = self.logits(self.ids[:1])
        try:
            with steered():
                pass
        except Exception as error:
            raised = type(error).__name__
        else:
            raised = "nothing"
        after = self.logits(self.ids[:1])
        state = "the model as before, to the bit" if torch.equal(before, after) else (
            f"still steered afterwards: logits off by {_most(before, after)}"
        )  # fmt: skip
        return f"raises {raised}; {state}"

    def in_a_batch(self, case: str) -> str:
        """Two rows at once against each alone."""
        try:
            with self.steered(case):
                both = self.logits(self.ids[:2])
                alone = [self.logits(self.ids[row : row + 1]) for row in range(2)]
        except Exception as error:
            return f"raises {type(error).__name__}: {str(error).splitlines()[0][:90]}"
        return f"logits off by {_most(both, torch.cat(alone))}"

    def at_bos(self, case: str) -> str:
        """How far steering moves the logits at a BOS token."""
        ids = torch.cat([torch.full((1, 1), BOS), self.ids[:1]], 1)
        plain = self.logits(ids)[:, 0]
        with self.steered(case):
            return f"logits at BOS moved by {_most(self.logits(ids)[:, 0], plain)}"


def _most(a: Tensor, b: Tensor) -> str:
    return f"{float((a - b).abs().max()):.2g}"


def calls(module: nn.Module, run: Callable[[], object], method: str = "_call_impl") -> list[float]:
    """Seconds of each call of the module in `run`, its hooks included: it is timed from outside of
    them, and left as it was."""
    inner, seconds = getattr(module, method), []

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        out = inner(*args, **kwargs)
        seconds.append(time.perf_counter() - begin)
        return out

    module.__dict__[method] = timed
    try:
        run()
    finally:
        del module.__dict__[method]
    return seconds
