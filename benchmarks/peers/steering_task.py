"""What everyone who steers is given: a model, SAEs, a vector, prompts."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from saesteer.core.model import HookPoint
from saesteer.core.sae import Sae

K, THRESHOLD = 32, 0.1
PAD, BOS, EOS = 0, 1, 2
PROMPT = 16


def random_gpt2(layers: int, width: int, vocabulary: int = 50257) -> PreTrainedModel:
    """A random-init GPT-2 in eval mode, parameters frozen; heads of 64 dimensions."""
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=max(1, width // 64), vocab_size=vocabulary,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    return model.eval().requires_grad_(False)


def random_sae(architecture: str, point: HookPoint, d: int, d_sae: int) -> Sae:
    """A random SAE with unit decoder rows; "jumprelu" or "topk"."""
    generator = torch.Generator().manual_seed(0)
    encoder = torch.randn(d, d_sae, generator=generator) / d**0.5
    return Sae(
        W_enc=encoder,
        b_enc=torch.zeros(d_sae),
        W_dec=F.normalize(encoder.T.contiguous(), dim=1),
        b_dec=torch.zeros(d),
        architecture=architecture,
        hook_point=point,
        model_id="random",
        k=K if architecture == "topk" else None,
        threshold=torch.full((d_sae,), THRESHOLD) if architecture == "jumprelu" else None,
    )


def prompts(batch: int, vocabulary: int, length: int = PROMPT, seed: int = 0) -> Tensor:
    """Random ids [batch, length], past the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(EOS + 1, vocabulary, (batch, length), generator=generator)


def written(folder: Path, *, width: int, d_sae: int) -> None:
    """Write into `folder` what each process loads: model/, jumprelu/, topk/, tensors.safetensors.

    The model has two blocks and knows 96 tokens, so that what a hook costs stands out; edits are
    at the first block.
    """
    model = random_gpt2(2, width, 96)
    model.save_pretrained(folder / "model")
    for architecture in ("jumprelu", "topk"):
        sae = random_sae(architecture, HookPoint(0, "resid_post"), width, d_sae)
        sae.save(folder / architecture)
    generator = torch.Generator().manual_seed(1)
    save_file(
        {"vector": torch.randn(width, generator=generator), "ids": prompts(32, 96)},
        folder / "tensors.safetensors",
    )
