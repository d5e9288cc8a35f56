"""What an arm of a comparison is given, and what it gives back.

An arm is a function of a `Material`, and options of its own, to a `Prepared`. Whatever an arm
chooses, it chooses on the pairs, or on the validation pairs with at most `budget` looks at them;
the pairs that it is tested on it never sees.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.core.sae import Sae
from saesteer.directions.answers import side_tokens
from saesteer.directions.fitting import swapped
from saesteer.directions.margin import answers_of, margins
from saesteer.directions.pairs import Pair
from saesteer.effects.calibrate import EditsAt
from saesteer.errors import IndexingError, PairsError, SaeError
from saesteer.features.search import Index
from saesteer.steering.edits import Edit
from saesteer.steering.engine import steer

PromptTransform = Callable[[str], str]
"""From the prompt of a pair to what the model is given in its place."""


@dataclass(frozen=True, eq=False)
class Material:
    """What every arm of a comparison may use: the same for all of them.

    Attributes:
        pairs: to fit on, to choose features by, to show as examples, to train on.
        validation: pairs to choose settings on; an arm that has nothing to choose needs none.
        sae, index: for the arms of features, the index made with this SAE.
        seed: of everything drawn.
        budget: how many settings an arm may try on the validation pairs, at the most.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pairs: Sequence[Pair]
    validation: Sequence[Pair] = ()
    sae: Sae | None = None
    index: Index | None = None
    seed: int = 0
    budget: int = 14

    def __post_init__(self) -> None:
        if not self.pairs:
            raise PairsError("no contrast pairs; expected at least one, 128 are a good number")
        if self.budget < 1:
            raise PairsError(f"a budget of {self.budget} settings: an arm needs 1 at least")

    def features(self) -> tuple[Sae, Index]:
        """The SAE and its index.

        Raises:
            SaeError: no SAE. IndexingError: no index, or one of another SAE.
        """
        if self.sae is None:
            raise SaeError("this arm steers with features, and no SAE was given: give one")
        if self.index is None:
            raise IndexingError(
                "this arm needs each feature's max_act and density: give the index of the SAE, as "
                "`saesteer index` makes it"
            )
        made_with = self.index.meta.get("sae_hash")
        if made_with != self.sae.hash:
            raise IndexingError(
                f"the index was made for another SAE ({made_with}) than the one given "
                f"({self.sae.hash}); run `saesteer index` again"
            )
        return self.sae, self.index

    def need_validation(self, arm: str) -> None:
        """PairsError where there are no validation pairs, which this arm chooses by."""
        if not self.validation:
            raise PairsError(
                f"the arm {arm!r} chooses among settings on validation pairs, and there are none: "
                "give some that are neither among the pairs nor tested on"
            )


def noisy(material: Material, share: float) -> Material:
    """The material with the sides of that share of its pairs swapped, drawn by its seed.

    Weak supervision: any arm can be made ready from it, on the pairs that `fit_method` swaps with
    the same `noise` and seed. Validation pairs stay as they are.

    Raises:
        ConfigError: the share isn't from 0 to 1.
    """
    swaps = swapped(len(material.pairs), share, material.seed).tolist()
    pairs = [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen) if swap else pair
        for pair, swap in zip(material.pairs, swaps, strict=True)
    ]
    return replace(material, pairs=pairs)


def as_it_is(prompt: str) -> str:
    """The prompt transform of an arm that leaves prompts alone."""
    return prompt


def no_edits(strength: float) -> list[Edit]:
    """The edits of an arm that makes none."""
    return []


@dataclass(frozen=True, eq=False)
class Prepared:
    """An arm made ready: a model, what becomes of a prompt, and the edits at a strength.

    Attributes:
        arm: its name.
        model: the model to run, the material's own but for arms that train.
        prompt_transform: what the model is given in place of a prompt.
        edits: the edits at a strength, in the arm's own unit; an arm without any gives [] at
            every strength. A strength of 0 need not be "no edit": a clamp to 0 is ablation.
        notes: what was chosen and what it took; JSON. "validation_looks" counts the settings
            tried on the validation pairs.
    """

    arm: str
    model: PreTrainedModel
    prompt_transform: PromptTransform = as_it_is
    edits: EditsAt = no_edits
    notes: Mapping[str, Any] = field(default_factory=dict)


@torch.no_grad()
def margins_of(
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    strength: float = 1.0,
) -> Tensor:
    """The margin of each pair under an arm, [n] float32; see `directions.margin`.

    The answers count as generated, so that edits for generated tokens are made to them alone, and
    edits for the prompt to the prompt alone, as where the model itself writes.

    Raises:
        PairsError: an answer that has no token to predict. SteeringError: edits that can't be
            made; NothingSteeredError: one that is for no token of some pair.
    """
    seen = [replace(pair, prompt=prepared.prompt_transform(pair.prompt)) for pair in pairs]
    check_room(prepared, tokenizer, seen)
    edits = list(prepared.edits(strength))
    # Where the answers begin is one column for a whole pass, so prompts of one length go together;
    # without edits too, so that a strength that does nothing gives the same to the bit.
    alike: dict[int, list[int]] = {}
    for i, chosen in enumerate(answers_of(prepared.model, tokenizer, seen)[::2]):
        alike.setdefault(chosen.start, []).append(i)
    found = torch.zeros(len(seen))
    for length, rows in alike.items():
        with (
            steer(prepared.model, edits, tokenizer=tokenizer, prompt_length=length)
            if edits
            else nullcontext()
        ):
            found[rows] = margins(prepared.model, tokenizer, [seen[i] for i in rows])
    return found


def validation_margin(prepared: Prepared, material: Material, strength: float = 1.0) -> float:
    """The mean margin on the material's validation pairs, which an arm chooses by.

    Raises:
        PairsError: there are none.
    """
    material.need_validation(prepared.arm)
    return float(margins_of(prepared, material.tokenizer, material.validation, strength).mean())


def check_room(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]
) -> None:
    """Refuse prompts that an arm has made longer than the model's contexts."""
    room = getattr(prepared.model.config, "max_position_embeddings", None)
    for i, pair in enumerate(pairs, 1):
        longest = max(
            len(side_tokens(tokenizer, pair.prompt, answer).ids)
            for answer in (pair.chosen, pair.rejected)
        )
        if room is not None and longest > room:
            raise PairsError(
                f"pair {i}: {longest} tokens under the arm {prepared.arm!r}, but the model's "
                f"contexts hold {room}; give fewer examples or a shorter prompt"
            )
