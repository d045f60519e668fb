"""``copynce candidates`` on a few pictures: from files to the input of ``copynce match``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from copynce.cli import main
from copynce.cli.main import BAD_INPUT
from copynce.data.synthetic import make_pictures
from copynce.evaluation import read_candidates, read_predictions
from copynce.models import build_descriptor, build_matcher, save_checkpoint

OPTIONS = {"patch_size": 8, "embed_dim": 24, "num_heads": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A descriptor, a matcher, 2 queries that are pictures 0 and 1 of 7 references, of which the last is broken."""
    root = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    descriptor = build_descriptor(img_size=32, dim=16, backbone_options={**OPTIONS, "depth": 1})
    save_checkpoint(root / "d.safetensors", descriptor)
    matcher = build_matcher(img_size=32, encoder_blocks=1, fusion_blocks=1, backbone_options=OPTIONS)
    save_checkpoint(root / "m.safetensors", matcher)
    names = [path.name for path in make_pictures(root / "p", 6, seed=5, side_px=(40, 64))]
    (root / "p" / "broken.jpg").write_text("nothing")
    for file, letter, files in (("q.csv", "Q", names[:2]), ("r.csv", "R", [*names, "broken.jpg"])):
        lines = [f"{letter}{i},p/{name}" for i, name in enumerate(files)]
        (root / file).write_text("\n".join(["uuid,path", *lines]))
    return root


def candidates(place: Path, out: Path, *settings: str, model: str = "d") -> int:
    lists = [f"queries={place / 'q.csv'}", f"references={place / 'r.csv'}"]
    arguments = [str(place / f"{model}.safetensors"), *lists, f"out={out}", "device=cpu", "precision=fp32"]
    return main(["candidates", *arguments, *settings])


def test_candidates_are_what_match_takes(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert candidates(place, tmp_path / "c", "k=4") == 0
    said = capsys.readouterr()
    assert "8 candidate pairs of 2 queries and 6 references, described in fp32" in said.out
    assert "1 broken pictures were skipped" in said.err
    found = read_predictions(tmp_path / "c" / "candidates.csv")
    assert found.queries.tolist() == ["Q0"] * 4 + ["Q1"] * 4
    assert [found.references[0], found.references[4]] == ["R0", "R1"]  # the same pictures
    released = json.loads((tmp_path / "c" / "candidates.json").read_text())
    assert [[query, [reference for reference, _ in list_]] for query, list_ in released] == [
        [query, found.references[found.queries == query].tolist()] for query in ("Q0", "Q1")
    ]
    first = (tmp_path / "c" / "candidates.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("copynce.models.Descriptor.forward", None)  # calling it would fail
        assert candidates(place, tmp_path / "c", "k=4") == 0
    assert (tmp_path / "c" / "candidates.json").read_bytes() == first

    lists = [f"queries={place / 'q.csv'}", f"references={place / 'r.csv'}", f"out={tmp_path / 'm'}", "device=cpu"]
    assert main(["match", str(place / "m.safetensors"), str(tmp_path / "c" / "candidates.json"), *lists]) == 0
    assert len(read_predictions(tmp_path / "m" / "predictions.csv").scores) == 8


def test_modes_boxes_and_duplicates(place: Path, tmp_path: Path) -> None:
    assert candidates(place, tmp_path / "c", "mode=1:N", "duplicates=keep", "box=meant") == 0
    released = json.loads((tmp_path / "c" / "candidates.json").read_text())
    assert [len(list_) for _, list_ in released] == [20 * 6 + 25 * 4] * 2  # 6 references are fewer than 10, not than 4
    assert len(read_candidates(tmp_path / "c" / "candidates.csv").queries) == 2 * 6


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        (["mode=N:M"], "d", "mode must be one of M:N, 1:N, got 'N:M'"),
        (["k=0"], "d", "k must be at least 1, got 0"),
        (["dataset=x"], "d", "give the pictures as queries= and references=, or as dataset= and split="),
        ([], "m", "m.safetensors"),
    ],
)
def test_what_does_not_fit(
    settings: list[str], model: str, message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert candidates(place, tmp_path / "c", *settings, model=model) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
