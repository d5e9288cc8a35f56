"""directions: which a run keeps, sums of them, and what each does to generation."""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from saesteer.cli.arguments import RunFolder, check_seed
from saesteer.errors import ConfigError, IndexingError, RunError, SteeringError, did_you_mean
from saesteer.run import Run

if TYPE_CHECKING:
    from saesteer.core.generate import Prompt
    from saesteer.directions.direction import Direction, Part

Several = tyro.conf.UseAppendAction[tuple[str, ...]]

# Contexts of the run's held-out text on which costs are measured, and prompts of the embedded
# model's language.
_TEXTS, _PROMPTS = 8, 4


def directions(
    run: RunFolder,
    *,
    make: Several = (),
    show: tuple[str, ...] | None = None,
    prompt: Several = (),
    strength: float | None = None,
    kl_budget: float = 0.5,
    max_new_tokens: int = 24,
    temperature: float = 1.0,
    seed: int = 0,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """List the directions that a run keeps, make sums of them, or say what each does to generation.

    Args:
        run: The run folder.
        make: "NAME = a - 0.5*b" keeps what the expression comes to under a new name: directions
            of one place, numbers, + - * /, parentheses, and orthogonal(a, b), which is a without
            its part along b. Put spaces around a minus: a-b may be a name. May be repeated.
        show: What these do to generation, by name or pattern ("melbo-*"); without a name, all.
        prompt: A prompt to continue with and without; by default a few neutral ones. May be
            repeated.
        strength: Show all at this strength; by default at the one that costs --kl-budget, and
            what is projected, taken out, mapped or added to single tokens at 1.
        kl_budget: Nats of KL a token.
        max_new_tokens: Tokens to generate.
        temperature: 0 is greedy.
        seed: Of the sampling, the same with and without, and of random directions.
        json_: Print one JSON object.
        device: Where the model runs.
        dtype: float32, bfloat16 or float16.
    """
    if show is None and (prompt or strength is not None):
        raise ConfigError("--prompt and --strength are for --show; add --show NAME")
    check_seed(seed)
    opened = Run.open(run, device=device, dtype=dtype)
    from saesteer.cli import directions_view as view

    made = [_made(opened, text) for text in make]
    kept, others = kept_in(run)
    if show is None and made:
        rows = [view.facts(name, kept[name]) for name in made]
        last = f'next: saesteer directions {run} --show "{made[-1]}"'
        print(json.dumps({"made": rows}) if json_ else view.table(rows) + "\n" + last)
    elif show is None:
        ours = _model_of(opened)
        rows = [view.facts(name, parts, ours) for name, parts in kept.items()]
        melbo = view.melbo(kept)
        if json_:
            print(json.dumps({"directions": rows, "melbo": melbo, "others": others}))
        else:
            print(view.listed(str(run), rows, melbo, others))
    else:
        _show(opened, kept, _chosen(run, show, kept), prompt, strength, kl_budget,
              max_new_tokens, temperature, seed, json_)  # fmt: skip


def kept_in(run: Path) -> "tuple[dict[str, list[Part]], dict[str, str]]":
    """What RUN/steers holds: the parts of each name; of every other file, what it is or what is
    wrong with it. No model is loaded, so that parts fitted on other weights are here too."""
    from saesteer.directions.kept import load_parts

    kept, others = {}, {}
    folder = run / "steers"
    files = list(folder.iterdir()) if folder.is_dir() else []
    for path in sorted(files, key=lambda one: (one.stem, one.name)):
        if path.name == "pairs.cache":  # activations of pairs, which methods share
            continue
        if path.name.endswith(".steer.safetensors"):
            name = path.name.removesuffix(".steer.safetensors")
            others[path.name] = f"edits, for saesteer steer --load {name}"
        elif path.is_dir():
            adapter = (path / "adapter_config.json").is_file()
            others[path.name] = "an adapter, for peft" if adapter else "a folder, and no direction"
        elif path.suffix != ".safetensors":
            others[path.name] = "no direction's file"
        else:
            try:
                kept[path.stem] = load_parts(path)
            except SteeringError as error:
                others[path.name] = str(error)
    return kept, others


def _made(run: Run, text: str) -> str:
    """Keep what "NAME = expression" comes to; the name."""
    from saesteer.directions import algebra

    name, sign, expression = (part.strip() for part in text.partition("="))
    if not (name and sign and expression):
        raise ConfigError(f'--make {text!r}: expected "NAME = EXPRESSION", such as "c = a - 0.5*b"')
    path = run.vector_path(name)
    kept, others = kept_in(run.path)
    before = kept.get(name)
    # What --make wrote can be made again; anything else took pairs, or isn't ours.
    if path.exists() and not (before and "expression" in before[0].provenance):
        raise RunError(f"{path} is there already, and wasn't made by --make; take another name")
    # Damaged files are told by name; edits are no directions.
    files = [file for file in others if not file.endswith(".steer.safetensors")]
    unread = [file.removesuffix(".safetensors") for file in files if file.endswith(".safetensors")]
    used = algebra.names_in(expression, {*kept, *unread})
    algebra.combined(expression, {one: _single(one, kept, others) for one in used}).save(path)
    return name


def _single(
    name: str, kept: "Mapping[str, Sequence[Part]]", others: Mapping[str, str]
) -> "Direction":
    from saesteer.directions.direction import Direction

    if name not in kept:
        raise SteeringError(f"{name}: {others[f'{name}.safetensors']}")
    (first, *more) = kept[name]
    if more or not isinstance(first, Direction):
        raise SteeringError(
            f"{name} is {len(kept[name])} parts of {first.method}, and no single direction; "
            "algebra is for directions to add"
        )
    return first


def _chosen(run: Path, patterns: Sequence[str], kept: Mapping[str, Any]) -> list[str]:
    """The names that match any of the patterns, in order; all of none at all."""
    if not kept:
        raise RunError(f"{run} keeps no directions; fit one with `saesteer vector {run} --pairs …`")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in kept):
            raise SteeringError(
                f"no direction {pattern!r}{did_you_mean(pattern, kept)}; {run} keeps "
                f"{', '.join(kept)}"
            )
    return [n for n in kept if not patterns or any(fnmatchcase(n, p) for p in patterns)]


def _model_of(run: Run) -> str | None:
    """The fingerprint of the run's model as its index has it, so that no model need be loaded."""
    try:
        found = run.index.meta.get("model_fingerprint")
    except IndexingError:
        return None
    return None if found is None else str(found)


def _show(
    run: Run,
    kept: "Mapping[str, Sequence[Part]]",
    names: Sequence[str],
    prompts: Sequence[str],
    strength: float | None,
    kl_budget: float,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    as_json: bool,
) -> None:
    from saesteer import units
    from saesteer.cli import directions_view as view
    from saesteer.core.model import fingerprint
    from saesteer.effects import generating
    from saesteer.run_text import has_cache

    ours = fingerprint(run.model)
    foreign = {
        name: view.foreign(kept[name])
        for name in names
        if any(part.model_fingerprint != ours for part in kept[name])
    }
    found = generating.seen(
        run.model,
        run.tokenizer,
        {name: kept[name] for name in names if name not in foreign},
        prompts=prompts or _neutral(run),
        texts=units.neutral_tokens(run, _TEXTS) if has_cache(run) else None,
        strength=strength,
        kl_budget=kl_budget,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    melbo = {name: facts for name, facts in view.melbo(kept).items() if name in names}
    if as_json:
        facts = found.to_dict()
        facts["failed"] |= foreign
        print(json.dumps({**facts, "melbo": melbo}))
    else:
        print(view.shown(found, kept, melbo, foreign))


def _neutral(run: Run) -> "Sequence[Prompt]":
    """Prompts of the run's own language, where that is the embedded one."""
    from saesteer.core.model import EMBEDDED
    from saesteer.effects import generating
    from saesteer.effects.planted_causes import neutral_prompts

    if run.config.model.id == EMBEDDED:
        return neutral_prompts()[:_PROMPTS]
    return generating.PROMPTS
