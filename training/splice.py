"""The model's loss on text while the activation at one place is replaced by something else."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from saesteer.core.hooks import capture, edit
from saesteer.core.points import HookPoint
from saesteer.core.progress import progress
from saesteer.core.tokens import Tokens
from saesteer.errors import TrainingError

# What takes the place of y [n, d_out], made from x [n, d_in], the same tokens at the input.
Replace = Callable[[Tensor, Tensor], Tensor]

# Elements of one chunk of logits: 64 MB in float32.
_CHUNK = 2**24


@torch.no_grad()
def losses(
    model: PreTrainedModel,
    tokens: np.ndarray,
    ways: Mapping[str, Replace],
    *,
    read: HookPoint,
    write: HookPoint,
    special_ids: Collection[int],
    most: int | None = None,
    batch_size: int = 8,
) -> tuple[int, dict[str, tuple[float, float]]]:
    """Cross-entropy of the next token, and KL(clean ‖ replaced), both in nats a token.

    Special tokens keep their activations, and predictions of them don't count: what ends a
    document in a packed context is no text.

    Args:
        tokens: int [contexts, context_size].
        ways: name → what replaces the activation at `write`, from that at `read`.
        most: stop after the batch in which so many predictions have been counted.
        batch_size: contexts a model run.

    Returns:
        how many predictions were counted, and name → (CE, KL) for each way and for "clean".

    Raises:
        TrainingError: there is nothing to predict.
    """
    device = next(model.parameters()).device
    special = torch.tensor(sorted(special_ids), dtype=torch.long, device=device)
    sums = {name: np.zeros(2) for name in ("clean", *ways)}
    counted = 0
    total = len(tokens) * tokens.shape[1]
    with progress("loss", total if most is None else min(total, most)) as bar:
        for first in range(0, len(tokens), batch_size):
            ids = torch.from_numpy(tokens[first : first + batch_size]).long().to(device)
            counts = ~torch.isin(ids[:, 1:], special)
            targets = ids[:, 1:][counts]
            clean = model(input_ids=ids, use_cache=False).logits[:, :-1][counts]
            sums["clean"] += _compared(clean, clean, targets)
            for name, make in ways.items():
                with replaced(model, make, read=read, write=write, special_ids=special_ids):
                    logits = model(input_ids=ids, use_cache=False).logits[:, :-1][counts]
                sums[name] += _compared(clean, logits, targets)
            counted += len(targets)
            bar.update(ids.numel())
            if most is not None and counted >= most:
                break
    if counted == 0:
        raise TrainingError("no next token to predict in the held-out contexts; use longer ones")
    return counted, {
        name: (float(ce) / counted, max(0.0, float(kl) / counted))
        for name, (ce, kl) in sums.items()
    }


@contextmanager
def replaced(
    model: PreTrainedModel,
    make: Replace,
    *,
    read: HookPoint,
    write: HookPoint,
    special_ids: Collection[int],
) -> Iterator[None]:
    """While it lasts, every plain token's activation at `write` is what `make` makes of it."""
    with capture(model, [read] if read != write else []) as found:

        def change(y: Tensor, at: Tokens) -> Tensor:
            plain = ~(at.is_special | at.is_padding)
            new = y.clone()
            x = found[read] if read != write else y
            new[plain] = make(x[plain], y[plain]).to(y.dtype)
            return new

        with edit(model, {write: change}, special_ids=special_ids):
            yield


def _compared(clean: Tensor, logits: Tensor, targets: Tensor) -> np.ndarray:
    """Sums over rows [n, vocabulary] of −log q(target) and of KL(softmax(clean) ‖ softmax(q))."""
    out = np.zeros(2)
    rows = max(1, _CHUNK // logits.shape[1])
    for c, q, t in zip(clean.split(rows), logits.split(rows), targets.split(rows), strict=True):
        log_q = q.float().log_softmax(-1)
        out[0] += float(F.nll_loss(log_q, t, reduction="sum"))
        if logits is not clean:
            log_p = c.float().log_softmax(-1)
            out[1] += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
    return out
