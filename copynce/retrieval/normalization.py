"""Score normalisation and its relatives (PROTOCOLS 3): a query that resembles everything gets lower scores.

    s'(q, r) = q.r - weight * mean(s_(start), ..., s_(end - 1))    s_(0) >= s_(1) >= ... : similarities of q to the
                                                                    auxiliary (training) pictures, no references
    copynce   ranks 1 ... 4, weight 1: the best neighbour is skipped     sscd   ranks 0 ... 2, weight 1
    isc       rank n - 1 of the n nearest, weight 1                      vsc    rank 0, weight 1.2

The bias is the same for all predictions of a query, so the order inside a query, mAP and recall@k stay; uAP and RP90
change. One more column folds it into the features: -bias in a query's row, 1 in a reference's, and the inner product
is the normalised score. Feature stretching lengthens a query instead, q' = scale * mean(s_(0) ... s_(4)) * q, and
scores by -|q' - r|. PCA whitening and negative embedding subtraction change the features themselves.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from copynce.errors import ConfigError, DataError
from copynce.files import whole_file
from copynce.retrieval.rows import Rows
from copynce.retrieval.search import ExactSearch, normalised, search

_ROWS = 1024  # whose neighbours' features are held at a time


def check_ranks(start: int, end: int) -> None:
    """Raise ConfigError, a ValueError, unless `start` and `end` name at least one rank."""
    if not 0 <= start < end:
        raise ConfigError(f"start and end must satisfy 0 <= start < end, got {start} and {end}")


@dataclass(frozen=True)
class Bias:
    """What score normalisation subtracts: `weight` times the mean of the similarities of ranks start ... end - 1."""

    start: int
    end: int
    weight: float

    def __post_init__(self) -> None:
        check_ranks(self.start, self.end)

    def of(self, similarities: NDArray[np.floating]) -> NDArray[np.float32]:
        """[Nq] of similarities [Nq, at least end], the best first."""
        return (self.weight * similarities[:, self.start : self.end].mean(axis=1)).astype(np.float32)


#: The published recipes by name; that of the challenge's baseline script with 10 neighbours.
BIASES = {"copynce": Bias(1, 5, 1.0), "sscd": Bias(0, 3, 1.0), "isc": Bias(9, 10, 1.0), "vsc": Bias(0, 1, 1.2)}

#: How many of the best similarities feature stretching averages.
STRETCH_RANKS = 5


def score_normalization(
    scores: NDArray[np.floating],
    query: Rows,
    auxiliary: Rows,
    *,
    start: int = 1,
    end: int = 5,
    alpha: float = 1.0,
) -> NDArray[np.float32]:
    """Normalised scores [Nq, k].

    scores: [Nq, k] cosine similarities of the queries' predictions, as `search` returns them. query: [Nq, D] and
    auxiliary: [Na, D] float features, L2-normalised here. start, end: ranks of the auxiliary similarities that are
    averaged, from 0, `end` exclusive; at least `end` auxiliary pictures are needed. alpha: weight of the mean.
    Raises ValueError where these do not fit.
    """
    check_ranks(start, end)
    if scores.ndim != 2 or len(scores) != len(query):
        raise ValueError(f"scores must be [Nq, k] with Nq = {len(query)} as in query, got {list(scores.shape)}")
    if len(auxiliary) < end:
        raise ValueError(f"auxiliary must have at least end = {end} rows, got {len(auxiliary)}")
    similarities, _ = search(query, auxiliary, k=end)
    return (scores - alpha * similarities[:, start:end].mean(axis=1, keepdims=True)).astype(np.float32)


def with_column(
    rows: NDArray[np.float32], values: NDArray[np.float32] | float, place: int | None = None
) -> NDArray[np.float32]:
    """`rows` [N, D] with one more column of `values`; with a `place`, in place of that column."""
    if place is None:
        return np.column_stack([rows, np.broadcast_to(np.float32(values), len(rows))]).astype(np.float32)
    changed = rows.copy()
    changed[:, place] = values
    return changed


def least_variable(rows: Rows, step: int = 65_536) -> int:
    """The column of the lowest variance, which VSC gives up for the bias (PROTOCOLS 13.4)."""
    total, squares = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    for start in range(0, len(rows), step):
        part = np.asarray(rows[start : start + step], np.float64)
        total += part.sum(axis=0)
        squares += np.square(part).sum(axis=0)
    return int(np.argmin(squares / len(rows) - np.square(total / len(rows))))


def stretch_factors(similarities: NDArray[np.floating], scale: float = 2.5) -> NDArray[np.float32]:
    """[Nq] lengths of stretched queries, of similarities [Nq, at least 5] to auxiliary features, the best first."""
    return (scale * similarities[:, :STRETCH_RANKS].mean(axis=1)).astype(np.float32)


def stretched_scores(scores: NDArray[np.floating], factors: NDArray[np.floating]) -> NDArray[np.float64]:
    """-|f q - r| of cosines q.r and their queries' factors f: |f q - r|^2 = f^2 - 2 f q.r + 1 for unit vectors."""
    length = factors.astype(np.float64)
    return -np.sqrt(np.maximum(np.square(length) - 2 * length * scores + 1, 0.0))


@dataclass(frozen=True)
class Whitening:
    """PCA whitening, ``PCAW<d>,L2norm``: unit rows [N, d] of rows [N, D]. matrix: [d, D], offset: [d], float32."""

    matrix: NDArray[np.float32]
    offset: NDArray[np.float32]

    @classmethod
    def fit(cls, training: Rows, dims: int) -> Whitening:
        """The whitening of these rows, by faiss; at most 1,000 rows a column are read, evenly spread.

        Raises ConfigError where dims does not fit the rows.
        """
        columns = training.shape[1]
        if not 1 <= dims <= min(columns, len(training)):
            raise ConfigError(
                f"dims must be from 1 to the {columns} columns and {len(training)} rows of the training features, "
                f"got {dims}"
            )
        chosen = np.linspace(0, len(training) - 1, min(len(training), 1000 * columns)).round().astype(np.int64)
        pca = faiss.PCAMatrix(columns, dims, -0.5, False)
        pca.train(np.ascontiguousarray(training[chosen], np.float32))
        matrix = faiss.vector_to_array(pca.A).reshape(-1, columns)[:dims]
        found = cls(matrix.astype(np.float32), faiss.vector_to_array(pca.b)[:dims].astype(np.float32))
        spread = faiss.vector_to_array(pca.eigenvalues)
        if not spread[dims - 1] > 1e-7 * spread[0]:  # float32 knows no smaller ones
            raise DataError(
                f"the training features vary in fewer than dims={dims} directions, so they cannot be whitened; choose "
                "a smaller dims"
            )
        return found

    def __call__(self, rows: NDArray[np.floating]) -> NDArray[np.float32]:
        return normalised(rows @ self.matrix.T + self.offset, "whitened features")

    def save(self, path: str | os.PathLike[str], made_from: str) -> None:
        """Write the whitening as safetensors; made_from: a text by which it is recognised."""
        tensors: dict[str, NDArray[Any]] = {"matrix": np.ascontiguousarray(self.matrix), "offset": self.offset}
        with whole_file(path) as file:
            file.write(save(tensors, metadata={"made_from": made_from}))

    @classmethod
    def find(cls, path: str | os.PathLike[str], made_from: str) -> Whitening | None:
        """That of a file, if it is there and made from the same."""
        try:
            with safe_open(Path(path), framework="numpy") as file:
                if (file.metadata() or {}).get("made_from") != made_from:
                    return None
                return cls(file.get_tensor("matrix"), file.get_tensor("offset"))
        except (FileNotFoundError, SafetensorError):
            return None


def database_augmented(
    rows: NDArray[np.floating], database: Rows, find: ExactSearch, power: float = 3.0
) -> NDArray[np.float32]:
    """Each row as the mean of its nearest in the `database`, itself among them, by similarities to the `power`; unit.

    find: the search of the database, for as many neighbours as are averaged.
    """
    found = np.empty(rows.shape, np.float32)
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        similarities, at = find(rows[part])
        near = np.asarray(database[at.ravel()], np.float64).reshape(*at.shape, -1)
        found[part] = normalised((near * np.power(similarities.astype(np.float64), power)[..., None]).sum(axis=1))
    return found


def without_negatives(
    rows: NDArray[np.floating], negatives: Rows, find: ExactSearch, *, beta: float = 0.35, iterations: int = 1
) -> NDArray[np.float32]:
    """e <- normalise(e - beta * mean of its nearest negatives), as often as `iterations` says, of each row.

    find: the search of the negatives, for as many neighbours as are averaged.
    """
    found = normalised(rows)
    for _ in range(iterations):
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            at = find(found[part])[1]
            near = np.asarray(negatives[at.ravel()], np.float64).reshape(*at.shape, -1)
            found[part] = normalised(found[part] - beta * near.mean(axis=1))
    return found
