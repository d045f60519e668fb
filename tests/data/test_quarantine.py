"""Broken pictures: each listed once, on disk at once, whatever happens to the process."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from copynce.data import Quarantine
from copynce.errors import DataError


def test_counts_and_sentence(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "run" / "skipped.jsonl")
    assert quarantine.summary() == "no broken pictures"
    assert not (tmp_path / "run").exists()
    quarantine.add("a.jpg", "empty file")
    quarantine(Path("b.jpg"), "truncated JPEG")
    quarantine.add("c.jpg", "truncated JPEG")
    quarantine.add("c.jpg", "met again")
    assert len(quarantine) == 3
    assert "c.jpg" in quarantine
    assert Path("d.jpg") not in quarantine
    assert list(quarantine.counts().items()) == [("truncated JPEG", 2), ("empty file", 1)]
    assert quarantine.summary() == (
        f"3 broken pictures skipped: 2 truncated JPEG, 1 empty file (listed in {tmp_path / 'run' / 'skipped.jsonl'})"
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert lines[1] == {"path": "b.jpg", "reason": "truncated JPEG"}
    assert [(line["path"], line["reason"]) for line in lines] == quarantine.entries()


def test_continues_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    Quarantine(path).add("a.jpg", "empty file")
    with path.open("a") as file:
        file.write('{"path": "b.j')  # killed here
    quarantine = Quarantine(path)
    assert quarantine.entries() == [("a.jpg", "empty file")]
    quarantine.add("b.jpg", "empty file")
    assert Quarantine(path).entries() == [("a.jpg", "empty file"), ("b.jpg", "empty file")]


def test_many_threads(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "skipped.jsonl")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: quarantine.add(f"{i % 100}.jpg", "empty file"), range(800)))
    assert sorted(Quarantine(tmp_path / "skipped.jsonl").entries()) == sorted(quarantine.entries())
    assert len(quarantine) == 100


@pytest.mark.parametrize("line", ["nonsense", '{"path": "a"}', "[1, 2]", "5"])
def test_a_foreign_file(tmp_path: Path, line: str) -> None:
    (tmp_path / "skipped.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"skipped\.jsonl, line 1: expected"):
        Quarantine(tmp_path / "skipped.jsonl")
