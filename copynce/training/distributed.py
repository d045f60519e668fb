"""The process group: one process, or those that torchrun started."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from copynce.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``size`` (global numbers), on ``device``."""

    rank: int
    size: int
    device: torch.device

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

    def any(self, flag: bool) -> torch.Tensor:
        """1 where ``flag`` is true on at least one process, else 0, as a float on the device: nobody waits for it."""
        found = torch.full((), float(flag), device=self.device)
        if self.size > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails on every process if it fails on one, so that none waits for another that is gone.

        No collective may stand in it. The error is that of the lowest rank that has one.
        """
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            mine = error
        if self.size > 1:
            errors: list[Exception | None] = [None] * self.size
            dist.all_gather_object(errors, None if mine is None else _portable(mine))
            first = next((error for error in errors if error is not None), None)
            if first is not None:
                raise first from mine


def _portable(error: Exception) -> Exception:
    """The error as something that another process can unpickle."""
    try:
        pickle.loads(pickle.dumps(error))  # what this process has just written
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def choose_device(device: str) -> torch.device:
    """The device that the setting "cpu", "gpu" or "auto" (a GPU where there is one) means for this process.

    Raises ConfigError for "gpu" where none is visible.
    """
    if device == "auto":
        device = "gpu" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device=gpu needs a CUDA device, none is visible; use device=cpu or device=auto")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def world(device: str) -> Iterator[World]:
    """Join the process group that torchrun announces in the environment (NCCL on GPUs, gloo on CPUs), or none.

    ``device``: "cpu", "gpu" or "auto", see :func:`choose_device`.
    """
    place = choose_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield World(0, 1, place)
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()
