"""The margin of an arm: its answers count as generated, whatever stands in one batch with them."""

from dataclasses import replace

import pytest
import torch

from saesteer.compare.prepared import Prepared, margins_of
from saesteer.core.points import HookPoint
from saesteer.directions.margin import margins
from saesteer.directions.pairs import Pair
from saesteer.directions.places import side_tokens
from saesteer.errors import NothingSteeredError, PairsError
from saesteer.steering.edits import Add
from saesteer.steering.engine import steer
from saesteer.steering.positions import Positions
from tests.tiny import WIDTH, tiny_model, tiny_tokenizer

MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()
POINT = HookPoint(1, "resid_post")
VECTOR = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
# Prompts of 3, 5, 3 and 1 tokens; the last answers have none that comes before another.
PAIRS = [
    Pair("the boy saw", " a cat and a dog", " rain and wind"),
    Pair("once upon a time there", " was music and a song", " fish sang ."),
    Pair("the girl heard", " a drum and a violin of gold", " anger"),
    Pair("moon", " star", " sand"),
]


def arm(where: Positions) -> Prepared:
    return Prepared("one", MODEL, edits=lambda s: [Add(VECTOR, s, POINT, where=where)])


def by_hand(spans):  # type: ignore[no-untyped-def]
    """Each pair by itself, the vector added at `spans(start)`, start being the answer's."""
    found = []
    for pair in PAIRS:
        start = side_tokens(TOKENIZER, pair.prompt, pair.chosen).start
        where = Positions(spans=(spans(start),))
        with torch.no_grad(), steer(MODEL, Add(VECTOR, 2.0, POINT, where=where)):
            found.append(margins(MODEL, TOKENIZER, [pair]))
    return torch.cat(found)


@torch.no_grad()
def test_an_edit_of_generated_tokens_is_made_to_the_answers_and_to_nothing_else():
    found = margins_of(arm(Positions(prompt=False)), TOKENIZER, PAIRS, 2.0)
    torch.testing.assert_close(found, by_hand(lambda start: (start, None)), atol=1e-5, rtol=1e-4)
    changed = (found - margins(MODEL, TOKENIZER, PAIRS)).abs()
    assert float(changed[:3].min()) > 1e-3
    # A lone token is predicted from the prompt, which such an edit leaves alone.
    assert float(changed[3]) < 1e-6


@torch.no_grad()
def test_an_edit_of_the_prompt_is_made_to_the_prompt_alone():
    found = margins_of(arm(Positions(generated=False)), TOKENIZER, PAIRS, 2.0)
    torch.testing.assert_close(found, by_hand(lambda start: (1, start)), atol=1e-5, rtol=1e-4)
    last = margins_of(arm(Positions(generated=False, last=1)), TOKENIZER, PAIRS, 2.0)
    torch.testing.assert_close(
        last, by_hand(lambda start: (start - 1, start)), atol=1e-5, rtol=1e-4
    )
    everywhere = margins_of(arm(Positions()), TOKENIZER, PAIRS, 2.0)
    torch.testing.assert_close(everywhere, by_hand(lambda _: (0, None)), atol=1e-5, rtol=1e-4)
    assert float((found - everywhere)[:3].abs().min()) > 1e-3


@torch.no_grad()
def test_a_strength_of_nothing_gives_the_margin_without_edits_to_the_bit():
    plain = margins_of(Prepared("none", MODEL), TOKENIZER, PAIRS)
    assert torch.equal(margins_of(arm(Positions(prompt=False)), TOKENIZER, PAIRS, 0.0), plain)
    torch.testing.assert_close(plain, margins(MODEL, TOKENIZER, PAIRS), atol=1e-5, rtol=1e-4)
    assert margins_of(Prepared("none", MODEL), TOKENIZER, []).shape == (0,)


def test_what_cannot_be_measured_is_refused_by_its_own_number():
    pairs = [*PAIRS[:2], replace(PAIRS[2], rejected="<eos>")]
    with pytest.raises(PairsError, match="pair 3: '<eos>' has no token to predict"):
        margins_of(Prepared("none", MODEL), TOKENIZER, pairs)
    with pytest.raises(NothingSteeredError, match="prompt tokens"):
        margins_of(arm(Positions(generated=False)), TOKENIZER, [replace(PAIRS[0], prompt="")])
