"""metrics.jsonl: one JSON object a logged step, cut back where a run starts again."""

import json
from pathlib import Path
from typing import Any

from saesteer.core.files import written_aside
from saesteer.errors import TrainingError


class Metrics:
    """Appends lines to `path` (None: nowhere), each flushed at once.

    What lies beyond `step`, and a half line at the end, were written by a run that was killed
    after its last checkpoint: they are dropped, and written again.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self._path = path
        if path is None or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        with written_aside(path) as aside:
            aside.write_text("".join(kept), encoding="utf-8")

    def write(self, figures: dict[str, Any]) -> None:
        """Append one line; TrainingError where the disk is full or the file can't be written."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")
        except OSError as error:
            raise TrainingError(
                f"cannot write {self._path}: {error}; free some space or choose another folder"
            ) from error
