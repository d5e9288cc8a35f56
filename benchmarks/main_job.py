"""What steering and training cost, as ratios of alternating runs: `make bench`.

    generate with one clamp or one add, against the same generate without
    our training step, against a plain dense TopK step in torch with autograd and Adam

Both sides of a ratio run in turn on the same work; medians and the range of the ratios are
written to benchmarks/RESULTS.md. Load time is left out.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from saesteer import Add, Clamp, steer
from saesteer.core.model import HookPoint, load_model
from saesteer.core.sae import Sae
from saesteer.training.architectures import ARCHITECTURES
from saesteer.training.step import Weights, loss_and_gradients

RESULTS = Path(__file__).parent / "RESULTS.md"
SHAPES = ((192, 2048, 16, 4096), (288, 2304, 32, 4096))


def ratio(ours: Callable[[], object], other: Callable[[], object], rounds: int) -> dict[str, float]:
    """Time both in turn; medians in milliseconds, and the ratio other / ours pair by pair."""
    for warm in (ours, other):
        warm()
    pairs = []
    for _ in range(rounds):
        times = []
        for call in (ours, other):
            begin = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - begin))
        pairs.append(times)
    ratios = sorted(b / a for a, b in pairs)
    return {
        "ours_ms": statistics.median(a for a, _ in pairs),
        "other_ms": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "low": ratios[0],
        "high": ratios[-1],
    }


def steering_rows(rounds: int) -> list[dict[str, object]]:
    """generate on the embedded model, 24 new tokens, with an edit and without, in turn."""
    model, tokenizer = load_model("planted")
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    encoder = torch.randn(width, 16 * width, generator=generator) / width**0.5
    sae = Sae(
        W_enc=encoder,
        b_enc=torch.zeros(16 * width),
        W_dec=F.normalize(encoder.T.contiguous(), dim=1),
        b_dec=torch.zeros(width),
        architecture="standard",
        hook_point=HookPoint(1, "resid_post"),
        model_id="planted",
    )
    edits = {
        "one clamp": Clamp(sae, 3, 2.0),
        "one add": Add(sae.W_dec[3], 2.0, "layers.1.resid_post"),
    }
    rows: list[dict[str, object]] = []
    for batch in (1, 32):
        ids = torch.tensor([tokenizer("Story A. Once there was a girl named")["input_ids"]])
        ids = ids.repeat(batch, 1)

        def plain(ids: torch.Tensor = ids) -> None:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, min_new_tokens=24
            )

        for name, edit in edits.items():

            def steered(edit: Clamp | Add = edit, plain: Callable[[], None] = plain) -> None:
                with steer(model, edit):
                    plain()

            rows.append({"case": name, "batch": batch, **ratio(steered, plain, rounds)})
    return rows


def training_rows(rounds: int) -> list[dict[str, object]]:
    """Loss and gradients of one TopK batch: ours, and plain dense autograd, in turn."""
    rows: list[dict[str, object]] = []
    for d, d_sae, k, batch in SHAPES:
        generator = torch.Generator().manual_seed(0)
        y = torch.randn(batch, d, generator=generator)
        encoder = F.normalize(torch.randn(d_sae, d, generator=generator), dim=1)
        weights = Weights(encoder.clone(), torch.zeros(d_sae), encoder.clone(), torch.zeros(d))
        dense = [tensor.clone().requires_grad_() for _, tensor in weights.items()]

        def ours(weights: Weights = weights, y: torch.Tensor = y, k: int = k) -> torch.Tensor:
            choose = ARCHITECTURES["topk"].choose
            return loss_and_gradients(weights, y, choose, k, variance=1.0).loss

        def plain(
            dense: list[torch.Tensor] = dense, y: torch.Tensor = y, k: int = k
        ) -> torch.Tensor:
            w_enc, b_enc, w_dec, b_dec = dense
            pre = F.relu((y - b_dec) @ w_enc.T + b_enc)
            values, latents = pre.topk(k, dim=1)
            code = torch.zeros_like(pre).scatter(1, latents, values)
            loss = (code @ w_dec + b_dec - y).square().sum() / len(y)
            for tensor in dense:
                tensor.grad = None
            loss.backward()
            return loss.detach()

        agree = float(abs(ours() - plain()) / plain())
        if agree > 1e-4:
            raise SystemExit(f"the two steps disagree by {agree:.1e}: nothing to compare")
        shape = f"d {d}, d_sae {d_sae}, k {k}, batch {batch}"
        rows.append({"shape": shape, **ratio(ours, plain, rounds)})
    return rows


def markdown(figures: dict[str, list[dict[str, object]]]) -> str:
    """RESULTS.md: the machine, the versions, and a table for each benchmark."""
    lines = [
        "# Results",
        "",
        "Written by `make bench` (benchmarks/main_job.py). Medians of alternating runs; ratios are "
        "pair by pair, with their range. The machine may be shared: quote ratios.",
        "",
        f"{platform.machine()}, {torch.get_num_threads()} threads; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}.",
    ]
    titles = {
        "steering": "## Generation on the embedded model: unsteered time / steered time",
        "training": "## Loss and gradients of a TopK batch: dense autograd's time / ours",
    }
    for name, rows in figures.items():
        head = [key for key in rows[0] if key not in ("ratio", "low", "high")]
        lines += ["", titles[name], "", f"| {' | '.join(head)} | ratio | range |"]
        lines += ["|" + " --- |" * (len(head) + 2)]
        for row in rows:
            cells = [f"{row[key]:.1f}" if key.endswith("_ms") else str(row[key]) for key in head]
            cells += [f"{row['ratio']:.2f}", f"{row['low']:.2f} – {row['high']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run both, write RESULTS.md, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print JSON and write nothing")
    args = parser.parse_args()
    figures = {"steering": steering_rows(args.rounds), "training": training_rows(args.rounds)}
    if args.json:
        print(json.dumps(figures))
        return
    RESULTS.write_text(markdown(figures), encoding="utf-8")
    print(markdown(figures))


if __name__ == "__main__":
    main()
