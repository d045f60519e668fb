"""Copies of some pictures among others: descriptors, nearest neighbours, and what is near judged."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from copynce.copies.calibration import NO_FLOOR
from copynce.copies.judging import biases_of, judge, quickest
from copynce.copies.pair import CopyPair
from copynce.index.index import Index
from copynce.model import Model
from copynce.retrieval.crops import one_of_one
from copynce.retrieval.extract import Views
from copynce.retrieval.query_views import QUERY_VIEWS
from copynce.retrieval.search import pair_cosines, search
from dali_pipelines.sources import AnyPath

#: Candidates of a query that are judged.
K = 10

WHOLE = Views("whole", one_of_one)

Progress = Callable[[str, int, int], None]
OnBroken = Callable[[AnyPath, str], None]


def find_copies(
    model: Model,
    queries: Sequence[AnyPath],
    references: Sequence[AnyPath] | Index,
    *,
    k: int = K,
    in_parts: bool = True,
    threads: int = 2,
    on_broken: OnBroken,
    progress: Progress | None = None,
) -> list[CopyPair]:
    """Each query with its nearest references, judged: the pairs, the most probable first; of equal ones by name.

    As `candidates`. Raises DataError if the model has no calibration, or for an index of another model.
    """
    model.calibrated()
    told: set[str] = set()

    def broken(path: AnyPath, reason: str) -> None:
        if os.fspath(path) not in told:
            told.add(os.fspath(path))
            on_broken(path, reason)

    found = candidates(
        model, queries, references, k=k, in_parts=in_parts, threads=threads, on_broken=broken, progress=progress
    )

    def report(done: int) -> None:
        if progress is not None:
            progress("pairs", done, len(found.pairs))

    judged = judge(
        model, queries, found.files, found.pairs, views=found.views, on_broken=broken, progress=report, threads=threads
    )
    return sorted(
        (pair for pair in judged if pair is not None), key=lambda pair: (-pair.probability, pair.query, pair.reference)
    )


def compared(model: Model, query: AnyPath, reference: AnyPath, on_broken: OnBroken) -> CopyPair | None:
    """One pair as `find_copies` judges it, by the view of the query that is nearest; None if a picture is broken."""
    _, views = described(model, [query], "query", QUERY_VIEWS, 1, on_broken, None)
    _, rows = described(model, [reference], "reference", None, 1, on_broken, None)
    if not len(views) or not len(rows):
        return None
    nearest = int((views[0] @ rows[0] - biases_of(model, views[0])).argmax())
    pair = np.zeros((1, 2), np.int64)
    return judge(model, [query], [reference], pair, views=np.array([nearest]), on_broken=on_broken, threads=1)[0]


@dataclass(frozen=True)
class Proposed:
    """pairs: int64 [P, 2], places among the queries and in `files`. views: int64 [P], the view of the query."""

    files: Sequence[AnyPath]
    pairs: NDArray[np.int64]
    views: NDArray[np.int64]


def candidates(
    model: Model,
    queries: Sequence[AnyPath],
    references: Sequence[AnyPath] | Index,
    *,
    k: int = K,
    in_parts: bool = True,
    threads: int = 2,
    on_broken: OnBroken,
    progress: Progress | None = None,
) -> Proposed:
    """The pairs to judge: a query is asked whole and in parts (`query_views`), and of each the k references are taken
    whose best view is nearest, by normalised score; of these, where the model is calibrated, none that is hopeless
    (`Calibration.floor`).

    references: files, or an index made with this model. A file is no candidate for itself. in_parts: False asks
    queries whole, in a fraction of the time. on_broken: told of each picture that cannot be used as on_broken(path,
    reason). progress: called as progress(what, done, total).
    """
    places, rows = described(
        model, queries, "queries", QUERY_VIEWS if in_parts else WHOLE, threads, on_broken, progress
    )
    asked = [queries[place] for place in places.tolist()]
    flat = rows.reshape(-1, model.dim)
    near = (
        _near_in_index(references, flat, k + 1)
        if isinstance(references, Index)
        else _near_in_files(model, references, flat, k + 1, threads, on_broken, progress)
    )
    pairs, views = best_views(near, biases_of(model, flat).reshape(rows.shape[:2]), asked, k, _floor(model))
    pairs[:, 0] = places[pairs[:, 0]]
    return Proposed(near.files, pairs, views)


def hopeful(model: Model, descriptors: NDArray[np.float32], pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which pairs [P] of rows of `descriptors` [N, D] a search would judge, with either as its query; pairs: int64
    [P, 2]."""
    floor = _floor(model)
    if floor <= NO_FLOOR or not len(pairs):
        return np.ones(len(pairs), bool)
    places, at = np.unique(pairs, return_inverse=True)
    biases = biases_of(model, descriptors[places])[at.reshape(pairs.shape)].min(1)
    return pair_cosines(descriptors, descriptors, pairs[:, 0], pairs[:, 1]) - biases >= floor


def _floor(model: Model) -> float:
    return NO_FLOOR if model.calibration is None else model.calibration.floor


def described(
    model: Model,
    paths: Sequence[AnyPath],
    what: str,
    views: Views | None,
    threads: int,
    on_broken: OnBroken,
    progress: Progress | None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(places of the pictures that can be used int64 [n], their descriptors float32 [n, D], of views [n, V, D])."""
    shape = (0, model.dim) if views is None else (0, views.count, model.dim)
    places: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    rows: list[NDArray[np.float32]] = [np.empty(shape, np.float32)]
    if len(paths):
        stream = model.stream(paths, on_broken, threads=threads, views=views, precision=quickest(model.device))
        for at, descriptors, _ in stream:
            places.append(at)
            rows.append(descriptors)
            if progress is not None:
                progress(what, int(at[-1]) + 1, len(paths))
    return np.concatenate(places), np.concatenate(rows)


@dataclass(frozen=True)
class Near:
    """The files nearest to each of M descriptors: scores float32 [M, K], cosines, and at int64 [M, K], places in
    `files`, -1 where there were fewer."""

    scores: NDArray[np.float32]
    at: NDArray[np.int64]
    files: Sequence[AnyPath]


def best_views(
    near: Near, biases: NDArray[np.float32], asked: Sequence[AnyPath], k: int, floor: float = NO_FLOOR
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(pairs int64 [P, 2] of a place in `asked` and one in `near.files`, the view of each int64 [P]): the k references
    of each query whose best view is the nearest, by normalised score; a file is none of its own.

    near: of the views of N queries, M = N V rows, a query's together. biases: float32 [N, V], of each view. floor: the
    least score.
    """
    names = [os.path.abspath(os.fspath(path)) for path in near.files]
    pairs, chosen = [], []
    scores, at = (part.reshape(*biases.shape, -1) for part in (near.scores, near.at))
    for row, path in enumerate(asked):
        own = os.path.abspath(os.fspath(path))
        best: dict[int, tuple[float, int]] = {}
        for view, column in np.argwhere(at[row] >= 0).tolist():
            place = int(at[row, view, column])
            score = float(scores[row, view, column] - biases[row, view])
            if names[place] != own and score >= floor and score > best.get(place, (-np.inf, 0))[0]:
                best[place] = score, view
        for place in sorted(best, key=lambda place: (-best[place][0], names[place]))[:k]:
            pairs.append((row, place))
            chosen.append(best[place][1])
    return np.array(pairs, np.int64).reshape(-1, 2), np.array(chosen, np.int64)


def _near_in_files(
    model: Model,
    references: Sequence[AnyPath],
    rows: NDArray[np.float32],
    k: int,
    threads: int,
    on_broken: OnBroken,
    progress: Progress | None,
) -> Near:
    places, described_ = described(model, references, "references", None, threads, on_broken, progress)
    if not len(rows) or not len(described_):
        return Near(np.empty((len(rows), 0), np.float32), np.empty((len(rows), 0), np.int64), references)
    scores, at = search(rows, described_, k=min(k, len(places)))
    return Near(scores, places[at], references)


def _near_in_index(index: Index, rows: NDArray[np.float32], k: int) -> Near:
    files: dict[str, int] = {}
    if not len(rows):
        return Near(np.empty((0, 0), np.float32), np.empty((0, 0), np.int64), [])
    near = index.nearest(rows, k)
    at = [[files.setdefault(path, len(files)) if path else -1 for path in paths] for paths in near.paths]
    return Near(near.scores, np.array(at, np.int64).reshape(near.scores.shape), list(files))
