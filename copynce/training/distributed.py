"""The process group: one process, or those that torchrun or srun started."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from copynce.errors import ConfigError, RunError, UserError
from copynce.training.meeting import Meetings

Value = TypeVar("Value")

#: How long processes wait for each other to appear, and one that has failed for the others to hear of it.
_MEETING, _FAREWELL = timedelta(minutes=10), timedelta(seconds=60)


@dataclass(frozen=True)
class Launch:
    """What a launcher says in the environment: this process is ``rank`` of ``size``, ``local_rank`` on its machine.

    They meet at ``place``, HOST:PORT ("" for one process); ``by_srun``: Slurm started them, not torchrun.
    """

    rank: int
    size: int
    local_rank: int
    place: str = ""
    by_srun: bool = False


def launch() -> Launch:
    """The place of this process among those that were started together; one of one where no launcher says otherwise.

    What torchrun says comes before what srun says, for it may be srun's one task of a machine. Raises ConfigError if
    the environment says half of it, or what cannot be.
    """
    if "WORLD_SIZE" not in os.environ:
        return _srun() if "SLURM_STEP_NUM_TASKS" in os.environ else Launch(0, 1, 0)
    size = _variable("WORLD_SIZE", 1, None)
    rank = _variable("RANK", 0, size - 1, 0 if size == 1 else None)
    local_rank = _variable("LOCAL_RANK", 0, None, 0)
    if size > 1:
        _variable("MASTER_PORT", 0, 65535)
        if not os.environ.get("MASTER_ADDR"):
            raise _wrong_variable("MASTER_ADDR", "the first machine's name")
        return Launch(rank, size, local_rank, f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
    return Launch(rank, size, local_rank)


def _srun() -> Launch:
    """The place of a task of srun. A batch script itself, which has no SLURM_STEP_..., is none."""
    size = _variable("SLURM_STEP_NUM_TASKS", 1, None)
    if size == 1:
        return Launch(0, 1, 0)
    rank, local_rank = _variable("SLURM_PROCID", 0, size - 1), _variable("SLURM_LOCALID", 0, size - 1)
    host = os.environ.get("MASTER_ADDR") or _first_host(os.environ.get("SLURM_STEP_NODELIST", ""))
    if not host:
        raise _wrong_variable("SLURM_STEP_NODELIST", "the machines' names")
    # Another for every job and step, below the ports that systems give to those who ask for any.
    step = ".".join(os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = _variable("MASTER_PORT", 0, 65535, 12000 + zlib.crc32(step.encode()) % 20000)
    return Launch(rank, size, local_rank, f"{host}:{port}", by_srun=True)


def _first_host(hosts: str) -> str:
    """The first of Slurm's ``gpu[003-005,7],login1``: ``gpu003``."""
    first = re.match(r"(?:[^,\[\]]|\[[^\]]*\])*", hosts)
    assert first is not None, "it may be empty"
    return re.sub(r"\[([0-9]*)[^\]]*\]", r"\1", first[0])


def _variable(name: str, least: int, most: int | None, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    expected = f"a whole number from {least} to {most}" if most is not None else f"a whole number of at least {least}"
    if (
        text is None
        or not re.fullmatch("[0-9]{1,9}", text)
        or int(text) < least
        or (most is not None and int(text) > most)
    ):
        raise _wrong_variable(name, expected)
    return int(text)


def _wrong_variable(name: str, expected: str) -> ConfigError:
    found = repr(os.environ[name]) if name in os.environ else "none"
    said = "WORLD_SIZE" if "WORLD_SIZE" in os.environ else "SLURM_STEP_NUM_TASKS"
    return ConfigError(
        f"the environment has {said}={os.environ[said]!r}, as for one of several processes, so {name} must "
        f"be {expected}, got {found}; start with {'torchrun' if said == 'WORLD_SIZE' else 'srun'}, or unset {said}"
    )


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``size`` (global numbers), on ``device``; the others are met in
    ``meetings``."""

    rank: int
    size: int
    device: torch.device
    meetings: Meetings | None = None

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def broadcast_object(self, value: object) -> object:
        """The main process' ``value``, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise mean over the processes."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def gather_objects(self, value: Value) -> list[Value]:
        """The ``value`` of every process, in the order of their ranks, on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def largest(self, value: float) -> torch.Tensor:
        """The largest ``value`` of a process, as a float32 on the device: nobody waits for it."""
        found = torch.full((), float(value), device=self.device)
        if self.size > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found

    def any(self, flag: bool) -> torch.Tensor:
        """1 where ``flag`` is true on at least one process, else 0; as :meth:`largest`."""
        return self.largest(float(flag))

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails on every process if it fails on one, so that none waits for another that is gone.

        No collective may stand in it. It may take one of them hours: the others wait as long as that one lives. The
        error is that of the lowest rank that has one.
        """
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            mine = error
        if self.size > 1:
            assert self.meetings is not None, "of several processes"
            self.meetings.meet()  # the collective has a time-out
            errors: list[Exception | None] = [None] * self.size
            dist.all_gather_object(errors, None if mine is None else _portable(mine))
            failed = next((rank for rank, error in enumerate(errors) if error is not None), None)
            if failed is not None:
                first = errors[failed]
                assert first is not None, "just found"
                if failed != self.rank:
                    _leave_the_word(first)
                raise first from mine


def _portable(error: Exception) -> Exception:
    """The error as something that another process can unpickle."""
    try:
        pickle.loads(pickle.dumps(error))  # what this process has just written
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _leave_the_word(error: Exception) -> None:
    """Let the process that ``error`` came from speak: a launcher ends all of them as soon as one has ended."""
    error.elsewhere = True  # type: ignore[attr-defined]
    with contextlib.suppress(UserError):  # the launcher's signal
        time.sleep(1.0)


def choose_device(device: str) -> torch.device:
    """The device that the setting "cpu", "gpu" or "auto" (a GPU where there is one) means for this process.

    Raises ConfigError for "gpu" where none is visible, and where more processes are on this machine than it has GPUs.
    """
    here = launch()
    index = here.local_rank
    if device == "auto":
        device = "gpu" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device=gpu needs a CUDA device, none is visible; use device=cpu or device=auto")
    count = torch.cuda.device_count()
    if here.by_srun and count == 1:
        index = 0  # srun --gpus-per-task=1 lets each task see its own GPU alone
    if index >= count:
        name = "SLURM_LOCALID" if here.by_srun else "LOCAL_RANK"
        raise ConfigError(
            f"this process is the one with {name}={index}, but {count} GPUs are visible; start at most {count} "
            "processes on this machine, or use device=cpu"
        )
    return torch.device("cuda", index)


@contextmanager
def announced() -> Iterator[None]:
    """A block before :func:`world`, such as the reading of settings: if it fails on one process, the others, which may
    be waiting in :func:`world` already, are told and fail too."""
    try:
        yield
    except (UserError, OSError) as error:
        _announce(error)
        raise


@contextmanager
def world(device: str) -> Iterator[World]:
    """Join the process group that torchrun or srun announces in the environment (NCCL on GPUs, gloo on CPUs), or none.

    ``device``: "cpu", "gpu" or "auto", see :func:`choose_device`. Raises ConfigError for an environment that says half
    of it, RunError if the other processes do not come or are lost, and the error that another has announced.
    """
    with announced():
        here, place = launch(), choose_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if here.size == 1:
        yield World(0, 1, place)
        return
    store = _meet(here)
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo", store=store, rank=here.rank, world_size=here.size
    )
    try:
        with Meetings(store, here.rank, here.size) as meetings:
            yield World(here.rank, here.size, place, meetings)
    except RuntimeError as error:
        if isinstance(error, UserError) or not _lost(error):
            raise
        raise RunError(
            f"process {here.rank} has lost another one, whose own message says why "
            f"({str(error).strip().splitlines()[0]}); the same command continues a run"
        ) from error
    finally:
        dist.destroy_process_group()


def _lost(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "by peer" in str(error).lower()


def _store(here: Launch, timeout: timedelta) -> Store:
    """The key-value store of these processes, made by the launcher or by the first of them."""
    # torchrun has made a store already, of which the environment tells more.
    url = f"tcp://{here.place}" if here.by_srun else "env://"
    store, _, _ = next(rendezvous(url, rank=here.rank, world_size=here.size, timeout=timeout))
    store.set_timeout(timeout)
    return store


def _meet(here: Launch) -> Store:
    """Wait until all processes are here; raises the error of one that has announced it."""
    try:
        store = _store(here, _MEETING)
        store.set(f"copynce/here/{here.rank}", "")
        store.wait([f"copynce/here/{rank}" for rank in range(here.size)], _MEETING)
        words = [store.get(f"copynce/here/{rank}").decode() for rank in range(here.size)]
        store.set(f"copynce/heard/{here.rank}", "")
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"process {here.rank} of {here.size} did not meet the others at {here.place} ({reason}); are all of them "
            "started, with the same place and number, and is the port free?"
        ) from error
    for rank, word in enumerate(words):
        if word:
            failed = RunError(f"process {rank}: {word}")
            _leave_the_word(failed)
            raise failed
    return store


def _announce(error: UserError | OSError) -> None:
    """Tell the other processes that this one has failed; the lowest of those that failed is to print its error."""
    spoken = False
    with contextlib.suppress(UserError, RuntimeError, ValueError, OSError):  # nobody can be told, or nobody came
        here = launch()
        if here.size == 1:
            return
        end = time.monotonic() + _FAREWELL.total_seconds()
        store = _store(here, _FAREWELL)
        store.set(f"copynce/here/{here.rank}", str(error) or type(error).__name__)
        spoken = any(_word(store, rank, end) for rank in range(here.rank))
        # Not before the words are read: the store may end with process 0, which waits for nothing but this.
        store.set(f"copynce/heard/{here.rank}", "")
        if here.rank == 0:
            for rank in range(here.size):
                store.wait([f"copynce/heard/{rank}"], timedelta(seconds=max(0.1, end - time.monotonic())))
    if spoken:
        _leave_the_word(error)


def _word(store: Store, rank: int, end: float) -> str:
    """What another process announced, "" if all is well with it."""
    store.wait([f"copynce/here/{rank}"], timedelta(seconds=max(0.1, end - time.monotonic())))
    return store.get(f"copynce/here/{rank}").decode()
