"""Who works with an index at the moment: many at once, or one alone who may remove what nobody reads any more.

Transactions need no lock. But a removal of old versions takes the files from under a reader, and a removal of what a
killed writer left takes those of one that is at work. So all hold a shared lock (flock, which ends with its process),
and whoever cleans asks for an exclusive one and does without if there are others.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

_NAME = ".lock"


class IndexLock:
    """The lock of an index; without effect where the folder is no local one or takes none."""

    def __init__(self, folder: Path | None) -> None:
        self._file: int | None = None
        self._depth = 0
        if folder is None:
            return
        for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):  # of others' indexes we may only read
            with contextlib.suppress(OSError):
                self._file = os.open(folder / _NAME, flags | os.O_CLOEXEC, 0o666)
                return

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """A block of reading or writing; may stand in another."""
        if self._depth == 0:
            self._take(fcntl.LOCK_SH)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._take(fcntl.LOCK_UN)

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """A block, and whether nobody else is at work while it lasts; may stand in one of `shared`."""
        alone = self._take(fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not alone and self._depth:  # a failed change has lost the lock that was there
            self._take(fcntl.LOCK_SH)
        try:
            yield alone
        finally:
            if alone:
                self._take(fcntl.LOCK_SH if self._depth else fcntl.LOCK_UN)

    def _take(self, operation: int) -> bool:
        if self._file is None:
            return False
        try:
            fcntl.flock(self._file, operation)
        except OSError:  # another has it, or the file system knows no locks
            return False
        return True
