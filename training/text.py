"""Text in: documents from files or data sets.

`documents` reads, `fingerprint` says what was read, so that cached activations are found again only
for the same text.
"""

import codecs
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from saesteer.errors import TextError, did_you_mean

SEPARATOR = "<|endoftext|>"
_READ_BYTES = 1 << 20
_HASH_WHOLE = 64 << 20  # larger files are hashed by their size and both ends
_FOLDER_SUFFIXES = (".txt", ".jsonl", ".parquet")
_TEXT_SUFFIXES = (".txt", ".text", ".md", "")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")
_GIVE_LOCAL = "give the path of a .txt, .jsonl or .parquet file, or of a folder of them"


# --- reading -------------------------------------------------------------------------------------


def documents(
    source: str, *, column: str = "text", split: str = "train", separator: str = SEPARATOR
) -> Iterator[str]:
    """The documents of `source` in a fixed order, stripped, without blank ones.

    source: a file (.txt, .jsonl, .parquet), a folder of such files (read recursively, in sorted
        order, hidden ones left out), or the name of a `datasets` data set, which is streamed; a
        configuration follows a colon (`name:config`).
    column: where the text is in .jsonl, .parquet and data sets; split: of a data set.
    separator: text is split into documents wherever it stands ("" for never): one row of a table
        can hold several documents too.

    Files are read in pieces, so memory holds one document (.parquet: one batch of rows) at a time.
    Line ends of .txt files become "\\n"; a byte order mark is dropped.

    Raises TextError: at once where a local source is missing, while reading for what is in it.
    """
    local = _local_files(source)
    if local is None:
        pieces = _from_dataset(source, column, split, separator)
    else:
        pieces = itertools.chain.from_iterable(
            _from_file(path, column, separator) for path, _ in local
        )
    return _stripped(pieces, source)


def _stripped(pieces: Iterable[str], source: str) -> Iterator[str]:
    found = False
    for piece in pieces:
        if document := piece.strip():
            found = True
            yield document
    if not found:
        raise TextError(f"{source!r} holds no text: every document in it is blank; {_GIVE_LOCAL}")


def _local_files(source: str) -> list[tuple[Path, str]] | None:
    """(path, name relative to the source) of each file to read; None for a data set's name."""
    if not source.strip():
        raise TextError(f"the text source is empty; {_GIVE_LOCAL}, or a data set's name")
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return _folder_files(path)
        if path.is_file():
            if path.suffix.lower() not in (*_FOLDER_SUFFIXES, *_TEXT_SUFFIXES):
                raise TextError(
                    f"{source!r} is a {path.suffix} file, which can't be read as text; "
                    f"convert it to .txt, .jsonl or .parquet"
                )
            return [(path, path.name)]
        if path.exists():
            raise TextError(f"{source!r} is neither a file nor a folder; {_GIVE_LOCAL}")
        if _HUB_NAME.fullmatch(source) and path.suffix.lower() not in _FOLDER_SUFFIXES:
            return None
        neighbours = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    except (OSError, ValueError) as error:
        _refuse(f"{source!r} can't be read", error, _GIVE_LOCAL)
    raise TextError(
        f"no such file or folder: {source!r}{did_you_mean(path.name, neighbours)}; {_GIVE_LOCAL}"
    )


def _folder_files(folder: Path) -> list[tuple[Path, str]]:
    names = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.suffix.lower() in _FOLDER_SUFFIXES and not hidden and path.is_file():
            names.append(name.as_posix())
    names.sort()
    if not names:
        raise TextError(
            f"the folder {str(folder)!r} holds no .txt, .jsonl or .parquet file; {_GIVE_LOCAL}"
        )
    return [(folder / name, name) for name in names]


def _from_file(path: Path, column: str, separator: str) -> Iterator[str]:
    """The unstripped documents of one file."""
    try:
        match path.suffix.lower():
            case ".jsonl":
                yield from _split_rows(_jsonl_rows(path, column), separator)
            case ".parquet":
                yield from _split_rows(_parquet_rows(path, column), separator)
            case _:
                separator = separator.replace("\r\n", "\n").replace("\r", "\n")
                yield from _split_stream(_decoded(path), separator)
    except OSError as error:
        _refuse(f"{str(path)!r} can't be read", error, "check its permissions, or name another")


def _split_rows(rows: Iterable[str], separator: str) -> Iterator[str]:
    for row in rows:
        if separator and separator in row:
            yield from row.split(separator)
        else:
            yield row


def _split_stream(chunks: Iterable[str], separator: str) -> Iterator[str]:
    """`"".join(chunks).split(separator)` without ever joining more than one document."""
    held: list[str] = []  # the unfinished document, known to hold no separator's beginning …
    tail = ""  # … but for these last characters, which the next chunk may complete
    for chunk in chunks:
        *ended, rest = (tail + chunk).split(separator) if separator else [chunk]
        for piece in ended:
            held.append(piece)
            yield "".join(held)
            held.clear()
        cut = max(0, len(rest) - len(separator) + 1) if separator else len(rest)
        held.append(rest[:cut])
        tail = rest[cut:]
    yield "".join([*held, tail])


def _decoded(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in pieces, with "\\n" for line ends and without its BOM."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    with path.open("rb") as file:
        offset, first = 0, True
        while True:
            data = file.read(_READ_BYTES)
            pending = len(decoder.getstate()[0])  # of a character cut by the last read
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                _not_utf8(path, offset - pending + error.start)
            offset += len(data)
            if first and text:
                text, first = text.removeprefix("\ufeff"), False
            yield newlines.decode(text, final=not data)
            if not data:
                return


def _jsonl_rows(path: Path, column: str) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{str(path)!r}, line {number}"
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                _not_utf8(path, offset + error.start)
            offset += len(line)
            if number == 1:
                text = text.removeprefix("\ufeff")
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                _refuse(f"{where} is not valid JSON", error, "expected one JSON object a line")
            if not isinstance(row, dict):
                raise TextError(
                    f"{where} is a JSON {type(row).__name__}; expected an object with the text in "
                    f'a field, such as {{"{column}": "…"}}'
                )
            yield _cell(row, column, where)


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            _check_column(table.schema_arrow.names, column, repr(str(path)))
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                for cell in batch.column(0).to_pylist():
                    number += 1
                    yield _cell({column: cell}, column, f"{str(path)!r}, row {number}")
    except (pa.ArrowException, UnicodeDecodeError) as error:
        _refuse(f"{str(path)!r} can't be read as parquet", error, "write the file again")


def _from_dataset(source: str, column: str, split: str, separator: str) -> Iterator[str]:
    return _split_rows(_dataset_rows(source, column, split), separator)


def _dataset_rows(source: str, column: str, split: str) -> Iterator[str]:
    import datasets  # slow to import, and needed for nothing else

    name, _, config = source.partition(":")
    hint = f"check the name, split={split!r} and the network, or {_GIVE_LOCAL}"
    # What a data set's host, builder or file format can raise is open-ended, so all of it is told.
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        if rows.column_names:
            _check_column(rows.column_names, column, f"the data set {source!r}")
            rows = rows.select_columns([column])  # the others needn't be decoded
        iterator = iter(rows)
    except TextError:
        raise
    except Exception as error:
        _refuse(
            f"{source!r} is no file or folder here, and can't be loaded as a data set", error, hint
        )
    for number in itertools.count(1):
        try:
            row = next(iterator, None)
        except Exception as error:
            _refuse(f"the data set {source!r} failed at row {number}", error, hint)
        if row is None:
            return
        yield _cell(row, column, f"the data set {source!r}, row {number}")


def _check_column(names: Iterable[str], column: str, where: str) -> None:
    names = [str(name) for name in names]
    if column not in names:
        raise TextError(
            f"{where} has no column {column!r}{did_you_mean(column, names)}; "
            f"its columns: {', '.join(names) or 'none'}"
        )


def _cell(row: Mapping[str, Any], column: str, where: str) -> str:
    if column not in row:
        _check_column(row, column, where)
    cell = row[column]
    if not isinstance(cell, str):
        raise TextError(
            f"{where}: column {column!r} holds {type(cell).__name__}, not text; "
            f"choose a column of strings or drop the row"
        )
    try:
        cell.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a character; tokenizers refuse it
        _refuse(f"{where}: column {column!r} is not valid Unicode", error, "mend or drop the row")
    return cell


def _not_utf8(path: Path, offset: int) -> NoReturn:
    with path.open("rb") as file:
        utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    raise TextError(
        f"{str(path)!r} is not valid UTF-8 at byte {offset}; save it as UTF-8, for instance with "
        f"iconv -f {'UTF-16' if utf16 else 'LATIN1'} -t UTF-8"
    )


def _refuse(what: str, error: Exception, advice: str) -> NoReturn:
    """Raises TextError in one line, with the first line of what `error` says."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    raise TextError(f"{what} ({said}); {advice}") from error


# --- identity ------------------------------------------------------------------------------------


def fingerprint(
    source: str, *, column: str = "text", split: str = "train", separator: str = SEPARATOR
) -> dict[str, Any]:
    """What `documents` would read with these arguments, as JSON-able values for a cache's hash.

    Files are told by name, size and sha256 (over 64 MiB: of their first and last MiB); data sets by
    name, configuration and split, since their content can't be known without reading it.
    Raises TextError where a local source is missing or unreadable.
    """
    how = {"column": column, "separator": separator}
    local = _local_files(source)
    if local is None:
        name, _, config = source.partition(":")
        return {"kind": "dataset", "name": name, "config": config or None, "split": split, **how}
    files = []
    for path, name in local:
        try:
            files.append({"name": name, "size": path.stat().st_size, "sha256": _file_hash(path)})
        except OSError as error:
            _refuse(f"{str(path)!r} can't be read", error, "check its permissions, or name another")
    return {"kind": "files", "files": files, **how}


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        size = path.stat().st_size
        if size <= _HASH_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        digest.update(file.read(_READ_BYTES))
        file.seek(-_READ_BYTES, io.SEEK_END)
        digest.update(file.read(_READ_BYTES))
        return digest.hexdigest()
