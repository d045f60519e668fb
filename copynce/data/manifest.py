"""Manifests: which pictures there are, and under which name each is known.

A manifest comes from a CSV with the columns ``uuid,path``, from a JSON list of file names (the released training list),
from a folder, or from tar shards, where a shard counts as a folder of its members. Paths are data, so a list may only
name files below its root: an absolute path, or one that climbs out through ``..``, is refused.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from copynce.data.rows import read_rows
from copynce.data.shards import (
    INDEX_SUFFIX,
    SHARD_SUFFIX,
    compression,
    expand_shards,
    is_pattern,
    is_shard,
    open_shard,
    read_shard,
    sample_key,
    split_member,
)
from copynce.data.tables import Paths, Strings
from copynce.errors import DataError as DataError  # copynce.data gives it too
from dali_pipelines.sources import HEAD, TAIL, AnyPath, ShardMember, can_decode, kind_of_entry, picture_format

# File suffixes that count as pictures when a folder is read, without a look inside. A CSV may name any file.
PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".jpf", ".avif", ".tga"}
)
# Those that never do. Files of any other suffix, or of none, are pictures if they begin like one.
_OTHER_SUFFIXES = frozenset(
    {".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".html", ".htm", ".md", ".log", ".toml"}
    | {".npy", ".npz", ".parquet", ".arrow", ".h5", ".hdf5", ".pkl", ".pt", ".pth", ".safetensors", ".lmdb", ".db"}
    | {".py", ".pyc", ".ipynb", ".sh", ".c", ".h", ".cpp", ".js", ".css", ".svg", ".pdf", ".doc", ".docx", ".xlsx"}
    | {".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar"}
    | {".mp4", ".mov", ".avi", ".mkv", ".webm", ".mp3", ".wav", ".flac", ".m4a"}
)
_ARCHIVES = frozenset({".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar"})
# Folders that programs put beside pictures: resource forks, headers of archives, thumbnails.
_EXTRAS = re.compile(r"__MACOSX|PaxHeaders?(\.\d+)?|@eaDir")
_ADDRESS = re.compile(r"[a-z0-9+.-]+://|pipe:")
_Skip = Callable[[str, str], None] | None  # told of what is left out; None: it is an error
_SHOWN = 5  # how many of the missing files an error message lists
_SUFFIXES_SHOWN = 8  # how many kinds of files the line about those left out names
_THREADS, _AT_ONCE = 16, 256  # files of unknown suffixes are opened so: on a network file system most is waiting


@dataclass(frozen=True)
class Manifest:
    """Pictures in a fixed order.

    uuids: unique names. paths: the files, or their places in shards, same length. Both are kept as tables that worker
    processes share, and read as lists. root: the folder that `paths` lie in. left_out: files of the folder or shards
    that are no pictures, counted by suffix, or by what they are; empty for a CSV. no_files: {path: what it is} of those
    that are named as pictures and are no files (a pipe, a link to nothing, a folder).
    """

    uuids: Sequence[str]
    paths: Sequence[Path | ShardMember]
    root: Path
    left_out: Counter[str] = field(default_factory=Counter)
    no_files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.uuids, Strings):
            object.__setattr__(self, "uuids", Strings(self.uuids))
        if not isinstance(self.paths, Paths):
            object.__setattr__(self, "paths", Paths(self.paths))

    def __len__(self) -> int:
        return len(self.uuids)

    @property
    def ignored(self) -> int:
        """How many files were left out."""
        return self.left_out.total()

    def select(self, indices: Iterable[int]) -> Manifest:
        """The pictures at `indices` of this manifest, in the order of `indices`.

        >>> manifest = Manifest(["a", "b", "c"], [Path("a.png"), Path("b.png"), Path("c.png")], Path("."))
        >>> manifest.select([2, 0]).uuids
        ['c', 'a']
        """
        chosen = list(indices)
        return Manifest([self.uuids[i] for i in chosen], [self.paths[i] for i in chosen], self.root)

    def report(self, say: Callable[[str], None], on_broken: Callable[[AnyPath, str], None]) -> None:
        """Tell what was left out: one line to `say`, and each of `no_files` to `on_broken(path, reason)`."""
        if self.left_out:
            say(f"{self.root}: {len(self)} pictures; {self.ignored} files left out: {_counts(self.left_out)}")
        for path, reason in self.no_files.items():
            on_broken(path, reason)


def read_manifest(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    skip: Callable[[str, str], None] | None = None,
) -> Manifest:
    """The pictures of a list, of a folder or of tar shards.

    path: a CSV with the columns `uuid` and `path` (any order, more columns are ignored), in file order, where a path
        may lead into a shard (`SHARD.tar/NAME`); or a .json list of such paths, where the uuid is the path without its
        suffix; or a folder, read recursively in sorted order, where the uuid is the
        path inside the folder without its suffix (pictures that differ in nothing but the suffix keep it); or a folder
        with shards and no pictures, a shard, or a pattern of shards such as `train-{000..127}.tar` or `train-*.tar`,
        where the uuid is WebDataset's key, the name up to the first dot (clashing ones are SHARD.tar/NAME).
    root: folder that a list's paths are relative to, for lists only; the list's own folder by default.
    skip: told as skip(path, reason) of each file of a list that is not there and each folder below `path` that cannot
        be read, which are then left out; without it they are errors.
    Raises DataError for anything wrong with the list: no such file, a missing column, a malformed line, a duplicate
    uuid, a path outside the root, files that do not exist (the first five are named), a damaged shard, no picture at
    all.
    """
    text, path = os.fspath(path), Path(path)
    folder = path.is_dir()
    if not folder and not path.is_file() and (not is_pattern(text) or _ADDRESS.match(text)):
        raise DataError(
            f"{text}: {_what_it_is(text)}; expected a CSV with the columns uuid,path, a folder, or shards (.tar)"
        )
    if path.is_file() and not is_shard(path):
        read = _read_json if path.suffix.lower() == ".json" else _read_csv
        return read(path, path.parent if root is None else Path(root), skip)
    if root is not None:
        raise DataError(f"root is for lists of pictures, but {path} is {'a folder' if folder else 'not one'}")
    if folder:
        return _read_folder(path, skip)
    shards = [path] if path.is_file() else expand_shards(text)
    parents = [shard.parent for shard in shards]
    if len({parent.is_absolute() for parent in parents}) > 1:
        shards = [shard.absolute() for shard in shards]
        parents = [shard.parent for shard in shards]
    return _read_shards(shards, Path(os.path.commonpath(parents)))


def _what_it_is(path: str) -> str:
    """A path that is neither a file nor a folder."""
    if _ADDRESS.match(path):
        return "an address, and pictures are read from files: copy or mount them"
    try:
        return kind_of_entry(os.stat(path).st_mode)
    except OSError:
        return "a link to nothing" if os.path.islink(path) else "no such file or folder"


def _read_csv(path: Path, root: Path, skip: _Skip) -> Manifest:
    with path.open("rb") as file:
        head = file.read(HEAD)
    if (program := compression(head)) is not None:
        raise DataError(f"{path}: a compressed file; unpack it with {program}, what it leaves can be read")
    if (format := picture_format(head)) is not None:
        raise DataError(f"{path}: a {format} picture; expected a CSV with the columns uuid,path, a folder, or shards")
    rows = read_rows(path)
    header_line, header = next(rows, (1, []))
    if not header:
        raise DataError(f"{path}: the file is empty; expected a CSV that starts with the line uuid,path")
    columns = [name.strip() for name in header]
    absent = [name for name in ("uuid", "path") if name not in columns]
    if absent:
        raise DataError(
            f"{path}, line {header_line}: no column {' and '.join(absent)}; expected a header uuid,path, "
            f"got {','.join(header)[:80]!r}"
        )
    uuid_column, path_column = columns.index("uuid"), columns.index("path")

    first_line: dict[str, int] = {}  # uuid -> its line; keeps the file's order
    relative_paths: list[str] = []
    for line, row in rows:
        if len(row) != len(columns):
            raise DataError(f"{path}, line {line}: expected {len(columns)} fields ({','.join(columns)}), got {row}")
        uuid, relative = row[uuid_column], row[path_column]
        if not uuid or not relative:
            raise DataError(f"{path}, line {line}: {'path' if uuid else 'uuid'} is empty")
        if uuid in first_line:
            raise DataError(f"{path}, line {line}: duplicate uuid {uuid!r}, first given on line {first_line[uuid]}")
        first_line[uuid] = line
        relative_paths.append(_inside_root(relative, f"{path}, line {line}"))
    if not relative_paths:
        raise DataError(f"{path}: the file lists no picture, only the header")
    return _listed(path, root, first_line, relative_paths, "line", skip)


def _read_json(path: Path, root: Path, skip: _Skip) -> Manifest:
    try:
        names = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: no JSON ({error}); expected a list of file names") from error
    if not isinstance(names, list) or not names:
        what = "an empty list" if isinstance(names, list) else f"a {type(names).__name__}"
        raise DataError(f"{path}: expected a JSON list of file names, got {what}")
    first_entry: dict[str, int] = {}  # uuid -> its entry, from 1
    relative_paths: list[str] = []
    for entry, name in enumerate(names, 1):
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}, entry {entry}: expected the name of a file, got {json.dumps(name)[:80]}")
        relative = _inside_root(name, f"{path}, entry {entry}")
        uuid = posixpath.splitext(relative)[0]
        if uuid in first_entry:
            raise DataError(f"{path}, entry {entry}: {name!r} has the uuid {uuid!r} of entry {first_entry[uuid]}")
        first_entry[uuid] = entry
        relative_paths.append(relative)
    return _listed(path, root, first_entry, relative_paths, "entry", skip)


def _listed(
    path: Path, root: Path, places: Mapping[str, int], relative_paths: Sequence[str], called: str, skip: _Skip
) -> Manifest:
    """The manifest of a list: {uuid: its place in the list, which is `called` so}, and the path of each."""
    found = _find(root, relative_paths)
    missing = [i for i, file in enumerate(found) if file is None]
    if missing and skip is not None and len(missing) < len(found):
        for i in missing:
            skip(posixpath.join(root, relative_paths[i]), "no such file")
        there = [uuid for uuid, file in zip(places, found, strict=True) if file is not None]
        return Manifest(there, Paths(file for file in found if file is not None), root)
    if missing:
        numbers = list(places.values())
        shown = ", ".join(f"{_shown(root, relative_paths[i])} ({called} {numbers[i]})" for i in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise DataError(f"{path}: {len(missing)} of {len(relative_paths)} files not found in {root}: {shown}{more}")
    return Manifest(Strings(places), Paths(file for file in found if file is not None), root)


def _shown(root: Path, relative: str) -> str:
    """A path that is not that of a file, for an error message; what is there if something is."""
    shown = repr(relative) if relative != relative.strip() or not relative.isprintable() else relative
    try:
        return f"{shown}, {kind_of_entry(os.stat(root / relative).st_mode)}"
    except OSError:
        return f"{shown}, a link to nothing" if (root / relative).is_symlink() else shown


def _inside_root(relative: str, place: str) -> str:
    """`relative`, which stands at `place`, without `.` and `..`; DataError if it does not stay below the root."""
    clean = posixpath.normpath(relative)
    if posixpath.isabs(clean) or clean in (".", "..") or clean.startswith("../") or "\0" in clean:
        raise DataError(f"{place}: path {relative!r} must be relative and stay inside the manifest's folder")
    return clean


def _find(root: Path, relative_paths: Sequence[str]) -> list[str | ShardMember | None]:
    """The files below `root`, None for those that are not there.

    Every folder is listed once: a million single look-ups take minutes on a network file system.
    """
    files: dict[str, set[str]] = {}  # folder -> names of its files
    shards: dict[str, dict[str, ShardMember]] = {}
    base = os.fspath(root)

    def is_file(relative: str) -> bool:
        folder, name = posixpath.split(relative)
        if folder not in files:
            try:
                with os.scandir(root / folder) as entries:
                    files[folder] = {entry.name for entry in entries if _is_file(entry)}
            except (FileNotFoundError, NotADirectoryError):
                files[folder] = set()
            except OSError as error:
                raise DataError(f"{root / folder}: cannot be read ({error.strerror})") from error
        return name in files[folder]

    found: list[str | ShardMember | None] = []
    for relative in relative_paths:
        inside = split_member(relative)
        if inside is not None and is_file(inside[0]):
            shard, name = inside
            if shard not in shards:
                shards[shard] = read_shard(root / shard)
            found.append(shards[shard].get(name))
        else:
            found.append(posixpath.join(base, relative) if is_file(relative) else None)
    return found


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # links in a circle
        return False


def _read_folder(root: Path, skip: _Skip) -> Manifest:
    pictures: list[str] = []
    unknown: list[str] = []
    shards: list[Path] = []
    left_out: Counter[str] = Counter()
    no_files: dict[str, str] = {}
    for inside, entry in _walk(root, skip):
        name = posixpath.join(inside, entry.name)
        suffix = posixpath.splitext(name)[1].lower()
        if _is_folder(entry):
            if _EXTRAS.fullmatch(entry.name):
                left_out[f"folder {entry.name}"] += 1
            elif suffix in PICTURE_SUFFIXES:
                no_files[entry.path] = "a folder, no file"
        elif not _is_file(entry):
            kind = _what_it_is(entry.path)
            left_out[kind] += 1
            if suffix in PICTURE_SUFFIXES:
                no_files[entry.path] = f"{kind}, no file"
        elif entry.name.startswith("."):
            left_out["hidden"] += 1
        elif suffix in PICTURE_SUFFIXES:
            pictures.append(name)
        elif name.endswith(INDEX_SUFFIX):
            pass  # kept by ourselves
        elif suffix in _OTHER_SUFFIXES:
            left_out[suffix] += 1
            if suffix == SHARD_SUFFIX:
                shards.append(root / name)
        else:
            unknown.append(name)
    for name, format in zip(unknown, _formats([posixpath.join(root, name) for name in unknown]), strict=True):
        _sort_in(name, format, pictures, left_out)
    if shards and not pictures:
        del left_out[SHARD_SUFFIX]
        return _read_shards(sorted(shards), root, left_out, no_files)
    if not pictures:
        total = left_out.total()
        found = f"its {total} files are of other kinds: {_counts(left_out)}" if total else "it holds no files"
        hint = "; unpack archives first" if _ARCHIVES.intersection(left_out) else ""
        raise DataError(f"{root}: no picture in this folder ({found}); expected .jpg, .png, .webp or the like{hint}")
    pictures.sort()
    names = [posixpath.splitext(picture)[0] for picture in pictures]
    base = os.fspath(root)
    paths = Paths(posixpath.join(base, picture) for picture in pictures)
    return Manifest(_distinct(names, pictures), paths, root, left_out, no_files)


def _walk(root: Path, skip: _Skip) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """(path of its folder inside of the root, entry) of everything below; links are followed, but never in a circle.

    Hidden folders, and those that programs put beside pictures, are not entered.
    """
    seen: set[tuple[int, int]] = set()  # (device, inode) of the folders read
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        folder = posixpath.join(root, inside)
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            if skip is None or not inside:
                raise DataError(f"{folder}: cannot be read ({error.strerror})") from error
            skip(folder, f"a folder that cannot be read: {error.strerror}")
            continue
        for entry in entries:
            if not _is_folder(entry):
                yield inside, entry
            elif not entry.name.startswith("."):
                yield inside, entry
                if not _EXTRAS.fullmatch(entry.name):
                    waiting.append(posixpath.join(inside, entry.name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _formats(paths: Sequence[str]) -> Iterator[str | None]:
    """The format of each file by its content, None for what is no picture or cannot be read."""
    chunks = [paths[i : i + _AT_ONCE] for i in range(0, len(paths), _AT_ONCE)]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="copynce formats") as pool:
        for formats in pool.map(lambda chunk: [_format_of(path) for path in chunk], chunks):
            yield from formats


def _format_of(path: str) -> str | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _format_at(descriptor, 0, os.fstat(descriptor).st_size)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _format_at(descriptor: int, offset: int, size: int) -> str | None:
    """The format of the `size` bytes at `offset` of an open file."""
    format = picture_format(os.pread(descriptor, min(HEAD, size), offset))
    if format is None and size > HEAD:
        format = picture_format(b"", os.pread(descriptor, TAIL, offset + size - TAIL))
    return format


def _sort_in(name: str, format: str | None, pictures: list[str], left_out: Counter[str]) -> None:
    """Put a file of an unknown suffix with the pictures or with what is left out, by its format."""
    if format is not None and can_decode(format):
        pictures.append(name)
    elif format is not None:
        left_out[f"{format} pictures, which cannot be decoded here"] += 1
    else:
        left_out[posixpath.splitext(name)[1].lower() or "without suffix"] += 1


def _read_shards(
    shards: Sequence[Path], root: Path, left_out: Counter[str] | None = None, no_files: dict[str, str] | None = None
) -> Manifest:
    """The pictures in shards; `left_out` and `no_files` of what lies beside them."""
    keys: list[str] = []
    full: list[str] = []
    members: list[ShardMember] = []
    left_out = Counter() if left_out is None else left_out
    for shard in shards:
        inside = shard.relative_to(root).as_posix()
        found, others = open_shard(shard)
        left_out += others
        pictures: list[str] = []
        with shard.open("rb") as file:
            for name, member in found.items():
                folders, suffix = name.split("/"), posixpath.splitext(name)[1].lower()
                extra = next((folder for folder in folders[:-1] if _EXTRAS.fullmatch(folder)), None)
                if any(folder.startswith(".") for folder in folders):
                    left_out["hidden"] += 1
                elif extra is not None:
                    left_out[f"in {extra}"] += 1
                elif suffix in PICTURE_SUFFIXES:
                    pictures.append(name)
                elif suffix in _OTHER_SUFFIXES:
                    left_out[suffix] += 1
                else:
                    _sort_in(name, _format_at(file.fileno(), member.offset, member.size), pictures, left_out)
        for name in pictures:
            keys.append(sample_key(name))
            full.append(f"{inside}/{name}")
            members.append(found[name])
    if not members:
        counts = f": {_counts(left_out)}" if left_out else ""
        raise DataError(
            f"{root}: no picture in {len(shards)} shards, their {left_out.total()} files are of other kinds{counts}; "
            "expected .jpg, .png, .webp or the like"
        )
    return Manifest(_distinct(keys, full), members, root, left_out, no_files or {})


def _counts(left_out: Counter[str]) -> str:
    """The most frequent kinds with their numbers."""
    kinds = left_out.most_common()
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds[:_SUFFIXES_SHOWN])
    rest = sum(count for _, count in kinds[_SUFFIXES_SHOWN:])
    return f"{shown} and {rest} others" if rest else shown


def _distinct(names: Sequence[str], full: Sequence[str]) -> list[str]:
    """The `names`; in place of those that would clash, the distinct `full` ones."""
    uuids = list(names)
    while True:  # a second round is needed where "a.jpg" (beside "a.png") meets "a.jpg.png"
        count = Counter(uuids)
        clashing = [i for i, uuid in enumerate(uuids) if count[uuid] > 1 and uuid != full[i]]
        if not clashing:
            return uuids
        for i in clashing:
            uuids[i] = full[i]
