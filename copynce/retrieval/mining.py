"""k nearest neighbours: which pictures look most like each picture (PROTOCOLS 5), exact, in float32, self left out.

A picture is left out of its own neighbours by its id, never by its place: copies that are equal to the bit may stand
before it. The table is made in parts of queries that are kept as they are ready, and written in one of the forms

    .npy   int32 [N, k], row i naming the neighbours of the i-th picture of the list by their places in theirs, -1 where
           there are fewer, or where the picture is broken: what ``data.neighbours`` of a training reads
    .json  {uuid: [uuid, ...]}, what it reads too
    .csv   query_id,reference_id,score: predictions
    .pth   int64 [N, k + 1] of torch.save, as the released code leaves it: column 0 is the picture itself, which readers
           drop. Between two sets of pictures no column is, and all k + 1 are neighbours, the first of them dropped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copynce.data.rows import read_columns, write_rows
from copynce.errors import ConfigError, DataError
from copynce.files import atomic_text, whole_path
from copynce.retrieval.approximate import ApproximateSearch
from copynce.retrieval.extract import Alone, Processes
from copynce.retrieval.features import FeatureFile
from copynce.retrieval.parts import Nearest, Parts
from copynce.retrieval.search import ExactSearch

#: What a table can be written as.
FORMS = (".npy", ".json", ".csv", ".pth")

_ROWS = 65_536  # of a table that are written together


class Miner:
    """The neighbours of any rows of `query` among those of `reference`.

    k: neighbours of each picture. classes: {uuid: class}; pictures of a query's own class are left out. gpus: as in
    `search`. approximate: by `ApproximateSearch` with `probes`, on the CPU. Raises DataError where the two do not fit
    together.
    """

    def __init__(
        self,
        query: FeatureFile,
        reference: FeatureFile,
        k: int,
        *,
        classes: dict[str, str] | None = None,
        gpus: Sequence[int] | None = None,
        approximate: bool = False,
        probes: int | None = None,
    ) -> None:
        check_pair(query, reference)
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        self._query, self._reference, self._k, self._gpus = query.features, reference.features, k, gpus
        self._approximate, self._probes = approximate, probes
        position = {uuid: row for row, uuid in enumerate(reference.features.uuids)}
        self._own = np.array([position.get(uuid, -1) for uuid in query.features.uuids], np.int64)
        known = dict.fromkeys(classes.values()) if classes else {}
        number = {name: i for i, name in enumerate(known)}
        kinds = {uuid: number[name] for uuid, name in (classes or {}).items()}
        # A picture without a class has one of its own.
        self._query_class = np.array([kinds.get(uuid, -1) for uuid in query.features.uuids], np.int64)
        self._reference_class = np.array([kinds.get(uuid, -2) for uuid in reference.features.uuids], np.int64)
        self._searches: dict[int, ExactSearch | ApproximateSearch] = {}

    def __call__(self, rows: slice) -> Nearest:
        """The neighbours of these rows."""
        total = len(self._reference.values)
        query = np.asarray(self._query.values[rows])
        own, kind = self._own[rows], self._query_class[rows]
        mined = Nearest(
            np.full((len(query), self._k), -np.inf, np.float32), np.full((len(query), self._k), -1, np.int64)
        )
        open_, count = np.arange(len(query)), self._k + 1
        while len(open_):
            # One more than are asked for, since one may be the query itself; more where its class takes too many.
            count = min(count, total)
            scores, found = self._search(count)(query[open_])
            other = (found != own[open_, None]) & (self._reference_class[found] != kind[open_, None]) & (found >= 0)
            enough = (other.sum(axis=1) >= self._k) | (count == total) | self._approximate
            done = open_[enough]
            order = np.argsort(~other[enough], axis=1, kind="stable")[:, : self._k]  # the others first, as they come
            good = np.take_along_axis(other[enough], order, axis=1)
            width = order.shape[1]
            mined.scores[done, :width] = np.where(good, np.take_along_axis(scores[enough], order, axis=1), -np.inf)
            mined.indices[done, :width] = np.where(good, np.take_along_axis(found[enough], order, axis=1), -1)
            open_, count = open_[~enough], 4 * count
        return mined

    def recall(self) -> float:
        """Of the approximate search, measured on a sample of the queries."""
        search = self._search(min(self._k + 1, len(self._reference.values)))
        return search.recall(self._query.values) if isinstance(search, ApproximateSearch) else 1.0

    def _search(self, count: int) -> ExactSearch | ApproximateSearch:
        if count not in self._searches:
            self._searches[count] = (
                ApproximateSearch(self._reference.values, count, probes=self._probes)
                if self._approximate
                else ExactSearch(self._reference.values, count, gpus=self._gpus)
            )
        return self._searches[count]


def check_pair(query: FeatureFile, reference: FeatureFile) -> None:
    """Raise DataError unless two sets of features can be compared: one row a picture, columns, model and its input."""
    for found in (query, reference):
        if found.features.views != 1:
            raise DataError(f"{found.source}: {found.features.views} views of each picture; expected one row a picture")
        if not len(found.features.uuids):
            raise DataError(f"{found.source}: no features; every picture is broken")
        if how := found.made_from.get("scored_by"):
            raise DataError(
                f"{found.source}: these features are compared by {how}, not by cosine; give those that they come from"
            )
    columns = [found.features.values.shape[1] for found in (query, reference)]
    if columns[0] != columns[1]:
        raise DataError(
            f"{query.source} has {columns[0]} columns and {reference.source} {columns[1]}; features must come from one "
            "model"
        )
    for key, what in (("model", "model"), ("size", "input size"), ("changed", "normalisation")):
        ours, theirs = (found.made_from.get(key) for found in (query, reference))
        if query.made_from and reference.made_from and ours != theirs:
            raise DataError(
                f"{query.source} and {reference.source} are of another {what} ({_short(ours)} and {_short(theirs)}); "
                "make both with one"
            )


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text


def read_classes(path: str | os.PathLike[str]) -> dict[str, str]:
    """{uuid: class} of a CSV uuid,class. Raises DataError naming the line where a picture has two."""
    classes: dict[str, str] = {}
    for line, (uuid, name) in read_columns(Path(path), ("uuid", "class")):
        if not uuid or not name:
            raise DataError(f"{path}, line {line}: expected uuid,class, got {[uuid, name]}")
        if classes.setdefault(uuid, name) != name:
            raise DataError(f"{path}, line {line}: {uuid!r} is of class {name!r}, but {classes[uuid]!r} before")
    if not classes:
        raise DataError(f"{path}: no line uuid,class")
    return classes


def mine(
    query: FeatureFile,
    reference: FeatureFile,
    out: str | os.PathLike[str],
    *,
    k: int = 128,
    classes: dict[str, str] | None = None,
    gpus: Sequence[int] | None = None,
    approximate: bool = False,
    probes: int | None = None,
    processes: Processes | None = None,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Write the `k` nearest references of each query to `out`, in the form that its suffix names (`FORMS`).

    Queries and references may be the same features. Parts are kept in the folder `out`.parts until all are there, so a
    killed run goes on with the next one; several processes take parts in turns. progress: called with the number of
    queries done by all of them. say: receives the recall of an approximate search. Other arguments and errors as of
    `Miner`.
    """
    out = Path(out)
    check_form(out)
    group = Alone() if processes is None else processes
    same = list(query.features.uuids) == list(reference.features.uuids)
    if out.suffix == ".pth" and not same:
        k += 1  # readers drop the first column
    miner = Miner(query, reference, k, classes=classes, gpus=gpus, approximate=approximate, probes=probes)
    if approximate and say is not None and group.rank == 0:
        say(f"approximate search: {miner.recall():.4f} of the exact neighbours, on a sample of the queries")
    parts = Parts(Path(f"{out}.parts"), len(query.features.uuids), k)
    facts = {
        "query": query.features.digest(),
        "reference": reference.features.digest(),
        "approximate": [approximate, probes],
        "classes": hashlib.sha256(json.dumps(classes, sort_keys=True).encode()).hexdigest(),
    }
    parts.fill(facts, miner, group, progress)
    with group.together():
        if group.rank == 0:
            _WRITERS[out.suffix](out, _Table(query, reference, parts, same))
            parts.remove()


def check_form(out: Path) -> None:
    """Raise ConfigError unless a table can be written as `out`."""
    if out.suffix not in FORMS:
        raise ConfigError(f"--out must end in one of {', '.join(FORMS)}, got {out}")


@dataclass(frozen=True)
class _Table:
    query: FeatureFile
    reference: FeatureFile
    parts: Parts
    same: bool  # queries and references are the same pictures

    def fill(self, table: NDArray[np.integer], first: int) -> None:
        """Write the places of the neighbours in their list, -1 for none, into the columns from `first` on."""
        assert self.query.positions is not None, "set when it was made"
        assert self.reference.positions is not None, "set when it was made"
        for start in range(0, len(table), _ROWS):
            table[start : start + _ROWS] = -1
        places = np.append(self.reference.positions, -1)  # index -1 is none
        for rows, mined in self.parts:
            table[self.query.positions[rows], first:] = places[mined.indices]

    def pairs(self) -> Iterator[tuple[str, list[tuple[str, float]]]]:
        """(uuid, its neighbours with scores) of each query."""
        names = self.reference.features.uuids
        for rows, mined in self.parts:
            for row, indices, scores in zip(
                range(rows.start, rows.stop), mined.indices.tolist(), mined.scores.tolist(), strict=True
            ):
                found = [(names[at], score) for at, score in zip(indices, scores, strict=True) if at >= 0]
                yield self.query.features.uuids[row], found


def _write_npy(out: Path, table: _Table) -> None:
    kind = np.int32 if table.reference.pictures < 1 << 31 else np.int64
    with whole_path(out) as temporary:
        rows = np.lib.format.open_memmap(temporary, "w+", kind, (table.query.pictures, table.parts.k))
        table.fill(rows, 0)
        rows.flush()


def _write_pth(out: Path, table: _Table) -> None:
    import torch

    columns = table.parts.k + table.same
    with whole_path(out) as temporary:
        # Built in a file, so that a table of gigabytes needs no memory of its own.
        rows = np.lib.format.open_memmap(
            table.parts.folder / "table.npy", "w+", np.int64, (table.query.pictures, columns)
        )
        table.fill(rows, int(table.same))
        if table.same:
            rows[:, 0] = np.arange(len(rows))
        torch.save(torch.from_numpy(rows), temporary)


def _write_json(out: Path, table: _Table) -> None:
    with atomic_text(out) as file:
        for number, (uuid, found) in enumerate(table.pairs()):
            names = json.dumps([name for name, _ in found])
            file.write(f"{',' if number else '{'}\n{json.dumps(uuid)}: {names}")
        file.write("\n}\n")


def _write_csv(out: Path, table: _Table) -> None:
    rows = ([uuid, name, repr(score)] for uuid, found in table.pairs() for name, score in found)
    write_rows(out, itertools.chain([["query_id", "reference_id", "score"]], rows))


_WRITERS = dict(zip(FORMS, (_write_npy, _write_json, _write_csv, _write_pth), strict=True))
