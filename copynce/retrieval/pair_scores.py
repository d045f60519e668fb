"""Scores of pairs: what matching gives, the files in which it keeps them as they are made, and the plan of its work.

A plan divides the candidates into parts, and keeps the encodings of one side in memory, in blocks of as many pictures
as it may hold; those of the other side pass by, each once for a block. Where one side fits as a whole, every picture is
encoded once. A part is a file: safetensors with ``scores`` float32 [n], NaN where a picture is broken, whose metadata's
``copynce.scores`` is a JSON object::

    {"made_from": {...}, "passes": [encoder, fusion], "broken": [[path, reason], ...]}

A part that takes long leaves the scores of its first pairs meanwhile, in the same form, as ``...begun.safetensors``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from copynce.files import whole_file
from copynce.retrieval.features import Computed

_METADATA = "copynce.scores"

#: The sides of a pair.
Role = Literal["query", "reference"]
ROLES: tuple[Role, Role] = ("query", "reference")


@dataclass(frozen=True)
class PairScores:
    """The scores of candidate pairs, in the order of the candidates.

    queries, references: str objects [N]. scores: float32 [N] in [0, 1]. unscored: (query, reference) of the pairs of
    which a picture is broken; they are not among the N. encodings, fusions: encoder and fusion passes that the scores
    took, also of parts that were kept from an earlier call. precision: what was computed in.
    """

    queries: NDArray[Any]
    references: NDArray[Any]
    scores: NDArray[np.float32]
    unscored: list[tuple[str, str]]
    encodings: int
    fusions: int
    precision: Computed


@dataclass(frozen=True)
class ScoredPart:
    """scores: float32 [n] of all its pairs or, of a part that is begun, of the first n; NaN where a picture is broken.
    broken: (path, reason) of those pictures. encodings, fusions: passes that it took."""

    scores: NDArray[np.float32]
    broken: list[tuple[str, str]]
    encodings: int
    fusions: int


@dataclass(frozen=True)
class ScoreStore:
    """Where parts of a matching are kept, and found again: ``FOLDER/scores-000000.safetensors``, ...; those that are
    ``begun`` and hold their first pairs only beside them.

    A part serves again while model, settings, its pairs and their pictures (names, sizes, times of change) are the
    same. model: the hash of the model's weights file.
    """

    folder: Path
    model: str

    def path(self, part: int, begun: bool = False) -> Path:
        """The file of the `part`-th part."""
        return self.folder / f"scores-{part:06d}.{'begun.' if begun else ''}safetensors"

    def find(self, part: int, made_from: Mapping[str, Any], begun: bool = False) -> ScoredPart | None:
        """The `part`-th part if it is there, whole, and made from the same."""
        try:
            with safe_open(self.path(part, begun), framework="numpy") as file:
                facts = json.loads((file.metadata() or {})[_METADATA])
                scores = file.get_tensor("scores")
            if facts["made_from"] != dict(made_from) or scores.dtype != np.float32 or scores.ndim != 1:
                return None
            encodings, fusions = facts["passes"]
            broken = [(str(path), str(reason)) for path, reason in facts["broken"]]
            return ScoredPart(scores, broken, int(encodings), int(fusions))
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            return None  # absent, damaged or of another program: made anew

    def write(self, part: int, scored: ScoredPart, made_from: Mapping[str, Any], begun: bool = False) -> None:
        """Write the `part`-th part, whole or not at all. Raises WriteError if the disk takes no file."""
        passes = [scored.encodings, scored.fusions]
        facts = json.dumps({"made_from": dict(made_from), "passes": passes, "broken": scored.broken})
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path(part, begun)) as file:
            file.write(save({"scores": scored.scores}, metadata={_METADATA: facts}))
        if not begun:
            self.path(part, begun=True).unlink(missing_ok=True)

    def remove_after(self, parts: int) -> None:
        """Remove what is of no use once the first `parts` are there: what was begun, and the files of an earlier,
        longer list of candidates."""
        for path in self.folder.glob("scores-*.safetensors"):
            number = path.stem.removeprefix("scores-")
            if number.endswith(".begun") or (number.isdigit() and int(number) >= parts):
                path.unlink(missing_ok=True)


@dataclass(frozen=True)
class PairPlan:
    """In which order pairs are scored.

    hold: the side whose encodings are kept in memory. parts: rows of the candidates, in the order of their passing
    pictures. blocks: int64 [parts], the block of held pictures that a part needs. held: the held pictures of each
    block, in order. encodings: encoder passes of the whole plan.
    """

    hold: Role
    parts: list[NDArray[np.int64]]
    blocks: NDArray[np.int64]
    held: list[NDArray[np.int64]]
    encodings: int


def plan_pairs(
    places: Mapping[Role, NDArray[np.int64]], views: Mapping[Role, int], *, capacity: int, pairs: int
) -> PairPlan:
    """The plan with the fewest encoder passes; of equal ones that which holds less.

    places: of each pair, the place of its query and of its reference. views: of a picture of either side, each an
    encoder pass. capacity: encodings of views that may be held. pairs: of a part, as far as those of one passing
    picture stay together.
    """
    plans: list[tuple[int, int, int, PairPlan]] = []
    for hold, other in (ROLES, ROLES[::-1]):
        plan = _plan(places, hold, other, views, max(1, capacity // views[hold]), pairs)
        plans.append((plan.encodings, views[plan.hold] * max(map(len, plan.held)), len(plans), plan))
    return min(plans)[-1]


def _plan(
    places: Mapping[Role, NDArray[np.int64]],
    hold: Role,
    other: Role,
    views: Mapping[Role, int],
    capacity: int,
    pairs: int,
) -> PairPlan:
    # Held pictures in the order in which the candidates name them: a query's candidates stand together.
    pictures, first, number = np.unique(places[hold], return_index=True, return_inverse=True)
    by_appearance = np.argsort(first)
    rank = np.empty(len(pictures), np.int64)
    rank[by_appearance] = np.arange(len(pictures))
    block = rank[number] // capacity
    passing = places[other]
    order = np.lexsort((rank[number], passing, block))
    block, passing = block[order], passing[order]
    new_block = np.append(True, block[1:] != block[:-1])
    new_group = new_block | np.append(True, passing[1:] != passing[:-1])
    # A part begins with the first group that begins in another multiple of `pairs` of its block.
    group_start = np.flatnonzero(new_group)
    block_start = np.flatnonzero(new_block)
    label = (group_start - block_start[block[group_start]]) // pairs
    starts = group_start[new_block[group_start] | np.append(True, label[1:] != label[:-1])]
    return PairPlan(
        hold=hold,
        parts=np.split(order, starts[1:]),
        blocks=block[starts],
        held=_chunks(pictures[by_appearance], capacity),
        encodings=len(pictures) * views[hold] + len(group_start) * views[other],
    )


def _chunks(values: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
