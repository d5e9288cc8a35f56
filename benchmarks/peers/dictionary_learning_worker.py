"""dictionary_learning's trainers in a process of their own: it patches torch when it is imported.

Reads one JSON object (architecture, d, d_sae, k, lr, threads, tensors: a safetensors file with the
weights and `batches` [n, batch, d]) from stdin, answers "ready", and from then on answers every
line with the milliseconds and the loss (Σ over d) of one step on the next batch.
"""

import contextlib
import itertools
import json
import os
import sys
import time
import warnings

import torch
from safetensors.torch import load_file


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the library prints must not mix with the answers
    task = json.loads(sys.stdin.readline())
    torch.set_num_threads(task["threads"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer

    tensors = load_file(task["tensors"])
    make = TopKTrainer if task["architecture"] == "topk" else BatchTopKTrainer
    trainer = make(
        steps=1_000_000, activation_dim=task["d"], dict_size=task["d_sae"], k=task["k"], layer=0,
        lm_name="none", lr=task["lr"], warmup_steps=0, device="cpu",
    )  # fmt: skip
    with torch.no_grad():
        trainer.ae.encoder.weight.copy_(tensors["encoder"])
        trainer.ae.encoder.bias.copy_(tensors["b_enc"])
        trainer.ae.decoder.weight.copy_(tensors["decoder"].T)
        trainer.ae.b_dec.copy_(tensors["b_dec"])
    batches = itertools.cycle(tensors["batches"])
    print("ready", file=answers)
    # Its step 0 would put the batch's geometric median in b_dec's place.
    for step, _ in enumerate(sys.stdin, start=1):
        x = next(batches)
        begin = time.perf_counter()
        loss = trainer.update(step, x)
        ms = 1000 * (time.perf_counter() - begin)
        print(json.dumps({"ms": ms, "loss": loss}), file=answers)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
