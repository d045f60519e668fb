"""The table of an index alone: transactions, two writers, what is removed and when, approximate search."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from copynce.index import searching
from copynce.index.lock import IndexLock
from copynce.index.names import restored, stored
from copynce.index.searching import IndexSearch, approximate, build_approximate
from copynce.index.table import PictureTable
from tests.index.writer import CARD, some


def test_two_writers_at_once_lose_and_double_nothing(tmp_path: Path) -> None:
    place = str(tmp_path / "index")
    command = [sys.executable, str(Path(__file__).with_name("writer.py")), place]
    writers = [subprocess.Popen([*command, first], stdin=subprocess.PIPE) for first in ("0", "45")]
    for writer in writers:  # they wait for the end of their input
        assert writer.stdin is not None
        writer.stdin.close()
    assert [writer.wait(300) for writer in writers] == [0, 0]
    table = PictureTable.open(place)
    assert table is not None
    assert sorted(map(int, restored(table.columns(["path"])["path"]))) == list(range(135))


def test_compaction_keeps_the_folder_bounded(tmp_path: Path) -> None:
    place = str(tmp_path / "index")
    table = PictureTable.create(place, CARD, "float16")
    names = [f"{i}'s" for i in range(50)]
    sizes = []
    for _ in range(3):
        for seed in range(4):
            table.put(some(names, seed))
        left = tmp_path / "index" / "pictures.lance" / "data" / "left-by-a-killed-writer.lance"
        left.write_bytes(b"x" * 50_000)
        os.utime(left, (0, 0))
        table.compact()
        sizes.append(table.bytes())
        assert (len(table), table.fragments(), table.versions()) == (50, 1, 1)
        assert not left.exists()
    assert max(sizes) < 1.1 * min(sizes)
    assert table.delete(pa.array(["0's", "1's", "no such"])) == 2
    other = PictureTable.open(place)
    assert other is not None
    with other.working():  # somebody reads: nothing of the last hour is taken away
        table.compact()
        assert table.versions() > 1
    assert len(other) == 48


def test_a_lock_is_shared_or_alone(tmp_path: Path) -> None:
    one, other = IndexLock(tmp_path), IndexLock(tmp_path)
    with one.shared(), other.shared(), one.alone() as alone:
        assert not alone
    with one.shared(), one.shared(), one.alone() as alone:
        assert alone
    with one.shared(), other.alone() as alone:
        assert not alone
    with IndexLock(tmp_path / "none").alone() as alone:
        assert not alone  # without a lock nobody can know


def test_names_come_back_as_they_were() -> None:
    names = ["a.jpg", "b\udcff.jpg", "\uef80\uf000 ü", ""]
    assert restored(stored(names)) == names
    assert stored(["a.jpg", "ü"]).to_pylist() == ["a.jpg", "ü"]
    assert restored(stored(["\uefc3\uefbc"])) == ["\uefc3\uefbc"]  # not the ü that these would be as bytes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ivf_pq_finds_nearly_all_and_says_how_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "_LEAST_ROWS", 600)
    monkeypatch.setattr(searching, "_ROWS_OF_A_LIST", 100)
    table = PictureTable.create(str(tmp_path / "index"), CARD, "float32")
    assert build_approximate(table) is None
    table.put(some([f"{i:04d}" for i in range(800)], seed=0))
    recall = build_approximate(table)
    table.put(some([f"{i:04d}" for i in range(800, 810)], seed=1))
    table.refresh()
    told = approximate(table)
    assert told is not None
    assert recall is not None
    assert (told["rows"], told["rows_to_come"], told["recall"]) == (800, 10, pytest.approx(recall, abs=1e-4))
    assert recall > 0.9
    query = np.random.default_rng(2).normal(size=(20, 16))
    exact, asked = IndexSearch(table, np.inf)(query, 5), IndexSearch(table, 0)(query, 5)
    same = [set(one) & set(other) for one, other in zip(exact.paths, asked.paths, strict=True)]
    assert sum(map(len, same)) > 0.9 * 100
    (new,) = [row for row in table.columns(["path", "descriptor"]).to_pylist() if row["path"] == "0805"]
    assert IndexSearch(table, 0)(np.array([new["descriptor"]], np.float32), 1).paths == [["0805"]]
    assert asked.scores[0, 0] == pytest.approx(exact.scores[0, 0], abs=0.2)
