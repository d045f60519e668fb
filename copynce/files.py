"""Files that are either whole or absent, and their hashes."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from copynce.errors import WriteError


@contextmanager
def whole_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The name of a file to be written that appears at `path` only once it is complete and on the disk.

    It lies beside `path` under a temporary name, then it is renamed; if the block raises, `path` is left as it was and
    no part of the new file stays. Raises WriteError if the disk is full or the folder takes no file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except WriteError:
        raise
    except OSError as error:
        # Writing names no file, opening and renaming name this one; the error of another file is not ours to tell.
        if error.filename not in (None, str(temporary)):
            raise
        raise WriteError(
            f"{path} could not be written: {error.strerror or error}; free some space there or choose another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """As :func:`whole_path`, the file open for writing in binary."""
    with whole_path(path) as temporary, temporary.open("wb") as file:
        yield file
        file.flush()


@contextmanager
def atomic_text(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """As :func:`whole_file`, for text: UTF-8, line ends written as given.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_text(Path(folder) / "metrics.json") as file:
    ...         _ = file.write("{}")
    ...     (Path(folder) / "metrics.json").read_text()
    '{}'
    """
    with whole_file(path) as file:
        # surrogateescape: a picture's name need not be UTF-8, and must come back as it was.
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        yield text
        text.detach()  # flushes, and leaves the file open


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Put a folder's list of names on the disk, so that what was renamed in it outlives a power cut."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing
            raise
    finally:
        os.close(folder)
