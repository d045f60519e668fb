"""What changes an index: files described and put into it, block by block."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from copynce.data import Quarantine
from copynce.errors import DataError
from copynce.index.listing import Listing
from copynce.index.names import restored
from copynce.index.reading import content_hash
from copynce.index.settings import IndexConfig
from copynce.index.table import MANY_FRAGMENTS, PRECISION, PictureTable

if TYPE_CHECKING:  # at once only where there is something to describe: torch takes seconds
    from copynce.index.describing import Described, Describer
    from copynce.model import Model

_COMPACT_AFTER = 64  # transactions of one run


@dataclass(frozen=True)
class Added:
    """What became of the files that an index was given, each counted once.

    new: described for the first time. changed: described anew. unchanged: left as they were. renewed: of an unchanged
    content, but with another time of change or id, which the index now has. broken: [(path, reason)] of those that
    could not be read or decoded.
    """

    new: int
    changed: int
    unchanged: int
    renewed: int
    broken: list[tuple[str, str]]

    def __str__(self) -> str:
        parts = [f"{self.new} new", f"{self.changed} changed", f"{self.unchanged} unchanged"]
        parts += [f"{self.renewed} renewed"] if self.renewed else []
        return ", ".join([*parts, f"{len(self.broken)} broken"])


def add_files(
    table: PictureTable,
    listing: Listing,
    model: Callable[[], Model],
    config: IndexConfig,
    *,
    quarantine: Quarantine,
    describe: Describer | None = None,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Added:
    """Bring the rows of these files up to date, in transactions of at most `config.block` of them.

    model: called once there is something to describe. quarantine: receives what is broken, and may hold some already.
    describe: what describes, none: this process; writing is done here, whoever does. strict: the first broken picture
    ends it with a DataError; what was put before stays. progress: called as progress(done, total), where done are on
    the disk.
    """
    comparison = _compare(table, listing, config)
    _refuse_taken_ids(listing, comparison)
    _renew(table, listing, comparison)
    todo = np.flatnonzero(comparison.new | comparison.changed)
    new = changed = 0
    _stop_if_strict(strict, quarantine)
    if len(todo):
        if describe is None:
            from copynce.index.describing import describe_here

            describe = describe_here
        adding = _Adding(table, listing, todo, model(), config, quarantine, describe, strict, say)
        broken_before = len(quarantine)
        with closing(iter(adding)) as transactions:
            for places in transactions:
                new += int(comparison.new[places].sum())
                changed += int(comparison.changed[places].sum())
                if progress is not None:
                    progress(min(new + changed + len(quarantine) - broken_before, len(todo)), len(todo))
    if table.fragments() >= MANY_FRAGMENTS:
        table.compact()
    unchanged = len(listing) - len(todo) - int(comparison.renewed.sum())
    return Added(new, changed, unchanged, int(comparison.renewed.sum()), quarantine.entries())


@dataclass(frozen=True)
class _Comparison:
    """Which of the listed files need what, bool [N] each; where their rows are in `known`, int64 [N], -1: nowhere."""

    new: NDArray[np.bool_]
    changed: NDArray[np.bool_]
    renewed: NDArray[np.bool_]
    row: NDArray[np.int64]
    known: pa.Table


def _compare(table: PictureTable, listing: Listing, config: IndexConfig) -> _Comparison:
    by_hash, named = config.compare == "hash", listing.ids.null_count < len(listing)
    wanted = ["path", "size", "mtime_ns", *(["sha256"] if by_hash else []), *(["id"] if named else [])]
    known = table.columns(wanted)
    place = pc.index_in(listing.names, value_set=known["path"])
    row = place.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    there = row >= 0
    at = row[there]
    moved = np.zeros(len(listing), bool)  # in size or time
    moved[there] = (known["size"].to_numpy()[at] != listing.size[there]) | (
        known["mtime_ns"].to_numpy()[at] != listing.mtime_ns[there]
    )
    changed, renewed = moved, np.zeros(len(listing), bool)
    if by_hash:
        changed = np.zeros(len(listing), bool)
        places = np.flatnonzero(there)
        hashes = known["sha256"].take(pa.array(at)).to_pylist()
        with ThreadPoolExecutor(config.threads, thread_name_prefix="copynce hashes") as pool:
            found = pool.map(content_hash, [listing.files[i] for i in places])
            changed[places] = [one != other for one, other in zip(found, hashes, strict=True)]
        renewed = moved & ~changed
    if named and len(at):
        ids = listing.ids.filter(pa.array(there))
        other = pc.not_equal(ids, known["id"].take(pa.array(at)).combine_chunks())
        renewed[there] |= other.fill_null(False).to_numpy(zero_copy_only=False)
        renewed &= ~changed
    return _Comparison(~there, changed, renewed, row, known)


def _refuse_taken_ids(listing: Listing, comparison: _Comparison) -> None:
    """DataError if a list calls a file what another file is called."""
    if "id" not in comparison.known.column_names:
        return
    names = listing.ids.drop_null()
    if len(names) > len(names.unique()):
        twice = next(pair["values"] for pair in names.value_counts().to_pylist() if pair["counts"] > 1)
        raise DataError(f"two of the files given are called {twice!r}; ids must differ")
    owner = pc.index_in(listing.ids, value_set=comparison.known["id"]).fill_null(-1).to_numpy(zero_copy_only=False)
    said = listing.ids.is_valid().to_numpy(zero_copy_only=False)
    taken = (owner >= 0) & (owner != comparison.row) & said
    # A list may also give ids to other pictures than before; then the one that had it gets another in the same command.
    given_up = np.isin(owner, comparison.row[said & (comparison.row >= 0)])
    for place in np.flatnonzero(taken & ~given_up)[:1]:
        (path,) = restored(comparison.known["path"].slice(int(owner[place]), 1))
        raise DataError(
            f"{os.fspath(listing.files[place])}: its id {listing.ids[int(place)].as_py()!r} is that of {path} in the "
            "index; remove that one first, or choose another id"
        )


def _renew(table: PictureTable, listing: Listing, comparison: _Comparison) -> None:
    """Give rows of unchanged contents the sizes, times and ids that their files have now."""
    places = np.flatnonzero(comparison.renewed)
    for start in range(0, len(places), 4096):
        part = places[start : start + 4096]
        names = listing.names.take(pa.array(part))
        rows = table.rows_of(names)
        at = part[pc.index_in(rows["path"], value_set=names).to_numpy().astype(np.int64)]
        ids = pc.coalesce(listing.ids.take(pa.array(at)), rows["id"].combine_chunks())
        for name, column in (
            ("id", ids),
            ("size", pa.array(listing.size[at])),
            ("mtime_ns", pa.array(listing.mtime_ns[at])),
        ):
            rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), column)
        table.put(rows)


def _stop_if_strict(strict: bool, quarantine: Quarantine) -> None:
    if strict and len(quarantine):
        path, reason = quarantine.entries()[0]
        raise DataError(f"{path}: {reason}; without --strict it would be skipped and listed")


class _Adding:
    """The files `todo` of a listing, described; iterating gives the places of those that a transaction put."""

    def __init__(
        self,
        table: PictureTable,
        listing: Listing,
        todo: NDArray[np.int64],
        model: Model,
        config: IndexConfig,
        quarantine: Quarantine,
        describe: Describer,
        strict: bool,
        say: Callable[[str], None] | None,
    ) -> None:
        self._table, self._listing, self._todo, self._model, self._config = table, listing, todo, model, config
        self._quarantine, self._describe, self._strict, self._say = quarantine, describe, strict, say

    def __iter__(self) -> Generator[NDArray[np.int64], None, None]:
        waiting: list[Described] = []
        begun, transactions = time.monotonic(), 0

        def put() -> NDArray[np.int64]:
            places = self._todo[np.concatenate([part.places for part in waiting])]
            self._table.put(self._rows(places, waiting))
            waiting.clear()
            return places

        files = [self._listing.files[place] for place in self._todo]
        known = self._table.precision
        parts = self._describe(self._model, files, self._config, known, self._quarantine.add, self._say)
        # Closed where an error ends it: the error's traceback would keep the describer, and what it holds.
        with closing(parts):
            for part in parts:
                _stop_if_strict(self._strict, self._quarantine)
                if known is None:  # the first pictures of all decide
                    known = part.precision
                    self._table.note({PRECISION: known})
                count = sum(len(other.places) for other in waiting)
                if waiting and count + len(part.places) > self._config.block:
                    yield put()
                    count, begun, transactions = 0, time.monotonic(), transactions + 1
                waiting.append(part)
                full = count + len(part.places) >= self._config.block
                if full or time.monotonic() - begun > self._config.block_seconds:
                    yield put()
                    begun, transactions = time.monotonic(), transactions + 1
                if transactions >= _COMPACT_AFTER:
                    self._table.compact()
                    transactions = 0
        _stop_if_strict(self._strict, self._quarantine)
        if waiting:
            yield put()

    def _rows(self, places: NDArray[np.int64], described: list[Described]) -> pa.Table:
        """The rows of the files at these places of the listing."""
        listing = self._listing
        facts = [fact for part in described for fact in part.facts]
        descriptors = np.concatenate([part.descriptors for part in described])
        names, ids = listing.names.take(pa.array(places)), listing.ids.take(pa.array(places))
        stored = self._table.schema.field("descriptor").type
        values = descriptors.astype(stored.value_type.to_pandas_dtype(), copy=False).ravel()
        if ids.null_count:
            # A row that is made anew keeps the id that a list once gave it.
            old = self._table.rows_of(names, ["path", "id"])
            kept = (
                old["id"].take(pc.index_in(names, value_set=old["path"])) if len(old) else pa.nulls(len(ids), ids.type)
            )
            ids = pc.coalesce(ids, kept, names)
        columns = {
            "id": ids,
            "path": names,
            "sha256": pa.array([fact.sha256 for fact in facts]),
            "size": pa.array(listing.size[places]),
            "mtime_ns": pa.array(listing.mtime_ns[places]),
            "width": pa.array([fact.width for fact in facts], pa.int32()),
            "height": pa.array([fact.height for fact in facts], pa.int32()),
            "taken": pa.array([fact.taken for fact in facts], pa.timestamp("s")),
            "descriptor": pa.FixedSizeListArray.from_arrays(pa.array(values), stored.list_size),
            "model": pa.array([self._model.sha256] * len(names)),
        }
        return pa.table(columns)
