"""A pair of pictures that may be a copy and its original, and files of such pairs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from copynce.copies.regions import CopiedRegion
from copynce.files import atomic_text

COLUMNS = ["query", "reference", "probability", "score", "query_region", "reference_region"]


@dataclass(frozen=True)
class CopyPair:
    """What there is to tell of a pair.

    query, reference: paths of the files (a place in a shard: SHARD.tar/NAME). probability: of being a copy, calibrated,
    in [0, 1]. score: the cosine of both descriptors. region: where the copy lies, in pixels of both files.
    query_size, reference_size: (width, height) of the files in pixels.
    """

    query: str
    reference: str
    probability: float
    score: float
    region: CopiedRegion
    query_size: tuple[int, int]
    reference_size: tuple[int, int]

    def turned(self) -> CopyPair:
        """The same pair with the reference as its query."""
        region = self.region
        back = np.linalg.inv(region.geometry)
        return CopyPair(
            query=self.reference,
            reference=self.query,
            probability=self.probability,
            score=self.score,
            region=replace(
                region,
                query=region.reference,
                reference=region.query,
                geometry=back / back[2, 2],
                query_share=region.reference_share,
                reference_share=region.query_share,
            ),
            query_size=self.reference_size,
            reference_size=self.query_size,
        )

    def to_json(self) -> dict[str, Any]:
        """As plain values; regions as `CopiedRegion.to_json`."""
        return {
            "query": self.query,
            "reference": self.reference,
            "probability": round(self.probability, 4),
            "score": round(self.score, 4),
            "query_size": list(self.query_size),
            "reference_size": list(self.reference_size),
            **self.region.to_json(),
        }


def write_pairs_csv(path: str | Path, pairs: Iterable[CopyPair]) -> None:
    """One row a pair under `COLUMNS`; a region is `x y, x y, ...` in pixels, empty where the place is unknown.

    A name comes back byte for byte, also where it is no UTF-8.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for pair in pairs:
        told = pair.to_json()
        regions = [
            ", ".join(f"{x:.1f} {y:.1f}" for x, y in told[name] or ()) for name in ("query_region", "reference_region")
        ]
        rows.writerow([pair.query, pair.reference, f"{pair.probability:.4f}", f"{pair.score:.4f}", *regions])
    with atomic_text(path) as file:
        file.write(text.getvalue())


def write_pairs_jsonl(path: str | Path, pairs: Iterable[CopyPair]) -> None:
    """One JSON object a line, as `CopyPair.to_json`."""
    with atomic_text(path) as file:
        for pair in pairs:
            file.write(json.dumps(pair.to_json()) + "\n")
