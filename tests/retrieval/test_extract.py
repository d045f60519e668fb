"""Extraction: the descriptors that belong to its number, several processes, views, a folder as a command leaves it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from copynce.cli import main
from copynce.cli.main import BAD_INPUT
from copynce.data import Quarantine, read_manifest
from copynce.errors import DataError
from copynce.models import Descriptor
from copynce.retrieval import extract as extract_module
from copynce.retrieval.crops import lce_reference, one_of_one, one_of_two
from copynce.retrieval.extract import WAY, FeatureStore, Views, extract
from copynce.retrieval.features import read_features

GOLDEN = Path(__file__).with_name("golden_descriptors.json")


def golden_pictures(folder: Path, jpeg: str) -> None:
    """Pictures that are enlarged, shrunk, distorted, grey, with alpha, and a JPEG."""

    def noise(seed: int, width: int, height: int) -> Image.Image:
        dots = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        return Image.fromarray(dots).resize((width, height), Image.Resampling.BICUBIC)

    made = [noise(0, 20, 24), noise(1, 400, 90), noise(2, 70, 50).convert("L"), noise(3, 64, 64).convert("RGBA")]
    made[-1].putalpha(Image.linear_gradient("L").resize((64, 64)))
    for i, picture in enumerate(made):
        picture.save(folder / f"{i}.png")
    (folder / "9.jpg").write_bytes(base64.b64decode(jpeg))


@pytest.mark.numeric
def test_descriptors_are_those_of_this_number(descriptor: Descriptor, tmp_path: Path) -> None:
    """Kept features serve as long as `WAY` is the same. Where this fails on purpose: WAY + 1, and new numbers here."""
    golden = json.loads(GOLDEN.read_text())
    golden_pictures(tmp_path, golden["jpeg"])
    found = extract(descriptor, read_manifest(tmp_path), precision="fp32")
    assert golden["way"] == WAY
    # float32 sums in any order stay below 1e-5; one grey level in a few pixels, as decoders of JPEG may differ, 1e-3
    np.testing.assert_allclose(np.asarray(found.values)[:4], golden["descriptors"][:4], atol=5e-5)
    np.testing.assert_allclose(np.asarray(found.values)[4:], golden["descriptors"][4:], atol=2e-3)


@dataclass
class OneOfTwo:
    """One of two processes of which the other is not there, and what it would hear from rank 0."""

    rank: int
    heard: str = "fp32"
    size: int = 2

    def broadcast_object(self, value: object) -> object:
        return value if self.rank == 0 else self.heard

    @contextmanager
    def together(self) -> Iterator[None]:
        yield


def test_two_processes_leave_what_one_does(
    descriptor: Descriptor, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract_module, "_PART", 2)
    monkeypatch.setattr(extract_module, "_LOOK", 0.0)
    manifest = read_manifest(place / "query_a.csv")

    def run(folder: str, rank: int | None = None, done: list[int] | None = None) -> tuple[np.ndarray, Quarantine]:
        quarantine = Quarantine()
        found = extract(
            descriptor,
            manifest,
            keep=FeatureStore(tmp_path / folder, "query", "m"),
            batch_size=3,
            precision="fp32" if rank is None else "auto",
            quarantine=quarantine,
            processes=None if rank is None else OneOfTwo(rank),
            progress=None if done is None else done.append,
        )
        return np.asarray(found.values), quarantine

    alone, broken = run("one")
    with pytest.raises(DataError, match=r"query-0000\.safetensors: written by another process, but not to be seen"):
        run("two", 1)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [f"query-000{i}.safetensors" for i in (1, 3)]
    monkeypatch.setattr(extract_module, "bf16_in_hardware", lambda device: False)
    done: list[int] = []
    values, again = run("two", 0, done)
    assert done[0] > 3  # the pictures that the other process had done
    assert done[-1] == len(manifest)
    np.testing.assert_allclose(values, alone, atol=1e-6)
    assert [reason for _, reason in again.entries()] == [reason for _, reason in broken.entries()] != []
    assert run("two", 1)[0].shape == alone.shape


def test_views_are_rows_of_their_picture(descriptor: Descriptor, place: Path, tmp_path: Path) -> None:
    manifest = read_manifest(place / "query_a.csv")
    whole = extract(descriptor, manifest, precision="fp32")
    views = extract(
        descriptor,
        manifest,
        precision="fp32",
        batch_size=20,
        views=Views("lce", lce_reference),
        keep=FeatureStore(tmp_path, "q", "m"),
    )
    assert (views.views, list(views.uuids), views.values.shape) == (10, list(whole.uuids), (60, 16))
    np.testing.assert_allclose(np.asarray(views.values)[::10], whole.values, atol=1e-5)
    kept = read_features(tmp_path)
    assert (kept.features.views, kept.made_from["views"]) == (10, "lce")
    assert [v.count for v in (Views("a", one_of_one), Views("b", one_of_two))] == [1, 10]


def command(weights: Path, place: Path, out: Path, *settings: str) -> int:
    return main(["extract", str(weights), str(place), "--out", str(out), "device=cpu", "precision=fp32", *settings])


def test_the_command_leaves_every_role_and_hdf5(
    weights: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "f"
    assert command(weights, place, out, "split=a", f"hdf5={tmp_path / 'x.h5'}") == 0
    printed = capsys.readouterr()
    assert "query: 6 descriptors of 16 numbers, computed in fp32" in printed.out
    assert "1 broken pictures were skipped" in printed.err
    assert json.loads((out / "skipped.jsonl").read_text())["path"].endswith("broken.png")
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert command(weights, place, out, "split=a") == 0  # nothing is made again
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == before
    with pytest.raises(DataError, match=r"several features .* choose side=query or side=reference or side=training"):
        read_features(out)
    query = read_features(out, side="query")
    assert query.pictures == 7
    assert query.positions is not None
    assert query.positions.tolist() == [0, 1, 3, 4, 5, 6]
    assert [uuid for uuid, _ in query.broken] == ["Q2"]
    for side in ("query", "reference"):
        other = read_features(tmp_path / "x.h5", side=side).features
        here = read_features(out, side=side).features
        assert list(other.uuids) == list(here.uuids)
        np.testing.assert_array_equal(other.values, here.values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["split=b"], "no split 'b'"),
        (["role=query"], "role must be left out without split"),
        (["hdf5=x"], "hdf5 must be left out without split"),
        (["split=a", "root=x"], "root is for one CSV"),
        (["split=a", "hdf5=x", "role=query"], "role must be all where hdf5 is written"),
        (["batch_size=0"], "batch_size must be at least 1"),
        (["threads=0"], "threads must be from 1 to 1024"),
    ],
)
def test_wrong_settings_are_sentences(
    settings: list[str], message: str, weights: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(weights, place, tmp_path / "f", *settings) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "f").exists()


def test_nothing_is_left_among_other_files(weights: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(weights, place / "p", place / "p") == BAD_INPUT
    assert "the folder holds other files, such as 0.png, and no features" in capsys.readouterr().err
    assert not list((place / "p").glob("*.safetensors"))
