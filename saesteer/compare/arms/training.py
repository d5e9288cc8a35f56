"""Training adapters: a copy of the model that shares its weights, and what is trained in it."""

import copy
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saesteer.compare.prepared import Material, PromptTransform, as_it_is
from saesteer.core.model import device_of
from saesteer.core.progress import progress
from saesteer.directions.answers import Side, side_tokens
from saesteer.directions.pairs import Pair
from saesteer.effects.damage import kl, padded
from saesteer.errors import PairsError, SaesteerError


@dataclass(frozen=True)
class Training:
    """steps: updates; batch_size: rows of each; rank: of the adapters."""

    steps: int
    batch_size: int
    rank: int


def finetuning() -> tuple[ModuleType, ModuleType]:
    """peft and trl, which take seconds to import.

    Raises:
        SaesteerError: they aren't installed.
    """
    try:
        import peft
        import trl
    except ImportError as error:
        raise SaesteerError(
            f"fine-tuning needs peft and trl ({error}): pip install 'saesteer[finetune]'"
        ) from error
    return peft, trl


def train_sft(
    material: Material, pairs: Sequence[Pair], how: Training, learning_rate: float
) -> PreTrainedModel:
    """A copy of the model with adapters trained by trl on the chosen answers of `pairs`.

    Raises:
        SaesteerError: peft and trl aren't installed.
    """
    from datasets import Dataset

    _, trl = finetuning()
    model, tokenizer = material.model, material.tokenizer
    rows = []
    for pair in pairs:
        side = side_tokens(tokenizer, pair.prompt, pair.chosen)
        # −100: not predicted. The tokens are those that margins are measured on.
        labels = [-100] * side.start + side.ids[side.start :]
        rows.append({"input_ids": side.ids, "labels": labels})
    with _training(model, material.seed), tempfile.TemporaryDirectory() as folder:
        adapted = _adapted(model, how.rank)
        trainer = trl.SFTTrainer(
            adapted,
            trl.SFTConfig(folder, **_settings(material, how, learning_rate)),
            train_dataset=Dataset.from_list(rows),
            processing_class=copy.deepcopy(tokenizer),  # trl gives it a pad token
        )
        return _trained(trainer, adapted)


def train_dpo(
    material: Material, how: Training, learning_rate: float, beta: float
) -> PreTrainedModel:
    """A copy of the model with adapters trained by trl to prefer the pairs' chosen answers.

    Raises:
        SaesteerError: peft and trl aren't installed.
    """
    from datasets import Dataset

    _, trl = finetuning()
    model, tokenizer, pairs = material.model, material.tokenizer, material.pairs
    rows = []
    for pair in pairs:
        chosen = side_tokens(tokenizer, pair.prompt, pair.chosen)
        rejected = side_tokens(tokenizer, pair.prompt, pair.rejected)
        rows.append(
            {
                "prompt_ids": chosen.ids[: chosen.start],
                "chosen_ids": chosen.ids[chosen.start :],
                "rejected_ids": rejected.ids[rejected.start :],
            }
        )
    with _training(model, material.seed), tempfile.TemporaryDirectory() as folder:
        adapted = _adapted(model, how.rank)
        text = {"prompt": pairs[0].prompt, "chosen": pairs[0].chosen, "rejected": pairs[0].rejected}
        trainer = trl.DPOTrainer(
            adapted,
            None,  # the reference is the model with its adapters switched off
            trl.DPOConfig(folder, **_settings(material, how, learning_rate), beta=beta),
            train_dataset=Dataset.from_list([text]),
            processing_class=copy.deepcopy(tokenizer),
        )
        # trl takes text alone here, and would tokenise it otherwise than margins are measured (no
        # BOS, an end token after every answer): the tokens are put in its place.
        trainer.train_dataset = Dataset.from_list(rows)
        return _trained(trainer, adapted)


def distil(
    material: Material, transform: PromptTransform, how: Training, learning_rate: float
) -> PreTrainedModel:
    """A copy of the model with adapters trained to do without the transform what it does with it.

    Raises:
        SaesteerError: peft isn't installed. PairsError: an answer without a token.
    """
    model, tokenizer, pairs = material.model, material.tokenizer, material.pairs
    sides = _both(tokenizer, pairs, transform), _both(tokenizer, pairs, as_it_is)
    generator = torch.Generator().manual_seed(material.seed)
    with _training(model, material.seed):
        adapted = _adapted(model, how.rank)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
        with progress("distil", how.steps, unit="step") as bar:
            for _ in range(how.steps):
                some = torch.randperm(len(sides[0]), generator=generator)[: how.batch_size].tolist()
                with torch.no_grad():
                    goal = _predictions(model, [sides[0][i] for i in some])
                made = _predictions(adapted, [sides[1][i] for i in some])
                loss = kl(goal, made).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                bar.update()
        return _bare(adapted)


@torch.no_grad()
def prompted_kl(
    model: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    transform: PromptTransform,
    *,
    batch_size: int = 32,
) -> float:
    """KL(p(· | transform(x)) ‖ p_student(· | x)), mean over the tokens of all answers, in nats.

    Raises:
        PairsError: an answer without a token that something stands before.
    """
    goals, sides = _both(tokenizer, pairs, transform), _both(tokenizer, pairs, as_it_is)
    total, n = 0.0, 0
    for first in range(0, len(sides), batch_size):
        some = slice(first, first + batch_size)
        each = kl(_predictions(model, goals[some]), _predictions(student, sides[some]))
        total += float(each.double().sum())
        n += len(each)
    return total / n


def _both(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], transform: PromptTransform
) -> list[Side]:
    found = []
    for number, pair in enumerate(pairs, 1):
        for answer in (pair.chosen, pair.rejected):
            side = side_tokens(tokenizer, transform(pair.prompt), answer)
            if not 0 < side.start < len(side.ids):
                raise PairsError(
                    f"pair {number}: {answer!r} has no token, or nothing stands before it; give it "
                    "text, and a prompt where the tokenizer has no BOS"
                )
            found.append(side)
    return found


def _predictions(model: PreTrainedModel, sides: Sequence[Side]) -> Tensor:
    """Logits of the answers' tokens, one row a token, sides in order: [n, vocabulary]."""
    ids, mask = (t.to(device_of(model)) for t in padded([side.ids for side in sides]))
    wanted = torch.zeros_like(mask, dtype=torch.bool)
    for i, side in enumerate(sides):
        wanted[i, side.start - 1 : len(side.ids) - 1] = True
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[wanted.to(logits.device)]


def _adapted(model: PreTrainedModel, rank: int) -> Any:
    """A peft model around a copy of the model, whose weights it shares.

    Every linear layer but the unembedding gets an adapter; experts kept as one tensor get none.
    """
    peft, _ = finetuning()
    shared = {id(parameter): parameter for parameter in model.parameters()}
    settings = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(copy.deepcopy(model, shared), settings)


def _trained(trainer: Any, adapted: Any) -> PreTrainedModel:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)  # it prints to stdout
    trainer.train()
    return _bare(adapted)


def _bare(adapted: Any) -> PreTrainedModel:
    """The model itself, with its adapters in it, ready to be read and steered."""
    model: PreTrainedModel = adapted.get_base_model()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False)
    return model.eval()


def _settings(material: Material, how: Training, learning_rate: float) -> dict[str, Any]:
    """What trl is told whatever is trained."""
    return {
        "max_steps": how.steps,
        "per_device_train_batch_size": how.batch_size,
        "learning_rate": learning_rate,
        "seed": material.seed,
        "max_length": None,
        "use_cpu": device_of(material.model).type == "cpu",
        "bf16": material.model.dtype == torch.bfloat16,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": not sys.stderr.isatty(),
        "dataloader_pin_memory": False,
    }


@contextmanager
def _training(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Random numbers from the seed, and the caller's as they were; no bars over single rows.

    peft freezes the model's weights, which are the caller's too: afterwards they are as they were.
    """
    import datasets

    gradients = [parameter.requires_grad for parameter in model.parameters()]
    bars = not datasets.are_progress_bars_disabled()
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices), torch.enable_grad(), warnings.catch_warnings():
        # transformers renames it in version 6; the older versions that we take don't know the new.
        warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is dep", FutureWarning)
        # peft sets it right by itself, for GPT-2's transposed matrices.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        # peft's own settings for experts kept as one tensor, which "all-linear" leaves alone.
        warnings.filterwarnings("ignore", r"The following \w+_pattern keys did", RuntimeWarning)
        torch.manual_seed(seed)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            for parameter, wanted in zip(model.parameters(), gradients, strict=True):
                parameter.requires_grad_(wanted)
            if bars:
                datasets.enable_progress_bars()
            random.setstate(python)
            np.random.set_state(numpy)
