"""`copynce search`, from a box made of a small model: tables, files, report, broken pictures, an index, statuses."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from copynce.cli.main import main
from copynce.copies.calibration import FEATURES, Calibration
from copynce.data.synthetic import make_picture
from copynce.model import load_model
from copynce.models import build_descriptor, build_matcher, save_checkpoint
from copynce.models.box import BACKGROUND, CALIBRATION
from copynce.models.checkpoints import load_descriptor
from scripts import make_box

BACKBONE = {"embed_dim": 48, "num_heads": 2, "patch_size": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset: 12 references, 12 queries of which 6 are copies; and 6 other pictures for the background."""
    folder = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(5)
    names: dict[str, list[str]] = {}
    pictures = {"references": [make_picture(rng, (90, 120)) for _ in range(12)]}
    pictures["queries"] = [picture.copy() for picture in pictures["references"][:6]]
    pictures["queries"] += [make_picture(rng, (90, 120)) for _ in range(6)]
    pictures["background"] = [make_picture(rng, (90, 120)) for _ in range(6)]
    for role, made in pictures.items():
        (folder / role).mkdir()
        names[role] = [f"{role[0].upper()}{number}" for number in range(len(made))]
        for name, picture in zip(names[role], made, strict=True):
            picture.save(folder / role / f"{name}.png")
    for file, role in (("references.csv", "references"), ("query_part1.csv", "queries"), ("train.csv", "background")):
        lines = "".join(f"{name},{role}/{name}.png\n" for name in names[role])
        (folder / file).write_text("uuid,path\n" + lines)
    truth = {query: [f"R{number}"] if number < 6 else [] for number, query in enumerate(names["queries"])}
    (folder / "gt_part1.json").write_text(json.dumps(truth))
    return folder


@pytest.fixture(scope="module")
def box(place: Path) -> Path:
    """A box as `scripts.make_box` makes it, of a descriptor and a matcher with its first block."""
    torch.manual_seed(0)
    descriptor, matcher = place / "descriptor.safetensors", place / "matcher.safetensors"
    save_checkpoint(descriptor, build_descriptor(img_size=64, head="cls", backbone_options={**BACKBONE, "depth": 2}))
    model = build_matcher(img_size=64, encoder_blocks=1, fusion_blocks=1, backbone_options=BACKBONE, norm_eps=1e-6)
    own = load_descriptor(descriptor).state_dict()
    model.load_state_dict({name: own.get(name, tensor) for name, tensor in model.state_dict().items()})
    save_checkpoint(matcher, model)
    arguments = [str(descriptor), "--matcher", str(matcher), "--background", str(place / "background"), "--out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["make_box", *arguments, str(place / "box"), "--dataset", str(place), "--split", "part1"]
        )
        make_box.main()
    return place / "box"


@pytest.fixture(scope="module")
def sure(box: Path) -> Path:
    """That box, but only what is equal is a copy: weights that nobody trained tell nothing else."""
    folder = box.with_name("sure")
    shutil.copytree(box, folder)
    (folder / BACKGROUND).unlink()
    Calibration((4e4, *[0.0] * (len(FEATURES) - 1)), -3.999e4).save(folder / CALIBRATION)
    return folder


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "matches.csv").open(newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_a_card_names_files_and_no_folders() -> None:
    card = {"step": 1, "trained_on": "/a/b.csv", "start": {"file": "m", "card": {"trained_on": "c/d.csv"}}}
    assert make_box._with_names(card) == {
        "step": 1,
        "trained_on": "b.csv",
        "start": {"file": "m", "card": {"trained_on": "d.csv"}},
    }


def test_a_box_is_whole(box: Path) -> None:
    model = load_model(box)
    assert model.matcher is not None
    assert model.one_pass
    assert model.background is not None
    assert model.background.shape == (6, 48)
    assert model.calibrated().fitted_on == f"{box.parent.name} part1"
    assert load_model(box / "descriptor.safetensors").calibration == model.calibration, "its file stands for it"


def test_copies_are_listed_with_their_places(
    sure: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found"
    arguments = ["search", str(place / "queries"), str(place / "references"), "--out", str(out), "--model", str(sure)]
    assert main([*arguments, "--fail-on-match"]) == 4
    found = rows(out)
    assert {(Path(row["query"]).stem, Path(row["reference"]).stem) for row in found} == {
        (f"Q{number}", f"R{number}") for number in range(6)
    }
    told = [json.loads(line) for line in (out / "matches.jsonl").read_text().splitlines()]
    assert [one["query"] for one in told] == [row["query"] for row in found]
    shown = capsys.readouterr().out
    assert "6 of 12 pictures copy one of 12" in shown
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg") == 12, "each picture once"
    assert main([*arguments, "--probability", "1"]) == 0
    assert rows(out) == []


def test_an_index_and_single_files_and_broken_ones(
    sure: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", "add", str(tmp_path / "index"), str(place / "references"), "--model", str(sure)]) == 0
    odd = tmp_path / "queries" / os.fsdecode(b"\xff.png")
    odd.parent.mkdir()
    Image.open(place / "queries" / "Q2.png").save(odd)
    (odd.parent / "broken.jpg").write_bytes(b"no picture")
    arguments = [
        "search",
        str(odd.parent),
        str(tmp_path / "index"),
        "--out",
        str(tmp_path / "out"),
        "--model",
        str(sure),
    ]
    assert main(arguments) == 0
    (found,) = rows(tmp_path / "out")
    assert (found["query"], Path(found["reference"]).stem) == (str(odd), "R2")
    (skipped,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert "broken.jpg" in skipped
    assert "1 broken pictures were skipped" in capsys.readouterr().err
    assert main([*arguments, "--strict"]) == 2
    assert "broken.jpg" in capsys.readouterr().err
    # a picture among the references is no copy of itself
    arguments[1:3] = [str(place / "references" / "R0.png"), str(place / "references")]
    assert main(arguments) == 0
    assert rows(tmp_path / "out") == []


def test_a_model_without_calibration_is_refused_with_the_way_out(
    place: Path, tmp_path: Path, box: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["search", str(place / "queries"), str(place / "references"), "--out", str(tmp_path / "out"), "--model"]
    assert main([*arguments, str(place / "descriptor.safetensors")]) == 2
    assert "no calibration" in capsys.readouterr().err
