"""What importing costs, what is public, and that the checkout works however it was installed."""

import subprocess
import sys
from pathlib import Path

import pytest

import saesteer

ROOT = Path(__file__).parents[1]


def python(code, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    heavy = "{'torch', 'sae_lens', 'transformers', 'numpy', 'datasets'} & set(sys.modules)"
    assert python(f"import sys, saesteer; print({heavy})").strip() == "set()"


def test_keyword_search_imports_neither_torch_nor_numpy(small_run):
    code = (
        "import sys; from saesteer.cli.main import main;"
        f"main(['search', {str(small_run.path)!r}, 'boat']);"
        "print({'torch', 'sae_lens', 'transformers', 'numpy'} & set(sys.modules))"
    )
    assert python(code).strip().endswith("set()")


def test_training_and_steering_do_not_import_sae_lens(small_run):
    code = (
        "import sys, saesteer, saesteer.stages;"
        f"run = saesteer.Run.open({str(small_run.path)!r});"
        "run.sae;"
        "print('sae_lens' in sys.modules)"
    )
    assert python(code).strip() == "False"


def test_what_is_public_is_pinned_and_there():
    assert saesteer.__all__ == [
        "Add",
        "Affine",
        "Clamp",
        "Decay",
        "Feature",
        "HookPoint",
        "Lean",
        "Linear",
        "Positions",
        "Project",
        "Projection",
        "Rotate",
        "Run",
        "Sae",
        "SaesteerError",
        "When",
        "__version__",
        "ablation_everywhere",
        "bake",
        "load_edits",
        "load_model",
        "save_edits",
        "steer",
    ]
    for name in saesteer.__all__:
        assert getattr(saesteer, name)
    assert dir(saesteer) == saesteer.__all__
    with pytest.raises(AttributeError, match="no attribute 'stear'"):
        _ = saesteer.stear


def test_the_checkout_s_rooms_are_found_beside_it():
    """A checkout that shadows an installed package still has its training and features."""
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)];"
        "import saesteer.training, saesteer.features; print(saesteer.training.__file__)"
    )
    assert Path(python(code).strip()) == ROOT / "training" / "__init__.py"
