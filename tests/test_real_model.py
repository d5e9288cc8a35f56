"""The whole job on a real model and text, where the environment names them.

SAESTEER_TEST_MODEL=folder SAESTEER_TEST_TEXT=file.txt make test
"""

import os
from itertools import islice

import pytest
import torch

from saesteer import config, fitting, stages
from saesteer.run import Run
from saesteer.training import text

MODEL, TEXT = (os.environ.get(f"SAESTEER_TEST_{what}") for what in ("MODEL", "TEXT"))
pytestmark = pytest.mark.skipif(
    not (MODEL and TEXT), reason="SAESTEER_TEST_MODEL and SAESTEER_TEST_TEXT are not set"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = Run.create(
        config.Config(
            run=str(tmp_path_factory.mktemp("real") / "run"),
            model=config.ModelConfig(id=MODEL),
            text=config.TextConfig(source=TEXT),
            cache=config.CacheConfig(
                hook_point="layers.3.resid_post", tokens=60_000, context_size=256
            ),
            sae=config.SaeConfig(architecture="batchtopk", d_sae=512, k=16),
            train=config.TrainConfig(tokens=300_000, batch_size=2048, lr=2e-3),
        )
    )
    fitting.train(made)
    stages.index(made)
    return made


def test_the_sae_reconstructs_and_fires_as_often_as_asked(run):
    figures = stages.evaluate(run)
    assert figures["explained_variance"] > 0.6
    assert figures["ce_recovered"] > 0.8
    assert figures["l0"] == pytest.approx(16, rel=0.1)


def test_a_row_of_the_cache_leads_back_to_its_text(run):
    shards = run.shards
    documents = list(islice(text.documents(TEXT), int(shards.documents.max()) + 1))
    checked = 0
    for row in range(300, shards.n_tokens, 5_003):
        context = row // shards.context_size
        document = shards.documents.reshape(-1)[row]
        if document < 0:
            continue
        piece = shards.tokens[context][shards.documents[context] == document]
        decoded = run.tokenizer.decode(piece.tolist(), skip_special_tokens=True).strip()
        assert decoded and decoded in documents[document]
        checked += 1
    assert checked >= 5


def test_everyday_words_find_features_that_fire_on_them(run):
    for word in ("dog", "happy", "mom"):
        hits = run.search(word, limit=5)
        assert hits, word
        assert any(word in hit.example.lower() or word in hit.label for hit in hits), word


def test_a_clamp_moves_generation_and_leaves_the_model_as_it_was(run):
    prompt = "Once upon a time, there was a"
    hit = run.search("dog", limit=1)[0]
    baseline = run.generate(prompt, seed=1)
    ids = torch.tensor([run.tokenizer(prompt)["input_ids"]])
    before = run.model(ids).logits
    with run.steer(clamp={hit.id: "4x"}) as receipt:
        steered = run.generate(prompt, seed=1)
    assert steered != baseline
    edit = receipt.edits[0]
    assert edit.after_mean == pytest.approx(4 * run.index.max_act(hit.id), rel=1e-3)
    assert torch.equal(run.model(ids).logits, before)
