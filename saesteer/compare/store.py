"""What was evaluated, kept as it comes, so that a comparison can be killed and gone on with.

config.json         what the evaluations are of; a store of something else is refused
evaluations.jsonl   {"key": {…}, "value": {…}} a line, appended as it comes

Beside the folder, and for all folders of a run, the looks at each test split are counted.
"""

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from saesteer.core.files import write_json
from saesteer.errors import RunError

Key = Mapping[str, Any]

_NONE: dict[str, Any] = {"looks": 0, "open": None}

HELD_OUT = ("test", "ood")
"""Values of a key's "split" that nothing may be chosen by."""


class Store:
    """A folder of evaluations, each computed once.

    One process at a time may write to it: hold `core.files.alone` on the folder around it.

    Args:
        config: JSON; all that the evaluations depend on beside their keys.
        looks: the file that counts the passes which computed anything on held-out items, whatever
            folder they wrote to: {data: {"looks": n, "open": the folder that isn't finished}}.
        data: tells the held-out items from others in that file.

    Raises:
        RunError: the folder holds evaluations of another configuration or is damaged, or can't be
            read or written.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], looks: Path, data: str) -> None:
        self.folder = folder
        self._looks, self._data, self._looked = looks, data, False
        # A folder that was emptied is another pass, by whatever name.
        self._goes_on = self._check(json.loads(json.dumps(config)))
        self._path = folder / "evaluations.jsonl"
        self._values, whole = _read(self._path)
        try:
            if self._path.exists() and self._path.stat().st_size > whole:
                with self._path.open("rb+") as file:
                    file.truncate(whole)
        except OSError as error:
            raise _unwritable(self._path, error) from error

    @property
    def looks(self) -> int:
        """How many passes have computed something on held-out items, in any folder.

        A pass that was stopped and the one that goes on from it are one.

        Raises:
            RunError: the file of looks is damaged.
        """
        return int(self._counted().get(self._data, _NONE)["looks"])

    def finish(self) -> None:
        """Say that the pass came to its end; another that computes something is another look."""
        if self._counted().get(self._data, _NONE)["open"] == self._here:
            self._count(0, None)

    def __contains__(self, key: Key) -> bool:
        return _text(key) in self._values

    def once(self, key: Key, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The value under the key: the one that is kept, or else what `make` gives, kept now.

        The first value on held-out items that a pass makes adds a look, before it is made.

        Raises:
            RunError: it can't be written. Whatever `make` raises, and then nothing is kept.
        """
        text = _text(key)
        if text not in self._values:
            if key.get("split") in HELD_OUT and not self._looked:
                self._look()
            line = json.dumps({"key": json.loads(text), "value": make()})
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError as error:
                raise _unwritable(self._path, error) from error
            # As it would be read: a pass that goes on computes with the same numbers.
            self._values[text] = json.loads(line)["value"]
        return self._values[text]

    def select(self, **wanted: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Keys and values whose keys hold these, in the order in which they were kept."""
        for text, value in self._values.items():
            key = json.loads(text)
            if all(key.get(name) == one for name, one in wanted.items()):
                yield key, value

    def count(self, **wanted: Any) -> int:
        """How many values have keys that hold these."""
        return sum(1 for _ in self.select(**wanted))

    @property
    def _here(self) -> str:
        return str(self.folder.resolve())

    def _look(self) -> None:
        is_open = self._counted().get(self._data, _NONE)["open"] == self._here
        self._count(0 if is_open and self._goes_on else 1, self._here)
        self._looked = True

    def _count(self, more: int, open_: str | None) -> None:
        # Comparisons in other folders of the run may count at the same time.
        lock = self._looks.with_name(f".{self._looks.name}.lock")
        try:
            with lock.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                counted = self._counted()
                looks = int(counted.get(self._data, _NONE)["looks"]) + more
                write_json(self._looks, {**counted, self._data: {"looks": looks, "open": open_}})
        except OSError as error:
            raise RunError(
                f"cannot write {self._looks}: {error.strerror or error}, and so the looks at the "
                "test split can't be counted; make the run's folder writable"
            ) from error

    def _counted(self) -> dict[str, dict[str, Any]]:
        path = self._looks
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            return {k: {"looks": int(v["looks"]), "open": v["open"]} for k, v in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{path} can't be read, and so the looks at the test split can't be counted; put "
                f'back {{"{self._data}": {{"looks": n, "open": null}}}} with their number'
            ) from error

    def _check(self, config: dict[str, Any]) -> bool:
        """Whether the folder holds a comparison of this already."""
        path = self.folder / "config.json"
        if not path.exists():
            write_json(path, config)
            return False
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path} can't be read ({error}); put it back. Another folder is possible too, and "
                "counts as another look at the test split"
            ) from error
        if kept != config:
            other = [k for k in {**kept, **config} if kept.get(k) != config.get(k)]
            raise RunError(
                f"{self.folder} holds evaluations of another configuration (another "
                f"{', '.join(other)}); give the same again. Another folder is possible too; on the "
                "same pairs it counts as another look at the test split"
            )
        return True


def _text(key: Key) -> str:
    return json.dumps(key, sort_keys=True)


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Values by key, and how many bytes of the file are whole lines.

    A process that was killed leaves a torn line at the end; anywhere else it is damage.
    """
    if not path.exists():
        return {}, 0
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} can't be read ({error.strerror})") from error
    values: dict[str, dict[str, Any]] = {}
    whole = data.rfind(b"\n") + 1
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            record = json.loads(line)
            values[_text(record["key"])] = record["value"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path}, line {number} is damaged ({error}); take the line out, and it is "
                "computed again"
            ) from error
    return values, whole


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"cannot write {path}: {error.strerror or error}; what was kept is whole: make room or "
        "choose another folder, and go on"
    )
