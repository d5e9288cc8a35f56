"""Caching activations: ours against sae-lens's CacheActivationsRunner, tokens a second.

Both write float32 activations of one hook point to the disk, in contexts of 128 tokens of the same
text, in alternating runs, each in a process of its own (ours tells the allocator to keep freed
memory, which would help the other too); loading the model is left out of both. sae-lens gets the
way and the batch size in which it is fastest here, which the row names: it reads the text, or text
tokenised beforehand. Ours starts from the same, and finds its batch size within its time.

sae-lens holds a local model as "AutoModelForCausalLM", with hooks on transformers' own modules. Its
other class, HookedTransformer, loads only models that transformer-lens knows by name.

The embedded model comes first, then the one in the folder SAESTEER_TEST_MODEL, if that is set. The
text is told by `saesteer.world.corpus`, or read from the file SAESTEER_TEST_TEXT.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import results
import torch
from transformers import PreTrainedModel

from saesteer.core.blocks import d_model, decoder_layers
from saesteer.core.model import EMBEDDED, HookPoint, fingerprint, load_model, special_token_ids
from saesteer.training import packing
from saesteer.training import text as reading
from saesteer.training.cache import cache_activations
from saesteer.training.packing import Context
from saesteer.world import corpus

TITLE = "Caching activations: our tokens a second / sae-lens's"
CONTEXT = 128
SAE_LENS_BATCHES = (8, 16, 32)


def ours(
    model: PreTrainedModel,
    special_ids: frozenset[int],
    contexts: Callable[[], Iterator[Context]],
    n_contexts: int,
) -> float:
    """Tokens a second of `cache_activations`."""
    point = HookPoint(len(decoder_layers(model)) // 2, "resid_post")
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        (shards,) = cache_activations(
            model,
            contexts,
            [point],
            Path(folder),
            n_contexts=n_contexts,
            context_size=CONTEXT,
            d_model=d_model(model),
            dtype="float32",
            made_from={"model": fingerprint(model), "special_ids": sorted(special_ids)},
        )
        return float(shards.n_tokens / (time.perf_counter() - begin))


def sae_lens(model: PreTrainedModel, data: Any, n_contexts: int, batch_size: int) -> float:
    """Tokens a second of `CacheActivationsRunner.run`."""
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    layer, width = len(decoder_layers(model)) // 2, d_model(model)
    block = next(
        name for name, module in model.named_modules() if module is decoder_layers(model)[layer]
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = CacheActivationsRunnerConfig(
            dataset_path="given",
            model_name=model.config._name_or_path,
            model_class_name="AutoModelForCausalLM",
            model_batch_size=batch_size,
            hook_name=block,
            d_in=width,
            training_tokens=n_contexts * CONTEXT,
            context_size=CONTEXT,
            new_cached_activations_path=str(Path(folder) / "cache"),
            # A quarter of the whole at once: what it rounds up to whole buffers counts for it.
            buffer_size_gb=n_contexts * CONTEXT * width * 4 / 4e9,
            shuffle=False,
            dtype="float32",
            device="cpu",
        )
        runner = CacheActivationsRunner(settings, override_dataset=data)
        begin = time.perf_counter()
        cached = runner.run()
        seconds = time.perf_counter() - begin
        return float(len(cached) * CONTEXT / seconds)


class Side:
    """What a process of its own needs: the model, and the text in both ways of giving it."""

    def __init__(self, model_id: str, source: str, n_contexts: int, threads: int):
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.model, self.tokenizer = load_model(model_id, dtype="float32")
        self.documents = list(reading.documents(source))
        packed = packing.pack(self.documents, self.tokenizer, CONTEXT, n_contexts=n_contexts)
        self.packed = list(packed)

    def ours(self, way: str) -> float:
        """Tokens a second."""
        if way == "text":
            contexts = partial(packing.pack, self.documents, self.tokenizer, CONTEXT)
        else:
            contexts = partial(iter, self.packed)
        special = special_token_ids(self.model, self.tokenizer)
        return ours(self.model, special, contexts, len(self.packed))

    def sae_lens(self, way: str, batch_size: int, part: int = 1) -> float:
        """Tokens a second, over one of so many parts of the text."""
        from datasets import Dataset

        if way == "text":
            data = Dataset.from_dict({"text": self.documents})
        else:
            data = Dataset.from_dict({"tokens": [c.tokens.tolist() for c in self.packed]})
        return sae_lens(self.model, data, len(self.packed) // part, batch_size)


_side: list[Side] = []


def _begin(*given: Any) -> None:
    warnings.simplefilter("ignore")
    _side.append(quietly(partial(Side, *given)))


def _ask(name: str, *given: Any) -> float:
    return float(quietly(partial(getattr(_side[0], name), *given)))


def row(model_id: str, source: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Both in turn on one model."""
    given = (model_id, source, tokens // CONTEXT, torch.get_num_threads())
    with contextlib.ExitStack() as stack:
        us, them = (
            stack.enter_context(
                ProcessPoolExecutor(1, get_context("spawn"), initializer=_begin, initargs=given)
            )
            for _ in range(2)
        )
        say(f"{model_id}: {tokens:,} tokens; how sae-lens is fastest …")
        tried = {
            (way, size): them.submit(_ask, "sae_lens", way, size, 8).result()
            for way in ("text", "tokenised")
            for size in SAE_LENS_BATCHES
        }
        way, size = max(tried, key=lambda key: tried[key])
        say(", ".join(f"{w} {s}: {rate:,.0f}" for (w, s), rate in tried.items()))
        sides: dict[str, Callable[[], float]] = {
            "ours": lambda: us.submit(_ask, "ours", way).result(),
            "sae-lens": lambda: them.submit(_ask, "sae_lens", way, size).result(),
        }
        found = results.alternating(sides, rounds, say)
    return {
        "model": Path(model_id).name,
        "ours_tok_s": statistics.median(found["ours"]),
        "sae_lens_tok_s": statistics.median(found["sae-lens"]),
        **results.ratio(found["ours"], found["sae-lens"]),
        "from": way,
        "sae_lens_batch": size,
    }


def quietly(work: Callable[[], Any]) -> Any:
    """Without progress bars and warnings, which would mix with the figures."""
    with Path(os.devnull).open("w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            return work()


def say(line: str) -> None:
    """A line for whoever is waiting; --json leaves stdout to the figures."""
    print(line, file=sys.stderr, flush=True)


def planted_text(folder: Path, tokens: int) -> str:
    """A file of stories of the planted language with at least so many tokens."""
    path, n = folder / "stories.txt", 0
    with path.open("w", encoding="utf-8") as file:
        for story in corpus.stories(tokens, seed=7):
            file.write(f"{corpus.text(story.words)}\n{corpus.DOCUMENT_SEPARATOR}\n")
            n += len(story.words)
            if n > 1.05 * tokens:
                break
    return str(path)


def main() -> None:
    """Measure, print, and put the table into RESULTS.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2**19, help="tokens a run")
    parser.add_argument("--json", action="store_true", help="print JSON and write nothing")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    other = os.environ.get("SAESTEER_TEST_MODEL")
    with tempfile.TemporaryDirectory() as folder:
        source = os.environ.get("SAESTEER_TEST_TEXT") or planted_text(Path(folder), args.tokens)
        models = [EMBEDDED, *([other] if other else [])]
        rows = [row(model_id, source, args.tokens, args.rounds) for model_id in models]
    if args.json:
        print(json.dumps({"rows": rows}))
        return
    note = "" if other else "\n\nNot run: a real model (SAESTEER_TEST_MODEL is not set)."
    about = f"`benchmarks/caching.py`. {results.machine('transformers', 'sae-lens')}"
    results.write_section(TITLE, f"{about}\n\n{results.table(rows)}{note}")
    print(results.table(rows))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
