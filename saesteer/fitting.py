"""Training a run's SAE, or a sweep of them: joins the run with the training room."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saesteer import run_text, stages
from saesteer.config import Config, check_ranges
from saesteer.core.files import alone, write_json
from saesteer.core.hooks import activations
from saesteer.core.model import fingerprint
from saesteer.core.sae import Sae
from saesteer.errors import ConfigError
from saesteer.run import Run
from saesteer.training import loop, packing, rows
from saesteer.training import text as reading
from saesteer.training.architectures import ARCHITECTURES
from saesteer.training.logs import check_logs
from saesteer.training.ranks import ALONE, Ranks, join
from saesteer.training.settings import Settings, check_settings
from saesteer.training.stream import CachedStream, LiveStream, Stream
from saesteer.training.trainer import Trainer

# How a sweep's keys are written in the names of its runs: topk-d2048-k16-lr0.001-seed0.
_SHORT = {
    "architecture": "", "d_sae": "d", "k": "k", "sparsity": "sparsity", "lr": "lr", "seed": "seed",
}  # fmt: skip


def train(run: Run) -> Sae | None:
    """Cache what is missing and train the SAE; a killed run goes on where it stopped.

    Started by torchrun, its processes work together, and the first one writes the SAE.

    Returns:
        The SAE; None in the other processes.

    Raises:
        TrainingError: bad settings, or a loss that is not finite or explodes.
        TextError, CacheError, HookPointError, RunError: see `stages.cache`.
    """
    run, ranks = joined(run)
    _check(run.config)
    stream = _stream(run, ranks)
    with alone(run.path / "checkpoints") if ranks.first else nullcontext():
        (sae,) = _fit(stream, [_job(run, stream, ranks)], run, ranks)
        if not ranks.first:
            return None
        _keep(run, sae)
        return sae


def sweep(run: Run) -> list[Run]:
    """Train every combination of the configuration's [sweep] on one pass of the activations.

    Each becomes a run of its own in sweep/, which any command takes. What [sweep] doesn't vary is
    as in [sae] and [train]. Of torchrun's processes all but the first get an empty list.

    Raises:
        ConfigError: [sweep] varies nothing. Else as `train`.
    """
    run, ranks = joined(run)
    configs = combinations(run.config)
    for config in configs.values():
        _check(config)
    stream = _stream(run, ranks)
    members = []
    for name, config in configs.items():
        path = run.path / "sweep" / name
        members.append(Run(path, dataclasses.replace(config, run=str(path)), model_of=run))
    with alone(run.path / "sweep") if ranks.first else nullcontext():
        jobs = [_job(member, stream, ranks, name=member.path.name) for member in members]
        saes = _fit(stream, jobs, run, ranks)
        if ranks.first:
            for member, sae in zip(members, saes, strict=True):
                _share_cache(run, member)
                _keep(member, sae)
            if not (run.path / "sae").exists():  # else it tells what that SAE was trained on
                run.save_config()
    return members if ranks.first else []


def combinations(config: Config) -> dict[str, Config]:
    """A sweep's configurations, by a name that tells what varies among them.

    What an architecture has no use for (k where it pays a penalty, its weight where k is chosen)
    makes no difference, and no second member.
    """
    varied = {
        key: values for key, values in dataclasses.asdict(config.sweep).items() if len(values) > 0
    }
    if not varied:
        raise ConfigError(
            "the configuration has no [sweep]: list what to vary there, such as k = [8, 16, 32], "
            "or give --sweep.k 8 16 32"
        )
    found = {}
    for values in itertools.product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        architecture = ARCHITECTURES.get(chosen.get("architecture", config.sae.architecture))
        if architecture is not None:
            chosen.pop("sparsity" if architecture.chooses else "k", None)
        sae = {key: value for key, value in chosen.items() if key not in ("lr", "seed")}
        about = {key: value for key, value in chosen.items() if key in ("lr", "seed")}
        name = "-".join(f"{_SHORT[key]}{value}" for key, value in chosen.items())
        if not name:
            raise ConfigError(
                f"[sweep] varies nothing that {config.sae.architecture} uses: it has k where it "
                "chooses what fires, and sparsity where it pays for it"
            )
        found[name] = dataclasses.replace(
            config,
            sae=dataclasses.replace(config.sae, **sae),
            train=dataclasses.replace(config.train, order_seed=_order_seed(config), **about),
            sweep=type(config.sweep)(),
        )
    return found


def evaluate_sweep(
    run: Run, members: Sequence[Run], *, tokens: int = 2**16
) -> list[dict[str, Any]]:
    """Evaluate each SAE of a sweep; the table is also kept in sweep/sweep.json.

    Args:
        tokens: held-out tokens that each is measured on, at most.

    Returns:
        For each: name, architecture, d_sae, l0, explained_variance, ce_recovered, dead_fraction.
    """
    table = []
    for member in members:
        figures = stages.evaluate(member, tokens=tokens)
        table.append(
            {
                "name": member.path.name,
                "architecture": member.config.sae.architecture,
                "d_sae": member.config.sae.d_sae,
                **{
                    key: figures[key]
                    for key in ("l0", "explained_variance", "ce_recovered", "dead_fraction")
                },
            }
        )
    write_json(run.path / "sweep" / "sweep.json", table)
    return table


def joined(run: Run) -> tuple[Run, Ranks]:
    """The run on this process's own device, and the processes it works with."""
    ranks, device = join(run.config.model.device)
    if device != run.config.model.device:
        model = dataclasses.replace(run.config.model, device=device)
        run = Run(run.path, dataclasses.replace(run.config, model=model))
    return run, ranks


def _check(config: Config) -> None:
    """Refuse what can't be trained before anything is cached for it."""
    check_ranges(config)
    check_settings(_settings(config), transcoder=bool(config.sae.hook_point_out))
    check_logs(config.train.log_to)


def _settings(config: Config) -> Settings:
    sae, about = config.sae, config.train
    return Settings(
        architecture=sae.architecture, d_sae=sae.d_sae, k=sae.k, sparsity=sae.sparsity,
        widths=sae.widths, lr=about.lr, warm_up=about.warmup, decay=about.decay,
        sparsity_warm_up=about.sparsity_warmup, seed=about.seed,
        encoder_init=about.encoder_init, b_dec_init=about.b_dec_init,
        aux_coefficient=about.aux, dead_after=about.dead_after, products=about.products,
        skip=sae.skip,
    )  # fmt: skip


def _job(run: Run, stream: Stream, ranks: Ranks, name: str = "") -> loop.Job:
    config = run.config
    trainer = Trainer(
        _settings(config), stream, steps=_steps(config), identity=_identity(run), ranks=ranks,
        by_features=config.train.share == "features" and ranks.size > 1, device=run.model.device,
    )  # fmt: skip
    return loop.Job(trainer, run.path, config.train.log_to, name)


def _fit(stream: Stream, jobs: list[loop.Job], run: Run, ranks: Ranks) -> list[Sae]:
    about = run.config.train
    return loop.fit(
        stream, jobs, steps=_steps(run.config), log_every=about.log_every,
        checkpoint_steps=about.checkpoint_every, ranks=ranks,
    )  # fmt: skip


def _order_seed(config: Config) -> int:
    own = config.train.order_seed
    return config.train.seed if own is None else own


def _steps(config: Config) -> int:
    return max(1, config.train.tokens // config.train.batch_size)


def _identity(run: Run) -> dict[str, Any]:
    point, *out = stages.hook_points(run)
    return {
        "hook_point": point,
        "hook_point_out": out[0] if out else None,
        "model_id": run.config.model.id,
        "model_fingerprint": fingerprint(run.model),
        "prepend_bos": run.tokenizer.bos_token_id is not None,
        "context_size": run.config.cache.context_size,
    }


def _stream(run: Run, ranks: Ranks) -> Stream:
    config = run.config
    row_ranks = ALONE if config.train.share == "features" else ranks
    if config.train.batch_size % row_ranks.size:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} can't be shared by {row_ranks.size} "
            "processes; use a multiple of them"
        )
    special = set() if config.rows.special_tokens else run.special_ids
    if config.rows.live:
        return _live(run, row_ranks, special)
    shards = stages.cache(run, ranks)
    train_rows, held_out = rows.split_rows(shards[0].tokens, special, config.cache.held_out)
    if config.rows.max_norm is not None:
        for each in shards:
            train_rows = rows.without_outliers(train_rows, each.norms, config.rows.max_norm)
    return CachedStream(
        tuple(shards), train_rows, held_out, batch_size=config.train.batch_size,
        seed=_order_seed(config), ranks=row_ranks,
    )  # fmt: skip


def _live(run: Run, ranks: Ranks, special: Collection[int]) -> Stream:
    """Rows straight from the model; the first contexts of the text are held out."""
    config, model = run.config, run.model
    points = stages.hook_points(run)
    stages.check_points(run, points)
    size = config.cache.batch_size or max(1, 2048 // config.cache.context_size)

    def read(contexts: list[packing.Context]) -> tuple[Tensor, ...]:
        parts = []
        for first in range(0, len(contexts), size):
            tokens = np.stack([context.tokens for context in contexts[first : first + size]])
            found = activations(model, points, torch.from_numpy(tokens).long())
            parts.append([found[point].flatten(0, 1).cpu() for point in points])
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    return LiveStream(
        lambda: packing.pack(
            reading.documents(**run_text.text_source(run)), run.tokenizer, config.cache.context_size
        ),
        read,
        keep=lambda tokens: ~np.isin(tokens, sorted(special)),
        block=config.rows.buffer,
        n_held_out=run_text.live_held_out(config),
        batch_size=config.train.batch_size,
        seed=_order_seed(config),
        ranks=ranks,
        text=reading.fingerprint(**run_text.text_source(run)),
    )


def _keep(run: Run, sae: Sae) -> None:
    """Save the SAE; what told of another one that was there before is removed."""
    if (run.path / "features.sqlite").exists() and run.index.meta["sae_hash"] != sae.hash:
        # A feature's number would mean something else in it.
        (run.path / "features.sqlite").unlink()
    evaluated = run.path / "evaluation.json"
    if evaluated.exists() and json.loads(evaluated.read_text()).get("sae_hash") != sae.hash:
        evaluated.unlink()
        for drawn in ("plots", "hub"):
            shutil.rmtree(run.path / drawn, ignore_errors=True)
    sae.save(run.path / "sae")
    run.save_config()
    run.refresh()


def _share_cache(run: Run, member: Run) -> None:
    """A sweep's members read the one cache, through a link that moves with the run."""
    link = member.path / "activations"
    if (run.path / "activations").exists() and not link.is_symlink() and not link.exists():
        link.symlink_to(Path("..", "..", "activations"))
