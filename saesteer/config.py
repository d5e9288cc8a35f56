"""The configuration of a run: what stands in its config.toml, and in `saesteer train FILE`.

Every table of the file is a dataclass here; the text below a field is its help on the command line.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

from saesteer.core import tables
from saesteer.core.files import written_aside
from saesteer.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """The language model."""

    id: str = "planted"
    """Hugging Face id, a local folder, or "planted" for the embedded model."""
    revision: str | None = None
    """Commit, tag or branch on the Hub."""
    dtype: str | None = None
    """float32, bfloat16, float16 or float64; by default as the weights were saved."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, cuda:1, mps."""
    trust_remote_code: bool = False
    """Run the model repository's own Python code."""


@dataclass(frozen=True)
class TextConfig:
    """The text whose activations are cached."""

    source: str = ""
    """A txt, jsonl or parquet file, a folder of them, or a `datasets` name."""
    split: str = "train"
    """Split of a `datasets` name."""
    column: str = "text"
    """Column that holds the text (jsonl, parquet, `datasets`)."""
    document_separator: str = "<|endoftext|>"
    """What stands between two documents of a txt file."""


@dataclass(frozen=True)
class CacheConfig:
    """Which activations are cached, and how."""

    hook_point: str = ""
    """Where in the model: layers.N.resid_pre, resid_post, attn_out or mlp_out, N from 0."""
    tokens: int = 1_000_000
    """How many tokens to cache."""
    context_size: int = 128
    """Tokens a context."""
    dtype: str = "float16"
    """float16, bfloat16 or float32 on disk."""
    batch_size: int | None = None
    """Contexts a forward pass; found by itself where not given."""
    held_out: float = 0.05
    """Share of the contexts, the last ones, that training never sees; evaluation uses them."""
    also: tuple[str, ...] = ()
    """More hook points to cache in the same pass."""


@dataclass(frozen=True)
class SaeConfig:
    """The sparse autoencoder."""

    source: str | None = None
    """An SAE that someone else trained: release/id, Hub repo or folder. Then nothing is trained."""
    architecture: str = "batchtopk"
    """topk, batchtopk, matryoshka, jumprelu, gated or standard."""
    d_sae: int = 2048
    """Number of features."""
    k: int = 16
    """Features that fire on a token: topk; on average: batchtopk, matryoshka."""
    sparsity: float | None = None
    """Weight of the penalty on what fires: jumprelu (L0), gated and standard (L1)."""
    widths: tuple[int, ...] = ()
    """Ends of matryoshka's nested dictionaries, d_sae last; by default 1/16, 1/8, … of it."""
    hook_point_out: str = ""
    """Makes it a transcoder: it reads at cache.hook_point and predicts what is at this one."""
    skip: bool = False
    """A transcoder that also has a linear path past its features."""


@dataclass(frozen=True)
class RowsConfig:
    """Which tokens' activations are trained on, and where they come from."""

    live: bool = False
    """Straight from the model through a shuffled buffer: nothing is cached on disk."""
    buffer: int = 512
    """Contexts a block of that buffer, which mixes two blocks at a time."""
    special_tokens: bool = False
    """Train on BOS, EOS and padding too."""
    max_norm: float | None = None
    """Leave out tokens whose norm is more than so many times the median (cached ones only)."""


@dataclass(frozen=True)
class TrainConfig:
    """How the sparse autoencoder is trained."""

    tokens: int = 4_000_000
    """Tokens to train on; more than are cached means several passes, each in another order."""
    batch_size: int = 4096
    """Tokens a step, over all processes."""
    lr: float = 1e-3
    """Peak learning rate of Adam."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    decay: float = 0.2
    """Share of the steps, the last ones, over which it falls to 0."""
    sparsity_warmup: float = 0.1
    """Share of the steps over which the penalty on what fires rises."""
    aux: float = 1 / 32
    """Weight of the loss that lets dead features explain what is left (AuxK)."""
    dead_after: int | None = None
    """Tokens without firing after which a feature is dead; by default 5% of all, 10 M at most."""
    encoder_init: str = "fitted"
    """The encoder's first size: fitted (its first code explains most), or unit."""
    b_dec_init: str = "mean"
    """Where the decoder's bias starts: mean or geometric_median of the activations."""
    products: str = "auto"
    """What large products are made in: float32, bfloat16, auto (as the hardware gains), or float64
    for all of training (slow, and the same SAE on every machine)."""
    seed: int = 0
    """Seed of the weights and, unless order_seed is given, of the order of the tokens."""
    order_seed: int | None = None
    """Seed of the order of the tokens."""
    share: str = "rows"
    """What processes of torchrun share: rows of a batch, or features (for huge dictionaries)."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    log_to: tuple[str, ...] = ()
    """Where else to log: tensorboard, wandb."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""


@dataclass(frozen=True)
class SweepConfig:
    """What `saesteer sweep` varies: every combination of these is trained on one stream."""

    architecture: tuple[str, ...] = ()
    """As in [sae]; empty: what stands there."""
    d_sae: tuple[int, ...] = ()
    """As in [sae]."""
    k: tuple[int, ...] = ()
    """As in [sae]."""
    sparsity: tuple[float, ...] = ()
    """As in [sae]."""
    lr: tuple[float, ...] = ()
    """As in [train]."""
    seed: tuple[int, ...] = ()
    """As in [train]; the order of the tokens is one for all."""


@dataclass(frozen=True)
class Config:
    """Everything that makes a run."""

    run: str = ""
    """The run folder."""
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    sae: SaeConfig = field(default_factory=SaeConfig)
    rows: RowsConfig = field(default_factory=RowsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)


def read(path: Path) -> Config:
    """Read a TOML file.

    Raises:
        ConfigError: the file is missing or not TOML, or has a table, key or type that is unknown.
    """
    found: Config = tables.build(Config, tables.read(path), str(path))
    return found


def write(path: Path, config: Config) -> None:
    """Write a configuration as TOML, aside and renamed; `read` gives it back."""
    with written_aside(path) as aside:
        aside.write_text(tables.written(dataclasses.asdict(config)), encoding="utf-8")


def check_ranges(config: Config) -> None:
    """Refuse figures that nothing could be made with.

    Raises:
        ConfigError: names the key, its value and its range.
    """
    cache, sae, train = config.cache, config.sae, config.train
    for key, value, low, high in (
        ("cache.tokens", cache.tokens, 1, math.inf),
        ("cache.context_size", cache.context_size, 2, math.inf),
        ("cache.held_out", cache.held_out, 1e-9, 0.9),
        ("sae.d_sae", sae.d_sae, 1, math.inf),
        ("sae.k", sae.k, 1, math.inf),
        ("train.tokens", train.tokens, 1, math.inf),
        ("train.batch_size", train.batch_size, 1, math.inf),
        ("train.lr", train.lr, 1e-12, 1e3),
        ("train.warmup", train.warmup, 0, 1),
        ("train.decay", train.decay, 0, 1),
        ("train.sparsity_warmup", train.sparsity_warmup, 0, 1),
        ("train.aux", train.aux, 0, math.inf),
        ("train.seed", train.seed, 0, 2**63 - 1),
        ("rows.buffer", config.rows.buffer, 1, math.inf),
        ("train.log_every", train.log_every, 1, math.inf),
        ("train.checkpoint_every", train.checkpoint_every, 1, math.inf),
    ):
        if not low <= value <= high:  # also where the value is nan
            most = "" if high == math.inf else f" and at most {high:g}"
            raise ConfigError(f"{key} is {value:g}; expected at least {low:g}{most}")
    if train.share not in ("rows", "features"):
        raise ConfigError(f"train.share is {train.share!r}; expected 'rows' or 'features'")
    if config.rows.max_norm is not None and not config.rows.max_norm >= 1:
        raise ConfigError(
            f"rows.max_norm is {config.rows.max_norm:g}; expected 1 or more, such as 10"
        )
    if config.rows.live and (config.rows.max_norm is not None or cache.also):
        key = "cache.also" if cache.also else "rows.max_norm"
        raise ConfigError(f"{key} needs cached activations; set rows.live to false")
