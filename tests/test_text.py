"""Reading documents, packing them into contexts, and telling sources apart."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.errors import TextError
from saesteer.training import packing as packing_module
from saesteer.training import text as reading
from saesteer.training.packing import pack
from saesteer.training.text import SEPARATOR, documents, fingerprint
from tests.tiny import BOS, EOS, tiny_tokenizer

STORIES = [
    "the boy walked to the sea .",
    "a girl liked music .",
    "once upon a time there was rain .",
]


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def parquet(path: Path, **columns: list) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def jsonl(path: Path, rows: list[object]) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def says(source: str, *words: str, **options: str) -> None:
    """Reading `source` fails with one line that holds each of `words`."""
    with pytest.raises(TextError) as failure:
        list(documents(source, **options))
    message = str(failure.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# --- reading -------------------------------------------------------------------------------------


def test_txt_is_split_stripped_and_blank_documents_are_dropped(tmp_path):
    source = write(tmp_path / "a.txt", f"\n one \n{SEPARATOR}  \n {SEPARATOR}two\nlines{SEPARATOR}")
    assert list(documents(source)) == ["one", "two\nlines"]


def test_other_and_no_separators(tmp_path):
    source = write(tmp_path / "a.txt", "one\r\n\r\ntwo\r\n\r\n\r\n\r\nthree")
    assert list(documents(source, separator="\n\n")) == ["one", "two", "three"]
    assert list(documents(source, separator="\r\n\r\n")) == ["one", "two", "three"]
    assert list(documents(source, separator="")) == ["one\n\ntwo\n\n\n\nthree"]


@pytest.mark.parametrize("read_bytes", range(1, 40))
def test_separators_characters_and_line_ends_across_reads(tmp_path, monkeypatch, read_bytes):
    monkeypatch.setattr(reading, "_READ_BYTES", read_bytes)
    body = f"\ufeffcafé 🌊<|end{SEPARATOR}שלום\r\nעולם\rx{SEPARATOR}{SEPARATOR}<|endoftext|"
    source = write(tmp_path / "a.txt", body)
    assert list(documents(source)) == ["café 🌊<|end", "שלום\nעולם\nx", "<|endoftext|"]


@settings(deadline=None)
@given(
    st.lists(st.text("ab\n", max_size=6), max_size=12),
    st.text("ab\n", max_size=4),
)
def test_splitting_in_pieces_equals_splitting_the_whole(chunks, separator):
    whole = "".join(chunks)
    expected = whole.split(separator) if separator else [whole]
    assert list(reading._split_stream(chunks, separator)) == expected


def test_unusual_text_comes_through(tmp_path):
    long_line = "sea " * 2_500_000  # 10 MB without a line end
    texts = [long_line.strip(), "nul \0 inside", "👩‍👩‍👧 🌊", "مرحبا بالعالم", "line\r\nend"]
    source = write(tmp_path / "a.txt", "\ufeff" + SEPARATOR.join(texts))
    assert list(documents(source)) == [*texts[:-1], "line\nend"]
    # In tables the text is data, so its line ends stay.
    assert list(documents(jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts]))) == texts
    assert list(documents(parquet(tmp_path / "a.parquet", text=texts))) == texts


def test_jsonl_with_bom_crlf_blank_lines_and_a_separator_inside(tmp_path):
    source = write(
        tmp_path / "a.jsonl",
        '\ufeff{"text": "one", "id": 1}\r\n\r\n{"text": "two<|endoftext|>three \u2028 x"}',
    )
    assert list(documents(source)) == ["one", "two", "three \u2028 x"]


def test_parquet_column_and_many_batches(tmp_path):
    texts = [f"story {i}" for i in range(1000)]
    source = parquet(tmp_path / "a.parquet", id=list(range(1000)), story=texts)
    assert list(documents(source, column="story")) == texts


def test_folder_is_read_recursively_in_sorted_order_without_hidden_files(tmp_path):
    write(tmp_path / "b" / "z.txt", "third")
    jsonl(tmp_path / "b" / "a.jsonl", [{"text": "second"}])
    parquet(tmp_path / "c.parquet", text=["fourth"])
    write(tmp_path / "a.TXT", "first")
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "notes.csv", "not,read")
    write(tmp_path / ".cache" / "x.txt", "hidden")
    assert list(documents(str(tmp_path))) == ["first", "second", "third", "fourth"]


def test_reading_is_lazy(tmp_path):
    source = write(tmp_path / "a.txt", b"one<|endoftext|>" + b"x" * (3 << 20) + b"\xff")
    assert next(documents(source)) == "one"


# --- bad input -----------------------------------------------------------------------------------


def test_missing_source_is_refused_at_once_with_a_suggestion(tmp_path):
    write(tmp_path / "stories.txt", "x")
    with pytest.raises(TextError, match=r"no such file.*did you mean 'stories\.txt'.*\.jsonl"):
        documents(str(tmp_path / "storys.txt"))
    with pytest.raises(TextError, match="no such file"):
        documents("nowhere.txt")
    with pytest.raises(TextError, match="no such file"):
        documents("./nowhere")
    with pytest.raises(TextError, match="source is empty"):
        documents("  ")
    with pytest.raises(TextError, match="no such file"):
        documents("a\0b")


@pytest.mark.parametrize("content", ["", " \n\t ", SEPARATOR * 3, "\ufeff"])
def test_file_without_text(tmp_path, content):
    says(write(tmp_path / "a.txt", content), "a.txt", "holds no text")


def test_tables_without_text(tmp_path):
    says(write(tmp_path / "a.jsonl", "\n\n"), "holds no text")
    says(parquet(tmp_path / "a.parquet", text=pa.array([], pa.string())), "holds no text")


def test_folder_without_text_files(tmp_path):
    write(tmp_path / "notes.csv", "a,b")
    says(str(tmp_path), "holds no .txt")


def test_file_of_another_kind(tmp_path):
    says(write(tmp_path / "a.csv", "a,b"), ".csv", "convert it")


@pytest.mark.parametrize("read_bytes", [1, 2, 3, 1000])
@pytest.mark.parametrize(
    ("content", "offset"),
    [(b"abc\xff def", 3), ("é🌊".encode() + b"\xe2\x28", 6), (b"abc\xf0\x9f", 3), (b"\xc0", 0)],
)
def test_invalid_utf8_names_file_and_byte(tmp_path, monkeypatch, read_bytes, content, offset):
    monkeypatch.setattr(reading, "_READ_BYTES", read_bytes)
    says(write(tmp_path / "bad.txt", content), "bad.txt", f"at byte {offset};", "iconv -f LATIN1")


def test_invalid_utf8_in_jsonl_and_utf16(tmp_path):
    first = b'{"text": "fine"}\n'
    source = write(tmp_path / "bad.jsonl", first + b'{"text": "\xe9"}\n')
    says(source, "bad.jsonl", f"at byte {len(first) + 10};", "UTF-8")
    says(write(tmp_path / "wide.txt", "hello".encode("utf-16")), "byte 0;", "iconv -f UTF-16")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "cut', ["not valid JSON"]),
        ("[" * 100_000, ["not valid JSON"]),
        ('["a", "b"]', ["JSON list", "expected an object"]),
        ('"just text"', ["JSON str", "expected an object"]),
        ('{"txt": "a", "id": 3}', ["no column 'text'", "did you mean 'txt'", "columns: txt, id"]),
        ('{"text": null}', ["'text' holds NoneType"]),
        ('{"text": 7}', ["'text' holds int"]),
        ('{"text": "half \\ud83c"}', ["not valid Unicode"]),
    ],
)
def test_bad_jsonl_line_is_named(tmp_path, line, words):
    source = write(tmp_path / "a.jsonl", f'{{"text": "fine"}}\n\n{line}\n')
    says(source, "a.jsonl', line 3", *words)


def test_bad_parquet(tmp_path):
    source = parquet(tmp_path / "a.parquet", story=["x"], id=[1])
    says(source, "no column 'storey'", "did you mean 'story'", "story, id", column="storey")
    says(source, "row 1", "'id' holds int", column="id")
    says(parquet(tmp_path / "b.parquet", text=["x", None]), "row 2", "NoneType")
    says(write(tmp_path / "c.parquet", "not parquet at all"), "c.parquet", "as parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    says(write(tmp_path / "d.parquet", whole[:-20]), "d.parquet", "can't be read")


def test_unreadable_file(tmp_path, monkeypatch):
    source = write(tmp_path / "a.txt", "text")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    says(source, "a.txt", "Permission denied")
    with pytest.raises(TextError, match="Permission denied"):
        fingerprint(source)


# --- data sets -----------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """`datasets.load_dataset` served from memory; returns the list of its calls."""
    import datasets

    calls = []

    def load(name: str, config: str | None, *, split: str, streaming: bool):
        calls.append((name, config, split, streaming))
        if split != "train":
            raise ValueError(f"Bad split: {split}.\nAvailable splits: ['train']")
        rows = {"text": ["one", f"two{SEPARATOR}three", "four"], "id": [1, 2, 3]}
        return datasets.Dataset.from_dict(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_dataset_is_streamed_with_its_configuration(hub):
    assert list(documents("some/stories:plain")) == ["one", "two", "three", "four"]
    assert list(documents("stories")) == ["one", "two", "three", "four"]
    assert hub == [("some/stories", "plain", "train", True), ("stories", None, "train", True)]


def test_dataset_errors_are_one_line_and_name_the_local_way(hub):
    says("some/stories", "some/stories", "Bad split: test", "split='test'", ".jsonl", split="test")
    says("some/stories", "no column 'txt'", "did you mean 'text'", "text, id", column="txt")
    says("some/stories", "row 1", "'id' holds int", column="id")


def test_dataset_that_breaks_off(monkeypatch):
    import datasets

    def rows():
        yield {"text": "one"}
        raise ConnectionError("the line\nwent dead")

    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, **__: datasets.IterableDataset.from_generator(rows),
    )
    read = documents("some/stories")
    with pytest.raises(TextError, match=r"(?s)failed at row [12] \(.*\.jsonl") as failure:
        list(read)
    assert "\n" not in str(failure.value)


def test_unknown_dataset_offline(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    says("nobody/no-such-set", "is no file or folder here", "or give the path of a .txt")


# --- packing -------------------------------------------------------------------------------------

_WORDS = st.sampled_from(["the", "boy", "sea", "wave", "storm", "walked", ".", "liked"])
_DOCUMENTS = st.lists(st.lists(_WORDS, max_size=12), min_size=1, max_size=12)


def plain_packing(ids, separator, bos, context_size):
    """The rule of `pack`, a token at a time: (token, document) of each context."""
    stream = []  # (token, document, is a separator)
    for number, document in enumerate(ids):
        if document and stream and separator is not None:
            stream.append((separator, number, True))
        stream.extend((token, number, False) for token in document)
    contexts = []
    while True:
        context = [] if bos is None else [(bos, -1)]
        if bos is not None and stream and stream[0][2]:
            stream.pop(0)
        while stream and len(context) < context_size:
            context.append(stream.pop(0)[:2])
        if len(context) < context_size:
            return contexts
        contexts.append(context)


@settings(deadline=None, max_examples=200)
@given(
    stories=_DOCUMENTS,
    context_size=st.integers(2, 9),
    bos=st.booleans(),
    eos=st.booleans(),
    prepend_bos=st.booleans(),
    batch=st.integers(1, 4),
)
def test_packing_loses_no_token_and_knows_each_ones_document(
    stories, context_size, bos, eos, prepend_bos, batch
):
    tokenizer = tiny_tokenizer(bos=bos, eos=eos, pad=False)
    texts = [" ".join(story) for story in stories]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    added = BOS if bos and prepend_bos else None
    separator = BOS if bos else EOS if eos else None
    expected = plain_packing(ids, separator, added, context_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "_BATCH_DOCUMENTS", batch)
        packing = pack(iter(texts), tokenizer, context_size, prepend_bos=prepend_bos)
        if not expected:
            with pytest.raises(TextError, match="too few"):
                list(packing)
            return
        contexts = list(packing)

    # the rule, exactly
    got = [list(zip(c.tokens.tolist(), c.documents.tolist(), strict=True)) for c in contexts]
    assert got == expected

    # no token lost, none twice, in order: all but the dropped end
    seen = np.concatenate([c.tokens for c in contexts])
    owners = np.concatenate([c.documents for c in contexts])
    assert seen.dtype == owners.dtype == np.int32
    words = ~np.isin(seen, [BOS, EOS])
    everything = [(token, number) for number, document in enumerate(ids) for token in document]
    kept = list(zip(seen[words].tolist(), owners[words].tolist(), strict=True))
    assert kept == everything[: len(kept)]
    assert len(everything) - len(kept) < context_size

    # each context's tokens read back as a piece of the right document
    for context in contexts:
        assert len(context.tokens) == len(context.documents) == context_size
        for number in set(context.documents.tolist()) - {-1}:
            own = context.tokens[(context.documents == number) & (context.tokens > EOS)]
            assert tokenizer.decode(own) in texts[number]
        if added is not None:
            assert context.tokens[0] == BOS
            assert context.documents[0] == -1
            assert context.tokens[1] != BOS  # never doubled
        assert (context.documents[0 if added is None else 1 :] >= 0).all()


def ids_of(contexts) -> list[list[int]]:
    return [context.tokens.tolist() for context in contexts]


def test_the_added_bos_stands_for_a_documents_own():
    tokenizer = tiny_tokenizer()
    a, b, c = (tokenizer.convert_tokens_to_ids(word) for word in ("sea", "boat", "fish"))
    contexts = list(pack(["sea sea", "boat", "fish"], tokenizer, 3))
    assert ids_of(contexts) == [[BOS, a, a], [BOS, b, BOS]]
    assert [context.documents.tolist() for context in contexts] == [[-1, 0, 0], [-1, 1, 2]]
    contexts = list(pack(["sea sea", "boat", "fish"], tokenizer, 3, prepend_bos=False))
    assert ids_of(contexts) == [[a, a, BOS], [b, BOS, c]]
    assert [context.documents.tolist() for context in contexts] == [[0, 0, 1], [1, 2, 2]]


def test_without_bos_documents_are_separated_by_eos_and_without_either_by_nothing():
    tokenizer = tiny_tokenizer(bos=False)
    a, b = (tokenizer.convert_tokens_to_ids(word) for word in ("sea", "boat"))
    assert ids_of(pack(["sea", "boat"], tokenizer, 3)) == [[a, EOS, b]]
    tokenizer = tiny_tokenizer(bos=False, eos=False, pad=False)
    assert ids_of(pack(["sea", "boat"], tokenizer, 2)) == [[a, b]]


def test_a_document_without_tokens_takes_a_number_but_no_separator():
    tokenizer = tiny_tokenizer()
    a, b = (tokenizer.convert_tokens_to_ids(word) for word in ("sea", "boat"))
    (context,) = pack(["", "sea", " ", "boat", ""], tokenizer, 4)
    assert context.tokens.tolist() == [BOS, a, BOS, b]
    assert context.documents.tolist() == [-1, 1, 3, 3]


def test_n_contexts_stops_reading_early():
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield "the boy walked to the sea ."

    assert len(list(pack(endless(), tiny_tokenizer(), 16, n_contexts=5))) == 5
    assert read <= packing_module._BATCH_DOCUMENTS


def test_contexts_of_a_long_document_do_not_share_memory():
    contexts = list(pack(["sea " * 1000], tiny_tokenizer(), 10))
    assert len(contexts) == 111
    contexts[0].tokens[:] = 7
    assert contexts[1].tokens[0] == BOS


def test_the_tokenizer_is_left_as_it_was_and_its_own_settings_do_not_cut_the_text():
    tokenizer = tiny_tokenizer(adds_bos=True)
    tokenizer.model_max_length = 8  # would warn
    tokenizer.backend_tokenizer.enable_truncation(4, stride=1)
    tokenizer.backend_tokenizer.enable_padding(pad_id=2, pad_token="<eos>", length=6)
    before = tokenizer.backend_tokenizer.to_str()
    state = {k: repr(v) for k, v in vars(tokenizer).items() if k != "_tokenizer"}
    (context,) = pack(["sea " * 20], tokenizer, 21)
    assert context.tokens.tolist() == [BOS] + [tokenizer.convert_tokens_to_ids("sea")] * 20
    assert tokenizer.backend_tokenizer.to_str() == before
    assert {k: repr(v) for k, v in vars(tokenizer).items() if k != "_tokenizer"} == state


@pytest.mark.parametrize(
    ("bos", "prepend_bos", "works"), [(True, True, 8), (True, False, 7), (False, True, 7)]
)
def test_text_shorter_than_a_context_says_what_would_work(bos, prepend_bos, works):
    tokenizer = tiny_tokenizer(bos=bos)
    text = "the boy walked to the sea ."
    with pytest.raises(TextError) as failure:
        list(pack([text], tokenizer, 128, prepend_bos=prepend_bos))
    message = str(failure.value)
    assert "7 tokens" in message
    assert "128" in message
    assert re.search(rf"context size of {works} or less", message)
    assert len(list(pack([text], tokenizer, works, prepend_bos=prepend_bos))) == 1
    with pytest.raises(TextError):
        list(pack([text], tokenizer, works + 1, prepend_bos=prepend_bos))


def test_nothing_to_pack():
    with pytest.raises(TextError, match=r"0 tokens.*add text"):
        list(pack([], tiny_tokenizer(), 4))


@pytest.mark.parametrize("context_size", [1, 0, -3])
def test_context_size_below_two_is_refused_at_once(context_size):
    with pytest.raises(TextError, match=f"context_size is {context_size}"):
        pack(STORIES, tiny_tokenizer(), context_size)


def test_n_contexts_below_one_is_refused_at_once():
    with pytest.raises(TextError, match="0 contexts"):
        pack(STORIES, tiny_tokenizer(), 4, n_contexts=0)


# --- identity ------------------------------------------------------------------------------------


def test_fingerprint_tells_content_names_and_settings_apart(tmp_path):
    write(tmp_path / "a" / "x.txt", "one")
    write(tmp_path / "a" / "sub" / "y.txt", "two")
    write(tmp_path / "b" / "x.txt", "one")
    write(tmp_path / "b" / "sub" / "y.txt", "two")
    first = fingerprint(str(tmp_path / "a"))
    assert json.loads(json.dumps(first)) == first
    assert [file["name"] for file in first["files"]] == ["sub/y.txt", "x.txt"]
    assert first == fingerprint(str(tmp_path / "b"))  # the folder may move
    assert first != fingerprint(str(tmp_path / "a"), column="story")
    assert first != fingerprint(str(tmp_path / "a"), separator="\n")
    write(tmp_path / "b" / "x.txt", "One")
    assert first != fingerprint(str(tmp_path / "b"))


def test_fingerprint_of_a_large_file_reads_both_ends_and_the_size(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_HASH_WHOLE", 100)
    monkeypatch.setattr(reading, "_READ_BYTES", 10)
    prints = [
        fingerprint(write(tmp_path / "a.txt", content))
        for content in (b"x" * 200, b"y" + b"x" * 199, b"x" * 199 + b"y", b"x" * 201)
    ]
    assert all(prints[0] != other for other in prints[1:])
    assert prints[0] == fingerprint(write(tmp_path / "a.txt", b"x" * 200))


def test_fingerprint_of_a_data_set_and_of_nothing():
    assert fingerprint("some/stories:plain", split="test") == {
        "kind": "dataset",
        "name": "some/stories",
        "config": "plain",
        "split": "test",
        "column": "text",
        "separator": SEPARATOR,
    }
    with pytest.raises(TextError, match="no such file"):
        fingerprint("nowhere.txt")
