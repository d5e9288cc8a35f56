"""A direction in the residual stream, with where it came from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from saesteer.core.files import written_aside
from saesteer.core.model import HookPoint
from saesteer.errors import SteeringError

_FORMAT = "saesteer direction 1"


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector of the stream at a hook point, fitted on contrast pairs.

    vector: [d_model] float32, in units of activation: adding it once moves the mean of the
        rejected side to the mean of the chosen side (for a mean difference).
    read: what of an answer was read: "answer-mean" (the mean over its tokens) or "answer-last".
    model_fingerprint: of the weights it was fitted on.
    provenance: anything else worth keeping; must be JSON.
    """

    vector: Tensor
    point: HookPoint
    method: str
    n_pairs: int
    read: str
    model_fingerprint: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, aside and renamed; `load` reads it.

        Raises:
            RunError: the folder can't be written, or the disk is full.
        """
        facts = {
            "point": str(self.point),
            "method": self.method,
            "n_pairs": self.n_pairs,
            "read": self.read,
            "model_fingerprint": self.model_fingerprint,
            "provenance": dict(self.provenance),
        }
        tensors = {"vector": self.vector.detach().to("cpu", torch.float32).contiguous()}
        with written_aside(Path(path)) as aside:
            aside.write_bytes(save(tensors, {"format": _FORMAT, "direction": json.dumps(facts)}))

    @classmethod
    def load(
        cls, path: str | Path, *, model_fingerprint: str | None = None, force: bool = False
    ) -> "Direction":
        """Read a saved direction.

        Args:
            model_fingerprint: of the model it is meant for; None doesn't check.
            force: load it for another model all the same.

        Raises:
            SteeringError: missing, damaged or foreign, or fitted on another model.
        """
        path = Path(path)
        if not path.is_file():
            raise SteeringError(f"there is no direction {path}; fit one from pairs first")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
                facts = json.loads(metadata["direction"])
                vector = file.get_tensor("vector")
            facts["point"] = HookPoint.parse(facts["point"])
            direction = cls(vector=vector, **facts)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise SteeringError(
                f"{path} is no direction of this version or is damaged ({error}); fit it again"
            ) from error
        if model_fingerprint is not None and not force:
            direction.check_fits(model_fingerprint, str(path))
        return direction

    def check_fits(self, model_fingerprint: str, name: str = "this direction") -> None:
        """Raise SteeringError if it was fitted on a model with other weights."""
        if self.model_fingerprint != model_fingerprint:
            raise SteeringError(
                f"{name} was fitted on another model (fingerprint {self.model_fingerprint}, this "
                f"one has {model_fingerprint}); fit it on this model, or force it"
            )
