"""Meetings of processes: they wait for one that works for hours, and not for one that has ended.

A collective of NCCL or gloo fails when a process comes to it later than its time-out, and one without a time-out would
wait for the dead. Here each process gives signs of life from a thread, through the group's key-value store, whatever
else it does; who has come to a meeting waits as long as those that are missing give theirs.
"""

from __future__ import annotations

import contextlib
import threading
import time
from types import TracebackType

from torch.distributed.distributed_c10d import Store

from copynce.errors import RunError

#: Seconds between two signs of life, and how long one may be silent before it counts as dead; a process that is stopped
#: by a debugger, or whose machine hangs, comes to that.
BEAT, SILENCE = 5.0, 60.0
_LOOK = 0.2  # seconds between looks at those that are missing, at most
_FAREWELL = 2.0  # seconds that the last word may take


class Meetings:
    """The meetings of process ``rank`` of ``size``, all of which have one ``store``; within its ``with`` block."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._lock = threading.Lock()
        self._met = self._beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="signs of life", daemon=True)

    def __enter__(self) -> Meetings:
        self._tell()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(_FAREWELL)
        if self._thread.is_alive():
            return  # the store does not answer
        with contextlib.suppress(RuntimeError):  # the store has ended with its process
            self._tell()

    def meet(self) -> None:
        """Wait until all have called this as often. Raises RunError if one of them has ended before or is silent."""
        with self._lock:
            self._met += 1
        self._tell()
        heard: dict[int, tuple[str, float]] = {}  # of those that are missing: what they told last, and when
        missing, pause = [rank for rank in range(self._size) if rank != self._rank], 0.001
        while True:
            now = time.monotonic()
            for rank in list(missing):
                told = self._told(rank)
                met, _, ended = told.split()
                if int(met) >= self._met:
                    missing.remove(rank)
                    continue
                if heard.get(rank, ("", now))[0] != told:
                    heard[rank] = told, now
                if ended == "True" or now - heard[rank][1] > SILENCE:
                    why = "has ended" if ended == "True" else f"has given no sign of life for {SILENCE:g} s"
                    raise RunError(
                        f"process {rank} {why}, so {self._rank} cannot go on; the same command continues a run"
                    )
            if not missing:
                return
            time.sleep(pause)
            pause = min(2 * pause, _LOOK)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            self._beats += 1
            try:
                self._tell()
            except RuntimeError:
                return  # the store has ended; who waits for it is told by its own call

    def _tell(self) -> None:
        with self._lock:
            self._store.set(f"copynce/alive/{self._rank}", f"{self._met} {self._beats} {self._ended.is_set()}")

    def _told(self, rank: int) -> str:
        key = f"copynce/alive/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else "0 0 False"
