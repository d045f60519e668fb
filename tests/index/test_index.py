"""An index kept up to date with its files, and searched."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import copynce
from copynce.cli import main
from copynce.cli.main import BAD_INPUT
from copynce.errors import DataError
from copynce.index import Index, Match
from copynce.models import save_checkpoint
from copynce.models.checkpoints import load_descriptor
from copynce.retrieval.search import search


def rows(index: Index) -> dict[str, dict[str, Any]]:
    """{name of the file: its row}."""
    assert index._table is not None
    index._table.refresh()
    found = index._table.columns(index._table.schema.names).to_pylist()
    assert len({row["path"] for row in found}) == len(found)
    return {os.path.basename(row["path"]): row for row in found}


def test_an_index_follows_its_files(archive: Path, weights: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    exif = Image.Exif()
    exif[306] = "2019:05:03 12:34:56"
    Image.open(archive / "1.png").save(archive / "dated.jpg", exif=exif)
    (archive / "broken.png").write_text("no picture")
    odd = os.fsencode(archive) + b"/\xff\xee.png"  # a name that is no UTF-8
    with open(odd, "wb") as file:
        file.write((archive / "2.png").read_bytes())
    index = copynce.Index(tmp_path / "index", weights, **settings)
    reported: list[int] = []
    added = index.add(archive, progress=lambda done, total: reported.append(done))
    assert (added.new, added.changed, added.unchanged) == (8, 0, 0)
    assert [os.path.basename(path) for path, _ in added.broken] == ["broken.png"]
    assert "broken.png" in (tmp_path / "index" / "skipped.jsonl").read_text()
    assert reported == sorted(reported)
    assert reported[-1] == 9
    first = rows(index)
    assert (first["dated.jpg"]["width"], first["dated.jpg"]["height"]) == (48, 40)
    assert str(first["dated.jpg"]["taken"]) == "2019-05-03 12:34:56"
    assert first["0.png"]["taken"] is None
    assert first["0.png"]["id"] == first["0.png"]["path"] == str(archive / "0.png")
    assert {row["model"] for row in first.values()} == {index.model.sha256}

    again = index.add(archive, archive / "more", archive / "0.png")
    assert (again.new, again.changed, again.unchanged) == (0, 0, 8)
    (archive / "3.png").write_bytes((archive / "more" / "4.png").read_bytes())
    changed = index.add(archive)
    assert (changed.new, changed.changed, changed.unchanged) == (0, 1, 7)
    now = rows(index)
    np.testing.assert_allclose(now["3.png"]["descriptor"], now["4.png"]["descriptor"], atol=1e-5)
    assert now["3.png"]["sha256"] == now["4.png"]["sha256"] != first["3.png"]["sha256"]

    (archive / "0.png").unlink()
    os.unlink(odd)
    assert index.add(archive).unchanged == 6
    assert len(index) == 8
    gone = sorted([str(archive / "0.png"), os.fsdecode(odd)])
    assert index.prune(dry_run=True) == index.prune() == gone
    assert index.prune() == []
    assert index.remove(archive / "more") == 2
    with pytest.raises(DataError, match="has no picture of this id or path"):
        index.remove(archive / "1.png", archive / "more")
    assert set(rows(index)) == {"1.png", "2.png", "3.png", "dated.jpg"}


def test_unchanged_by_content(archive: Path, weights: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    index = Index(tmp_path / "index", weights, **settings)
    index.add(archive)
    before = rows(index)
    later = time.time_ns() + 10**9
    os.utime(archive / "0.png", ns=(later, later))
    old = (archive / "1.png").stat()
    content = bytearray((archive / "1.png").read_bytes())
    content[-1] ^= 1  # the same size and time
    (archive / "1.png").write_bytes(content)
    os.utime(archive / "1.png", ns=(old.st_atime_ns, old.st_mtime_ns))
    by_hash = Index(tmp_path / "index", weights, **{**settings, "compare": "hash"})
    added = by_hash.add(archive)
    assert (added.changed + len(added.broken), added.renewed, added.unchanged) == (1, 1, 4)
    after = rows(index)
    assert after["0.png"]["mtime_ns"] == later
    assert after["0.png"]["descriptor"] == before["0.png"]["descriptor"]
    (archive / "1.png").unlink()
    assert index.add(archive).unchanged == 5


def test_lists_give_ids(archive: Path, weights: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    index = Index(tmp_path / "index", weights, **settings)
    index.add(archive / "0.png", archive / "2.png")
    listed = archive / "list.csv"
    listed.write_text("uuid,path\nR0,0.png\nR1,1.png\nR9,gone.png\n")
    added = index.add(listed)
    assert (added.new, added.renewed) == (1, 1)
    assert added.broken == [(str(archive / "gone.png"), "no such file")]
    Image.open(archive / "2.png").save(archive / "0.png")
    index.add(archive)  # a folder says no ids: those of the list stay, also of what is made anew
    assert {name: row["id"] for name, row in rows(index).items() if name in ("0.png", "1.png")} == {
        "0.png": "R0",
        "1.png": "R1",
    }
    listed.write_text("uuid,path\nR1,2.png\n")
    with pytest.raises(DataError, match=r"2.png: its id 'R1' is that of .*1.png"):
        index.add(listed)
    assert index.remove("R1") == 1


def test_search_is_exact_and_by_one_model(
    archive: Path, weights: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    index = Index(tmp_path / "index", weights, **settings)
    with pytest.raises(DataError, match="there is no index"):
        index.search([archive / "0.png"])
    index.add(archive)
    with Image.open(archive / "2.png") as picture:
        picture.load()
        found = index.search([archive / "2.png", picture, np.asarray(picture)], k=2)
    assert [match.query for match in found] == [str(archive / "2.png")] * 2 + ["picture 1"] * 2 + ["picture 2"] * 2
    assert all(match == Match(match.query, *found[0][1:3], pytest.approx(1, abs=1e-6)) for match in found[::2])
    assert found[0].path == str(archive / "2.png")

    query = np.random.default_rng(0).normal(size=(5, 16))
    stored = rows(index)
    paths = [row["path"] for row in stored.values()]
    scores, at = search(query, np.array([row["descriptor"] for row in stored.values()], np.float32), k=4)
    exact = index.nearest(query, 4)
    np.testing.assert_array_equal(exact.scores, scores)
    assert exact.paths == [[paths[i] for i in row] for row in at]
    # Beyond the memory that it may take, the table is asked: the same answers, as there is no IVF-PQ index yet.
    asked = Index(tmp_path / "index", **{**settings, "memory_gib": 0.0}).nearest(query, 4)
    np.testing.assert_array_equal(asked.scores, scores)
    assert asked.paths == exact.paths
    assert Index(tmp_path / "index", **settings).nearest(query[:1], 99).scores.shape == (1, 6)
    with pytest.raises(ValueError, match=r"descriptors must be \[N, 16\]"):
        index.nearest(query[:, :3])

    other = tmp_path / "other.safetensors"
    save_checkpoint(other, load_descriptor(weights), {"another": "card"})
    with pytest.raises(DataError, match="take that model, or begin another index"):
        Index(tmp_path / "index", other)


def test_broken_pictures_stop_where_they_must(
    archive: Path, weights: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    (archive / "broken.png").write_text("no picture")
    index = Index(tmp_path / "index", weights, **settings)
    with pytest.raises(DataError, match=r"broken.png: no picture format .*without --strict"):
        index.add(archive, strict=True)
    assert index.add(archive).broken != []
    assert len(index) == 6
    with pytest.raises(DataError, match=r"broken.png: no picture format"):
        index.search([archive / "broken.png"])


def test_from_the_command_line(
    archive: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("copynce.models.box.files", lambda package: tmp_path / "no package")
    place = str(tmp_path / "index")
    fixed = ["threads=1", "precision=fp32", "device=cpu"]
    assert main(["index", "add", place, str(archive), "--model", str(weights), *fixed]) == 0
    assert "6 new, 0 changed, 0 unchanged, 0 broken; 6 pictures" in capsys.readouterr().out
    assert main(["index", "add", place, str(archive), "compare=hash", *fixed]) == 0  # the index knows its model
    (archive / "0.png").unlink()
    assert main(["index", "prune", place, "--dry-run"]) == 0
    assert str(archive / "0.png") in capsys.readouterr().out
    assert main(["index", "prune", place]) == 0
    assert main(["index", "remove", place, str(archive / "more")]) == 0
    assert main(["index", "info", place]) == 0
    told = capsys.readouterr().out
    assert "3 pictures" in told
    assert str(weights) in told
    for arguments, message in (
        (["add", place, "nowhere"], "nowhere: no such file or folder"),
        (["add", place, str(archive), "thread=2"], "did you mean threads"),
        (["add", place], "add needs at least one source"),
        (["info", str(tmp_path / "none")], "there is no index"),
        (["add", str(tmp_path / "none"), str(archive)], "a new index needs a model"),
        (["info", str(weights)], "a file, expected the folder of an index"),
    ):
        assert main(["index", *arguments]) == BAD_INPUT
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_packages_own_model_is_found_where_the_package_is(
    archive: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"threads": 1, "precision": "fp32", "device": "cpu"}
    for package in ("old", "new"):
        (tmp_path / package / "weights").mkdir(parents=True)
        shutil.copy(weights, tmp_path / package / "weights" / "descriptor.safetensors")
    monkeypatch.setattr("copynce.models.box.files", lambda package: tmp_path / "old")
    assert Index(tmp_path / "index", **settings).add(archive).new == 6
    shutil.rmtree(tmp_path / "old")
    monkeypatch.setattr("copynce.models.box.files", lambda package: tmp_path / "new")
    (archive / "another.png").write_bytes((archive / "0.png").read_bytes())
    assert Index(tmp_path / "index", **settings).add(archive).new == 1
    (tmp_path / "new" / "weights" / "descriptor.safetensors").write_bytes(b"another")
    with pytest.raises(DataError, match="is no longer there"):
        Index(tmp_path / "index", **settings).search([archive / "0.png"])
