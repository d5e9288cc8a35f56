"""An SAE ready to be published: SAELens format, its figures, and a model card that states them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saesteer.core.files import write_json, written_aside
from saesteer.core.sae import Sae
from saesteer.errors import SaeError

_REPO = re.compile(r"[\w.-]+/[\w.-]+")
# What the card states; a file without one of these was made by something else.
_STATED = (
    "tokens", "explained_variance", "l0", "dead_fraction", "ce_clean", "ce_reconstructed",
    "ce_recovered", "kl", "baselines", "sae_hash", "text",
)  # fmt: skip


def read_figures(path: Path) -> dict[str, Any]:
    """The figures of evaluation.json.

    Raises:
        SaeError: there is none, or it is damaged or of an earlier version.
    """
    again = f"run `saesteer eval {path.parent}` first: a model card states what was measured"
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in _STATED if name not in figures]
    except FileNotFoundError:
        raise SaeError(f"{path.parent} has no {path.name}; {again}") from None
    except (OSError, ValueError, TypeError) as error:
        raise SaeError(f"{path} cannot be read ({error}); {again}") from error
    if missing:
        raise SaeError(f"{path} lacks {', '.join(missing)}; {again}")
    return figures


def write_folder(
    folder: Path,
    sae: Sae,
    figures: Mapping[str, Any],
    *,
    repo: str,
    trained_tokens: int | None = None,
    architecture: str | None = None,
    license: str = "unknown",
) -> Path:
    """Write what is published: cfg.json and weights, README.md and evaluation.json.

    Args:
        figures: of `training.evaluate`, with sae_hash and text beside them.
        repo: owner/name.
        trained_tokens: None where unknown.
        architecture: it was trained as, where that is another than it is saved as (BatchTopK).

    Raises:
        SaeError: the figures are of another SAE, or `repo` is no name. RunError: disk trouble.
    """
    if not _REPO.fullmatch(repo):
        raise SaeError(f"{repo!r} is not the name of a Hub repository; expected owner/name")
    if figures["sae_hash"] != sae.hash:
        raise SaeError(
            f"evaluation.json is of another SAE ({figures['sae_hash']}) than the one to publish "
            f"({sae.hash}); run `saesteer eval` again"
        )
    sae.save(folder)
    text = card(
        sae, figures, repo=repo, trained_tokens=trained_tokens, architecture=architecture,
        license=license,
    )  # fmt: skip
    with written_aside(folder / "README.md") as aside:
        aside.write_text(text, encoding="utf-8")
    write_json(folder / "evaluation.json", {**figures, "text": _named(figures["text"])})
    return folder


def upload(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload a folder as the Hub repository `repo`, made where there is none; return its address.

    Raises:
        SaeError: the Hub refused, or can't be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="SAE and its card")
    except (OSError, ValueError, RuntimeError) as error:
        raise SaeError(
            f"{repo} was not published: {' '.join(str(error).split())}; log in with "
            f"`hf auth login`, check the name and the connection, and push again ({folder} is kept)"
        ) from error
    return f"https://huggingface.co/{repo}"


def card(
    sae: Sae,
    figures: Mapping[str, Any],
    *,
    repo: str,
    trained_tokens: int | None = None,
    architecture: str | None = None,
    license: str = "unknown",
) -> str:
    """The model card: what it is, its figures with their baselines, and how to load it."""
    model = sae.model_id or "unknown"
    named = architecture or sae.architecture
    saved = "" if named == sae.architecture else f", saved as {sae.architecture}"
    out = sae.hook_point_out
    facts = {
        "model": f"`{model}`",
        "hook point": f"`{sae.hook_point}`" + (f" → `{out}`" if out else ""),
        "architecture": named + saved,
        "features (d_sae)": f"{sae.d_sae:,}",
        "width of the stream": f"{sae.d_in:,}",
        "k": str(sae.k) if sae.k else "–",
        "context size": str(sae.context_size or "unknown"),
        "begins with BOS": "yes" if sae.prepend_bos else "no",
        "trained on, tokens": f"{trained_tokens:,}" if trained_tokens else "unknown",
    }
    measured = {
        "explained variance": f"{figures['explained_variance']:.4f}",
        "L0": f"{figures['l0']:.2f}",
        "CE recovered (zero ablation)": _number(figures["ce_recovered"]),
        "CE, nats a token": f"{figures['ce_clean']:.4f} clean, "
        f"{figures['ce_reconstructed']:.4f} reconstructed",
        "KL(clean ‖ reconstructed), nats a token": f"{figures['kl']:.4f}",
        "dead features": f"{figures['dead_fraction']:.2%}",
    }
    rows = {"this SAE": figures, **figures["baselines"]}
    names = {"random": "random dictionary", "pca": "PCA"}
    compared = [
        f"| {names.get(name, name)} | {row['l0']:.2f} | {row['explained_variance']:.4f} | "
        f"{_number(row['ce_recovered'])} | {row['kl']:.4f} |"
        for name, row in rows.items()
    ]
    # The Hub's own models without an owner are the oldest: gpt2 and the like.
    on_hub = bool(_REPO.fullmatch(model)) or model.startswith("gpt2")
    base = [f"base_model: {model}"] if on_hub else []
    return "\n".join(
        [
            "---",
            f"license: {license}",
            "library_name: saelens",
            "tags:",
            "- sparse-autoencoder",
            "- interpretability",
            "- saesteer",
            *base,
            "---",
            "",
            f"# {repo.partition('/')[2]}",
            "",
            f"A sparse {'transcoder' if out else 'autoencoder'} with {sae.d_sae:,} features for "
            f"`{model}`, made with saesteer and stored in SAELens format.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in facts.items()),
            "",
            "## Measured",
            "",
            f"On {figures['tokens']:,} tokens ({_named(figures['text'])}), "
            "special tokens left out.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in measured.items()),
            "",
            "Beside baselines of the same L0:",
            "",
            "| | L0 | explained variance | CE recovered | KL |",
            "|---|---|---|---|---|",
            *compared,
            "",
            "All figures, feature by feature, are in `evaluation.json`.",
            "",
            "## Load it",
            "",
            "```python",
            "from huggingface_hub import snapshot_download",
            "from sae_lens import SAE",
            "",
            f'sae = SAE.load_from_disk(snapshot_download("{repo}"))',
            "```",
            "",
            "```sh",
            f"saesteer new runs/mine --sae {repo} --model {model}",
            "```",
            "",
        ]
    )


def _named(text: str) -> str:
    """What was read, without the folders of this machine."""
    path = Path(text)
    return path.name if path.is_absolute() or path.exists() else text


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
