"""The files of an SAE folder: read whole or refused in one line, written together or not at all."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saesteer.core.files import sha256
from saesteer.errors import SaeError

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
SPARSITY = "sparsity.safetensors"

# Not in `metadata`, which sae-lens carries over to folders that hold other weights.
CHECKSUM = "saesteer_weights_sha256"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; SaeError in one line where it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SaeError(
            f"{path} is missing; the SAE folder is incomplete: download it again"
        ) from None
    except (OSError, ValueError) as error:
        raise SaeError(f"{path} can't be read ({one_line(error)}); download it again") from error
    if not isinstance(value, dict):
        raise SaeError(f"{path} is no JSON object; download or train the SAE again")
    return value


def read_tensors(path: Path, checksum: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Args:
        checksum: SHA-256 that the file must have, in hexadecimal; None where it is not known.

    Raises:
        SaeError: it is missing, truncated, or not the file that the checksum was taken of.
    """
    if not path.exists():
        raise SaeError(f"{path} is missing; the SAE folder is incomplete: download it again")
    try:
        tensors = load_file(path)
        same = checksum is None or sha256(path) == checksum
    except (OSError, SafetensorError, ValueError) as error:
        raise SaeError(
            f"{path} is truncated or damaged ({one_line(error)}); download or train it again"
        ) from error
    if not same:
        raise SaeError(
            f"{path} is not the file that was saved: its SHA-256 is not the one in {CONFIG}; "
            f"download or train it again, or take {CHECKSUM} out of {CONFIG} if you changed the "
            "weights yourself"
        )
    return tensors


def read_sparsity(folder: Path) -> Tensor | None:
    """log10 of each latent's density [d_sae], as sae-lens saves it; None where there is none."""
    path = folder / SPARSITY
    if not path.exists():
        return None
    found = read_tensors(path).get("sparsity")
    if found is None:
        raise SaeError(f"{path} holds no 'sparsity'; download it again, or remove the file")
    return found.detach().float().clone()


def one_line(error: BaseException) -> str:
    """An exception's message on one line, cut to 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def write_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], sparsity: Tensor | None
) -> None:
    """Write an SAE folder: beside it, then renamed. The weights' checksum goes into the config.

    Raises:
        SaeError: the folder cannot be written, or the disk is full.
    """
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        aside.mkdir(parents=True)
        save_file(dict(tensors), aside / WEIGHTS)
        if sparsity is not None:
            save_file({"sparsity": sparsity}, aside / SPARSITY)
        whole = {**config, CHECKSUM: sha256(aside / WEIGHTS)}
        (aside / CONFIG).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        for written in aside.iterdir():
            with written.open("rb+") as file:
                os.fsync(file.fileno())
        # All files change together: a folder with one old and one new would load and be wrong.
        if folder.exists():
            folder.rename(old)
        try:
            aside.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    except (OSError, SafetensorError) as error:
        raise SaeError(
            f"cannot write {folder}: {one_line(error)}; free some space or choose a folder that "
            "you can write to"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
