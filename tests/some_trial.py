"""For tests of the protocol: a small behaviour on a tiny model, ready to be compared."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from saesteer.compare.evaluate import Bench
from saesteer.compare.problem import Affordances, Behaviour, Primary, Problem, Splits
from saesteer.compare.problem_file import to_dict
from saesteer.compare.splits import Split, split
from saesteer.compare.store import Store
from saesteer.compare.trial import Trial
from saesteer.directions.pairs import write_pairs
from tests.some_material import an_index
from tests.some_pairs import tiny_pairs
from tests.tiny import tiny_model, tiny_sae, tiny_tokenizer

TEXTS = [
    "once upon a time there was a boy and a girl in the old house .",
    "the king and the queen walked to the sea in the rain .",
    "the dog ate bread and soup with salt , then slept on the road .",
    "a bird sang a song over the river and the moon was big .",
]
ARMS = ("mean-difference", "sae-clamp", "sae-search")


def a_problem(**changes: Any) -> Problem:
    given = {
        "behaviours": (Behaviour("sea", pairs="pairs.jsonl", query="word", words=("sea",)),),
        "affordances": Affordances(description=True),
        "deployment": "completion",
        "delta_ce": 0.25,
        "splits": Splits(0.5, 0.2, 0.3, most_validation=6, most_test=6),
        "primary": Primary(("sae-clamp vs mean-difference",), 0.1),
        "n": (32,),
        "headline_n": 32,
        "strengths": 2,
        "layers": ("layers.0.resid_post", "layers.1.resid_post"),
        "arms": ARMS,
    }
    return Problem(**(given | changes))


def a_split(folder: Path, problem: Problem) -> Split:
    path = folder / "pairs.jsonl"
    write_pairs(path, tiny_pairs(96))
    behaviour = replace(problem.behaviours[0], pairs=str(path))
    return split(behaviour, problem.splits, seed=0, tokenizer=tiny_tokenizer())


def a_bench(problem: Problem) -> Bench:
    return Bench(tiny_model(), tiny_tokenizer(), TEXTS, positions=problem.positions)


def a_trial(folder: Path, problem: Problem, *, store: str = "store", **more: Any) -> Trial:
    sae = tiny_sae()
    figures = {feature: {"max_act": 20.0} for feature in range(64)}
    index = an_index(folder, sae, figures=figures) if "index" not in more else more["index"]
    given = {
        "split": a_split(folder, problem),
        "bench": a_bench(problem),
        "sae": sae,
        "index": index,
        "budget": 4,
    } | more
    kept = Store(folder / store, to_dict(problem), folder / f"{store}-looks.json", "data")
    return Trial(problem, problem.behaviours[0], store=kept, **given)
