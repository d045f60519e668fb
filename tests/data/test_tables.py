"""Tables of names and paths: lists to their readers, one piece of memory to all processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copynce.data import Manifest, Neighbours, read_neighbours
from copynce.data.pairs import SupervisedPairs
from copynce.data.tables import Paths, SharedArray, Strings
from dali_pipelines import ShardMember


@given(st.lists(st.text()))
def test_strings_are_what_they_were(strings: list[str]) -> None:
    """Half surrogate pairs, too: these tables are no files."""
    table = Strings(strings)
    assert table == strings
    assert [table[i] for i in range(-len(strings), 0)] == list(table) == strings
    assert pickle.loads(pickle.dumps(table)) == strings
    for string in strings:
        assert table.index(string) == strings.index(string)


def test_tables_behave_as_lists() -> None:
    table = Strings(["a", "bc", ""])
    assert (table[1:], table[-1], table + table[:1], len(table)) == (["bc", ""], "", ["a", "bc", "", "a"], 3)
    assert table != ["a", "bc"]
    assert table != "abc"
    assert repr(Strings("abcdefghijklm")).endswith("'j', ... 13 in all]")
    with pytest.raises(IndexError, match="there are 3 elements, got index 3"):
        table[3]
    with pytest.raises(ValueError, match="'x' is not among the 3 strings"):
        table.index("x")
    assert table.index("", 1) == 2


def test_paths_are_files_and_places_in_shards() -> None:
    mixed = [Path("a.jpg"), ShardMember("0.tar", "b.jpg", 512, 7, 99), Path("/c.jpg"), ShardMember("1.tar", "d", 0, 1)]
    for paths in (mixed, mixed[:1], mixed[1:2], []):
        assert Paths(paths) == paths
        assert pickle.loads(pickle.dumps(Paths(paths))) == paths
    assert [type(path) for path in Paths(mixed)] == [type(path) for path in mixed]


def shared_bytes() -> int:
    """Bytes of shared memory that this process has mapped by memfd."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    inside, total = False, 0
    for line in lines:
        if "-" in line.split(" ", 1)[0]:
            inside = "memfd:copynce" in line
        elif inside and line.startswith("Size:"):
            total += int(line.split()[1]) * 1024
    return total


def look(pipe: Connection, things: Sequence[Any]) -> None:
    manifest, neighbours, plan = things
    rows = [neighbours.of(5).tolist(), type(neighbours._shared.values).__name__]
    pairs = plan.item(3, 0)
    pipe.send((manifest.uuids[-1], manifest.paths[-1], manifest.uuids.index("T099999"), rows, pairs, shared_bytes()))


def test_a_worker_maps_what_its_owner_has(tmp_path: Path) -> None:
    count = 100_000
    uuids = [f"T{i:06}" for i in range(count)]
    manifest = Manifest(uuids, [Path("folder", f"{uuid}.jpg") for uuid in uuids], Path("folder"))
    np.save(tmp_path / "knn.npy", np.arange(2 * count, dtype=np.int64).reshape(count, 2) % count)
    neighbours = read_neighbours(tmp_path / "knn.npy", manifest, 2)
    plan = SupervisedPairs(manifest, manifest, {uuid: [uuid] for uuid in uuids}, "light", 0)
    things = (manifest, neighbours, plan)
    assert len(pickle.dumps(things)) > 3_000_000, "by value, where there is no process to share with"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):  # the second one gets the same memory
        process = context.Process(target=look, args=(theirs, things))
        process.start()
        uuid, path, index, rows, pairs, mapped = ours.recv()
        process.join()
        assert (uuid, path, index, rows) == (uuids[-1], manifest.paths[-1], count - 1, [[10, 11], "memmap"])
        assert pairs == plan.item(3, 0)
        assert mapped > 3_000_000
    assert manifest.uuids == uuids
    opened = len(os.listdir("/proc/self/fd")) - before
    del things, manifest, plan, neighbours
    assert len(os.listdir("/proc/self/fd")) <= before + max(0, opened - 8), "no handle outlives its table"


def test_a_part_of_a_mapped_file_goes_by_value(tmp_path: Path) -> None:
    np.save(tmp_path / "knn.npy", np.arange(20).reshape(10, 2))
    part = np.load(tmp_path / "knn.npy", mmap_mode="r")[5:]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(SharedArray(part))).values, part)
    assert Neighbours(part, 2).of(0).tolist() == [10, 11]
