"""Copies among the pictures of one collection: described, their nearest others asked, grouped, each with its source.

files -> one of those with equal bytes -> descriptors -> the k nearest of each -> pairs -> judged (`Ask`)
    -> pairs of pictures that have a copy in common, judged too -> groups by complete link -> likely sources
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from copynce.copies.facts import PictureFacts, likely_source, read_facts
from copynce.copies.groups import complete_groups
from copynce.copies.pair import CopyPair
from copynce.copies.polygons import rectangle
from copynce.copies.regions import CopiedRegion
from copynce.copies.searching import OnBroken, Progress, described
from copynce.index import Index
from copynce.index.listing import File, Listing
from copynce.index.reading import content_hash
from copynce.model import Model
from copynce.retrieval.search import search
from dali_pipelines.sources import AnyPath

#: What judges pairs of places int64 [P, 2]: one answer a pair, in order; None where it is hopeless, or a
#: picture is broken.
Ask = Callable[[NDArray[np.int64]], list[CopyPair | None]]

#: Of pictures that copies connect, up to so many are asked pair by pair where that is needed for their groups.
MANY = 200

_TOGETHER = 16_384  # pairs that are asked together


@dataclass(frozen=True)
class Collection:
    """N pictures to be compared with each other.

    files: paths, or places in shards. size: int64 [N], bytes; changed: int64 [N], time of change in ns. same: int64
    [N], the first place whose file has the same bytes, for most their own. descriptors: float32 [N, D], NaN where a
    picture is broken or `same` is another.
    """

    files: list[File]
    size: NDArray[np.int64]
    changed: NDArray[np.int64]
    same: NDArray[np.int64]
    descriptors: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, place: int) -> str:
        """The path of a picture."""
        return os.fspath(self.files[place])


@dataclass(frozen=True)
class Member:
    """A picture of a group. pair: with the likely source as the reference; where none is known, with the first member;
    None for that one itself. same_bytes: as that one."""

    place: int
    path: str
    facts: PictureFacts
    pair: CopyPair | None
    same_bytes: bool


@dataclass(frozen=True)
class CopyGroup:
    """Copies of each other, the likely source first. source: its path, or None; why: or why there is none, in words.
    probability: of the least probable pair in the group."""

    members: list[Member]
    source: str | None
    why: str
    probability: float


@dataclass(frozen=True)
class Scan:
    """What was found. groups: ordered by their first pictures. pairs: all judged pairs of different bytes that reach
    the threshold, the most probable first. across: those of them whose pictures are not in one group. judged: how many
    pairs were. unfinished: sizes of what was too large to be asked pair by pair (see `MANY`)."""

    groups: list[CopyGroup]
    pairs: list[CopyPair]
    across: list[CopyPair]
    judged: int
    unfinished: list[int]


def collect(
    listing: Listing,
    model: Model,
    on_broken: OnBroken,
    *,
    threads: int = 2,
    progress: Progress | None = None,
) -> Collection:
    """Describe the files of a listing, of those with equal bytes the first. on_broken: told (path, reason) of each
    picture that cannot be read or decoded. progress: called as progress(what, done, total). Two names of one file, by a
    link, count as one picture, by the name that is no link."""
    kept = _one_name_each(listing)
    files, size = [listing.files[place] for place in kept], listing.size[kept]
    same = _same_bytes(files, size, threads)
    todo = np.flatnonzero(same == np.arange(len(files)))
    equal: dict[str, list[str]] = defaultdict(list)
    for place in np.flatnonzero(same != np.arange(len(files))):
        equal[os.fspath(files[same[place]])].append(os.fspath(files[place]))

    def broken(path: AnyPath, reason: str) -> None:
        name = os.fspath(path)
        for one in [name, *equal.get(name, [])]:
            on_broken(one, reason)

    descriptors = np.full((len(files), model.dim), np.nan, np.float32)
    places, rows = described(model, [files[place] for place in todo], "pictures", None, threads, broken, progress)
    descriptors[todo[places]] = rows
    return Collection(files, size, listing.mtime_ns[kept], same, descriptors)


def collect_index(index: Index, on_broken: OnBroken) -> Collection:
    """The pictures of an index, ordered by path. on_broken: told of each that has changed since, or is gone."""
    rows = index.contents()
    stays = np.ones(len(rows.files), bool)
    shards: dict[str, int | None] = {}
    for place, file in enumerate(rows.files):
        reason = _changed(file, int(rows.size[place]), int(rows.mtime_ns[place]), shards)
        if reason is not None:
            on_broken(os.fspath(file), reason)
            stays[place] = False
    kept = np.flatnonzero(stays)
    same, first = np.arange(len(kept)), dict[str, int]()
    for at, place in enumerate(kept.tolist()):
        same[at] = first.setdefault(rows.sha256[place], at)
    descriptors = rows.descriptors[kept].astype(np.float32)
    descriptors[same != np.arange(len(kept))] = np.nan
    return Collection([rows.files[i] for i in kept], rows.size[kept], rows.mtime_ns[kept], same, descriptors)


def scan(collection: Collection, ask: Ask, *, k: int = 10, probability: float = 0.95) -> Scan:
    """Groups of copies: pairs of which `ask` says at least this probability, by complete link, and equal bytes.

    Asked are the k nearest others of each picture, and then all pairs that have a copy in common, so that a group is
    complete however many pictures it has; of more than `MANY` pictures that copies connect, the k nearest alone.
    Raises ValueError for a k below 1 or a probability that is not above 0 and at most 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not 0 < probability <= 1:
        raise ValueError(f"probability must be above 0 and at most 1, got {probability}")
    asked: set[tuple[int, int]] = set()
    copies: dict[tuple[int, int], CopyPair] = {}
    unfinished: list[int] = []
    pairs = nearest_pairs(collection.descriptors, k)
    while len(pairs):
        asked.update(map(tuple, pairs.tolist()))
        for start in range(0, len(pairs), _TOGETHER):  # of most nothing is kept
            part = pairs[start : start + _TOGETHER]
            for (i, j), pair in zip(part.tolist(), ask(part), strict=True):
                if pair is not None and pair.probability >= probability:
                    copies[i, j] = pair
        pairs, unfinished = _with_a_copy_in_common(copies, asked)
    ends = np.array(list(copies), np.int64).reshape(-1, 2)
    groups = complete_groups(len(collection), ends, [pair.probability for pair in copies.values()], probability)
    group_of = {place: number for number, group in enumerate(groups) for place in group}
    across = [pair for (i, j), pair in copies.items() if group_of.get(i, -1) != group_of.get(j, -2)]
    equal: dict[int, list[int]] = defaultdict(list)
    for place, first in enumerate(collection.same.tolist()):
        equal[first].append(place)
    groups += [[place] for place, all_of in equal.items() if len(all_of) > 1 and place not in group_of]
    return Scan(
        [_group(collection, members, equal, copies) for members in sorted(groups)],
        _by_probability(copies.values()),
        _by_probability(across),
        len(asked),
        unfinished,
    )


def nearest_pairs(descriptors: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Pairs (i, j), i < j, int64 [P, 2], each once and in order: a row of `descriptors` [N, D] and one of the k others
    most similar to it. Rows of NaN are in none."""
    places = np.flatnonzero(np.isfinite(descriptors).all(axis=1))
    if len(places) < 2:
        return np.empty((0, 2), np.int64)
    rows = descriptors[places]
    _, found = search(rows, rows, k + 1)
    other = found != np.arange(len(rows))[:, None]
    # Among many equal ones a picture may be missing from its own neighbours: then the last is one too many.
    other &= np.cumsum(other, axis=1) <= k
    row, column = np.nonzero(other)
    pairs = places[np.column_stack([row, found[row, column]])]
    return np.unique(np.sort(pairs, axis=1), axis=0)


def _with_a_copy_in_common(
    copies: Iterable[tuple[int, int]], asked: set[tuple[int, int]]
) -> tuple[NDArray[np.int64], list[int]]:
    """(pairs that have a copy in common and were not asked, as `nearest_pairs`; sizes of what is too large for it)."""
    near: dict[int, set[int]] = defaultdict(set)
    for i, j in copies:
        near[i].add(j)
        near[j].add(i)
    found: set[tuple[int, int]] = set()
    large: list[int] = []
    for connected in _connected(near):
        if len(connected) > MANY:
            large.append(len(connected))
            continue
        for place in connected:
            ordered = sorted(near[place])
            found.update((i, j) for at, i in enumerate(ordered) for j in ordered[at + 1 :] if (i, j) not in asked)
    return np.array(sorted(found), np.int64).reshape(-1, 2), large


def _connected(near: dict[int, set[int]]) -> Iterator[list[int]]:
    seen: set[int] = set()
    for start in near:
        if start in seen:
            continue
        seen.add(start)
        reached = [start]
        for place in reached:  # it grows meanwhile
            new = near[place] - seen
            seen |= new
            reached += new
        yield reached


def _group(
    collection: Collection,
    different: list[int],
    equal: dict[int, list[int]],
    copies: dict[tuple[int, int], CopyPair],
) -> CopyGroup:
    """A group of pictures with `different` bytes and of all with the bytes of one of them."""
    facts = {place: _facts(collection, place) for first in different for place in equal[first]}
    # Of equal bytes any will do, the first to be written rather than another.
    oldest = {first: min(equal[first], key=lambda i: (collection.changed[i], i)) for first in different}
    chosen = [oldest[first] for first in different]
    found = likely_source(
        [facts[place] for place in chosen],
        [collection.name(place) for place in chosen],
        lambda a, b: copies[different[a], different[b]].region,
    )
    first, why = (None, found.why) if found.place is None else (chosen[found.place], found.why)
    if len(different) == 1:
        older = len({collection.changed[place] // 10**9 for place in equal[different[0]]}) > 1
        why = f"same bytes, {'the oldest file' if older else 'the first name'}"
    head = chosen[0] if first is None else first
    rest = sorted(place for place in facts if place != head)
    members = [Member(head, collection.name(head), facts[head], None, False)]
    for place in rest:
        pair = _pair(collection, place, head, facts, copies)
        members.append(
            Member(
                place, collection.name(place), facts[place], pair, bool(collection.same[place] == collection.same[head])
            )
        )
    least = min((copies[i, j].probability for at, i in enumerate(different) for j in different[at + 1 :]), default=1.0)
    return CopyGroup(members, None if first is None else collection.name(first), why, least)


def _pair(
    collection: Collection,
    query: int,
    reference: int,
    facts: dict[int, PictureFacts],
    copies: dict[tuple[int, int], CopyPair],
) -> CopyPair:
    """What is known of two members of a group."""
    i, j = int(collection.same[query]), int(collection.same[reference])
    names = collection.name(query), collection.name(reference)
    if i == j:
        size = max(facts[query].width, 1), max(facts[query].height, 1)
        whole = rectangle(*size)
        region = CopiedRegion("found", whole, whole, np.eye(3), 1.0, 1.0, 0.0, 1.0, 0, 0)
        return CopyPair(*names, 1.0, 1.0, region, size, size)
    pair = copies[i, j] if i < j else copies[j, i].turned()
    return replace(pair, query=names[0], reference=names[1])


def _facts(collection: Collection, place: int) -> PictureFacts:
    return read_facts(collection.files[place], int(collection.size[place]), int(collection.changed[place]) / 1e9)


def _by_probability(pairs: Iterable[CopyPair]) -> list[CopyPair]:
    return sorted(pairs, key=lambda pair: (-pair.probability, -pair.score, pair.query, pair.reference))


def _one_name_each(listing: Listing) -> NDArray[np.int64]:
    """Places, ascending, with one for each file: of several names of one the first that is no link."""
    first: dict[tuple[int, int], int] = {}
    kept = np.ones(len(listing), bool)
    for place, file in enumerate(listing.files):
        if not isinstance(file, str):
            continue
        try:
            status = os.stat(file)
        except OSError:
            continue  # the reader will say why
        other = first.setdefault((status.st_dev, status.st_ino), place)
        if other != place:
            name = listing.files[other]
            drop = other if os.path.islink(name) and not os.path.islink(file) else place
            kept[drop] = False
            first[status.st_dev, status.st_ino] = place if drop == other else other
    return np.flatnonzero(kept)


def _same_bytes(files: Sequence[File], size: NDArray[np.int64], threads: int) -> NDArray[np.int64]:
    """The first place [N] whose file has the same bytes; only files of one size are read for it."""
    same = np.arange(len(files))
    counts = Counter(size.tolist())
    places = [place for place in range(len(files)) if counts[int(size[place])] > 1]
    first: dict[str, int] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="copynce hashes") as pool:
        for place, digest in zip(places, pool.map(content_hash, [files[place] for place in places]), strict=True):
            if digest is not None:
                same[place] = first.setdefault(digest, place)
    return same


def _changed(file: File, size: int, mtime_ns: int, shards: dict[str, int | None]) -> str | None:
    """Why a file of an index is not what was described; shards: their times of change, of which it remembers."""
    name = file if isinstance(file, str) else file.shard
    try:
        if isinstance(file, str):
            status = os.stat(name)
            now: tuple[int, int] | None = status.st_size, status.st_mtime_ns
        else:
            if name not in shards:
                shards[name] = os.stat(name).st_mtime_ns
            time = shards[name]
            now = None if time is None else (file.size, time)
    except OSError:
        now = shards[name] = None
    if now is None:
        return "no such file any more"
    return None if now == (size, mtime_ns) else "has changed since it was described; `copynce index add` describes it"
