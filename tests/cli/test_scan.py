"""copynce scan from the command line, with a tiny model: groups, files, lists, moves and back, an index."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from copynce.cli import main
from copynce.cli.main import BAD_INPUT
from copynce.cli.search import MATCHED
from copynce.copies.calibration import FEATURES, Calibration
from copynce.data.synthetic import make_picture
from copynce.models import build_descriptor, save_checkpoint
from copynce.models.box import CALIBRATION, DESCRIPTOR


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A box of an untrained descriptor, for which the same pixels are a copy and nothing else is."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("box")
    options = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    save_checkpoint(folder / DESCRIPTOR, build_descriptor(img_size=32, dim=16, backbone_options=options))
    weights = dict.fromkeys(FEATURES, 0.0) | {"cosine": 1e7}
    Calibration(tuple(weights.values()), -(1e7 - 100), 0.5).save(folder / CALIBRATION)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """a.png, its bytes again, its pixels in a larger file; b.png; c.png; and a broken one."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(5)
    for name in "abc":
        make_picture(rng, (40, 60)).save(folder / f"{name}.png")
    (folder / "more/a again.png").write_bytes((folder / "a.png").read_bytes())
    os.utime(folder / "more/a again.png", (2e9, 2e9))
    Image.open(folder / "a.png").save(folder / "more/large.png", compress_level=0)
    (folder / "broken.png").write_text("no picture")
    return folder


def test_scan(box: Path, photos: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    out, moved = tmp_path / "out", tmp_path / "moved"
    fixed = ["--model", str(box), "--threads", "1", "--device", "cpu"]
    assert main(["scan", str(photos), "--out", str(out), *fixed]) == 0
    told = capfdbinary.readouterr()
    assert b"1 group of copies, 3 of 5 pictures" in told.out
    assert b"larger file: " in told.out.replace(b"\n", b" ")
    assert b"1 broken pictures were skipped" in told.err
    rows = list(csv.DictReader((out / "groups.csv").open(newline="")))
    assert [(os.path.relpath(row["path"], photos), row["source"]) for row in rows] == [
        ("more/large.png", "yes"),
        ("a.png", "no"),
        ("more/a again.png", "no"),
    ]
    (group,) = map(json.loads, (out / "groups.jsonl").read_text().splitlines())
    assert [member["pair"] is None for member in group["members"]] == [True, False, False]
    assert len((out / "matches.csv").read_text().splitlines()) == 2
    assert (out / "report.html").read_text().count("likely source") >= 1
    assert "broken.png" in (out / "skipped.jsonl").read_text()

    assert main(["scan", str(photos), "--list", "-0", *fixed]) == 0
    copies = [str(photos / "a.png"), str(photos / "more/a again.png")]
    assert capfdbinary.readouterr().out.split(b"\0") == [*map(os.fsencode, copies), b""]

    assert main(["scan", str(photos), "--move-to", str(moved), "--fail-on-match", *fixed]) == MATCHED
    assert b"2 pictures moved" in capfdbinary.readouterr().err
    assert sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png")) == [
        "b.png", "broken.png", "c.png", "more/large.png",
    ]  # fmt: skip
    assert (moved / "more/a again.png").is_file()
    assert main(["scan", "--undo", str(moved / "moved.csv")]) == 0
    assert all(map(os.path.isfile, copies))

    index = str(tmp_path / "index")
    assert main(["index", "add", index, str(photos), "--model", str(box / DESCRIPTOR), "threads=1", "device=cpu"]) == 0
    (photos / "c.png").unlink()
    capfdbinary.readouterr()
    assert main(["scan", index, *fixed]) == 0
    told = capfdbinary.readouterr()
    assert b"1 group of copies, 3 of 4 pictures" in told.out
    assert b"c.png: no such file any more" in told.err  # without --out there is no list, so each is told


def test_what_scan_refuses(box: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ["--model", str(box), "--threads", "1", "--device", "cpu"]
    for arguments, message in (
        ([], "needs at least one FOLDER"),
        ([str(photos), "-0"], "-0 is for --list"),
        ([str(photos), "--undo", "moved.csv"], "--undo MOVED.csv stands alone"),
        (["--undo", str(photos / "a.png")], "list of moved files"),
        ([str(photos), "--strict", *fixed], "broken.png: no picture format"),
        ([str(photos), "--move-to", str(photos / "copies"), *fixed], "choose a folder outside"),
        ([str(tmp_path / "none"), *fixed], "none: no such file or folder"),
    ):
        assert main(["scan", *arguments]) == BAD_INPUT
        assert message in capsys.readouterr().err
