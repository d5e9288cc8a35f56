"""vector, steer: directions from contrast pairs, and texts with and without an edit."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from saesteer.core.files import written_aside
from saesteer.errors import FeatureError, SteeringError, TextError
from saesteer.run import Run

RunFolder = Annotated[Path, tyro.conf.Positional]
Several = tyro.conf.UseAppendAction[tuple[str, ...]]


def vector(
    run: RunFolder,
    *,
    pairs: Path,
    name: str,
    layer: str | None = None,
    read: str = "answer-mean",
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Fit a mean-difference direction on contrast pairs and keep it in the run.

    Args:
        run: The run folder.
        pairs: JSONL with a prompt, a chosen and a rejected continuation on each line.
        name: What to call the direction; `steer --vector NAME=STRENGTH` uses it.
        layer: A hook point; by default the SAE's.
        read: Where activations are read: answer-mean or answer-last.
        device: Where the model runs.
        dtype: float32, bfloat16 or float16.
    """
    from saesteer import stages

    opened = Run.open(run, device=device, dtype=dtype)
    direction, path = stages.fit_vector(opened, pairs, name=name, point=layer, read=read)
    print(
        f"mean difference of {direction.n_pairs} pairs at {direction.point}, "
        f"length {float(direction.vector.norm()):.4g}, in {path}"
    )
    print(f'next: saesteer steer {run} --vector {name}=1 --prompt "…"')


def steer(
    run: RunFolder,
    *,
    clamp: Several = (),
    add: Several = (),
    vector: Several = (),
    prompt: Several = (),
    prompts: Path | None = None,
    out: Path | None = None,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    device: str | None = None,
    dtype: str | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Generate with features clamped or directions added, beside the baseline of the same seed.

    Args:
        run: The run folder.
        clamp: FEATURE=STRENGTH, sets a feature: 4217=8x is 8 times its highest activation in the
            index, 4217=3.5 a raw activation, 4217=0 ablates it. May be repeated.
        add: FEATURE=STRENGTH, adds the feature's decoder direction, in the same units.
        vector: NAME=STRENGTH, adds a direction that `saesteer vector` fitted, times STRENGTH.
        prompt: A prompt. May be repeated.
        prompts: A file of prompts, one a line, or JSONL with a "prompt" on each line.
        out: Write JSONL here in place of printing.
        max_new_tokens: Tokens to generate.
        temperature: 0 is greedy, 1 samples as the model says.
        seed: Of the sampling; the same for baseline and steered.
        batch_size: Prompts at a time.
        device: Where the model runs.
        dtype: float32, bfloat16 or float16.
        json_: Print one JSON object a prompt.
    """
    if not (clamp or add or vector):
        raise SteeringError(
            "nothing to steer with; give --clamp FEATURE=STRENGTH, --add FEATURE=STRENGTH or "
            "--vector NAME=STRENGTH"
        )
    if batch_size < 1:
        raise SteeringError(f"batch size {batch_size}; expected 1 or more")
    texts = [*prompt, *(_read_prompts(prompts) if prompts else [])]
    if not texts:
        raise TextError('nothing to continue; give --prompt "…" or --prompts FILE')
    opened = Run.open(run, device=device, dtype=dtype)
    how: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    edits = opened.edits(
        clamp={_feature(key): value for key, value in _settings(clamp, "clamp")},
        add={_feature(key): value for key, value in _settings(add, "add")},
        vector=dict(_settings(vector, "vector")),
    )
    rows: list[dict[str, Any]] = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        baseline = opened.generate(batch, **how)
        with opened.steer(edits=edits) as receipt:
            steered = opened.generate(batch, **how)
        for given, plain, changed in zip(batch, baseline, steered, strict=True):
            rows.append({"prompt": given, "baseline": plain, "steered": changed})
            if not (out or json_):
                print(f"baseline  {plain}\nsteered   {changed}\n")
        if not (out or json_):
            print(receipt)
        rows[-1]["receipt"] = receipt.to_dict()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out:
        with written_aside(out) as aside:
            aside.write_text(lines, encoding="utf-8")
        print(f"{len(rows)} texts in {out}")
    elif json_:
        sys.stdout.write(lines)


def _settings(values: tuple[str, ...], option: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for value in values:
        key, equals, strength = value.partition("=")
        if not (key and equals and strength):
            what = "NAME=STRENGTH" if option == "vector" else "FEATURE=STRENGTH"
            raise SteeringError(f"--{option} {value!r} is not {what}, such as 12=8x")
        key = str(int(key)) if key.isdecimal() and option != "vector" else key
        if key in (k for k, _ in found):
            raise SteeringError(f"--{option} {key} is given twice; give it one strength")
        found.append((key, strength))
    return found


def _feature(text: str) -> int:
    if not text.isdecimal():
        raise FeatureError(f"{text!r} is not a feature's number; saesteer search finds one")
    return int(text)


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise TextError(f"no file of prompts {path}; give one prompt a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read as UTF-8 text: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line)
            continue
        try:
            found = json.loads(line)["prompt"]
            if not isinstance(found, str):
                raise TypeError
            prompts.append(found)
        except (json.JSONDecodeError, KeyError, TypeError):
            raise TextError(
                f'{path} line {number} is not a JSON object with a "prompt"; mend the line'
            ) from None
    if not prompts:
        raise TextError(f"{path} holds no prompt; give one a line")
    return prompts
