"""Reading and writing contrast pairs."""

import json
import warnings
from pathlib import Path

import pytest

from saesteer.directions.pairs import Pair, read_pairs, warn_if_few, write_pairs
from saesteer.errors import PairsError, SaesteerError

MANY = [Pair(f"Prompt {i}:", f" yes {i}", f" no {i}") for i in range(40)]


def lines(*values: object) -> str:
    return "\n".join(v if isinstance(v, str) else json.dumps(v) for v in values)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    odd = [Pair("", " a\nb\u2028c", ' "q" \\ é🙂'), Pair("p", "\tx", "y ")]
    write_pairs(tmp_path / "pairs.jsonl", MANY + odd)
    assert read_pairs(tmp_path / "pairs.jsonl") == (*MANY, *odd)


def test_other_keys_blank_lines_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [dict(vars(pair), id=i) for i, pair in enumerate(MANY)]
    path.write_text("\ufeff\n" + lines(*rows, "", "  ") + "\n\n", encoding="utf-8")
    assert read_pairs(path) == tuple(MANY)


def test_the_keys_of_the_ab_data_sets_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {
            "question": f"q{i}",
            "answer_matching_behavior": " (A)",
            "answer_not_matching_behavior": " (B)",
        }
        for i in range(32)
    ]
    path.write_text(lines(*rows))
    assert read_pairs(path)[3] == Pair("q3", " (A)", " (B)")


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines(GOOD, "{broken"), "line 2: no JSON"),
        (lines(GOOD, "", "[1, 2]"), "line 3: a JSON list"),
        (lines({"prompt": "p", "chosen": "a"}), "line 1: 'rejected' is missing"),
        (lines({"prompt": "p", "choosen": "a", "rejected": "b"}), "did you mean 'choosen'"),
        (lines({**GOOD, "chosen": 3}), "line 1: 'chosen' is a int, expected a string"),
        (lines({**GOOD, "prompt": [{"role": "user"}]}), "'prompt' is a list"),
        (lines({**GOOD, "rejected": " \n"}), "line 1: 'rejected' is empty"),
        (lines({**GOOD, "rejected": "a"}), "are the same"),
        ("[" * 100_000, "line 1: no JSON"),
        ("", "is empty"),
        ("\n \n", "is empty"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(PairsError, match=message) as raised:
        read_pairs(path)
    assert "\n" not in str(raised.value)
    assert "pairs.jsonl" in str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="there is no file of pairs"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(PairsError, match="can't be read"):
        read_pairs(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(PairsError, match="UTF-8"):
        read_pairs(tmp_path / "latin.jsonl")


def test_repeats_are_counted_warned_of_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, MANY + MANY[:3])
    with pytest.warns(UserWarning, match="3 of 43 pairs are repeats"):
        assert read_pairs(path) == tuple(MANY)


def test_few_pairs_are_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, MANY[:31])
    with pytest.warns(UserWarning, match="31 contrast pairs: under 32"):
        assert len(read_pairs(path)) == 31
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_few(32)


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SaesteerError, match="cannot write"):
        write_pairs(tmp_path, MANY)
