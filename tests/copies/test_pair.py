"""Pairs in files: the columns that the design names, regions as polygons, every name back as it was."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np

from copynce.copies.pair import COLUMNS, CopyPair, write_pairs_csv, write_pairs_jsonl
from copynce.copies.regions import CopiedRegion


def pair(query: str, *, found: bool = True) -> CopyPair:
    square = np.array([[0.0, 0.0], [10.0, 0.0], [10.0, 8.25]])
    region = CopiedRegion(
        "found" if found else "place unknown", square, 2 * square, 2 * np.eye(3), 0.5, 0.25, 100.0, 0.9, 40, 30
    )
    return CopyPair(query, "b.jpg", 0.98765, 0.71234, region, (20, 10), (40, 20))


def test_a_row_a_pair(tmp_path: Path) -> None:
    write_pairs_csv(tmp_path / "matches.csv", [pair('a, "1".jpg'), pair("c.jpg", found=False)])
    first, second = csv.DictReader((tmp_path / "matches.csv").open(newline=""))
    assert list(first) == COLUMNS == ["query", "reference", "probability", "score", "query_region", "reference_region"]
    assert first["query"] == 'a, "1".jpg'
    assert (first["probability"], first["score"]) == ("0.9877", "0.7123")
    assert first["query_region"] == "0.0 0.0, 10.0 0.0, 10.0 8.2"
    assert second["query_region"] == second["reference_region"] == ""


def test_a_name_that_is_no_utf8_comes_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\xe9.jpg")
    write_pairs_csv(tmp_path / "matches.csv", [pair(name)])
    write_pairs_jsonl(tmp_path / "matches.jsonl", [pair(name)])
    assert b"\xff\xe9.jpg," in (tmp_path / "matches.csv").read_bytes()
    told = json.loads((tmp_path / "matches.jsonl").read_text())
    assert told["query"] == name
    assert told["query_region"] == [[0.0, 0.0], [10.0, 0.0], [10.0, 8.2]]
    assert told["query_size"] == [20, 10]
