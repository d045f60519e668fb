"""Descriptors in memory: with the names of their pictures, and with what is known of where they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from copynce.retrieval.rows import Rows

#: Rows that are looked at together.
ROWS_AT_ONCE = 65_536

Computed = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Features:
    """Descriptors with the pictures they belong to, in manifest order; broken pictures are left out.

    uuids: N names. values: float32 [N * views, D], rows of length 1, maybe memory-mapped. precision: "fp32" or "bf16",
    what they were computed in. views: how many rows a picture has, one after the other.
    """

    uuids: Sequence[str]
    values: Rows
    precision: Computed = "fp32"
    views: int = 1

    def digest(self) -> str:
        """A hash of names and rows, 64 hexadecimal digits."""
        digest = hashlib.sha256(json.dumps([list(self.uuids), list(self.values.shape), self.views]).encode())
        for start in range(0, len(self.values), ROWS_AT_ONCE):
            digest.update(np.ascontiguousarray(self.values[start : start + ROWS_AT_ONCE]).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class FeatureFile:
    """What a file or a series of files holds.

    features: rows memory-mapped where the format allows it. broken: pictures without features (uuid, reason).
    made_from: plain values that name model, pictures and settings, by which a reader tells whether the features are
    those it wants; empty for other programs' files. positions: int64 [N], each picture's place in the list of
    ``pictures`` pictures that they were made from; none: that list is not known, and taken to be `features.uuids`.
    last: whether a file is the last of its series. source: the file's or series' name, for messages.
    """

    features: Features
    broken: list[tuple[str, str]] = field(default_factory=list)
    made_from: dict[str, Any] = field(default_factory=dict)
    positions: NDArray[np.int64] | None = None
    pictures: int = -1
    last: bool = True
    source: str = "features"

    def __post_init__(self) -> None:
        if self.positions is None:
            object.__setattr__(self, "positions", np.arange(len(self.features.uuids)))
        if self.pictures < 0:
            object.__setattr__(self, "pictures", len(self.features.uuids))
