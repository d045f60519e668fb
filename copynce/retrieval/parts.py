"""A long search in parts of queries: each a file as soon as it is ready, taken in turns by several processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copynce.errors import DataError
from copynce.files import atomic_text, whole_file
from copynce.retrieval.extract import Processes

_PART = 2_048  # queries of a file
_ENTRY = np.dtype([("score", "<f4"), ("index", "<i8")])


@dataclass(frozen=True)
class Nearest:
    """Neighbours by row: scores float32, indices int64, both [Nq, k]; -inf and -1 where there are fewer."""

    scores: NDArray[np.float32]
    indices: NDArray[np.int64]


class Parts:
    """The `k` neighbours of all `queries` as files of `folder`, which iterates (rows, neighbours) once it is filled."""

    def __init__(self, folder: Path, queries: int, k: int) -> None:
        self.folder, self.k = folder, k
        self._slices = [slice(start, min(start + _PART, queries)) for start in range(0, queries, _PART)]

    def fill(
        self,
        made_from: Mapping[str, Any],
        find: Callable[[slice], Nearest],
        group: Processes,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Find the neighbours of every row, but for those that were found from the same before and are whole.

        made_from: plain values that name what is searched. find: the neighbours of some rows. progress: called with the
        number of queries done by all processes.
        """
        with group.together():
            if group.rank == 0:
                self._prepare({**made_from, "k": self.k, "queries": _PART})
        with group.together():
            for part in range(group.rank, len(self._slices), group.size):
                if not self._path(part).exists():
                    self._write(part, find(self._slices[part]))
                if progress is not None:
                    progress(self._done())

    def __iter__(self) -> Iterator[tuple[slice, Nearest]]:
        for part, rows in enumerate(self._slices):
            table = self._table(part)
            if table is None:
                raise DataError(
                    f"{self._path(part)}: removed or damaged since it was written; the same command makes it anew"
                )
            yield rows, Nearest(np.array(table["score"]), np.array(table["index"]))

    def remove(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _prepare(self, made_from: dict[str, Any]) -> None:
        told, facts = self.folder / "made_from.json", json.dumps(made_from)
        if not told.is_file() or told.read_bytes() != facts.encode():
            self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_text(told) as file:
            file.write(facts)
        for part in range(len(self._slices)):
            if self._table(part) is None:
                self._path(part).unlink(missing_ok=True)  # damaged: found anew

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:06d}.npy"

    def _table(self, part: int) -> NDArray[Any] | None:
        """A part, mapped from its file; None if that is absent or damaged."""
        rows = self._slices[part]
        try:
            table = np.lib.format.open_memmap(self._path(part), "r")
        except (OSError, ValueError, EOFError):
            return None
        fits = table.dtype == _ENTRY and table.shape == (rows.stop - rows.start, self.k)
        return table if fits else None

    def _done(self) -> int:
        return sum(rows.stop - rows.start for part, rows in enumerate(self._slices) if self._path(part).exists())

    def _write(self, part: int, found: Nearest) -> None:
        table = np.empty(found.indices.shape, _ENTRY)
        table["score"], table["index"] = found.scores, found.indices
        with whole_file(self._path(part)) as file:
            np.save(file, table)
