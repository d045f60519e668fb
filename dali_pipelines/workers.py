"""Processes that prepare batches side by side, where a thread beside the training loop cannot keep up with a GPU.

A thread shares Python's lock with the loop that launches the GPU's work. A worker shares nothing but memory: what is
large in a batch (pictures, planes, tables) lies in a block that both sides map, the rest goes through a pipe.
"""

from __future__ import annotations

import ast
import io
import itertools
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import reduction, resource_tracker, util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from copynce.pixtrace.view.composed_view import Empty
from dali_pipelines.arena import SharedArena
from dali_pipelines.reading import Quarantine
from dali_pipelines.sources import AnyPath

#: Batches that a worker prepares ahead of the one that is fetched next: it works while one waits.
_AHEAD = 2

#: Broken files of which a question tells a worker, at most; the rest with the next ones.
_MOST_TOLD = 64

#: Signals that reach the owner's whole group and ask it to end: it may want to finish its work first, and needs its
#: workers for that. Blocked in a worker from its first instruction on; it ends with its pipe.
_OWNERS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

#: Bytes from which on an array goes through shared memory; to name its place there takes some hundred.
_LARGE = 2048


class Preparation(Protocol):
    """What a worker does; it is pickled once, when the worker starts."""

    def start(self, report: Callable[[AnyPath, str], None]) -> None:
        """Begin in a worker; ``report(path, reason)`` takes files that turn out to be broken."""

    def leave_out(self, broken: dict[str, str]) -> None:
        """Files (and why) that others found broken."""

    def batch(self, index: int, empty: Empty) -> object:
        """Batch ``index``; ``empty(shape, dtype)`` gives the memory of its large arrays."""


def require_guard() -> None:
    """RuntimeError if the caller's script would begin again in every worker.

    A new process imports the program's script to know its names. What the script calls outside of a block ``if __name__
    == "__main__":``, in whatever function it ends up here, would be called once more there, and so the whole run.
    """
    script = sys.modules.get("__main__")
    name = getattr(getattr(script, "__spec__", None), "name", None) or ""
    if script is None or name == "__main__" or name.endswith(".__main__"):  # these are not imported again
        return
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and not (frame.f_code.co_name == "<module>" and frame.f_globals is vars(script)):
        frame = frame.f_back
    if frame is None:
        return
    line, path = frame.f_lineno, frame.f_code.co_filename
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError):  # typed in, not a script
        return
    conditions = [part for part in ast.walk(tree) if isinstance(part, ast.If)]
    around = [part for part in conditions if part.lineno <= line <= (part.end_lineno or line)]
    if any("__name__" in ast.unparse(part.test) for part in around):
        return
    raise RuntimeError(
        f"{path}, line {line}: with worker processes, what a script runs must stand in a block "
        "'if __name__ == \"__main__\":', or each worker would run it again; put this line into one"
    )


class Workers:
    """``processes`` workers, which prepare the batches 0, 1, ... in turns; :meth:`fetch` gives them in this order.

    Workers are told of the files in ``quarantine``, which takes those that workers find. ValueError if ``preparation``
    cannot be pickled, RuntimeError if the calling script would begin again in each.
    """

    def __init__(self, preparation: Preparation, processes: int, batches: int, quarantine: Quarantine) -> None:
        require_guard()
        self._batches = batches
        self._quarantine = quarantine
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of DALI's and torch's threads
        self._workers: list[_Worker] = []
        try:
            for _ in range(min(processes, batches)):
                try:
                    self._workers.append(_Worker(context, preparation))
                except (pickle.PicklingError, AttributeError, TypeError) as error:
                    raise ValueError(f"with processes, batches and substitute must be picklable: {error}") from error
            for index in range(min(batches, len(self._workers) * _AHEAD)):
                self._ask(index)
        except BaseException:
            self.close()
            raise

    def fetch(self, index: int) -> tuple[Any, Callable[[], None]]:
        """Batch ``index``, and what to call when nobody reads its arrays any more.

        Raises what preparing it raised, and RuntimeError if the worker died.
        """
        if not 0 <= index < self._batches:
            raise IndexError(f"there are {self._batches} batches, got {index}")
        worker = self._workers[index % len(self._workers)]
        outcome, block = worker.receive()
        for path, reason in outcome.broken:
            self._quarantine.add(path, reason)
        following = index + len(self._workers) * _AHEAD
        if following < self._batches:
            self._ask(following)
        if outcome.error is not None:
            raise outcome.error
        return outcome.batch, lambda: worker.free.append(block)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.end()

    def _ask(self, index: int) -> None:
        self._workers[index % len(self._workers)].ask(index, self._quarantine.reasons())


class _Outcome:
    """What a worker answers: a batch or an error, and the files that it found broken on the way."""

    def __init__(self, batch: object, error: BaseException | None, broken: Sequence[tuple[AnyPath, str]]) -> None:
        self.batch, self.error, self.broken = batch, error, broken


class _Worker:
    """A worker as its owner sees it."""

    def __init__(self, context: Any, preparation: Preparation) -> None:
        self.free: deque[int] = deque()  # blocks that may be written again
        self._told: set[str] = set()
        self._blocks: dict[int, mmap.mmap] = {}
        self._pipe, theirs = context.Pipe()
        # A daemon ends with its owner; if the owner is killed, the pipe's end does it.
        self._process = context.Process(
            target=_serve, args=(theirs, preparation), name="dali_pipelines worker", daemon=True
        )  # fmt: skip
        resource_tracker.ensure_running()  # else started below, where it would let the signals through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _OWNERS_SIGNALS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # At exit multiprocessing would send a signal that is blocked, and wait.
        util.Finalize(self, self._process.kill, exitpriority=0)
        theirs.close()

    def ask(self, index: int, known: dict[str, str]) -> None:
        # Few at a time: a question must fit into the pipe while the worker is busy filling the other direction.
        unknown = ((path, reason) for path, reason in known.items() if path not in self._told)
        new = dict(itertools.islice(unknown, _MOST_TOLD))
        self._told |= new.keys()
        free = [self.free.popleft() for _ in range(len(self.free))]
        try:
            self._pipe.send((index, free, new))
        except OSError:
            raise self._death() from None

    def receive(self) -> tuple[_Outcome, int]:
        try:
            block, size, is_new = self._pipe.recv()
            if is_new:
                handle = reduction.recv_handle(self._pipe)
                try:
                    self._blocks[block] = mmap.mmap(handle, size)
                finally:
                    os.close(handle)
            data = self._pipe.recv_bytes()
        except (EOFError, OSError):
            raise self._death() from None
        outcome: _Outcome = _Unpickler(io.BytesIO(data), self._blocks.get(block)).load()
        return outcome, block

    def end(self) -> None:
        # The pipe stays open: a thread may be waiting at it, and sees its end.
        self._process.kill()
        self._process.join()

    def _death(self) -> RuntimeError:
        self._process.join(5)
        return RuntimeError(
            f"a process that prepared batches died (exit code {self._process.exitcode}; -9 is often want of memory)"
        )


class _Unpickler(pickle.Unpickler):
    """Reads what a worker wrote; large arrays are views of its block. The pipe has no other writer."""

    def __init__(self, file: io.BytesIO, block: mmap.mmap | None) -> None:
        super().__init__(file)
        self._block = block

    def persistent_load(self, place: tuple[int, tuple[int, ...], str]) -> NDArray[Any]:
        start, shape, kind = place
        assert self._block is not None, "sent before"
        return np.ndarray(shape, np.dtype(kind), self._block, start)


class _Pickler(pickle.Pickler):
    """Writes large arrays as places in an arena, where it copies those that lie elsewhere."""

    def __init__(self, file: io.BytesIO, arena: SharedArena) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._arena = arena
        self._copies: dict[int, tuple[NDArray[Any], tuple[int, tuple[int, ...], str]]] = {}

    def persistent_id(self, value: object) -> tuple[int, tuple[int, ...], str] | None:
        if type(value) is not np.ndarray or value.nbytes < _LARGE:
            return None
        if id(value) in self._copies:
            return self._copies[id(value)][1]
        start = self._arena.start_of(value)
        if start is None:
            inside = self._arena.empty(value.shape, value.dtype)
            start = self._arena.start_of(inside)
            if start is None:
                return None  # the arena is full; it will be larger when it is used again
            inside[...] = value
        place = (start, value.shape, value.dtype.str)
        self._copies[id(value)] = value, place  # kept, for another array may get the number of one that is gone
        return place


def _portable(error: Exception) -> Exception:
    """The error with its traceback as text, as something that the owner can unpickle."""
    story = "in a process that prepares batches:\n" + traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))  # what this process has just written
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(story)
    return error


def _serve(pipe: Connection, preparation: Preparation) -> None:
    """A worker's life: prepare what is asked for, until the owner hangs up."""
    owner = os.getppid()
    broken: list[tuple[AnyPath, str]] = []
    preparation.start(lambda path, reason: broken.append((path, reason)))
    arenas: list[SharedArena] = []
    free: list[int] = []
    while True:
        try:
            index, freed, known = pipe.recv()
        except (EOFError, OSError):
            return
        free += freed
        if not free:
            arenas.append(SharedArena(max((arena.size for arena in arenas), default=0)))
            free.append(len(arenas) - 1)
        number = free.pop()
        arena = arenas[number]
        arena.clear()
        preparation.leave_out(known)
        broken.clear()
        try:
            outcome = _Outcome(preparation.batch(index, arena.empty), None, broken)
        except Exception as error:
            outcome = _Outcome(None, _portable(error), broken)
        message = io.BytesIO()
        _Pickler(message, arena).dump(outcome)
        try:
            arena.send(pipe, number, owner)
            pipe.send_bytes(message.getbuffer())
        except OSError:
            return
