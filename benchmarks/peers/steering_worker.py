"""One steering program in a process of its own: steers what it is given and tells times and logits.

    python steering_worker.py NAME FOLDER THREADS

Runs in the peer's own environment, so only "ours" imports saesteer. FOLDER: what
`steering_task.written` wrote. It is asked by lines of JSON on stdin and answers one line each.
Prompts hold no special tokens and no padding unless a case is about them, so that "every token"
is the same to everyone.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from steering_base import (
    BATCH,
    CACHE,
    CLAMPS,
    LAYER,
    LEFT,
    PADDING,
    SPECIAL,
    STRENGTH,
    VALUE,
    Steerer,
    calls,
)
from torch import Tensor


class Ours(Steerer):
    """saesteer."""

    package = "saesteer"

    def __init__(self, folder: Path):
        super().__init__(folder)
        from saesteer import Add, Clamp, steer
        from saesteer.core.sae import load_sae
        from saesteer.steering.positions import Positions

        point = f"layers.{LAYER}.resid_post"
        self._steer = steer
        self.cases = {"1 add": [Add(self.vector, STRENGTH, point)]}
        saes = {name: load_sae(folder / name) for name in ("jumprelu", "topk")}
        for case, (name, n) in CLAMPS.items():
            self.cases[case] = [Clamp(saes[name], i, VALUE) for i in range(n)]
        new = Add(self.vector, STRENGTH, point, where=Positions(prompt=False))
        third = Add(self.vector, STRENGTH, point, where=Positions(spans=((2, None),)))
        bad = [self.cases["1 add"][0], Add(self.vector, STRENGTH, "layers.99.resid_post")]
        width = self.ids.shape[1]
        self.wrong = {
            CACHE: lambda: self.cached(
                lambda: steer(self.model, new), lambda: steer(self.model, new, prompt_length=width)
            ),
            PADDING: lambda: self.padded(lambda: steer(self.model, third)),
            LEFT: lambda: self.after_a_bad_layer(lambda: steer(self.model, bad)),
            BATCH: lambda: self.in_a_batch("1 add"),
            SPECIAL: lambda: self.at_bos("1 clamp, JumpReLU"),
        }

    def steered(self, case: str) -> Any:
        return self._steer(self.model, self.cases[case])


class SteeringVectors(Steerer):
    """steering-vectors: one vector a layer, added by a hook."""

    package = "steering-vectors"

    def __init__(self, folder: Path):
        super().__init__(folder)
        from steering_vectors import SteeringVector

        vector = SteeringVector({LAYER: self.vector})
        bad = SteeringVector({LAYER: self.vector, 99: self.vector})
        self._vector, width = vector, self.ids.shape[1]

        def from_token(n: int) -> Callable[[], Any]:
            return lambda: vector.apply(self.model, multiplier=STRENGTH, min_token_index=n)

        self.wrong = {
            CACHE: lambda: self.cached(from_token(width), from_token(width)),
            PADDING: lambda: self.padded(from_token(2)),
            LEFT: lambda: self.after_a_bad_layer(lambda: bad.apply(self.model)),
        }

    def steered(self, case: str) -> Any:
        return self._vector.apply(self.model, multiplier=STRENGTH)


class Repeng(Steerer):
    """repeng: wraps the blocks once, and sets and resets what they add."""

    package = "repeng"

    def __init__(self, folder: Path):
        super().__init__(folder)
        from repeng import ControlModel, ControlVector

        self._plain, self.model = self.model, ControlModel(self.model, [LAYER])
        self._control = ControlVector("gpt2", {LAYER: self.vector.numpy()})
        self.wrong = {BATCH: lambda: self.in_a_batch("1 add")}

    @property
    def called(self) -> Any:
        return self._plain

    @contextlib.contextmanager
    def steered(self, case: str) -> Iterator[None]:
        self.model.set_control(self._control, STRENGTH)
        try:
            yield
        finally:
            self.model.reset()


class SaeLens(Steerer):
    """sae-lens's HookedSAETransformer: the SAE in the model with its error term, and a hook that
    sets latents of its code; an add is a hook on the stream."""

    package = "sae-lens"

    def __init__(self, folder: Path):
        super().__init__(folder)
        from sae_lens import SAE, HookedSAETransformer
        from transformer_lens import HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights

        config = self.model.config
        settings = HookedTransformerConfig(
            n_layers=config.n_layer, d_model=config.n_embd, n_heads=config.n_head,
            d_head=config.n_embd // config.n_head, d_mlp=4 * config.n_embd,
            n_ctx=config.n_positions, d_vocab=config.vocab_size, act_fn="gelu_new",
            eps=config.layer_norm_epsilon, normalization_type="LN", default_prepend_bos=False,
            original_architecture="GPT2LMHeadModel", device="cpu",
        )  # fmt: skip
        hooked = HookedSAETransformer(settings)
        hooked.load_and_process_state_dict(
            convert_gpt2_weights(self.model, settings), fold_ln=False,
            center_writing_weights=False, center_unembed=False, fold_value_biases=False,
        )  # fmt: skip
        self.model, self._point = hooked.eval(), f"blocks.{LAYER}.hook_resid_post"
        self._saes = {n: SAE.load_from_disk(folder / n) for n in ("jumprelu", "topk")}
        self.cases |= CLAMPS
        self.wrong = {SPECIAL: lambda: self.at_bos("1 clamp, JumpReLU")}

    @contextlib.contextmanager
    def steered(self, case: str) -> Iterator[None]:
        if case == "1 add":
            change = STRENGTH * self.vector
            with self.model.hooks(fwd_hooks=[(self._point, lambda x, hook: x + change)]):
                yield
            return
        name, n = CLAMPS[case]

        def clamp(code: Tensor, hook: Any) -> Tensor:
            code[..., :n] = VALUE
            return code

        at = f"{self._point}.hook_sae_acts_post"
        with (
            self.model.saes(saes=[self._saes[name]], use_error_term=True),
            self.model.hooks(fwd_hooks=[(at, clamp)]),
        ):
            yield

    def generate(self, ids: Tensor, tokens: int, **more: Any) -> Any:
        return self.model.generate(
            ids, max_new_tokens=tokens, do_sample=False, stop_at_eos=False, prepend_bos=False,
            verbose=False, **more,
        )  # fmt: skip

    def steps(self, ids: Tensor, tokens: int) -> list[float]:
        # Its generate calls forward itself.
        return calls(self.model, lambda: self.generate(ids, tokens), "forward")[1:]

    def logits(self, ids: Tensor, **more: Any) -> Tensor:
        return self.model(ids, **more)


STEERERS = {
    "ours": Ours,
    "steering-vectors": SteeringVectors,
    "repeng": Repeng,
    "sae-lens": SaeLens,
}


def main(name: str, folder: str, threads: str) -> None:
    """Answer until stdin ends. What the program itself prints goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(int(threads))
    torch.set_grad_enabled(False)

    def answer(make: Callable[[], dict[str, Any]]) -> None:
        try:
            line = make()
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            line = {"error": f"{type(error).__name__}: {reason[:200]}"}
        print(json.dumps(line), file=answers, flush=True)

    made: list[Steerer] = []

    def begin() -> dict[str, Any]:
        made.append(STEERERS[name](Path(folder)))
        about = {"cases": list(made[0].cases), "wrong": list(made[0].wrong)}
        return {"version": version(made[0].package), **about}

    answer(begin)
    for line in sys.stdin:
        asked = json.loads(line)
        what = asked.pop("ask")
        if what == "wrong":
            answer(lambda asked=asked: {"got": made[0].wrong[asked["case"]]()})
        else:
            answer(lambda what=what, asked=asked: getattr(made[0], what)(**asked))


if __name__ == "__main__":
    main(*sys.argv[1:])
