"""Files, data sets and chats that hold contrast pairs."""

import json
from pathlib import Path

import pytest

from saesteer.directions.pairs import Pair, as_chat, parse_pairs, read_pairs
from saesteer.errors import PairsError
from tests.tiny import tiny_tokenizer

MANY = [Pair(f"Prompt {i}:", f" yes {i}", f" no {i}") for i in range(40)]
ROWS = [vars(pair) for pair in MANY]


def put(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def only(path: Path, tokenizer: object = None) -> Pair:
    ((_, pair),) = parse_pairs(path, tokenizer)
    return pair


def chat(**said: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in said.items()]


def test_a_json_array_lines_and_parquet_are_the_same(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.json").write_text(f"\ufeff\n{json.dumps(ROWS, indent=2)}", encoding="utf-8")
    put(tmp_path / "l.json", *ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    for name in ("a.json", "l.json", "p.parquet"):
        assert read_pairs(tmp_path / name) == tuple(MANY), name


def test_a_data_set_is_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    seen = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        seen.append((name, config, split))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_pairs("someone/pairs:en", split="test") == tuple(MANY)
    assert read_pairs("bare") == tuple(MANY)
    assert seen == [("someone/pairs", "en", "test"), ("bare", None, "train")]


def test_what_is_neither_a_file_nor_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="no file here, and can't be read as a data set"):
        read_pairs("nobody/has-this")
    put(tmp_path / "pairs.jsonl", *ROWS)
    with pytest.raises(PairsError, match=r"did you mean 'pairs\.jsonl'"):
        read_pairs(tmp_path / "pair.jsonl")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(PairsError, match="can't be read as parquet"):
        read_pairs(tmp_path / "bad.parquet")
    (tmp_path / "list.json").write_text('["a text", "another"]')
    with pytest.raises(PairsError, match="item 1: a JSON str"):
        read_pairs(tmp_path / "list.json")
    (tmp_path / "cut.json").write_text('[{"prompt": "a"')
    with pytest.raises(PairsError, match=r"cut\.json: no JSON"):
        read_pairs(tmp_path / "cut.json")


def test_a_question_and_its_letter_do_not_touch(tmp_path: Path) -> None:
    def ab(question: str, a: str, b: str) -> Pair:
        keys = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
        return only(put(tmp_path / "p.json", dict(zip(keys, (question, a, b), strict=True))))

    assert ab("Yes?\n (A) Yes\n (B) No", "(B)", "(A)") == Pair(
        "Yes?\n (A) Yes\n (B) No", " (B)", " (A)"
    )
    assert ab("q\n", "(B)", "(A)") == Pair("q\n", "(B)", "(A)")
    assert ab("q", " Yes", " No") == Pair("q", " Yes", " No")
    # What is written as prompt, chosen and rejected stays as it is.
    plain = Pair("q", "(A)", "(B)")
    assert only(put(tmp_path / "q.json", vars(plain))) == plain


def test_chats_are_written_by_the_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "<bos>{% for m in messages %}<{{ m.role }}> {{ m.content | trim }} <eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ask = chat(system="be calm", user="is the sea old")
    yes, no = chat(assistant="yes it is "), chat(assistant="no")
    expected = Pair(
        "<bos><system> be calm <eos>\n<user> is the sea old <eos>\n<assistant>", " yes it is", " no"
    )
    forms = [
        {"prompt": ask, "chosen": yes, "rejected": no},
        {"chosen": ask + yes, "rejected": ask + no},
        {"prompt": ask, "chosen": ask + yes, "rejected": ask + no},
    ]
    for i, form in enumerate(forms):
        assert only(put(tmp_path / f"{i}.jsonl", form), tokenizer) == expected
    plain = {"prompt": "is the sea old", "chosen": ask[1:] + yes, "rejected": ask[1:] + no}
    pair = only(put(tmp_path / "plain.jsonl", plain), tokenizer)
    assert pair == Pair("<bos><user> is the sea old <eos>\n<assistant>", " yes it is", " no")
    assert as_chat([Pair("is the sea old", " yes it is", "no")], tokenizer) == (pair,)


def test_chats_that_cannot_be_written(tmp_path: Path) -> None:
    ask, yes, no = chat(user="q"), chat(assistant="yes"), chat(assistant="no")
    tokenizer = tiny_tokenizer()
    path = put(tmp_path / "c.jsonl", {"prompt": ask, "chosen": yes, "rejected": no})
    for given in (None, tokenizer):
        with pytest.raises(PairsError, match="line 1: chat messages need a tokenizer"):
            read_pairs(path, given)
    # A template that writes what is behind it before it.
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(PairsError, match="writes the prompt otherwise"):
        read_pairs(path, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no roles') }}"
    with pytest.raises(PairsError, match="refuses these messages"):
        read_pairs(path, tokenizer)
    for rejected in ("no", [{"role": "assistant"}], None):
        row = {"prompt": ask, "chosen": yes, "rejected": rejected}
        with pytest.raises(PairsError, match="'rejected' is no list of chat messages"):
            read_pairs(put(tmp_path / "r.jsonl", row), tokenizer)
    with pytest.raises(PairsError, match="share no message"):
        read_pairs(put(tmp_path / "s.jsonl", {"chosen": yes, "rejected": no}), tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    same = {"prompt": ask, "chosen": yes, "rejected": yes}
    with pytest.raises(PairsError, match="line 1: 'chosen' and 'rejected' are the same"):
        read_pairs(put(tmp_path / "t.jsonl", same), tokenizer)
