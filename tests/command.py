"""Running a command of the program within a test."""

import json
import shlex
import sys

from saesteer.cli.main import main


def run(capsys, line, code=0):
    try:
        found = main(shlex.split(line))
    except SystemExit as stopped:
        found = stopped.code
    out, err = capsys.readouterr()
    assert found == code, err
    return out, err


def rows(capsys, line):
    return [json.loads(text) for text in run(capsys, f"{line} --json")[0].splitlines()]


def as_terminal(monkeypatch, columns):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
