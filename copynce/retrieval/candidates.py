"""Candidate pairs from local crops of a descriptor (PROTOCOLS 4.2): 45 views of a query against 9 of a reference.

The similarity of a group of query views and a reference is the highest cosine of any of these views and any of the
reference's. Of every group the best references are kept: in mode ``M:N`` of the four groups (100 + 10 + 10 + 4 entries
a query), in mode ``1:N`` of every view by itself (100 + 10 * 10 + 9 * 10 + 25 * 4 = 390). A reference may be in
several groups' lists.

    descriptors [Nq * 45, D], [Nr * 9, D], mapped from files -> a block of queries x a chunk of references:
    products -> max over the reference's views -> max over each group -> the best so far     no Q x R matrix anywhere
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from copynce.errors import DataError
from copynce.files import atomic_text, whole_file
from copynce.retrieval.crops import CANDIDATE_QUERY, candidate_query, candidate_reference
from copynce.retrieval.extract import Alone, Processes, Views
from copynce.retrieval.features import Features
from copynce.retrieval.query_views import best_pairs

Mode = Literal["M:N", "1:N"]

#: The views of references.
REFERENCE_VIEWS = Views("candidates", candidate_reference)

#: Candidates of a query after duplicates are merged, as the released code trims them.
K = 400

_PRODUCTS = 2**25  # of a block of queries and a chunk of references, at once: 128 MB
_COLUMNS = {"query": ("int64", 1), "reference": ("int64", 1), "score": ("float32", 1)}  # of a block
_BLOCK = {"cpu": 64, "cuda": 1024}  # queries whose candidates are one file; all references pass by for each


def query_views(*, released: bool = True) -> Views:
    """The views of queries; `released`: with the box that ends beyond the picture (PROTOCOLS 12, #10)."""
    name = "candidates, released box" if released else "candidates, meant box"
    return Views(name, functools.partial(candidate_query, released=released))


@dataclass(frozen=True)
class CandidateScores:
    """Candidate pairs, query by query, with their similarities: columns `queries`, `references` (str objects) and
    `scores` (float32). Of each query merged ones by decreasing score, others group by group."""

    queries: NDArray[Any]
    references: NDArray[Any]
    scores: NDArray[np.float32]


def find_candidates(
    query: Features,
    reference: Features,
    *,
    mode: Mode = "M:N",
    k: int | None = K,
    merge: bool = True,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    processes: Processes | None = None,
    progress: Callable[[int], None] | None = None,
) -> CandidateScores:
    """The candidates of every query among the references.

    query: descriptors of `query_views`; reference: of `REFERENCE_VIEWS`; both maybe mapped from files. mode: see the
    module's text. merge: each pair once, with its highest similarity, and the `k` best of each query (None: all);
    else the entries of all groups one after the other, as the released code leaves them, and `k` is not used. Of equal
    similarities the reference that comes first stands first.
    device: of the products, float32. Beside the result, some 0.4 GB are used whatever the number of pictures, and on
    a CUDA device the descriptors of 1,024 queries.
    folder: where the candidates of finished blocks of queries are kept until the next call for other features or
    settings. processes: those that share the blocks through it; all get the whole result.
    progress: called with the number of queries done, by this process and those before it.
    Raises DataError where the two sides are not descriptors of these views by one model.
    """
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    group = Alone() if processes is None else processes
    if group.size > 1 and folder is None:
        raise ValueError("folder must say where several processes leave their candidates")
    lists = _lists(mode)
    for role, features, views in (("query", query, lists[-1][0].stop), ("reference", reference, REFERENCE_VIEWS.count)):
        if features.views != views or not len(features.uuids):
            raise DataError(
                f"{role} features: {len(features.uuids)} pictures of {features.views} views each, expected {views} "
                "views of at least one picture"
            )
    if query.values.shape[1] != reference.values.shape[1]:
        raise DataError(
            f"query features have {query.values.shape[1]} columns, reference features {reference.values.shape[1]}; "
            "both must come from one model"
        )
    device = torch.device(device)
    size = _BLOCK.get(device.type, 64)
    blocks = [slice(start, start + size) for start in range(0, len(query.uuids), size)]
    kept = _Kept(folder)
    with group.together():
        if group.rank == 0 and folder is not None:
            facts = {"mode": mode, "k": k, "merge": merge, "block": size, "device": device.type}
            kept.prepare(facts | {"query": query.digest(), "reference": reference.digest()})
    found: dict[int, dict[str, NDArray[Any]]] = {}
    with group.together():
        for number in range(group.rank, len(blocks), group.size):
            block = kept.read(number)
            if block is None:
                entries = _entries(query, blocks[number], reference, lists, device)
                block = _merged(entries, k) if merge else entries
                kept.write(number, block)
            found[number] = block
            if progress is not None:
                progress(min(len(query.uuids), size * (number + 1)))
    if group.size > 1:
        with group.together():
            found = {number: kept.required(number) for number in range(len(blocks))}
    columns = {name: np.concatenate([found[n][name] for n in range(len(blocks))]) for name in found[0]}
    return CandidateScores(
        queries=np.asarray(query.uuids, object)[columns["query"]],
        references=np.asarray(reference.uuids, object)[columns["reference"]],
        scores=columns["score"],
    )


def _lists(mode: Mode) -> list[tuple[slice, int]]:
    """(query views, how many references are kept for the best of them) of each list of a query."""
    if mode not in ("M:N", "1:N"):
        raise ValueError(f"mode must be 'M:N' or '1:N', got {mode!r}")
    found: list[tuple[slice, int]] = []
    for cuts, rank in CANDIDATE_QUERY.values():
        start = found[-1][0].stop if found else 0
        count = len(cuts(100, 100))
        step = count if mode == "M:N" else 1
        found += [(slice(view, view + step), rank) for view in range(start, start + count, step)]
    return found


@torch.inference_mode()
def _entries(
    query: Features, block: slice, reference: Features, lists: list[tuple[slice, int]], device: torch.device
) -> dict[str, NDArray[Any]]:
    """The entries of all lists of a block of queries: places `query` and `reference`, `score`; each [P]."""
    queries = _rows(query, block, device)
    count, views = queries.shape[:2]
    total = len(reference.uuids)
    best = [
        (
            torch.full((count, min(rank, total)), -torch.inf, device=device),
            torch.zeros((count, min(rank, total)), dtype=torch.int64, device=device),
        )
        for _, rank in lists
    ]
    step = max(1, _PRODUCTS // (count * views * reference.views))
    for start in range(0, total, step):
        chunk = _rows(reference, slice(start, min(start + step, total)), device)
        cosines = queries.flatten(0, 1) @ chunk.flatten(0, 1).T
        similar = cosines.view(count, views, len(chunk), -1).amax(3)
        places = torch.arange(start, start + len(chunk), device=device).expand(count, -1)
        for i, (members, _) in enumerate(lists):
            scores = torch.cat([best[i][0], similar[:, members].amax(1)], 1)
            at = torch.cat([best[i][1], places], 1)
            # Not topk, whose choice among equals is open: the first ones stay.
            order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, : best[i][0].shape[1]]
            best[i] = scores.gather(1, order), at.gather(1, order)
    number = torch.arange(block.start, block.start + count, device=device)
    columns = {
        "query": torch.cat([number[:, None].expand(-1, scores.shape[1]) for scores, _ in best], 1),
        "reference": torch.cat([at for _, at in best], 1),
        "score": torch.cat([scores for scores, _ in best], 1),
    }
    return {name: column.flatten().cpu().numpy() for name, column in columns.items()}


def _rows(features: Features, pictures: slice, device: torch.device) -> Tensor:
    """Descriptors [n, views, D] of some pictures."""
    rows = np.ascontiguousarray(
        features.values[pictures.start * features.views : pictures.stop * features.views], np.float32
    )
    if not rows.flags.writeable:
        rows = rows.copy()  # torch would warn
    return torch.from_numpy(rows).to(device).unflatten(0, (-1, features.views))


def _merged(entries: Mapping[str, NDArray[Any]], k: int | None) -> dict[str, NDArray[Any]]:
    """Each pair once, with its highest score, the `k` best of each query by decreasing score."""
    rows = best_pairs(entries["query"], entries["reference"], entries["score"], k)
    return {name: column[rows] for name, column in entries.items()}


@dataclass(frozen=True)
class _Kept:
    """The candidates of finished blocks in a folder, or nothing at all."""

    folder: Path | None

    def prepare(self, facts: Mapping[str, Any]) -> None:
        """Make the folder; keep what it has if that was made from the same."""
        assert self.folder is not None, "asked where blocks are kept"
        digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()
        told = self.folder / "made_from.txt"
        if not told.is_file() or told.read_bytes() != digest.encode():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            with atomic_text(told) as file:
                file.write(digest)

    def path(self, number: int) -> Path:
        assert self.folder is not None, "asked where blocks are kept"
        return self.folder / f"candidates-{number:06d}.safetensors"

    def read(self, number: int) -> dict[str, NDArray[Any]] | None:
        """A block, None if it is absent or damaged."""
        if self.folder is None:
            return None
        try:
            block = load(self.path(number).read_bytes())
        except (FileNotFoundError, SafetensorError):
            return None
        found = {name: (column.dtype.name, column.ndim) for name, column in block.items()}
        fits = found == _COLUMNS and len({len(column) for column in block.values()}) == 1
        return block if fits else None

    def required(self, number: int) -> dict[str, NDArray[Any]]:
        """A block that another process has written."""
        block = self.read(number)
        if block is None:
            raise DataError(
                f"{self.path(number)}: written by another process, but not to be seen whole by this one; all processes "
                "need the same folder"
            )
        return block

    def write(self, number: int, block: Mapping[str, NDArray[Any]]) -> None:
        if self.folder is not None:
            with whole_file(self.path(number)) as file:
                file.write(save({name: np.ascontiguousarray(column) for name, column in block.items()}))
