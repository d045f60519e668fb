"""Neighbours against the full sort, the forms of the table, and a mining that was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from copynce.cli import main
from copynce.cli.main import BAD_INPUT
from copynce.data import Manifest, read_neighbours
from copynce.errors import ConfigError, DataError
from copynce.retrieval import parts as parts_module
from copynce.retrieval import reference
from copynce.retrieval.features import FeatureFile, Features, read_features, write_features
from copynce.retrieval.mining import Miner, mine, read_classes


def found(values: np.ndarray, letter: str = "T", **more: Any) -> FeatureFile:
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    return FeatureFile(Features([f"{letter}{i}" for i in range(len(values))], unit.astype(np.float32)), **more)


def random(rows: int, columns: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns))


#: Every vector three times: a picture's copies stand before it as often as not.
COPIES = random(40)[np.arange(120) % 40]


@pytest.mark.parametrize("k", [1, 7, 119, 500])
@pytest.mark.parametrize("classes", [0, 3, 120])
def test_neighbours_are_those_of_the_full_sort(k: int, classes: int) -> None:
    features = found(COPIES)
    kind = np.arange(120) % classes if classes else np.arange(120)
    names = {f"T{i}": str(kind[i]) for i in range(0, 120, 1)} if classes else None
    mined = Miner(features, features, k, classes=names)(slice(10, 90))
    allowed = kind[:, None] != kind[None] if classes else ~np.eye(120, dtype=bool)
    expected = reference.nearest(features.features.values, features.features.values, k, allowed)[10:90]  # type: ignore[arg-type]
    np.testing.assert_array_equal(mined.indices[:, : expected.shape[1]], expected)
    assert (mined.indices[:, expected.shape[1] :] == -1).all()
    assert ((mined.indices == -1) == np.isinf(mined.scores)).all()


def test_without_a_class_only_itself_is_left_out(tmp_path: Path) -> None:
    features = found(COPIES)
    some = Miner(features, features, 5, classes={"T0": "a", "T40": "a"})(slice(0, 3)).indices
    none = Miner(features, features, 5)(slice(0, 3)).indices
    assert 40 not in some[0]
    assert 40 in none[0]
    np.testing.assert_array_equal(some[1:], none[1:])
    (tmp_path / "c.csv").write_text("uuid,class\nT0,a\nT0,b\n")
    with pytest.raises(DataError, match=r"c\.csv, line 3: 'T0' is of class 'b', but 'a' before"):
        read_classes(tmp_path / "c.csv")


def test_the_released_neighbours(oracle: Path) -> None:
    """Its cosines are of float16, rounded once more: compared by value (PROTOCOLS 5)."""
    with np.load(oracle / "features.npz") as file:
        values, released = file["reference"].astype(np.float64), file["knn_reference_cosines_fp16"]
        theirs = file["knn_reference_reference"]
    features = found(values)
    mined = Miner(features, features, 128)(slice(0, 400))
    assert (theirs[:, 0] == np.arange(400)).all()
    # two float16 vectors of 48 numbers and their float16 product
    np.testing.assert_allclose(mined.scores, released[:, 1:].astype(np.float32), atol=4e-3)
    shared = [len(set(row).intersection(other)) for row, other in zip(mined.indices, theirs[:, 1:], strict=True)]
    assert np.mean(shared) > 127


@pytest.fixture
def pictures() -> FeatureFile:
    """Six of eight pictures; the second and the last are broken."""
    return found(random(6), positions=np.array([0, 2, 3, 4, 5, 6]), pictures=8)


def test_every_form_says_the_same(pictures: FeatureFile, tmp_path: Path) -> None:
    names = ["T0", "x", "T1", "T2", "T3", "T4", "T5", "y"]
    manifest = Manifest(names, [Path(name) for name in names], tmp_path)
    indices = Miner(pictures, pictures, 3)(slice(0, 6)).indices
    for form in (".npy", ".json", ".pth"):
        mine(pictures, pictures, tmp_path / f"knn{form}", k=3)
        read = read_neighbours(tmp_path / f"knn{form}", manifest, columns=3)
        for row, place in enumerate((0, 2, 3, 4, 5, 6)):
            assert [names[i] for i in read.of(place)] == [f"T{i}" for i in indices[row]], form
        assert [len(read.of(place)) for place in (1, 7)] == [0, 0]
    table = torch.load(tmp_path / "knn.pth", weights_only=True)
    assert (table.shape, table.dtype) == ((8, 4), torch.int64)
    assert table[:, 0].tolist() == list(range(8))
    assert np.load(tmp_path / "knn.npy").dtype == np.int32
    mine(pictures, pictures, tmp_path / "knn.csv", k=3)
    lines = (tmp_path / "knn.csv").read_text().splitlines()
    assert lines[0] == "query_id,reference_id,score"
    assert [line.split(",")[:2] for line in lines[1:4]] == [["T0", f"T{i}"] for i in indices[0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["knn.csv", "knn.json", "knn.npy", "knn.pth"]


def test_between_two_sets_the_released_table_has_a_column_to_drop(tmp_path: Path) -> None:
    query, references = found(random(4, seed=1), "Q"), found(random(9, seed=2), "R")
    mine(query, references, tmp_path / "knn.pth", k=3)
    table = torch.load(tmp_path / "knn.pth", weights_only=True).numpy()
    np.testing.assert_array_equal(table, Miner(query, references, 4)(slice(0, 4)).indices)


def test_a_released_table_of_another_list_is_named(tmp_path: Path) -> None:
    names = [f"T{i}" for i in range(5)]
    manifest = Manifest(names, [Path(name) for name in names], tmp_path)
    path = tmp_path / "knn.pth"
    for content, message in (
        (torch.zeros(4, 3, dtype=torch.int64), r"knn\.pth: expected signed integers \[5, K\].* got int64 \[4, 3\]"),
        (torch.full((5, 3), 5), r"knn\.pth, row 0: expected indices of the 5 pictures or -1, got 5"),
        (torch.zeros(5, 3), r"knn\.pth: expected an integer tensor \[N, K\].*got float32 \[5, 3\]"),
        ({"a": np.zeros((5, 3), int)}, r"knn\.pth: a pickle with more than tensors"),
    ):
        torch.save(content, path)
        with pytest.raises(DataError, match=message):
            read_neighbours(path, manifest, columns=1)


def test_a_killed_mining_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "_PART", 25)
    features = found(COPIES)
    mine(features, features, tmp_path / "whole.npy", k=4)
    done: list[int] = []

    def kill(count: int) -> None:
        done.append(count)
        if count == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mine(features, features, tmp_path / "knn.npy", k=4, progress=kill)
    parts = tmp_path / "knn.npy.parts"
    first = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npy")}
    assert sorted(first) == ["000000.npy", "000001.npy"]
    with pytest.raises(KeyboardInterrupt):
        mine(features, features, tmp_path / "knn.npy", k=4, progress=kill)  # goes on: at 50 again
    assert {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npy")} == first
    mine(features, features, tmp_path / "knn.npy", k=4, progress=done.append)
    assert done == [25, 50, 50, 50, 50, 75, 100, 120]
    np.testing.assert_array_equal(np.load(tmp_path / "knn.npy"), np.load(tmp_path / "whole.npy"))
    assert not parts.exists()
    with pytest.raises(KeyboardInterrupt):
        mine(features, features, tmp_path / "knn.npy", k=4, progress=kill)
    mine(found(COPIES[::-1]), features, tmp_path / "knn.npy", k=4)  # parts of other features are no use
    assert not np.array_equal(np.load(tmp_path / "knn.npy"), np.load(tmp_path / "whole.npy"))


def test_damaged_parts_are_found_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "_PART", 25)
    features = found(COPIES)
    mine(features, features, tmp_path / "whole.npy", k=4)

    def kill(count: int) -> None:
        if count == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mine(features, features, tmp_path / "knn.npy", k=4, progress=kill)
    parts = tmp_path / "knn.npy.parts"
    kept = (parts / "000003.npy").read_bytes()
    for name, content in (("000000.npy", b""), ("000001.npy", (parts / "000001.npy").read_bytes()[:200])):
        (parts / name).write_bytes(content)
    np.save(parts / "000002.npy", np.zeros((25, 3)))
    with pytest.raises(KeyboardInterrupt):
        mine(features, features, tmp_path / "knn.npy", k=4, progress=kill)
    assert [len(np.load(parts / f"{i:06d}.npy")) for i in range(4)] == [25] * 4
    assert (parts / "000003.npy").read_bytes() == kept
    mine(features, features, tmp_path / "knn.npy", k=4)
    np.testing.assert_array_equal(np.load(tmp_path / "knn.npy"), np.load(tmp_path / "whole.npy"))
    with pytest.raises(KeyboardInterrupt):
        mine(features, features, tmp_path / "knn.npy", k=4, progress=kill)
    (parts / "made_from.json").write_bytes(b"{\xff")
    mine(features, features, tmp_path / "knn.npy", k=4)
    np.testing.assert_array_equal(np.load(tmp_path / "knn.npy"), np.load(tmp_path / "whole.npy"))


def test_features_that_do_not_fit_are_named() -> None:
    features = found(COPIES, source="a", made_from={"model": "0" * 64, "size": 224})
    for other, message in (
        (found(random(5, 7), source="b"), "a has 12 columns and b 7; features must come from one model"),
        (found(COPIES, source="b", made_from={"model": "1" * 64, "size": 224}), r"another model \(000000000000\.\.\."),
        (found(COPIES, source="b", made_from={"model": "0" * 64, "size": 112}), r"another input size \(224 and 112\)"),
        (FeatureFile(Features(["a"], COPIES[:2], views=2), source="b"), "b: 2 views of each picture; expected one"),
        (FeatureFile(Features([], np.empty((0, 0))), source="b"), "b: no features; every picture is broken"),
    ):
        with pytest.raises(DataError, match=message):
            Miner(features, other, 3)
    with pytest.raises(ConfigError, match=r"--out must end in one of \.npy, \.json, \.csv, \.pth, got x\.txt"):
        mine(features, features, "x.txt")


def test_the_command_describes_pictures_first(
    weights: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "knn.json"
    arguments = [str(place / "query_a.csv"), "--out", str(out), f"references={place / 'references.csv'}", "k=2"]
    assert main(["knn", *arguments, f"model={weights}", "device=cpu", "precision=fp32"]) == 0
    assert "neighbours of 6 pictures among 9" in capsys.readouterr().out
    assert {query: names[0] for query, names in json.loads(out.read_text()).items()} == {
        f"Q{i}": f"R{i}" for i in (0, 1, 3, 4, 5, 6)
    }
    folder = tmp_path / "knn.json.features"
    assert sorted(read_features(folder, side="query").features.uuids) == [f"Q{i}" for i in (0, 1, 3, 4, 5, 6)]
    # The same from the features.
    again = [str(folder), "--out", str(tmp_path / "2.json"), "side=query", "references_side=reference", "k=2"]
    assert main(["knn", *again, "device=cpu"]) == 0
    assert (tmp_path / "2.json").read_text() == out.read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["k=0"], "k must be at least 1"),
        (["references_ids=x"], "references_ids must be left out without references"),
        (["model=x", "side=query"], "side is of features, but with model=x pictures are given"),
        (["side=none_of_them"], "no features called 'none_of_them'; there are query"),
        (["classes=nowhere.csv"], "nowhere.csv"),
        (["classes=CLASSES"], "none of its 1 ids is among the 2 of"),
    ],
)
def test_wrong_settings_are_sentences(
    settings: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_features(tmp_path / "f" / "query-0000.safetensors", Features(["a", "b"], np.eye(2, dtype=np.float32)), {})
    (tmp_path / "f" / "c.csv").write_text("uuid,class\nT0,a\n")
    settings = [text.replace("CLASSES", str(tmp_path / "f" / "c.csv")) for text in settings]
    assert main(["knn", str(tmp_path / "f"), "--out", str(tmp_path / "o.npy"), "device=cpu", *settings]) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_rows_of_zeros_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "vz.npy", np.array([[1.0, 0.0], [0.0, 0.0]]))
    (tmp_path / "ids.txt").write_text("a\nb\n")
    arguments = [str(tmp_path / "vz.npy"), "--out", str(tmp_path / "o.json"), f"ids={tmp_path / 'ids.txt'}"]
    assert main(["knn", *arguments, "k=1", "device=cpu"]) == BAD_INPUT
    assert "vz.npy: row 1, of 'b', is zero; leave out what has no descriptor" in capsys.readouterr().err
