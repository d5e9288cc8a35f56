"""What the model writes under an arm, and how it scores: concept × relevance × fluency.

Every arm continues the same prompts at the same temperature and length, and a prompt draws the same
noise under every arm. The unsteered texts are written once; they fix the scales of the scorers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from saesteer.compare import metrics
from saesteer.compare.evaluate import Bench
from saesteer.compare.prepared import Prepared
from saesteer.compare.problem import Behaviour
from saesteer.compare.scorers import Axis, Scorer
from saesteer.compare.splits import Item
from saesteer.compare.statistics import bootstrap
from saesteer.compare.texts import Text
from saesteer.core.generate import Written, write
from saesteer.core.model import special_token_ids
from saesteer.effects.damage import distinct_n, repetition
from saesteer.errors import NothingSteeredError, TextError
from saesteer.steering.edits import Edit
from saesteer.steering.engine import steer

AXES: tuple[Axis, ...] = get_args(Axis)
_BATCH = 32


@dataclass(frozen=True, eq=False)
class Baseline:
    """What the unsteered model writes, and how every arm is to write beside it.

    Attributes:
        texts: a text for each prompt.
        seeds: of each prompt. temperature: 0 is greedy.
    """

    bench: Bench
    texts: tuple[Text, ...]
    seeds: tuple[int, ...]
    max_new_tokens: int
    temperature: float

    @property
    def prompts(self) -> list[str]:
        """The prompts, as the problem gives them."""
        return [one.prompt for one in self.texts]


@dataclass(frozen=True)
class Generated:
    """What an arm wrote to each prompt, as plain lists: `asdict` is JSON, `Generated(**it)` is it.

    Attributes:
        prompts, texts, tokens: as in `texts.Text`, in the order of the baseline.
        scores: by scorer, 0–2 for each text.
        axes: of each axis the mean of its scorers; an axis that no scorer is for is missing.
        harmonic: of the three axes, where all are there.
        distinct_2, repetition: of all texts, see `damage`; None where they are too short.
    """

    arm: str
    strength: float
    prompts: list[str]
    texts: list[str]
    tokens: list[list[int]]
    scores: dict[str, list[float]]
    axes: dict[str, list[float]]
    harmonic: list[float] | None
    distinct_2: float | None
    repetition: float | None

    @property
    def written(self) -> list[Text]:
        """The texts as scorers and judges take them."""
        each = zip(self.prompts, self.texts, self.tokens, strict=True)
        return [Text(prompt, text, tuple(tokens)) for prompt, text, tokens in each]

    def lines(self) -> Iterator[dict[str, Any]]:
        """A record for each text, for a file of JSON lines."""
        for i, (prompt, text) in enumerate(zip(self.prompts, self.texts, strict=True)):
            scores = {name: values[i] for name, values in self.scores.items()}
            harmonic = None if self.harmonic is None else self.harmonic[i]
            yield {
                "arm": self.arm,
                "strength": self.strength,
                "prompt": prompt,
                "text": text,
                "tokens": len(self.tokens[i]),
                "scores": scores,
                "harmonic": harmonic,
            }

    def summary(self, *, seed: int = 0) -> dict[str, Any]:
        """Means over prompts with their intervals, as report.json's "generation" has them.

        "empty" counts texts that ended at once, which score 0.
        """
        values = {**self.axes, "harmonic": self.harmonic}
        estimates = {
            name: asdict(bootstrap(found, seed=seed)) if (found := values.get(name)) else None
            for name in (*AXES, "harmonic")
        }
        return {
            **estimates,
            "distinct_2": self.distinct_2,
            "repetition": self.repetition,
            "texts": len(self.texts),
            "empty": sum(not tokens for tokens in self.tokens),
        }


def prompts_for(behaviour: Behaviour, test: Sequence[Item], *, most: int = 64) -> list[str]:
    """The prompts to continue: of the behaviour's file, or else of test items; each once.

    Raises:
        TextError: the file can't be read, or there is no prompt.
    """
    if behaviour.prompts:
        try:
            lines = Path(behaviour.prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(
                f"{behaviour.prompts} can't be read ({error}); [[behaviour]] prompts names a text "
                "file, a prompt a line"
            ) from error
    else:
        lines = [item.pair.prompt for item in test]
    found = list(dict.fromkeys(line for line in lines if line.strip()))[:most]
    if not found:
        raise TextError(
            f"behaviour {behaviour.name!r} has no prompts to continue; give a file of them "
            "(prompts = ...), a prompt a line"
        )
    return found


def baseline(
    bench: Bench,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
) -> Baseline:
    """Continue the prompts without any edit. The n-th prompt's seed depends on n and `seed` alone.

    Raises:
        TextError: no prompts, or one that leaves no room for the new tokens.
    """
    seeds = tuple(
        int(np.random.SeedSequence([seed, 17, i]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        for i in range(len(prompts))
    )
    unsteered = Prepared("none", bench.model)
    texts = _texts(bench, unsteered, prompts, [], seeds, max_new_tokens, temperature)
    return Baseline(bench, tuple(texts), seeds, max_new_tokens, temperature)


def generate_and_score(
    baseline: Baseline, prepared: Prepared, strength: float, scorers: Mapping[str, Scorer]
) -> Generated:
    """Continue the baseline's prompts under an arm at a strength, and score what it wrote.

    The arm's own model writes, to the prompts as the arm transforms them, with the edits on the
    tokens that the problem steers. An arm that changes nothing writes the baseline's texts.

    Raises:
        TextError: a transformed prompt leaves no room for the new tokens.
        SteeringError: the edits can't be made, or the logits are NaN.
    """
    bench = baseline.bench
    texts = _texts(
        bench,
        prepared,
        baseline.prompts,
        bench.edits(prepared, strength),
        baseline.seeds,
        baseline.max_new_tokens,
        baseline.temperature,
    )
    scores = {name: scorer.score(texts) for name, scorer in scorers.items()}
    axes: dict[str, list[float]] = {
        axis: np.mean(same, axis=0).tolist()
        for axis in AXES
        if (same := [scores[name] for name, scorer in scorers.items() if scorer.axis == axis])
    }
    harmonic = metrics.harmonic(*axes.values()).tolist() if len(axes) == len(AXES) else None
    ids = [one.tokens for one in texts]
    return Generated(
        prepared.arm,
        strength,
        baseline.prompts,
        [one.text for one in texts],
        [list(tokens) for tokens in ids],
        scores,
        axes,
        harmonic,
        distinct_n(ids, 2),
        repetition(ids),
    )


def _texts(
    bench: Bench,
    prepared: Prepared,
    prompts: Sequence[str],
    edits: Sequence[Edit],
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float,
) -> list[Text]:
    """What is written to each prompt, a batch at a time; no text depends on its batch."""
    if not prompts:
        raise TextError("no prompts to continue; give one at least")
    model, tokenizer = prepared.model, bench.tokenizer
    special = special_token_ids(model, tokenizer)
    found = []
    for first in range(0, len(prompts), _BATCH):
        some = prompts[first : first + _BATCH]
        written: list[Written] = []
        try:
            with steer(model, edits, tokenizer=tokenizer) if edits else nullcontext():
                written = write(
                    model,
                    tokenizer,
                    [prepared.prompt_transform(prompt) for prompt in some],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=seeds[first : first + _BATCH],
                )
        except NothingSteeredError:
            # A text that ends at once has no token that an edit of written tokens could act on.
            if all(len(one.new) > 1 for one in written):
                raise
        for prompt, one in zip(some, written, strict=True):
            found.append(Text(prompt, one.reply, tuple(i for i in one.new if i not in special)))
    return found
