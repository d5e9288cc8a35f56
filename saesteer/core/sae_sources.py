"""Where an SAE comes from: a SAELens or sparsify folder, a SAELens release, a Hub repository."""

import warnings
from pathlib import Path
from typing import Any

from saesteer.core.sae_files import (
    CHECKSUM,
    CONFIG,
    SCALER,
    WEIGHTS,
    one_line,
    read_json,
    read_sparsity,
    read_tensors,
)
from saesteer.core.sae_formats import check_size, from_saelens, hook_point, weights
from saesteer.errors import SaeError, did_you_mean

SPARSIFY_WEIGHTS = "sae.safetensors"


def read(source: str | Path) -> dict[str, Any]:
    """The arguments of `Sae` for a folder, a SAELens "release/id" or a Hub "owner/name[/folder]".

    Raises:
        SaeError: see `load_sae`.
    """
    try:
        return _read(Path(source).expanduser(), str(source))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # A configuration with the right keys and values of the wrong kind.
        raise SaeError(
            f"{source}: its {CONFIG} is malformed ({one_line(error)}); download or train it again"
        ) from error


def _read(folder: Path, name: str) -> dict[str, Any]:
    if folder.is_dir():
        return _read_folder(folder)
    if folder.exists() or folder.is_absolute() or name.startswith(".") or "/" not in name:
        raise SaeError(
            f"no SAE at {name}: expected a folder with {CONFIG}, a SAELens release/id or a Hub "
            "owner/name/folder"
        )
    return _read_remote(name)


def _read_folder(folder: Path) -> dict[str, Any]:
    if (folder / SPARSIFY_WEIGHTS).exists():
        return _from_sparsify(folder)
    if not (folder / CONFIG).exists():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        hint = f"; it holds {', '.join(inner[:5])}: name one of these" if inner else ""
        raise SaeError(f"{folder} has no {CONFIG}: it is no SAE folder{hint or '; check the path'}")
    config = read_json(folder / CONFIG)
    tensors = read_tensors(folder / WEIGHTS, config.get(CHECKSUM))
    if (folder / SCALER).exists():
        config["scaling_factor"] = read_json(folder / SCALER).get("scaling_factor")
    parts = from_saelens(config, tensors, str(folder))
    return {**parts, "log10_density": read_sparsity(folder)}


def _read_remote(name: str) -> dict[str, Any]:
    # Imported here: seconds and hundreds of MB that only a release needs.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import SAE
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

        releases = get_pretrained_saes_directory()
        release, _, sae_id = name.partition("/")
        if release in releases:
            try:
                sae = SAE.from_pretrained(release, sae_id)
            except Exception as error:
                raise SaeError(f"cannot load {name} through sae-lens: {one_line(error)}") from error
            return from_saelens(sae.cfg.to_dict(), dict(sae.state_dict()), name)
    from huggingface_hub import snapshot_download

    repository, sub = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    patterns = [f"{sub}/*", CONFIG, "config.json"] if sub else ["*.json", "*.safetensors"]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=patterns)) / sub
    except Exception as error:
        raise SaeError(
            f"no SAE called {name}{did_you_mean(release, releases)}: it is no local folder, no "
            f"SAELens release, and the Hub answers: {one_line(error)}"
        ) from error
    return _read_folder(folder)


def _from_sparsify(folder: Path) -> dict[str, Any]:
    """The arguments of `Sae` from a folder written by sparsify (EleutherAI).

    Its encoder always takes b_dec from the input (also where sae-lens's converter does not), and
    the folder is named for the module whose output it reads.
    """
    config, tensors = read_json(folder / CONFIG), read_tensors(folder / SPARSIFY_WEIGHTS)
    where = str(folder)
    refused = {
        "transcode": False,
        "skip_connection": False,
        "signed": False,
        "embed_skip": False,
        "gram_lookup": False,
        "activation": "topk",
    }
    for key, plain in refused.items():
        if config.get(key, plain) != plain:
            raise SaeError(
                f"{where} declares {key}={config[key]!r}, which is not reproduced here; "
                "choose another SAE"
            )
    linear = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
    names = {"encoder.bias": "b_enc", "decoder.bias": "b_dec"}
    named = {names.get(key, key): value for key, value in tensors.items() if key not in linear}
    named |= {linear[key]: tensors[key].T for key in linear if key in tensors}
    run = folder.parent / "config.json"
    training = read_json(run) if run.exists() else {}
    parts: dict[str, Any] = {
        "architecture": "topk",
        "hook_point": hook_point(folder.resolve().name, where),
        "model_id": training.get("model"),
        "k": config.get("k"),
        "context_size": training.get("ctx_len"),
        "notes": {"hooked_module": folder.resolve().name},
        **weights(named, "topk", where),
    }
    check_size(parts, {"d_in": config.get("d_in")} if "d_in" in config else {}, where)
    return parts
