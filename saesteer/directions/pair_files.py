"""Records of contrast pairs as files and data sets hold them, one by one with where they stood."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from saesteer.errors import PairsError, did_you_mean

FORMAT = '{"prompt": "…", "chosen": "…", "rejected": "…"}'
"""What error messages show as the expected form."""

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")
_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".ndjson")


def records(source: str | Path, *, split: str = "train") -> Iterator[tuple[str, Any]]:
    """Each record of `source` as (where it stood, the JSON value), in order.

    Args:
        source: a file of JSON lines, a .json file that holds one array, a .parquet file, or the
            name of a `datasets` data set (a configuration follows a colon: `name:config`).
        split: of a data set.

    Raises:
        PairsError: the source is missing, empty or can't be read, or a line isn't JSON.
    """
    path = Path(source).expanduser()
    found = False
    if path.suffix.lower() == ".parquet" and path.is_file():
        rows = _parquet(path)
    elif _is_data_set(str(source), path):
        rows = _data_set(str(source), split)
    else:
        rows = _text(path)
    for row in rows:
        found = True
        yield row
    if not found:
        raise PairsError(f"{source} is empty; expected JSON lines of {FORMAT}")


def _is_data_set(source: str, path: Path) -> bool:
    named = _HUB_NAME.fullmatch(source) and path.suffix.lower() not in _SUFFIXES
    return bool(named) and not path.exists()


def _text(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise PairsError(
            f"there is no file of pairs {path}{did_you_mean(path.name, beside)}; expected JSON "
            f"lines of {FORMAT}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        _refuse(f"{path} can't be read as UTF-8 text", error, "name a .jsonl, .json or .parquet")
    # A .jsonl is taken line by line, so that a broken line is named by its number.
    if path.suffix.lower() != ".jsonl" and text.lstrip().startswith("["):
        for n, value in enumerate(_json(text, str(path)), 1):
            yield f"{path}, item {n}", value
        return
    # Not splitlines: JSON strings may hold U+2028 and the like as they are.
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {n}", _json(line, f"{path}, line {n}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PairsError(f"{where}: no JSON ({error}); expected {FORMAT}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    n = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    n += 1
                    yield f"{path}, row {n}", row
    except (pa.ArrowException, OSError) as error:
        _refuse(f"{path} can't be read as parquet", error, "write it anew, or convert it to .jsonl")


def _data_set(source: str, split: str) -> Iterator[tuple[str, Any]]:
    import datasets  # slow to import, and needed for nothing else

    name, _, config = source.partition(":")
    n = 0
    # What a data set's host, builder or file format can raise is open-ended, so all of it is told.
    try:
        for row in datasets.load_dataset(name, config or None, split=split, streaming=True):
            n += 1
            yield f"the data set {source}, row {n}", row
    except Exception as error:
        _refuse(
            f"{source!r} is no file here, and can't be read as a data set (row {n + 1})",
            error,
            f"check the name, the split {split!r} and the network, or give a .jsonl file",
        )


def _refuse(what: str, error: BaseException, hint: str) -> NoReturn:
    why = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    raise PairsError(f"{what}: {(why or type(error).__name__).rstrip('.')}; {hint}") from error
