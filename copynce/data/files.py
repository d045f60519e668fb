"""Files that are either whole or absent."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def atomic_text(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """A text file open for writing that appears at `path` only once it is complete.

    It is written beside `path` under a temporary name, then renamed; if the block raises, `path` is left as it was.
    UTF-8; line ends are written as given.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_text(Path(folder) / "metrics.json") as file:
    ...         _ = file.write("{}")
    ...     (Path(folder) / "metrics.json").read_text()
    '{}'
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # surrogateescape: a picture's name need not be UTF-8, and must come back as it was.
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Flush a folder's list of names to the disk, so that what was renamed in it outlives a power cut."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing
            raise
    finally:
        os.close(folder)
