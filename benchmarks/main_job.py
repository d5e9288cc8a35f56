"""What steering costs: generate with one clamp or one add, against the same generate without.

Both sides of a ratio run in turn on the same work; medians and the range of the ratios are
written to benchmarks/RESULTS.md. Load time is left out.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import results
import torch
import torch.nn.functional as F

from saesteer import Add, Clamp, steer
from saesteer.core.model import HookPoint, load_model
from saesteer.core.sae import Sae

TITLE = "Generation on the embedded model: unsteered time / steered time"


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


def main() -> None:
    """Run, write this benchmark's section of RESULTS.md, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print JSON and write nothing")
    args = parser.parse_args()
    rows = steering_rows(args.rounds)
    if args.json:
        print(json.dumps({"steering": rows}))
        return
    body = f"Written by benchmarks/main_job.py. {results.machine('transformers')}\n\n"
    results.write_section(TITLE, body + results.table(rows))
    print(body + results.table(rows))


if __name__ == "__main__":
    main()
