"""What a run folder holds, opened part by part. `saesteer.run` says what is where in it."""

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from saesteer import config as configuration
from saesteer.config import Config
from saesteer.core.files import stamp
from saesteer.errors import ConfigError, IndexingError, RunError, SaeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from saesteer.core.model import HookPoint
    from saesteer.core.sae import Sae
    from saesteer.core.shards import Shards
    from saesteer.features.search import Index


class RunFolder:
    """The folder of a run: its model, SAE, index and activations, each loaded when it is needed.

    model_of: another run, whose model and tokenizer this one uses; None: it loads its own.
    """

    def __init__(self, path: Path, config: Config, *, model_of: "RunFolder | None" = None):
        self.path = path
        self.config = config
        self._model_of = model_of

    @classmethod
    def open(cls, path: str | Path, *, device: str | None = None, dtype: str | None = None) -> Self:
        """Open a run folder that exists; `device` and `dtype` override its configuration.

        Raises:
            RunError: there is no run at `path`.
            ConfigError: its config.toml is damaged.
        """
        path = Path(path)
        if not (path / "config.toml").is_file():
            raise RunError(
                f"no run at {path} (it has no config.toml); make one with "
                f"`saesteer train FILE.toml` or `saesteer new {path} --sae … --model …`"
            )
        config = configuration.read(path / "config.toml")
        model = dataclasses.replace(
            config.model, device=device or config.model.device, dtype=dtype or config.model.dtype
        )
        return cls(path, dataclasses.replace(config, model=model))

    @classmethod
    def create(cls, config: Config) -> Self:
        """Make a run folder for a configuration, or open the one that is there with it.

        Raises:
            ConfigError: the configuration names no run folder, text or hook point, a figure in it
                is out of range, or the folder holds an SAE that someone else trained.
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
        if (path / "config.toml").exists():
            before = configuration.read(path / "config.toml")
            if before.sae.source is not None:
                raise ConfigError(
                    f"{path} holds an SAE that someone else trained; train into another folder"
                )
        else:
            configuration.write(path / "config.toml", config)
        return cls(path, config)

    def save_config(self) -> None:
        """Keep the configuration that made what is now in the folder.

        `create` leaves an older one as it is: a stage that is refused must not change the run.
        """
        configuration.write(self.path / "config.toml", self.config)

    @classmethod
    def from_sae(
        cls,
        path: str | Path,
        sae: str,
        model: str,
        *,
        revision: str | None = None,
        force: bool = False,
    ) -> Self:
        """Make a run from an SAE that someone else trained; a copy of it is kept in the run.

        Args:
            sae: SAELens "release/id", a Hub repository, or a folder (SAELens or sparsify format).
            model: Hugging Face id or folder of the model that it was trained on.
            force: take it although it names another model.

        Raises:
            RunError: there is a run already.
            SaeError: the SAE cannot be read, or does not belong to this model.
        """
        from saesteer.core.sae import load_sae
        from saesteer.core.sae_fits import check_fits

        path = Path(path)
        if (path / "config.toml").exists():
            raise RunError(f"{path} is a run already; choose another folder, or remove it")
        loaded = load_sae(sae)
        config = Config(
            run=str(path),
            model=configuration.ModelConfig(id=model, revision=revision),
            cache=configuration.CacheConfig(
                hook_point=str(loaded.hook_point), context_size=loaded.context_size or 128
            ),
            sae=configuration.SaeConfig(
                source=sae,
                architecture=loaded.architecture,
                d_sae=loaded.d_sae,
                k=loaded.k or 0,
            ),
        )
        run = cls(path, config)
        check_fits(loaded, run.model, loaded.hook_point, model_id=model, force=force)
        if force:  # from now on it belongs to this model
            loaded = dataclasses.replace(loaded, model_id=model)
        loaded.save(path / "sae")
        configuration.write(path / "config.toml", config)
        return run

    @classmethod
    def from_export(cls, path: str | Path, folder: str | Path) -> Self:
        """Make a run of an index alone, from a Neuronpedia export: see `neuronpedia_import`.

        Raises:
            RunError: there is a run already. IndexingError: it is no such export.
        """
        from saesteer.features import neuronpedia_import

        path = Path(path)
        if (path / "config.toml").exists():
            raise RunError(f"{path} is a run already; choose another folder, or remove it")
        path.mkdir(parents=True, exist_ok=True)
        neuronpedia_import.load(Path(folder), path / "features.sqlite")
        run = cls(path, Config(run=str(path)))
        model = run.index.meta.get("model_id") or ""
        run.config = dataclasses.replace(run.config, model=configuration.ModelConfig(id=model))
        run.save_config()
        return run

    @cached_property
    def _loaded(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        from saesteer.core.model import load_model

        if self._model_of is not None:
            return self._model_of._loaded
        about = self.config.model
        return load_model(
            about.id,
            revision=about.revision,
            device=about.device,
            dtype=about.dtype,
            trust_remote_code=about.trust_remote_code,
        )

    @property
    def model(self) -> "PreTrainedModel":
        """The language model, as Hugging Face loads it."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Its tokenizer."""
        return self._loaded[1]

    @property
    def hook_point(self) -> "HookPoint":
        """Where the SAE reads and writes."""
        from saesteer.core.model import HookPoint

        return HookPoint.parse(self.config.cache.hook_point)

    @cached_property
    def sae(self) -> "Sae":
        """The SAE, checked against the model.

        Raises:
            SaeError: there is none yet, or it belongs to another model.
        """
        from saesteer.core.sae import load_sae
        from saesteer.core.sae_fits import check_fits

        if not (self.path / "sae").is_dir():
            raise SaeError(f"{self.path} has no SAE yet; run `saesteer train {self.path}`")
        sae = load_sae(self.path / "sae")
        check_fits(sae, self.model, self.hook_point, model_id=self.config.model.id)
        return sae.to(self.model.device)

    @cached_property
    def index(self) -> "Index":
        """The feature index.

        Raises:
            IndexingError: there is none yet, it is damaged, or was made of another SAE than the one
                in the folder.
        """
        from saesteer.features.search import Index

        if not (self.path / "features.sqlite").exists():
            raise IndexingError(
                f"{self.path} has no feature index; run `saesteer index {self.path}`"
            )
        index = Index.open(self.path / "features.sqlite")
        # Neither an index of 0.1.0 nor one made from another program's export has a stamp.
        made_for = index.meta.get("sae_stamp")
        if made_for and (self.path / "sae").is_dir() and made_for != self.sae_stamp():
            index.close()
            raise IndexingError(
                f"the index {index.path} was made for another SAE (stamp {made_for[:12]}) than the "
                f"one in {self.path / 'sae'} (stamp {self.sae_stamp()[:12]}); run "
                f"`saesteer index {self.path}` again"
            )
        return index

    def sae_stamp(self) -> str:
        """What tells the SAE in the folder from another, without loading it: see `files.stamp`.

        Raises:
            RunError: a file of it is missing.
        """
        return stamp(self.path / "sae" / name for name in ("cfg.json", "sae_weights.safetensors"))

    @cached_property
    def shards(self) -> "Shards":
        """The cached activations.

        Raises:
            CacheError: there are none yet, or they are damaged.
        """
        from saesteer.core.shards import Shards

        return Shards(self.path / "activations")

    def refresh(self) -> None:
        """Forget what was read from the folder; the next use reads it again."""
        for name in ("shards", "sae", "index"):
            self.__dict__.pop(name, None)

    @property
    def special_ids(self) -> frozenset[int]:
        """Token ids that are not text: BOS, EOS, padding and the like."""
        from saesteer.core.model import special_token_ids

        return special_token_ids(self.model, self.tokenizer)
