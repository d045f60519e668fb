"""Results as a table in the papers' form: a row per result, percents with one decimal, with their intervals."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copynce.evaluation.intervals import Intervals, bootstrap_intervals
from copynce.evaluation.metrics import GroundTruthLike, Predictions, Rule, precision_recall_curve, score_predictions

Metrics = dict[str, Any]

#: The columns of a table: key of the metrics, and the name that papers give it.
COLUMNS = {"uap": "uAP", "rp90": "RP90", "recall_at_1": "recall@1"}
MORE_COLUMNS = {**COLUMNS, "map": "mAP", "recall_at_10": "recall@10"}


@dataclass(frozen=True)
class Row:
    """A result: its name, predictions, their metrics (`score_predictions`) and maybe the intervals of these."""

    name: str
    predictions: Predictions
    metrics: Metrics
    intervals: Intervals = field(default_factory=dict)


def judge(
    name: str,
    predictions: Predictions,
    ground_truth: GroundTruthLike,
    *,
    rule: Rule = "step",
    repetitions: int = 0,
    seed: int = 0,
) -> Row:
    """The row of `predictions`. repetitions: of the bootstrap, see `bootstrap_intervals`; 0: no intervals."""
    metrics = score_predictions(predictions, ground_truth, rule=rule)
    intervals: Intervals = {}
    if repetitions:
        intervals = bootstrap_intervals(predictions, ground_truth, repetitions=repetitions, seed=seed, rule=rule)
    return Row(name, predictions, metrics, intervals)


@contextmanager
def told_in_rows() -> Iterator[None]:
    """A block in which metrics give no Python warning of ids: the rows' metrics hold the sentence already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def curves_of(
    rows: Sequence[Row], ground_truth: GroundTruthLike
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """{name of a row: (recall, precision)}, as of `precision_recall_curve` but without warnings."""
    with told_in_rows():
        return {row.name: precision_recall_curve(row.predictions, ground_truth)[:2] for row in rows}


def cells(row: Row, columns: Mapping[str, str] = COLUMNS) -> list[str]:
    """The row's name, and each metric in percent: "70.5", or "70.5 [69.2, 71.8]" with its interval."""
    texts = [row.name]
    for key in columns:
        value = row.metrics.get(key)
        text = "-" if value is None else f"{100 * value:.1f}"
        if value is not None and key in row.intervals:
            low, high = row.intervals[key]
            text += f" [{100 * low:.1f}, {100 * high:.1f}]"
        texts.append(text)
    return texts


def text_table(rows: Sequence[Row], columns: Mapping[str, str] = COLUMNS) -> str:
    """The table for a terminal."""
    lines = [["", *columns.values()], *(cells(row, columns) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    texts = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join(text.rstrip() for text in texts)


def markdown_table(rows: Sequence[Row], columns: Mapping[str, str] = COLUMNS) -> str:
    """The table in Markdown, with a line end at its end."""
    lines = [["", *columns.values()], ["---", *("---:" for _ in columns)], *(cells(row, columns) for row in rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def row_facts(row: Row) -> Metrics:
    """The row for a metrics.json: its name, metrics and intervals."""
    return {"name": row.name, **row.metrics, "intervals": {key: list(pair) for key, pair in row.intervals.items()}}
