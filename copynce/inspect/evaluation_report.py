"""The report of an evaluation: its table, its curves, and the pictures that went wrong.

A false match is a pair that is no copy; the worst have the highest scores. A miss is a true pair; the worst are those
that are not among the predictions, then those with the lowest scores. Both are of the last row, each query once.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from copynce.data import EvaluationSplit
from copynce.evaluation.tables import MORE_COLUMNS, Row, cells, curves_of
from copynce.inspect.precision_recall import draw_precision_recall
from copynce.inspect.report import Figure, Found, Report, Search, Section, Table
from dali_pipelines.sources import AnyPath, read_bytes

_RESULTS = 3  # of a search that are shown
_LARGEST = 200_000_000  # pixels of a picture that is opened for a thumbnail


def evaluation_report(
    rows: Sequence[Row], split: EvaluationSplit, *, title: str, facts: Sequence[tuple[str, str]] = (), shown: int = 12
) -> Report:
    """The report of `rows`, at least one, of an evaluation of `split`.

    facts: (name, value) below the table. shown: how many false matches, and how many misses. A picture that cannot be
    opened is left blank.
    """
    last = rows[-1]
    table = Table(["", *MORE_COLUMNS.values()], [cells(row, MORE_COLUMNS) for row in rows], strong=1)
    sections = [
        Section("Results", "In percent, with 95 % intervals of a bootstrap over queries.", [table]),
        Section("Precision and recall", "", [Figure(draw_precision_recall(curves_of(rows, split.ground_truth)))]),
    ]
    searches = _Searches(last, split)
    of_last = f" Of the row “{last.name}”." if len(rows) > 1 else ""
    sections += [
        Section(
            "Worst false matches",
            f"Pairs that are no copies, by decreasing score; the original is marked where there is one.{of_last}",
            searches.false_matches(shown),
        ),
        Section(
            "Worst misses",
            f"Copies whose original was not found, then those with the lowest scores.{of_last}",
            searches.misses(shown),
        ),
    ]
    if facts:
        sections.append(Section("Settings", "", [Table(["", ""], [list(fact) for fact in facts])]))
    metrics = last.metrics
    headline = [(MORE_COLUMNS[key], f"{100 * metrics[key]:.1f}", last.name) for key in ("uap", "rp90", "recall_at_1")]
    counts = f"{len(split.queries)} queries, {metrics['positives']} true pairs, {len(split.references)} references"
    return Report(title, counts, headline, sections)


class _Pictures:
    """Pictures of both sides by their uuids."""

    def __init__(self, split: EvaluationSplit) -> None:
        self._sides = (split.queries, split.references)
        self._places = [{uuid: place for place, uuid in enumerate(side.uuids)} for side in self._sides]

    def query(self, uuid: str) -> Image.Image | None:
        return self._open(0, uuid)

    def reference(self, uuid: str) -> Image.Image | None:
        return self._open(1, uuid)

    def _open(self, side: int, uuid: str) -> Image.Image | None:
        place = self._places[side].get(uuid)
        return None if place is None else open_picture(self._sides[side].paths[place])


def open_picture(path: AnyPath | str | os.PathLike[str]) -> Image.Image | None:
    """The picture in a file or shard, RGB, JPEG at no more than what a thumbnail needs; None if it cannot be opened."""
    try:
        with Image.open(io.BytesIO(read_bytes(path))) as picture:
            if picture.width * picture.height > _LARGEST:
                return None
            picture.draft("RGB", (560, 560))
            return picture.convert("RGB")
    except Exception:  # Pillow's readers raise whatever a damaged file makes them stumble over
        return None


class _Searches:
    """The predictions of a row by query."""

    def __init__(self, row: Row, split: EvaluationSplit) -> None:
        self._truth, self._pictures = split.ground_truth, _Pictures(split)
        self._queries, self._references, self._scores = row.predictions
        self._order = np.argsort(-self._scores, kind="stable").tolist()
        self._of: dict[Any, list[int]] = {}
        for i in self._order:
            self._of.setdefault(self._queries[i], []).append(i)

    def false_matches(self, count: int) -> list[Search]:
        chosen: dict[Any, int] = {}
        for i in self._order:
            if len(chosen) == count:
                break
            query = self._queries[i]
            if self._references[i] not in self._truth.get(query, ()):
                chosen.setdefault(query, i)
        return [self._search(query, first=[i]) for query, i in chosen.items()]

    def misses(self, count: int) -> list[Search]:
        worst: list[tuple[float, str]] = []
        for query, originals in self._truth.items():
            if originals:
                found = {self._references[i]: float(self._scores[i]) for i in self._of.get(query, ())}
                worst.append((min(found.get(original, -np.inf) for original in originals), query))
        worst.sort(key=lambda entry: entry[0])  # stable: of those not found the first of the list
        return [self._search(query, first=self._of.get(query, [])[:1]) for _, query in worst[:count]]

    def _search(self, query: str, first: list[int]) -> Search:
        """The query, the results `first`, then its other best ones and its originals wherever they are."""
        mine = self._of.get(query, [])
        rows = list(dict.fromkeys([*first, *mine[:_RESULTS]]))[:_RESULTS]
        rank = {i: place for place, i in enumerate(mine, start=1)}
        rows.sort(key=rank.__getitem__)
        originals = self._truth.get(query, [])
        found = [self._found(i, originals, rank[i]) for i in rows]
        notes = []
        of_reference = {self._references[i]: i for i in mine}
        for original in originals:
            place = of_reference.get(original)
            if place is None:
                notes.append(f"original {original} is not among the predictions")
                found.append(Found(self._pictures.reference(original), None, True, original))
            elif place not in rows:
                notes.append(f"original {original} is at rank {rank[place]}")
                found.append(self._found(place, originals, rank[place]))
        if not originals:
            notes.append("this query copies nothing")
        return Search(self._pictures.query(query), found, query, "; ".join(notes))

    def _found(self, i: int, originals: Sequence[str], rank: int) -> Found:
        reference = self._references[i]
        picture = self._pictures.reference(reference)
        return Found(picture, float(self._scores[i]), reference in originals, str(reference), rank)


def shown_facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a metrics.json says of models and settings, for the report."""
    keys = (
        *("model", "matcher", "dataset", "split", "protocol", "k", "candidates", "global_candidates"),
        *("alpha", "start", "end", "ap", "precision", "precision_matcher", "skipped_queries", "skipped_references"),
        *("processor", "version", "commit"),
    )
    return [(key.replace("_", " "), str(metrics[key])) for key in keys if metrics.get(key) is not None]
