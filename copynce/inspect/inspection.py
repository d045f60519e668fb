"""One pair of pictures in depth: score, affinity of probed patches, its entropy, copied region, geometry."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from copynce.copies.geometry import centres
from copynce.copies.pixels import SIDE, PixelAgreement, agreeing
from copynce.copies.polygons import contains
from copynce.copies.regions import CopiedRegion, copied_region
from copynce.errors import ConfigError
from copynce.inspect.drawing import draw_affinity, draw_copied_region, draw_entropy, stacked, titled
from copynce.inspect.pair_page import PatchPair, peaks
from copynce.inspect.report import Report, Section, Table
from copynce.losses.affinity import affinity, affinity_entropy
from copynce.models import Descriptor, Matcher
from copynce.retrieval.patches import patched_pair
from dali_pipelines.sources import read_picture

_PROBES = 3  # patches that are shown where none is named


@dataclass(frozen=True)
class Inspection:
    """What there is to tell of a pair.

    names: of the files. pictures: uint8 RGB [H, W, 3], as the model reads them. score: the cosine of descriptors, or a
    matcher's. cosines [Lq, Lr] of patch tokens; affinities [Lq, Lr], their softmax at `temperature`; entropy [Lq] in
    nats. pixels: how those of the region agree. probes: patches of the query, row-major.
    """

    names: tuple[str, str]
    pictures: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    score_name: str
    score: float
    cosines: NDArray[np.float64]
    affinities: NDArray[np.float64]
    entropy: NDArray[np.float64]
    temperature: float
    region: CopiedRegion
    pixels: PixelAgreement
    probes: list[int]

    @property
    def grid(self) -> int:
        """Patches a side."""
        return round(len(self.entropy) ** 0.5)


def inspect_pair(
    model: Descriptor | Matcher,
    query: Path,
    reference: Path,
    *,
    probes: Sequence[tuple[float, float]] = (),
    temperature: float = 1 / 16,
    device: torch.device | str = "cpu",
) -> Inspection:
    """Look at a pair. probes: places (x, y) in pixels of the query's file; none: the surest patches of the
    region, apart from each other. Raises DataError for a picture that cannot be used, ConfigError for a probe beside
    the query."""
    pair = patched_pair(model, query, reference, device=device)
    pictures = _pixels(query), _pixels(reference)
    sizes = [(picture.shape[1], picture.shape[0]) for picture in pictures]
    region = copied_region(pair.query, pair.reference, sizes[0], sizes[1], temperature=temperature)
    pixels, region = agreeing(_square(pictures[0]), _square(pictures[1]), region, sizes[0], sizes[1])
    tokens = torch.from_numpy(pair.query), torch.from_numpy(pair.reference)
    affinities = affinity(*tokens, temperature)
    unit = [
        side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12) for side in (pair.query, pair.reference)
    ]
    cosines = (unit[0] @ unit[1].T).astype(np.float64)
    grid = round(len(cosines) ** 0.5)
    chosen = [_patch_at(place, sizes[0], grid, query) for place in probes]
    inside = contains(region.query, centres(grid) * sizes[0]) if region.found else np.ones(grid * grid, np.bool_)
    allowed = np.flatnonzero(inside).tolist() or list(range(grid * grid))
    return Inspection(
        names=(query.name, reference.name),
        pictures=pictures,
        score_name="matcher's score" if isinstance(model, Matcher) else "cosine of descriptors",
        score=pair.score,
        cosines=cosines,
        affinities=affinities.numpy().astype(np.float64),
        entropy=affinity_entropy(affinities).numpy().astype(np.float64),
        temperature=temperature,
        region=region,
        pixels=pixels,
        probes=chosen or peaks(cosines, temperature, allowed, _PROBES),
    )


def draw_inspection(seen: Inspection) -> Image.Image:
    """The pair with its region, the affinity of each probe, and the entropy, as one picture."""
    query, reference = seen.pictures
    region = seen.region
    outlines = (region.query, region.reference) if region.found else (None, None)
    panels = [draw_copied_region(*pair) for pair in zip(seen.pictures, outlines, strict=True)]
    if region.found:
        titles = [
            f"query: {region.query_share:.0%} of it is copied",
            f"reference: {region.reference_share:.0%} of it",
        ]
    else:
        titles = ["query: place unknown", "reference"]
    unknown = np.zeros(len(seen.entropy))
    boards = [titled(panels, titles)]
    for patch in seen.probes:
        y, x = divmod(patch, seen.grid)
        row = {f"affinity of row {y + 1}, column {x + 1}": seen.affinities[patch]}
        boards.append(draw_affinity(query, reference, patch, row, unknown, grid=seen.grid))
    boards.append(draw_entropy(query, {"query": seen.entropy}, unknown, grid=seen.grid))
    return stacked(boards)


def inspection_report(seen: Inspection) -> Report:
    """The same as a page on which every patch can be asked."""
    region = seen.region
    place = "the copied region is outlined" if region.found else "place unknown: too little speaks for one place"
    images = tuple(Image.fromarray(picture) for picture in seen.pictures)
    outlines = (region.query, region.reference) if region.found else (None, None)
    block = PatchPair((images[0], images[1]), seen.names, seen.cosines, seen.temperature, outlines, seen.probes[0])
    sections = [
        Section("Patches", "", [block]),
        Section("Place", "", [_place_table(seen)]),
    ]
    headline = [
        (seen.score_name, f"{seen.score:.3f}", ""),
        *(
            (f"copied of the {side}", f"{share:.0%}" if region.found else "unknown", "")
            for side, share in (("query", region.query_share), ("reference", region.reference_share))
        ),
        ("agreeing matches", f"{region.inliers} of {region.matches}", "mutual nearest patches"),
    ]
    return Report(f"{seen.names[0]} and {seen.names[1]}", place, headline, sections)


def _place_table(seen: Inspection) -> Table:
    region = seen.region
    rows = [
        ["verdict", region.verdict],
        ["evidence", f"{region.evidence:.1f} nats"],
        [
            "pixels agree",
            f"{seen.pixels.coarse:.2f} coarsely, {seen.pixels.fine:.2f} finely, of {seen.pixels.blocks} blocks",
        ],
        ["mean affinity entropy", f"{seen.entropy.mean():.3f} of at most {np.log(seen.affinities.shape[1]):.3f} nats"],
        ["temperature", f"{seen.temperature:.4g}"],
    ]
    if region.found:
        rows += [
            ["region of the query, px", corners(region.query)],
            ["region of the reference, px", corners(region.reference)],
            ["mirrored", "yes" if region.mirrored else "no"],
            *(
                ["query to reference" if k == 0 else "", "  ".join(f"{value:.5g}" for value in row)]
                for k, row in enumerate(region.geometry)
            ),
        ]
    return Table(["", ""], rows)


def corners(polygon: NDArray[np.float64]) -> str:
    """A polygon as text: `x y, x y, ...` in pixels."""
    return ", ".join(f"{x:.1f} {y:.1f}" for x, y in polygon)


def _pixels(path: Path) -> NDArray[np.uint8]:
    """The picture as the model reads it: EXIF orientation not applied, alpha over white."""
    with Image.open(io.BytesIO(read_picture(path).data.tobytes())) as image:
        return np.asarray(image.convert("RGB"))


def _square(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey, squashed to the square on which pixels are compared."""
    return np.asarray(Image.fromarray(picture).convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def _patch_at(place: tuple[float, float], size: tuple[int, int], grid: int, path: Path) -> int:
    x, y = place
    if not (0 <= x < size[0] and 0 <= y < size[1]):
        raise ConfigError(f"--probe must lie within the {size[0]} x {size[1]} pixels of {path}, got {x:g},{y:g}")
    return int(y * grid / size[1]) * grid + int(x * grid / size[0])
