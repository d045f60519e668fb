"""Where a copy lies in both pictures, from their patch tokens; or that its place is unknown.

    tokens of both -> cosines [Lq, Lr] -> matches -> the map of highest evidence (copynce.copies.geometry)
        -> how far it reaches: the upright rectangle, in either picture, within which patches speak for it
        -> the same region in both as polygons, in pixels of the files; or no region, where too little speaks for it

A model sees a picture squashed to a square, so a place in the square is the same fraction of either side of the file;
what it calls x and y are those of the stored picture, EXIF orientation not applied, as everywhere here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from copynce.copies.geometry import Evidence, centres, fit, matches, transformed
from copynce.copies.polygons import Points, area, clipped, contains, mapped, rectangle, simplified

Verdict = Literal["found", "place unknown"]

TEMPERATURE = 1 / 16
ENOUGH = 60.0
"""Nats of evidence from which a place is told."""
FEWEST = 4
"""Mutual matches that must lie where the map says."""
AGREEING = 0.6
"""Share of the region's patches that must do so; chosen on MiniDISC's part 1 (``python -m benchmarks.regions``)."""

_CELLS = 16  # a side, by which a region's sides are moved
_SIDE = 3.0  # nats that must speak against what a side leaves out
_STRAIGHT = 0.004  # of a side: a corner that bends less is none
_UNIT = rectangle(1, 1)


@dataclass(frozen=True)
class CopiedRegion:
    """Where a copy lies in a pair of pictures.

    verdict: "found", or "place unknown": then the rest tells the best guess, which is not to be shown as a region.
    query, reference: polygons float64 [n, 2] of (x, y) in pixels of the files; the same region in both.
    geometry: float64 [3, 3], points of the query in pixels to those of the reference; below zero determinant: mirrored.
    query_share, reference_share: of each picture's area that is copied.
    evidence: nats that speak for it. agreement: share of the region's query patches whose nearest of the reference lies
    within a patch of where the geometry says. matches: mutual nearest patches; inliers: those of them that agree.
    """

    verdict: Verdict
    query: Points
    reference: Points
    geometry: NDArray[np.float64]
    query_share: float
    reference_share: float
    evidence: float
    agreement: float
    matches: int
    inliers: int

    @property
    def found(self) -> bool:
        return self.verdict == "found"

    @property
    def mirrored(self) -> bool:
        """Whether the copy is the reference's mirror image."""
        return bool(np.linalg.det(self.geometry[:2, :2]) < 0)

    def moved(self, geometry: NDArray[np.float64], reference_size: tuple[int, int]) -> CopiedRegion:
        """The same region of the query under another geometry [3, 3], in pixels; reference_size: (width, height)."""
        there = clipped(mapped(geometry, self.query), rectangle(*reference_size)) if len(self.query) else self.query
        return replace(
            self,
            reference=there,
            geometry=geometry / geometry[2, 2],
            reference_share=area(there) / (reference_size[0] * reference_size[1]),
        )

    def through(self, to_picture: NDArray[np.float64], view: tuple[int, int], size: tuple[int, int]) -> CopiedRegion:
        """The same of the picture of which the query is a view: to_picture [3, 3], the affine map of the view's points
        to the picture's; view, size: (width, height) of both in pixels."""
        geometry = self.geometry @ np.linalg.inv(to_picture)
        shrunk = abs(float(np.linalg.det(to_picture[:2, :2]))) * view[0] * view[1] / (size[0] * size[1])
        return replace(
            self,
            query=mapped(to_picture, self.query),
            geometry=geometry / geometry[2, 2] if geometry[2, 2] else geometry,
            query_share=self.query_share * shrunk,
        )

    def to_json(self) -> dict[str, Any]:
        """As plain numbers; no polygons where the place is unknown."""
        return {
            "verdict": self.verdict,
            "query_region": self.query.round(1).tolist() if self.found else None,
            "reference_region": self.reference.round(1).tolist() if self.found else None,
            "query_share": round(self.query_share, 4) if self.found else None,
            "reference_share": round(self.reference_share, 4) if self.found else None,
            "geometry": self.geometry.tolist() if self.found else None,
            "mirrored": self.mirrored if self.found else None,
            "evidence": round(self.evidence, 2),
            "agreement": round(self.agreement, 4),
            "matches": self.matches,
            "inliers": self.inliers,
        }


def copied_region(
    query_tokens: ArrayLike,
    reference_tokens: ArrayLike,
    query_size: tuple[int, int],
    reference_size: tuple[int, int],
    *,
    temperature: float = TEMPERATURE,
) -> CopiedRegion:
    """Where the copy lies that two pictures share, from their patch tokens alone.

    query_tokens [Lq, C], reference_tokens [Lr, C]: of a square of patches each, in row-major order, of a descriptor or
    as a matcher fuses them; any length. query_size, reference_size: (width, height) of the files in pixels.
    temperature: of the affinity (equation 6). It does not ask whether the pair is a copy: of two pictures that are none
    the verdict is "place unknown" more often than not, no more. Raises ValueError where tokens or sizes do not fit.
    """
    query, reference = _unit_rows("query_tokens", query_tokens), _unit_rows("reference_tokens", reference_tokens)
    if query.shape[1] != reference.shape[1]:
        raise ValueError(f"tokens must have the same channels, got {query.shape[1]} and {reference.shape[1]}")
    for name, size in (("query_size", query_size), ("reference_size", reference_size)):
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"{name} must be (width, height) in pixels, got {size}")
    cosines = query @ reference.T
    evidence = Evidence.of(cosines, temperature)
    ends, starts, mutual = matches(cosines, temperature, evidence.grids)
    shapes = query_size[0] / query_size[1], reference_size[0] / reference_size[1]
    geometry = fit(evidence, ends, starts, shapes)
    region, nats = _reach(evidence, geometry)
    off = np.abs(transformed(geometry[None], ends[mutual])[0] - starts[mutual]).max(1, initial=0.0)
    inliers = int((off * evidence.grids[1] < 1).sum())
    agreement = _agreement(cosines, evidence, geometry, region)
    known = nats >= ENOUGH and inliers >= FEWEST and agreement >= AGREEING and len(region) > 2
    there = mapped(geometry, region) if len(region) else region
    to_query, to_reference = np.diag([*query_size, 1.0]), np.diag([*reference_size, 1.0])
    pixels = to_reference @ geometry @ np.linalg.inv(to_query)
    return CopiedRegion(
        verdict="found" if known else "place unknown",
        query=region * query_size,
        reference=there * reference_size,
        geometry=pixels / pixels[2, 2],
        query_share=area(region),
        reference_share=area(there),
        evidence=nats,
        agreement=agreement,
        matches=int(mutual.sum()),
        inliers=inliers,
    )


def _unit_rows(name: str, tokens: ArrayLike) -> NDArray[np.float64]:
    rows = np.asarray(tokens, np.float64)
    if rows.ndim != 2 or len(rows) < 4 or round(len(rows) ** 0.5) ** 2 != len(rows):
        raise ValueError(f"{name} must be [L, C], L a square of at least 4 patches, got {list(rows.shape)}")
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _agreement(
    cosines: NDArray[np.float64], evidence: Evidence, geometry: NDArray[np.float64], region: Points
) -> float:
    """Share of the region's query patches whose nearest of the reference lies within a patch of where the map says."""
    gq, gr = evidence.grids
    inside = contains(region, centres(gq))
    if not inside.any():
        return 0.0
    off = centres(gr)[cosines.argmax(1)] - transformed(geometry[None], centres(gq))[0]
    return float((np.abs(off).max(1) * gr < 1)[inside].mean())


def _reach(evidence: Evidence, geometry: NDArray[np.float64]) -> tuple[Points, float]:
    """(the region as a polygon of the query's unit square, what is said within it).

    The map alone would let a copy reach to the border of one of the pictures. Where it was cut before it was laid on
    another, the patches beyond the cut speak against it: the region ends where leaving them out gains most, at an
    upright rectangle of the reference or of the query.
    """
    back = np.linalg.inv(geometry)
    forth, query, origin, reference = (one[0] for one in evidence.heard(geometry[None]))
    gq, gr = evidence.grids
    said = np.concatenate([query, reference])
    both = {"query": np.concatenate([centres(gq), origin]), "reference": np.concatenate([forth, centres(gr)])}
    rooms = {"query": clipped(mapped(back, _UNIT), _UNIT), "reference": clipped(mapped(geometry, _UNIT), _UNIT)}
    best, chosen, heard = -np.inf, rooms["query"], 0.0
    for frame, places in both.items():
        box, value, inside = _best_box(places, said)
        if value > best + 1e-9:
            best, heard = value, inside
            region = clipped(rooms[frame], box)
            chosen = region if frame == "query" or not len(region) else mapped(back, region)
    return simplified(clipped(chosen, _UNIT), _STRAIGHT), heard


def _best_box(places: NDArray[np.float64], said: NDArray[np.float64]) -> tuple[Points, float, float]:
    """(the upright rectangle of the unit square, its worth, and what is said within): worth is what is said, less
    `_SIDE` for each side that lies within the square. places [n, 2], said [n]."""
    with np.errstate(invalid="ignore"):
        inside = ((places >= 0) & (places <= 1)).all(1)
    cell = np.minimum((places[inside] * _CELLS).astype(np.int64), _CELLS - 1)
    cells = np.zeros((_CELLS + 1, _CELLS + 1))
    np.add.at(cells, (cell[:, 1] + 1, cell[:, 0] + 1), said[inside])
    sums = cells.cumsum(0).cumsum(1)
    low, high = np.triu_indices(_CELLS + 1, 1)
    rows = sums[high] - sums[low]  # [bands, cells + 1]
    value = rows[:, high] - rows[:, low]
    cost = _SIDE * ((low > 0).astype(np.float64) + (high < _CELLS))
    worth = value - cost[:, None] - cost[None]
    top = np.argwhere(worth >= worth.max() - 1e-9)
    sizes = (high - low)[top].prod(1)
    band, column = top[int(sizes.argmax())]
    left, right, upper, lower = (float(edge) / _CELLS for edge in (low[column], high[column], low[band], high[band]))
    return rectangle(right - left, lower - upper, left, upper), float(worth[band, column]), float(value[band, column])
