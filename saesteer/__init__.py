"""saesteer: train sparse autoencoders, find their features, steer with them, measure it."""

import importlib
from pathlib import Path
from typing import Any

# In a checkout, `training/` and `features/` stand beside this folder, not in it.
if not (Path(__file__).parent / "training").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

__version__ = "0.1.0"

# Where each public name lives; looked up on first use, so that `import saesteer` stays light.
_HOME = {
    "Run": "saesteer.run",
    "steer": "saesteer.steering.engine",
    "Add": "saesteer.steering.edits",
    "Affine": "saesteer.steering.edits",
    "Clamp": "saesteer.steering.edits",
    "Lean": "saesteer.steering.edits",
    "Project": "saesteer.steering.edits",
    "Rotate": "saesteer.steering.edits",
    "Positions": "saesteer.steering.positions",
    "Linear": "saesteer.steering.schedules",
    "Decay": "saesteer.steering.schedules",
    "When": "saesteer.steering.conditions",
    "Feature": "saesteer.steering.conditions",
    "Projection": "saesteer.steering.conditions",
    "save_edits": "saesteer.steering.artifact",
    "load_edits": "saesteer.steering.artifact",
    "bake": "saesteer.steering.bake",
    "ablation_everywhere": "saesteer.steering.bake",
    "HookPoint": "saesteer.core.model",
    "Sae": "saesteer.core.sae",
    "load_model": "saesteer.core.model",
    "SaesteerError": "saesteer.errors",
}

__all__ = sorted(["__version__", *_HOME])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'saesteer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
