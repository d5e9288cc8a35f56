"""Train the bundled language model on the planted language: `python -m saesteer.world.train`.

A small Llama with a word-level tokenizer. Half of the training rows begin with a story, half in
the middle of one after a BOS: that is how packed contexts look, and the model should be at home in
both.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saesteer.world import MODEL_FOLDER, corpus, exact
from saesteer.world.grammar import BOS, PAD, UNKNOWN

CONTEXT = 128
EMBEDDING_STD = 1.0


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; words carry their leading space, as SentencePiece's do."""
    ids = {
        word if word in (BOS, PAD, UNKNOWN, ".", ",") else f"▁{word}": i
        for word, i in exact.word_ids().items()
    }
    core = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
    )
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=2 * CONTEXT,
    )


def untrained(seed: int, *, layers: int = 4, d_model: int = 64) -> LlamaForCausalLM:
    """The model before training."""
    torch.manual_seed(seed)
    ids = exact.word_ids()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(ids),
            hidden_size=d_model,
            intermediate_size=4 * d_model,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2 * CONTEXT,
            bos_token_id=ids[BOS],
            eos_token_id=ids[BOS],
            pad_token_id=ids[PAD],
            tie_word_embeddings=False,
        )
    )
    # At transformers' 0.02 the blocks' writes would drown what a word is under where it stands.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    return model


def stream(n_stories: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Stories as one run of token ids, a BOS before each: [n_tokens]."""
    ids = exact.word_ids()
    out: list[int] = []
    for story in tqdm(corpus.stories(n_stories, seed), "stories", n_stories, unit=" stories"):
        out.append(ids[BOS])
        out.extend(ids[word] for word in story.words)
    return np.array(out)


def rows(tokens: np.ndarray[Any, Any], n: int, rng: np.random.Generator) -> Tensor:
    """`n` training rows [n, CONTEXT + 1], each beginning with BOS: half of them with a story."""
    bos = exact.word_ids()[BOS]
    starts = np.flatnonzero(tokens[: -CONTEXT - 1] == bos)
    at = np.concatenate(
        [rng.choice(starts, n // 2), rng.integers(0, len(tokens) - CONTEXT - 1, n - n // 2)]
    )
    windows = tokens[at[:, None] + np.arange(CONTEXT + 1)]
    windows[:, 0] = bos
    return torch.from_numpy(windows)


def train(
    *, steps: int, batch: int, lr: float, seed: int, n_stories: int, layers: int, d_model: int
) -> LlamaForCausalLM:
    """Train with AdamW, warm-up and cosine decay; the same seed gives the same model."""
    tokens = stream(n_stories, seed)
    rng = np.random.default_rng([seed, 9])
    model = untrained(seed, layers=layers, d_model=d_model)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1, fused=True
    )
    warm = steps // 20 + 1
    bar = tqdm(desc="training", total=steps * batch * CONTEXT, unit="tok", unit_scale=True)
    for step in range(steps):
        ahead = (step - warm) / max(1, steps - warm)
        scale = (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * ahead))
        for group in optimiser.param_groups:
            group["lr"] = lr * scale
        ids = rows(tokens, batch, rng)
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        bar.update(batch * CONTEXT)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    bar.close()
    return model.eval()


def excess_loss(model: LlamaForCausalLM, n_stories: int, seed: int) -> tuple[float, float]:
    """Cross-entropy of the model and of p* on fresh stories, in nats a word, up to one context."""
    ids = exact.word_ids()
    bayes: list[float] = []
    losses: list[float] = []
    for story in corpus.stories(n_stories, seed):
        words = (BOS, *story.words, BOS)[: CONTEXT + 1]
        tokens = torch.tensor([[ids[word] for word in words]])
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits[0]
        losses += torch.nn.functional.cross_entropy(
            logits, tokens[0, 1:], reduction="none"
        ).tolist()
        bayes += exact.cross_entropy(words).tolist()
    return float(np.mean(losses)), float(np.mean(bayes))


def main() -> None:
    """Train, say how close the model comes to p*, and write it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stories", type=int, default=40_000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=64)
    args = parser.parse_args()
    model = train(
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
        n_stories=args.stories,
        layers=args.layers,
        d_model=args.d_model,
    )
    ours, bayes = excess_loss(model, 300, seed=args.seed + 1_000_000)
    print(f"cross-entropy {ours:.4f} nats a word; exact Bayes predictor {bayes:.4f}")
    model.save_pretrained(args.out)
    tokenizer().save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
