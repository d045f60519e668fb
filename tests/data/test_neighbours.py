"""Neighbour files: both forms, itself left out wherever it stands, and a sentence for everything that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from copynce.data import Manifest, Neighbours, read_neighbours
from copynce.errors import DataError

MANIFEST = Manifest(["a", "b", "c", "d"], [Path(f"{name}.jpg") for name in "abcd"], Path("pictures"))


def test_npy_leaves_out_the_picture_itself_by_index(tmp_path: Path) -> None:
    table = np.array([[0, 2, 3, 1], [2, 1, 0, 3], [3, 0, 1, -1], [0, -1, -1, -1]])  # row 1: a duplicate came first
    for dtype in (np.int64, np.int32):
        np.save(tmp_path / "knn.npy", table.astype(dtype))
        found = read_neighbours(tmp_path / "knn.npy", MANIFEST, columns=2)
        assert [found.of(i).tolist() for i in range(4)] == [[2, 3], [2, 0], [3, 0], [0]]
        assert len(found) == 4


def test_json_names_pictures(tmp_path: Path) -> None:
    path = tmp_path / "knn.json"
    path.write_text(json.dumps({"b": ["d", "b", "a", "c"], "a": [], "d": ["c"]}))
    found = read_neighbours(path, MANIFEST, columns=2)
    assert [found.of(i).tolist() for i in range(4)] == [[], [3, 0], [], [2]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.zeros((3, 2), int), r"knn\.npy: expected signed integers \[4, K\], .* pictures, got int64 \[3, 2\]"),
        (np.zeros((4, 2)), r"got float64 \[4, 2\]"),
        (np.zeros(4, int), r"got int64 \[4\]"),
        (np.array([[0], [4], [0], [0]]), r"knn\.npy, row 1: expected indices of the 4 pictures or -1, got 4"),
        (np.array([[0], [1], [-2], [0]]), r"knn\.npy, row 2: .* got -2"),
    ],
)
def test_wrong_tables_are_named(tmp_path: Path, table: np.ndarray, message: str) -> None:
    np.save(tmp_path / "knn.npy", table)
    with pytest.raises(DataError, match=message):
        read_neighbours(tmp_path / "knn.npy", MANIFEST, columns=1)


def test_files_of_another_form_are_named_and_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "knn.npy"
    with pytest.raises(DataError, match=r"knn\.npy: no such file; expected neighbours"):
        read_neighbours(path, MANIFEST, columns=1)
    np.save(path, np.array([[{}]] * 4), allow_pickle=True)
    with pytest.raises(DataError, match=r"knn\.npy: not a \.npy file of integers"):
        read_neighbours(path, MANIFEST, columns=1)
    np.save(path, np.zeros((4, 9), int))
    for content in (path.read_bytes()[:-20], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"knn\.npy: not a \.npy file of integers"):
            read_neighbours(path, MANIFEST, columns=1)
    (tmp_path / "k3.csv").write_text("a,b,c\n")
    with pytest.raises(
        DataError, match=r"k3\.csv: not a .*; expected neighbours as \.npy or \.pth .* or \.json"
    ) as error:
        read_neighbours(tmp_path / "k3.csv", MANIFEST, columns=1)
    assert "load" not in str(error.value)
    torch.save(np.zeros((4, 1), int), tmp_path / "knn.pth")
    with pytest.raises(DataError, match=r"knn\.pth: a pickle with .* read \(numpy\.\S*_reconstruct\); exp") as error:
        read_neighbours(tmp_path / "knn.pth", MANIFEST, columns=1)
    assert "load" not in str(error.value)
    (tmp_path / "knn.pth").write_text("a,b,c\n")
    with pytest.raises(DataError, match=r"not a file of torch\.save \(it begins with 61 2c .*\); expected an integer"):
        read_neighbours(tmp_path / "knn.pth", MANIFEST, columns=1)
    np.savez(tmp_path / "knn.npz", a=np.zeros(3))
    with pytest.raises(DataError, match=r"knn\.npz: expected one array in a \.npy file, got an archive"):
        read_neighbours(tmp_path / "knn.npz", MANIFEST, columns=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"knn\.json: not JSON"),
        ("[1]", r"knn\.json: expected an object"),
        ('{"a": "b"}', r"knn\.json: expected an object"),
        ('{"a": ["b", "x"]}', r"knn\.json: 'x', named at 'a', is not among the 4 pictures of pictures"),
        ('{"y": ["b"]}', r"knn\.json: 'y', named at 'y', is not among the 4 pictures"),
        ('{"a": [1]}', r"knn\.json: 1, named at 'a', is not among"),
    ],
)
def test_wrong_json_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "knn.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_neighbours(tmp_path / "knn.json", MANIFEST, columns=1)


def test_columns_are_checked() -> None:
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        Neighbours(np.zeros((2, 2), int), columns=0)
