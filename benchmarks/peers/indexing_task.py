"""What everyone who describes features is given: a model, an SAE and the text's tokens."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from saesteer.core.blocks import decoder_layers
from saesteer.core.model import HookPoint, fingerprint, load_model, special_token_ids
from saesteer.core.sae import Sae
from saesteer.training import packing
from saesteer.training import text as reading
from saesteer.training.cache import activation_batches

CONTEXT = 128
# Of the features' densities, evenly spread between them by their logarithms.
RAREST, COMMONEST = 1e-4, 0.1
# How far a threshold's neighbours are apart, in standard deviations of the activation.
_GAP = 1e-4
# Features whose activations are held at once.
_FEATURES = 64


def written(
    folder: Path, model_id: str, source: str, *, d_sae: int, tokens: int, most_tokens: int
) -> float:
    """Write model/, sae/, task.json and tokens.safetensors into `folder`; return the SAE's L0.

    Args:
        source: a file of text.
        tokens: on which the SAE's densities are set, and programs compared.
        most_tokens: how many are written.
    """
    model, tokenizer = load_model(model_id, dtype="float32")
    # Saved anew, so that a float16 or tied checkpoint is the same to everyone.
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    contexts = list(
        packing.pack(
            reading.documents(source), tokenizer, CONTEXT, n_contexts=most_tokens // CONTEXT
        )
    )
    if len(contexts) < most_tokens // CONTEXT:
        raise SystemExit(
            f"{source} gives {len(contexts) * CONTEXT:,} tokens, expected {most_tokens:,}; "
            "set SAESTEER_TEST_TEXT to a longer text, or ask for fewer with --tokens"
        )
    special = sorted(special_token_ids(model, tokenizer))
    point = HookPoint(len(decoder_layers(model)) // 2, "resid_post")
    batches = list(activation_batches(model, contexts[: tokens // CONTEXT], point))
    x = torch.cat([batch.activations.flatten(0, 1) for batch in batches])
    ids = np.concatenate([batch.tokens.reshape(-1) for batch in batches])
    x = x[torch.from_numpy(~np.isin(ids, special))]
    sae, l0 = sae_on(x, d_sae, point, model_id, fingerprint(model))
    sae.save(folder / "sae")
    save_file(
        {
            name: torch.from_numpy(np.stack([getattr(context, name) for context in contexts]))
            for name in ("tokens", "documents")
        },
        folder / "tokens.safetensors",
    )
    (folder / "task.json").write_text(json.dumps({"layer": point.layer, "special": special}))
    return l0


def sae_on(
    x: Tensor, d_sae: int, point: HookPoint, model_id: str, model_fingerprint: str
) -> tuple[Sae, float]:
    """A JumpReLU SAE with chosen densities on activations x [n, d], and its L0 there.

    A feature's direction is that of one token's activation from the mean, so that it fires on
    tokens that are alike in something; its decoder row is the same. Its threshold stands in the
    widest gap near the wanted density: no activation is so near it that rounding decides.
    """
    generator = torch.Generator().manual_seed(0)
    mean = x.mean(0)
    z = x - mean
    rows = F.normalize(z[torch.randint(len(z), (d_sae,), generator=generator)])
    rows = F.normalize(rows + 1e-3 * torch.randn(rows.shape, generator=generator))  # no two alike
    wanted = RAREST * (COMMONEST / RAREST) ** torch.linspace(0, 1, d_sae)
    wanted = (wanted * len(z)).round().clamp(1, len(z) - 2).long()
    wanted = wanted[torch.randperm(d_sae, generator=generator)]
    thresholds, firing = torch.empty(d_sae), 0
    for first in range(0, d_sae, _FEATURES):
        values = (z @ rows[first : first + _FEATURES].T).sort(dim=0, descending=True).values
        for number, column in enumerate(values.unbind(1), start=first):
            at = _gap(column, int(wanted[number]))
            thresholds[number] = ((column[at] + column[at + 1]) / 2).clamp_min(0)
            firing += int((column > thresholds[number]).sum())
    sae = Sae(
        W_enc=rows.T.contiguous(),
        b_enc=torch.zeros(d_sae),
        W_dec=rows.contiguous(),
        b_dec=mean,
        architecture="jumprelu",
        hook_point=point,
        model_id=model_id,
        model_fingerprint=model_fingerprint,
        threshold=thresholds,
        context_size=CONTEXT,
    )
    return sae, firing / len(z)


def _gap(values: Tensor, n: int) -> int:
    """After which of `values` [m], which fall, a gap is near the n-th that rounding can't close.

    The widest within an eighth of n; where that is none, as in a text in which contexts begin
    alike, within twice as many, and so on.
    """
    gaps = values[:-1] - values[1:]
    least, reach = _GAP * float(values.std()), max(1, n // 8)
    while True:
        low, high = max(0, n - 1 - reach), n + reach
        at = low + int(gaps[low:high].argmax())
        if gaps[at] >= least or max(n, len(gaps) - n) <= reach:
            return at
        reach *= 2
