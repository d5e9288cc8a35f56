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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saesteer import named, run_search
from saesteer.named import Name, Strength
from saesteer.run_folder import RunFolder

if TYPE_CHECKING:
    from saesteer.directions import Direction
    from saesteer.features.reading import TokenReading
    from saesteer.features.search import Hit
    from saesteer.steering.edits import Edit
    from saesteer.steering.receipt import Receipt

# Matches whose effect is measured where the order by effect is asked for.
_MEASURED = 50


class Run(RunFolder):
    """A run folder and what is done with it. Make one with `create`, `from_sae` or `open`."""

    def search(
        self, query: str, limit: int = 10, *, sort: Literal["match", "effect"] = "match"
    ) -> "list[Hit]":
        """Features by keyword, best first; imports no torch.

        Args:
            query: in the language of `features.query`.
            sort: "effect" puts first what also causes what it fires on. Of the best matches those
                not measured yet are measured then, which needs the model.

        Raises:
            IndexingError: no index, a damaged one, or one of another SAE.
        """
        index = self.index
        if sort == "effect" and not index.meta.get("imported_from"):
            from saesteer.features.store import measured

            first = index.search(query, max(limit, _MEASURED))
            known = measured(index.path)
            if new := [hit.id for hit in first if hit.id not in known]:
                from saesteer.enrich import effects

                effects(self, new)
        return index.search(query, limit, sort=sort)

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
        """A direction that `fit_vector` kept, by name, or a .safetensors file of one.

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
