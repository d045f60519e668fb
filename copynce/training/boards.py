"""Where a run's numbers go beside log.jsonl: TensorBoard, Weights & Biases."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from copynce.errors import ConfigError, RunError
from copynce.files import atomic_text

_ID = "wandb-id.txt"


class Board(Protocol):
    """Something that draws curves. OSError where it cannot write."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers after ``step`` steps."""

    def close(self) -> None:
        """No more will come."""


class TensorBoard:
    """Event files in ``RUN/tensorboard``; what an earlier start wrote of steps after ``first_step`` is taken back."""

    def __init__(self, run: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the ``project`` on Weights & Biases, named as the run's folder, where its id and files are kept: a
    training that continues continues it. ``settings``: shown beside the curves."""

    def __init__(self, run: Path, project: str, settings: Mapping[str, Any]) -> None:
        wandb = import_wandb()
        path = run / _ID
        if not path.exists():
            with atomic_text(path) as file:
                file.write(secrets.token_hex(8) + "\n")
        try:
            self._run: Any = wandb.init(
                project=project,
                name=run.resolve().name,
                id=path.read_text().strip(),
                resume="allow",
                dir=str(run),
                config=dict(settings),
            )
        except wandb.Error as error:
            raise RunError(
                f"wandb={project} cannot be begun ({error}); log in with: wandb login, or set WANDB_MODE=offline, "
                f"which keeps the numbers in {run}"
            ) from error
        # A run that goes on from a checkpoint comes back to steps that were told, which W&B's own count refuses.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def import_wandb() -> Any:
    """The package wandb. Raises ConfigError where it is not installed."""
    try:
        import wandb

        wandb.init  # noqa: B018 - a folder of that name, such as it leaves itself, is imported too
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"wandb=PROJECT needs the package wandb, which cannot be imported here ({error}); pip install "
            "'copynce[wandb]', or leave the setting out"
        ) from error
    return wandb
