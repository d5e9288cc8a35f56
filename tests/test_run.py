"""A run from end to end: trained, or made from an SAE of someone else; misuse is named."""

import dataclasses
import json
import shutil

import pytest
import torch

import saesteer
from saesteer import fitting, stages, units, vectors
from saesteer.core.files import alone
from saesteer.core.hooks import activations
from saesteer.core.model import HookPoint
from saesteer.core.sae import Sae
from saesteer.directions.pairs import read_pairs
from saesteer.effects.damage import Reference
from saesteer.errors import (
    CacheError,
    ConfigError,
    FeatureError,
    HookPointError,
    IndexingError,
    RunError,
    SaeError,
    SaesteerError,
    SteeringError,
    TextError,
)
from saesteer.run import Run
from saesteer.world import corpus
from tests.tiny import WIDTH, tiny_model, tiny_tokenizer

PROMPT = "Story A. Once there was a girl named"


@pytest.fixture
def opened(small_run):
    return Run.open(small_run.path)


@pytest.fixture
def fired(opened):
    """A feature that fires often."""
    return max(range(opened.index.n_features), key=opened.index.max_act)


@pytest.fixture(scope="module")
def borrowed(tmp_path_factory):
    """Folders of a tiny model and of an SAE "trained" on it by someone else, and some text."""
    folder = tmp_path_factory.mktemp("borrowed")
    tiny_model("gpt2").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    w_enc = torch.randn(WIDTH, 64, generator=generator)
    sae = Sae(
        W_enc=w_enc,
        b_enc=torch.zeros(64),
        W_dec=torch.nn.functional.normalize(w_enc.T.contiguous(), dim=1),
        b_dec=torch.zeros(WIDTH),
        architecture="topk",
        k=4,
        hook_point=HookPoint(1, "resid_post"),
        model_id=str(folder / "model"),
        context_size=16,
    )
    sae.save(folder / "sae")
    words = "the boy saw a ship and the old dog heard the rain in the house ."
    (folder / "text.txt").write_text("<|endoftext|>".join([words] * 40))
    return folder


def test_a_trained_run_leaves_what_the_house_says(small_run):
    names = {p.name for p in small_run.path.iterdir()}
    assert {
        "config.toml",
        "activations",
        "sae",
        "checkpoints",
        "metrics.jsonl",
        "features.sqlite",
    } <= names
    assert not list(small_run.path.rglob("*.partial"))
    for line in (small_run.path / "metrics.jsonl").read_text().splitlines():
        assert {"step", "loss", "l0"} <= json.loads(line).keys()


def test_evaluation_is_kept_and_sensible(opened):
    figures = stages.evaluate(opened)
    assert json.loads((opened.path / "evaluation.json").read_text()) == figures
    assert 0.5 < figures["explained_variance"] < 1
    assert figures["l0"] == pytest.approx(8, abs=0.5)
    assert figures["ce_clean"] < figures["ce_reconstructed"] < figures["ce_zero"]


def test_a_steer_by_name_is_the_clamp_that_it_says(opened, fired):
    max_act = opened.index.max_act(fired)
    ids = torch.tensor([opened.tokenizer(PROMPT)["input_ids"]])
    with opened.steer(clamp={fired: "2x"}) as receipt:
        steered = opened.model(ids).logits
    clamp = saesteer.Clamp(opened.sae, fired, 2 * max_act)
    with saesteer.steer(opened.model, [clamp], tokenizer=opened.tokenizer):
        assert torch.equal(opened.model(ids).logits, steered)
    x = activations(opened.model, [opened.hook_point], ids)[opened.hook_point]
    before = opened.sae.activation(x, [fired])[0, :, 0]
    assert receipt.edits[0].before_mean == pytest.approx(float(before.mean()), abs=1e-5)
    assert receipt.edits[0].after_mean == pytest.approx(2 * max_act, rel=1e-4)


def test_an_add_by_name_adds_the_decoder_row(opened, fired):
    ids = torch.tensor([opened.tokenizer(PROMPT)["input_ids"]])
    with opened.steer(add={fired: 3.5}):
        steered = opened.model(ids).logits
    add = saesteer.Add(opened.sae.W_dec[fired], 3.5, opened.hook_point)
    with saesteer.steer(opened.model, [add], tokenizer=opened.tokenizer):
        torch.testing.assert_close(opened.model(ids).logits, steered)


def test_generation_is_seeded_and_the_model_is_left_as_it_was(opened, fired):
    baseline = opened.generate(PROMPT, seed=3)
    with opened.steer(clamp={fired: "8x"}):
        steered = opened.generate(PROMPT, seed=3)
    assert steered != baseline
    assert opened.generate(PROMPT, seed=3) == baseline
    assert opened.generate([PROMPT, PROMPT], seed=[3, 3]) == [baseline, baseline]


def test_a_vector_is_fitted_kept_and_used(own, tmp_path):
    opened = own
    pairs = tmp_path / "pairs.jsonl"
    rows = corpus.pairs("sea", 32, seed=0)
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (kept,) = vectors.fit(opened, read_pairs(pairs), name="sea")
    (direction,) = kept.parts
    assert kept.path == opened.path / "steers" / "sea.safetensors"
    assert direction.n_pairs == 32
    assert torch.equal(Run.open(opened.path).load_vector("sea").vector, direction.vector)
    with opened.steer(vector={"sea": "1.5x"}) as receipt:
        opened.generate(PROMPT, max_new_tokens=4)
    assert receipt.edits[0].n_edited > 0
    with pytest.raises(RunError, match="no vector 'see'; it has sea"):
        opened.load_vector("see")
    with pytest.raises(RunError, match="is not a name"):
        vectors.fit(opened, read_pairs(pairs), name="../sea")


def test_a_run_from_someone_else_s_sae_indexes_searches_steers_and_evaluates(borrowed, tmp_path):
    run = Run.from_sae(tmp_path / "run", str(borrowed / "sae"), str(borrowed / "model"))
    text = str(borrowed / "text.txt")
    assert not (tmp_path / "run" / "activations").exists()
    with pytest.raises(IndexingError, match="saesteer index"):
        run.edits(clamp={3: "8x"})
    with pytest.raises(CacheError, match="--text FILE"):
        stages.index(run)
    index = stages.index(run, text=text, tokens=400)
    assert index.n_features == 64
    hits = Run.open(tmp_path / "run").search("ship")
    assert hits
    with run.steer(clamp={hits[0].id: "4x"}) as receipt:
        run.generate("the boy saw", max_new_tokens=5)
    assert receipt.edits[0].n_edited > 0
    assert stages.evaluate(run, text=text, tokens=320)["l0"] == pytest.approx(4)
    with pytest.raises(RunError, match="is a run already"):
        Run.from_sae(tmp_path / "run", str(borrowed / "sae"), str(borrowed / "model"))


def test_a_wrong_model_never_loads_silently(borrowed, tmp_path):
    with pytest.raises(SaeError, match="trained on"):
        Run.from_sae(tmp_path / "a", str(borrowed / "sae"), "planted")
    assert not (tmp_path / "a").exists()
    other = tmp_path / "other"
    tiny_model("gpt2", seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    with pytest.raises(SaeError, match="trained on"):
        Run.from_sae(tmp_path / "b", str(borrowed / "sae"), str(other))
    forced = Run.from_sae(tmp_path / "b", str(borrowed / "sae"), str(other), force=True)
    assert Run.open(tmp_path / "b").sae.hash == forced.sae.hash


def test_weights_that_changed_under_a_run_are_refused(small_config, small_run, tmp_path):
    """The same model id with other weights: the SAE and the cache both know their model."""
    other = tmp_path / "model"
    small_run.tokenizer.save_pretrained(other)
    model = small_run.model.__class__(small_run.model.config)
    model.save_pretrained(other)
    swapped = dataclasses.replace(small_config, model=dataclasses.replace(small_config.model))
    run = Run(small_run.path, swapped)
    run.config = dataclasses.replace(
        swapped, model=dataclasses.replace(swapped.model, id=str(other))
    )
    with pytest.raises(SaeError, match="trained on other weights"):
        _ = run.sae
    with pytest.raises(CacheError, match="holds other activations: their model"):
        stages.cache(run)


def test_an_index_of_another_sae_is_not_used_for_strengths(small_run, opened, fired):
    opened.index.meta["sae_hash"] = "another"
    with pytest.raises(IndexingError, match="made for another SAE"):
        opened.edits(clamp={fired: "8x"})


def test_misuse_is_named(small_config, opened, tmp_path):
    with pytest.raises(RunError, match="no run at"):
        Run.open(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"lacks text\.source"):
        Run.create(saesteer_config(small_config, tmp_path, text={"source": ""}))
    with pytest.raises(HookPointError, match="9"):
        stages.cache(
            Run.create(
                saesteer_config(small_config, tmp_path, cache={"hook_point": "layers.9.resid_post"})
            )
        )
    with pytest.raises(ConfigError, match="does not fit into the model's 256 positions"):
        stages.cache(
            Run.create(saesteer_config(small_config, tmp_path, cache={"context_size": 300}))
        )
    with pytest.raises(FeatureError, match="128"):
        opened.edits(clamp={128: 1.0})
    with pytest.raises(FeatureError, match="12y"):
        opened.edits(clamp={1: "12y"})
    with pytest.raises(SteeringError), opened.steer():
        pass


def test_a_text_shorter_than_a_context_and_no_text_are_named(small_config, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Story A. Once there was a girl.")
    for source, message in ((str(short), "context"), (str(tmp_path / "no.txt"), r"no\.txt")):
        made = Run.create(saesteer_config(small_config, tmp_path, text={"source": source}))
        with pytest.raises(TextError, match=message):
            stages.cache(made)
        with pytest.raises(CacheError):
            _ = made.shards


def saesteer_config(base, folder, **changes):
    """`base` for a run folder of its own, with some keys changed."""
    tables = {
        name: dataclasses.replace(getattr(base, name), **values) for name, values in changes.items()
    }
    return dataclasses.replace(base, run=str(folder / "run"), **tables)


@pytest.fixture
def own(small_run, tmp_path):
    """A copy of the small run, moved to another folder, that a test may change."""
    shutil.copytree(small_run.path, tmp_path / "run")
    config = dataclasses.replace(small_run.config, run=str(tmp_path / "run"))
    return Run(tmp_path / "run", config)


@pytest.mark.parametrize(
    "change",
    [
        {"cache": {"hook_point": "layers.9.resid_post"}},
        {"sae": {"d_sae": 32}},
        {"train": {"lr": float("nan")}},
        {"train": {"batch_size": 0}},
    ],
)
def test_a_refused_command_leaves_the_run_as_it_was(own, small_config, tmp_path, change):
    before = {p: p.read_bytes() for p in own.path.rglob("*") if p.is_file()}
    with pytest.raises(SaesteerError):
        fitting.train(Run.create(saesteer_config(small_config, tmp_path, **change)))
    assert {p: p.read_bytes() for p in before} == before


def test_an_index_of_the_sae_before_goes_when_another_is_trained(own, small_config, tmp_path):
    shutil.rmtree(own.path / "checkpoints")
    fitting.train(Run.create(saesteer_config(small_config, tmp_path, train={"seed": 7})))
    with pytest.raises(IndexingError, match="saesteer index"):
        Run.open(own.path).search("boat")


def test_training_the_same_again_keeps_the_index(own, small_config, tmp_path):
    fitting.train(Run.create(saesteer_config(small_config, tmp_path)))
    assert Run.open(own.path).search("boat")


def test_damaged_activations_are_not_indexed(own):
    path = next((own.path / "activations").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match="damaged"):
        stages.index(own)


def test_two_trainings_at_once_the_second_is_refused(own):
    with alone(own.path / "checkpoints"), pytest.raises(RunError, match="another process"):
        fitting.train(own)


def test_strengths_that_overflow_are_refused(opened, fired):
    with pytest.raises(SteeringError, match="beyond what activations can hold"):
        opened.edits(add={fired: 1e39})


def test_evaluation_names_its_text(opened, stories):
    figures = stages.evaluate(opened, text=str(stories), tokens=500)
    assert figures["text"] == str(stories)
    assert stages.evaluate(opened)["text"] == "held-out activations of the run"


def test_additions_in_units_that_compare(opened, fired):
    """ "0.5n" is half the layer's mean norm, "kl0.1" what moves the next token by .1 nats."""
    point = opened.hook_point
    (by_norm,) = opened.edits(add={fired: "0.5n"})
    change = float(by_norm.vector.norm()) * by_norm.strength
    assert change == pytest.approx(0.5 * opened.shards.statistics.mean_norm, rel=1e-5)
    long = units.added(opened, 3 * by_norm.vector, point, "0.5n")
    assert long == pytest.approx(by_norm.strength / 3, rel=1e-5)
    (by_kl,) = opened.edits(add={fired: "kl0.05"})
    reference = Reference(
        opened.model, opened.tokenizer, units.neutral_tokens(opened, units.CONTEXTS)
    )
    assert reference.cost([by_kl]).kl == pytest.approx(0.05, rel=0.02)
    with pytest.raises(SteeringError, match="strength 'kl' is none"):
        opened.edits(add={fired: "kl"})
    with pytest.raises(CacheError, match="give a plain number"):
        units.added(opened, by_norm.vector, HookPoint(point.layer + 1, point.site), "1n")
