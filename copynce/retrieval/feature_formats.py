"""Features of other programs: the descriptor track's HDF5, files of torch.save, NumPy arrays with a list of names.

HDF5 of ours also says what its rows were made from, as JSON in the attribute ``copynce.made_from`` of each set: others
pass over it, and here features that hold a bias are not taken for plain ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copynce.data import PICTURE_SUFFIXES
from copynce.data.rows import read_rows
from copynce.data.torch_files import only_tensor, read_torch_file
from copynce.errors import DataError
from copynce.files import whole_path
from copynce.retrieval.feature_sets import FeatureFile, Features
from copynce.retrieval.rows import Rows

_SIDES = ("query", "reference")
_MADE_FROM = "copynce.made_from"
_MOST_COLUMNS = 256  # of the challenge's descriptor track
_EXPECTED = "expected a folder of features, a file of it, HDF5 of the descriptor track, .pth with a tensor, or .npy"


def read_other(path: Path, start: bytes, side: str | None, ids: str | os.PathLike[str] | None) -> FeatureFile:
    """The features of a file that begins with the bytes `start`; see `read_features`."""
    if start.startswith(b"\x89HDF"):
        if ids is not None:
            raise DataError(f"ids are for files without names, but {path} holds its own; leave them out")
        return _read_hdf5(path, side)
    if start.startswith(b"\x93NUMPY"):
        return _with_ids(path, _read_npy(path), None, ids)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        expected = "a floating-point tensor [N, D], alone or beside a list of N names"
        values, beside = only_tensor(read_torch_file(path, expected), path, expected, "f")
        return _with_ids(path, values.float().numpy(), beside, ids)
    raise DataError(
        f"{path}: not a readable file of features, it begins with {start[:8].hex(' ') or 'nothing'}; {_EXPECTED}"
    )


def _read_npy(path: Path) -> NDArray[np.floating]:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a readable .npy file ({error})") from error
    if values.ndim != 2 or values.dtype not in (np.float16, np.float32, np.float64):
        raise DataError(f"{path}: expected floats [N, D], got {values.dtype} {list(values.shape)}")
    return values


def _with_ids(path: Path, values: Rows, beside: Any, ids: str | os.PathLike[str] | None) -> FeatureFile:
    """Rows with the names in the file `ids`, or else in what lies beside the rows."""
    if ids is not None:
        names, where = read_ids(ids), os.fspath(ids)
    else:
        lists = [
            [_stem(name) for name in found]
            for found in beside or []
            if isinstance(found, list | tuple) and found and all(isinstance(name, str) for name in found)
        ]
        if len(lists) != 1:
            raise DataError(f"{path}: the file holds no list of names for its {len(values)} rows; give ids=FILE")
        names, where = lists[0], os.fspath(path)
    if len(names) != len(values):
        raise DataError(f"{path}: {len(values)} rows {values.shape[1]} wide, but {where} has {len(names)} names")
    return FeatureFile(Features(names, values), source=str(path))


def read_ids(path: str | os.PathLike[str]) -> list[str]:
    """Names in a file's order: a CSV with a column uuid, a JSON list of names or of pictures' files, or lines.

    Of a picture's file in a JSON list the name without its suffix is taken, as of a folder of pictures.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        try:
            found = json.loads(path.read_bytes())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not JSON ({error}); expected a list of names") from error
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise DataError(f"{path}: expected a JSON list of names")
        return [_stem(name) for name in found]
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected names: a CSV with a column uuid, a JSON list, or lines")
    names: list[str] = []
    column, width = 0, 1
    for line, row in read_rows(path):
        if not names and not column and "uuid" in (header := [name.strip() for name in row]) and line == 1:
            column, width = header.index("uuid"), len(row)
            continue
        if len(row) != width or not row[column]:
            raise DataError(f"{path}, line {line}: expected {width} fields and a name, got {row}")
        names.append(row[column])
    return names


def _stem(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in PICTURE_SUFFIXES else name


def hdf5_sides(path: Path) -> list[str]:
    """The sides that an HDF5 file has; none for another file."""
    import h5py

    if not h5py.is_hdf5(path):
        return []
    with h5py.File(path, "r") as file:
        return _sides(file)


def _sides(file: Any) -> list[str]:
    return [name for name in _SIDES if name in file and f"{name}_ids" in file]


def _read_hdf5(path: Path, side: str | None) -> FeatureFile:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            sides = _sides(file)
            if side is None and len(sides) == 1:
                side = sides[0]
            if side is None or side not in sides:
                found = ", ".join(sorted(file)) or "nothing"
                choice = f"choose side={' or side='.join(sides)}" if sides else "expected query, query_ids, ..."
                which = "two sets of features are" if side is None and sides else f"no {side or _SIDES[0]} is"
                raise DataError(f"{path}: {which} in this file (it holds {found}); {choice}")
            values, names = file[side], file[f"{side}_ids"]
            if values.ndim != 2 or values.dtype.kind != "f" or names.shape != (len(values),):
                raise DataError(
                    f"{path}: expected floats [N, D] as {side} and N names as {side}_ids, got {values.dtype} "
                    f"{list(values.shape)} and {list(names.shape)}"
                )
            uuids = [
                name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else str(name) for name in names
            ]
            made_from = dict(json.loads(values.attrs.get(_MADE_FROM, "{}")))
            offset = values.id.get_offset()
            if offset is None or not values.dtype.isnative:  # chunked, compressed or empty
                rows: Rows = values[...].astype(np.float32)
            else:
                rows = np.memmap(path, values.dtype, "r", offset, values.shape)
    except DataError:
        raise
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{path}: not a readable HDF5 file of features ({error})") from error
    return FeatureFile(Features(uuids, rows), made_from=made_from, source=f"{path}, {side}")


def write_hdf5(
    path: str | os.PathLike[str],
    query: Features,
    reference: Features,
    *,
    made_from: Sequence[Mapping[str, Any]] = ({}, {}),
    say: Callable[[str], None] | None = None,
) -> None:
    """Write the descriptor track's file: query, reference float32 [N, D], query_ids, reference_ids, sorted by id.

    made_from: of queries and references, what a `FeatureFile` says of them. say: receives a sentence if the challenge
    would refuse the file. The file appears only when it is complete. Raises ValueError for features of several views or
    of unequal columns.
    """
    import h5py

    columns = {features.values.shape[1] for features in (query, reference)}
    if len(columns) > 1 or query.views != 1 or reference.views != 1:
        raise ValueError(f"query and reference must have one row a picture and equal columns, got {sorted(columns)}")
    if max(columns) > _MOST_COLUMNS and say is not None:
        say(f"{path}: {max(columns)} columns; the challenge's descriptor track takes at most {_MOST_COLUMNS}")
    with whole_path(path) as temporary, h5py.File(temporary, "w") as file:
        for name, features, facts in zip(_SIDES, (query, reference), made_from, strict=True):
            ids = [uuid.encode("utf-8", "surrogateescape") for uuid in features.uuids]
            order = np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int64)
            file.create_dataset(f"{name}_ids", data=np.array(ids, f"S{max(map(len, ids), default=1)}")[order])
            rows = file.create_dataset(name, features.values.shape, np.float32)
            if facts:
                rows.attrs[_MADE_FROM] = json.dumps(dict(facts))
            _copy(rows, features.values, order)


def _copy(target: Any, values: Rows, order: NDArray[np.int64], step: int = 16_384) -> None:
    for start in range(0, len(order), step):
        chosen: Sequence[int] | NDArray[np.int64] = order[start : start + step]
        target[start : start + step] = np.asarray(values[chosen], np.float32)
