"""``copynce measure``: files in, table, metrics and curves out; what does not fit is a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from copynce.cli import main
from copynce.cli.main import BAD_INPUT


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "a.csv").write_text("Q0,R0,0.9\nQ0,R1,0.3\nQ1,R3,0.8\nQ1,R1,0.7\n")
    (tmp_path / "b.json").write_text(json.dumps([["Q0", [["R1", 0.95]]], ["Q2", [["R2", 0.85]]]]))
    (tmp_path / "gt.csv").write_text("Q0,R0\nQ1,R1\nQ2,R2\nQ3,\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "a.csv", "gt.csv", "repetitions=20"]) == 0
    metrics = json.loads((place / "a.csv-measured" / "metrics.json").read_text())
    assert metrics["uap"] == pytest.approx((1 + 2 / 3) / 3)
    assert metrics["recall_at_1"] == pytest.approx(1 / 3)
    assert list(metrics["intervals"]) == ["uap", "rp90", "map", "recall_at_1", "recall_at_10"]
    with Image.open(place / "a.csv-measured" / "precision_recall.png") as picture:
        assert picture.width > 400
    printed = capsys.readouterr().out
    assert "55.6 [" in printed
    assert "a.csv has precision 0.9 from score 0.9; 4 predictions, 3 true pairs" in printed


def test_ids_that_do_not_fit_are_one_sentence(
    place: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    (place / "more.csv").write_text("Q0,R0,0.9\nQ9,R1,0.3\n")
    assert main(["measure", "more.csv", "gt.csv", "repetitions=0"]) == 0
    error = capsys.readouterr().err
    assert error.count("1 of 2 predicted queries are not in the ground truth") == len(error.splitlines()) == 1
    assert not recwarn.list


def test_each_file_is_a_row(place: Path) -> None:
    assert main(["measure", "a.csv", "b.json", "gt.csv", "repetitions=0", "out=o", "k=1"]) == 0
    metrics = json.loads((place / "o" / "metrics.json").read_text())
    assert [(row["name"], row["predictions"]) for row in metrics["rows"]] == [("a.csv", 2), ("b.json", 2)]
    assert (place / "o" / "table.md").read_text().splitlines()[2:] == [
        "| a.csv | 33.3 | 33.3 | 33.3 | 33.3 | 33.3 |",
        "| b.json | 16.7 | 0.0 | 33.3 | 33.3 | 33.3 |",
    ]


def test_merged_and_capped(place: Path) -> None:
    settings = ["out=o", "global_candidates=4", "ap=trapezoid", "repetitions=0"]
    assert main(["measure", "a.csv", "b.json", "--merge", "gt.csv", *settings]) == 0
    metrics = json.loads((place / "o" / "metrics.json").read_text())
    # R1 of Q0 has 0.95 now; then R0 of Q0, R2 of Q2, R3 of Q1.
    assert metrics["uap"] == pytest.approx(((0 + 1 / 2) / 2 + (1 / 2 + 2 / 3) / 2) / 3)
    assert (metrics["predictions"], metrics["ap"], metrics["merge"]) == (4, "trapezoid", True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.csv"], "give the ground truth after the predictions"),
        (["a.csv", "gt.csv", "k=0"], "k must be at least 1, got 0"),
        (["a.csv", "gt.csv", "kk=1"], "kk"),
        (["a.csv", "gt.csv", "out=a.csv"], "must be a folder, or not there yet, but it is a file"),
        (["twice.csv", "gt.csv"], "twice.csv, line 2: query 'Q0' with reference 'R0' is given twice, first on line 1"),
        (["nan.csv", "gt.csv"], "nan.csv, line 1: the score must be finite, got nan"),
        (["a.csv", "other.csv"], "a.csv against other.csv: no predicted query is in the ground truth"),
        (["a.csv", "none.csv"], "none.csv: no such file"),
    ],
)
def test_what_does_not_fit(arguments: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "twice.csv").write_text("Q0,R0,0.9\nQ0,R0,0.8\n")
    (place / "nan.csv").write_text("Q0,R0,nan\n")
    (place / "other.csv").write_text("Q7,R0\n")
    before = sorted(place.iterdir())
    assert main(["measure", *arguments]) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert sorted(place.iterdir()) == before
