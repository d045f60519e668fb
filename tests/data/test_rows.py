"""CSV files of names: whatever a name holds, the reader gives back what the writer was given."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from copynce.data import Manifest, read_ground_truth, read_manifest
from copynce.data.rows import read_rows, write_rows
from copynce.errors import DataError
from copynce.evaluation import read_predictions, write_predictions

#: Any text, text made of what CSV files trip over, and any bytes as file names give them.
NAMES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(" ,\"'\r\n\t\ufeff\0;#=[]{}\x0b\x85\u2028a"),
    st.binary().map(lambda content: content.decode("utf-8", "surrogateescape")),
)
ODD = [
    *("a b", " a", "a ", "a,b", 'a"b', "'a'", "a\nb", "a\rb", "a\r\nb", "\r", "\n", "\t", " ", "é", "e\u0301"),
    *("J\udce4", "#x", "\ufeffa", "[2024]", "{a,b}", "*.tar", "~", "$HOME", "-", "query_id", "nan", "007"),
    *("\u2028", ", ", '"', ",,"),
]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(NAMES, min_size=1, max_size=4), max_size=5))
def test_every_row_comes_back(rows: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.csv")
        write_rows(path, rows)
        assert [row for _, row in read_rows(path)] == rows


def test_text_that_no_file_can_hold_is_refused_whole(tmp_path: Path) -> None:
    for text in ("half a pair \ud800", "bytes that are a letter \udcc3\udca4"):
        with pytest.raises(DataError, match=r"rows\.csv: .* cannot be written as UTF-8"):
            write_rows(tmp_path / "rows.csv", [["fine"], [text]])
    assert list(tmp_path.iterdir()) == []


def test_predictions_keep_their_ids(tmp_path: Path) -> None:
    written = [(name, ODD[-1 - i], float(i)) for i, name in enumerate(ODD)]
    write_predictions(tmp_path / "predictions.csv", written)
    found = read_predictions(tmp_path / "predictions.csv")
    assert list(zip(found.queries, found.references, found.scores, strict=True)) == written


def test_ground_truths_keep_their_ids(tmp_path: Path) -> None:
    # In a CSV a reference with a separator inside may be a list of several, and is refused, as nan is. JSON holds all.
    names = [name for name in ODD if name != "nan" and not any(separator in name for separator in ",;|")]
    write_rows(tmp_path / "truth.csv", [("query_id", "reference_id"), *((name, name) for name in names)])
    assert read_ground_truth(tmp_path / "truth.csv") == {name: [name] for name in names}
    (tmp_path / "truth.json").write_text(json.dumps({name: [name] for name in ODD}))
    assert read_ground_truth(tmp_path / "truth.json") == {name: [name] for name in ODD}
    # By hand, without quotes: blanks before the first and behind the last field are part of the names too.
    (tmp_path / "hand.csv").write_text("query_id,reference_id\n a,r \n")
    assert read_ground_truth(tmp_path / "hand.csv") == {" a": ["r "]}


def test_manifests_keep_their_names(tmp_path: Path) -> None:
    """What a folder holds, written as a list and read again."""
    names = [name for name in ODD if "/" not in name] + ["x" * 100]
    for name in names:
        (tmp_path / f"{name}.jpg").write_bytes(b"")
        (tmp_path / f" {name} ").mkdir()
        (tmp_path / f" {name} " / f" {name} .jpg").write_bytes(b"")
    folder = read_manifest(tmp_path)
    assert len(folder) == 2 * len(names)
    lines = [(uuid, str(path.relative_to(tmp_path))) for uuid, path in zip(folder.uuids, folder.paths, strict=True)]
    write_rows(tmp_path / "list.csv", [("uuid", "path"), *lines])
    assert read_manifest(tmp_path / "list.csv") == Manifest(folder.uuids, folder.paths, tmp_path)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("uuid, path\nA, a b.jpg\nB,c.jpg\n", [["uuid", "path"], ["A", "a b.jpg"], ["B", "c.jpg"]]),
        ('q, r\nA, " a"\n', [["q", "r"], ["A", " a"]]),
        ("Q1, R1\nQ2, R2\n", [["Q1", "R1"], ["Q2", "R2"]]),  # no header: the first line tells
        ('A,"b, c"\nB,"d, e"\n', [["A", "b, c"], ["B", "d, e"]]),
        ('A,5" disk\n', [["A", '5" disk']]),
        ("A, \nB,\n", [["A", ""], ["B", ""]]),
    ],
)
def test_blanks_after_commas_belong_to_them_if_the_first_line_has_them(
    tmp_path: Path, text: str, rows: list[list[str]]
) -> None:
    (tmp_path / "rows.csv").write_text(text)
    assert [row for _, row in read_rows(tmp_path / "rows.csv")] == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uuid,path\nQ0,a.jpg\nQ1, a.jpg\n", r"line 3: a blank after a comma, before 'a\.jpg'; remove it, or write"),
        ('uuid,path\nA,"a.jpg\nB,b.jpg\n', "line 3: not a CSV line"),  # a quotation without end swallows no line
        ('uuid,path\nA,"a"b.jpg\n', "line 2: not a CSV line"),
    ],
)
def test_no_name_is_changed_in_silence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / "rows.csv"))
