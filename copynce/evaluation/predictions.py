"""Predictions as files: the CSV of the 2021 Image Similarity Challenge, `query_id,reference_id,score`."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from copynce.data.rows import read_columns, write_rows
from copynce.errors import DataError
from copynce.evaluation.metrics import Predictions, PredictionsLike, as_predictions

_HEADER = ["query_id", "reference_id", "score"]


def ranked_predictions(
    query_uuids: Sequence[str],
    reference_uuids: Sequence[str],
    scores: NDArray[np.floating],
    indices: NDArray[np.integer],
) -> Predictions:
    """The predictions of a search: row i of `scores` and `indices` [Nq, k] belongs to `query_uuids[i]`."""
    return Predictions(
        np.repeat(np.asarray(query_uuids, dtype=object), scores.shape[1]),
        np.asarray(reference_uuids, dtype=object)[indices.ravel()],
        scores.ravel().astype(np.float64),
    )


def write_predictions(path: str | os.PathLike[str], predictions: PredictionsLike) -> None:
    """Writes `predictions` to the CSV `path`, which appears only when it is complete.

    Scores keep all digits (the challenge's own writer keeps six decimals, which makes ties): reading the file gives
    the same metrics to the last digit.
    """
    queries, references, scores = as_predictions(predictions)
    rows = zip(map(str, queries), map(str, references), map(repr, scores.tolist()), strict=True)
    write_rows(path, itertools.chain([_HEADER], rows))


def read_predictions(path: str | os.PathLike[str]) -> Predictions:
    """The predictions of the CSV `path`; higher scores are better.

    The header is optional; where there is one, columns may stand in any order, and others beside them. Raises DataError
    naming the line that is malformed, or an empty file (a file of the header alone holds no predictions).
    """
    path = Path(path)
    queries: list[str] = []
    references: list[str] = []
    scores: list[float] = []
    for line, (query, reference, text) in read_columns(path, _HEADER):
        try:
            score = float(text)
        except ValueError as error:
            raise DataError(
                f"{path}, line {line}: expected query_id,reference_id,score with a score such as 0.9, got "
                f"{[query, reference, text]}"
            ) from error
        if not math.isfinite(score):
            raise DataError(f"{path}, line {line}: the score must be finite, got {text}; leave out what was not found")
        if not query or not reference:
            raise DataError(f"{path}, line {line}: the {'reference' if query else 'query'}'s id is empty")
        queries.append(query)
        references.append(reference)
        scores.append(score)
    if not queries and not path.stat().st_size:
        raise DataError(f"{path}: the file is empty; expected lines query_id,reference_id,score")
    return Predictions(np.array(queries, object), np.array(references, object), np.array(scores, np.float64))
