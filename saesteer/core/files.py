"""Write aside, then rename: no reader ever meets half a file."""

import errno
import fcntl
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from saesteer.errors import RunError

# What `stamp` reads of a large file.
_PIECES, _PIECE = 64, 4096


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the body succeeds.

    The file is flushed to disk before the rename, so that a crash leaves either the old file or
    the whole new one. When the body raises, the temporary file is removed and `path` is untouched.
    What a process left that was killed meanwhile is removed by the next one that writes the file.

    Raises:
        RunError: the folder cannot be written, or the disk is full.
    """
    # Another machine's processes can't be told to be dead, so that files of theirs are left alone.
    begins = f".{path.name}.{os.uname().nodename}-"
    aside = path.with_name(f"{begins}{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(f"{glob.escape(begins)}*.partial*"):
            number = other.name.removeprefix(begins).partition(".")[0]
            if number.isdecimal() and not _alive(int(number)):
                other.unlink(missing_ok=True)
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise _run_error(path, error) from error
    finally:
        with suppress(OSError):  # where it could not be made, it cannot be removed either
            aside.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, aside and renamed."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """The file's SHA-256, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(paths: Iterable[Path]) -> str:
    """A SHA-256 of files' names, sizes and 64 pieces of 4 kB of each, spread over it evenly.

    Files up to 256 kB are read whole. It tells one SAE from another in milliseconds, whatever their
    size; a change that touches none of the pieces and leaves the size as it is isn't seen.

    Raises:
        RunError: a file is missing or can't be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(json.dumps([path.name, size]).encode())
                if size <= _PIECES * _PIECE:
                    digest.update(file.read())
                    continue
                for i in range(_PIECES):  # the first piece begins the file, the last ends it
                    file.seek((size - _PIECE) * i // (_PIECES - 1))
                    digest.update(file.read(_PIECE))
        except OSError as error:
            raise RunError(
                f"{path} can't be read ({error.strerror}); the run lacks a file that its index was "
                "made from"
            ) from error
    return digest.hexdigest()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process, however that ends.

    Raises:
        RunError: another process holds it, or the folder can't be written or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")  # "w" would wipe out the holder's name
    except OSError as error:
        raise RunError(
            f"cannot write to {folder}: {error.strerror}; choose a run folder that you can write to"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise RunError(
                f"another process is writing to {folder} (process id {lock.read() or '?'}); "
                "wait for it, or use another run folder"
            ) from None
        except OSError as error:
            raise RunError(
                f"{folder} can't be locked ({error.strerror}), so two runs could mix there; "
                "choose a run folder on a local disk"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _alive(process: int) -> bool:
    """Whether there is a process of that number, whoever's it is."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _run_error(path: Path, error: OSError) -> RunError:
    if error.errno == errno.ENOSPC:
        return RunError(
            f"the disk is full: {path} was not written (what was already written is whole); "
            "free some space and run the same command again, it goes on where it stopped"
        )
    return RunError(
        f"cannot write {path}: {error.strerror or error}; choose a run folder that you can write to"
    )
