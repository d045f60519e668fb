"""Mined neighbours: for each training picture the others that look most like it (PROTOCOLS 5)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copynce.data.manifest import Manifest
from copynce.data.tables import SharedArray
from copynce.data.torch_files import only_tensor, read_torch_file
from copynce.errors import DataError

_ROWS = 65_536  # how many rows of a table are checked at once
_EXPECTED = "expected neighbours as .npy or .pth [N, K], or .json {uuid: [uuid, ...]}"


class Neighbours:
    """The neighbours of N pictures.

    table: integer [N, K], row i naming pictures by index, the most alike first; -1 where there are fewer. The picture
        itself may stand anywhere in its row or be missing: exact duplicates leave its place undefined.
    columns: how many neighbours of a picture are used, at least 1.

    >>> Neighbours(np.array([[0, 2, 1], [2, 0, 1], [-1, -1, -1]]), columns=1).of(1)
    array([2])
    """

    def __init__(self, table: NDArray[np.integer], columns: int) -> None:
        if columns < 1:
            raise ValueError(f"columns must be at least 1, got {columns}")
        self._shared = SharedArray(table)
        self._columns = columns

    def __len__(self) -> int:
        return len(self._shared.values)

    def of(self, index: int) -> NDArray[np.integer]:
        """The first ``columns`` neighbours of picture ``index``, itself left out."""
        row = np.asarray(self._shared.values[index])
        return row[(row != index) & (row >= 0)][: self._columns]


def no_neighbours(pictures: int) -> Neighbours:
    """Of so many pictures, none known yet: pairs take any other pictures instead."""
    return Neighbours(np.empty((pictures, 0), np.int32), 1)


def read_neighbours(path: str | os.PathLike[str], manifest: Manifest, columns: int) -> Neighbours:
    """The neighbours of ``manifest``'s pictures in a file.

    path: a .npy file of integers [N, K], N the number of pictures, that names pictures by their place in the manifest
        (it is mapped, not loaded); the same as a tensor in a .pth file, the released form, whose first column is the
        picture itself; or a .json file ``{uuid: [uuid, ...]}``, where pictures may be absent.
    columns: how many neighbours of each picture to use.
    Raises DataError if the file is missing, of another form, or speaks of pictures that the manifest has not.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; {_EXPECTED}")
    if path.suffix.lower() == ".json":
        return Neighbours(_read_json(path, manifest), columns)
    if path.suffix.lower() in (".pth", ".pt"):
        expected = "an integer tensor [N, K], neighbours by their places in the list"
        table, _ = only_tensor(read_torch_file(path, expected), path, expected, "i")
        return Neighbours(_checked(table.numpy(), path, manifest), columns)
    return Neighbours(_read_npy(path, manifest), columns)


def _read_npy(path: Path, manifest: Manifest) -> NDArray[np.integer]:
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(b"PK\x03\x04"):
        raise DataError(f"{path}: expected one array in a .npy file, got an archive; {_EXPECTED}")
    if not start.startswith(b"\x93NUMPY"):  # numpy would take it for a pickle, and tell how to run what is in it
        begin = start.hex(" ") or "nothing"
        raise DataError(f"{path}: not a .npy file of integers, it begins with {begin}; {_EXPECTED}")
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a .npy file of integers ({error}); {_EXPECTED}") from error
    return _checked(table, path, manifest)


def _checked(table: NDArray[Any], path: Path, manifest: Manifest) -> NDArray[np.integer]:
    """`table` if it can be one of the manifest's pictures."""
    if table.ndim != 2 or len(table) != len(manifest) or not np.issubdtype(table.dtype, np.signedinteger):
        raise DataError(
            f"{path}: expected signed integers [{len(manifest)}, K], a row for each picture of {manifest.root}, "
            f"got {table.dtype} {list(table.shape)}"
        )
    for start in range(0, len(table), _ROWS):
        rows = table[start : start + _ROWS]
        strange = (rows < -1) | (rows >= len(manifest))
        if strange.any():
            row, column = np.argwhere(strange)[0].tolist()
            raise DataError(
                f"{path}, row {start + row}: expected indices of the {len(manifest)} pictures or -1, "
                f"got {int(rows[row, column])}"
            )
    return table


def _read_json(path: Path, manifest: Manifest) -> NDArray[np.integer]:
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(found, list) for found in content.values()):
        raise DataError(f"{path}: expected an object {{uuid: [uuid, ...]}}")
    position = {uuid: i for i, uuid in enumerate(manifest.uuids)}
    table = np.full((len(manifest), max(map(len, content.values()), default=0)), -1, np.int64)
    for uuid, found in content.items():
        absent = [name for name in (uuid, *found) if not isinstance(name, str) or name not in position]
        if absent:
            raise DataError(
                f"{path}: {absent[0]!r}, named at {uuid!r}, is not among the {len(position)} pictures of "
                f"{manifest.root}"
            )
        table[position[uuid], : len(found)] = [position[name] for name in found]
    return table
