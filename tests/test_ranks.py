"""Several processes train what one does: sharing rows of a batch, or the latents."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from saesteer.core.sae import Sae
from saesteer.training.architectures import ARCHITECTURES
from saesteer.training.ranks import Ranks
from tests.trained import train

ROOT = Path(__file__).parent.parent
STEPS = 30
CASES = [(name, share) for name in ARCHITECTURES for share in ("rows", "features")]


def settings(name: str) -> dict[str, Any]:
    # Dead latents after a few steps, so that their loss is part of what must agree. The larger
    # epsilon of a real run isn't at hand, so few steps keep rounding from growing.
    return {
        "architecture": name, "steps": STEPS, "dead_after": 640, "products": "float32",
        "d_sae": 128, "sparsity": 0.05,
    }  # fmt: skip


def tensors(sae: Sae) -> dict[str, torch.Tensor]:
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "r_mag", "b_mag")
    found = {name: getattr(sae, name) for name in names}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


PROGRAM = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from saesteer.training.ranks import join
from tests.test_ranks import CASES, settings, tensors
from tests.trained import train
from safetensors.torch import save_file

out = Path(sys.argv[1])
ranks, _ = join("cpu")
for name, share in CASES:
    sae = train(ranks=ranks, by_features=share == "features", folder=out / f"{name}-{share}",
                **settings(name))
    if ranks.first:
        save_file(tensors(sae), out / f"{name}-{share}.safetensors")

# Killed between two checkpoints and started again.
class Killed(Exception): pass
from tests.trained import InMemory
class Dying(InMemory):
    def rows(self, indices):
        if len(self.asked) >= 21: raise Killed
        return super().rows(indices)
for share in ("rows", "features"):
    how = settings("topk") | {"by_features": share == "features", "folder": out / f"killed-{share}"}
    try:
        train(Dying(), ranks=ranks, checkpoint_steps=8, **how)
    except Killed:
        pass
    sae = train(ranks=ranks, checkpoint_steps=8, **how)
    if ranks.first:
        save_file(tensors(sae), out / f"killed-{share}.safetensors")
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes of torchrun trained, by name."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--master-port", str(20000 + os.getpid() % 20000),
            str(folder / "program.py"), str(folder),
        ],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(("name", "share"), CASES)
def test_two_processes_train_what_one_does(together: Path, name: str, share: str) -> None:
    alone = train(folder=together / f"{name}-{share}-alone", **settings(name))
    found = load_file(together / f"{name}-{share}.safetensors")
    for key, tensor in tensors(alone).items():
        assert found[key].shape == tensor.shape
        # The order of sums differs, and Adam divides by small numbers.
        close = torch.isclose(found[key], tensor, atol=2e-4, rtol=1e-3)
        assert close.double().mean() > 0.98, key
    lines = [
        (together / folder / "metrics.jsonl").read_text().splitlines()
        for folder in (f"{name}-{share}", f"{name}-{share}-alone")
    ]
    assert len(lines[0]) == len(lines[1]) == STEPS // 5
    for one, other in zip(*lines, strict=True):
        here, there = json.loads(one), json.loads(other)
        for key in ("loss", "fvu", "penalty", "aux", "l0", "dead_fraction"):
            assert here[key] == pytest.approx(there[key], rel=2e-3, abs=1e-3), key
    # What chooses k of 128 leaves many dead at first, so that their loss took part.
    chooses = ARCHITECTURES[name].chooses is not None
    assert any(json.loads(line)["aux"] > 0 for line in lines[0]) == chooses


@pytest.mark.parametrize("share", ["rows", "features"])
def test_two_processes_go_on_after_a_kill_to_the_same_bits(together: Path, share: str) -> None:
    killed = load_file(together / f"killed-{share}.safetensors")
    unbroken = load_file(together / f"topk-{share}.safetensors")
    for key, tensor in unbroken.items():
        assert torch.equal(killed[key], tensor), key


def test_alone_everything_is_a_no_op() -> None:
    tensor = torch.arange(3.0)
    ranks = Ranks()
    assert ranks.first
    assert ranks.sum_(tensor) is tensor and ranks.max_(tensor) is tensor
    assert ranks.gather(tensor) == [tensor]
    assert ranks.objects({"a": 1}) == [{"a": 1}]
