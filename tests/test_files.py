"""Files written whole, and told apart without reading all of them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from saesteer.core.files import stamp, written_aside
from saesteer.errors import RunError


def test_a_stamp_tells_files_apart(tmp_path: Path) -> None:
    small, large = tmp_path / "cfg.json", tmp_path / "weights.safetensors"
    small.write_text("{}")
    data = bytearray(np.random.default_rng(0).bytes(10**6))
    large.write_bytes(data)
    stamps = [stamp([small, large])]
    for change in (lambda: small.write_text("[]"), lambda: large.write_bytes(bytes(data[:-1]))):
        change()
        stamps.append(stamp([small, large]))
    for place in (0, len(data) - 1, *range(4_000, len(data), 31_000)):
        large.write_bytes(bytes([*data[:place], data[place] ^ 1, *data[place + 1 :]]))
        stamps.append(stamp([small, large]))
    # 62 pieces lie between the first and the last, of a quarter of the file in all.
    assert len(set(stamps)) >= 5
    large.write_bytes(data)
    small.write_text("{}")
    assert stamp([small, large]) == stamps[0] != stamp([large, small])
    with pytest.raises(RunError, match=r"gone\.json can't be read"):
        stamp([small, tmp_path / "gone.json"])


def test_what_a_killed_process_left_is_removed_by_the_next_and_a_living_one_s_is_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a [b]*.json"
    code = (
        "import sys; from pathlib import Path; from saesteer.core.files import written_aside\n"
        "with written_aside(Path(sys.argv[1])) as aside:\n"
        "    aside.write_text('half'); print('there', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    dead, living = (
        subprocess.Popen(command, cwd=Path(__file__).parents[1], **pipes) for _ in range(2)
    )
    with dead, living:
        for one in (dead, living):
            assert one.stdout.readline() == "there\n"
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        (ours,) = (p for p in tmp_path.iterdir() if f"-{dead.pid}." in p.name)
        elsewhere = ours.with_name(ours.name.replace(os.uname().nodename, "another-machine"))
        journal = ours.with_name(f"{ours.name}-journal")
        unlike = ours.with_name(ours.name.replace(str(dead.pid), "notes"))
        for left in (elsewhere, journal, unlike):
            left.write_text("")
        other = tmp_path / ours.name.replace("a [b]*", "a b")  # of another file
        other.write_text("")
        with written_aside(path) as aside:
            aside.write_text("whole")
        assert path.read_text() == "whole"
        found = {p for p in tmp_path.iterdir() if p != path}
        (theirs,) = found - {elsewhere, unlike, other}
        assert f"-{living.pid}." in theirs.name and theirs.read_text() == "half"
        living.communicate("", timeout=60)
    assert path.read_text() == "half" and not theirs.exists()
