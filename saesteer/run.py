"""The run: a folder that joins text, activations, an SAE, its index and what is steered with it.

    config.toml       the configuration that made it
    activations/      shards of cached activations, with their tokens
    sae/              the SAE, in SAELens format
    checkpoints/      what an exact resume needs
    metrics.jsonl     one JSON object a logged step
    evaluation.json   what `stages.evaluate` measured last
    features.sqlite   the feature index
    steers/           saved directions

A run opens and uses what is there; `saesteer.stages` fills it. Nothing heavy is loaded before it
is needed: opening a run and searching its index imports no torch.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saesteer import config as configuration
from saesteer.config import Config
from saesteer.errors import ConfigError, IndexingError, RunError, SaeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from saesteer.core.model import HookPoint
    from saesteer.core.sae import Sae
    from saesteer.core.shards import Shards
    from saesteer.directions import Direction
    from saesteer.features.search import Hit, Index
    from saesteer.steering.edits import Edit
    from saesteer.steering.receipt import Receipt

Strength = str | float


class Run:
    """A run folder. Make one with `Run.create`, `Run.from_sae` or `Run.open`.

    model_of: another run, whose model and tokenizer this one uses; None: it loads its own.
    """

    def __init__(self, path: Path, config: Config, *, model_of: "Run | None" = None):
        self.path = path
        self.config = config
        self._model_of = model_of

    @classmethod
    def open(
        cls, path: str | Path, *, device: str | None = None, dtype: str | None = None
    ) -> "Run":
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
    def create(cls, config: Config) -> "Run":
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
    ) -> "Run":
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
            IndexingError: there is none yet, or it is damaged.
        """
        from saesteer.features.search import Index

        if not (self.path / "features.sqlite").exists():
            raise IndexingError(
                f"{self.path} has no feature index; run `saesteer index {self.path}`"
            )
        return Index.open(self.path / "features.sqlite")

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

    def search(self, query: str, limit: int = 10) -> "list[Hit]":
        """Features by keyword, best first; imports no torch."""
        return self.index.search(query, limit)

    def edits(
        self,
        *,
        clamp: Mapping[int, Strength] | None = None,
        add: Mapping[int, Strength] | None = None,
        vector: "Mapping[str, Strength] | None" = None,
    ) -> "list[Edit]":
        """Edits with this run's names filled in: clamps, then decoder rows, then vectors.

        Args:
            clamp: feature → what to set it to: "8x" is 8 × its max_act, a number is raw.
            add: feature → how much of its decoder direction to add, in the same units, or in
                those of `saesteer.units`: "0.5n" and "kl0.1".
            vector: name of a saved direction → how many times it is added, or in those units.

        Raises:
            FeatureError: no such feature, or a strength that is none.
            IndexingError: "8x" without an index.
            RunError: no such direction.
        """
        from saesteer import units
        from saesteer.steering.edits import Add, Clamp

        found: list[Edit] = [
            Clamp(self.sae, feature, units.of_feature(self, feature, value))
            for feature, value in (clamp or {}).items()
        ]
        for feature, value in (add or {}).items():
            row, point = self.sae.direction(feature), self.sae.write_point
            times = units.added(self, row, point, value, feature=feature)
            found.append(Add(row, times, point))
        for name, value in (vector or {}).items():
            direction = self.load_vector(name)
            times = units.added(self, direction.vector, direction.point, value)
            found.append(Add(direction.vector, times, direction.point))
        return found

    @contextmanager
    def steer(
        self,
        clamp: Mapping[int, Strength] | None = None,
        add: Mapping[int, Strength] | None = None,
        vector: Mapping[str, Strength] | None = None,
        *,
        edits: "Sequence[Edit]" = (),
    ) -> "Iterator[Receipt]":
        """Steer `run.model` while the context lasts; the arguments are those of `edits`.

        Raises:
            SteeringError: nothing to steer with; NothingSteeredError: no token was touched.
        """
        from saesteer.steering.engine import steer

        every = [*edits, *self.edits(clamp=clamp, add=add, vector=vector)]
        with steer(self.model, every, tokenizer=self.tokenizer) as receipt:
            yield receipt

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 40,
        temperature: float = 1.0,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Continue a prompt (→ str) or several (→ list of str); see `core.generate.write`."""
        from saesteer.core.generate import write

        written = write(
            self.model,
            self.tokenizer,
            [prompts] if isinstance(prompts, str) else prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            prepend_bos=self.sae.prepend_bos,
        )
        texts = [one.text for one in written]
        return texts[0] if isinstance(prompts, str) else texts

    def load_vector(self, name: str) -> "Direction":
        """A direction that `fit_vector` kept.

        Raises:
            RunError: there is none of that name.
            SteeringError: it was fitted on another model.
        """
        from saesteer.core.model import fingerprint
        from saesteer.directions import Direction

        path = self.vector_path(name)
        if not path.exists():
            known = sorted(p.stem for p in path.parent.glob("*.safetensors") if "." not in p.stem)
            raise RunError(
                f"{self.path} has no vector {name!r}"
                + (f"; it has {', '.join(known)}" if known else "")
                + f"; fit one with `saesteer vector {self.path} --pairs FILE --name {name}`"
            )
        return Direction.load(path, model_fingerprint=fingerprint(self.model))

    def vector_path(self, name: str) -> Path:
        """Where the direction of that name is kept. RunError where it cannot be a file's name."""
        if not name or Path(name).name != name or name.startswith("."):
            raise RunError(f"{name!r} is not a name for a vector; use letters, digits and dashes")
        return self.path / "steers" / f"{name}.safetensors"

    @property
    def special_ids(self) -> frozenset[int]:
        """Token ids that are not text: BOS, EOS, padding and the like."""
        from saesteer.core.model import special_token_ids

        return special_token_ids(self.model, self.tokenizer)
