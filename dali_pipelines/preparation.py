"""Preparing a batch of pairs: its files are read, its programs composed, its tables traced, its inputs packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copynce.pixtrace import trace_pairs
from copynce.pixtrace.view.composed_view import Empty
from dali_pipelines.batch import Pair
from dali_pipelines.options import LoaderOptions
from dali_pipelines.packing import Scene, View, pack_batch
from dali_pipelines.reading import Quarantine, Reader
from dali_pipelines.renderer import Batch
from dali_pipelines.sources import AnyPath, BrokenPicture, EncodedPicture

#: Substitutes tried for one broken pair before giving up: so many broken ones in a row are no accident.
_MAX_SUBSTITUTES = 100


@dataclass(frozen=True)
class PairFacts:
    """What a batch of pairs consists of beside its views; fields as those of :class:`~dali_pipelines.PairBatch`."""

    query_to_reference: NDArray[np.int32]
    reference_to_query: NDArray[np.int32]
    positive: NDArray[np.bool_]
    traced: NDArray[np.bool_]
    uuids: list[str]


@dataclass
class PairPreparation:
    """Prepares batches of pairs, in the loader's process or in a worker; what :meth:`start` makes stays where it is."""

    batches: Any  # a sequence of batches, or (never in a worker) an iterable of them
    pictures: Sequence[AnyPath]
    options: LoaderOptions
    substitute: Callable[[Pair, int], Pair]

    def start(self, report: Callable[[AnyPath, str], None] | None) -> None:
        """Begin in this process; ``report(path, reason)`` takes files that turn out to be broken."""
        self.quarantine = Quarantine(report)
        self.reader = Reader(self.pictures, self.quarantine, self.options)

    def leave_out(self, broken: dict[str, str]) -> None:
        """Files (and why) that others found broken."""
        self.quarantine.learn(broken)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def batch(self, index: int, empty: Empty) -> tuple[Batch[PairFacts], list[object]] | None:
        """Batch ``index`` and what the graph takes of it, without the scenes, of which that was made."""
        prepared = self.prepare(self.batches[index], empty)
        if prepared is None:
            return None
        return dataclasses.replace(prepared, scenes=()), pack_batch(prepared.scenes, self.options.size, empty)

    def prepare(self, pairs: Sequence[Pair], empty: Empty = np.empty) -> Batch[PairFacts] | None:
        """The scenes of a batch, and its facts; ``empty(shape, dtype)`` gives the memory of the tables."""
        if not pairs:
            return None
        grid = (self.options.size, self.options.size)
        scenes, files, shown, composed = [], [], [], []
        for wanted, found in zip(pairs, self.reader.try_all([p.query_path for p in pairs]), strict=True):
            pair, picture, other = self._readable(wanted, found)
            query = pair.query_program.composed(picture.shape, grid)
            reference = pair.reference_program.composed(other.shape, grid)
            query_layers, reference_layers = self.reader.layers(query), self.reader.layers(reference)
            pictures = (picture,) if other is picture else (picture, other)
            views = (
                View(query, 0, tuple(p for _, p in query_layers)),
                View(reference, len(pictures) - 1, tuple(p for _, p in reference_layers)),
            )
            scenes.append(Scene(pictures, views))
            files += [(pair.query_path, picture), (pair.reference_path, other), *query_layers, *reference_layers]
            composed.append((query, reference) if pair.positive and pair.traced else None)
            shown.append(pair)
        tables = empty((len(pairs), *grid), np.int32), empty((len(pairs), *grid), np.int32)
        trace_pairs(composed, grid, *tables)
        facts = PairFacts(
            query_to_reference=tables[0],
            reference_to_query=tables[1],
            positive=np.array([pair.positive for pair in shown]),
            traced=np.array([pair.traced for pair in shown]),
            uuids=[pair.uuid for pair in shown],
        )
        return Batch(scenes, files, facts)

    def _readable(
        self, wanted: Pair, found: EncodedPicture | BrokenPicture
    ) -> tuple[Pair, EncodedPicture, EncodedPicture]:
        """The pair or its first substitute whose files can both be read, and these two (one object if one file).

        ``found`` is what reading the pair's query file gave.
        """
        pair = wanted
        for attempt in range(_MAX_SUBSTITUTES + 1):
            if attempt > 0:
                pair = self.substitute(wanted, attempt)
                (found,) = self.reader.try_all([pair.query_path])
            other = found
            if pair.reference_path != pair.query_path and not isinstance(found, BrokenPicture):
                (other,) = self.reader.try_all([pair.reference_path])
            if isinstance(found, EncodedPicture) and isinstance(other, EncodedPicture):
                return pair, found, other
        assert isinstance(other, BrokenPicture), "else it would have been returned"
        tried = f"{_MAX_SUBSTITUTES} substitutes of pair {wanted.uuid} are broken too, this one was the last"
        raise BrokenPicture(other.path, f"{other.reason}; {tried}")
