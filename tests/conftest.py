"""Fixtures shared by the tests: a small run on the embedded model."""

import os
import warnings
from pathlib import Path

import pytest

# Nothing here may reach for a network; transformers and the Hub client then fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Tiny models are no faster on two threads, and wait for each other where the machine is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def stories(tmp_path_factory) -> Path:
    """A text file of about 45,000 words of the planted language."""
    from saesteer.world import corpus

    path = tmp_path_factory.mktemp("text") / "stories.txt"
    told = (corpus.text(story.words) for story in corpus.stories(600, seed=3))
    path.write_text(f"\n{corpus.DOCUMENT_SEPARATOR}\n".join(told))
    return path


@pytest.fixture(scope="session")
def small_config(stories, tmp_path_factory):
    """A configuration that takes seconds: the embedded model, 128 features."""
    from saesteer import config

    return config.Config(
        run=str(tmp_path_factory.mktemp("runs") / "small"),
        text=config.TextConfig(source=str(stories)),
        cache=config.CacheConfig(
            hook_point="layers.1.resid_post", tokens=30_000, context_size=64, dtype="float32"
        ),
        sae=config.SaeConfig(architecture="topk", d_sae=128, k=8),
        train=config.TrainConfig(tokens=60_000, batch_size=1024, lr=3e-3, log_every=10),
    )


@pytest.fixture(scope="session")
def small_run(small_config):
    """A run with an SAE and an index, shared by the tests: read it, don't change it."""
    from saesteer import fitting, stages
    from saesteer.run import Run

    run = Run.create(small_config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitting.train(run)
        stages.index(run)
    return run
