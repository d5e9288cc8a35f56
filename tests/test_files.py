"""Files written whole, and told apart without reading all of them."""

from pathlib import Path

import numpy as np
import pytest

from saesteer.core.files import stamp
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
