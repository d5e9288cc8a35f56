"""Contrast pairs written by a language model: checked, balanced, resumable, their cost counted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from saesteer.core.progress import progress
from saesteer.core.writers import Cost, Write
from saesteer.directions.pair_agreement import Agreement
from saesteer.directions.pair_asking import TOPICS, parsed, question
from saesteer.directions.pair_checks import leaks, stem, stems_of
from saesteer.directions.pair_record import Record, begun, hashed, keep
from saesteer.directions.pair_templates import as_choices
from saesteer.directions.pairs import ENOUGH, Pair
from saesteer.errors import PairsError


@dataclass(frozen=True)
class Writer:
    """Who writes, what it is called, and what it counts its cost into."""

    write: Write
    name: str
    cost: Cost


@dataclass(frozen=True)
class Filter:
    """Who judges the pairs, what it is called, and what it counts its cost into."""

    agreement: Agreement
    name: str
    cost: Cost


def write_new_pairs(
    path: str | Path,
    behaviour: str,
    writer: Writer,
    *,
    n: int = ENOUGH,
    choices: bool = False,
    topics: Sequence[str] = TOPICS,
    against: Sequence[Pair] = (),
    filter: Filter | None = None,
    seed: int = 0,
    batch_size: int = 16,
    tries: int = 8,
) -> tuple[tuple[Pair, ...], Record]:
    """Have n pairs written into a JSONL file, and go on with a file that was begun.

    No two have the same prompt. The pairs are kept after every batch, and beside them PATH with
    the suffix .cost.json (a `Record`). With the same settings and a writer that answers the same,
    the file is the same however often it was stopped.

    Args:
        behaviour: what the chosen answers show, in words.
        choices: A/B questions, half of them with the chosen answer as A.
        against: pairs of a test file; what asks the same as one of them is not kept.
        filter: pairs on which its agreement isn't above 0 are not kept; None keeps them all.
        seed: of the letters.
        tries: items that may be asked for a pair, on average, before it gives up.

    Raises:
        PairsError: no behaviour or topic, too few pairs after all tries, or the file is something
            else or was begun with other settings.
        RunError: it can't be written. ModelError: see the writer.
    """
    path = Path(path)
    if not behaviour.strip() or not topics or n < 1:
        raise PairsError("nothing to write: give a behaviour in words, a topic, and 1 pair or more")
    settings = {
        "behaviour": behaviour.strip(),
        "writer": writer.name,
        "choices": choices,
        "topics": list(topics),
        "against": hashed(against),
        "filtered_by": filter.name if filter else None,
        "seed": seed,
    }
    pairs, record = begun(path, settings)
    filtering = filter.cost if filter else Cost()
    # What was spent before this call, less what the counters hold already.
    spent = [_less(record.writing, writer.cost), _less(record.filtering, filtering)]
    stems = {stem(pair.prompt) for pair in pairs}
    test = stems_of(against)
    left = tries * max(0, n - len(pairs))
    with progress("pairs", n, unit="pair") as bar:
        bar.update(min(n, len(pairs)))
        while len(pairs) < n and left > 0:
            first, some = record.asked, min(batch_size, left, n - len(pairs))
            left -= some
            try:
                questions = [question(behaviour, first + i, topics) for i in range(some)]
                items = _written(writer.write, questions)
                reasons = _judged(items, stems, test, filter.agreement if filter else None)
                for item, reason in zip(items, reasons, strict=True):
                    record.asked += 1
                    if item is None or reason is not None:
                        record.dropped[reason or "malformed"] += 1
                    elif stem(item.prompt) in stems:
                        record.dropped["repeat"] += 1
                    else:
                        stems.add(stem(item.prompt))
                        place = len(pairs)
                        pairs += as_choices([item], seed=seed, first=place) if choices else [item]
                        bar.update(1)
            finally:
                record.writing = writer.cost.as_json(spent[0])
                record.filtering = filtering.as_json(spent[1])
                keep(path, pairs, record)
    if len(pairs) < n:
        why = ", ".join(f"{count} {reason}" for reason, count in record.dropped.items() if count)
        raise PairsError(
            f"{len(pairs)} of {n} pairs after {record.asked} items ({why}); what was kept is in "
            f"{path}. A stronger writer, other topics or a plainer behaviour would help; the same "
            "command tries on"
        )
    return tuple(pairs), record


def _written(write: Write, questions: Sequence[str]) -> list[Pair | None]:
    texts = write(questions)
    if len(texts) != len(questions):
        raise PairsError(
            f"the writer gave {len(texts)} texts for {len(questions)} prompts; expected one each"
        )
    return [parsed(text) for text in texts]


def _judged(
    items: Sequence[Pair | None],
    stems: set[str],
    test: frozenset[str],
    agreement: Agreement | None,
) -> list[str | None]:
    """Why each item is dropped, one of `DROPPED`; None where it is kept."""
    reasons: list[str | None] = []
    asked: dict[int, Pair] = {}
    for i, item in enumerate(items):
        if item is None:
            reasons.append("malformed")
        elif stem(item.prompt) in stems:
            reasons.append("repeat")
        elif leaks(item, test):
            reasons.append("overlap")
        else:
            reasons.append(None)
            asked[i] = item
    if agreement is not None and asked:
        for i, value in zip(asked, agreement(list(asked.values())), strict=True):
            if not value > 0:
                reasons[i] = "margin"
    return reasons


def _less(spent: Mapping[str, float], cost: Cost) -> dict[str, float]:
    return {name: value - cost.as_json()[name] for name, value in spent.items()}
