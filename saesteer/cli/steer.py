"""steer: texts with and without an edit."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from saesteer import named
from saesteer.cli import steer_options, steer_view
from saesteer.cli.arguments import RunFolder
from saesteer.cli.steer_options import Given, Scoped, narrowed
from saesteer.cli.steer_view import Batch, View
from saesteer.core.files import written_aside
from saesteer.errors import SteeringError, TextError
from saesteer.run import Run

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from saesteer.core.generate import Prompt
    from saesteer.effects.readings import Reading
    from saesteer.steering.edits import Edit
    from saesteer.steering.positions import Positions

Several = tyro.conf.UseAppendAction[tuple[str, ...]]
Seeds = tyro.conf.UseAppendAction[tuple[int, ...]]


def steer(
    run: RunFolder,
    *,
    clamp: Several = (),
    add: Several = (),
    vector: Several = (),
    project: Several = (),
    rotate: Several = (),
    load: Several = (),
    force: bool = False,
    prompt: Several = (),
    prompts: Path | None = None,
    sweep: str | None = None,
    where: Literal["both", "prompt", "generated"] = "both",
    first: int | None = None,
    last: int | None = None,
    after: str | None = None,
    every: int = 1,
    special: bool = False,
    if_: Annotated[str | None, tyro.conf.arg(name="if")] = None,
    lasting: Literal["while", "from", "until"] = "while",
    fade: str | None = None,
    keep_norm: bool = False,
    chat: bool = False,
    system: str | None = None,
    roles: str | None = None,
    save: str | None = None,
    show: bool = False,
    html: Path | None = None,
    out: Path | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    seed: Seeds = (),
    batch_size: int = 16,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Generate text with edits, beside the baseline of the same seed.

    Args:
        run: The run folder.
        clamp: FEATURE=STRENGTH, sets a feature: 4217=8x is 8 times its highest activation in the
            index, 4217=3.5 a raw activation, 4217=0 ablates it. May be repeated.
        add: FEATURE=STRENGTH, adds the feature's decoder direction, in the same units.
        vector: NAME=STRENGTH, uses what `saesteer vector` fitted as its method is meant: adds a
            direction, times STRENGTH, or maps, or takes out. NAME may be its file.
        project: DIRECTION=NUMBER, sets the projection on a direction, in units of activation; 0
            projects it out; chosen or rejected puts it where that side of a vector's pairs is.
            DIRECTION is a feature, or a vector's name or file. May be repeated.
        rotate: FIRST,SECOND=ANGLE, turns the plane of two directions from the first towards the
            second: by 30deg, or to an angle, to30deg; a plain number is radians.
        load: Edits that --save kept, by name, or a file of edits: .safetensors, .gguf (llama.cpp,
            repeng) or .pt (lm-eval). They are used as they are.
        force: Use vectors and kept edits although they were made for other weights.
        prompt: A prompt. May be repeated.
        prompts: A file of prompts, one a line, or JSONL with a "prompt" on each line.
        sweep: Multiples of the strengths, 0,2,4,8,16: all of them beside one another, in a table.
        where: Which tokens are steered: the prompt's, generated ones, or both.
        first: Of the prompt, only the first so many tokens.
        last: Of the prompt, only the last so many tokens.
        after: Only tokens after the first place where the text so far holds this.
        every: Only every so many tokens.
        special: Steer BOS and other special tokens, too.
        if_: Only on tokens on which a feature is active: '88>2.5' raw, '88>0.5x' of its highest
            activation in the index. Write it in quotes.
        lasting: While the condition holds, from the first token on which it does, or until then.
        fade: linear:40 falls to nothing over 40 generated tokens, decay:20 halves every 20.
        keep_norm: Give the edited activation the norm that it had.
        chat: Prompts are a user's turn, written by the tokenizer's chat template.
        system: A system turn before it.
        roles: Steer only the tokens of these turns: system, user, assistant, a comma between.
        save: Keep the edits in the run under this name, RUN/steers/NAME.steer.safetensors.
        show: Mark the steered tokens, with bars of the first feature's activation beneath.
        html: Write a page with the texts, marks and receipts here; it opens offline.
        out: Write JSONL here in place of printing.
        json_: Print one JSON object a prompt and seed.
        max_new_tokens: Tokens to generate.
        temperature: 0 is greedy, 1 samples as the model says.
        seed: Of the sampling; the same for baseline and steered. May be repeated; by default 0.
        batch_size: Prompts at a time.
        device: Where the model runs.
        dtype: float32, bfloat16 or float16.
    """
    given = Given(clamp, add, vector, project, rotate, force)
    scoped = Scoped(where, first, last, after, every, special, if_, lasting, fade, keep_norm)
    if not (given or load):
        raise SteeringError(
            "nothing to steer with; give --clamp FEATURE=STRENGTH, or --add, --vector, --project, "
            "--rotate or --load"
        )
    if batch_size < 1:
        raise SteeringError(f"batch size {batch_size}; expected 1 or more")
    if not chat and (system is not None or roles is not None):
        raise TextError("--system and --roles are about a chat; give --chat too")
    if save is not None and roles is not None:
        raise SteeringError(
            "--save can't keep --roles, whose tokens stand elsewhere in every chat; give one only"
        )
    scoped.check(given, load)
    turns, times = steer_options.roles_of(roles), steer_options.multiples(sweep) if sweep else None
    texts = [*prompt, *(steer_options.read_prompts(prompts) if prompts else [])]
    if not texts and (save is None or html or out or sweep):
        raise TextError('nothing to continue; give --prompt "…" or --prompts FILE')
    opened = Run.open(run, device=device, dtype=dtype)
    kept = None if save is None else named.edits_path(opened, save)
    edits = scoped.applied(given.edits(opened), opened)
    edits += [edit for name in load for edit in opened.load_edits(name, force=force)]
    jobs = []
    for text in texts:
        ids: Prompt = text
        positions: Positions | None = None
        if chat:
            ids, positions = steer_options.chat(opened, text, system=system, roles=turns)
        jobs += [Job(text, ids, positions, one) for one in seed or (0,)]
    printed = not (out or json_)
    view = View(opened.tokenizer, ", ".join(filter(None, [str(given), *load])), chat, show)
    live = printed and sys.stdout.isatty() and len(jobs) == 1 and not (show or times)
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    batches = []
    for batch in _compared(
        opened, jobs, edits, _reading(opened, given, edits), how, times, batch_size,
        view.stream if live else None,
    ):  # fmt: skip
        batches.append(batch)
        if printed:
            print(view.after_stream(batch) if live else view.batch(batch))
    rows = [row for batch in batches for row in steer_view.rows(batch, chat=chat)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    told = sys.stderr if json_ else sys.stdout
    if kept is not None:
        from saesteer.steering.artifact import save_edits

        about = {"given": str(given), "loaded": list(load), "sae_hash": opened.sae.hash}
        save_edits(kept, edits, opened.model, provenance=about)
        print(f"edits in {kept}; --load {save} uses them again", file=told)
    if html and batches:
        facts = {
            "edits": "\n".join(f"{edit}, on {edit.where}" for edit in edits),
            "model": opened.config.model.id,
            "run": str(run),
            "sampling": f"temperature {temperature:g}, {max_new_tokens} new tokens",
        }
        with written_aside(html) as aside:
            aside.write_text(view.page(batches, facts), encoding="utf-8")
        print(f"page in {html}", file=told)
    if out:
        with written_aside(out) as aside:
            aside.write_text(lines, encoding="utf-8")
        print(f"{len(rows)} texts in {out}")
    elif json_:
        sys.stdout.write(lines)


@dataclass(frozen=True)
class Job:
    """A text to continue with one seed. ids: the prompt as the model gets it. positions: of the
    roles that are steered in it; None: all."""

    text: str
    ids: "Prompt"
    positions: "Positions | None"
    seed: int


def _reading(run: Run, given: Given, edits: "Sequence[Edit]") -> "Reading | None":
    """The feature that is named first, or else what the first edit is about."""
    from saesteer.effects import readings

    if given.first_feature is not None:
        return readings.of_feature(run.sae, given.first_feature)
    return readings.of_edit(edits[0])


def _compared(
    run: Run,
    jobs: Sequence[Job],
    edits: "Sequence[Edit]",
    reading: "Reading | None",
    how: Mapping[str, Any],
    times: Sequence[float] | None,
    batch_size: int,
    stream: "Callable[[str], BaseStreamer] | None",
) -> Iterator[Batch]:
    """Comparisons of so many jobs at a time; of a sweep, of one."""
    from saesteer.effects.side_by_side import Sampling, pairs, sweep

    sampling = Sampling(**how, prepend_bos=run.sae.prepend_bos)
    step = 1 if times else batch_size
    for start in range(0, len(jobs), step):
        some = jobs[start : start + step]
        own = [[narrowed(edit, job.positions) for edit in edits] for job in some]
        common: dict[str, Any] = {"sampling": sampling, "reading": reading}
        if times:
            one, receipt = sweep(
                run.model, run.tokenizer, some[0].ids, own[0], times, seed=some[0].seed, **common
            )
            found = [one]
        else:
            found, receipt = pairs(
                run.model,
                run.tokenizer,
                [job.ids for job in some],
                own if any(job.positions for job in some) else edits,
                seeds=[job.seed for job in some],
                stream=stream,
                **common,
            )
        yield Batch([job.text for job in some], found, receipt, swept=times is not None)
