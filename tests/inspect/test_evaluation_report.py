"""The report of an evaluation: which pairs it shows as the worst, in which order."""

from __future__ import annotations

from pathlib import Path

from copynce.data import EvaluationSplit, Manifest
from copynce.data.synthetic import make_pictures
from copynce.evaluation.metrics import as_predictions
from copynce.evaluation.tables import judge
from copynce.inspect.evaluation_report import evaluation_report
from copynce.inspect.report import Search


def test_the_worst_pairs_stand_at_their_ranks(tmp_path: Path) -> None:
    paths = make_pictures(tmp_path, 6, seed=1, side_px=(32, 40))
    references = Manifest([f"R{i}" for i in range(6)], paths, tmp_path)
    queries = Manifest(["Q0", "Q1", "Q2"], [*paths[:2], tmp_path / "gone.jpg"], tmp_path)
    truth = {"Q0": ["R0"], "Q1": ["R5"], "Q2": []}
    scores = {"Q0": [("R1", 0.9), ("R2", 0.8), ("R3", 0.7), ("R0", 0.1)], "Q1": [("R5", 0.95), ("R2", 0.5)]}
    scores["Q2"] = [("R4", 0.2)]
    rows = [(query, reference, score) for query, found in scores.items() for reference, score in found]
    split = EvaluationSplit("a", queries, references, None, truth)
    report = evaluation_report([judge("row", as_predictions(rows), truth)], split, title="t", shown=2)
    wrong, missed = (
        [block for block in section.blocks if isinstance(block, Search)]
        for section in report.sections
        if section.title.startswith("Worst")
    )
    assert [search.caption for search in wrong] == ["Q0", "Q1"]
    assert [[found.rank for found in search.found] for search in wrong] == [[1, 2, 3, 4], [1, 2]]
    assert wrong[0].note == "original R0 is at rank 4"
    assert wrong[0].found[-1].is_original
    assert [search.caption for search in missed] == ["Q0", "Q1"]
