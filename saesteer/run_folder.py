"""What a run folder is made from, and what in it must fit together. `saesteer.run` opens it."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from saesteer import config as configuration
from saesteer.config import Config
from saesteer.core.files import stamp
from saesteer.errors import ConfigError, IndexingError, RunError, SaeError

if TYPE_CHECKING:
    from saesteer.core.sae import Sae
    from saesteer.features.search import Index


def opened(path: Path, *, device: str | None, dtype: str | None) -> Config:
    """The configuration of a run that exists; `device` and `dtype` override it.

    Raises:
        RunError: there is no run at `path`.
        ConfigError: its config.toml is damaged.
    """
    if not (path / "config.toml").is_file():
        raise RunError(
            f"no run at {path} (it has no config.toml); make one with "
            f"`saesteer train FILE.toml` or `saesteer new {path} --sae … --model …`"
        )
    config = configuration.read(path / "config.toml")
    model = dataclasses.replace(
        config.model, device=device or config.model.device, dtype=dtype or config.model.dtype
    )
    return dataclasses.replace(config, model=model)


def created(config: Config) -> Path:
    """The run folder of a configuration, made where it isn't there.

    Raises:
        ConfigError: the configuration names no run folder, text or hook point, a figure in it is
            out of range, or the folder holds an SAE that someone else trained.
        RunError: the folder cannot be written.
    """
    for value, name in (
        (config.run, "run"),
        (config.text.source, "text.source"),
        (config.cache.hook_point, "cache.hook_point"),
    ):
        if not value:
            raise ConfigError(f"the configuration lacks {name}; see configs/ for examples")
    configuration.check_ranges(config)
    path = Path(config.run)
    if not (path / "config.toml").exists():
        configuration.write(path / "config.toml", config)
    elif configuration.read(path / "config.toml").sae.source is not None:
        raise ConfigError(
            f"{path} holds an SAE that someone else trained; train into another folder"
        )
    return path


def empty(path: Path) -> Path:
    """A path where there is no run. RunError where there is one."""
    if (path / "config.toml").exists():
        raise RunError(f"{path} is a run already; choose another folder, or remove it")
    return path


def borrowed(path: Path, sae: "Sae", source: str, model: str, revision: str | None) -> Config:
    """The configuration of a run around an SAE that someone else trained."""
    return Config(
        run=str(path),
        model=configuration.ModelConfig(id=model, revision=revision),
        cache=configuration.CacheConfig(
            hook_point=str(sae.hook_point), context_size=sae.context_size or 128
        ),
        sae=configuration.SaeConfig(
            source=source, architecture=sae.architecture, d_sae=sae.d_sae, k=sae.k or 0
        ),
    )


def imported(path: Path, export: Path) -> Config:
    """Make a feature index of a Neuronpedia export; the configuration of a run around it.

    Raises:
        IndexingError: it is no such export.
    """
    from saesteer.features import neuronpedia_import

    path.mkdir(parents=True, exist_ok=True)
    neuronpedia_import.load(export, path / "features.sqlite")
    config = Config(run=str(path))
    model = open_index(path).meta.get("model_id") or ""
    return dataclasses.replace(config, model=configuration.ModelConfig(id=model))


def open_index(path: Path) -> "Index":
    """The feature index of a run.

    Raises:
        IndexingError: there is none yet, it is damaged, or was made of another SAE than the one in
            the folder.
    """
    from saesteer.features.search import Index

    if not (path / "features.sqlite").exists():
        raise IndexingError(f"{path} has no feature index; run `saesteer index {path}`")
    index = Index.open(path / "features.sqlite")
    # Neither an index of 0.1.0 nor one made from another program's export has a stamp.
    made_for = index.meta.get("sae_stamp")
    if made_for and (path / "sae").is_dir() and made_for != sae_stamp(path):
        index.close()
        raise IndexingError(
            f"the index {index.path} was made for another SAE (stamp {made_for[:12]}) than the "
            f"one in {path / 'sae'} (stamp {sae_stamp(path)[:12]}); run `saesteer index {path}` "
            "again"
        )
    return index


def check_sae(path: Path) -> None:
    """SaeError where a run has no SAE; of an imported run it says what that can't do."""
    if (path / "sae").is_dir():
        return
    if source := _imported_from(path):
        raise SaeError(
            f"{path} was imported to be looked at ({source}): it has no SAE, so nothing can be "
            "measured, read or steered with it; search it by words, in order of match, or make a "
            "run of the SAE itself with `saesteer new OTHER --sae … --model …` and index that"
        )
    raise SaeError(f"{path} has no SAE yet; run `saesteer train {path}`")


def _imported_from(path: Path) -> str | None:
    """The export that a run's index was made of; None of any other run."""
    try:
        index = open_index(path)
    except IndexingError:
        return None
    with index:
        return index.meta.get("imported_from")


def sae_stamp(path: Path) -> str:
    """What tells the SAE in a run from another, without loading it: see `files.stamp`.

    Raises:
        RunError: a file of it is missing.
    """
    return stamp(path / "sae" / name for name in ("cfg.json", "sae_weights.safetensors"))
