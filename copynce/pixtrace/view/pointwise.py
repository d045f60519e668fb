"""A composed view point by point, in plain NumPy.

The way of views that are no single projective map, those of dense maps; and the twin of the compiled way for all
others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from copynce.pixtrace.compiled.maps import TIE
from copynce.pixtrace.compiled.spans import LEAST_SOURCE_WEIGHT
from copynce.pixtrace.edits.base import Matrix, Size
from copynce.pixtrace.edits.dense import bilinear
from copynce.pixtrace.view.code import Layer, Points, mapped

if TYPE_CHECKING:
    from copynce.pixtrace.view.composed_view import ComposedView


@dataclass(eq=False, slots=True)
class Surface:
    """A picture of a view, point by point: ``points`` float32 [H, W, 2] in its unit square (x, y), ``weight`` uint8."""

    layer: Layer
    points: NDArray[np.float32]
    weight: NDArray[np.uint8]


#: A layer, x and y in its unit square, and its weight (0 to 255), for each point of a view.
Spread = tuple[Layer, Points, Points, Points]


def surfaces(view: ComposedView) -> list[Surface]:
    """The source and the other pictures of a view, as if nothing were erased."""
    spread, _ = spread_out(view, *centres(view.output_shape), noise=False)
    return [
        Surface(layer, np.stack([u, v], axis=-1).astype(np.float32), np.round(weight).astype(np.uint8))
        for layer, u, v, weight in spread
    ]


def pull(view: ComposedView, x: Points, y: Points) -> tuple[Points, Points, Points]:
    """Points (x, y) of the view to the source's unit square: (u, v, weight), the weight of 255, 0 where erased."""
    ((_, u, v, weight), *_), _ = spread_out(view, x, y, others=False)
    return u, v, weight


def trace(view: ComposedView, grid: Size, index: NDArray[np.int32]) -> None:
    """Fill ``index`` (int32 [H, W] of the view) with grid pixels or -1."""
    u, v, weight = pull(view, *centres(view.output_shape))
    column = np.clip(np.floor(u * grid[1] + TIE), 0, grid[1] - 1)
    row = np.clip(np.floor(v * grid[0] + TIE), 0, grid[0] - 1)
    # Weights are whole numbers in the compiled way, so these round.
    index[:] = np.where(weight >= LEAST_SOURCE_WEIGHT - 0.5, row * grid[1] + column, -1)


def spread_out(
    view: ComposedView, x: Points, y: Points, *, others: bool = True, noise: bool = True
) -> tuple[list[Spread], Points]:
    """At points (x, y) of the view: the source and each other picture, and the weight of the noise.

    ``others=False``: the source alone; the noise's weight is then not known. ``noise=False``: as if nothing were
    erased.
    """
    weights = [np.where(view.visible.contains(x, y), 255.0, 0.0)]
    weights += [np.zeros(x.shape) for _ in range(len(view.layers) + 1)]  # the noise last, so that layer -1 is it
    for cover in view.covers:
        if cover.layer < 0 and not noise:
            continue
        inside = cover.region.contains(x, y)
        for k in range(len(weights) if others else 1):
            weights[k] = np.where(inside, weights[k] * cover.keep, weights[k])
        if not others:
            continue
        shown = np.where(inside, 255.0 * (1.0 - cover.keep), 0.0)
        if cover.ground is None:
            weights[cover.layer] += shown
        else:
            weights[cover.layer] = np.where(inside, shown, np.where(cover.ground.contains(x, y), 255.0, 0.0))
    erased = weights[-1]
    u, v, weight = _onto_unit_square(view.source.matrix, x, y, weights[0])
    spread = [(view.source, u, v, weight)]
    if view.below is not None:
        below, remap = view.below
        height, width = remap.field.shape[:2]
        point = bilinear(remap.field, u * width - 0.5, v * height - 0.5)
        px, py = point[..., 0], point[..., 1]
        height, width = below.output_shape
        weight = np.where((px >= 0) & (py >= 0) & (px < width) & (py < height), weight, 0.0)
        spread, under = spread_out(below, px, py, others=others, noise=noise)
        spread = [(layer, u, v, weight * part / 255.0) for layer, u, v, part in spread]
        erased = erased + weight * under / 255.0
    if others:
        spread += [
            (layer, *_onto_unit_square(layer.matrix, x, y, weight))
            for layer, weight in zip(view.layers, weights[1:-1], strict=True)
        ]
    return spread, erased


def centres(shape: Size) -> tuple[Points, Points]:
    """x and y, each [H, W], of the pixel centres."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    return x, y


def _onto_unit_square(matrix: Matrix, x: Points, y: Points, weight: Points) -> tuple[Points, Points, Points]:
    """Points of the view to a picture's unit square: (u, v, weight), weight 0 and (0.5, 0.5) behind the viewer."""
    u, v, w = mapped(np.linalg.inv(matrix), x, y)
    hidden = (w <= 0) | (weight == 0)
    depth = np.where(hidden, 1.0, w)
    return np.where(hidden, 0.5, u) / depth, np.where(hidden, 0.5, v) / depth, np.where(hidden, 0.0, weight)
