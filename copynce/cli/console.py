"""What a person sees on the terminal: errors, bars, tables."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import TaskID


_LINE = 30.0  # seconds between lines of progress where there is no terminal


def escape_what_cannot_be_shown(stream: TextIO) -> None:
    """A name that the terminal's encoding lacks must not end the command."""
    reconfigure = getattr(stream, "reconfigure", None)  # absent where somebody has put another object there
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def complain(command: str, text: str) -> None:
    """One error on stderr. A name may hold control characters, which would move the cursor."""
    shown = "".join(c if c == "\n" or not c.isascii() or c.isprintable() else repr(c)[1:-1] for c in str(text))
    print(f"copynce {command}: {shown}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def writing_into(folder: str | Path) -> Iterator[None]:
    """Names the folder in an OSError that names no file: a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(folder)
        raise


def whole_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


class progress_bars:
    """A context whose value is called as ``report(role, done, total)``: one bar per role on stderr, with the rate and
    the time left; where stderr is no terminal, a line now and then."""

    def __init__(self, what: str = "descriptors", unit: str = "pictures", *, shown: bool = True) -> None:
        self._what, self._unit, self._shown = what, unit, shown

    def __enter__(self) -> progress_bars:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._lines = self._shown and not sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (self._shown and sys.stderr.isatty()),
        )
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, tuple[float, int]] = {}  # when, and how much was done then
        self._told = time.monotonic()
        self._bar.start()
        return self

    def __call__(self, role: str, done: int, total: int) -> None:
        name = f"{role} {self._what}".strip()
        now = time.monotonic()
        if role not in self._tasks:
            self._tasks[role] = self._bar.add_task(name, total=total, rate="")
            self._begun[role] = now, done
        begin, before = self._begun[role]
        rate = (done - before) / (now - begin) if done > before and now > begin else 0.0
        text = f"{rate:.{0 if rate >= 10 else 2}f} {self._unit}/s" if rate else ""
        self._bar.update(self._tasks[role], completed=done, rate=text)
        if self._lines and rate and now - self._told >= _LINE:
            self._told = now
            left = str(timedelta(seconds=round((total - done) / rate)))
            print(f"{name}: {done:,} of {total:,}, {text}, {left} left", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, shown: int) -> None:
    """The first `shown` rows on stdout, in columns; long names wrap. One line says how many more there are."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD)
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < 2 else "right", overflow="fold")
    for row in rows[:shown]:
        # A name may hold control characters or what the terminal cannot show.
        table.add_row(*(Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in cell)) for cell in row))
    Console().print(table)
    if len(rows) > shown:
        print(f"... and {len(rows) - shown} more")


_SHOWN = (
    ("uap", "uAP"),
    ("rp90", "RP90"),
    ("map", "mAP"),
    ("recall_at_1", "recall@1"),
    ("uap_sn", "uAP + SN"),
    ("rp90_sn", "RP90 + SN"),
)


def print_metrics(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """The metrics below each other, so that no terminal is too narrow; names stand whole on lines of their own."""
    print(title)
    if len(rows) == 1:
        print(*rows)
    else:
        print(" " * 11, *[f"{name:>8}" for name in rows])
    for key, label in _SHOWN:
        values = [row.get(key) for row in rows.values()]
        if any(value is not None for value in values):
            print(f"  {label:9}", *["       -" if value is None else f"{value:8.4f}" for value in values])
    for row in rows.values():
        if row.get("warning"):
            print(row["warning"], file=sys.stderr)
        skipped = sum(row.get(f"skipped_{role}", 0) for role in ("queries", "references", "training"))
        if skipped:
            print(f"{skipped} broken pictures were skipped; skipped.jsonl lists them", file=sys.stderr)
