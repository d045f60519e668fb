"""The report of trainings, from logs written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from copynce.cli import main
from copynce.cli.main import BAD_INPUT
from copynce.errors import DataError
from copynce.inspect.run_report import run_report


def a_run(folder: Path, lr: float, lines: int = 4) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"seed: 1\noptim:\n  lr: {lr}\n")
    log = [{"step": 10 * i, "loss": 5 / i, "gradient_norm": 1.0, "eta_seconds": 3.0} for i in range(1, lines + 1)]
    for line in log[::2]:  # the others had no copied patch
        line |= {"affinity_entropy": 0.5}
    events = [{"step": 20, "event": "stopped", "text": "stopped by <SIGTERM>"}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log + events))
    return folder


def test_two_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = a_run(tmp_path / "a" / "run", 0.1), a_run(tmp_path / "b" / "run", 0.2, lines=2)
    report = run_report([first, second])
    tables = {section.title: section.blocks[0] for section in report.sections}
    assert tables["Settings"].rows == [["optim.lr", "0.1", "0.2"]]
    assert tables["Last values"].rows[0] == ["total loss", "1.25", "2.5"]
    assert tables["What happened"].rows[0] == ["a/run", "20", "stopped", "stopped by <SIGTERM>"]
    assert main(["report", str(first), str(second), "--out", str(tmp_path / "new" / "r.html")]) == 0
    assert "&lt;SIGTERM&gt;" in (tmp_path / "new" / "r.html").read_text()


def test_a_report_is_no_other_file_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = a_run(tmp_path / "run", 0.1) / "config.yaml"
    before = settings.read_bytes()
    assert main(["report", str(settings.parent), "--out", str(settings)]) == BAD_INPUT
    assert "--out must be a name that ends in .html or .htm, got" in capsys.readouterr().err
    assert settings.read_bytes() == before


def test_one_run_shows_all_settings(tmp_path: Path) -> None:
    report = run_report([a_run(tmp_path / "run", 0.1, lines=1)])
    shown = {section.title: section.blocks[0] for section in report.sections}
    assert list(shown)[:3] == ["Losses", "Patches", "Beside them"]
    assert ["entropy, copied patches", "0.5"] in shown["Last values"].rows
    assert {row[0] for row in shown["Settings"].rows} == {"seed", "optim.lr"}


def test_evaluations_while_training_are_curves(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / name, 0.1) for name in ("a", "b")]
    assert "Evaluations" not in [section.title for section in run_report(runs).sections]
    with (runs[0] / "log.jsonl").open("a") as log:
        for step in (20, 40):
            print(json.dumps({"step": step, "event": "evaluation", "text": "", "uap": step / 100}), file=log)
    assert run_report(runs).sections[0].title == "Evaluations"


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no training's folder, it has no log\.jsonl"):
        run_report([tmp_path])
    run = a_run(tmp_path / "run", 0.1, lines=0)
    with pytest.raises(DataError, match="holds no line with numbers yet"):
        run_report([run])
    with pytest.raises(DataError, match="the same run is given twice"):
        run_report([a_run(tmp_path / "other", 0.1), tmp_path / "run" / ".." / "other"])
