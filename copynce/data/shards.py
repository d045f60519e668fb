"""Tar shards (WebDataset): a tar counts as a folder whose files are its members, read where they lie, never extracted.

Reading the headers of a shard takes a pass over it, so the result is kept beside it as ``SHARD.tar.index.json`` where
that folder can be written, and used as long as the shard's size and time of change stay.
"""

from __future__ import annotations

import glob
import itertools
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from copynce.data.files import atomic_text
from copynce.errors import DataError
from dali_pipelines.sources import ShardMember

SHARD_SUFFIX = ".tar"

#: {a..b} of numbers, or {a,b,...}, without braces inside.
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_WILDCARDS = frozenset("*?[")
_BLOCK = 512  # bytes; headers and contents begin at multiples of it

Index = dict[str, tuple[int, int]]  # name -> (offset, size)


def read_shard(shard: Path) -> dict[str, ShardMember]:
    """The regular files of an uncompressed tar by name, in their order; of several with one name the last.

    Names are cleaned of ``.`` and doubled slashes. Raises DataError if the file is no uncompressed tar, is
    damaged between its members, or names a member outside of itself. What is wrong inside of a member shows when it is
    read.
    """
    try:
        status = shard.stat()
        index = _load(shard, status.st_size, status.st_mtime_ns)
        if index is None:
            index = _scan(shard)
            _save(shard, status.st_size, status.st_mtime_ns, index)
    except OSError as error:
        raise DataError(f"{shard}: cannot be read ({error.strerror or error})") from error
    path = str(shard)
    return {name: ShardMember(path, name, offset, size) for name, (offset, size) in index.items()}


def expand_shards(pattern: str) -> list[Path]:
    """The files of a pattern such as ``train-{000..127}.tar`` or ``train-*.tar``, without repetition.

    Braces give numbers, zero-padded as written, or alternatives, in their order; wildcards what is there, sorted.
    Raises DataError naming the first part of the pattern that no file fits.
    """
    found: dict[Path, None] = {}
    for name in _expand_braces(pattern):
        if _WILDCARDS.intersection(name):
            fitting = [path for path in map(Path, sorted(glob.glob(name, recursive=True))) if path.is_file()]
        else:
            fitting = [path for path in [Path(name)] if path.is_file()]
        if not fitting:
            raise DataError(f"{name}: no such file{'' if name == pattern else f', though {pattern} names it'}")
        found |= dict.fromkeys(fitting)
    return list(found)


def is_pattern(path: str) -> bool:
    """Whether a path that is no file or folder may name several."""
    return _BRACES.search(path) is not None or not _WILDCARDS.isdisjoint(path)


def split_member(path: str) -> tuple[str, str] | None:
    """(shard, name) of a path ``SHARD.tar/NAME``; None if no folder of it is called so."""
    folders, separator, name = path.partition(f"{SHARD_SUFFIX}/")
    return (folders + SHARD_SUFFIX, name) if separator else None


def sample_key(name: str) -> str:
    """What groups the files of one sample: the name up to the first dot of its last part.

    >>> sample_key("a.b/T0001.seg.png")
    'a.b/T0001'
    """
    folder, last = posixpath.split(name)
    return posixpath.join(folder, last.split(".", 1)[0])


def _expand_braces(pattern: str) -> Iterator[str]:
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, alternatives = match.groups()
    if alternatives is not None:
        values: Iterator[str] = iter(alternatives.split(","))
    else:
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 1
        values = (f"{number:0{width}}" for number in range(int(first), int(last) + 1))
    for value, rest in itertools.product(values, _expand_braces(pattern[match.end() :])):
        yield pattern[: match.start()] + value + rest


def _scan(shard: Path) -> Index:
    index: Index = {}
    reached = -1
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                if member.size < 0 or tar.offset <= reached:
                    raise tarfile.ReadError("a header that leads backwards")
                reached = tar.offset
                if member.isreg() and not member.issparse():
                    name = _inside(member.name, shard)
                    index.pop(name, None)  # a later one also takes the later place
                    index[name] = (member.offset_data, member.size)
            # tarfile takes anything that is no header for the end, but only zeros are.
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if any(tar.fileobj.read(_BLOCK)):
                raise tarfile.ReadError("no header where one should be")
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        where = f"damaged after {len(index)} files" if index else "not an uncompressed tar"
        raise DataError(f"{shard}: {where} ({error}); expected a WebDataset shard") from error
    return index


def _inside(name: str, shard: Path) -> str:
    clean = posixpath.normpath(name)
    if posixpath.isabs(clean) or clean in (".", "..") or clean.startswith("../") or "\0" in clean:
        raise DataError(f"{shard}: member {name!r} must be relative and stay inside of the shard")
    return clean


def _index_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.index.json")


def _load(shard: Path, size: int, changed_ns: int) -> Index | None:
    """The index beside the shard; None if there is none of this size and time, or none that can be used."""
    try:
        content = json.loads(_index_path(shard).read_bytes())
        if (content["size"], content["mtime_ns"]) != (size, changed_ns):
            return None
        index: Index = {}
        for name, (offset, length) in content["files"].items():
            if not (type(offset) is type(length) is int and 0 <= offset <= offset + length <= size):
                return None
            index[_inside(name, shard)] = (offset, length)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    return index


def _save(shard: Path, size: int, changed_ns: int, index: Index) -> None:
    try:
        with atomic_text(_index_path(shard)) as file:
            json.dump({"size": size, "mtime_ns": changed_ns, "files": index}, file)
    except OSError:
        return  # a read-only folder: the next run reads the headers again
