"""Scores of candidate pairs by a matcher, each picture encoded once for all of its pairs.

Vanilla (PROTOCOLS 4.1): score = sigmoid(logit) of both whole pictures. With local crops ensembling (PROTOCOLS 4.3) it
is the highest of 35 such scores: 26 views of the query with the whole reference, the whole query with 9 more views of
the reference. One view of the query is there twice (its central box is the middle tile), so a pair costs 25 + 10
encoder passes where its pictures are in no other pair, and 34 fusion passes. Or of each pair one view of the query is
named, that by which it was near to the reference, and is matched with the whole reference.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from copynce.data import Manifest, Quarantine
from copynce.errors import DataError
from copynce.models import Matcher
from copynce.models.memory import keep_heap
from copynce.retrieval.extract import Alone, Precision, Processes, picture_state
from copynce.retrieval.matcher_passes import LOCAL_CROPS, WHOLE, Held, Passes, Views
from copynce.retrieval.pair_scores import ROLES, PairPlan, PairScores, Role, ScoredPart, ScoreStore, plan_pairs
from copynce.retrieval.query_views import QUERY_VIEWS
from dali_pipelines import Cut

#: How scores are made, as a number: views, preparation, passes. Whoever changes scores adds one, and kept scores of
#: other numbers are made anew; a test holds scores that belong to this number.
WAY = 1

#: Bytes of encodings that are held, and fusion passes of a part, what processes share; by default.
MEMORY = 4 * 10**9
PART = 16_384

#: Seconds after which a part that is not finished leaves what it has, and fusion passes, in batches, between two looks
#: at the time (half a minute to a minute of one core with local crops of ViT-S). A killed matching loses both, and the
#: encodings.
LEAVE_SECONDS = 60.0
_BATCHES = 8

_LOOK = 2.0  # seconds between looks at the files of other processes
_PLURAL = {"query": "queries", "reference": "references"}


def score_pairs(
    matcher: Matcher,
    candidates: tuple[NDArray[Any], NDArray[Any]],
    queries: Manifest,
    references: Manifest,
    *,
    local_crops: bool = False,
    query_views: NDArray[np.int64] | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    precision: Precision = "auto",
    threads: int = 2,
    memory: int = MEMORY,
    part: int = PART,
    quarantine: Quarantine | None = None,
    keep: ScoreStore | None = None,
    processes: Processes | None = None,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> PairScores:
    """The scores of `candidates`, pairs of uuids of `queries` and `references` (two columns), in their order.

    Scores are float32 sigmoids of float32 logits. Pictures are prepared as for `extract`. A pair with a broken picture
    has no score: it is in the result's `unscored`, and its picture in `quarantine`.

    local_crops: the highest score of all views' (see the module's text).
    query_views: [N], which of `QUERY_VIEWS` stands for the query in each pair; None: the whole picture. Each of them
        that is in a pair is encoded, once. Not with local_crops.
    batch_size: views of an encoder pass (at least those of one picture), and pairs of views of a fusion pass.
    device: of the passes, "cpu" or a CUDA device. Whole pictures are decoded there too, views on the CPU.
    precision: of both passes. "auto": bf16 where the hardware multiplies it and where the logits of the first pairs
        change by at most `BF16_AGREES`, else fp32; the result says which.
    threads: CPU threads that read and decode.
    memory: bytes of encodings that are held on `device`. Of ViT-S/16 at 224 px a picture has 302,592; its local crops
        have 25 times as much on the query's side, 10 times on the other. Where neither all queries nor all references
        fit, the pictures of the other side are encoded again for each block that does. Beside what is held there are
        the encodings of one batch and what a fusion pass needs.
    part: fusion passes whose scores become one file of `keep`; files that are there already are taken from there, and
        a part that was begun goes on where it last left its scores (every `LEAVE_SECONDS`).
    processes: those that share the work, part by part, through the files of `keep`; all get the whole result. Scores
        are the same to the last bit for any number of them, and after a kill.
    progress: called with the number of pairs done, by all processes as far as their files tell.
    say: receives a sentence if "auto" decides against bf16.
    Raises DataError for no candidates, ids that are in no manifest, a matcher whose logits are not finite.
    """
    for name, value in (("batch_size", batch_size), ("threads", threads), ("part", part)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision must be auto, fp32 or bf16, got {precision!r}")
    group = Alone() if processes is None else processes
    if group.size > 1 and keep is None:
        raise ValueError("keep must say where several processes leave their scores")
    device = torch.device(device)
    if device.type == "cpu":
        keep_heap()
    manifests: dict[Role, Manifest] = {"query": queries, "reference": references}
    columns: dict[Role, NDArray[Any]] = dict(zip(ROLES, map(np.asarray, candidates), strict=True))
    places = {role: _places(role, columns[role], manifests[role]) for role in ROLES}
    views = LOCAL_CROPS if local_crops else WHOLE
    if query_views is not None:
        if local_crops:
            raise ValueError("query_views names one view for each pair, local_crops means all: give one of them")
        manifests["query"], places["query"], views = _in_views(queries, places["query"], query_views)
    encoding = 4 * (matcher.prefix_tokens + matcher.grid**2) * matcher.channels
    plan = plan_pairs(places, views.count, capacity=memory // encoding, pairs=max(1, part // len(views.forwards)))

    was_training = matcher.training
    matcher.to(device).eval()
    try:
        passes = Passes(matcher, views, manifests, batch_size=batch_size, device=device, threads=threads)
        with group.together():
            if group.rank == 0 and precision == "auto":
                precision = passes.decided(places, say)
        passes.precision = "bf16" if group.broadcast_object(precision) == "bf16" else "fp32"
        work = _Work(passes, places, plan, keep, local_crops)
        with group.together():
            done = work.run(range(group.rank, len(plan.parts), group.size), progress)
        if group.size > 1:
            done = work.collected()
        if keep is not None and group.rank == 0:
            keep.remove_after(len(plan.parts))
    finally:
        matcher.train(was_training)
    if quarantine is not None:
        for path, reason in dict(entry for scored in done for entry in scored.broken).items():
            quarantine.add(path, reason)
    scores = np.empty(len(places["query"]), np.float32)
    for rows, scored in zip(plan.parts, done, strict=True):
        scores[rows] = scored.scores
    good = ~np.isnan(scores)
    return PairScores(
        queries=columns["query"][good],
        references=columns["reference"][good],
        scores=scores[good],
        unscored=list(zip(*(columns[role][~good].tolist() for role in ROLES), strict=True)),
        encodings=sum(scored.encodings for scored in done),
        fusions=sum(scored.fusions for scored in done),
        precision=passes.precision,
    )


def _places(role: Role, ids: NDArray[Any], manifest: Manifest) -> NDArray[np.int64]:
    """The place in `manifest` of each id."""
    if not len(ids):
        raise DataError("there is no candidate pair to score")
    place_of = {uuid: place for place, uuid in enumerate(manifest.uuids)}
    try:
        return np.fromiter((place_of[uuid] for uuid in ids), np.int64, len(ids))
    except KeyError as error:
        raise DataError(
            f"{role} {error.args[0]!r} of the candidates is not among the {len(manifest)} {_PLURAL[role]} in "
            f"{manifest.root}"
        ) from None


def _in_views(
    queries: Manifest, places: NDArray[np.int64], query_views: NDArray[np.int64]
) -> tuple[Manifest, NDArray[np.int64], Views]:
    """Each view that is in a pair as if it were a picture: their manifest, the place of each pair's in it, and how they
    are cut. places: of the pairs' pictures in `queries`."""
    count = QUERY_VIEWS.count
    if query_views.shape != places.shape or not ((query_views >= 0) & (query_views < count)).all():
        raise ValueError(f"query_views must be {len(places)} numbers from 0 to {count - 1}, one for each pair")
    named, number = np.unique(places * count + query_views, return_inverse=True)
    pictures = list(zip(*(column.tolist() for column in np.divmod(named, count)), strict=True))
    manifest = Manifest(
        [f"{queries.uuids[place]} in view {view}" for place, view in pictures],
        [queries.paths[place] for place, _ in pictures],
        queries.root,
    )
    cuts = [functools.partial(_one_of_views, view) for _, view in pictures]
    return manifest, number, Views({**WHOLE.cuts, "query": cuts}, WHOLE.count, WHOLE.forwards)


def _one_of_views(view: int, width: int, height: int) -> list[Cut]:
    return [QUERY_VIEWS.cuts(width, height)[view]]


class _Work:
    """The parts of a plan, scored one after the other; encodings of the held side stay from part to part."""

    def __init__(
        self,
        passes: Passes,
        places: Mapping[Role, NDArray[np.int64]],
        plan: PairPlan,
        keep: ScoreStore | None,
        local_crops: bool,
    ) -> None:
        self._passes, self._places, self._plan, self._keep = passes, places, plan, keep
        self._local_crops = local_crops
        self._states: dict[tuple[Role, int], str] = {}
        self._made_from: dict[int, dict[str, Any]] = {}
        self._held: tuple[int, Held] | None = None  # and the number of its block

    def run(self, mine: Sequence[int], progress: Callable[[int], None] | None) -> list[ScoredPart]:
        """These parts; those that are not kept are made."""
        done: dict[int, ScoredPart] = {}
        waiting: dict[int, int] = {}  # other processes' parts, and when their files were written
        pairs = 0
        for part, rows in enumerate(self._plan.parts):
            found = self._find(part)
            if found is not None:
                pairs += len(rows)
                done[part] = found
            elif part not in mine:
                waiting[part] = self._changed(part)
        looked = time.monotonic()

        def report(more: int) -> None:
            nonlocal looked, pairs
            if progress is None:
                return
            if waiting and time.monotonic() - looked > _LOOK:
                for part, before in list(waiting.items()):
                    if self._changed(part) != before:
                        pairs += len(self._plan.parts[part])
                        del waiting[part]
                looked = time.monotonic()
            progress(pairs + more)

        report(0)
        with torch.inference_mode():
            for part in mine:
                if part in done:
                    continue
                done[part] = self._scored(part, report)
                if self._keep is not None:
                    self._keep.write(part, done[part], self._facts(part))
                pairs += len(self._plan.parts[part])
        self._held = None
        return [done[part] for part in mine]

    def collected(self) -> list[ScoredPart]:
        """All parts, once all processes have left theirs."""
        assert self._keep is not None, "checked before"
        found = [self._find(part) for part in range(len(self._plan.parts))]
        if None in found:
            raise DataError(
                f"{self._keep.path(found.index(None))}: written by another process, but not to be seen by this one; "
                "all processes need the same folder"
            )
        return [part for part in found if part is not None]

    def _scored(self, part: int, report: Callable[[int], None]) -> ScoredPart:
        plan, passes = self._plan, self._passes
        passing: Role = "reference" if plan.hold == "query" else "query"
        rows = plan.parts[part]
        scores = np.full(len(rows), np.nan, np.float32)
        begun = self._begun(part)
        first, reasons = len(begun.scores), dict(begun.broken)
        scores[:first] = begun.scores
        before = passes.encodings - begun.encodings, passes.fusions - begun.fusions

        def until(row: int) -> ScoredPart:
            made = passes.encodings - before[0], passes.fusions - before[1]
            return ScoredPart(scores[:row], list(reasons.items()), *made)

        held = self._block(int(plan.blocks[part]))
        held_row = np.full(len(rows), -1)
        held_row[first:], broken = held.require(self._places[plan.hold][rows[first:]])
        reasons |= broken
        # The rows stand in the order of their passing pictures.
        pictures, starts, number = np.unique(self._places[passing][rows], return_index=True, return_inverse=True)
        ends = np.append(starts[1:], len(rows))
        row_of = np.full(len(pictures), -1)  # of a picture in its batch
        # The batch in which a part was left is encoded again, and fused in the same pieces: the same to the last bit.
        batch = passes.pictures_a_batch(passing)
        skipped = int(number[first]) // batch * batch
        at_once = max(1, _BATCHES * passes.batch_size // len(passes.views.forwards))
        left = time.monotonic()
        for at, tokens in passes.encoded(passing, pictures[skipped:], reasons):
            at = at + skipped
            row_of[at] = np.arange(len(at))
            here = np.concatenate([np.arange(starts[i], ends[i]) for i in at])
            for piece in np.split(here, list(range(at_once, len(here), at_once))):
                if piece[-1] < first:
                    continue
                end = int(piece[-1]) + 1
                whole = piece[held_row[piece] >= 0]
                if len(whole):
                    assert held.tokens is not None, "one of them is whole"
                    pair = {plan.hold: held_row[whole], passing: row_of[number[whole]]}
                    logits = passes.logits(
                        {plan.hold: held.tokens, passing: tokens}, np.stack([pair[role] for role in ROLES], 1)
                    )
                    scores[whole] = torch.from_numpy(logits).sigmoid().amax(1).numpy()
                if self._keep is not None and end < len(rows) and time.monotonic() - left >= LEAVE_SECONDS:
                    self._keep.write(part, until(end), self._facts(part), begun=True)
                    left = time.monotonic()
                report(end)
        report(len(rows))
        return until(len(rows))

    def _block(self, number: int) -> Held:
        """The held pictures of a block; those of the block before are gone."""
        if self._held is None or self._held[0] != number:
            self._held = None  # its memory first
            self._held = number, Held(self._passes, self._plan.hold, self._plan.held[number])
        return self._held[1]

    def _find(self, part: int) -> ScoredPart | None:
        if self._keep is None:
            return None
        found = self._keep.find(part, self._facts(part))
        return found if found is not None and len(found.scores) == len(self._plan.parts[part]) else None

    def _begun(self, part: int) -> ScoredPart:
        """What there is of a part that was begun, maybe nothing."""
        found = None if self._keep is None else self._keep.find(part, self._facts(part), begun=True)
        if found is None or len(found.scores) >= len(self._plan.parts[part]):
            return ScoredPart(np.empty(0, np.float32), [], 0, 0)
        return found

    def _changed(self, part: int) -> int:
        """When the file of a part was written, 0 if it is not there."""
        try:
            return os.stat(self._keep.path(part)).st_mtime_ns if self._keep is not None else 0
        except OSError:
            return 0

    def _facts(self, part: int) -> dict[str, Any]:
        """What a part is made from."""
        assert self._keep is not None, "asked where parts are kept"
        if part not in self._made_from:
            facts: dict[str, Any] = {
                "model": self._keep.model,
                "way": WAY,
                "size": self._passes.matcher.img_size,
                "device": self._passes.device.type,
                "precision": self._passes.precision,
                "local_crops": self._local_crops,
            }
            for role in ROLES:
                pictures, number = np.unique(self._places[role][self._plan.parts[part]], return_inverse=True)
                states = "".join(self._state(role, place) for place in pictures.tolist())
                digest = hashlib.sha256(states.encode(errors="surrogateescape"))
                digest.update(number.astype(np.int64).tobytes())
                facts[role] = digest.hexdigest()
            self._made_from[part] = facts
        return self._made_from[part]

    def _state(self, role: Role, place: int) -> str:
        """A picture's name, file, size and time of change, asked once."""
        if (role, place) not in self._states:
            manifest = self._passes.manifests[role]
            self._states[role, place] = picture_state(manifest.uuids[place], manifest.paths[place])
        return self._states[role, place]
