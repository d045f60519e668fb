"""The challenge's CSV: nothing is lost, a broken file names its line, a crash leaves the old file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from copynce.errors import DataError
from copynce.evaluation.metrics import score_predictions
from copynce.evaluation.predictions import ranked_predictions, read_predictions, write_predictions


def test_round_trip_keeps_every_digit(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).normal(size=50).astype(np.float32).reshape(5, 10)
    predictions = ranked_predictions(
        [f"q,{i}" for i in range(5)], [f'r"{i}\n' for i in range(20)], scores, np.tile(np.arange(10), (5, 1))
    )
    write_predictions(tmp_path / "predictions.csv", predictions)
    again = read_predictions(tmp_path / "predictions.csv")
    assert again.queries.tolist() == predictions.queries.tolist()
    assert again.references.tolist() == predictions.references.tolist()
    assert again.scores.tobytes() == scores.astype(np.float64).tobytes()
    truth = {"q,0": ['r"3\n'], "q,1": ['r"0\n']}
    assert score_predictions(again, truth) == score_predictions(predictions, truth)


def test_the_form_of_the_challenge(tmp_path: Path) -> None:
    write_predictions(tmp_path / "p.csv", [("Q0", "R1", 0.5), ("Q1", "R0", -1.25)])
    assert (tmp_path / "p.csv").read_text() == "query_id,reference_id,score\nQ0,R1,0.5\nQ1,R0,-1.25\n"
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]  # no temporary file is left


def test_header_is_optional(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("Q0,R1,0.5\nQ1,R0,1e-3\n")
    assert read_predictions(tmp_path / "p.csv").scores.tolist() == [0.5, 0.001]


@pytest.mark.parametrize(
    "content",
    [
        "score,reference_id,query_id\n0.5,R1,Q0\n",
        ",query_id,reference_id,score\n7,Q0,R1,0.5\n",
        "Query_ID, Reference_ID, Score\nQ0,R1,0.5\n",
        "\ufeffquery_id,reference_id,score\r\nQ0,R1,.5\r\n\r\n",
    ],
    ids=["another order", "an index column", "capitals", "byte order mark"],
)
def test_a_header_chooses_the_columns(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.csv").write_bytes(content.encode())
    assert [column.tolist() for column in read_predictions(tmp_path / "p.csv")] == [["Q0"], ["R1"], [0.5]]


def test_a_header_alone_is_no_prediction_and_an_empty_file_is_an_error(tmp_path: Path) -> None:
    write_predictions(tmp_path / "p.csv", [])
    assert len(read_predictions(tmp_path / "p.csv").scores) == 0
    (tmp_path / "p.csv").write_text("")
    with pytest.raises(DataError, match=r"p\.csv: the file is empty; expected lines query_id,reference_id,score"):
        read_predictions(tmp_path / "p.csv")


def test_utf_16_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("query_id,reference_id,score\nQ0,R1,0.5\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"line 1: a NUL character; .* UTF-16\? Save it as UTF-8"):
        read_predictions(tmp_path / "p.csv")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    write_predictions(tmp_path / "p.csv", [(name, "R", 1.0)])
    assert read_predictions(tmp_path / "p.csv").queries.tolist() == [name]


def test_a_refused_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    write_predictions(path, [("Q0", "R1", 0.5)])
    before = path.read_text()
    with pytest.raises(ValueError, match="finite"):
        write_predictions(path, [("Q0", "R1", float("nan"))])
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Q0,R1,0.5\nQ1,R0\n", "line 2: expected query_id,reference_id,score"),
        ("query_id,reference_id,score\nQ0,R1,high\n", "line 2: expected query_id,reference_id,score"),
        ("Q0,R1,nan\n", "line 1: the score must be finite, got nan"),
        ("uuid,path\n", "line 1: expected"),
        ("query_id,reference_id\nQ0,R1\n", "line 1: the header must name query_id,reference_id,score once each"),
        ("score,query_id,reference_id,score\n", "line 1: the header must name"),
        ("query_id;reference_id;score\nQ0;R1;0,5\n", "line 1: expected .* separated by commas here, not by ';'"),
        ("Q0;R1;0,5\n", "line 1: expected .* not by ';'"),
        ("Q0\tR1\t0.5\n", r"line 1: expected .* not by '\\t'"),
        ('Q0,R1,"0,5"\n', r"line 1: expected .* with a score such as 0.9, got \['Q0', 'R1', '0,5'\]"),
        ("# of a run\nQ0,R1,0.5\n", r"line 1: expected .* got \['# of a run'\]"),
        ("Q0,R1,0.5\nQ1,R2\0,0.4\n", "line 2: a NUL character"),
        ("Q0,R1,1e400\n", "line 1: the score must be finite, got 1e400"),
        ("Q0,R1,0.5\n,R2,0.4\n", "line 2: the query's id is empty"),
    ],
)
def test_malformed(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(DataError, match=f"p.csv, {message}"):
        read_predictions(tmp_path / "p.csv")


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"p\.csv: cannot be read"):
        read_predictions(tmp_path / "p.csv")
