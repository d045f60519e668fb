"""The challenge's CSV: nothing is lost, a broken file names its line, a crash leaves the old file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from copynce.errors import DataError
from copynce.evaluation.metrics import score_predictions
from copynce.evaluation.predictions import (
    Candidates,
    merge_predictions,
    ranked_predictions,
    read_candidates,
    read_predictions,
    write_candidates,
    write_predictions,
)


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


def rows(columns: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    return list(zip(*(column.tolist() for column in columns), strict=True))


RELEASED = [["Q1", [["R2", 0.75], ["R0", 0.5]]], ["Q0", []], ["Q2", [["R2", -1]]]]


def test_the_released_form(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(RELEASED))
    found = read_predictions(tmp_path / "p.json")
    assert rows(found) == [("Q1", "R2", 0.75), ("Q1", "R0", 0.5), ("Q2", "R2", -1.0)]
    assert rows(read_candidates(tmp_path / "p.json")) == [("Q1", "R2"), ("Q1", "R0"), ("Q2", "R2")]
    (tmp_path / "p").write_text("\ufeff" + json.dumps(RELEASED, indent=1))  # told from CSV by its bracket
    assert rows(read_predictions(tmp_path / "p")) == rows(found)
    write_predictions(tmp_path / "again.json", found)
    assert json.loads((tmp_path / "again.json").read_text()) == [RELEASED[0], ["Q2", [["R2", -1.0]]]]


def test_the_released_form_is_written_best_first(tmp_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    write_predictions(tmp_path / "p.json", [("Q1", "R0", 0.1), (name, "R1", 0.3), ("Q1", "R2", 0.2)])
    expected = [("Q1", "R2", 0.2), ("Q1", "R0", 0.1), (name, "R1", 0.3)]
    assert rows(read_predictions(tmp_path / "p.json")) == expected


@pytest.mark.parametrize("piece", [7, 64])
def test_pieces_of_json_are_read_as_the_whole(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [[f"Q{i}", [[f"R{j}", j / 7] for j in range(i)]] for i in range(20)]
    (tmp_path / "p.json").write_text(json.dumps(whole, indent=2))
    expected = rows(read_predictions(tmp_path / "p.json"))
    monkeypatch.setattr("copynce.evaluation.predictions._PIECE", piece)
    assert (
        rows(read_predictions(tmp_path / "p.json")) == expected == [(q, r, s) for q, found in whole for r, s in found]
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Q0,R1\nQ0,R1\nQ1,R0\n", [("Q0", "R1"), ("Q1", "R0")]),
        ("query_id,reference_id\nQ0,R1\n", [("Q0", "R1")]),
        ("query_id,reference_id,score\nQ0,R1,high\n", [("Q0", "R1")]),
        ("Q0,R1,0.5", [("Q0", "R1")]),
        ("reference_id,group,query_id\nR1,one_of_two,Q0\n", [("Q0", "R1")]),
        ('"Q,0", R1\n', [("Q,0", "R1")]),
    ],
)
def test_candidates_in_csv(content: str, expected: list[tuple[str, str]], tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(content)
    found = read_candidates(tmp_path / "c.csv")
    assert rows(found) == expected
    for name in ("again.csv", "again.json"):
        write_candidates(tmp_path / name, found)
        assert rows(read_candidates(tmp_path / name)) == expected


def test_the_two_readers_of_csv_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain blocks are split as a whole; one row that is not plain leaves the rest to the other reader."""
    plain = [f"Q{i % 7},R{i},{i / 3!r}" for i in range(40)]
    monkeypatch.setattr("copynce.data.rows._BLOCK", 100)
    for place, odd in ((None, ""), (0, '"Q,0",R,1'), (25, '"Q,0",R,1'), (39, ""), (13, "Q0,Ré,1")):
        text = plain.copy()
        if place is not None:
            text.insert(place, odd)
        (tmp_path / "p.csv").write_text("\n".join(text))
        expected = [line.replace('"Q,0"', "Q;0").split(",") for line in text if line]
        found = rows(read_predictions(tmp_path / "p.csv"))
        assert found == [(q.replace(";", ","), r, float(s)) for q, r, s in expected]
    (tmp_path / "p.csv").write_text("\n".join([*plain, "Q1,R1"]))
    with pytest.raises(DataError, match=r"line 41: expected query_id,reference_id,score, got \['Q1', 'R1'\]"):
        read_predictions(tmp_path / "p.csv")


def test_a_pair_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("query_id,reference_id,score\nQ0,R1,0.5\nQ0,R2,0.5\nQ0,R1,0.75\n")
    with pytest.raises(DataError, match=r"p\.csv, line 4: query 'Q0' with reference 'R1' is given twice, .* line 2"):
        read_predictions(path)
    assert rows(read_predictions(path, merge=True)) == [("Q0", "R2", 0.5), ("Q0", "R1", 0.75)]
    (tmp_path / "p.json").write_text('[["Q0", [["R1", 0.5]]],\n ["Q0", [["R1", 0.5]]]]')
    with pytest.raises(DataError, match=r"p\.json, line 2: .* given twice, first on line 1"):
        read_predictions(tmp_path / "p.json")


def test_ids_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("Q0,R0,0.5\nQ0,R1,0.5\nQ1,R0,0.25\n")
    (tmp_path / "p.json").write_text(json.dumps(RELEASED, indent=0))
    with pytest.raises(DataError, match=r"p\.csv, line 2: reference 'R1' is not among the 1 references"):
        read_predictions(tmp_path / "p.csv", references=["R0"])
    with pytest.raises(DataError, match=r"p\.csv, line 3: query 'Q1' is not among the 2 queries"):
        read_predictions(tmp_path / "p.csv", queries=["Q0", "Q7"])
    with pytest.raises(DataError, match=r"p\.json, line 19: query 'Q2' is not among the 2 queries"):
        read_candidates(tmp_path / "p.json", queries=["Q0", "Q1"])


@pytest.mark.parametrize("content", ["", "query_id,reference_id\n", "[]", '[["Q0", []]]'])
def test_a_list_of_candidates_is_not_empty(content: str, tmp_path: Path) -> None:
    (tmp_path / "c").write_text(content)
    with pytest.raises(DataError, match=r"c: no candidate pair in this file"):
        read_candidates(tmp_path / "c")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"Q0": ["R0"]}', r"line 1: not a JSON list of predictions \(expected '\[', got '{'\)"),
        ('[["Q0", [["R0", 0.5]]]', r"line 1: .*expected ',', got the end of the file"),
        ('[["Q0", [["R0", 0.5]]],\n["Q1", [["R0", 0.', "line 2: not a JSON list of predictions"),
        ('[["Q0", [["R0", 0.5]]],\n\n["Q1", [["R0"]]]]', "line 3: query 'Q1' must have a list of pairs"),
        ('[["Q0", [["R0", 0.5]]],\n["Q1", ["R0", 0.5]]]', "line 2: query 'Q1' must have a list of pairs"),
        ('[["Q0", {"R0": 0.5}]]', "line 1: an entry must be a query and its list"),
        ('[["Q0", [[0, 0.5]]]]', "line 1, query 'Q0': ids are text in quotes, got 0"),
        ('[["Q0", [["R0", "0.5"]]]]', "line 1, query 'Q0': a score must be a number, got '0.5'"),
        ('[["Q0", [["R0", NaN]]]]', "line 1: the score must be finite, got nan"),
        ('[["", [["R0", 0.5]]]]', "line 1: the query's id is empty"),
        ('[["Q0", [["R0", 0.5]]]] 7', "line 1: .*more after the end of the list"),
        ("[" * 100_000, "line 1: "),
    ],
)
def test_malformed_json(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(DataError, match=rf"p\.json, {message}"):
        read_predictions(tmp_path / "p.json")


def test_merged_and_trimmed() -> None:
    one = [("Q0", "R0", 0.5), ("Q1", "R0", 0.125), ("Q0", "R1", 0.25)]
    two = [("Q0", "R1", 0.75), ("Q2", "R0", 0.5), ("Q0", "R2", 0.5)]
    merged = merge_predictions([one, two])
    assert rows(merged) == [
        ("Q0", "R1", 0.75), ("Q0", "R0", 0.5), ("Q0", "R2", 0.5), ("Q1", "R0", 0.125), ("Q2", "R0", 0.5)
    ]  # fmt: skip
    assert rows(merge_predictions([one, two], k=2)) == [*rows(merged)[:2], *rows(merged)[3:]]
    assert rows(merge_predictions([])) == []
    with pytest.raises(ValueError, match="k must be at least 1"):
        merge_predictions([one], k=0)


def test_candidates_keep_their_order(tmp_path: Path) -> None:
    pairs = Candidates(np.array(["b", "a", "b"], object), np.array(["x", "x", "y"], object))
    write_candidates(tmp_path / "c.csv", pairs)
    assert (tmp_path / "c.csv").read_text() == "query_id,reference_id\nb,x\na,x\nb,y\n"
