"""Queries asked in parts: 23 views of each, and of the references that any of them is near to the nearest.

A copy that was laid on another picture, or into a screenshot, is a part of the query: of a box around it the descriptor
is nearer to the original's than that of the whole query.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from copynce.retrieval.crops import one_of_four, one_of_one, one_of_two
from copynce.retrieval.extract import Views
from dali_pipelines import Cut


def query_views(width: int, height: int) -> list[Cut]:
    """The 23 views of a query: the whole picture, also by quarter turns, as files with an EXIF orientation are; boxes
    of half its sides in steps of a quarter, and of half its area, in which a copy that was laid small on another
    picture fills more patches.
    """
    turned = [Cut(angle=angle) for angle in (90.0, 180.0, 270.0)]
    quarters, halves = one_of_four(width, height), one_of_two(width, height, released=False)
    return [*one_of_one(width, height), *turned, *quarters, *halves]


QUERY_VIEWS = Views("whole, turned and parts", query_views)


def best_references(
    scores: NDArray[np.floating], at: NDArray[np.int64], k: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """(query, reference, view, score), each [P]: the `k` references of each query whose best view is the nearest, query
    by query, and that view; of equal scores the reference that comes first, and the first view.

    scores, at: [Nq, V, K], what a search found for each of V views of each query.
    """
    query, view = (place.ravel() for place in np.indices(scores.shape)[:2])
    reference, score = at.ravel(), scores.ravel().astype(np.float32)
    rows = best_pairs(query, reference, score, k)
    return query[rows], reference[rows], view[rows], score[rows]


def best_pairs(
    query: NDArray[np.int64], reference: NDArray[np.int64], score: NDArray[np.float32], k: int | None
) -> NDArray[np.int64]:
    """Of pairs (columns [N]) the rows [P] of each once, where its score is the highest, and of these the `k` best of
    each query (None: all) by decreasing score, query by query; of equal scores the reference that comes first."""
    rows = np.lexsort((-score, reference, query))
    asked, found = query[rows], reference[rows]
    rows = rows[np.append(True, (asked[1:] != asked[:-1]) | (found[1:] != found[:-1]))[: len(rows)]]
    rows = rows[np.lexsort((reference[rows], -score[rows], query[rows]))]
    if k is None:
        return rows
    asked = query[rows]
    return rows[np.arange(len(rows)) - np.searchsorted(asked, asked) < k]
