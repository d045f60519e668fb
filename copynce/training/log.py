"""What a run tells: log.jsonl, TensorBoard curves, and a progress line."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """The log of one run, on the main process only (``enabled=False`` elsewhere: every call does nothing).

    ``first_step``: where the run continues; lines of later steps, written before a kill, are taken back. On a terminal
    a live bar with pictures per second and time left; elsewhere a line whenever something is logged.
    """

    def __init__(
        self, run: Path, *, first_step: int, total_steps: int, tensorboard: bool = True, enabled: bool = True
    ) -> None:
        self.enabled = enabled
        self._last = total_steps
        if not enabled:
            return
        self._path = run / "log.jsonl"
        kept = [line for line in read_log(self._path) if line["step"] <= first_step] if self._path.exists() else []
        temporary = self._path.with_name(".log.jsonl.part")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self._path)
        self._file = self._path.open("a", buffering=1)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1) if tensorboard else None
        self._console = Console(stderr=True)
        self._live = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=first_step, status="")

    def __enter__(self) -> RunLog:
        if self.enabled:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self._bar.stop()
            self._file.close()
            if self._board is not None:
                self._board.close()

    def step(self, step: int, pictures_per_second: float) -> None:
        """Move the bar."""
        if self.enabled:
            self._bar.update(self._task, completed=step, status=f"{pictures_per_second:.1f} pictures/s")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of log.jsonl, the same to TensorBoard."""
        if not self.enabled:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if not self._live:
            left = f"{values['eta_seconds'] / 60:.1f} min left"
            self._console.print(
                f"step {step}/{self._last}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
                f"{values['pictures_per_second']:.1f} pictures/s  {left}",
                highlight=False,
                soft_wrap=True,
            )


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log.jsonl; a last line that a kill cut short is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
