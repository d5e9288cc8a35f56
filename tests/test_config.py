"""config.toml: written and read back whole; mistakes are named with the nearest right word."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer import config
from saesteer.config import Config
from saesteer.errors import ConfigError

texts = st.text(st.characters(codec="utf-8"), max_size=30)


@settings(max_examples=50, derandomize=True)
@given(run=texts, separator=texts, lr=st.floats(0, 1), tokens=st.integers(1, 10**15))
def test_what_is_written_is_read_back(tmp_path_factory, run, separator, lr, tokens):
    made = Config(
        run=run,
        text=config.TextConfig(source="a\\b\"c'", document_separator=separator),
        train=config.TrainConfig(lr=lr, tokens=tokens),
        model=config.ModelConfig(trust_remote_code=True, revision="main"),
    )
    path = tmp_path_factory.mktemp("config") / "config.toml"
    config.write(path, made)
    assert config.read(path) == made


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.toml")), ids=lambda p: p.name)
def test_every_example_is_read_and_complete(path):
    read = config.read(path)
    assert read.run and read.text.source and read.cache.hook_point


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnu = 'x'", r"unknown key 'rnu' \(did you mean 'run'\?\)"),
        ("[cache]\nhook_piont = 'x'", r"\[cache\]: unknown key 'hook_piont' .*'hook_point'"),
        ("[train]\nlr = 'high'", r"lr = 'high' is not a float"),
        ("[train]\ntokens = true", r"tokens = True is not a int"),
        ("[train]\ntokens = 1.5", r"tokens = 1.5 is not a int"),
        ("model = 'gpt2'", r"'model' is a table"),
        ("run = ", r"cannot be read as TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.read(path)


def test_a_missing_file_and_bytes_that_are_no_text_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no configuration file"):
        config.read(tmp_path / "none.toml")
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.read(tmp_path / "c.toml")


def test_an_int_where_a_float_is_meant_is_fine(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[train]\nlr = 1")
    assert config.read(path).train.lr == 1.0
    assert isinstance(config.read(path).train.lr, float)


def test_every_field_explains_itself():
    """The text below a field is its --help."""
    source = Path(config.__file__).read_text()
    for kind in (
        config.ModelConfig,
        config.TextConfig,
        config.CacheConfig,
        config.SaeConfig,
        config.RowsConfig,
        config.TrainConfig,
        config.SweepConfig,
    ):
        for field in dataclasses.fields(kind):
            line = next(i for i, x in enumerate(source.split("\n")) if f"    {field.name}: " in x)
            assert '"""' in source.split("\n")[line + 1], (kind, field.name)
