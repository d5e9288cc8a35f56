"""The three sparse products on a GPU: Triton's kernels, torch's own forms, dense products.

    python benchmarks/kernels.py

All forms of a product run in turn on the same pairs, whose latents are as unevenly frequent as a
trained SAE's. Printed as JSON: medians in milliseconds, and the kernel's largest error against the
dense product, relative where a value exceeds one. Dense products are given the dense code for
nothing, and are made in full float32 (no TF32). Without a GPU nothing is timed, and that is said.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from saesteer.core.progress import progress

SHAPES = ((192, 2048, 16, 4096), (288, 2304, 32, 4096), (768, 16384, 32, 4096))


def medians(forms: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Milliseconds of each form, run in turn; the first two rounds don't count."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds + 2):
        for name, form in forms.items():
            synchronise()
            begin = time.perf_counter()
            form()
            synchronise()
            times[name].append(1000 * (time.perf_counter() - begin))
    return {f"{name}_ms": statistics.median(each[2:]) for name, each in times.items()}


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rows(shape: tuple[int, int, int, int], rounds: int, device: str) -> list[dict[str, object]]:
    """One row a product at (d, d_sae, k, batch)."""
    from saesteer.training.kernels import pair_products, weighted_sums

    d, d_sae, k, batch = shape
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, d, generator=generator).to(device) for n in (batch, d_sae))
    frequency = torch.arange(1.0, d_sae + 1) ** -0.7
    latents = torch.multinomial(frequency.expand(batch, d_sae), k, generator=generator)
    latents = latents.flatten().to(device)
    values = torch.rand(batch * k, generator=generator).to(device)
    row = torch.arange(batch, device=device).repeat_interleave(k)
    starts = torch.arange(batch, device=device) * k
    order = latents.argsort(stable=True)
    counts = torch.bincount(latents, minlength=d_sae)
    latent_starts = counts.cumsum(0) - counts
    code = torch.zeros(batch, d_sae, device=device).index_put_((row, latents), values)
    half_left, half_right = left.bfloat16(), right.bfloat16()

    def summed(index: Tensor, weights: Tensor, begins: Tensor, table: Tensor) -> Tensor:
        return F.embedding_bag(index, table, begins, mode="sum", per_sample_weights=weights)

    def sampled() -> Tensor:
        crow = F.pad(starts, (0, 1), value=len(row))
        pattern = torch.sparse_csr_tensor(crow, latents, torch.zeros_like(values), code.shape)
        return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()

    by_row = latents, values, starts
    by_latent = row[order], values[order], latent_starts
    products: dict[str, dict[str, Callable[[], Tensor]]] = {
        "decode": {
            "triton": lambda: weighted_sums(*by_row, right),
            "triton_bf16": lambda: weighted_sums(*by_row, half_right),
            "torch": lambda: summed(*by_row, right),
            "dense": lambda: code @ right,
        },
        "products": {
            "triton": lambda: pair_products(row, latents, left, right),
            "triton_bf16": lambda: pair_products(row, latents, half_left, half_right),
            "torch": sampled,
            "dense": lambda: (left @ right.T)[row, latents],
        },
        "gathered": {
            "triton": lambda: weighted_sums(*by_latent, left),
            "triton_bf16": lambda: weighted_sums(*by_latent, half_left),
            "torch": lambda: summed(*by_latent, left),
            "dense": lambda: code.T @ left,
        },
    }
    found: list[dict[str, object]] = []
    for name, forms in products.items():
        expected = forms["dense"]()
        error = ((forms["triton"]() - expected).abs() / expected.abs().clamp(min=1)).max()
        found.append(
            {"product": name, "shape": shape, **medians(forms, rounds), "error": float(error)}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="time the sparse products on a GPU")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds of each form")
    rounds = parser.parse_args().rounds
    try:
        import triton
    except ImportError:
        print(
            "not run: Triton's kernels, torch's forms and dense products (Triton is not installed)"
        )
        return
    if not torch.cuda.is_available():
        print(
            "not run: Triton's kernels, torch's forms and dense products (there is no CUDA device)"
        )
        return
    torch.set_float32_matmul_precision("highest")
    shapes = progress("kernels", len(SHAPES), unit="shape", iterable=SHAPES)
    found = [row for shape in shapes for row in rows(shape, rounds, "cuda")]
    report = {
        "device": torch.cuda.get_device_name(),
        "rounds": rounds,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "rows": found,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
