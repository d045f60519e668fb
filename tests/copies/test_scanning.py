"""A collection's groups from what is said of its pairs: all pairs of a group asked, equal bytes, sources, files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from copynce.copies import scanning
from copynce.copies.group_files import write_groups_csv, write_groups_jsonl
from copynce.copies.pair import CopyPair
from copynce.copies.polygons import rectangle
from copynce.copies.regions import CopiedRegion
from copynce.copies.scanning import Ask, Collection, nearest_pairs, scan
from copynce.retrieval.search import search


class Asked:
    """Pictures that show overlapping stretches of one line are copies of each other."""

    def __init__(self, files: list[str], stretches: list[tuple[float, float]]) -> None:
        self.files, self.stretches, self.pairs = files, stretches, list[tuple[int, int]]()

    def __call__(self, pairs: NDArray[np.int64]) -> list[CopyPair | None]:
        self.pairs += [(i, j) for i, j in pairs.tolist()]
        return [self.pair(i, j) for i, j in pairs.tolist()]

    def pair(self, i: int, j: int) -> CopyPair:
        (a, b), (c, d) = self.stretches[i], self.stretches[j]
        shared = max(0.0, min(b, d) - max(a, c))
        sides = [rectangle(10 * shared, 100), rectangle(10 * shared, 100)]
        shares = shared / (b - a), shared / (d - c)
        region = CopiedRegion("found", *sides, np.diag([2.0, 1.0, 1.0]), *shares, 100.0, 0.9, 40, 30)
        return CopyPair(self.files[i], self.files[j], 0.99 if shared else 0.01, 0.9, region, (100, 100), (100, 100))


def collection(
    folder: Path, stretches: list[tuple[float, float]], same: dict[int, int], rows: NDArray[np.floating]
) -> Collection:
    count = len(stretches)
    files = [str(folder / f"{place}.png") for place in range(count)]
    for (start, end), file in zip(stretches, files, strict=True):
        Image.new("RGB", (round(10 * (end - start)), 100)).save(file)
    of = np.array([same.get(place, place) for place in range(count)])
    descriptors = np.where((of == np.arange(count))[:, None], rows, np.nan).astype(np.float32)
    return Collection(files, np.full(count, 7), np.arange(count) * 10**10, of, descriptors)


def test_groups_of_a_collection(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stretches = [(0.0, 9.0), (0.0, 4.0), (5.0, 9.0), (20.0, 29.0), (20.0, 29.0), (40.0, 49.0), (0.0, 9.0), (40.0, 49.0)]
    #            whole       left        right       two alike                   alone         as 0        as 5
    found_in = collection(tmp_path, stretches, {6: 0, 7: 5}, rng.normal(size=(8, 5)))
    ask = Asked(list(map(found_in.name, range(8))), stretches)
    found = scan(found_in, ask, k=5)
    paths = [[Path(member.path).stem for member in group.members] for group in found.groups]
    assert paths == [["0", "1", "6"], ["3", "4"], ["5", "7"]]
    first, second, third = found.groups
    assert first.source == ask.files[0]
    assert first.why.startswith("shows more: the other is 44% of it")
    assert [member.same_bytes for member in first.members] == [False, False, True]
    pair = first.members[1].pair
    assert pair is not None
    assert (pair.query, pair.reference, pair.region.query_share) == (ask.files[1], ask.files[0], 1.0)
    np.testing.assert_allclose(pair.region.geometry, np.diag([0.5, 1.0, 1.0]))
    assert second.source == ask.files[3]
    assert second.why.startswith("older file")
    assert (third.source, third.why, third.probability) == (ask.files[5], "same bytes, the oldest file", 1.0)
    assert [(pair.query, pair.reference) for pair in found.across] == [(ask.files[0], ask.files[2])]
    assert len(found.pairs) == 3
    assert all(pair[0] < pair[1] < 6 for pair in ask.pairs), "of equal bytes one is asked for"

    write_groups_csv(tmp_path / "groups.csv", found.groups)
    rows = list(csv.DictReader((tmp_path / "groups.csv").open(newline="")))
    assert [(row["group"], Path(row["path"]).stem, row["source"], row["same_bytes"]) for row in rows] == [
        ("1", "0", "yes", "no"),
        ("1", "1", "no", "no"),
        ("1", "6", "no", "yes"),
        ("2", "3", "yes", "no"),
        ("2", "4", "no", "no"),
        ("3", "5", "yes", "no"),
        ("3", "7", "no", "yes"),
    ]
    assert (rows[1]["probability"], rows[1]["width"], rows[0]["why"]) == ("0.9900", "40", first.why)
    write_groups_jsonl(tmp_path / "groups.jsonl", found.groups)
    told = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert [group["source"] for group in told] == [group.source for group in found.groups]
    assert told[0]["members"][1]["pair"]["reference"] == ask.files[0]


def test_a_group_is_complete_however_few_neighbours_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    angles = np.linspace(0, 1, 12)
    rows = np.column_stack([np.cos(angles), np.sin(angles)])
    stretches = [(0.0, 1.0)] * 12
    found_in = collection(tmp_path, stretches, {}, rows)

    def ask() -> Asked:
        return Asked(list(map(found_in.name, range(12))), stretches)

    every = ask()
    (group,) = scan(found_in, every, k=2).groups
    assert len(group.members) == 12
    assert sorted(every.pairs) == [(i, j) for i in range(12) for j in range(i + 1, 12)]
    monkeypatch.setattr(scanning, "MANY", 11)
    few = ask()
    found = scan(found_in, few, k=2)
    assert found.unfinished == [12]
    assert len(few.pairs) < 30
    assert max(len(group.members) for group in found.groups) == 3
    assert len(found.across) == len(found.pairs) - sum(
        len(group.members) * (len(group.members) - 1) // 2 for group in found.groups
    )


def test_nearest_pairs_are_those_of_the_search_without_oneself() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(40, 6)).astype(np.float32)
    rows[7] = np.nan
    rows[20:25] = rows[19]  # more equal ones than k
    pairs = nearest_pairs(rows, 3)
    good = np.flatnonzero(np.arange(40) != 7)
    expected = set()
    for i in good:
        others = good[good != i]
        _, at = search(rows[[i]], rows[others], 3)
        expected |= {(min(i, j), max(i, j)) for j in others[at[0]].tolist()}
    assert set(map(tuple, pairs.tolist())) == expected
    assert np.all(pairs[:, 0] < pairs[:, 1])
    assert len(np.unique(pairs, axis=0)) == len(pairs)
    assert len(nearest_pairs(rows[:1], 3)) == 0


def test_what_scan_refuses(tmp_path: Path) -> None:
    empty = collection(tmp_path, [], {}, np.empty((0, 4)))
    ask: Ask = Asked([], [])
    assert scan(empty, ask).groups == []
    with pytest.raises(ValueError, match="k must be at least 1"):
        scan(empty, ask, k=0)
    with pytest.raises(ValueError, match="probability must be above 0"):
        scan(empty, ask, probability=0.0)
