"""Manifests: which pictures there are, and under which name each is known.

A manifest comes from a CSV with the columns ``uuid,path``, from a folder, or from tar shards, where a shard counts as a
folder of its members. Paths are data, so a CSV may only name files below its root: an absolute path, or one that climbs
out through ``..``, is refused.
"""

from __future__ import annotations

import csv
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from copynce.data.shards import SHARD_SUFFIX, expand_shards, is_pattern, read_shard, sample_key, split_member
from copynce.errors import DataError
from dali_pipelines.sources import ShardMember

# File suffixes that count as pictures when a folder is read. A CSV may name any file.
PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"}
)
_SHOWN = 5  # how many of the missing files an error message lists


@dataclass(frozen=True)
class Manifest:
    """Pictures in a fixed order.

    uuids: unique names. paths: the files, or their places in shards, same length. root: the folder that `paths` lie
    in. ignored: files of the folder or shards that are no pictures (or hidden) and were left out; 0 for a CSV.
    """

    uuids: list[str]
    paths: Sequence[Path | ShardMember]
    root: Path
    ignored: int = 0

    def __len__(self) -> int:
        return len(self.uuids)

    def select(self, indices: Iterable[int]) -> Manifest:
        """The pictures at `indices` of this manifest, in the order of `indices`.

        >>> manifest = Manifest(["a", "b", "c"], [Path("a.png"), Path("b.png"), Path("c.png")], Path("."))
        >>> manifest.select([2, 0]).uuids
        ['c', 'a']
        """
        chosen = list(indices)
        return Manifest([self.uuids[i] for i in chosen], [self.paths[i] for i in chosen], self.root)


def read_manifest(path: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None) -> Manifest:
    """The pictures of a CSV, of a folder or of tar shards.

    path: a CSV with the columns `uuid` and `path` (any order, more columns are ignored), in file order, where a path
        may lead into a shard (`SHARD.tar/NAME`); or a folder, read recursively in sorted order, where the uuid is the
        path inside the folder without its suffix (pictures that differ in nothing but the suffix keep it); or a folder
        with shards and no pictures, a shard, or a pattern of shards such as `train-{000..127}.tar` or `train-*.tar`,
        where the uuid is WebDataset's key, the name up to the first dot (clashing ones are SHARD.tar/NAME).
    root: folder that a CSV's paths are relative to, for CSVs only; the CSV's own folder by default.
    Raises DataError for anything wrong with the list: no such file, a missing column, a malformed line, a duplicate
    uuid, a path outside the root, files that do not exist (the first five are named), a damaged shard, no picture at
    all.
    """
    text, path = os.fspath(path), Path(path)
    folder = path.is_dir()
    if not folder and not path.is_file() and not is_pattern(text):
        raise DataError(
            f"{path}: no such file or folder; expected a CSV with the columns uuid,path, a folder, or shards (.tar)"
        )
    if path.is_file() and path.suffix.lower() != SHARD_SUFFIX:
        return _read_csv(path, path.parent if root is None else Path(root))
    if root is not None:
        raise DataError(f"root is for CSV manifests, but {path} is {'a folder' if folder else 'not one'}")
    if folder:
        return _read_folder(path)
    shards = [path] if path.is_file() else expand_shards(text)
    return _read_shards(shards, Path(os.path.commonpath([shard.parent for shard in shards])))


def _read_csv(path: Path, root: Path) -> Manifest:
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
        uuid, relative = row[uuid_column].strip(), row[path_column].strip()
        if not uuid or not relative:
            raise DataError(f"{path}, line {line}: {'path' if uuid else 'uuid'} is empty")
        if uuid in first_line:
            raise DataError(f"{path}, line {line}: duplicate uuid {uuid!r}, first given on line {first_line[uuid]}")
        first_line[uuid] = line
        relative_paths.append(_inside_root(relative, path, line))
    if not relative_paths:
        raise DataError(f"{path}: the file lists no picture, only the header")

    found = _find(root, relative_paths)
    missing = [i for i, file in enumerate(found) if file is None]
    if missing:
        lines = list(first_line.values())
        shown = ", ".join(f"{relative_paths[i]} (line {lines[i]})" for i in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise DataError(f"{path}: {len(missing)} of {len(relative_paths)} files not found in {root}: {shown}{more}")
    return Manifest(list(first_line), [file for file in found if file is not None], root)


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number from 1, fields) of every CSV row that is not blank; DataError where the file is no readable CSV."""
    try:
        # utf-8-sig: spreadsheets put a byte order mark before the header; surrogateescape: names need not be UTF-8.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                if row:
                    yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not a CSV line ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _inside_root(relative: str, path: Path, line: int) -> str:
    """`relative` without `.` and `..`; DataError if it does not stay below the root."""
    clean = posixpath.normpath(relative)
    if posixpath.isabs(clean) or clean in (".", "..") or clean.startswith("../") or "\0" in clean:
        raise DataError(
            f"{path}, line {line}: path {relative!r} must be relative and stay inside the manifest's folder"
        )
    return clean


def _find(root: Path, relative_paths: Sequence[str]) -> list[Path | ShardMember | None]:
    """The files below `root`, None for those that are not there.

    Every folder is listed once: a million single look-ups take minutes on a network file system.
    """
    files: dict[str, set[str]] = {}  # folder -> names of its files
    shards: dict[str, dict[str, ShardMember]] = {}

    def is_file(relative: str) -> bool:
        folder, name = posixpath.split(relative)
        if folder not in files:
            try:
                with os.scandir(root / folder) as entries:
                    files[folder] = {entry.name for entry in entries if entry.is_file()}
            except (FileNotFoundError, NotADirectoryError):
                files[folder] = set()
            except OSError as error:
                raise DataError(f"{root / folder}: cannot be read ({error.strerror})") from error
        return name in files[folder]

    found: list[Path | ShardMember | None] = []
    for relative in relative_paths:
        inside = split_member(relative)
        if inside is not None and is_file(inside[0]):
            shard, name = inside
            if shard not in shards:
                shards[shard] = read_shard(root / shard)
            found.append(shards[shard].get(name))
        else:
            found.append(root / relative if is_file(relative) else None)
    return found


def _read_folder(root: Path) -> Manifest:
    pictures: list[str] = []
    shards: list[Path] = []
    ignored = 0
    seen: set[tuple[int, int]] = set()  # (device, inode) of the folders read: links are followed, but never in a circle

    def cannot_list(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for folder, folders, files in os.walk(root, followlinks=True, onerror=cannot_list):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(folder).relative_to(root).as_posix()
        for name in files:
            if _is_picture(name):
                pictures.append(posixpath.normpath(posixpath.join(inside, name)))
                continue
            ignored += 1
            if name.lower().endswith(SHARD_SUFFIX) and not name.startswith("."):
                shards.append(Path(folder, name))
    if shards and not pictures:
        return _read_shards(sorted(shards), root)
    if not pictures:
        found = f"its {ignored} files are of other kinds" if ignored else "it holds no files"
        raise DataError(f"{root}: no picture in this folder ({found}); expected .jpg, .png, .webp or the like")
    pictures.sort()
    names = [posixpath.splitext(picture)[0] for picture in pictures]
    return Manifest(_distinct(names, pictures), [root / picture for picture in pictures], root, ignored)


def _read_shards(shards: Sequence[Path], root: Path) -> Manifest:
    keys: list[str] = []
    full: list[str] = []
    members: list[ShardMember] = []
    ignored = 0
    for shard in shards:
        inside = shard.relative_to(root).as_posix()
        for name, member in read_shard(shard).items():
            if any(part.startswith(".") for part in name.split("/")) or not _is_picture(name):
                ignored += 1
                continue
            keys.append(sample_key(name))
            full.append(f"{inside}/{name}")
            members.append(member)
    if not members:
        raise DataError(
            f"{root}: no picture in {len(shards)} shards, their {ignored} files are of other kinds; expected .jpg, "
            ".png, .webp or the like"
        )
    return Manifest(_distinct(keys, full), members, root, ignored)


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and posixpath.splitext(name)[1].lower() in PICTURE_SUFFIXES


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
