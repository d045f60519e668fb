"""Evaluation sets: both layouts, and everything in them that may not fit together."""

from __future__ import annotations

import dataclasses
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from copynce.data import layouts, open_dataset, read_ground_truth
from copynce.errors import DataError
from dali_pipelines import ShardMember


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """A data set in the lists layout: two parts of two queries, two references."""
    for name in ["Q0", "Q1", "Q2", "Q3", "R0", "R1", "T0"]:
        (tmp_path / f"{name}.jpg").write_bytes(b"")
    for name, uuids in {
        "query_part1": ["Q0", "Q1"],
        "query_part2": ["Q3", "Q2"],
        "references": ["R0", "R1"],
        "train": ["T0"],
    }.items():
        (tmp_path / f"{name}.csv").write_text("uuid,path\n" + "".join(f"{u},{u}.jpg\n" for u in uuids))
    (tmp_path / "gt_part1.json").write_text('{"Q0": ["R1"], "Q1": []}')
    (tmp_path / "gt_part2.csv").write_text("query_id,reference_id\nQ2,R0\nQ2,R1\n")
    return tmp_path


def test_parts(lists: Path) -> None:
    part1, part2, dev = (open_dataset(lists, split) for split in ("part1", "part2", "dev"))
    assert part1.ground_truth == {"Q0": ["R1"], "Q1": []}
    assert part2.ground_truth == {"Q3": [], "Q2": ["R0", "R1"]}  # a query that is not mentioned copies nothing
    assert part2.queries.uuids == ["Q3", "Q2"]
    assert dev.ground_truth == part1.ground_truth | part2.ground_truth
    assert dev.queries.uuids == part1.queries.uuids + part2.queries.uuids
    assert dev.queries.paths == [lists / f"{uuid}.jpg" for uuid in dev.queries.uuids]
    assert dev.training is not None
    assert (dev.name, dev.references.uuids, dev.training.uuids) == ("dev", ["R0", "R1"], ["T0"])


def test_a_hidden_ground_truth_is_an_empty_one(lists: Path) -> None:
    (lists / "gt_part1.json").unlink()
    assert not any(open_dataset(lists, "part1").ground_truth.values())


def test_without_training_pictures(lists: Path) -> None:
    (lists / "train.csv").unlink()
    assert open_dataset(lists, "part1").training is None


@pytest.mark.parametrize(
    ("break_it", "split", "message"),
    [
        (lambda root: None, "part3", "no split 'part3'; available: part1, part2, dev"),
        (lambda root: (root / "query_part2.csv").unlink(), "dev", "no split 'dev'; available: part1$"),
        (lambda root: (root / "gt_part1.json").unlink(), "dev", "no ground truth of its part part1; expected gt_part1"),
        (lambda root: (root / "R0.jpg").unlink(), "part1", "references.csv: 1 of 2 files not found"),
        (lambda root: (root / "references.csv").unlink(), "part1", "not an evaluation set; expected references.csv"),
        (
            lambda root: (root / "gt_part1.json").write_text('{"Q7": []}'),
            "part1",
            "1 queries of the ground truth are not in the query list, the first is 'Q7'",
        ),
        (
            lambda root: (root / "gt_part1.json").write_text('{"Q1": ["R9"]}'),
            "dev",
            "1 references of the ground truth are not among the 2 reference pictures, the first is 'R9'",
        ),
        (
            lambda root: (root / "query_part2.csv").write_text("uuid,path\nQ0,Q0.jpg\n"),
            "dev",
            "query 'Q0' is in more than one part",
        ),
    ],
)
def test_lists_that_do_not_fit(lists: Path, break_it: Callable[[Path], Any], split: str, message: str) -> None:
    break_it(lists)
    with pytest.raises(DataError, match=message):
        open_dataset(lists, split)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: no such folder"):
        open_dataset(tmp_path / "gone", "dev")


@pytest.fixture
def disc21(tmp_path: Path) -> Path:
    """A small data set in DISC21's layout, with lists that choose a few of its queries."""
    root = tmp_path / "disc21"
    for name in ["query_images/Q00003", "query_images/Q25000", "query_images/Q25001", "reference_images/R000001"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.jpg").write_bytes(b"")
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "isc_25k_matching_dev_set_query.csv").write_text(
        "uuid,path\nQ25000,query_images/Q25000.jpg\nQ25001,query_images/Q25001.jpg\n"
    )
    (lists / "isc_25k_matching_dev_set_gt.json").write_text('{"Q25001": ["R000001"], "Q25000": []}')
    return root


def test_disc21_with_lists(disc21: Path) -> None:
    split = open_dataset(disc21, "dev", lists=disc21.parent / "lists")
    assert split.queries.paths[0] == disc21 / "query_images/Q25000.jpg"
    assert split.references.uuids == ["R000001"]
    assert split.training is None
    assert split.ground_truth == {"Q25000": [], "Q25001": ["R000001"]}


def test_disc21_in_shards(disc21: Path) -> None:
    """A folder of shards is found by its keys; a list leads into a shard by SHARD.tar/NAME."""
    for folder, shard in (("reference_images", "references-0.tar"), ("query_images", "queries-0.tar")):
        files = sorted((disc21 / folder).iterdir())
        with tarfile.open(disc21 / folder / shard, "w") as tar:
            for path in files:
                tar.add(path, path.name)
                path.unlink()
    queries = disc21.parent / "lists" / "isc_25k_matching_dev_set_query.csv"
    queries.write_text(queries.read_text().replace("query_images/", "query_images/queries-0.tar/"))
    split = open_dataset(disc21, "dev", lists=disc21.parent / "lists")
    assert split.queries.uuids == ["Q25000", "Q25001"]
    assert os.fspath(split.queries.paths[1]) == f"{disc21}/query_images/queries-0.tar/Q25001.jpg"
    assert split.references.uuids == ["R000001"]
    assert isinstance(split.references.paths[0], ShardMember)


def test_disc21_without_lists_needs_every_query(disc21: Path) -> None:
    with pytest.raises(DataError, match="24999 of the 25000 queries of split 'val' are missing, the first is Q00000"):
        open_dataset(disc21, "val")


def test_disc21_without_lists(disc21: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(layouts._DISC21["dev"], last=25_001)  # 25,000 files take seconds
    monkeypatch.setitem(layouts._DISC21, "dev", short)
    (disc21 / "isc_25k_matching_dev_set_gt.json").write_text('{"Q25001": ["R000001"]}')
    split = open_dataset(disc21, "dev")
    assert split.queries.uuids == ["Q25000", "Q25001"]
    assert split.ground_truth == {"Q25000": [], "Q25001": ["R000001"]}


@pytest.mark.parametrize("split", ["val", "dev", "test"])
def test_disc21_ranges_are_those_of_the_published_lists(disc21_lists: Path, split: str) -> None:
    facts = layouts._DISC21[split]
    uuids = [line.split(",")[0] for line in (disc21_lists / facts.query_list).read_text().splitlines()[1:]]
    assert uuids == [f"Q{number:05d}" for number in range(facts.first, facts.last + 1)]


@pytest.mark.parametrize(
    ("split", "message"),
    [("part1", "no split 'part1'; available: val, dev, test"), ("dev", "24998 of the 25000")],
)
def test_disc21_errors(disc21: Path, split: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(disc21, split)


def test_lists_are_for_disc21(lists: Path) -> None:
    with pytest.raises(ValueError, match="lists is for the DISC21 layout"):
        open_dataset(lists, "part1", lists=lists)


def test_both_ground_truth_forms_agree(disc21_lists: Path) -> None:
    from_json = read_ground_truth(disc21_lists / "isc_25k_matching_val_set_gt.json")
    from_csv = read_ground_truth(disc21_lists / "isc_public_ground_truth.csv")
    assert from_json == from_csv
    assert (len(from_csv), sum(map(len, from_csv.values()))) == (25_000, 4_991)


@pytest.mark.parametrize(("name", "pairs"), [("25k_matching_dev_set", 5_009), ("matching_test_set", 10_000)])
def test_disc21_ground_truth_counts(disc21_lists: Path, name: str, pairs: int) -> None:
    ground_truth = read_ground_truth(disc21_lists / f"isc_{name}_gt.json")
    assert sum(map(len, ground_truth.values())) == pairs


def test_ground_truth_csv_without_header(tmp_path: Path) -> None:
    (tmp_path / "gt.csv").write_text("Q0,R1\nQ1,\nQ0,R2\n")
    assert read_ground_truth(tmp_path / "gt.csv") == {"Q0": ["R1", "R2"], "Q1": []}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gt.json", "{", "gt.json: not JSON"),
        ("gt.json", "[]", "expected an object .* got a list"),
        ("gt.json", '{"Q0": "R1"}', "query 'Q0' must have a list of reference uuids, got 'R1'"),
        ("gt.json", '{"Q0": [1]}', r"query 'Q0' must have a list .* got \[1\]; uuids are text in quotes"),
        ("gt.json", '{"Q0": null}', r"got None; .* as in {\"Q1\": \[\"R1\"\], \"Q2\": \[\]}"),
        ("gt.json", '{"Q0": [NaN]}', "query 'Q0' must have a list"),
        ("gt.json", '{"Q0": ["R1"]}\n{"Q1": []}\n', "not JSON .* expected one object"),
        ("gt.json", "[" * 100_000, "not JSON"),
        ("gt.json", '{"Q0": [], "Q1": [], "Q0": ["R1"]}', "query 'Q0' is given twice"),
        ("gt.csv", "", "gt.csv: the file is empty"),
        ("gt.csv", "query_id,reference_id\nQ0\n", "gt.csv, line 2: expected query_id,reference_id"),
        ("gt.csv", ",R0\n", "gt.csv, line 1: expected query_id,reference_id"),
        ("gt.csv", "query_id,reference_id\n", "only a header"),
        ("gt.csv", "query_id,reference_id\nQ0,nan\n", "line 2: reference 'nan'; leave the field empty where"),
        ("gt.csv", 'query_id,reference_id\nQ0,"R1,R2"\n', "line 2: reference 'R1,R2'; give each reference a line"),
        ("gt.csv", "query_id;reference_id\nQ0;R1\n", "line 1: expected .* separated by commas here, not by ';'"),
        ("gt.csv", "query_id,reference\nQ0,R1\n", "line 1: the header must name query_id,reference_id once each"),
    ],
)
def test_bad_ground_truth(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_ground_truth(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("gt.csv", b"Usage,Reference_ID,query_id\r\nPublic,R1,Q0\r\nPublic,,Q1\r\n"),
        ("gt.csv", b"\xef\xbb\xbfquery_id,reference_id\nQ0,R1\nQ1,\n"),
        ("gt.json", b'\xef\xbb\xbf{"Q0": ["R1"], "Q1": []}'),
        ("gt.txt", b'\xef\xbb\xbf {"Q0": ["R1"], "Q1": []}'),
        ("gt.txt", b"Q0,R1\nQ1,\n"),
    ],
)
def test_forms_of_a_ground_truth_that_mean_the_same(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_ground_truth(tmp_path / name) == {"Q0": ["R1"], "Q1": []}


def test_several_references_in_one_field_are_named(lists: Path) -> None:
    (lists / "gt_part1.json").write_text('{"Q1": ["R0 R1"]}')
    with pytest.raises(DataError, match="the first is 'R0 R1'; give each reference a line of its own"):
        open_dataset(lists, "part1")


def test_minidisc(minidisc: Path) -> None:
    part2, dev = open_dataset(minidisc, "part2"), open_dataset(minidisc, "dev")
    assert (len(part2.queries), len(dev.queries), len(part2.references)) == (500, 1000, 1500)
    assert part2.training is not None
    assert len(part2.training) == 2530
    assert sum(map(len, part2.ground_truth.values())) == 250
    assert dev.ground_truth == read_ground_truth(minidisc / "gt.csv")
    assert part2.ground_truth == json.loads((minidisc / "gt_part2.json").read_text())
