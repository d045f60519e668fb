"""Whole sets of features normalised into new ones, and scores of predictions: what ``copynce normalize`` does.

Everything long is made in parts that are kept, and dealt to several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from copynce.errors import DataError
from copynce.retrieval.extract import Processes
from copynce.retrieval.features import FeatureFile, FeatureStore, read_features, write_series
from copynce.retrieval.mining import check_pair
from copynce.retrieval.normalization import (
    STRETCH_RANKS,
    Bias,
    Whitening,
    database_augmented,
    least_variable,
    stretch_factors,
    stretched_scores,
    with_column,
    without_negatives,
)
from copynce.retrieval.parts import Nearest, Parts
from copynce.retrieval.rows import Rows
from copynce.retrieval.search import ExactSearch, normalised

Recipe = Literal["copynce", "sscd", "isc", "vsc", "stretch", "whiten", "negative"]
_Rows32 = NDArray[np.float32]
_Make = Callable[[_Rows32, slice], _Rows32]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A recipe of PROTOCOLS 3 with its numbers; see :mod:`copynce.retrieval.normalization`.

    bias: of score normalisation. replace: whether its column takes the place of the least variable one. scale: of
    stretching. dims: columns after whitening, none: as before. beta, neighbours, iterations: of negative embedding
    subtraction. augment: neighbours of its database augmentation, 0: none.
    """

    recipe: Recipe
    bias: Bias | None = None
    replace: bool = False
    scale: float = 2.5
    dims: int | None = None
    beta: float = 0.35
    neighbours: int = 10
    iterations: int = 1
    augment: int = 10

    @property
    def ranks(self) -> int:
        """How many of the nearest training pictures a query's score depends on; 0: the features themselves change."""
        if self.bias is not None:
            return self.bias.end
        return STRETCH_RANKS if self.recipe == "stretch" else 0


@dataclass(frozen=True)
class Work:
    """What all of a change's long steps share: the training features, the processes, GPUs, and who is told."""

    training: FeatureFile
    group: Processes
    gpus: Sequence[int] | None = None
    progress: Callable[[str, int, int], None] | None = None

    def report(self, name: str, total: int) -> Callable[[int], None] | None:
        """`progress` for one step."""
        progress = self.progress
        return None if progress is None else lambda done: progress(name, done, total)

    def require_training(self, count: int, setting: str = "") -> None:
        """Raise DataError unless there are `count` training pictures; setting: what asks for them, if it is one."""
        there = len(self.training.features.uuids)
        if there < count:
            looks = f"{setting}={count} asks for as many" if setting else f"this recipe looks at the {count}"
            raise DataError(f"{self.training.source}: {looks} nearest training pictures, but there are only {there}")

    def similarities(self, query: FeatureFile, ranks: int, parts: Path) -> _Rows32:
        """[Nq, ranks] of each query to its nearest training pictures; kept in the folder `parts` while they are made.

        Raises DataError where the two do not fit, or training pictures are too few.
        """
        check_pair(query, self.training)
        training = self.training.features
        self.require_training(ranks)
        search: list[ExactSearch] = []

        def find(rows: slice) -> Nearest:
            if not search:
                search.append(ExactSearch(training.values, ranks, gpus=self.gpus))
            return Nearest(*search[0](query.features.values[rows]))

        kept = Parts(parts, len(query.features.uuids), ranks)
        made_from = {"query": query.features.digest(), "reference": training.digest()}
        kept.fill(made_from, find, self.group, self.report("similarities", len(query.features.uuids)))
        found = np.concatenate([found.scores for _, found in kept])
        with self.group.together():
            pass  # all have read
        if self.group.rank == 0:
            kept.remove()
        return found


def change_scores(
    change: Change, queries: NDArray[Any], scores: NDArray[np.float64], features: FeatureFile, work: Work, parts: Path
) -> NDArray[np.float64]:
    """The scores [P] of predictions, normalised.

    queries: [P] ids. features: of the queries. parts: a folder for a while.
    Raises DataError for a query without features, and for a recipe that changes features, not scores.
    """
    if not change.ranks:
        raise DataError(f"recipe={change.recipe} changes features, not the scores of predictions; give features")
    place = {uuid: row for row, uuid in enumerate(features.features.uuids)}
    ids = queries.tolist()
    if (absent := next((query for query in ids if query not in place), None)) is not None:
        raise DataError(f"{features.source}: no features of the query {absent!r}, which has predictions")
    row = np.fromiter(map(place.__getitem__, ids), np.int64, len(ids))
    similarities = work.similarities(features, change.ranks, parts)
    if change.bias is not None:
        return scores - change.bias.of(similarities)[row]
    return stretched_scores(scores, stretch_factors(similarities, change.scale)[row])


def change_features(
    change: Change, found: Mapping[str, FeatureFile], roles: Mapping[str, str], out: Path, work: Work
) -> list[str]:
    """Write the features of every name, changed, as series of the folder `out`; returns the names of those written.

    roles: "query", "reference" or "training" of each. Series that are there already are kept, if made from the same.
    Whitening is kept in out/whitening.safetensors; negative embedding subtraction leaves the training pictures after
    their augmentation as the series "training". Raises DataError where features do not fit.
    """
    training = work.training
    with work.group.together():
        for features in found.values():
            check_pair(features, training)
        if change.recipe == "negative":
            work.require_training(change.neighbours, "neighbours")
            work.require_training(change.augment, "augment")
    facts = {**asdict(change), "training": training.features.digest()}
    if change.recipe == "negative" and change.augment:
        training = _augmented(change, out, facts, work)
    whitening = _whitening(change, out, facts, work) if change.recipe == "whiten" else None
    column = least_variable(training.features.values) if change.replace else None
    find: list[ExactSearch] = []
    written = []
    for name, features in found.items():
        if roles[name] == "training" and whitening is None:
            continue
        made_from = _made_from(features, facts)
        make: _Make
        if whitening is not None:
            make = _alone(whitening)
        elif change.recipe == "negative":
            if not find:
                find.append(ExactSearch(training.features.values, change.neighbours, gpus=work.gpus))
            make = _subtracting(change, training.features.values, find[0])
        else:
            made_from["scored_by"] = "distance" if change.recipe == "stretch" else "inner product"
            values: NDArray[np.float32] | None = None
            if roles[name] == "query":
                similarities = work.similarities(features, change.ranks, out / f".{name}.parts")
                biased = change.bias is not None
                values = change.bias.of(similarities) if change.bias else stretch_factors(similarities, change.scale)
                make = _with_bias(-values, column) if biased else _stretching(values)
            else:
                make = _alone(normalised) if change.recipe == "stretch" else _with_bias(None, column)
        _write(name, features, made_from, make, out, work)
        written.append(name)
    return written


def _made_from(features: FeatureFile, facts: Mapping[str, Any]) -> dict[str, Any]:
    changed = [*features.made_from.get("changed", []), facts]
    return {**features.made_from, "from": features.features.digest(), "changed": changed}


def _write(name: str, features: FeatureFile, made_from: Mapping[str, Any], make: _Make, out: Path, work: Work) -> None:
    store = FeatureStore(out, name, str(features.made_from.get("model")))
    report = work.report(name, features.pictures)
    with work.group.together():
        write_series(store, features, made_from, make, rank=work.group.rank, size=work.group.size, progress=report)


def _augmented(change: Change, out: Path, facts: Mapping[str, Any], work: Work) -> FeatureFile:
    """The training features after database augmentation, as the series "training"."""
    rows = work.training.features.values
    search: list[ExactSearch] = []

    def make(part: _Rows32, place: slice) -> _Rows32:
        if not search:
            search.append(ExactSearch(rows, change.augment, gpus=work.gpus))
        return database_augmented(part, rows, search[0])

    _write("training", work.training, _made_from(work.training, facts), make, out, work)
    with work.group.together():
        return read_features(out, side="training")


def _whitening(change: Change, out: Path, facts: Mapping[str, Any], work: Work) -> Whitening:
    rows = work.training.features.values
    made_from, path = repr(facts), out / "whitening.safetensors"
    with work.group.together():
        if work.group.rank == 0 and Whitening.find(path, made_from) is None:
            out.mkdir(parents=True, exist_ok=True)
            Whitening.fit(rows, change.dims or rows.shape[1]).save(path, made_from)
    found = Whitening.find(path, made_from)
    if found is None:
        raise DataError(f"{path}: written by another process, but not to be seen by this one; all need the same folder")
    return found


def _alone(function: Callable[[_Rows32], _Rows32]) -> _Make:
    return lambda rows, place: function(rows)


def _subtracting(change: Change, negatives: Rows, find: ExactSearch) -> _Make:
    return lambda rows, place: without_negatives(rows, negatives, find, beta=change.beta, iterations=change.iterations)


def _with_bias(values: NDArray[np.float32] | None, column: int | None) -> _Make:
    """One more column, of values by row, or of 1."""
    return lambda rows, place: with_column(normalised(rows), 1.0 if values is None else values[place], column)


def _stretching(factors: NDArray[np.float32]) -> _Make:
    return lambda rows, place: normalised(rows) * factors[place, None]
