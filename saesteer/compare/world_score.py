"""The exact score of many edits at once."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.effects.damage import Reference, padded
from saesteer.effects.planted_score import Prompts
from saesteer.steering.edits import Add, Clamp, Edit
from saesteer.steering.engine import steer
from saesteer.world import corpus, exact, lexicon
from saesteer.world.grammar import BOS, PAD

_CLEAN_STORIES, _CONTEXT = 6, 128
_ROWS = 240  # prompts in one pass of the model


def edited_kl(
    model: PreTrainedModel, prompts: Prompts, edits: Sequence[Sequence[Edit]]
) -> NDArray[np.float64]:
    """KL(p*_do ‖ model) of every prompt under each list of edits, in nats: [lists, prompts]."""
    target = prompts.target
    found = [
        (torch.special.xlogy(target, target) - target * log_q).sum(-1).numpy()
        for log_q in _edited(model, prompts, edits)
    ]
    return np.concatenate(found)


def edited_log_p(
    model: PreTrainedModel, prompts: Prompts, edits: Sequence[Sequence[Edit]], words: Sequence[str]
) -> NDArray[np.float64]:
    """Log probability that the next word is one of `words`, by list of edits: [lists, prompts]."""
    ids = [exact.word_ids()[word] for word in words]
    found = []
    for log_q in _edited(model, prompts, edits):
        found.append(log_q[..., ids].logsumexp(-1).numpy())
    return np.concatenate(found)


@torch.no_grad()
def _edited(
    model: PreTrainedModel, prompts: Prompts, edits: Sequence[Sequence[Edit]]
) -> Iterator[Tensor]:
    """Log probabilities of the next word, [lists, prompts, vocabulary] float64, some at a time.

    Additions and clamps share passes of the model, a row its own; maps go one after the other.
    """
    n = len(prompts.ids)
    share = all(isinstance(edit, Add | Clamp) for some in edits for edit in some)
    at_once = max(1, _ROWS // n) if share else 1
    # A fifth of the time would go into logits that nobody reads.
    kept, at = (prompts.mask.sum(1) - 1).unique(return_inverse=True)
    for start in range(0, len(edits), at_once):
        some = edits[start : start + at_once]
        ids, mask = (x.repeat(len(some), 1).to(model.device) for x in (prompts.ids, prompts.mask))
        each = [list(one) for one in some for _ in range(n)] if share else list(some[0])
        with steer(model, each):
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                use_cache=False,
                logits_to_keep=kept.to(model.device),
            ).logits.cpu()
        ends = logits[torch.arange(len(ids)), at.repeat(len(some))].double()
        yield ends.log_softmax(-1).view(len(some), n, -1)


def prompts_in(concept: str, n: int, seed: int, *, dream: bool = False) -> Prompts:
    """`n` prompts with the concept off, and their exact answers, cut in a dream or outside one.

    A concept that changes nothing has no context in which it is on: its prompts are those of the
    other concepts in turn, in stories in which it is off, and stand for their own twins.
    """
    if concept in lexicon.causal():
        drawn = corpus.prompts(concept, n, seed, dream=dream)
        pairs = [(p.words, p.twin) for p in drawn]
    else:
        own = set(lexicon.CONCEPTS[lexicon.INDEX[concept]].words)
        pairs = []
        for i in itertools.count():
            other = lexicon.causal()[i % len(lexicon.causal())]
            words = corpus.prompts(other, 1, seed + 1000 * i, dream=dream)[0].words
            if not own & set(words):
                pairs.append((words, words))
            if len(pairs) == n:
                break
    ids = exact.word_ids()
    target = np.stack([exact.Reader(words).distribution(do=concept) for words, _ in pairs])
    on, twin = (
        padded([[ids[word] for word in pair[side]] for pair in pairs], ids[PAD]) for side in (0, 1)
    )
    return Prompts(*on, *twin, torch.from_numpy(target))


def clean_stories(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Reference:
    """Stories with concepts from the prior, on which what an edit costs is measured."""
    ids = exact.word_ids()
    told = corpus.stories(_CLEAN_STORIES, seed=seed + 20_000)
    rows = [[ids[BOS], *(ids[word] for word in story.words)][:_CONTEXT] for story in told]
    return Reference(model, tokenizer, rows, batch_size=_CLEAN_STORIES)
