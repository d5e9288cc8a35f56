"""dose: what each strength of an edit does and costs, and where the model breaks."""

import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from saesteer.cli.arguments import RunFolder, check_seed
from saesteer.core.files import write_json
from saesteer.errors import SaesteerError, SteeringError, TextError
from saesteer.run import Run

if TYPE_CHECKING:
    from saesteer.effects.continuations import Effect
    from saesteer.effects.dose import Dose, DoseRow, Interval
    from saesteer.steering.edits import Edit


def dose(
    run: RunFolder,
    *,
    clamp: int | None = None,
    add: int | None = None,
    vector: str | None = None,
    strengths: str = "0,1,2,4,8,16",
    texts: Path | None = None,
    prompts: Path | None = None,
    n_texts: int = 32,
    prompt_tokens: int = 8,
    words: str = "",
    kl_budget: float = 0.5,
    want: Literal["more", "less"] = "more",
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    seed: int = 0,
    out: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Sweep the strength of one edit: its effect on generated text, its cost on neutral text, the
    strength at which the model breaks, and one to use.

    Args:
        run: The run folder.
        clamp: A feature to set.
        add: A feature whose decoder direction is added.
        vector: A direction that `saesteer vector` fitted.
        strengths: Times max_act for a feature, times the direction for a vector. The baseline is
            always measured beside them; 0 of a clamp is ablation.
        texts: Neutral text on which costs are measured, a file or folder; by default the run's own
            held-out tokens.
        prompts: A file of prompts, one a line, or JSONL with a "prompt" on each line; by default
            the first tokens of the neutral texts.
        n_texts: At most so many neutral texts, and so many prompts.
        prompt_tokens: How many tokens of a neutral text make a prompt.
        words: Words, a comma between them: also count the texts that hold one.
        kl_budget: Nats of KL a token that the suggested strength may cost.
        want: Whether the feature is wanted more or less.
        max_new_tokens: Tokens to generate a prompt and strength.
        temperature: 0 is greedy.
        seed: Of the sampling and the bootstrap; every strength draws the same noise.
        out: Where the figure and the JSON go; by default RUN/doses/NAME.
        device: Where the model runs.
        dtype: float32, bfloat16 or float16.
        json_: Print one JSON object.
    """
    if (clamp is not None) + (add is not None) + (vector is not None) != 1:
        raise SteeringError(
            "a dose is of one edit; give one of --clamp FEATURE, --add FEATURE or --vector NAME"
        )
    if n_texts < 1 or prompt_tokens < 1:
        raise TextError(f"{n_texts} texts, prompts of {prompt_tokens} tokens; both must be above 0")
    values = _numbers(strengths)
    check_seed(seed)
    opened = Run.open(run, device=device, dtype=dtype)
    name, edits_at, unit, effect, read = _edit(opened, clamp, add, vector)
    from saesteer.effects import dose as effects

    neutral = _neutral(opened, texts, n_texts)
    starts = _prompts(opened, prompts, neutral, n_texts, prompt_tokens)
    found = effects.dose(
        opened.model,
        opened.tokenizer,
        edits_at,
        values,
        prompts=starts,
        neutral_texts=neutral,
        effect=read,
        words=[word for word in words.split(",") if word.strip()],
        kl_budget=kl_budget,
        want=want,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        prepend_bos=opened.sae.prepend_bos,
    )
    folder = out or run / "doses" / name
    about = {
        "edit": name, "unit": unit, "effect": effect, "words": words,
        "neutral_texts": str(texts or "held-out tokens of the run"),
        "prompts": str(prompts or f"the first {prompt_tokens} tokens of the neutral texts"),
        "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed,
        "sae_hash": opened.sae.hash,
    }  # fmt: skip
    write_json(folder / "dose.json", {**about, **found.to_dict()})
    print(json.dumps({**about, **found.to_dict()}) if json_ else table(found, name, effect, unit))
    from saesteer.effects import dose_plot

    try:
        dose_plot.draw(found, folder / "dose.svg", effect=effect, unit=f"strength, {unit}")
    except SaesteerError as error:  # the figures are what was asked for first
        print(f"saesteer: no plot: {error}", file=sys.stderr)
        if not json_:
            print(f"JSON in {folder}")
        return
    if not json_:
        print(f"figure and JSON in {folder}")


def table(found: "Dose", name: str, effect: str, unit: str) -> str:
    """A dose within 80 columns: a line a strength, α_break, the suggested strength."""
    base, rows = found.baseline, found.rows
    words = base.words is not None
    header = ["strength", "effect", "95% interval", *(["words"] if words else [])]
    header += ["ΔCE", "KL", "entr.", "own", "rep.", "dist2", "Δ/x"]
    cells = [header, *(_cells(row, words) for row in (base, *rows))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        f"{name}: {len(rows)} strengths ({unit}), {base.effect.n} prompts, "
        f"{base.cost.n_tokens:,} neutral tokens",
        f"effect: {effect}",
        "",
    ]
    lines += [
        " ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    lines += [
        "",
        "neutral text: ΔCE, KL(p_0‖p_α) and entropy in nats a token; Δ/x: mean ‖Δ‖/‖x‖",
        "generated text: own: its CE under the unsteered model, nats a token; rep.: share",
        "of 4-grams seen before in a text; dist2: distinct 2-grams / 2-grams",
        "",
    ]
    lines.append(_broken(found))
    lines.append(_suggestion(found))
    return "\n".join(lines)


def _broken(found: "Dose") -> str:
    points = [f"{s:g}" for s in (found.break_negative, found.break_positive) if s is not None]
    if not points:
        return "α_break: none of these strengths raises CE by more than 0.5 nats"
    return f"α_break: {' and '.join(points)} (the first measured with ΔCE > 0.5, not interpolated)"


def _suggestion(found: "Dose") -> str:
    within = f"KL ≤ {found.kl_budget:g} nats"
    if found.suggested is None:
        return f"suggested: none; no strength with {within} has a better effect than the baseline"
    row = next(row for row in found.rows if row.strength == found.suggested)
    assert row.gain is not None
    return (
        f"suggested: {found.suggested:g}, the best effect with {within}: "
        f"{row.gain.mean:+.3g} on the baseline\n"
        f"(95% interval {_between(row.gain)}; chosen on these prompts, so measure it on others)"
    )


def _between(one: "Interval") -> str:
    if one.low is None or one.high is None:
        return "–"
    return f"{_short(one.low, 2)} to {_short(one.high, 2)}"


def _short(value: float, digits: int) -> str:
    """A few digits, and never an exponent that breaks the column."""
    if abs(value) < 5e-4:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def _cells(row: "DoseRow", words: bool) -> list[str]:
    def number(value: float | None, form: str = ".2f") -> str:
        return "–" if value is None else f"{value:{form}}"

    cost, plain = row.cost, row.strength is None
    return [
        "baseline" if row.strength is None else f"{row.strength:g}",
        _short(row.effect.mean, 3),
        _between(row.effect),
        *([number(row.words.mean if row.words else None)] if words else []),
        "–" if plain else number(cost.delta_ce, "+.2f"),
        "–" if plain else number(cost.kl),
        number(cost.entropy),
        number(row.text_ce),
        number(row.repetition),
        number(row.distinct[1]),
        "–" if plain else number(cost.relative_size),
    ]


def _edit(
    run: Run, clamp: int | None, add: int | None, vector: str | None
) -> "tuple[str, Callable[[float], list[Edit]], str, str, Effect]":
    """The edit's name, its edits at a strength, the strengths' unit, the effect and its name."""
    from saesteer.effects import continuations

    if vector is not None:
        direction = run.load_vector(vector)
        return (
            f"vector-{vector}",
            lambda s: run.edits(vector={vector: s}),
            f"× {vector}",
            f"projection on {vector}, read unsteered",
            continuations.projection(run.model, direction.vector, direction.point),
        )
    feature = clamp if clamp is not None else add
    assert feature is not None
    how = "clamp" if clamp is not None else "add"
    run.sae.direction(feature)  # FeatureError where there is none, before anything runs
    return (
        f"{how}-{feature}",
        lambda s: run.edits(**{how: {feature: f"{s!r}x"}}),  # type: ignore[arg-type]
        "× max_act",
        f"activation of feature {feature}, read unsteered",
        continuations.feature_activation(run.model, run.sae, feature),
    )


def _neutral(run: Run, texts: Path | None, most: int) -> list[list[int]]:
    """Rows of token ids on which costs are measured.

    Raises TextError where the run has no held-out tokens and no file is given.
    """
    from saesteer import run_text, units
    from saesteer.effects.damage import token_rows
    from saesteer.training.text import documents

    if texts is not None:
        found = itertools.islice(documents(**run_text.text_source(run, str(texts))), most)
        return token_rows(
            run.tokenizer,
            list(found),
            prepend_bos=run.sae.prepend_bos,
            most=run.config.cache.context_size,
        )
    return list(units.neutral_tokens(run, most))


def _prompts(
    run: Run, prompts: Path | None, neutral: Sequence[Sequence[int]], most: int, n_tokens: int
) -> list[Any]:
    """Prompts of a file, or the first plain tokens of the neutral texts, BOS kept before them."""
    from saesteer.training.text import documents

    if prompts is not None:
        jsonl = prompts.suffix == ".jsonl"
        lines = documents(str(prompts), column="prompt", separator="" if jsonl else "\n")
        return list(itertools.islice(lines, most))
    special, starts = run.special_ids, []
    for row in neutral:
        plain = [token for token in row if token not in special][:n_tokens]
        bos = [row[0]] if row[0] in special else []
        if plain:
            starts.append([*bos, *plain])
    if not starts:
        raise TextError("the neutral texts hold no plain token to begin with; give --prompts FILE")
    return starts


def _numbers(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)):
        raise SteeringError(f"--strengths {text!r} is no list of numbers, such as 0,1,2,4,8,16")
    return sorted(set(found))
