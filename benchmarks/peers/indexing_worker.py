"""One program in a process of its own describes all features of an SAE, and tells what it took.

    python indexing_worker.py ours|saedashboard FOLDER THREADS CONTEXTS

Runs in the peer's own environment, so only "ours" imports saesteer. FOLDER: what
`indexing_task.written` wrote; the first CONTEXTS of its contexts are read. The last line of stdout
is JSON: seconds from token ids to the finished description (loading is left out), loaded_mb and
peak_mb of memory, the densities of the features over all tokens but special ones, the version.
"""

import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def ours(folder: Path, tokens: dict[str, torch.Tensor], layer: int, special: list[int]) -> Any:
    """The whole index: the model's pass, the statistics, the weights, labels, and writing."""
    from saesteer.core.model import load_model
    from saesteer.core.sae import load_sae
    from saesteer.features.build import build_index
    from saesteer.features.search import Index
    from saesteer.training.cache import activation_batches
    from saesteer.training.packing import Context

    model, tokenizer = load_model(str(folder / "model"))
    sae = load_sae(folder / "sae")
    arrays = [tokens[name].numpy() for name in ("tokens", "documents")]
    contexts = (Context(*pair) for pair in zip(*arrays, strict=True))
    loaded = memory_mb("VmRSS")
    with tempfile.TemporaryDirectory() as out:
        path = Path(out, "features.sqlite")
        begin = time.perf_counter()
        batches = activation_batches(model, contexts, sae.hook_point)
        build_index(path, batches, model, tokenizer, sae, n_tokens=arrays[0].size)
        seconds = time.perf_counter() - begin
        peak = memory_mb("VmHWM")
        with Index.open(path) as index:
            # Not its density, which is rounded.
            fired = [feature.n_fired for feature in index.features(range(sae.d_sae))]
            density = [n / index.meta["n_tokens"] for n in fired]
        size = path.stat().st_size / 1e6
    return {
        "seconds": seconds, "loaded_mb": loaded, "peak_mb": peak, "density": density,
        "version": version("saesteer"), "size_mb": size,
    }  # fmt: skip


def saedashboard(
    folder: Path, tokens: dict[str, torch.Tensor], layer: int, special: list[int]
) -> Any:
    """SAEDashboard's data of every feature, in memory; what it could write of them is not timed.

    As fast as it goes: a JumpReLU SAE, of which it encodes only the features of a batch (a TopK's
    it encodes whole for each), and the model's activations kept in files, without which it would
    run the model again for each batch of features.
    """
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE

    model = hooked(folder / "model")
    sae = SAE.load_from_disk(folder / "sae", device="cpu")
    ids = tokens["tokens"].long()
    kept = int((~torch.isin(ids, torch.tensor(special))).sum())
    loaded = memory_mb("VmRSS")
    with tempfile.TemporaryDirectory() as out:
        settings = SaeVisConfig(
            hook_point=f"blocks.{layer}.hook_resid_post",
            features=range(sae.cfg.d_sae),
            minibatch_size_features=256,
            minibatch_size_tokens=64,
            ignore_tokens=set(special),
            cache_dir=Path(out),
        )
        begin = time.perf_counter()
        found = SaeVisRunner(settings).run(encoder=sae, model=model, tokens=ids)
        seconds = time.perf_counter() - begin
        peak = memory_mb("VmHWM")
    # Its own density is over special tokens too, and rounded; its histogram counts every firing.
    counts = [
        sum(found.feature_data_dict[i].acts_histogram_data.bar_heights)
        for i in range(sae.cfg.d_sae)
    ]
    return {
        "seconds": seconds, "loaded_mb": loaded, "peak_mb": peak,
        "density": [count / kept for count in counts], "version": version("sae-dashboard"),
    }  # fmt: skip


def hooked(folder: Path) -> Any:
    """A Llama as transformer-lens holds it; its own loader knows models by their Hub names only."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    from transformers import LlamaForCausalLM

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama":
        raise SystemExit(
            f"the model is a {config['model_type']}; only Llama models are carried over to "
            "transformer-lens here"
        )
    settings = HookedTransformerConfig(
        n_layers=config["num_hidden_layers"], d_model=config["hidden_size"],
        n_ctx=config["max_position_embeddings"], d_head=config["head_dim"],
        n_heads=config["num_attention_heads"], n_key_value_heads=config["num_key_value_heads"],
        d_mlp=config["intermediate_size"], d_vocab=config["vocab_size"],
        act_fn=config["hidden_act"], gated_mlp=True, normalization_type="RMS", final_rms=True,
        eps=config["rms_norm_eps"], positional_embedding_type="rotary",
        rotary_dim=config["head_dim"], rotary_adjacent_pairs=False,
        rotary_base=config["rope_parameters"]["rope_theta"],
        original_architecture="LlamaForCausalLM", device="cpu",
    )  # fmt: skip
    model = HookedSAETransformer(settings)
    plain = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Not strict: it has constants that no checkpoint holds.
    missing = model.load_state_dict(convert_llama_weights(plain, settings), strict=False)
    constant = ("mask", "IGNORE", "rotary_sin", "rotary_cos")
    lost = [name for name in missing.missing_keys if not name.endswith(constant)]
    if lost or missing.unexpected_keys:
        raise SystemExit(f"weights without a counterpart: {[*lost, *missing.unexpected_keys]}")
    return model.eval()


def memory_mb(name: str) -> float:
    """Of this process now ("VmRSS") or at most so far ("VmHWM"), in units of 10^6 bytes.

    Not getrusage's, which begins with what the process held that started this one.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (kb,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(kb) * 1024 / 1e6


def main() -> None:
    """Measure once and print."""
    name, folder, threads, contexts = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    whole = load_file(folder / "tokens.safetensors")
    tokens = {key: rows[:contexts] for key, rows in whole.items()}
    describe = {"ours": ours, "saedashboard": saedashboard}[name]
    print(json.dumps(describe(folder, tokens, **task)))


if __name__ == "__main__":
    main()
