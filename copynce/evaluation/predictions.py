"""Predictions and candidate pairs as files, in every form that the challenge and the released code have.

    scores, .csv          query_id,reference_id,score                         the challenge's; the header is optional
    scores, .json         [[query, [[reference, score], ...]], ...]           the released code's, each list best first
    candidates, .csv      query_id,reference_id
    candidates, .json     as scores; what stands beside the reference is ignored

A file is read as JSON if it is called .json or begins with a bracket, else as CSV; it is written as its suffix says.
Files are read in pieces and ids that repeat are kept once: 10 million pairs take about a gigabyte.
"""

from __future__ import annotations

import codecs
import itertools
import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from copynce.data.rows import read_column_blocks, read_rows, write_columns
from copynce.errors import DataError
from copynce.evaluation.metrics import Predictions, PredictionsLike, as_predictions
from copynce.files import atomic_text

_HEADER = ("query_id", "reference_id", "score")
_PIECE = 2**20  # characters of a JSON file that are read at once, at least
_PAIRS = 'expected [["Q1", [["R1", 0.9], ...]], ...]'


class Candidates(NamedTuple):
    """Pairs to be matched: query `queries[i]` with reference `references[i]`, each pair once. Arrays of str objects."""

    queries: NDArray[Any]
    references: NDArray[Any]


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
    """Writes `predictions` to `path`, in the form of its suffix (.json, or CSV); it appears only when it is complete.

    Scores keep all digits (the challenge's own writer keeps six decimals, which makes ties): reading the file gives
    the same metrics to the last digit. In JSON queries stand in the order in which they first appear, each one's
    references by decreasing score.
    """
    columns = as_predictions(predictions)
    if Path(path).suffix.lower() == ".json":
        with atomic_text(path) as file:
            _write_json(file, columns)
        return
    queries, references, scores = (column.tolist() for column in columns)
    write_columns(path, _HEADER, [map(str, queries), map(str, references)], scores)


def write_candidates(path: str | os.PathLike[str], candidates: Candidates) -> None:
    """Writes `candidates` to `path`, in the form of its suffix: CSV, or JSON with the score 0 for all."""
    if Path(path).suffix.lower() == ".json":
        with atomic_text(path) as file:
            _write_json(file, Predictions(*candidates, np.zeros(len(candidates.queries))))
        return
    write_columns(path, _HEADER[:2], [map(str, column.tolist()) for column in candidates])


def read_predictions(
    path: str | os.PathLike[str],
    *,
    merge: bool = False,
    queries: Collection[str] | None = None,
    references: Collection[str] | None = None,
) -> Predictions:
    """The predictions of the file `path`, in any form of scores; higher scores are better.

    In a CSV the header is optional; where there is one, columns may stand in any order, and others beside them.
    merge: keep the highest score of a pair that is given more than once; without it such a pair is an error.
    queries, references: the ids that there are; any other is an error. None: ids are not checked.
    Raises DataError naming file and line (in JSON the query too): a malformed line, a score that is not finite, an
    empty or unknown id, a pair given twice, an empty file (one of the header alone, or [], holds no predictions).
    """
    read = _read(Path(path), _HEADER, queries, references)
    if not read.rows and not read.path.stat().st_size:
        raise DataError(f"{path}: the file is empty; expected lines query_id,reference_id,score, or JSON")
    pairs = read.pairs(np.concatenate([*read.scores, np.empty(0)]))
    kept = pairs.distinct()
    if len(kept) < read.rows and not merge:
        read.complain_of_repeated(kept)
    return pairs.select(kept).predictions()


def read_candidates(
    path: str | os.PathLike[str],
    *,
    queries: Collection[str] | None = None,
    references: Collection[str] | None = None,
) -> Candidates:
    """The candidate pairs of the file `path`, in any form of candidates or scores; a repeated pair counts once.

    queries, references: the ids that there are; any other is an error. None: ids are not checked.
    Raises DataError naming file and line: a malformed line, an empty or unknown id, a file without any pair.
    """
    read = _read(Path(path), _HEADER[:2], queries, references)
    if not read.rows:
        raise DataError(f"{path}: no candidate pair in this file; expected lines query_id,reference_id, or JSON")
    pairs = read.pairs(np.zeros(read.rows))
    pairs = pairs.select(pairs.distinct())
    return Candidates(pairs.ids(0), pairs.ids(1))


def merge_predictions(predictions: Sequence[PredictionsLike], k: int | None = None) -> Predictions:
    """All of the `predictions` together: each pair once with its highest score, the `k` best of each query.

    Queries stand in the order in which they first appear, each one's predictions by decreasing score, equal ones as
    given. None for `k`: all. Raises ValueError for k < 1.
    """
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    tables: tuple[dict[Any, int], dict[Any, int]] = {}, {}
    sides: tuple[list[NDArray[np.int32]], list[NDArray[np.int32]]] = [], []
    scores = [np.empty(0)]
    for part in map(as_predictions, predictions):
        for ids, table, side in zip(part[:2], tables, sides, strict=True):
            side.append(_places(ids.tolist(), table))
        scores.append(part.scores)
    empty = np.empty(0, np.int32)
    pairs = _Pairs(
        tables, (np.concatenate([*sides[0], empty]), np.concatenate([*sides[1], empty])), np.concatenate(scores)
    )
    pairs = pairs.select(pairs.distinct())
    query = pairs.places[0]
    order = np.lexsort((-pairs.scores, query))  # stable
    if k is not None:
        query = query[order]
        order = order[np.arange(len(query)) - np.searchsorted(query, query) < k]
    return pairs.select(order).predictions()


def best_of_all(predictions: Predictions, count: int | None) -> Predictions:
    """The `count` predictions of the highest scores over all queries, the first of equal ones, in their order."""
    if count is None or count >= len(predictions.scores):
        return predictions
    kept = np.sort(np.argsort(-predictions.scores, kind="stable")[:count])
    return Predictions(*(column[kept] for column in predictions))


def _places(ids: Sequence[Any], table: dict[Any, int]) -> NDArray[np.int32]:
    """The place of each id in `table`, to which those are added that it lacks."""
    return np.fromiter((table.setdefault(one, len(table)) for one in ids), np.int32, len(ids))


class _Pairs(NamedTuple):
    """Scored pairs whose ids are places in tables, so that each id is kept once and pairs are compared as numbers."""

    tables: tuple[dict[Any, int], dict[Any, int]]
    places: tuple[NDArray[np.int32], NDArray[np.int32]]  # [N] of queries and references
    scores: NDArray[np.float64]

    def distinct(self) -> NDArray[np.int64]:
        """The rows that stay where each pair counts once: the one with its highest score, the first of equal ones."""
        key = self.places[0].astype(np.int64) << 32 | self.places[1]
        ascending = np.sort(key)
        if not np.any(ascending[1:] == ascending[:-1]):
            return np.arange(len(key))
        order = np.lexsort((-self.scores, key))  # stable
        key = key[order]
        return np.sort(order[np.r_[True, key[1:] != key[:-1]]])

    def select(self, rows: NDArray[np.int64]) -> _Pairs:
        if len(rows) == len(self.scores) and np.array_equal(rows, np.arange(len(rows))):
            return self
        return _Pairs(self.tables, (self.places[0][rows], self.places[1][rows]), self.scores[rows])

    def ids(self, side: int) -> NDArray[Any]:
        """[N] the ids of one side, object."""
        names = np.empty(len(self.tables[side]), object)
        names[:] = list(self.tables[side])
        return names[self.places[side]]

    def predictions(self) -> Predictions:
        """As `Predictions`, of pairs that are distinct."""
        return Predictions.of_distinct(self.ids(0), self.ids(1), self.scores, self.tables[0], self.places[0])


@dataclass
class _Read:
    """The pairs of a file as they are read: ids as places in tables, so that each is kept once."""

    path: Path
    lines: list[Sequence[int] | NDArray[np.int64]] = field(default_factory=list)
    sides: tuple[list[NDArray[np.int32]], list[NDArray[np.int32]]] = field(default_factory=lambda: ([], []))
    tables: tuple[dict[str, int], dict[str, int]] = field(default_factory=lambda: ({}, {}))
    scores: list[NDArray[np.float64]] = field(default_factory=list)
    rows: int = 0

    def add(
        self,
        lines: Sequence[int] | NDArray[np.int64],
        queries: Sequence[str],
        references: Sequence[str],
        scores: NDArray[np.float64] | None,
        known: Sequence[Collection[str] | None],
        texts: Sequence[str] | None = None,
    ) -> None:
        """One more block. Raises DataError for an empty id, one that is not `known`, or a score that is not finite."""
        for side, (role, ids) in enumerate((("query", queries), ("reference", references))):
            table = self.tables[side]
            before = len(table)
            places = _places(ids, table)
            for one in list(itertools.islice(reversed(table), len(table) - before))[::-1]:
                there = known[side]
                if not one or (there is not None and one not in there):
                    line = self._line(lines, ids.index(one))
                    if not one:
                        raise DataError(f"{line}: the {role}'s id is empty")
                    assert there is not None
                    raise DataError(f"{line}: {role} {one!r} is not among the {len(there)} {_PLURAL[role]}")
            self.sides[side].append(places)
        if scores is not None:
            broken = np.flatnonzero(~np.isfinite(scores))
            if len(broken):
                i = int(broken[0])
                shown = scores[i] if texts is None else texts[i]
                raise DataError(
                    f"{self._line(lines, i)}: the score must be finite, got {shown} (query {queries[i]!r}, "
                    f"reference {references[i]!r}); leave out what was not found"
                )
            self.scores.append(scores)
        self.lines.append(lines)
        self.rows += len(lines)

    def pairs(self, scores: NDArray[np.float64]) -> _Pairs:
        empty = np.empty(0, np.int32)
        return _Pairs(
            self.tables, (np.concatenate([*self.sides[0], empty]), np.concatenate([*self.sides[1], empty])), scores
        )

    def complain_of_repeated(self, kept: NDArray[np.int64]) -> None:
        """DataError for the first pair that is not among the rows `kept`: it is given twice."""
        query, reference = (np.concatenate(side) for side in self.sides)
        one = int(np.setdiff1d(np.arange(self.rows), kept, assume_unique=True)[0])
        same = np.flatnonzero((query == query[one]) & (reference == reference[one]))
        lines = np.concatenate([np.asarray(block) for block in self.lines])
        names = [list(table)[column[one]] for table, column in zip(self.tables, (query, reference), strict=True)]
        repeated = self.rows - len(kept)
        raise DataError(
            f"{self.path}, line {lines[same[1]]}: query {names[0]!r} with reference {names[1]!r} is given twice, first "
            f"on line {lines[same[0]]}" + (f" ({repeated} such lines)" if repeated > 1 else "") + "; each pair has one "
            "score; merge them by their maximum first"
        )

    def _line(self, lines: Sequence[int] | NDArray[np.int64], row: int) -> str:
        return f"{self.path}, line {lines[row]}"


_PLURAL = {"query": "queries", "reference": "references"}


def _read(
    path: Path, names: Sequence[str], queries: Collection[str] | None, references: Collection[str] | None
) -> _Read:
    """The rows of any form; `names` are the columns that are needed."""
    known = [None if ids is None else ids if isinstance(ids, (set, frozenset, dict)) else set(ids)
             for ids in (queries, references)]  # fmt: skip
    read = _Read(path)
    if _is_json(path):
        for line, query, found in _json_entries(path):
            count = len(found)
            try:
                ids = [reference for reference, _ in found]
                scores = [score for _, score in found]
            except (TypeError, ValueError) as error:
                raise DataError(f"{path}, line {line}: query {query!r} must have a list of pairs; {_PAIRS}") from error
            for wrong in (one for one in ids if not isinstance(one, str)):
                raise DataError(f"{path}, line {line}, query {query!r}: ids are text in quotes, got {wrong!r}")
            numbers = None
            if len(names) == 3:
                for wrong in (one for one in scores if type(one) not in (float, int)):
                    raise DataError(f"{path}, line {line}, query {query!r}: a score must be a number, got {wrong!r}")
                numbers = np.array(scores, np.float64)
            read.add(np.full(count, line), [query] * count, ids, numbers, known)
        return read
    for lines, columns in read_column_blocks(path, _columns_of(path, names)):
        numbers = None
        if len(names) == 3:
            try:
                numbers = np.fromiter(map(float, columns[2]), np.float64, len(lines))
            except ValueError:
                row = next(i for i, text in enumerate(columns[2]) if not _is_number(text))
                raise DataError(
                    f"{path}, line {lines[row]}: expected query_id,reference_id,score with a score such as 0.9, got "
                    f"{[column[row] for column in columns]}"
                ) from None
        read.add(lines, columns[0], columns[1], numbers, known, columns[2] if len(names) == 3 else None)
    return read


def _columns_of(path: Path, names: Sequence[str]) -> Sequence[str]:
    """`names`, or all three where candidates are asked for and the file has scores beside them."""
    if len(names) == len(_HEADER):
        return names
    _, first = next(read_rows(path), (1, []))
    header = [text.strip().casefold() for text in first]
    scored = _HEADER[2] in header if _HEADER[0] in header else len(first) == len(_HEADER)
    return _HEADER if scored else names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_json(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in (".json", ".csv"):
        return suffix == ".json"
    try:
        with path.open("rb") as file:
            return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"[", b"{")
    except OSError:
        return False  # the reader of CSV says what is wrong


def _json_entries(path: Path) -> Iterator[tuple[int, str, list[Any]]]:
    """(line, query, its pairs) of one entry of the list after the other; DataError where the file is no such list."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            text = _JsonText(path, file)
            text.take("[")
            first = True
            while text.next() != "]":
                if not first:
                    text.take(",")
                first = False
                line, entry = text.entry()
                if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
                        and isinstance(entry[1], list)):  # fmt: skip
                    raise DataError(f"{path}, line {line}: an entry must be a query and its list; {_PAIRS}")
                yield line, entry[0], entry[1]
            text.take("]")
            text.end()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


class _JsonText:
    """A JSON list in a file, of which a piece at a time is in memory."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path = path
        self._file = file
        self._text = ""
        self._at = 0  # what stands before has been read
        self._counted = 0  # line ends before this place are in `_line`
        self._line = 1
        self._decoder = json.JSONDecoder()

    def next(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._fill():
                return ""

    def take(self, mark: str) -> None:
        if (found := self.next()) != mark:
            what = repr(found) if found else "the end of the file"
            raise self._error(f"expected {mark!r}, got {what}")
        self._at += 1

    def entry(self) -> tuple[int, Any]:
        """(line, value) of the list or other value that comes next."""
        self.next()
        line = self._count(self._at)
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._fill():
                    self._count(min(error.pos, len(self._text)))
                    raise self._error(error.msg) from error
            except RecursionError as error:
                raise self._error("lists in lists without end") from error
            else:
                return line, value

    def end(self) -> None:
        if self.next():
            raise self._error("more after the end of the list")

    def _count(self, place: int) -> int:
        self._line += self._text.count("\n", self._counted, place)
        self._counted = place
        return self._line

    def _fill(self) -> bool:
        """Read at least as much again as waits, so that a long entry is not tried too often."""
        self._count(self._at)
        rest = self._text[self._at :]
        more = self._file.read(max(_PIECE, len(rest)))
        self._text, self._at, self._counted = rest + more, 0, 0
        return bool(more)

    def _error(self, what: str) -> DataError:
        line = self._count(max(self._at, self._counted))
        return DataError(f"{self._path}, line {line}: not a JSON list of predictions ({what}); {_PAIRS}")


def _write_json(file: TextIO, predictions: Predictions) -> None:
    names, query = predictions._distinct.names, predictions._distinct.query
    order = np.lexsort((-predictions.scores, query))  # stable
    bounds = np.searchsorted(query[order], np.arange(len(names) + 1))
    file.write("[")
    for i, name in enumerate(names):
        rows = order[bounds[i] : bounds[i + 1]]
        references, scores = predictions.references[rows].tolist(), predictions.scores[rows].tolist()
        pairs = [[str(reference), score] for reference, score in zip(references, scores, strict=True)]
        file.write((",\n" if i else "") + json.dumps([str(name), pairs]))
    file.write("]\n")
