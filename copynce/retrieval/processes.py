"""Processes that share work by dealing it out: what a command knows of its torchrun."""

from __future__ import annotations

import hashlib
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from copynce.data import Manifest
from dali_pipelines.sources import ShardMember


class Processes(Protocol):
    """This process among those that work together, such as `copynce.training.distributed.World`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def broadcast_object(self, value: object) -> object:
        """The value of rank 0, on every process."""

    def together(self) -> AbstractContextManager[None]:
        """A block that ends when all have ended it, and fails on all if it fails on one."""


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1

    def broadcast_object(self, value: object) -> object:
        return value

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()


def picture_state(manifest: Manifest, place: int) -> str:
    """A picture's name, file, size and time of change, as text."""
    uuid, path = manifest.uuids[place], manifest.paths[place]
    file, inside = (path.shard, f"{path.offset} {path.size}") if isinstance(path, ShardMember) else (path, "")
    try:
        status = os.stat(file)
        state = f"{status.st_size} {status.st_mtime_ns}"
    except OSError:  # a broken picture, as long as it stays so
        state = "absent"
    return "\0".join([uuid, os.fspath(path), inside, state, ""])


def text_hash(texts: list[str]) -> str:
    """The SHA-256 of texts one after the other."""
    return hashlib.sha256("".join(texts).encode(errors="surrogateescape")).hexdigest()
