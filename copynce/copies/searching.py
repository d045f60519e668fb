"""Copies of some pictures among others: descriptors, nearest neighbours, and what is near judged."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from copynce.copies.judging import judge
from copynce.copies.pair import CopyPair
from copynce.index.index import Index
from copynce.model import Model
from copynce.retrieval.search import search
from dali_pipelines.sources import AnyPath

#: Candidates of a query that are judged.
K = 5

Progress = Callable[[str, int, int], None]
OnBroken = Callable[[AnyPath, str], None]


def find_copies(
    model: Model,
    queries: Sequence[AnyPath],
    references: Sequence[AnyPath] | Index,
    *,
    k: int = K,
    threads: int = 2,
    on_broken: OnBroken,
    progress: Progress | None = None,
) -> list[CopyPair]:
    """Each query with its k nearest references, judged: the pairs, the most probable first; of equal ones by name.

    references: files, or an index made with this model. A file is no candidate for itself. on_broken: told of each
    picture that cannot be used as on_broken(path, reason). progress: called as progress(what, done, total). Raises
    DataError if the model has no calibration, or for an index of another model.
    """
    model.calibrated()
    told: set[str] = set()

    def broken(path: AnyPath, reason: str) -> None:
        if os.fspath(path) not in told:
            told.add(os.fspath(path))
            on_broken(path, reason)

    places, rows = described(model, queries, "queries", threads, broken, progress)
    asked = [queries[place] for place in places.tolist()]
    if isinstance(references, Index):
        pairs, files = _from_index(references, asked, rows, k)
    else:
        pairs, files = _from_files(model, references, asked, rows, k, threads, broken, progress)

    def report(done: int) -> None:
        if progress is not None:
            progress("pairs", done, len(pairs))

    judged = judge(model, asked, files, pairs, on_broken=broken, progress=report, threads=threads)
    return sorted(
        (pair for pair in judged if pair is not None), key=lambda pair: (-pair.probability, pair.query, pair.reference)
    )


def described(
    model: Model, paths: Sequence[AnyPath], what: str, threads: int, on_broken: OnBroken, progress: Progress | None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(places of the pictures that can be used int64 [n], their descriptors float32 [n, D])."""
    places: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    rows: list[NDArray[np.float32]] = [np.empty((0, model.dim), np.float32)]
    if len(paths):
        for at, descriptors, _ in model.stream(paths, on_broken, threads=threads):
            places.append(at)
            rows.append(descriptors)
            if progress is not None:
                progress(what, int(at[-1]) + 1, len(paths))
    return np.concatenate(places), np.concatenate(rows)


def _from_files(
    model: Model,
    references: Sequence[AnyPath],
    asked: Sequence[AnyPath],
    rows: NDArray[np.float32],
    k: int,
    threads: int,
    on_broken: OnBroken,
    progress: Progress | None,
) -> tuple[NDArray[np.int64], Sequence[AnyPath]]:
    """(pairs [P, 2] of `asked` and of the files returned, those files)."""
    places, reference_rows = described(model, references, "references", threads, on_broken, progress)
    if not len(rows) or not len(reference_rows):
        return np.empty((0, 2), np.int64), references
    at = places[search(rows, reference_rows, k=min(k + 1, len(places)))[1]]  # one more: the file itself may be there
    names = [os.path.abspath(os.fspath(path)) for path in references]
    return _without_themselves(asked, at.tolist(), names, k), references


def _from_index(
    index: Index, asked: Sequence[AnyPath], rows: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], Sequence[AnyPath]]:
    files: dict[str, int] = {}
    if not len(rows):
        return np.empty((0, 2), np.int64), []
    near = index.nearest(rows, k + 1)
    at = [[files.setdefault(path, len(files)) for path in paths if path] for paths in near.paths]
    names = list(files)
    return _without_themselves(asked, at, names, k), names


def _without_themselves(
    asked: Sequence[AnyPath], near: Sequence[Sequence[int]], names: Sequence[str], k: int
) -> NDArray[np.int64]:
    """Pairs [P, 2] of each query and the first k near it that are not the same file."""
    pairs = []
    for row, (path, places) in enumerate(zip(asked, near, strict=True)):
        own = os.path.abspath(os.fspath(path))
        others = [place for place in places if names[place] != own]
        pairs += [(row, place) for place in others[:k]]
    return np.array(pairs, np.int64).reshape(-1, 2)
