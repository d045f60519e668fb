"""Tar shards (WebDataset): a tar counts as a folder whose files are its members, read where they lie, never extracted.

Reading the headers of a shard takes a pass over it, so the result is kept beside it as ``SHARD.tar.index.json`` where
that folder can be written, and used as long as the shard's size and time of change stay, and some headers are what they
were. Each of the others is checked when its file is read.
"""

from __future__ import annotations

import glob
import json
import os
import posixpath
import re
import stat
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from copynce.errors import DataError
from copynce.files import atomic_text
from dali_pipelines.sources import TAR_BLOCK, ShardMember, kind_of_entry

SHARD_SUFFIX = ".tar"
INDEX_SUFFIX = ".tar.index.json"

#: {a..b} of numbers, or {a,b,...}, without braces inside.
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_WILDCARDS = frozenset("*?[")

#: Beginnings of compressed files, and with what they are unpacked.
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}

#: Headers, spread over a shard, that must be what they were for its kept index to be used.
_CHECKED = 16
_VERSION = 2


@dataclass(frozen=True)
class _Index:
    """files: name -> (offset, size, CRC-32 of the header block). others: how many members are no files, by kind."""

    files: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)


def read_shard(shard: Path) -> dict[str, ShardMember]:
    """The regular files of an uncompressed tar by name, in their order; of several with one name the last.

    A hard link is the file that it leads to. Names are cleaned of ``.`` and doubled slashes. Raises DataError if the
    file is no uncompressed tar, is damaged between its members, or names a member outside of itself. What is wrong
    inside of a member shows when it is read.
    """
    return open_shard(shard)[0]


def open_shard(shard: Path) -> tuple[dict[str, ShardMember], Counter[str]]:
    """What :func:`read_shard` gives, and how many members are no files: links, devices, ..."""
    try:
        status = shard.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{shard}: {kind_of_entry(status.st_mode)}, expected a WebDataset shard")
        index = _load(shard, status.st_size, status.st_mtime_ns)
        if index is None:
            index = _scan(shard)
            _save(shard, status.st_size, status.st_mtime_ns, index)
    except OSError as error:
        raise DataError(f"{shard}: cannot be read ({error.strerror or error})") from error
    path = str(shard)
    return {name: ShardMember(path, name, *place) for name, place in index.files.items()}, index.others


def expand_shards(pattern: str) -> list[Path]:
    """The files of a pattern such as ``train-{000..127}.tar`` or ``train-*.tar``, without repetition.

    Braces give numbers, zero-padded as written, or alternatives, in their order; wildcards what is there, sorted.
    Where a folder or file is called as a part of the pattern is written, that part is its name: ``[2024]/*.tar`` are
    the shards in the folder ``[2024]``. Raises DataError naming the first part of the pattern that no file fits.
    """
    found: dict[Path, None] = {}
    known, rest = _existing("", pattern)
    for name in _expand_braces(rest):
        fitting = sorted(path for path in map(Path, _fitting(known, name)) if path.is_file())
        if not fitting:
            raise DataError(f"{known}{name}: no such file{'' if name == rest else f', though {pattern} names it'}")
        found |= dict.fromkeys(fitting)
    return list(found)


def _existing(folder: str, pattern: str) -> tuple[str, str]:
    """The longest beginning of ``pattern``, in whole parts, that exists in ``folder`` as it is written; the rest."""
    known, rest = folder, pattern
    while rest:
        part, slash, after = rest.partition("/")
        if part and not os.path.lexists(known + part):
            break
        known, rest = known + part + slash, after
    return known, rest


def _fitting(folder: str, pattern: str) -> Iterator[str]:
    """What fits a pattern without braces in ``folder``, a path with its slash."""
    known, rest = _existing(folder, pattern)
    part, slash, after = rest.partition("/")
    if not rest:
        yield known
    elif _WILDCARDS.intersection(part):
        if part == "**":  # no folder at all, too
            yield from _fitting(known, after)
        for path in glob.glob(glob.escape(known) + part, recursive=True):
            yield from _fitting(path.rstrip("/") + slash, after)


def is_pattern(path: str) -> bool:
    """Whether a path that is no file or folder may name several."""
    return _BRACES.search(path) is not None or not _WILDCARDS.isdisjoint(path)


def is_shard(path: Path) -> bool:
    """Whether a file is a tar, by its name or by its content."""
    if path.suffix.lower() == SHARD_SUFFIX:
        return True
    with path.open("rb") as file:
        return file.read(TAR_BLOCK)[257:262] == b"ustar"


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


def compression(head: bytes) -> str | None:
    """The program that unpacks a file that begins so, None if it is not compressed."""
    return next((program for start, program in _COMPRESSED.items() if head.startswith(start)), None)


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
        step = 1 if int(first) <= int(last) else -1
        values = (f"{number:0{width}}" for number in range(int(first), int(last) + step, step))
    for value in values:
        for rest in _expand_braces(pattern[match.end() :]):
            yield pattern[: match.start()] + value + rest


def _scan(shard: Path) -> _Index:
    index = _Index()
    reached = -1
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.size < 0 or tar.offset <= reached:
                    raise tarfile.ReadError("a header that leads backwards")
                reached = tar.offset
                place = None
                if member.isreg() and not member.issparse():
                    place = member.offset_data, member.size, _header(file.fileno(), member.offset_data)
                elif member.islnk():
                    place = index.files.get(posixpath.normpath(member.linkname))
                if place is not None:
                    name = _inside(member.name, shard)
                    index.files.pop(name, None)  # a later one also takes the later place
                    index.files[name] = place
                elif not member.isdir():
                    index.others[_kind(member)] += 1
            # tarfile takes anything that is no header for the end, but only zeros are.
            file.seek(tar.offset)
            if any(file.read(TAR_BLOCK)):
                raise tarfile.ReadError("no header where one should be")
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        with shard.open("rb") as file:
            program = compression(file.read(TAR_BLOCK))
        if program is not None:
            raise DataError(
                f"{shard}: not an uncompressed tar, in which files can be read where they lie; unpack it with "
                f"{program} and give the .tar that it leaves"
            ) from error
        where = f"damaged after {len(index.files)} files" if index.files else "not an uncompressed tar"
        raise DataError(f"{shard}: {where} ({error}); expected a WebDataset shard") from error
    return index


def _kind(member: tarfile.TarInfo) -> str:
    if member.issparse():
        return "sparse file"
    if member.islnk() or member.issym():
        return "link"
    return "pipe" if member.isfifo() else "device"


def _header(descriptor: int, offset: int) -> int:
    """The CRC-32 of the block before a content."""
    return zlib.crc32(os.pread(descriptor, TAR_BLOCK, offset - TAR_BLOCK))


def _inside(name: str, shard: Path) -> str:
    clean = posixpath.normpath(name)
    if posixpath.isabs(clean) or clean in (".", "..") or clean.startswith("../") or "\0" in clean:
        raise DataError(f"{shard}: member {name!r} must be relative and stay inside of the shard")
    return clean


def _index_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.index.json")


def _load(shard: Path, size: int, changed_ns: int) -> _Index | None:
    """The index beside the shard; None if there is none that can be used, or none of this shard."""
    try:
        content = json.loads(_index_path(shard).read_bytes())
        if (content["version"], content["size"], content["mtime_ns"]) != (_VERSION, size, changed_ns):
            return None
        index = _Index(others=Counter({str(kind): int(count) for kind, count in content["others"].items()}))
        for name, (offset, length, header) in content["files"].items():
            if not (type(offset) is type(length) is type(header) is int):
                return None
            if not (TAR_BLOCK <= offset <= offset + length <= size and 0 <= header < 2**32):
                return None
            index.files[_inside(name, shard)] = (offset, length, header)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    return index if _fits(shard, list(index.files.values())) else None


def _fits(shard: Path, places: Sequence[tuple[int, int, int]]) -> bool:
    """Whether the shard still has some of its headers: a copy may have been given the time of what it replaced."""
    last = len(places) - 1
    chosen = {places[last * k // (_CHECKED - 1)] for k in range(_CHECKED)} if places else set()
    with shard.open("rb") as file:
        return all(_header(file.fileno(), offset) == header for offset, _, header in chosen)


def _save(shard: Path, size: int, changed_ns: int, index: _Index) -> None:
    content = {"version": _VERSION, "size": size, "mtime_ns": changed_ns, "files": index.files, "others": index.others}
    try:
        with atomic_text(_index_path(shard)) as file:
            json.dump(content, file)
    except OSError:
        return  # a read-only folder: the next run reads the headers again
