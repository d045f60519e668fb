"""The layouts of other benchmarks: Copydays, SSCD's DISC21, files of several splits, any two folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from copynce.data import open_dataset, open_pictures
from copynce.errors import DataError


def pictures(root: Path, names: list[str]) -> None:
    """Files that are named as pictures; nothing is decoded here."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


COPYDAYS = ["original/200000.jpg", "original/200100.jpg", "strong/200001.jpg", "strong/200102.jpg"]
COPYDAYS += ["crops/10/200000.jpg", "crops/80/200100.jpg", "jpeg/3/200000.jpg", "distractors/2000999.jpg"]


def test_copydays(tmp_path: Path) -> None:
    pictures(tmp_path, [*COPYDAYS, "training/1.jpg"])
    whole = open_dataset(tmp_path, "all")
    assert whole.ground_truth == {
        "original/200000": ["original/200000"],
        "original/200100": ["original/200100"],
        "strong/200001": ["original/200000"],
        "strong/200102": ["original/200100"],
        "crops/10/200000": ["original/200000"],
        "crops/80/200100": ["original/200100"],
        "jpeg/3/200000": ["original/200000"],
    }
    assert list(whole.references.uuids) == ["original/200000", "original/200100", "distractors/2000999"]
    assert whole.references.paths[2] == tmp_path / "distractors" / "2000999.jpg"
    assert whole.groups["strong"] == ["strong/200001", "strong/200102"]
    assert list(whole.groups) == ["original", "strong", "crops", "jpeg"]
    assert whole.protocol == "copydays"
    assert whole.training is not None
    strong = open_dataset(tmp_path, "strong")
    assert (list(strong.ground_truth), strong.groups) == (["strong/200001", "strong/200102"], {})
    with pytest.raises(DataError, match=r"no split 'dev'; available: all, original, strong, crops, jpeg"):
        open_dataset(tmp_path, "dev")
    with pytest.raises(DataError, match="Copydays' file names are its ground truth"):
        open_dataset(tmp_path, "all", ground_truth="gt.csv")


def test_disc21_as_sscd_has_it(tmp_path: Path) -> None:
    pictures(tmp_path, ["val_query/Q0.jpg", "val_query/Q1.jpg", "val_ref/R0.jpg", "training/T0.jpg"])
    (tmp_path / "val_groundtruth_matches.csv").write_text("Q1,R0\n")
    split = open_dataset(tmp_path, "val")
    assert (split.ground_truth, split.protocol) == ({"Q0": [], "Q1": ["R0"]}, "sscd")
    assert split.training is not None
    assert len(split.training) == 1


@pytest.fixture
def disc21(tmp_path: Path) -> Path:
    """Three queries of every split, chosen by lists."""
    pictures(tmp_path, ["reference_images/R000000.jpg", "reference_images/R000001.jpg"])
    lists = {"25k_matching_val": 0, "25k_matching_dev": 25_000, "matching_test": 50_000}
    for name, first in lists.items():
        uuids = [f"Q{first + i:05d}" for i in range(3)]
        pictures(tmp_path / "query_images", [f"{uuid}.jpg" for uuid in uuids])
        lines = ["uuid,path", *(f"{uuid},query_images/{uuid}.jpg" for uuid in uuids)]
        (tmp_path / f"isc_{name}_set_query.csv").write_text("\n".join(lines))
    return tmp_path


def test_a_file_of_several_splits_serves_each(disc21: Path) -> None:
    both = "query_id,reference_id\nQ00001,R000000\nQ25000,\nQ25002,R000001\n"
    (disc21 / "dev_ground_truth.csv").write_text(both)
    assert open_dataset(disc21, "val").ground_truth == {"Q00000": [], "Q00001": ["R000000"], "Q00002": []}
    split = open_dataset(disc21, "dev")
    assert split.ground_truth == {"Q25000": [], "Q25001": [], "Q25002": ["R000001"]}
    assert (split.protocol, open_dataset(disc21, "test").protocol) == ("copynce", "phase2")
    assert not any(open_dataset(disc21, "test").ground_truth.values())
    with pytest.raises(DataError, match=r"none of its 3 queries is of this split \(Q50000 to Q99999\)"):
        open_dataset(disc21, "test", ground_truth=disc21 / "dev_ground_truth.csv")


def test_a_given_ground_truth_comes_first(disc21: Path, tmp_path: Path) -> None:
    (disc21 / "dev_ground_truth.csv").write_text("Q25000,R000000\n")
    (tmp_path / "mine.json").write_text(json.dumps({"Q25001": ["R000001"]}))
    found = open_dataset(disc21, "dev", ground_truth=tmp_path / "mine.json").ground_truth
    assert found == {"Q25000": [], "Q25001": ["R000001"], "Q25002": []}


def test_the_real_lists(disc21_lists: Path, tmp_path: Path) -> None:
    """The ground truth of two splits in one file."""
    truths = [
        json.loads((disc21_lists / f"isc_25k_matching_{name}_set_gt.json").read_text()) for name in ("val", "dev")
    ]
    queries = list(truths[1])[:4]
    pictures(tmp_path, [f"reference_images/{r}.jpg" for q in queries for r in truths[1][q]])
    pictures(tmp_path, [f"query_images/{q}.jpg" for q in queries])
    lines = ["uuid,path", *(f"{q},query_images/{q}.jpg" for q in queries)]
    (tmp_path / "isc_25k_matching_dev_set_query.csv").write_text("\n".join(lines))
    (tmp_path / "gt.json").write_text(json.dumps(truths[0] | {q: truths[1][q] for q in queries}))
    split = open_dataset(tmp_path, "dev", ground_truth=tmp_path / "gt.json")
    assert split.ground_truth == {q: truths[1][q] for q in queries}


def test_any_two_folders(tmp_path: Path) -> None:
    pictures(tmp_path, ["q/a/1.jpg", "q/2.png", "r/x.jpg"])
    (tmp_path / "gt.csv").write_text("a/1,x\n")
    split = open_pictures(tmp_path / "q", tmp_path / "r", ground_truth=tmp_path / "gt.csv")
    assert split.ground_truth == {"2": [], "a/1": ["x"]}
    assert (split.name, split.training) == ("pictures", None)
    (tmp_path / "gt.csv").write_text("a/1,y\n")
    with pytest.raises(DataError, match=r"1 references of the ground truth are not among the 1 reference pictures"):
        open_pictures(tmp_path / "q", tmp_path / "r", ground_truth=tmp_path / "gt.csv")
