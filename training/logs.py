"""Where figures go while training, besides metrics.jsonl: TensorBoard and Weights & Biases."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from saesteer.core.files import written_aside
from saesteer.errors import ConfigError, did_you_mean

Log = Callable[[int, Mapping[str, float]], None]


def check_logs(names: Sequence[str]) -> None:
    """Refuse logs that can't be opened: ConfigError, as in `open_logs`."""
    for name in names:
        if name not in _OPEN:
            raise ConfigError(
                f"no log {name!r}{did_you_mean(name, _OPEN)}; expected {' or '.join(_OPEN)} "
                "(metrics.jsonl is always written)"
            )
        if find_spec(name) is None:
            raise _missing(name)


@contextmanager
def open_logs(
    names: Sequence[str], folder: Path, settings: Mapping[str, Any], *, start: int = 0
) -> Iterator[Log]:
    """Open the logs that were asked for; call what it yields with (step, figures).

    A run that goes on after it was killed goes on in the same logs: what they hold beyond `start`
    is dropped by TensorBoard, and W&B keeps what it had for those steps.

    Args:
        names: of "tensorboard", "wandb"; none is fine.
        folder: the run's; TensorBoard's files go into folder/tensorboard, W&B's into folder/wandb,
            its run id beside them.
        settings: shown as the run's configuration.
        start: the step the run goes on from; 0 for a new one.

    Raises:
        ConfigError: an unknown name, or a package that is missing, with the extra that has it.
    """
    check_logs(names)
    with ExitStack() as stack:
        logs = [
            stack.enter_context(_OPEN[name](folder, settings, start))
            for name in dict.fromkeys(names)
        ]

        def write(step: int, figures: Mapping[str, float]) -> None:
            for log in logs:
                log(step, figures)

        yield write


@contextmanager
def _tensorboard(folder: Path, settings: Mapping[str, Any], start: int) -> Iterator[Log]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard") from error
    # Of what an earlier process wrote, TensorBoard then hides everything from this step on.
    purge = start + 1 if start else None
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
    try:
        if not start:
            rows = (f"| {key} | {value} |" for key, value in settings.items())
            writer.add_text("settings", "\n".join(["| | |", "|---|---|", *rows]), 0)

        def log(step: int, figures: Mapping[str, float]) -> None:
            for name, value in figures.items():
                writer.add_scalar(name, value, step)

        yield log
    finally:
        writer.close()


@contextmanager
def _wandb(folder: Path, settings: Mapping[str, Any], start: int) -> Iterator[Log]:
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb") from error
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "saesteer"),
            name=folder.resolve().name,
            id=_run_id(folder / "wandb-id", new=start == 0),
            resume="allow",
            dir=str(folder),
            config=dict(settings),
        )
    except (wandb.Error, OSError) as error:
        raise ConfigError(
            f"W&B cannot be reached ({' '.join(str(error).split())}); log in with `wandb login`, "
            "or set WANDB_MODE=offline and upload later with `wandb sync`"
        ) from error
    failed = 1
    try:
        yield lambda step, figures: run.log(dict(figures), step=step)
        failed = 0
    finally:
        run.finish(exit_code=failed)


def _run_id(path: Path, *, new: bool) -> str:
    """The id that W&B knows the run by, kept in the run folder; another for one begun anew."""
    if not new and path.exists():
        return path.read_text(encoding="utf-8").strip()
    made = uuid4().hex[:8]
    with written_aside(path) as aside:
        aside.write_text(made + "\n", encoding="utf-8")
    return made


def _missing(package: str) -> ConfigError:
    return ConfigError(
        f"{package} is not installed; install it with `pip install 'saesteer[logging]'`, or take "
        f"{package} out of the logs"
    )


_OPEN: dict[str, Callable[[Path, Mapping[str, Any], int], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
