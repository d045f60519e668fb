"""``copynce train`` where nothing is trained: what there is to train, and with which settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from copynce.cli import main
from copynce.cli.main import BAD_INPUT
from copynce.config import load_config
from copynce.recipes import RECIPES, named_run
from copynce.training import TrainConfig


def test_named_runs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert {line.strip() for line in listed if line.startswith("  ") and line[2] != " "} == set(RECIPES)


def test_printed_settings_make_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["data.train=a b.csv", "out=#1", "optim.clip_norm=inf", "loss.gamma=2"]
    assert main(["train", "descriptor-vits14-112", "--print-config", *settings]) == 0
    first = capsys.readouterr().out
    assert "gamma: 2.0" in first
    (tmp_path / "run.yaml").write_text(first)
    assert main(["train", str(tmp_path / "run.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == first
    assert not list(Path().glob("#1*"))


@pytest.mark.parametrize("name", ["descriptor-vits14-112", "matcher-finetune"])
def test_what_is_missing_stays_missing_in_the_printed_settings(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["out=x", "data.train=list.csv"]
    labelled = ["data.queries=q.csv", "data.references=r.csv", "data.ground_truth=gt.json"]
    given += labelled if name == "matcher-finetune" else []
    file = tmp_path / "run.yaml"
    assert main(["train", name, "--print-config", "seed=7"]) == 0
    file.write_text(capsys.readouterr().out)
    first = file.read_text().splitlines()[0]
    assert set(first.removeprefix("# still to be given: ").split(", ")) == {text.partition("=")[0] for text in given}
    assert "VALUE" not in file.read_text()
    assert load_config(TrainConfig, file, given) == load_config(TrainConfig, named_run(name), [*given, "seed=7"])

    assert main(["train", str(file)]) == BAD_INPUT
    assert "must be given, for example" in capsys.readouterr().err
    assert main(["train", name, "--print-config", "optim.lr=-1"]) == BAD_INPUT
    assert "optim.lr must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--gpus=A100:8", "--seconds=3.0"])
def test_options_of_a_dry_run_start_no_training(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "descriptor", "data.train=x.csv", f"out={tmp_path / 'r'}", option]) == BAD_INPUT
    assert f"{option} is for --dry-run; give --dry-run too" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_help_tells_the_defaults_of_each_objective_and_kind_of_pairs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    listed = " ".join(capsys.readouterr().out.split())
    assert "data.policy (default descriptor; matcher with data.pairs=matcher or mixture)" in listed
    assert "loss.gamma (default 3.0; 1.0 with objective=matcher)" in listed
    assert "loss.bce_weight (default 1.0) With objective=matcher." in listed
    assert "data.queries (required) With data.pairs=supervised or mixture." in listed
