"""training/card.py: a folder that loads anywhere, and a card that says what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.core.sae import load_sae
from saesteer.errors import SaeError
from saesteer.training import card
from tests.tiny import tiny_sae

ROW = {"l0": 8.0, "explained_variance": 0.4321, "ce_recovered": 0.5432, "kl": 0.6543}


@pytest.fixture
def sae() -> Any:
    return tiny_sae("topk")


@pytest.fixture
def figures(sae: Any) -> dict[str, Any]:
    return {
        "tokens": 12345,
        "explained_variance": 0.9123,
        "l0": 7.89,
        "dead_fraction": 0.0123,
        "ce_clean": 1.2345,
        "ce_reconstructed": 1.3456,
        "ce_recovered": 0.9876,
        "kl": 0.0321,
        "baselines": {"random": ROW, "pca": {**ROW, "ce_recovered": None}},
        "sae_hash": sae.hash,
        "text": "held-out activations of the run",
    }


def test_the_card_states_the_figures(sae: Any, figures: dict[str, Any]) -> None:
    text = card.card(sae, figures, repo="me/my-sae", trained_tokens=4_000_000)
    for stated in (
        "# my-sae", "`tiny`", "layers.1.resid_post", "| topk |", "| 64 |", "| 8 |", "4,000,000",
        "12,345 tokens", "0.9123", "7.89", "0.9876", "1.2345 clean, 1.3456 reconstructed",
        "0.0321", "1.23%", "license: unknown",
        "| random dictionary | 8.00 | 0.4321 | 0.5432 | 0.6543 |",
        "| PCA | 8.00 | 0.4321 | – | 0.6543 |",
        'SAE.load_from_disk(snapshot_download("me/my-sae"))',
        "saesteer new runs/mine --sae me/my-sae --model tiny",
    ):  # fmt: skip
        assert stated in text, stated
    assert "base_model" not in text  # "tiny" is no model of the Hub


def test_the_card_names_the_base_model_and_what_it_was_trained_as(
    figures: dict[str, Any],
) -> None:
    from dataclasses import replace

    made = replace(tiny_sae("jumprelu"), model_id="owner/model")
    text = card.card(made, figures, repo="me/x", architecture="batchtopk", license="mit")
    head = text.split("---")[1]
    assert "base_model: owner/model\n" in head and "license: mit\n" in head
    assert "batchtopk, saved as jumprelu" in text
    assert "| trained on, tokens | unknown |" in text


def test_the_folder_loads_here_and_in_sae_lens(
    sae: Any, figures: dict[str, Any], tmp_path: Path
) -> None:
    folder = card.write_folder(tmp_path / "hub", sae, figures, repo="me/x")
    assert {p.name for p in folder.iterdir()} >= {
        "cfg.json", "sae_weights.safetensors", "README.md", "evaluation.json"
    }  # fmt: skip
    again = load_sae(folder)
    assert again.hash == sae.hash and again.hook_point == sae.hook_point
    assert json.loads((folder / "evaluation.json").read_text()) == figures
    from sae_lens import SAE

    theirs = SAE.load_from_disk(str(folder))
    x = torch.randn(20, sae.d_in, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs.encode(x), sae.encode(x).dense(sae.d_sae))


def test_paths_of_this_machine_are_not_published(
    sae: Any, figures: dict[str, Any], tmp_path: Path
) -> None:
    figures["text"] = str(tmp_path / "secret" / "stories.txt")
    folder = card.write_folder(tmp_path / "hub", sae, figures, repo="me/x")
    for file in ("README.md", "evaluation.json"):
        text = (folder / file).read_text()
        assert "stories.txt" in text and "secret" not in text


def test_figures_of_another_sae_and_bad_names_are_refused(
    sae: Any, figures: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(SaeError, match=r"of another SAE.*saesteer eval"):
        card.write_folder(tmp_path / "hub", tiny_sae("topk", seed=1), figures, repo="me/x")
    for name in ("x", "a/b/c", "", "me/", "https://huggingface.co/me/x"):
        with pytest.raises(SaeError, match="expected owner/name"):
            card.write_folder(tmp_path / "hub", sae, figures, repo=name)
    assert not (tmp_path / "hub").exists()


def test_an_evaluation_that_is_missing_or_damaged_says_what_to_run(
    figures: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "evaluation.json"
    with pytest.raises(SaeError, match="run `saesteer eval"):
        card.read_figures(path)
    path.write_text("{")
    with pytest.raises(SaeError, match=r"cannot be read.*run `saesteer eval"):
        card.read_figures(path)
    path.write_text(json.dumps({**figures, "kl": 1.0}).replace('"kl"', '"old"', 1))
    with pytest.raises(SaeError, match="lacks kl; run `saesteer eval"):
        card.read_figures(path)
    path.write_text(json.dumps(figures))
    assert card.read_figures(path) == figures


class FakeApi:
    """Records what would be sent to the Hub."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None

    def create_repo(self, repo: str, **arguments: Any) -> None:
        self.calls.append(("create", {"repo": repo, **arguments}))
        if self.error:
            raise self.error

    def upload_folder(self, **arguments: Any) -> None:
        self.calls.append(("upload", arguments))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    made = FakeApi()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: made)
    return made


def test_upload_makes_the_repository_and_sends_the_folder(api: FakeApi, tmp_path: Path) -> None:
    assert card.upload(tmp_path, "me/x", private=True) == "https://huggingface.co/me/x"
    (create, created), (upload, sent) = api.calls
    assert (create, created) == ("create", {"repo": "me/x", "private": True, "exist_ok": True})
    assert upload == "upload"
    assert (sent["repo_id"], sent["folder_path"]) == ("me/x", str(tmp_path))


def test_a_refusal_of_the_hub_is_one_line_with_what_to_do(api: FakeApi, tmp_path: Path) -> None:
    from huggingface_hub.errors import LocalTokenNotFoundError

    for error in (LocalTokenNotFoundError("no\ntoken"), OSError("unreachable")):
        api.error = error
        with pytest.raises(SaeError, match=r"was not published.*hf auth login") as caught:
            card.upload(tmp_path, "me/x")
        assert "\n" not in str(caught.value)


def test_offline_the_hub_can_not_be_reached(tmp_path: Path) -> None:
    """The real client: tests run with HF_HUB_OFFLINE."""
    with pytest.raises(SaeError, match="was not published"):
        card.upload(tmp_path, "me/x")
