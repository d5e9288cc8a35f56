"""Marked texts: what is marked is what was edited, and the text stays what it was."""

import re

import pytest

from saesteer.steering import show
from saesteer.steering.record import TokenTrace
from tests.tiny import BOS, tiny_tokenizer

WORDS = ["the", "boy", "saw", "a", "ship"]


class Pieces:
    """A tokenizer of given pieces, joined as bytes; half a character is U+FFFD."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


class Tidy:
    """A tokenizer that puts no space before a full stop, as clean-up does."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(("It", "rained", ".", "He")[i] for i in ids).replace(" .", ".")


def row(*tokens: tuple[int, bool, float | None]) -> list[TokenTrace]:
    return [TokenTrace(i, edited, before, 9.0 if edited else None) for i, edited, before in tokens]


def test_a_stretch_of_edited_words_is_marked_once() -> None:
    tokenizer = Pieces(b"the", b" boy", b" saw", b" a", b" ship")
    trace = row((0, False, 0), (1, True, 0), (2, True, 0), (3, False, 0), (4, True, 0))
    assert show.terminal(trace, tokenizer) == "the «boy saw» a «ship»"
    assert show.terminal(trace[:4], tokenizer, last=4) == "the «boy saw» a ship"


def test_colour_underlines_what_was_edited_and_strong_readings_are_bold() -> None:
    tokenizer = Pieces(b"the", b" boy", b" saw")
    trace = row((0, False, 4.0), (1, True, 1.0), (2, True, 2.0))
    text = show.terminal(trace, tokenizer, colour=True)
    bold, line, plain = "\033[1m", "\033[4m", "\033[0m"
    assert text == f"{bold}the{plain} {line}boy {plain}{line}{bold}saw{plain}"
    # Against a top of 8 none of these is strong.
    assert bold not in show.terminal(trace, tokenizer, colour=True, top=9.0)


def test_bars_stand_beneath_their_words_and_lines_fit() -> None:
    tokenizer = Pieces(b"the", b" boy", b" saw", b" a", b" ship")
    trace = row((0, False, 8.0), (1, False, 0.0), (2, False, 4.0), (3, False, 0.01), (4, False, -3))
    text = show.terminal(trace, tokenizer, width=11)
    assert text.split("\n") == ["the boy saw", "███     ▄▄▄", "a ship", "▁"]
    assert show.terminal(trace, tokenizer, width=11, top=16.0).split("\n")[1] == "▄▄▄     ▂▂▂"


def test_a_character_of_several_tokens_is_whole_and_wide_ones_take_two_columns() -> None:
    first, second, third = "海".encode()[:1], "海".encode()[1:2], "海".encode()[2:]
    tokenizer = Pieces(first, second, third, b" sea")
    trace = row((0, False, 1.0), (1, True, 1.0), (2, True, 2.0), (3, False, 0.0))
    assert show.terminal(trace, tokenizer) == "«海» sea"
    assert show.terminal(trace, tokenizer, colour=True, width=20).endswith("██\033[0m")
    # A text that ends within a character says so, and loses nothing before it.
    assert show.terminal(trace[:2], tokenizer) == "«\ufffd»"


def test_a_decoder_that_takes_back_a_space_neither_loses_nor_doubles_text() -> None:
    trace = row((0, False, 0), (1, True, 0), (2, True, 0), (3, False, 0))
    assert show.terminal(trace, Tidy()) == "It «rained.» He"


@pytest.mark.parametrize("width", [1, 7, 20, 80])
def test_wrapping_keeps_every_word(width: int) -> None:
    text = "once upon a time\n\nthere was an extraordinarily long word and 海海海海 ."
    lines = show.wrapped(text, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert "" in lines
    wide = [len(x) + sum("\u4e00" < c < "\u9fff" for c in x) for x in lines]
    assert max(wide) <= max(width, 2)


def test_lines_are_filled_and_broken_at_spaces() -> None:
    assert show.wrapped("a boy saw the ship", 9) == ["a boy saw", "the ship"]
    assert show.wrapped("a boy  saw", 80) == ["a boy  saw"]
    assert show.wrapped("extraordinary", 5) == ["extra", "ordin", "ary"]
    assert show.wrapped("", 5) == [""]


def test_columns_stand_beside_one_another_whatever_codes_they_hold() -> None:
    text = show.columns(["\033[4mab\033[0m", "海"], ["x", "y", "z"], width=20)
    assert show.column_width(20) == 8
    plain = re.sub("\033\\[[0-9;]*m", "", text).split("\n")
    assert plain == ["  ab        x", "  海        y", " " * 12 + "z"]


def test_control_characters_and_markup_are_harmless() -> None:
    tokenizer = Pieces(b"\x1b[2J", b" <b>", b' "&')
    trace = row((0, False, 0), (1, True, 1.0), (2, False, 2.0))
    assert "\033" not in show.terminal(trace, tokenizer)
    page = show.html(trace, tokenizer)
    assert "<b>" not in page and "&lt;b&gt;" in page and "&quot;&amp;" in page
    assert show.clean("a\tb\nc\x07") == "a·b\nc·"


def test_html_underlines_shades_and_tells_the_readings() -> None:
    tokenizer = Pieces(b"the", b" boy", b" saw", b" ship")
    trace = row((0, False, None), (1, True, 1.0), (2, True, 2.0), (3, False, 0.0))
    page = show.html(trace, tokenizer)
    spans = re.findall(r'<span style="([^"]*)"(?: title="([^"]*)")?>([^<]*)</span>', page)
    assert [text for _, _, text in spans] == ["boy", " ", "saw"]
    assert "rgba(234,88,12,0.25)" in spans[0][0] and "rgba(234,88,12,0.50)" in spans[2][0]
    assert all("border-bottom" in style for style, _, _ in spans)
    assert spans[2][1] == "reads 2, set to 9"
    assert '<span title="reads 0">ship</span>' in page
    assert re.sub("<[^>]*>", "", page) == "the boy saw ship"
    assert "0.12" in show.html(trace, tokenizer, top=4.0)


def test_a_long_text_is_decoded_in_windows() -> None:
    sea = "海".encode()
    longest = []

    class Noting(Pieces):
        def decode(self, ids: list[int]) -> str:
            longest.append(len(ids))
            return super().decode(ids).lstrip()  # as SentencePiece does

    tokenizer = Noting(b" the", b" boy", sea[:1], sea[1:2], sea[2:])
    ids = [0, 1, 2, 3, 4] * 200
    trace = [TokenTrace(i, i == 1, 0.0, None) for i in ids]
    assert show.terminal(trace, tokenizer) == (" the «boy»海" * 200).lstrip()
    assert max(longest) < 200


def test_tokens_that_are_not_known_have_a_box() -> None:
    trace = [TokenTrace(None, True, None, None), TokenTrace(BOS, False, None, None)]
    assert show.terminal(trace, tiny_tokenizer()) == "«□»<bos>"
