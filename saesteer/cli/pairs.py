"""pairs: make contrast pairs, from templates or by a language model; and check a file of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from saesteer.cli.arguments import check_seed
from saesteer.errors import ConfigError, PairsError

if TYPE_CHECKING:
    from saesteer.directions.pair_writing import Filter, Writer
    from saesteer.directions.pairs import Pair


@dataclass(frozen=True)
class Drawing:
    """How a writer's tokens are drawn."""

    temperature: float
    max_tokens: int
    seed: int

    def told(self, name: str) -> str:
        """A writer's name, with what its texts depend on."""
        return f"{name}, temperature {self.temperature:g}, at most {self.max_tokens} tokens"


def pairs(
    out: Annotated[Path | None, tyro.conf.Positional] = None,
    *,
    template: Path | None = None,
    behaviour: str | None = None,
    model: str | None = None,
    address: str | None = None,
    name: str | None = None,
    key_variable: str = "SAESTEER_PAIRS_KEY",
    n: int = 128,
    choices: bool = False,
    topic: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    against: str | None = None,
    filter: str | None = None,
    temperature: float = 1.0,
    max_tokens: int = 256,
    check: str | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Make contrast pairs and count what they cost, or check a file of them.

    From templates: saesteer pairs OUT --template FILE. Written by a model: saesteer pairs OUT
    --behaviour "…" --model ID (or --address URL --name NAME); a stopped command goes on when it is
    given again. The cost stands in OUT's .cost.json. To check: saesteer pairs --check FILE.

    Args:
        out: The JSONL file to make.
        template: A TOML or JSON file of templates with slots.
        behaviour: What the chosen answers are to show, in words.
        model: A Hugging Face id or folder, loaded here, that writes the pairs and judges them; with
            --check, the one whose tokenizer and contexts the pairs must fit.
        address: An OpenAI-compatible address that writes, such as http://localhost:8000/v1.
        name: What the model is called at the address.
        key_variable: Environment variable that holds the key for the address, if it wants one.
        n: Pairs to make; under 32 a direction is mostly noise.
        choices: Write A/B questions, half of them with the chosen answer as A.
        topic: What written pairs are about; give it several times for several.
        against: A file of test pairs: none is made that asks what one of those asks.
        filter: The model that judges written pairs where an address writes them: a pair is kept
            where its own margin agrees on which answer shows the behaviour. By default --model.
        temperature: Of the writer; 0 always takes the likeliest token.
        max_tokens: The most that are written for a pair.
        check: A file or `datasets` name to check, with --against for leaks from it into the other.
        seed: Of what is drawn.
        device: Where models run.
    """
    check_seed(seed)
    if (out is None) == (check is None):
        raise ConfigError("name either a file to make, OUT, or one to check, --check FILE")
    if check is not None:
        _check(check, against, model, device)
        return
    assert out is not None
    if (template is None) == (behaviour is None):
        raise ConfigError("what are the pairs made of? give one of --template and --behaviour")
    from saesteer.directions.pairs import warn_if_few

    test = [] if against is None else _parsed(against)
    if template is not None:
        _fill(out, template, n, seed, test)
    else:
        assert behaviour is not None
        from saesteer.directions import pair_asking, pair_record, pair_writing

        drawing = Drawing(temperature, max_tokens, seed)
        if address is not None:
            if name is None or model is not None:
                raise ConfigError("an address goes with --name, and without --model")
            key = os.environ.get(key_variable)
            writer = _at_address(address, name, key, drawing)
            judge = None if filter is None else _judge(filter, behaviour, device)
        elif model is not None:
            if filter is not None:
                raise ConfigError("--filter goes with --address: --model judges what it writes")
            writer, judge = _here(model, behaviour, device, drawing)
        else:
            raise ConfigError("who is to write? give --model ID, or --address URL and --name NAME")
        made, record = pair_writing.write_new_pairs(
            out,
            behaviour,
            writer,
            n=n,
            choices=choices,
            topics=topic or pair_asking.TOPICS,
            against=test,
            filter=judge,
            seed=seed,
        )
        dropped = ", ".join(f"{count} {why}" for why, count in record.dropped.items() if count)
        print(f"{len(made)} pairs in {out}, of {record.asked} items; dropped: {dropped or 'none'}")
        spent = record.writing
        print(
            f"cost: {spent['calls']:.0f} calls, {spent['tokens_in']:.0f} tokens in, "
            f"{spent['tokens_out']:.0f} out, {spent['seconds']:.1f} s; "
            f"all in {pair_record.record_path(out)}"
        )
        if judge is None:
            print("not filtered by a model's own margin: give --filter ID for that")
    warn_if_few(n)
    print(f"next: saesteer vector RUN --pairs {out} --name NAME")


def _parsed(source: str) -> "list[Pair]":
    from saesteer.directions.pairs import parse_pairs

    return [pair for _, pair in parse_pairs(source)]


def _check(source: str, against: str | None, model: str | None, device: str) -> None:
    from saesteer.core.model import load_model
    from saesteer.directions.pair_checks import check
    from saesteer.directions.pairs import parse_pairs
    from saesteer.directions.rows import contexts_hold

    tokenizer, context = None, None
    if model is not None:
        loaded, tokenizer = load_model(model, device=device)
        context = contexts_hold(loaded)
    pairs, other = (
        None if name is None else [pair for _, pair in parse_pairs(name, tokenizer)]
        for name in (source, against)
    )
    assert pairs is not None
    found = check(pairs, tokenizer, other, context=context)
    for finding in found:
        print(f"{'error' if finding.fatal else 'warning'}  {finding}")
    fatal = sum(finding.fatal for finding in found)
    if fatal:
        raise PairsError(
            f"{source}: {fatal} of what was found must be mended before these pairs are used"
        )
    print(f"{len(pairs)} pairs in {source}{', nothing found' * (not found)}")


def _fill(out: Path, template: Path, n: int, seed: int, test: "Sequence[Pair]") -> None:
    from saesteer.core.files import sha256
    from saesteer.directions.pair_record import begun, hashed, keep
    from saesteer.directions.pair_template_files import read_templates
    from saesteer.directions.pair_templates import fill

    templates = read_templates(template)
    settings = {"template": sha256(template)[:16], "n": n, "seed": seed, "against": hashed(test)}
    _, record = begun(out, settings)
    made = fill(templates, n, seed=seed, against=test)
    record.asked = n
    keep(out, made, record)
    print(f"{n} pairs in {out}")


def _at_address(address: str, name: str, key: str | None, drawing: Drawing) -> "Writer":
    from saesteer.core.writers import Cost, address_writer
    from saesteer.directions.pair_writing import Writer

    cost = Cost()
    write = address_writer(
        address,
        name,
        key=key,
        max_tokens=drawing.max_tokens,
        temperature=drawing.temperature,
        cost=cost,
    )
    return Writer(write, drawing.told(name), cost)


def _here(model: str, behaviour: str, device: str, drawing: Drawing) -> "tuple[Writer, Filter]":
    from saesteer.core.model import load_model
    from saesteer.core.writers import Cost, local_writer
    from saesteer.directions.pair_agreement import agrees
    from saesteer.directions.pair_writing import Filter, Writer

    loaded, tokenizer = load_model(model, device=device)
    cost, judging = Cost(), Cost()
    write = local_writer(
        loaded,
        tokenizer,
        max_new_tokens=drawing.max_tokens,
        temperature=drawing.temperature,
        seed=drawing.seed,
        cost=cost,
    )
    agreement = agrees(loaded, tokenizer, behaviour, cost=judging)
    return Writer(write, drawing.told(model), cost), Filter(agreement, model, judging)


def _judge(model: str, behaviour: str, device: str) -> "Filter":
    from saesteer.core.model import load_model
    from saesteer.core.writers import Cost
    from saesteer.directions.pair_agreement import agrees
    from saesteer.directions.pair_writing import Filter

    cost = Cost()
    loaded, tokenizer = load_model(model, device=device)
    return Filter(agrees(loaded, tokenizer, behaviour, cost=cost), model, cost)
