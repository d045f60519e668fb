"""The table of an index, on LanceDB: rows by path, transactions, versions, compaction.

Every change is one transaction of Lance: new files are written, then one small file makes them the newest version. A
writer that is killed before leaves the version before. The path is the table's primary key, so two writers who bring
the same file at once are a conflict, which the later one settles by replacing the row: no path is there twice.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from copynce.errors import DataError, WriteError
from copynce.index.lock import IndexLock

#: The form of the table, as a number; a reader of a lower one refuses.
FORMAT = 1

#: The key under which `note` leaves what the first descriptors were computed in.
PRECISION = "copynce.precision"

_TABLE = "pictures"
_FORMAT, _MODEL = b"copynce.format", b"copynce.model"
_KEY = {"lance-schema:unenforced-primary-key": "true"}
_TRIES = 12  # of a transaction that others come before
_CHUNK = 1000  # paths that one condition names
_KEPT = timedelta(hours=1)  # old versions, while others may be reading them
#: Fragments from which they are joined: each transaction makes one, and joining rewrites what is small.
MANY_FRAGMENTS = 32


def is_index(place: str) -> bool:
    """Whether a path or an address is meant for an index rather than for pictures."""
    return "://" in place or (Path(place) / f"{_TABLE}.lance").is_dir()


class PictureTable:
    """The rows of an index, each a picture, and the card of the model that described them all.

    place: the index, a folder or an address that LanceDB knows. Not for several threads at once.
    """

    def __init__(self, place: str, table: Any, lock: IndexLock) -> None:
        self.place = place
        self._table = table
        self._lock = lock
        metadata = table.schema.metadata or {}
        if _FORMAT not in metadata or _MODEL not in metadata:
            raise DataError(f"{place}: its table {_TABLE!r} was not made by copynce")
        form = int(metadata[_FORMAT])
        if form > FORMAT:
            raise DataError(f"{place}: an index of format {form}, and this copynce knows {FORMAT}; take a newer one")
        #: As `copynce.model.Model.card` gave it when the index was begun.
        self.model: dict[str, Any] = json.loads(metadata[_MODEL])

    @classmethod
    def open(cls, place: str) -> PictureTable | None:
        """The table of the index; None if there is none. DataError for a place that holds something else."""
        folder = None if "://" in place else Path(place)
        if folder is not None and folder.exists() and not folder.is_dir():
            raise DataError(f"{place}: a file, expected the folder of an index")
        if folder is not None and not (folder / f"{_TABLE}.lance").is_dir():
            return None
        lock = IndexLock(folder)
        try:
            with lock.shared():
                return cls(place, lancedb.connect(place).open_table(_TABLE), lock)
        except DataError:
            raise
        except Exception as error:
            if "was not found" in str(error):
                return None
            raise DataError(f"{place}: the index cannot be opened: {_first_line(error)}") from error

    @classmethod
    def create(cls, place: str, model: dict[str, Any], descriptor: str) -> PictureTable:
        """A new table; the one that is there if another process was faster. descriptor: float32 or float16."""
        metadata = {_FORMAT: str(FORMAT).encode(), _MODEL: json.dumps(model).encode()}
        numbers = {"float32": pa.float32(), "float16": pa.float16()}[descriptor]
        schema = pa.schema(
            [
                pa.field("id", pa.string(), nullable=False),
                pa.field("path", pa.string(), nullable=False, metadata=_KEY),
                pa.field("sha256", pa.string(), nullable=False),
                pa.field("size", pa.int64(), nullable=False),
                pa.field("mtime_ns", pa.int64(), nullable=False),
                pa.field("width", pa.int32(), nullable=False),
                pa.field("height", pa.int32(), nullable=False),
                pa.field("taken", pa.timestamp("s")),
                pa.field("descriptor", pa.list_(numbers, model["dim"]), nullable=False),
                pa.field("model", pa.string(), nullable=False),
            ],
            metadata=metadata,
        )
        try:
            if "://" not in place:
                os.makedirs(place, exist_ok=True)
            lancedb.connect(place).create_table(_TABLE, schema=schema)
        except Exception as error:
            if "already exists" not in str(error):
                raise WriteError(f"{place}: the index cannot be made: {_first_line(error)}") from error
        found = cls.open(place)
        if found is None:
            raise WriteError(f"{place}: the index was made, but is not to be seen")
        return found

    @property
    def schema(self) -> pa.Schema:
        return self._table.schema

    @property
    def version(self) -> int:
        return int(self._table.version)

    def __len__(self) -> int:
        return int(self._table.count_rows())

    def working(self) -> AbstractContextManager[None]:
        """A block of reading or writing, while which nobody removes what it needs."""
        return self._lock.shared()

    def refresh(self) -> None:
        """Go to the newest version."""
        self._table.checkout_latest()

    def columns(self, names: Sequence[str], where: str | None = None) -> pa.Table:
        """These columns of all rows, or of those where an SQL condition holds."""
        query = self._table.search().select(list(names))
        return (query if where is None else query.where(where)).to_arrow()

    def rows_of(self, paths: pa.Array, names: Sequence[str] | None = None) -> pa.Table:
        """The rows of these paths, whole or some columns."""
        chosen = self.schema.names if names is None else names
        found = [self.columns(chosen, _among(part)) for part in _parts(paths)]
        return pa.concat_tables(found) if found else self.schema.empty_table().select(chosen)

    def descriptors(self) -> tuple[pa.Table, NDArray[np.floating]]:
        """(columns id and path, descriptors [N, D] in the order of the same rows)."""
        stored = self.schema.field("descriptor").type
        found = np.empty((len(self), stored.list_size), stored.value_type.to_pandas_dtype())
        rest: list[pa.RecordBatch] = []
        at = 0
        # By batches, so that one copy is in memory and not two.
        for batch in self._table.search().select(["id", "path", "descriptor"]).to_batches():
            found[at : at + len(batch)] = as_matrix(batch.column("descriptor"))
            rest.append(batch.select(["id", "path"]))
            at += len(batch)
        assert at == len(found), "rows of one version"
        return pa.Table.from_batches(rest, self.schema_of(["id", "path"])), found

    def schema_of(self, names: Sequence[str]) -> pa.Schema:
        return pa.schema([self.schema.field(name) for name in names], metadata=self.schema.metadata)

    def put(self, rows: pa.Table) -> None:
        """One transaction: the rows take the place of those with their paths, or are new. On the disk when it returns.

        Raises WriteError if the disk takes no more, or others were faster again and again.
        """
        merge = self._table.merge_insert("path").when_matched_update_all().when_not_matched_insert_all()
        self._commit(lambda: merge.execute(rows.cast(self.schema), timeout=timedelta(minutes=10)))

    def delete(self, paths: pa.Array) -> int:
        """How many of these rows were there and are removed; a transaction for every thousand."""
        removed = 0
        for part in _parts(paths):
            removed += int(self._commit(partial(self._table.delete, _among(part))).num_deleted_rows)
        return removed

    def _commit(self, change: Callable[[], Any]) -> Any:
        for attempt in range(_TRIES):
            try:
                self.refresh()
                return change()
            except Exception as error:
                if not _lost_a_race(error) or attempt == _TRIES - 1:
                    raise WriteError(f"{self.place}: a change could not be written: {_first_line(error)}") from error
                time.sleep(random.uniform(0, 0.05 * 2 ** min(attempt, 6)))
        raise AssertionError("the last try returns or raises")

    def compact(self) -> None:
        """Join small fragments, apply deletions, bring an IVF-PQ index up to date, remove old versions: all of them and
        what killed writers left if nobody else is at work, else those of more than an hour ago."""
        with self._lock.alone() as alone:
            try:
                self.refresh()
                self._table.optimize(
                    cleanup_older_than=timedelta(milliseconds=1) if alone else _KEPT, delete_unverified=alone
                )
            except Exception as error:
                if not _lost_a_race(error):
                    raise WriteError(f"{self.place} could not be compacted: {_first_line(error)}") from error
        self.refresh()

    def fragments(self) -> int:
        return int(self._stats()["fragment_stats"]["num_fragments"])

    def versions(self) -> int:
        return len(self._table.list_versions())

    def bytes(self) -> int:
        """Of all files; of the newest version alone where the place is no folder."""
        if "://" in self.place:
            return int(self._stats()["total_bytes"])
        sizes = 0
        for folder, _, names in os.walk(self.place):
            for name in names:
                try:
                    sizes += os.lstat(os.path.join(folder, name)).st_size
                except FileNotFoundError:  # another process is at work
                    continue
        return sizes

    def _stats(self) -> dict[str, Any]:
        found = self._table.stats()
        return found if isinstance(found, dict) else dict(found)

    @property
    def engine(self) -> Any:
        """LanceDB's table, for what is searched there."""
        return self._table

    def noted(self) -> dict[str, str]:
        """What `note` left."""
        metadata = self.schema.field("descriptor").metadata or {}
        return {key.decode(): value.decode() for key, value in metadata.items()}

    @property
    def precision(self) -> Literal["fp32", "bf16"] | None:
        """What the first descriptors were computed in; None before them."""
        found = self.noted().get(PRECISION)
        return None if found is None else "bf16" if found == "bf16" else "fp32"

    def note(self, facts: dict[str, str]) -> None:
        """Leave facts on the descriptors in the table, in a transaction."""
        self._commit(lambda: self._table.update_field_metadata({"path": "descriptor", "metadata": facts}))
        self.refresh()


def as_matrix(column: pa.Array | pa.ChunkedArray) -> NDArray[np.floating]:
    """A column of descriptors as [N, D]."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), column.type.list_size)


def _parts(paths: pa.Array) -> Iterator[pa.Array]:
    for start in range(0, len(paths), _CHUNK):
        yield paths.slice(start, _CHUNK)


def _among(paths: pa.Array) -> str:
    """The SQL condition that a row's path is one of these."""
    quoted = pc.replace_substring(paths, "'", "''").to_pylist()
    return "path IN ('" + "', '".join(quoted) + "')"


def _lost_a_race(error: Exception) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("conflict", "concurrent", "contention", "retryable"))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
