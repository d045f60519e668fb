"""Descriptors in files: safetensors that hold the rows, the pictures' names and what the rows were made from.

The features of a list of pictures are a *series* of files in one folder, ``NAME-0000.safetensors``, -0001, ..., each
with the pictures that follow those of the file before; one folder may hold several series (query, reference, training).
The tensors of a file are ``values`` float32 [N * views, D], ``uuids``, a JSON list of N names as uint8, and
``positions`` int64 [N], the place of each picture in the file's part of the list, for broken ones are left out. The
metadata's ``copynce.features`` is a JSON object::

    {"made_from": {...}, "precision": "fp32", "views": 1, "pictures": 1024, "broken": [[uuid, reason], ...],
     "last": true}

A file is written whole or not at all, and its rows are memory-mapped when it is read. The last one says so: a series
without it was not finished. Features of other programs are read by :mod:`copynce.retrieval.feature_formats`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from copynce.errors import ConfigError, DataError
from copynce.files import whole_file
from copynce.retrieval.feature_formats import hdf5_sides, read_other
from copynce.retrieval.feature_sets import ROWS_AT_ONCE
from copynce.retrieval.feature_sets import Computed as Computed  # this module gives them too
from copynce.retrieval.feature_sets import FeatureFile as FeatureFile
from copynce.retrieval.feature_sets import Features as Features
from copynce.retrieval.rows import FileRows, joined

_METADATA = "copynce.features"
_FILE = re.compile(r"(.+)-(\d{4,})\.safetensors")
_BESIDE = ("skipped.jsonl", "whitening.safetensors")  # what may be there before the first features are


@dataclass(frozen=True)
class FeatureStore:
    """Where a series of features is kept as it is made, and found again: ``FOLDER/NAME-0000.safetensors``, -0001, ...

    A file serves again while model, way of making, kind of device and pictures (names, sizes, times of change) are the
    same. folder, name: of the files. model: the hash of the model's weights file.
    """

    folder: Path
    name: str
    model: str

    def path(self, part: int) -> Path:
        """The file of the `part`-th pictures."""
        return self.folder / f"{self.name}-{part:04d}.safetensors"

    def find(self, part: int, made_from: Mapping[str, Any], last: bool = True) -> FeatureFile | None:
        """The `part`-th file if it is there, whole, and made from the same."""
        try:
            found = _read_file(self.path(part))
        except (FileNotFoundError, DataError):
            return None
        return found if found.made_from == made_from and found.last == last else None

    def remove_after(self, parts: int) -> None:
        """Remove the files of an earlier, longer series of this name: all but the first `parts`."""
        for part in _parts_of(self.folder).get(self.name, []):
            if part >= parts:
                self.path(part).unlink(missing_ok=True)


def write_features(
    path: str | os.PathLike[str],
    features: Features,
    made_from: Mapping[str, Any],
    broken: Sequence[tuple[str, str]] = (),
    *,
    positions: NDArray[np.int64] | None = None,
    pictures: int | None = None,
    last: bool = True,
) -> None:
    """Write a file of features, whole or not at all. made_from: anything JSON can hold; see `FeatureFile`.

    Raises WriteError if the disk is full or the folder takes no file, ValueError if names and rows do not fit.
    """
    path = Path(path)
    count = len(features.uuids)
    if len(features.values) != count * features.views:
        raise ValueError(f"{count} names of {features.views} views for {len(features.values)} rows")
    facts = {
        "made_from": dict(made_from),
        "precision": features.precision,
        "views": features.views,
        "pictures": count if pictures is None else pictures,
        "broken": list(broken),
        "last": last,
    }
    tensors: dict[str, NDArray[Any]] = {
        "values": np.ascontiguousarray(features.values, np.float32),
        "uuids": np.frombuffer(json.dumps(list(features.uuids)).encode(), np.uint8),
        "positions": np.arange(count) if positions is None else np.ascontiguousarray(positions, np.int64),
    }
    content = save(tensors, metadata={_METADATA: json.dumps(facts)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(content)


def write_series(
    store: FeatureStore,
    found: FeatureFile,
    made_from: Mapping[str, Any],
    change: Callable[[NDArray[np.float32], slice], NDArray[np.float32]],
    *,
    pictures: int = 1024,
    rank: int = 0,
    size: int = 1,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write `found`, its rows changed, as the series of files of `store`; files that are there already are kept.

    change: called with float32 rows and their place in `found`, gives the rows that are written, as many. made_from:
    what the series is made from. pictures: in each file. rank, size: write every `size`-th file, from the `rank`-th on.
    progress: called with the number of pictures done.
    """
    features = found.features
    assert found.positions is not None, "set when it was made"
    starts = range(0, max(1, found.pictures), pictures)
    at = np.searchsorted(found.positions, [*starts, max(1, found.pictures)])
    reasons = dict(found.broken)
    for part in range(rank, len(starts), size):
        start = starts[part]
        last, begin, end = part == len(starts) - 1, int(at[part]), int(at[part + 1])
        if store.find(part, made_from, last) is None:
            place = slice(begin * features.views, end * features.views)
            changed = np.empty((0, 0), np.float32)
            if end > begin:
                changed = change(np.asarray(features.values[place], np.float32), place)
            write_features(
                store.path(part),
                Features(features.uuids[begin:end], changed, features.precision, features.views),
                made_from,
                list(reasons.items()) if last else (),
                positions=found.positions[begin:end] - start,
                pictures=min(pictures, found.pictures - start),
                last=last,
            )
        if progress is not None:
            progress(min(start + pictures, found.pictures))
    store.remove_after(len(starts))


def read_features(
    path: str | os.PathLike[str], *, side: str | None = None, ids: str | os.PathLike[str] | None = None
) -> FeatureFile:
    """Features from a file or folder, whatever wrote them.

    path: a folder of `copynce extract` or `copynce eval`; one file of such a series; an HDF5 file of the descriptor
        track (datasets query, reference, query_ids, reference_ids); a file of torch.save with a tensor [N, D]; a .npy
        file [N, D]. Nothing in a file is ever run.
    side: which features, of a folder with several series (by name) or of an HDF5 file ("query", "reference").
    ids: the names of the rows for a file that holds none: a CSV with a column uuid, a JSON list, or lines of names.
    Raises DataError, naming the file, if it is of another form, damaged or unfinished, or if names are missing or given
    twice, or rows zero or not finite; FileNotFoundError if it is absent.
    """
    path = Path(path)
    if path.is_dir():
        return _checked(_read_series(path, side))
    with path.open("rb") as file:
        start = file.read(16)
    ours = len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 30
    if ours or path.suffix == ".safetensors":
        found = _read_file(path)
        return _checked(replace(found, features=replace(found.features, values=np.asarray(found.features.values))))
    return _checked(read_other(path, start, side, ids))


def sides_of(path: str | os.PathLike[str]) -> list[str]:
    """The names that `side` may have for `path`: the series of a folder, the sides of an HDF5 file; none for others."""
    return list(_parts_of(Path(path))) if os.path.isdir(path) else hdf5_sides(Path(path))


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise ConfigError for a file, and a folder that holds other files and no features: those would lie among them."""
    if not os.path.exists(folder):
        return
    if not os.path.isdir(folder):
        raise ConfigError(f"--out {folder}: features are written as a folder, but this is a file; choose another name")
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if names and not any(_FILE.fullmatch(name) or name in _BESIDE for name in names):
        raise ConfigError(
            f"--out {folder}: the folder holds other files, such as {names[0]}, and no features; choose one that is "
            "new, empty or of features"
        )


def _checked(found: FeatureFile) -> FeatureFile:
    """`found` if its names are distinct and its rows finite and not zero, else DataError."""
    uuids = found.features.uuids
    if len(set(uuids)) < len(uuids):
        seen: set[str] = set()
        twice = next(uuid for uuid in uuids if uuid in seen or seen.add(uuid))  # type: ignore[func-returns-value]
        raise DataError(f"{found.source}: the id {twice!r} is given to more than one row; ids must be distinct")
    for start in range(0, len(found.features.values), ROWS_AT_ONCE):
        rows = found.features.values[start : start + ROWS_AT_ONCE]
        finite = np.isfinite(rows).all(axis=1)
        usable = finite & rows.any(axis=1)
        if not usable.all():
            at = int(np.argmin(usable))
            row, what = start + at, "zero" if finite[at] else "not finite (NaN, infinity)"
            raise DataError(
                f"{found.source}: row {row}, of {uuids[row // found.features.views]!r}, is {what}; leave out what has "
                "no descriptor"
            )
    return found


def _parts_of(folder: Path) -> dict[str, list[int]]:
    """{name: numbers of its files, ascending} of the series in a folder."""
    series: dict[str, list[int]] = {}
    for name in sorted(os.listdir(folder)):
        if match := _FILE.fullmatch(name):
            series.setdefault(match[1], []).append(int(match[2]))
    return {name: sorted(numbers) for name, numbers in series.items()}


def _read_series(folder: Path, side: str | None) -> FeatureFile:
    series = _parts_of(folder)
    if not series:
        raise DataError(f"{folder}: no features in this folder; expected files such as query-0000.safetensors")
    if side is None and len(series) > 1:
        raise DataError(f"{folder}: several features are in this folder; choose side={' or side='.join(series)}")
    name = next(iter(series)) if side is None else side
    if name not in series:
        raise DataError(f"{folder}: no features called {name!r}; there are {', '.join(series)}")
    store, parts = FeatureStore(folder, name, ""), list[FeatureFile]()
    while not parts or not parts[-1].last:
        path = store.path(len(parts))
        try:
            parts.append(_read_file(path))
        except FileNotFoundError as error:
            raise DataError(
                f"{folder}: the features {name!r} are not finished, {path.name} is missing; the command that made them "
                "goes on where it was stopped"
            ) from error
        if (one := _kind(parts[0])) != (other := _kind(parts[-1])):
            raise DataError(
                f"{folder}: {store.path(0).name} and {path.name} were made from {one} and {other}; the command that "
                "made them brings them up to date"
            )
    return _joined(parts, f"{folder}, {name}")


def _kind(part: FeatureFile) -> dict[str, Any]:
    """What all parts of a series have in common."""
    return {key: value for key, value in part.made_from.items() if key != "pictures"}


def _joined(parts: Sequence[FeatureFile], source: str) -> FeatureFile:
    """The parts of a series as one."""
    full = [part for part in parts if part.features.uuids] or list(parts[:1])
    used = {(part.features.precision, part.features.views, *part.features.values.shape[1:]) for part in full}
    if len(used) > 1:
        raise DataError(
            f"{source}: its files differ in precision, views or columns, {sorted(map(str, used))}; the command that "
            "made them brings them up to date"
        )
    before = np.cumsum([0, *(part.pictures for part in parts)])
    positions = [
        part.positions + start for part, start in zip(parts, before, strict=False) if part.positions is not None
    ]
    return FeatureFile(
        Features(
            [uuid for part in parts for uuid in part.features.uuids],
            joined([part.features.values for part in full]),
            full[0].features.precision,
            full[0].features.views,
        ),
        [entry for part in parts for entry in part.broken],
        _kind(parts[0]),
        np.concatenate(positions),
        int(before[-1]),
        source=source,
    )


def _read_file(path: Path) -> FeatureFile:
    """One file of a series."""
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {})[_METADATA])
            uuids = json.loads(file.get_tensor("uuids").tobytes())
            positions = file.get_tensor("positions")
            rows, columns = file.get_slice("values").get_shape()
        values = _mapped(path, rows, columns)
        broken = [(str(uuid), str(reason)) for uuid, reason in facts["broken"]]
        features = Features(uuids, values, facts["precision"], int(facts["views"]))
        if features.precision not in get_args(Computed):
            raise ValueError(f"unknown precision {features.precision!r}")
        made_from, pictures, last = dict(facts["made_from"]), int(facts["pictures"]), bool(facts["last"])
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a readable file of features ({type(error).__name__}: {error})") from error
    if len(uuids) * features.views != len(values) or len(uuids) != len(positions):
        raise DataError(f"{path}: {len(uuids)} names for {len(values)} rows")
    return FeatureFile(features, broken, made_from, positions, pictures, last, str(path))


def _mapped(path: Path, rows: int, columns: int) -> FileRows:
    """The tensor ``values`` of the file: a safetensors file is a length, a JSON header, then the tensors."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header))["values"]
    if entry["dtype"] != "F32":
        raise ValueError(f"expected float32 rows, got {entry['dtype']}")
    return FileRows(path, 8 + header + entry["data_offsets"][0], (rows, columns))
