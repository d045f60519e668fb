"""What a run tells: log.jsonl, the same to boards that draw curves, and a progress line."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from copynce.errors import WriteError
from copynce.files import atomic_text
from copynce.training.boards import Board
from copynce.training.signals import drop_lost_outputs, tell


class RunLog:
    """The log of one run, on the main process only (``enabled=False`` elsewhere: every call does nothing).

    ``first_step``: where the run continues; lines of later steps, written before a kill, are taken back, events stay.
    Lines that are none (a power cut leaves zeros) are left out, with a sentence. ``boards`` makes those that get the
    numbers too, once the log stands. On a terminal a live bar with pictures
    per second and time left; elsewhere a line whenever something is logged.
    """

    def __init__(
        self,
        run: Path,
        *,
        first_step: int,
        total_steps: int,
        boards: Callable[[], Sequence[Board]] = tuple,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        self._last = total_steps
        if not enabled:
            return
        self._path = run / "log.jsonl"
        content = self._path.read_bytes() if self._path.exists() else b""
        lines, spoiled = _parse(content)
        kept = [line for line in lines if "event" in line or line["step"] <= first_step]
        with atomic_text(self._path) as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        # Unbuffered: after a write that failed nothing is left that closing would try again.
        self._file = self._path.open("ab", buffering=0)
        if spoiled:
            listed = ", ".join(map(str, spoiled[:5])) + (", ..." if len(spoiled) > 5 else "")
            self.event(first_step, "log repaired", f"{self._path}: line {listed} could not be read and was left out")
        self._boards = boards()
        self._live = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
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
            drop_lost_outputs()
            self._bar.stop()
            self._file.close()
            for board in self._boards:
                with contextlib.suppress(OSError):  # curves; the numbers stand in log.jsonl
                    board.close()

    def step(self, step: int, pictures_per_second: float) -> None:
        """Move the bar."""
        if self.enabled:
            self._bar.update(self._task, completed=step, status=f"{pictures_per_second:.1f} pictures/s")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of log.jsonl, the same to the boards."""
        if not self.enabled:
            return
        self._append({"step": step, **values})
        if not self._live:
            left = f"{values['eta_seconds'] / 60:.1f} min left"
            tell(  # not rich, which ends the process where nobody reads what it prints
                f"step {step}/{self._last}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
                f"{values['pictures_per_second']:.1f} pictures/s  {left}"
            )
        self.draw(step, values)

    def draw(self, step: int, values: Mapping[str, float]) -> None:
        """Points of the boards' curves."""
        if not self.enabled:
            return
        for board in self._boards:
            try:
                board.write(step, values)
            except OSError as error:
                raise _unwritable(self._path.parent / "tensorboard", error) from error

    def event(self, step: int, kind: str, text: str, **values: Any) -> None:
        """Something that happened to the run after ``step`` steps: a line ``{"step", "event": kind, "text", ...}`` of
        log.jsonl, and ``text`` on stderr."""
        if self.enabled:
            self._append({"step": step, "event": kind, "text": text, **values})
            tell(text)

    def sync(self) -> None:
        """Flush log.jsonl to the disk."""
        if self.enabled:
            os.fsync(self._file.fileno())

    def _append(self, line: Mapping[str, Any]) -> None:
        left = (json.dumps(line) + "\n").encode()
        try:
            while left:  # a disk that is nearly full takes a part, and fails at the next
                left = left[self._file.write(left) :]
        except OSError as error:
            raise _unwritable(self._path, error) from error


def read_log(path: Path) -> list[dict[str, float]]:
    """The numbers of a log.jsonl, a dict a line; events, and lines that a kill or a power cut spoiled, are left out."""
    return [line for line in _parse(path.read_bytes())[0] if "event" not in line]


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a log.jsonl: what was changed, repaired or stopped, and after which step."""
    return [line for line in _parse(path.read_bytes())[0] if "event" in line]


def _parse(content: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines of a log, and the numbers (from 1) of those that are none; a last one that was cut short is neither."""
    lines, spoiled = [], []
    texts = content.split(b"\n")
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            if type(line["step"]) is not int:
                raise ValueError("no number of a step")
            lines.append(line)
        except (ValueError, KeyError, TypeError):
            cut = number == len(texts) and b"\0" not in text
            if text and not cut:
                spoiled.append(number)
    return lines, spoiled


def _unwritable(path: Path, error: OSError) -> WriteError:
    return WriteError(
        f"{path} cannot be written ({error.strerror or error}). Make room, and the same command continues the run from "
        "its last checkpoint"
    )
