"""``copynce eval`` with what people type: settings that fit or do not, two weights files, a hidden ground truth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from copynce.cli import main
from copynce.cli.main import BAD_INPUT
from copynce.data.synthetic import make_pictures
from copynce.models import build_descriptor, load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and a data set: 4 queries, 8 references, 3 training pictures; split `hidden` has no ground truth."""
    root = tmp_path_factory.mktemp("place")
    names = [path.name for path in make_pictures(root / "ds" / "p", 8, seed=5, side_px=(64, 96))]
    lists = {"references": ("R", 8), "query_a": ("Q", 4), "query_hidden": ("Q", 4), "train": ("T", 3)}
    for file, (letter, count) in lists.items():
        lines = [f"{letter}{i},p/{name}" for i, name in enumerate(names[:count])]
        (root / "ds" / f"{file}.csv").write_text("\n".join(["uuid,path", *lines]))
    (root / "ds" / "gt_a.json").write_text(json.dumps({f"Q{i}": [f"R{i}"] for i in range(3)}))
    options = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    for name in ("a", "b"):
        save_checkpoint(root / f"{name}.safetensors", build_descriptor(img_size=32, dim=16, backbone_options=options))
    return root


def evaluate(place: Path, weights: str, *settings: str, split: str = "a") -> int:
    return main(
        [
            "eval",
            str(place / weights),
            f"dataset={place / 'ds'}",
            f"split={split}",
            "device=cpu",
            "shown=0",
            "repetitions=0",
            *settings,
        ]
    )


def test_two_weights_files_in_one_folder_do_not_share_a_result(place: Path) -> None:
    assert [evaluate(place, f"{name}.safetensors") for name in ("a", "b")] == [0, 0]
    found = {path.parent.name: json.loads(path.read_text()) for path in place.glob("*-eval-a/metrics.json")}
    assert sorted(found) == ["a.safetensors-eval-a", "b.safetensors-eval-a"]
    assert {Path(metrics["model"]).name for metrics in found.values()} == {"a.safetensors", "b.safetensors"}
    assert len({metrics["model_sha256"] for metrics in found.values()}) == 2


def test_settings_reach_the_metrics(place: Path, tmp_path: Path) -> None:
    settings = ["score_normalization=true", "alpha=0.5", "start=0", "end=2", "k=6", "global_candidates=20",
                "precision=fp32", "batch_size=1000000", f"out={tmp_path / 'e'}"]  # fmt: skip
    assert evaluate(place, "a.safetensors", *settings) == 0
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    expected = {"alpha": 0.5, "start": 0, "end": 2, "k": 6, "global_candidates": 20, "predictions": 20, "map": 1.0}
    assert (expected | {"precision": "fp32"}).items() <= metrics.items()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("k=0", "k must be at least 1, got 0"),
        ("batch_size=-3", "batch_size must be at least 1, got -3"),
        ("threads=0", "threads must be at least 1, got 0"),
        ("alpha=.nan", "alpha must be a number, got '.nan'"),
        ("start=-1", "start must be at least 0, got -1"),
        ("end=1", "end must be above start=1, got 1"),
        ("global_candidates=0", "global_candidates must be at least 1, got 0"),
        ("global_candidates=40", "below the 40 predictions of k=10 for 4 queries"),
        ("precision=fp16", "precision"),
        ("score_normalization=true", "score normalisation with end=5 needs as many training pictures, got 3"),
        ("lists=.", "lists is for the DISC21 layout"),
    ],
)
def test_a_wrong_setting_is_a_sentence_and_no_folder(
    setting: str, message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(place, "a.safetensors", f"out={tmp_path / 'e'}", setting) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_out_that_is_a_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(place, "a.safetensors", f"out={place / 'a.safetensors'}") == BAD_INPUT
    assert "must be a folder, or not there yet, but it is a file" in capsys.readouterr().err


def test_a_split_without_ground_truth_gives_predictions(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(place, "a.safetensors", f"out={tmp_path / 'e'}", split="hidden") == 0
    assert "nothing to score" in capsys.readouterr().out
    assert len((tmp_path / "e" / "predictions.csv").read_text().splitlines()) == 1 + 4 * 8


def test_weights_that_are_no_numbers_are_a_sentence(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_checkpoint(place / "a.safetensors")
    torch.nn.init.constant_(model.encoder.cls_token, float("nan"))
    save_checkpoint(tmp_path / "nan.safetensors", model)
    arguments = [f"dataset={place / 'ds'}", "split=a", "device=cpu", f"out={tmp_path / 'e'}"]
    assert main(["eval", str(tmp_path / "nan.safetensors"), *arguments]) == BAD_INPUT
    error = capsys.readouterr().err
    assert "copynce eval: " in error
    assert "nan" in error.lower() or "not finite" in error
