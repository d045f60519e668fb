"""Features in series of files and in other programs' files: rows and names come back, what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from copynce.errors import DataError
from copynce.retrieval.feature_formats import read_ids, write_hdf5
from copynce.retrieval.features import (
    FeatureFile,
    Features,
    FeatureStore,
    read_features,
    write_features,
    write_series,
)
from copynce.retrieval.rows import JoinedRows

VALUES = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
NAMES = ["b", "a", "ü", "z9", "d\udcff", "c", "e"]
FOUND = FeatureFile(
    Features(NAMES, VALUES, "bf16"), [("x", "empty file")], {"model": "m"}, np.array([0, 1, 2, 4, 5, 6, 8]), 9
)


def series(folder: Path, **changes: Any) -> FeatureStore:
    store = FeatureStore(folder, changes.pop("name", "query"), "m")
    write_series(store, FOUND, {"model": "m", **changes}, lambda rows, place: rows * 2, pictures=4)
    return store


def test_a_series_is_read_as_one(tmp_path: Path) -> None:
    series(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    found = read_features(tmp_path)
    assert isinstance(found.features.values, JoinedRows)
    np.testing.assert_array_equal(np.asarray(found.features.values), VALUES * 2)
    assert (list(found.features.uuids), found.features.precision) == (NAMES, "bf16")
    assert found.positions is not None
    assert (found.positions.tolist(), found.pictures) == ([0, 1, 2, 4, 5, 6, 8], 9)
    assert (found.broken, found.made_from) == ([("x", "empty file")], {"model": "m"})
    assert read_features(tmp_path / "query-0001.safetensors").features.uuids == NAMES[3:6]
    for rows in (slice(1, 6), slice(0, 7, 3), slice(5, 2), [6, 0, -1], np.array([], int)):
        np.testing.assert_array_equal(found.features.values[rows], (VALUES * 2)[rows])
    np.testing.assert_array_equal(found.features.values[-2], (VALUES * 2)[-2])


def test_a_series_goes_on_where_it_was_stopped_and_loses_its_tail(tmp_path: Path) -> None:
    store = series(tmp_path)
    first = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    store.path(1).unlink()
    series(tmp_path)
    second = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert [path.name for path in first if first[path] != second[path]] == ["query-0001.safetensors"]
    shorter = FeatureFile(Features(NAMES[:2], VALUES[:2]))
    write_series(store, shorter, {}, lambda rows, place: rows, pictures=4)
    assert [path.name for path in tmp_path.iterdir()] == ["query-0000.safetensors"]


def test_an_unfinished_or_mixed_series_is_named(tmp_path: Path) -> None:
    store = series(tmp_path)
    store.path(2).rename(tmp_path / "aside")
    with pytest.raises(DataError, match=r"'query' are not finished, query-0002\.safetensors is missing"):
        read_features(tmp_path)
    (tmp_path / "aside").rename(store.path(2))
    write_features(store.path(1), Features(["q"], VALUES[:1], "bf16"), {"model": "other"}, last=False)
    with pytest.raises(DataError, match=r"query-0000.* and query-0001.* were made from \{'model': 'm'\} and .*'other'"):
        read_features(tmp_path)
    write_features(store.path(1), Features(["q"], VALUES[:1, :2], "bf16"), {"model": "m"}, last=False)
    with pytest.raises(DataError, match="query: its files differ in precision, views or columns"):
        read_features(tmp_path)
    series(tmp_path, name="reference")
    with pytest.raises(DataError, match=r"several features .* choose side=query or side=reference"):
        read_features(tmp_path)
    with pytest.raises(DataError, match="no features called 'training'; there are query, reference"):
        read_features(tmp_path, side="training")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none: no features in this folder"):
        read_features(tmp_path / "none")


def test_hdf5_of_the_descriptor_track(tmp_path: Path) -> None:
    said: list[str] = []
    reference = Features(["R2", "R10"], np.eye(2, 5, dtype=np.float32))
    write_hdf5(tmp_path / "x.h5", FOUND.features, reference, say=said.append)
    with h5py.File(tmp_path / "x.h5") as file:
        assert {name: (file[name].shape, file[name].dtype.kind) for name in file} == {
            "query": ((7, 5), "f"),
            "reference": ((2, 5), "f"),
            "query_ids": ((7,), "S"),
            "reference_ids": ((2,), "S"),
        }
        assert file["reference_ids"][:].tolist() == [b"R10", b"R2"]
    found = read_features(tmp_path / "x.h5", side="query").features
    rows = dict(zip(found.uuids, np.asarray(found.values), strict=True))
    assert list(found.uuids) == sorted(NAMES, key=lambda name: name.encode("utf-8", "surrogateescape"))
    for name, row in zip(NAMES, VALUES, strict=True):
        np.testing.assert_array_equal(rows[name], row)
    assert isinstance(found.values, np.memmap)
    assert said == []
    wide = Features(["a"], np.ones((1, 257), np.float32))
    write_hdf5(tmp_path / "wide.h5", wide, wide, say=said.append)
    assert "257 columns; the challenge's descriptor track takes at most 256" in said[0]
    with h5py.File(tmp_path / "packed.h5", "w") as file:  # chunked, other types, one side
        file.create_dataset("query", data=VALUES.astype(np.float64), compression="gzip")
        file.create_dataset("query_ids", data=[name.encode("utf-8", "surrogateescape") for name in NAMES])
    np.testing.assert_array_equal(read_features(tmp_path / "packed.h5").features.values, VALUES)


def test_torch_files(tmp_path: Path) -> None:
    path, names = tmp_path / "f.pth", [f"{name}.jpg" for name in "abcdefg"]
    (tmp_path / "ids.json").write_text(json.dumps(names))
    for legacy in (False, True):
        torch.save(torch.from_numpy(VALUES).half(), path, _use_new_zipfile_serialization=not legacy)
        found = read_features(path, ids=tmp_path / "ids.json").features
        np.testing.assert_array_equal(found.values, VALUES.astype(np.float16).astype(np.float32))
        assert list(found.uuids) == list("abcdefg")
    with pytest.raises(DataError, match=r"f\.pth: the file holds no list of names for its 7 rows; give ids=FILE"):
        read_features(path)
    torch.save({"feats": torch.from_numpy(VALUES), "names": names, "labels": torch.arange(7)}, path)
    assert list(read_features(path).features.uuids) == list("abcdefg")
    torch.save({"feats": VALUES}, path)
    with pytest.raises(DataError, match=r"f\.pth: a pickle with more than tensors and text, .* numpy\.save"):
        read_features(path)
    torch.save({"feats": torch.arange(7)}, path)
    with pytest.raises(DataError, match=r"f\.pth: expected a floating-point tensor \[N, D\].*, got int64 \[7\]"):
        read_features(path)
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(DataError, match=r"f\.pth: damaged, or not a file of torch\.save"):
        read_features(path)


def test_npy_with_a_list(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", VALUES)
    (tmp_path / "ids.csv").write_text("path,uuid\n" + "".join(f"p/{i}.jpg,n{i}\n" for i in range(7)))
    found = read_features(tmp_path / "f.npy", ids=tmp_path / "ids.csv").features
    assert isinstance(found.values, np.memmap)
    assert list(found.uuids) == [f"n{i}" for i in range(7)]
    (tmp_path / "ids.txt").write_text("a\nb\n")
    assert read_ids(tmp_path / "ids.txt") == ["a", "b"]


def broken(folder: Path, what: str) -> tuple[Path, dict[str, Any]]:
    path, ids = folder / "f.npy", folder / "ids.txt"
    values, names = VALUES.copy(), [f"n{i}" for i in range(7)]
    if what == "nan":
        values[3, 1] = np.nan
    if what == "twice":
        names[5] = "n2"
    np.save(path, values if what != "integers" else values.astype(int))
    ids.write_text("\n".join(names[:6] if what == "short" else names))
    if what == "text":
        path.write_text("hello")
    if what == "hdf5":
        with h5py.File(folder / "x.h5", "w") as file:
            file.create_dataset("other", data=VALUES)
        return folder / "x.h5", {}
    if what == "cut hdf5":
        (folder / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
        return folder / "x.h5", {}
    if what == "fields":
        ids.write_text("a,b\n" * 7)
    return path, {"ids": ids}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", r"f\.npy: row 3, of 'n3', is not finite"),
        ("twice", r"f\.npy: the id 'n2' is given to more than one row"),
        ("short", r"f\.npy: 7 rows 5 wide, but .*ids\.txt has 6 names"),
        ("integers", r"f\.npy: expected floats \[N, D\], got int64 \[7, 5\]"),
        ("text", r"f\.npy: not a readable file of features, it begins with 68 65 6c 6c 6f; expected a folder"),
        ("hdf5", r"x\.h5: no query is in this file \(it holds other\); expected query, query_ids"),
        ("cut hdf5", r"x\.h5: not a readable HDF5 file of features"),
        ("fields", r"ids\.txt, line 1: expected 1 fields and a name, got \['a', 'b'\]"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(tmp_path: Path, what: str, message: str) -> None:
    path, arguments = broken(tmp_path, what)
    with pytest.raises(DataError, match=message):
        read_features(path, **arguments)
