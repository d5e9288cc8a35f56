"""The configuration of a run: what stands in its config.toml, and in `saesteer train FILE`.

Every table of the file is a dataclass here; the text below a field is its help on the command line.
"""

import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saesteer.core.files import written_aside
from saesteer.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class ModelConfig:
    """The language model."""

    id: str = "planted"
    """Hugging Face id, a local folder, or "planted" for the embedded model."""
    revision: str | None = None
    """Commit, tag or branch on the Hub."""
    dtype: str | None = None
    """float32, bfloat16 or float16; by default as the weights were saved."""
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


@dataclass(frozen=True)
class SaeConfig:
    """The sparse autoencoder."""

    source: str | None = None
    """An SAE that someone else trained: release/id, Hub repo or folder. Then nothing is trained."""
    architecture: str = "batchtopk"
    """topk or batchtopk."""
    d_sae: int = 2048
    """Number of features."""
    k: int = 16
    """Features that fire on a token (on average, for batchtopk)."""


@dataclass(frozen=True)
class TrainConfig:
    """How the sparse autoencoder is trained."""

    tokens: int = 4_000_000
    """Tokens to train on; more than are cached means several passes, each in another order."""
    batch_size: int = 4096
    """Tokens a step."""
    lr: float = 1e-3
    """Peak learning rate of Adam."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    decay: float = 0.2
    """Share of the steps, the last ones, over which it falls to 0."""
    seed: int = 0
    """Seed of the weights and of the order of the tokens."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""


@dataclass(frozen=True)
class Config:
    """Everything that makes a run."""

    run: str = ""
    """The run folder."""
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    sae: SaeConfig = field(default_factory=SaeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def read(path: Path) -> Config:
    """Read a TOML file.

    Raises:
        ConfigError: the file is missing or not TOML, or has a table, key or type that is unknown.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}; configs/ holds examples") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
    return _build(Config, values, str(path))


def write(path: Path, config: Config) -> None:
    """Write a configuration as TOML, aside and renamed; `read` gives it back."""
    lines: list[str] = []
    tables = {}
    for key, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            tables[key] = value
        else:
            lines.append(f"{key} = {_toml(value)}")
    for name, table in tables.items():
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {_toml(value)}" for key, value in table.items() if value is not None]
    with written_aside(path) as aside:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")


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
        ("sae.k", sae.k, 1, sae.d_sae),
        ("train.tokens", train.tokens, 1, math.inf),
        ("train.batch_size", train.batch_size, 1, math.inf),
        ("train.lr", train.lr, 1e-12, 1e3),
        ("train.warmup", train.warmup, 0, 1),
        ("train.decay", train.decay, 0, 1),
        ("train.seed", train.seed, 0, 2**63 - 1),
        ("train.log_every", train.log_every, 1, math.inf),
        ("train.checkpoint_every", train.checkpoint_every, 1, math.inf),
    ):
        if not low <= value <= high:  # also where the value is nan
            most = "" if high == math.inf else f" and at most {high:g}"
            raise ConfigError(f"{key} is {value:g}; expected at least {low:g}{most}")


def _build(kind: type, values: dict[str, Any], where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(
                f"{where}: unknown key {key!r}{did_you_mean(key, fields)}; "
                f"expected one of {', '.join(fields)}"
            )
        expected: Any = fields[key].type
        if dataclasses.is_dataclass(expected):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{where}: {key!r} is a table: write [{key}] on a line of its own"
                )
            arguments[key] = _build(expected, value, f"{where} [{key}]")  # type: ignore[arg-type]
            continue
        if expected is float and type(value) is int:
            value = float(value)
        # bool is an int to isinstance, but `tokens = true` is a mistake
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            name = getattr(expected, "__name__", str(expected).replace(" | None", ""))
            raise ConfigError(f"{where}: {key} = {value!r} is not a {name}")
        arguments[key] = value
    return kind(**arguments)


def _toml(value: str | bool | int | float) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        escaped = "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped)
        return f'"{escaped}"'
    return repr(value)
