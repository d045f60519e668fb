from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from copynce.cli import main
from copynce.cli.console import print_metrics
from copynce.cli.main import BAD_INPUT
from copynce.data.synthetic import make_pictures


@pytest.mark.parametrize("command", ["demo", "train", "eval", "extract", "knn", "normalize", "convert", "index"])
def test_help_states_settings(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "default" in text
    listed = text[text.find("settings:\n") :].partition("\n\n")[0].splitlines()[1:] if command != "demo" else []
    bare = [line for line, below in itertools.pairwise([*listed, ""]) if line[2] != " " and not below.startswith("   ")]
    assert bare == []  # a sentence under every name
    if command == "train":
        assert "optim.lr (default 0.0006)" in text
        assert "Base learning rate" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "out=x", "data.trian=y"], "did you mean data.train"),
        (["train", "none.yaml"], "none.yaml: no such file"),
        (["train", "descripter", "out=x"], "neither a file of settings nor a named run; did you mean descriptor"),
        (["train", "descriptor-vits14-112", "out=x", "data.train=nowhere"], "nowhere: no such file or folder"),
        (["train", "out=x", "data.train=nowhere"], "nowhere: no such file or folder"),
        (["eval", "nowhere", "dataset=x"], "nowhere: expected a run folder"),
        (["demo", "--data", "nowhere"], "nowhere"),
        (["convert", "nowhere", "out"], "nowhere: there is no such file or folder"),
        (["convert", "nowhere", "out.txt"], "out.txt: expected a name that ends in .safetensors"),
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


SMALL = ["data.batch_size=4", "data.threads=1", "model.img_size=32", "model.dim=16", "optim.steps=1", "threads=1"]
SMALL += [
    "model.backbone_options={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
    "tensorboard=false",
    "device=cpu",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    make_pictures(folder / "pictures #1", 12, seed=5, side_px=(64, 96))
    return folder / "pictures #1"


@pytest.mark.parametrize(
    "setting",
    [
        "optim.lr=1,5",
        "optim.betas=[2,3]",
        "seed=-1",
        "data.policy=nope",
        "data.pairs=matcher",
        "data.max_megapixels=.inf",
        "loss.log_scale=.nan",
        "model.img_size=33",
        "model.backbone=resnet50",
        "model.backbone_options.act_layer=nope",
        "model.tokens_block=7",
        "data.batch_size=13",
        "data.neighbours=nowhere.npy",
        "optim.steps=9999999999999999999",
        "out=",
    ],
)
def test_a_wrong_setting_leaves_no_run_behind(
    setting: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "out=run", f"data.train={pictures}", *SMALL, setting]) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("copynce train: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_pictures_that_are_all_broken_are_one_sentence(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = "data.max_megapixels=0.00001"
    assert main(["train", f"out={tmp_path / 'run'}", f"data.train={pictures}", *SMALL, few]) == BAD_INPUT
    assert "more than the limit of 10" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting", ["optim.lr=1000", "loss.gamma=inf", "loss.temperature=1e30", "loss.info_nce_weight=1e308"]
)
def test_an_extreme_setting_ends_well_or_with_the_status_of_no_number(
    setting: str, pictures: Path, tmp_path: Path
) -> None:
    assert main(["train", f"out={tmp_path / 'run'}", f"data.train={pictures}", *SMALL, setting]) in (0, 3)


def test_runs_whose_names_differ_only_behind_a_hash_are_two(pictures: Path, tmp_path: Path) -> None:
    for name in ("ablation #1 with", "ablation #2 without", "2024_11_28", "[2024] a: b"):
        assert main(["train", f"out={tmp_path / name}", f"data.train={pictures}", *SMALL, "optim.steps=0"]) == 0
    assert len(list(tmp_path.glob("*/checkpoints"))) == 4
    folder = tmp_path / "ablation #1 with"
    assert main(["train", str(folder / "config.yaml")]) == 0  # what it wrote is what it was given


def test_a_full_disk_names_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(config: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("copynce.training.train", full)
    assert main(["train", f"out={tmp_path / 'run'}", "data.train=x"]) == BAD_INPUT
    assert capsys.readouterr().err == f"copynce train: {tmp_path / 'run'}: No space left on device\n"


def test_memory_that_is_not_there_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(config: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("copynce.training.train", large)
    assert main(["train", f"out={tmp_path / 'run'}", "data.train=x"]) == BAD_INPUT
    assert capsys.readouterr().err.startswith("copynce train: out of memory (")


@pytest.mark.parametrize("arguments", [["--steps", "-1"], ["--steps", "1e3"], ["--seed", "-1"], ["--seed", "9" * 30]])
def test_wrong_arguments_of_the_demo_are_refused_before_it_begins(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--out", str(tmp_path / "demo"), *arguments])
    assert stop.value.code == BAD_INPUT
    assert "expected a whole number of at least 0" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_broken_note_of_a_demo_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo.json").write_text("{")
    assert main(["demo", "--out", str(tmp_path)]) == BAD_INPUT
    assert "demo.json: not the settings of a demo" in capsys.readouterr().err


def test_metrics_are_whole_on_a_narrow_screen(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"uap": 0.12345, "rp90": 0.5, "map": None, "recall_at_1": 1.0, "uap_sn": 0.25, "rp90_sn": 0.75}
    print_metrics("held-out", {"before": values, "after": {**values, "map": 0.125}})
    name = "runs/" + "a long name/" * 9 + "model.safetensors"
    print_metrics("a set", {name: values})
    lines = capsys.readouterr().out.splitlines()
    assert name in lines
    assert all(len(line) <= 60 for line in lines if line != name)
    assert lines[1].split() == ["before", "after"]
    assert lines[2].split() == ["uAP", "0.1235", "0.1235"]
    assert lines[4].split() == ["mAP", "-", "0.1250"]
    assert sum("RP90 + SN" in line for line in lines) == 2


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    here: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, *arguments], check=False, env=here, cwd=root, capture_output=True, timeout=300
    )


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["nonsense"], ["train", "--nonsense"], []])
def test_help_and_wrong_arguments_load_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom copynce.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'numba', 'nvidia', 'timm', 'faiss'} & sys.modules.keys()), file=sys.stderr)"
    )
    assert run("-c", code).stderr.splitlines()[-1] == b"[]"


def test_exit_statuses_stand_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for status in ("0 ", "2 ", "3 ", "75 ", "130 "):
        assert f"\n  {status}" in text


def test_a_poor_terminal_shows_everything(pictures: Path, tmp_path: Path) -> None:
    """ASCII only, 60 columns, no colours, no terminal: names that it lacks are escaped, and nothing breaks."""
    poor = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "60", "NO_COLOR": "1", "TERM": "dumb"}
    out = tmp_path / ("Bücher " + "x" * 60)
    trained = run("-m", "copynce.cli", "train", f"out={out}", f"data.train={pictures}", *SMALL, "log_every=1", **poor)
    assert trained.returncode == 0, trained.stderr
    line = trained.stdout.decode("ascii").splitlines()[-1]
    assert line == f"checkpoint: {out}/checkpoints/step-00000001".encode("ascii", "backslashreplace").decode()
    assert b"step 1/1  loss" in trained.stderr
    assert b"\x1b" not in trained.stderr + trained.stdout
    refused = run("-m", "copynce.cli", "train", "data.train=Bücher\r", "out=x", **poor)
    assert refused.returncode == BAD_INPUT
    assert refused.stderr.startswith(b"copynce train: B\\xfccher\\r: no such file")
    helped = run("-m", "copynce.cli", "train", "--help", **poor)
    assert helped.returncode == 0
    assert max(map(len, helped.stdout.decode("ascii").splitlines())) <= 61
