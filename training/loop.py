"""Train one SAE, or many on one stream, with checkpoints from which a killed run goes on exactly.

A step's batch is a function of the step's number alone (`stream`), so a run that was killed ends
with the same weights as an unbroken one.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saesteer.core.progress import progress
from saesteer.core.sae import Sae
from saesteer.errors import TrainingError
from saesteer.training.checkpoints import Checkpoint, save_checkpoint, saved_checkpoint, steps_saved
from saesteer.training.logs import Log, open_logs
from saesteer.training.metrics import Metrics
from saesteer.training.ranks import ALONE, Ranks
from saesteer.training.stream import Stream, prefetched
from saesteer.training.trainer import Trainer

# Steps between two looks at the clock where several processes must agree on what it says.
_AGREE_EVERY = 16


@dataclass
class Job:
    """One SAE to train, and where what comes of it goes.

    Attributes:
        folder: of the run, for checkpoints/ and metrics.jsonl; None to write nothing.
        log_to: other logs to write there, of `logs.open_logs`.
        name: what it is called where there are several.
    """

    trainer: Trainer
    folder: Path | None = None
    log_to: Sequence[str] = ()
    name: str = ""
    saved: int | None = field(default=None, init=False)  # the newest checkpoint known to be whole

    @property
    def checkpoints(self) -> Path | None:
        """Where this process's checkpoints go.

        Ranks that share the latents keep a part each; of those that share the rows one is enough.
        """
        if self.folder is None:
            return None
        plan = self.trainer.plan
        parts = [f"rank-{plan.ranks.rank}"] if plan.by_features else []
        return Path(self.folder, "checkpoints", *parts)


def fit(
    stream: Stream,
    jobs: Sequence[Job],
    *,
    steps: int,
    log_every: int = 50,
    checkpoint_steps: int | None = None,
    checkpoint_seconds: float = 120.0,
    ranks: Ranks = ALONE,
) -> list[Sae]:
    """Train every job's SAE over one pass of the stream; return them, taking raw activations.

    Args:
        steps: of each; a job that has done more than another waits for it.
        checkpoint_steps, checkpoint_seconds: checkpoints are made when either has passed.

    Raises:
        TrainingError: a checkpoint made with other settings; a loss that is not finite or explodes,
            with the step, the last good checkpoint and what to try.
    """
    spent = max(_resume(job, stream, ranks) for job in jobs)
    start = min(job.trainer.done for job in jobs)
    began = saved_at = time.monotonic()
    elapsed = 0.0
    bar = progress("train", steps * stream.batch_size)
    bar.initial = start * stream.batch_size  # so that the rate is this run's
    bar.update(bar.initial)
    with ExitStack() as stack:
        stack.enter_context(bar)
        batches = stack.enter_context(closing(prefetched(stream.batches(start, steps))))
        logs = [stack.enter_context(_log(job, stream, ranks)) for job in jobs]
        for step, batch in batches:
            done = step + 1
            shown: dict[str, float] = {}
            for job, log in zip(jobs, logs, strict=True):
                if job.trainer.done > step:
                    continue
                figures = _step(job, batch)
                if done % log_every == 0 or done == steps:
                    elapsed = spent + time.monotonic() - began
                    seen = done * stream.batch_size
                    figures |= {"tokens_per_s": seen / max(elapsed, 1e-9), "seconds": elapsed}
                    log(done, {"tokens": seen, **figures})
                    shown = shown or figures
            bar.update(stream.batch_size)
            if shown:
                bar.set_postfix_str(
                    "loss {loss:.3f} L0 {l0:.1f} EV {ev:.3f} dead {dead_fraction:.1%}".format(
                        **shown
                    )
                )
            late = time.monotonic() - saved_at >= checkpoint_seconds
            if ranks.size > 1:
                late = done % _AGREE_EVERY == 0 and ranks.objects(late)[0]
            if done == steps or late or (checkpoint_steps and done % checkpoint_steps == 0):
                for job in jobs:
                    _save(job, stream, spent + time.monotonic() - began, ranks)
                saved_at = time.monotonic()
    return [job.trainer.finished() for job in jobs]


def _step(job: Job, batch: Any) -> dict[str, float]:
    try:
        return job.trainer.step(batch)
    except TrainingError as error:
        # Good is one whose weights a later step found a finite loss for.
        saved = steps_saved(job.checkpoints) if job.checkpoints else []
        good = [step for step in saved if step < job.trainer.done]
        kept = f"step {good[-1]} in {job.checkpoints}" if good else "none"
        name = f"{job.name}: " if job.name else ""
        raise TrainingError(
            f"{name}{error}; last good checkpoint: {kept} (other settings start anew: remove "
            f"{job.checkpoints} first)"
        ) from error


def settings_of(job: Job, stream: Stream) -> dict[str, Any]:
    """Everything that the weights depend on: a checkpoint made with others is refused."""
    trainer = job.trainer
    return {
        **dataclasses.asdict(trainer.settings),
        "lr": trainer.lr,
        "sparsity": trainer.sparsity,
        "dead_after": trainer.dead_after,
        "products": str(trainer.plan.dtype).removeprefix("torch."),
        "steps": trainer.steps,
        "batch_size": stream.batch_size,
        "hook_point": str(trainer.identity.get("hook_point")),
        "hook_point_out": str(trainer.identity.get("hook_point_out")),
        "model": trainer.identity.get("model_fingerprint") or trainer.identity.get("model_id"),
        "processes": trainer.plan.ranks.size if trainer.plan.by_features else 1,
        **stream.identity,
    }


@contextmanager
def _log(job: Job, stream: Stream, ranks: Ranks) -> Iterator[Log]:
    """metrics.jsonl and what else was asked for; of several processes the first one writes."""
    if job.folder is None or not ranks.first:
        yield lambda step, figures: None
        return
    metrics = Metrics(job.folder / "metrics.jsonl", job.trainer.done)
    settings = settings_of(job, stream)
    with open_logs(job.log_to, job.folder, settings, start=job.trainer.done) as others:

        def write(step: int, figures: Mapping[str, float]) -> None:
            metrics.write({"step": step, **figures})
            others(step, figures)

        yield write


def _resume(job: Job, stream: Stream, ranks: Ranks) -> float:
    """Restore the newest checkpoint that every rank has whole; return the seconds spent so far."""
    folder = job.checkpoints
    if folder is None or job.folder is None:
        return 0.0
    _check_layout(job, job.folder / "checkpoints")
    tried: set[int] = set()
    while True:
        mine = [step for step in steps_saved(folder) if step not in tried]
        common = set.intersection(*map(set, ranks.objects(mine)))
        if not common:
            if mine and not tried:  # other processes lack it: were there as many before?
                saved_checkpoint(folder, mine[-1], settings_of(job, stream))
            return 0.0
        step = max(common)
        found = saved_checkpoint(folder, step, settings_of(job, stream))
        if all(ranks.objects(found is not None)):
            assert found is not None
            job.trainer.restore(found.tensors, found.step)
            job.saved = found.step
            return found.seconds
        tried.add(step)


def _check_layout(job: Job, folder: Path) -> None:
    """Refuse checkpoints of processes that shared the latents where these don't, and conversely."""
    parts = len(list(folder.glob("rank-*")))
    if parts if not job.trainer.plan.by_features else steps_saved(folder):
        was = f"by {parts} processes that shared the features" if parts else "with whole SAEs"
        raise TrainingError(
            f"the checkpoints in {folder} were made {was}; train in the same way to go on, or "
            f"remove {folder} to start again"
        )


def _save(job: Job, stream: Stream, seconds: float, ranks: Ranks) -> None:
    folder = job.checkpoints
    if folder is None or not (ranks.first or job.trainer.plan.by_features):
        return
    if job.saved != job.trainer.done:
        state = Checkpoint(job.trainer.state(), job.trainer.done, seconds)
        save_checkpoint(folder, state, settings_of(job, stream))
        job.saved = job.trainer.done
