"""The files that an index is to hold: of folders, lists, shards, single files and lists on the standard input."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from copynce.data.manifest import PICTURE_SUFFIXES, read_manifest
from copynce.data.tables import Paths
from copynce.errors import DataError
from copynce.index.names import stored
from dali_pipelines.sources import HEAD, ShardMember, kind_of_entry, picture_format

File = str | ShardMember
Skip = Callable[[str, str], None]

#: The source that stands for the standard input.
STANDARD_INPUT = "-"
_LISTS = (".csv", ".json")  # whose uuids are the pictures' ids


@dataclass(frozen=True)
class Listing:
    """N files, each once, in the order they were given.

    files: absolute paths, or places in shards. names: [N] the same as a column of text (:mod:`copynce.index.names`).
    ids: [N] by which each is known, null where no list said one. size: int64 [N] in bytes. mtime_ns: int64 [N], time of
    change (of a shard for all in it).
    """

    files: list[File]
    names: pa.Array
    ids: pa.Array
    size: NDArray[np.int64]
    mtime_ns: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.files)


def list_files(
    sources: Sequence[str | os.PathLike[str]],
    skip: Skip,
    say: Callable[[str], None],
    *,
    standard_input: BinaryIO | None = None,
) -> Listing:
    """The files of `sources`, as they are now.

    sources: folders, single pictures, lists (.csv with uuid,path, .json), shards and patterns of them, and `-`: paths
    on the standard input, one a line or, as `find -print0` writes them, each ended by a zero byte. skip: told as
    skip(path, reason) of what is named and cannot be read. say: receives a line on what a folder holds beside pictures.
    Raises DataError as `read_manifest`, for a source that is not there.
    """
    found: dict[str, tuple[File, str | None]] = {}  # one entry a file; the first id that a list gives it stays
    for source in sources:
        for file, uuid in _files_of(os.fspath(source), skip, say, standard_input):
            name = file if isinstance(file, str) else os.fspath(file)
            known = found.get(name)
            if known is None or (known[1] is None and uuid is not None):
                found[name] = file, uuid
    files: list[File] = []
    names: list[str] = []
    ids: list[str | None] = []
    size: list[int] = []
    mtime_ns: list[int] = []
    shards: dict[str, int] = {}
    for name, (file, uuid) in found.items():
        place = file if isinstance(file, str) else file.shard
        try:
            if place not in shards:
                status = os.stat(place)
                if not stat.S_ISREG(status.st_mode):
                    skip(name, f"{kind_of_entry(status.st_mode)}, no file")
                    continue
                changed = status.st_mtime_ns
                if not isinstance(file, str):
                    shards[place] = changed
            else:
                changed = shards[place]
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            skip(name, "no such file" if missing else f"cannot be read: {getattr(error, 'strerror', None) or error}")
            continue
        files.append(file)
        names.append(name)
        ids.append(uuid)
        size.append(status.st_size if isinstance(file, str) else file.size)
        mtime_ns.append(changed)
    return Listing(
        files,
        stored(names),
        pa.array(ids, pa.string()),
        np.array(size, np.int64),
        np.array(mtime_ns, np.int64),
    )


def _files_of(
    source: str, skip: Skip, say: Callable[[str], None], standard_input: BinaryIO | None
) -> Iterable[tuple[File, str | None]]:
    """(file, its uuid if a list says one) of one source."""
    if source == STANDARD_INPUT:
        content = (sys.stdin.buffer if standard_input is None else standard_input).read()
        lines = content.split(b"\0") if b"\0" in content else content.splitlines()
        return [(os.path.abspath(os.fsdecode(line)), None) for line in lines if line]
    # Absolute, for an index is asked from other folders too; links stay as they were named.
    path = os.path.abspath(source)
    if _is_picture(path):
        return [(path, None)]
    manifest = read_manifest(path, skip=skip)
    manifest.report(say, lambda broken, reason: skip(os.fspath(broken), reason))
    assert isinstance(manifest.paths, Paths), "a manifest makes them so"
    if Path(path).suffix.lower() in _LISTS and os.path.isfile(path):
        return zip(manifest.paths.files(), manifest.uuids, strict=True)
    return ((file, None) for file in manifest.paths.files())


def _is_picture(path: str) -> bool:
    """Whether a source is one picture rather than a list of some."""
    if not os.path.isfile(path):
        return False
    if os.path.splitext(path)[1].lower() in PICTURE_SUFFIXES:
        return True
    try:
        with open(path, "rb") as file:
            return picture_format(file.read(HEAD)) is not None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
