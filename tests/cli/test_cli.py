from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from copynce.cli import BAD_INPUT, main
from copynce.data.synthetic import make_pictures


@pytest.mark.parametrize("command", ["demo", "train", "eval"])
def test_help_states_settings(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "default" in text
    if command == "train":
        assert "optim.lr (default 0.0006)" in text
        assert "Base learning rate" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "out=x", "data.trian=y"], "did you mean data.train"),
        (["train", "none.yaml"], "none.yaml: no such file"),
        (["train", "out=x", "data.train=nowhere"], "nowhere: no such file or folder"),
        (["eval", "nowhere", "dataset=x"], "nowhere: expected a run folder"),
        (["demo", "--data", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_one_sentence(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == BAD_INPUT
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_empty_folder_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["train", f"out={tmp_path / 'run'}", f"data.train={tmp_path / 'empty'}"]) == BAD_INPUT
    assert "empty" in capsys.readouterr().err


def test_train_then_eval_on_minidisc(minidisc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [
        f"out={tmp_path / 'run'}",
        f"data.train={minidisc / 'train.csv'}",
        "data.batch_size=4",
        "model.img_size=32",
        "model.backbone_options={patch_size: 16, embed_dim: 24, depth: 1, num_heads: 2}",
        "model.dim=16",
        "optim.steps=2",
    ]
    assert main(["train", *settings]) == 0
    assert main(["eval", str(tmp_path / "run"), f"dataset={minidisc}", "split=part2"]) == 0
    metrics = json.loads((tmp_path / "run" / "eval-part2" / "metrics.json").read_text())
    assert {"uap", "rp90", "map", "recall_at_1"} <= metrics.keys()
    assert metrics["references"] == 1500
    header, *rows = (tmp_path / "run" / "eval-part2" / "predictions.csv").read_text().splitlines()
    assert header == "query_id,reference_id,score"
    assert len(rows) == 5000
    assert "uAP" in capsys.readouterr().out


@pytest.mark.parametrize("shards", [False, True], ids=["folder", "shards"])
def test_demo_on_own_pictures(tmp_path: Path, shards: bool) -> None:
    made = make_pictures(tmp_path / "mine", 60, seed=3, side_px=(64, 96))
    (tmp_path / "mine" / "notes.jpg").write_text("no picture")
    if shards:
        with tarfile.open(tmp_path / "mine" / "all.tar", "w") as tar:
            for path in (*made, tmp_path / "mine" / "notes.jpg"):
                tar.add(path, path.name)
                path.unlink()
    out = tmp_path / "demo"
    assert main(["demo", "--data", str(tmp_path / "mine"), "--out", str(out), "--steps", "2"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"uap", "rp90", "map", "recall_at_1", "before", "after"} <= metrics.keys()
    report = (out / "report.html").read_text()
    assert "Traced pixels" in report
    assert (out / "loss.png").stat().st_size > 0
