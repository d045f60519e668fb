"""Pair sources: which pictures make the pairs of a step, and with which edit programs (PROTOCOLS 6.3 and 11).

A source says which pairs each of its items gives in an epoch; :class:`PairSampler` deals the items out to ranks and
steps. Everything follows from (seed, epoch, uuid) by hash, never from the number of workers or from what came before,
so a run that continues in the middle of an epoch sees the batches that it would have seen.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from copynce.data.layouts import GroundTruth
from copynce.data.manifest import Manifest
from copynce.data.neighbours import Neighbours
from copynce.data.tables import SharedArray
from copynce.errors import DataError
from copynce.pixtrace import EditProgram, Policy, sample_program
from dali_pipelines import Pair

#: Share of the matcher's pairs that are positive; of its negative pairs, the share whose query is a mined neighbour,
#: and the share whose query is edited.
POSITIVE_SHARE, HARD_SHARE, EDITED_SHARE = 0.3, 0.5, 0.5

_PLAIN = EditProgram()


class PairSource(Protocol):
    """What :class:`PairSampler` deals out: ``len(source)`` items of ``pairs_per_item`` pairs each."""

    @property
    def pictures(self) -> Manifest:
        """The pictures from which edits choose others."""

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """All lists of pictures that pairs come from."""

    @property
    def pairs_per_item(self) -> int:
        """Pairs in every item."""

    @property
    def fingerprint(self) -> str:
        """A hash of which pictures it deals out, and in which order: of their names, not of where they lie."""

    def __len__(self) -> int:
        """The number of items."""

    def item(self, index: int, epoch: int) -> list[Pair]:
        """The pairs of item ``index`` in ``epoch``."""

    def substitute(self, broken: Pair, attempt: int) -> Pair:
        """The pair in the place of one with a broken picture, of the same kind and edits; ``attempt`` counts from 1."""


@dataclasses.dataclass(frozen=True)
class DescriptorPairs:
    """Positive pairs (edited A, A), and with mined ``neighbours`` (edited B, B) too, B being one of A's.

    An item is a picture A of ``manifest``; ``policy`` is a name or a :class:`copynce.pixtrace.Policy`. A picture
    without neighbours gets a random other one as B. Raises DataError if there is no other picture.
    """

    manifest: Manifest
    policy: str | Policy
    seed: int
    neighbours: Neighbours | None = None

    def __post_init__(self) -> None:
        if self.neighbours is not None:
            _require_others(self.manifest)

    @property
    def pictures(self) -> Manifest:
        return self.manifest

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        return (self.manifest,)

    @property
    def pairs_per_item(self) -> int:
        return 1 if self.neighbours is None else 2

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.manifest.uuids, *_sampled(self.neighbours))

    def __len__(self) -> int:
        return len(self.manifest)

    def item(self, index: int, epoch: int) -> list[Pair]:
        uuid = self.manifest.uuids[index]
        pairs = [_positive(self.manifest, index, sample_program(self.policy, seed=self.seed, epoch=epoch, uuid=uuid))]
        if self.neighbours is not None:
            (which,) = _uniforms(1, self.seed, epoch, "neighbour of", uuid)
            other = _neighbour(self.neighbours, index, which)
            # Named by both: B is edited in another way where it is an A, or the neighbour of another A.
            name = f"{uuid}/{self.manifest.uuids[other]}"
            program = sample_program(self.policy, seed=self.seed, epoch=epoch, uuid=name)
            pairs.append(_positive(self.manifest, other, program))
        return pairs

    def substitute(self, broken: Pair, attempt: int) -> Pair:
        (which,) = _uniforms(1, self.seed, attempt, "instead of", broken.uuid)
        return _positive(self.manifest, int(which * len(self.manifest)), broken.query_program)


@dataclasses.dataclass(frozen=True)
class MatcherPairs:
    """Positive pairs (edited A, A) with probability 0.3, else negative ones (Q, A), half of them with Q edited.

    An item is a picture A of ``manifest``. Q is one of A's mined ``neighbours`` with probability 0.5, else, or where
    there are none, a random other picture. ``policy`` as in :class:`DescriptorPairs`. Raises DataError if there is no
    other picture.
    """

    manifest: Manifest
    policy: str | Policy
    seed: int
    neighbours: Neighbours | None = None
    pairs_per_item: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _require_others(self.manifest)

    @property
    def pictures(self) -> Manifest:
        return self.manifest

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        return (self.manifest,)

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.manifest.uuids, *_sampled(self.neighbours))

    def __len__(self) -> int:
        return len(self.manifest)

    def item(self, index: int, epoch: int) -> list[Pair]:
        uuid = self.manifest.uuids[index]
        positive, hard, which, edited = _uniforms(4, self.seed, epoch, "matcher", uuid)
        copied = positive < POSITIVE_SHARE
        program = _PLAIN
        if copied or edited < EDITED_SHARE:
            program = sample_program(self.policy, seed=self.seed, epoch=epoch, uuid=uuid)
        return [_positive(self.manifest, index, program) if copied else self._negative(index, hard, which, program)]

    def _negative(self, index: int, hard: float, which: float, program: EditProgram) -> Pair:
        if self.neighbours is not None and hard < HARD_SHARE:
            other = _neighbour(self.neighbours, index, which)
        else:
            other = _other(len(self.manifest), index, which)
        paths = self.manifest.paths
        return Pair(paths[other], program, paths[index], _PLAIN, False, self.manifest.uuids[index])

    def substitute(self, broken: Pair, attempt: int) -> Pair:
        picture, hard, which = _uniforms(3, self.seed, attempt, "instead of", broken.uuid)
        index = int(picture * len(self.manifest))
        if broken.positive:
            return _positive(self.manifest, index, broken.query_program)
        if attempt % 2:  # perhaps only the query is broken: the same reference with another one
            index = self.manifest.uuids.index(broken.uuid)
        return self._negative(index, hard, which, broken.query_program)


@dataclasses.dataclass(frozen=True)
class SupervisedPairs:
    """Queries with the references that they are known to copy; which pixels is not known, so the pairs are not traced.

    An item is a query of ``queries`` with at least one reference in ``ground_truth``, of which an epoch shows one. The
    query is edited by ``policy`` with probability ``augment_probability``, else shown as it is, as the reference is.
    Raises DataError if the ground truth speaks of absent pictures, or of no copy.
    """

    queries: Manifest
    references: Manifest
    ground_truth: dataclasses.InitVar[GroundTruth]
    policy: str | Policy
    seed: int
    augment_probability: float = 0.0
    pairs_per_item: ClassVar[int] = 1
    #: The query of each item and where its references end in ``copied``, both as indices: int64 [items + 1, 2], the
    #: first row being 0.
    items: SharedArray = dataclasses.field(init=False, repr=False, compare=False)
    copied: SharedArray = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self, ground_truth: GroundTruth) -> None:
        if not 0 <= self.augment_probability <= 1:
            raise ValueError(f"augment_probability must be in [0, 1], got {self.augment_probability}")
        rows = {uuid: i for i, uuid in enumerate(self.references.uuids)}
        known = set(self.queries.uuids)
        for query, references in ground_truth.items():
            if references and query not in known:
                raise DataError(f"{self.queries.root}: query {query!r} of the ground truth is not among the queries")
            absent = [reference for reference in references if reference not in rows]
            if absent:
                raise DataError(
                    f"{self.references.root}: reference {absent[0]!r}, which query {query!r} copies, is not among the "
                    f"{len(rows)} references"
                )
        items, copied = [(0, 0)], list[int]()
        for i, uuid in enumerate(self.queries.uuids):
            found = [rows[reference] for reference in ground_truth.get(uuid, ())]
            if found:
                copied += found
                items.append((i, len(copied)))
        if not copied:
            raise DataError(f"{self.queries.root}: the ground truth names no query that copies a reference")
        object.__setattr__(self, "items", SharedArray(np.array(items, np.int64)))
        object.__setattr__(self, "copied", SharedArray(np.array(copied, np.int64)))

    @property
    def pictures(self) -> Manifest:
        return self.references

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        return self.queries, self.references

    @property
    def fingerprint(self) -> str:
        tables = (self.items.values.tobytes().hex(), self.copied.values.tobytes().hex())
        return fingerprint_of(self.references.uuids, self.queries.uuids, tables)

    def __len__(self) -> int:
        return len(self.items.values) - 1

    def item(self, index: int, epoch: int) -> list[Pair]:
        uuid = self.queries.uuids[self.items.values[index + 1, 0]]
        which, edited = _uniforms(2, self.seed, epoch, "supervised", uuid)
        program = _PLAIN
        if edited < self.augment_probability:
            program = sample_program(self.policy, seed=self.seed, epoch=epoch, uuid=uuid)
        return [self._copy(index, which, program)]

    def _copy(self, index: int, which: float, program: EditProgram) -> Pair:
        (_, start), (query, end) = self.items.values[index : index + 2]
        references = self.copied.values[start:end]
        reference = self.references.paths[references[int(which * len(references))]]
        path, uuid = self.queries.paths[query], self.queries.uuids[query]
        return Pair(path, program, reference, _PLAIN, True, uuid, traced=False)

    def substitute(self, broken: Pair, attempt: int) -> Pair:
        item, which = _uniforms(2, self.seed, attempt, "instead of", broken.uuid)
        return self._copy(int(item * len(self)), which, broken.query_program)


@dataclasses.dataclass(frozen=True)
class PairSampler:
    """The batches of one rank: ``parts`` of ``batch_size`` items of ``source`` per rank and step.

    An epoch is one permutation of the items, the same on every rank; each part of a step takes the next ``batch_size *
    world_size`` of them and rank ``r`` every ``world_size``-th, so every rank makes the same number of steps and each
    item is met at most once per epoch; the last partial step is dropped. Raises DataError if the items do not fill one
    step.
    """

    source: PairSource
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    parts: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size must be at least 2 items, other pairs are the negatives; got {self.batch_size}"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, world_size) = [0, {self.world_size}), got {self.rank}")
        if self.parts < 1:
            raise ValueError(f"parts of a step must be at least 1, got {self.parts}")
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{self.source.pictures.root}: one step takes {self.parts * self.batch_size} pictures on each of "
                f"{self.world_size} processes, got {len(self.source)} pictures in all; choose a smaller batch"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full steps in one epoch."""
        return len(self.source) // (self.parts * self.batch_size * self.world_size)

    def batches(self, first_step: int, last_step: int) -> PairBatches:
        """This rank's batches of the global steps [first_step, last_step), counted over all epochs from 0; ``parts`` of
        each step, one after the other."""
        return PairBatches(self, range(first_step * self.parts, last_step * self.parts))

    def batch(self, number: int) -> list[Pair]:
        """This rank's batch ``number``, counted from 0 over the parts of all steps."""
        epoch, within = divmod(number, self.steps_per_epoch * self.parts)
        start = within * self.batch_size * self.world_size + self.rank
        chosen = _permutation(self.seed, epoch, len(self.source))[start:][: self.batch_size * self.world_size]
        return [pair for index in chosen[:: self.world_size].tolist() for pair in self.source.item(index, epoch)]


@dataclasses.dataclass(frozen=True)
class PairBatches(Sequence[list[Pair]]):
    """Some batches of a sampler, by their numbers, each made when it is asked for, in whatever process."""

    sampler: PairSampler
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> list[Pair]: ...
    @overload
    def __getitem__(self, at: slice) -> PairBatches: ...
    def __getitem__(self, at: int | slice) -> list[Pair] | PairBatches:
        if isinstance(at, slice):
            return PairBatches(self.sampler, self.numbers[at])
        return self.sampler.batch(self.numbers[at])


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, items: int) -> NDArray[np.int64]:
    """The order of an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(items)


def _positive(manifest: Manifest, index: int, program: EditProgram) -> Pair:
    """An edited picture, and the picture as it is."""
    path = manifest.paths[index]
    return Pair(path, program, path, _PLAIN, True, manifest.uuids[index])


def _neighbour(neighbours: Neighbours, index: int, which: float) -> int:
    """The mined neighbour of ``index`` that ``which`` in [0, 1) chooses; where there is none, any other picture."""
    found = neighbours.of(index)
    return int(found[int(which * len(found))]) if len(found) else _other(len(neighbours), index, which)


def _other(count: int, index: int, which: float) -> int:
    """The picture but ``index`` that ``which`` in [0, 1) chooses."""
    other = int(which * (count - 1))
    return other + (other >= index)


def _require_others(manifest: Manifest) -> None:
    if len(manifest) < 2:
        raise DataError(f"{manifest.root}: pairs of different pictures need at least 2 pictures, got {len(manifest)}")


def _uniforms(count: int, *key: int | str) -> list[float]:
    """Up to 8 numbers in [0, 1), a hash of ``key``."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(errors="surrogateescape"), digest_size=8 * count).digest()
    return [(int.from_bytes(digest[8 * i : 8 * i + 8], "little") >> 11) * 2.0**-53 for i in range(count)]


def fingerprint_of(*names: Iterable[object]) -> str:
    """A hash of lists of names, of where one ends too."""
    digest = hashlib.sha256()
    for group in names:
        digest.update("\0".join(map(str, group)).encode(errors="surrogateescape") + b"\1")
    return digest.hexdigest()[:16]


def _sampled(neighbours: Neighbours | None) -> Iterator[list[int]]:
    """The neighbours of some 4,096 pictures: a table can be larger than memory."""
    if neighbours is not None:
        for i in range(0, len(neighbours), max(1, len(neighbours) // 4096)):
            yield neighbours.of(i).tolist()
