"""The run: a folder that joins text, activations, an SAE, its index and what is steered with it.

    config.toml       the configuration that made it
    activations/      shards of cached activations, with their tokens
    sae/              the SAE, in SAELens format
    checkpoints/      what an exact resume needs
    metrics.jsonl     one JSON object a logged step
    evaluation.json   what `stages.evaluate` measured last
    features.sqlite   the feature index
    steers/           saved directions and edits

A run opens and uses what is there; `saesteer.stages` fills it. Nothing heavy is loaded before it
is needed: opening a run and searching its index imports no torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saesteer import config as configuration
from saesteer import named, run_folder, run_search
from saesteer.config import Config
from saesteer.named import Name, Strength

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from saesteer.core.model import HookPoint
    from saesteer.core.sae import Sae
    from saesteer.core.shards import Shards
    from saesteer.directions import Direction
    from saesteer.features.reading import TokenReading
    from saesteer.features.search import Hit, Index
    from saesteer.steering.edits import Edit
    from saesteer.steering.receipt import Receipt


class Run:
    """A run folder and what is done with it. Make one with `create`, `from_sae` or `open`.

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
        """Open a run folder that exists; see `run_folder.opened`."""
        return cls(Path(path), run_folder.opened(Path(path), device=device, dtype=dtype))

    @classmethod
    def create(cls, config: Config) -> "Run":
        """Make a run folder for a configuration, or open the one that is there with it; see
        `run_folder.created`."""
        return cls(run_folder.created(config), config)

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

        path = run_folder.empty(Path(path))
        loaded = load_sae(sae)
        run = cls(path, run_folder.borrowed(path, loaded, sae, model, revision))
        check_fits(loaded, run.model, loaded.hook_point, model_id=model, force=force)
        if force:  # from now on it belongs to this model
            loaded = replace(loaded, model_id=model)
        loaded.save(path / "sae")
        run.save_config()
        return run

    @classmethod
    def from_export(cls, path: str | Path, folder: str | Path) -> "Run":
        """Make a run of an index alone, from a Neuronpedia export; see `run_folder.imported`.

        Raises:
            RunError: there is a run already. IndexingError: it is no such export.
        """
        path = run_folder.empty(Path(path))
        run = cls(path, run_folder.imported(path, Path(folder)))
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

        run_folder.check_sae(self.path)
        sae = load_sae(self.path / "sae")
        check_fits(sae, self.model, self.hook_point, model_id=self.config.model.id)
        return sae.to(self.model.device)

    @cached_property
    def index(self) -> "Index":
        """The feature index; see `run_folder.open_index`."""
        return run_folder.open_index(self.path)

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

    def search(
        self, query: str, limit: int = 10, *, sort: Literal["match", "effect"] = "match"
    ) -> "list[Hit]":
        """Features by keyword, best first; see `run_search.search`."""
        return run_search.search(self, query, limit, sort)

    def like(self, text: str, limit: int = 10) -> "list[Hit]":
        """Features that fire on a text more than elsewhere; see `run_search.like`."""
        return run_search.like(self, text, limit)

    def contrast(
        self, positive: Sequence[str], negative: Sequence[str], limit: int = 10
    ) -> "list[Hit]":
        """Features that tell two sets of texts apart; see `run_search.contrast`."""
        return run_search.contrast(self, positive, negative, limit)

    def near(self, feature: int, limit: int = 10) -> "list[Hit]":
        """Features whose decoder is alike, or that fire with it; see `run_search.near`."""
        return run_search.near(self, feature, limit)

    def read(self, text: str, top: int = 5) -> "list[TokenReading]":
        """What fires on each token of a text; see `run_search.read`."""
        return run_search.read(self, text, top)

    def edits(
        self,
        *,
        clamp: Mapping[int, Strength] | None = None,
        add: Mapping[int, Strength] | None = None,
        vector: Mapping[str, Strength] | None = None,
        project: Mapping[Name, Strength] | None = None,
        rotate: Mapping[tuple[Name, Name], Strength] | None = None,
        force: bool = False,
    ) -> "list[Edit]":
        """Edits with this run's names filled in, in the order of the arguments.

        A direction is a feature (its decoder row), or the name or file of a vector.

        Args:
            clamp: feature → what to set it to: "8x" is 8 × its max_act, a number is raw.
            add: feature → how much of its decoder direction to add, in the same units, or in
                those of `saesteer.units`: "0.5n" and "kl0.1".
            vector: name or file → how many times it is added, or in those units.
            project: direction → what the projection on it is set to, raw; 0 projects it out.
            rotate: two directions → the angle from the first towards the second that their plane
                is turned by: "30deg", or a number of radians; "to30deg" turns to that angle.
            force: take vectors although they were fitted on other weights.

        Raises:
            FeatureError: no such feature, or a strength that is none.
            IndexingError: "8x" without an index.
            RunError: no such vector.
            SteeringError: no angle or projection, directions of two places, another model's.
        """
        return named.edits(
            self,
            clamp=clamp or {},
            add=add or {},
            vector=vector or {},
            project=project or {},
            rotate=rotate or {},
            force=force,
        )

    @contextmanager
    def steer(
        self,
        clamp: Mapping[int, Strength] | None = None,
        add: Mapping[int, Strength] | None = None,
        vector: Mapping[str, Strength] | None = None,
        project: Mapping[Name, Strength] | None = None,
        rotate: Mapping[tuple[Name, Name], Strength] | None = None,
        *,
        edits: "Sequence[Edit]" = (),
    ) -> "Iterator[Receipt]":
        """Steer `run.model` while the context lasts; the arguments are those of `edits`.

        Raises:
            SteeringError: nothing to steer with; NothingSteeredError: no token was touched.
        """
        from saesteer.steering.engine import steer

        given = self.edits(clamp=clamp, add=add, vector=vector, project=project, rotate=rotate)
        with steer(self.model, [*edits, *given], tokenizer=self.tokenizer) as receipt:
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

    def load_vector(self, name: str, *, force: bool = False) -> "Direction":
        """A direction that `vectors.fit` kept, by name, or a .safetensors file of one.

        Raises:
            RunError: there is none of that name.
            SteeringError: it was fitted on another model, and not `force`.
        """
        return named.load_vector(self, name, force=force)

    def load_edits(self, name: str | Path, *, force: bool = False) -> "list[Edit]":
        """Edits that the run keeps, by name, or a file of them: .safetensors, .gguf (llama.cpp,
        repeng) or .pt (lm-eval). They bring their own positions.

        Raises:
            RunError: there is no such name or file.
            SteeringError: it can't be read, or was made for other weights, and not `force`.
        """
        return named.load_edits(self, name, force=force)

    def vector_path(self, name: str) -> Path:
        """Where the direction of that name is kept. RunError where it cannot be a file's name."""
        return named.vector_path(self, name)
