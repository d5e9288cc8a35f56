"""Tiny random-init models of many architectures, a tokenizer and SAEs that fit them.

Everything is 3 layers deep, 32 wide and knows 96 tokens; ids 0–3 are pad, bos, eos and unk.
Biases and norms are shaken off their zeros and ones, so that a test that confuses two places in
a block can't pass by accident.
"""

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from saesteer.core.generate import write
from saesteer.core.points import HookPoint
from saesteer.core.sae import Conventions, Sae

LAYERS, WIDTH, VOCAB = 3, 32, 96
PAD, BOS, EOS, UNK = 0, 1, 2, 3

_SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
_WORDS = (  # noqa: SIM905
    "the a boy girl dog cat ship sea wave storm rain sun wind cloud fish sand boat sail anchor "
    "harbour music song drum violin kitchen bread soup salt pepper cook anger shout fight calm "
    "walked ran saw heard liked to and of in on was is very old new big small red blue green . , "
    "he she it they then once upon time there house tree garden bird sang slept woke ate drank "
    "good bad happy sad with from under over river stone hill road king queen moon star night"
).split()

# What differs from one architecture to the next; `_COMMON` holds the rest.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_GLU: dict[str, Any] = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
_GPT: dict[str, Any] = {"n_positions": 128}
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GLU,
    "mistral": dict(_GLU, sliding_window=6),
    "qwen2": {"intermediate_size": 48, "num_key_value_heads": 2},
    "qwen3": _GLU,
    "gemma": _GLU,
    "gemma2": dict(_GLU, sliding_window=6),
    "gemma3_text": dict(_GLU, sliding_window=6, layer_types=None),
    "phi3": {"intermediate_size": 48, "num_key_value_heads": 2},
    "phi": {"intermediate_size": 48},
    "olmo2": {"intermediate_size": 48, "num_key_value_heads": 2},
    "starcoder2": {"intermediate_size": 48, "num_key_value_heads": 2},
    "stablelm": {"intermediate_size": 48, "num_key_value_heads": 2},
    "cohere": {"intermediate_size": 48, "num_key_value_heads": 2},
    "mixtral": dict(_GLU, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(
        _GLU, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1
    ),
    "gpt2": _GPT,
    "gptj": dict(_GPT, rotary_dim=4),
    "gpt_neox": {"intermediate_size": 48, "use_parallel_residual": True},
    "gpt_neo": {
        "intermediate_size": 48,
        "num_layers": LAYERS,
        "num_heads": 4,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 6,
    },
    "gpt_bigcode": _GPT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    "falcon": {"new_decoder_architecture": False, "parallel_attn": True, "alibi": False},
    "bloom": {},
    "mpt": {"expansion_ratio": 2, "max_seq_len": 128},
}
ARCHITECTURES: list[str] = sorted(_CONFIGS)


def tiny_config(arch: str, **overrides: Any) -> transformers.PretrainedConfig:
    """The configuration of a tiny model of `arch`; keyword arguments override it."""
    settings = {**_COMMON, **_CONFIGS.get(arch, _GLU), **overrides}
    if arch == "gpt_neo":  # its attribute names for these are read-only aliases
        settings.pop("num_hidden_layers"), settings.pop("num_attention_heads")
    if arch == "mpt":
        settings |= {"d_model": WIDTH, "n_heads": 4, "n_layers": LAYERS}
        for alias in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
            settings.pop(alias)
    return AutoConfig.for_model(
        arch, **{key: value for key, value in settings.items() if value is not None}
    )


def tiny_model(arch: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A 3-layer random-init causal LM of `arch` in eval mode, float32, parameters frozen."""
    # The global random state is left as it was found.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(arch, **overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = EOS
    return model.eval().requires_grad_(False)


def tiny_tokenizer(
    *, bos: bool = True, pad: bool = True, eos: bool = True, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 96 tokens for `tiny_model`.

    bos, pad, eos: whether the tokenizer declares that token (its id stays in the vocabulary).
    adds_bos: whether `tokenizer(text)` puts the BOS token first, as Llama's does.
    """
    words = [*_SPECIALS, *dict.fromkeys(_WORDS)]
    words = (words + [f"word{i}" for i in range(VOCAB)])[:VOCAB]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
        )
    names: dict[str, str] = {"unk_token": "<unk>"}
    if bos:
        names["bos_token"] = "<bos>"
    if eos:
        names["eos_token"] = "<eos>"
    if pad:
        names["pad_token"] = "<pad>"
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def tiny_sae(
    architecture: str = "standard",
    *,
    point: HookPoint = HookPoint(1, "resid_post"),  # noqa: B008  (frozen)
    d_in: int = WIDTH,
    d_sae: int = 64,
    seed: int = 0,
    **conventions: Any,
) -> Sae:
    """A random SAE, on which a feature fires on roughly half of a tiny model's tokens (TopK: 8).

    architecture: "standard", "topk", "jumprelu" or "gated". Further keyword arguments are
    `Conventions`.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return Sae(
        W_enc=normal(d_in, d_sae) / d_in**0.5,
        b_enc=normal(d_sae) * 0.1,
        W_dec=normal(d_sae, d_in) / d_in**0.5,
        b_dec=normal(d_in) * 0.1,
        architecture=architecture,
        hook_point=point,
        model_id="tiny",
        k=8 if architecture == "topk" else None,
        threshold=normal(d_sae).abs() * 0.3 if architecture == "jumprelu" else None,
        r_mag=normal(d_sae) * 0.3 if architecture == "gated" else None,
        b_mag=normal(d_sae) * 0.1 if architecture == "gated" else None,
        conventions=Conventions(**conventions),
    )


def random_ids(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(UNK + 1, VOCAB, (batch, length), generator=generator)


def generate(*given: Any, **how: Any) -> list[str]:
    """The texts of `core.generate.write`."""
    return [one.text for one in write(*given, **how)]
