"""Signals that ask a training to stop: it finishes its step and saves, instead of losing what it did since the last
checkpoint."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from copynce.errors import Stopped

#: Ctrl-C; a scheduler that takes the machine back; a terminal or connection that was closed; a scheduler's warning
#: before the time limit (Slurm's --signal=USR1@SECONDS).
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

_SHOW_CURSOR = b"\x1b[?25h"  # a progress bar has hidden it


class StopRequest:
    """While its ``with`` block runs, a signal of ``signals`` is noted: ``name`` is that of the first, None before.

    Until :meth:`defer` the signal raises Stopped where it arrives, for there is no step to finish; from then on the
    loop asks for ``name``. A second Ctrl-C ends the process at once. A signal that is ignored when the block begins
    (nohup, a shell's background job) stays so. Python takes signals in its main thread only; elsewhere nothing is
    noted.
    """

    def __init__(self, signals: Sequence[signal.Signals] = STOPPING) -> None:
        self.name: str | None = None
        self._signals = signals
        self._before: dict[signal.Signals, Any] = {}
        self._deferred = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: somebody's who is no Python
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def defer(self) -> None:
        """From now on signals are only noted."""
        self._deferred = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.name = self.name is None, self.name or signal.Signals(number).name
        drop_lost_outputs()
        if not self._deferred:
            raise Stopped(f"stopped by {self.name} before the first step; the same command begins again")
        if number == signal.SIGINT:
            # Not a KeyboardInterrupt: Python raises it only between two of its own instructions, and the step may hang.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if first:
            notice = f"{self.name}: the run saves after this step and ends; Ctrl-C ends it at once\n".encode()
            # No print: the signal may have come within one.
            os.write(2, (_SHOW_CURSOR if os.isatty(2) else b"") + notice)


def drop_lost_outputs() -> None:
    """Send stdout and stderr nowhere where nobody reads them any more (a closed terminal, a pipe whose reader ended).

    The signal that stops a training often ends what it prints to as well, and printing must not end it before it saves.
    """
    for stream in (1, 2):
        poll = select.poll()
        poll.register(stream, select.POLLOUT)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)


def tell(text: str) -> None:
    """Print a sentence on stderr, if somebody reads it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        drop_lost_outputs()
