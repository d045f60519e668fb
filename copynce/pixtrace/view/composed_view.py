"""A program on one picture, composed: what the pixel executor draws and the table traces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

import copynce.pixtrace.compiled.blending as blending
import copynce.pixtrace.compiled.tracing as tracing
import copynce.pixtrace.view.pointwise as pointwise
from copynce.pixtrace.compiled.slots import BITMAPS, COVERS, FIRST_REGION, HAS_NOISE, PLANES
from copynce.pixtrace.compiled.spans import LEAST_SOURCE_WEIGHT
from copynce.pixtrace.edits.base import Matrix, Photometric, Size
from copynce.pixtrace.edits.dense import Remap
from copynce.pixtrace.view.code import Layer, PlacedCover, Points, Region, covers_in, visible_in
from copynce.pixtrace.view.pointwise import Surface

#: Gives an array of a shape and a type, its content arbitrary, as ``np.empty``.
Empty = Callable[[tuple[int, ...], DTypeLike], NDArray[Any]]


@dataclass(eq=False, slots=True)
class ComposedView:
    """A program on one picture, composed: what the pixel executor draws and the table traces.

    ``photometric``: colour edits in order. ``noise_seed``: which noise fills the erased region. ``plain``: True if the
    view is the whole source, resized, so that no warp is needed. ``code`` and ``bits``: where the source shows and what
    covers it, in the form of :mod:`copynce.pixtrace.compiled.slots`; :attr:`visible` and :attr:`covers` read the same.
    ``below``: if not None, the "source" of this view is not the picture but another view of it, ``below[0]``, drawn and
    sent through the dense map ``below[1]``.
    """

    output_shape: Size
    source: Layer
    layers: tuple[Layer, ...]
    photometric: tuple[Photometric, ...]
    noise_seed: int
    plain: bool
    code: NDArray[np.float64]
    bits: NDArray[np.uint8]
    below: tuple[ComposedView, Remap] | None = None

    @property
    def visible(self) -> Region:
        """The source's part of the view, before anything covers it."""
        return visible_in(self.code, self.bits)

    @property
    def covers(self) -> tuple[PlacedCover, ...]:
        """The blending steps, in order."""
        return covers_in(self.code, self.bits)

    @property
    def opaque(self) -> bool:
        """True if the source fills the whole view: nothing to blend, nothing black, nothing erased."""
        return not (self.code[FIRST_REGION, PLANES] or self.code[FIRST_REGION, BITMAPS] or self.code[COVERS])

    def pictures(self) -> tuple[Layer, ...]:
        """The other pictures and colours of the view, those below a dense map first."""
        return self.layers if self.below is None else (*self.below[0].pictures(), *self.layers)

    def erases(self) -> bool:
        """True if noise fills a part of the view."""
        return bool(self.code[HAS_NOISE]) or (self.below is not None and self.below[0].erases())

    def paints(self) -> bool:
        """True if some layers are one colour."""
        return any(layer.color is not None for layer in self.pictures())

    def erase_mask(self) -> NDArray[np.uint8]:
        """uint8 [H, W]: 1 where the view is filled with noise."""
        if not self.erases():
            return np.zeros(self.output_shape, np.uint8)
        if self.below is None:
            return self.blend()[1 + len(self.layers)]
        return _erased(pointwise.spread_out(self, *pointwise.centres(self.output_shape))[1])

    def surfaces(self) -> list[Surface]:
        """The source and the other pictures, in the order of :meth:`pictures`, as point by point maps of the view.

        For views of a dense map, where ``layer.matrix`` alone does not say what a pixel shows. Weights are those of
        :meth:`blend`.
        """
        return pointwise.surfaces(self)

    def blend(self, empty: Empty = np.empty) -> NDArray[np.uint8]:
        """What the pixel executor blends with, before anything is erased: planes uint8 [N, H, W].

        First the weights (of 255) of the source and each of ``layers``; they sum to at most 255 within rounding, and
        the rest is black. Then :meth:`erase_mask`, if anything is erased; then, if some layers are one colour, three
        planes that hold [H, W, 3], the sum of these colours, each times its weight. ``empty(shape, dtype)`` gives the
        memory. Not for views of a dense map.
        """
        height, width = self.output_shape
        erases, paints = self.erases(), self.paints()
        weights = 1 + len(self.layers) + erases
        planes = empty((weights + 3 * paints, height, width), np.uint8)
        painted = planes[weights:].reshape((height, width, 3) if paints else (0, 0, 3))
        colours = [layer.color or (-1.0, -1.0, -1.0) for layer in self.layers]
        filled = np.array(colours, np.float32).reshape(-1, 3)
        blending.blend(self.code, self.bits, filled, planes[:weights], painted)
        if erases:
            _erased(planes[weights - 1])
        return planes

    def trace(self, grid: Size, index: NDArray[np.int32]) -> tuple[Matrix, NDArray[np.int64]] | tuple[None, None]:
        """Fill ``index`` (int32 [H, W] of the view) with grid pixels or -1.

        Returns the forward map from grid to view, float64 [3, 3], and int64 [H, 2], the columns [first, last) outside
        of which each row is -1; None and None if the view is no single projective map.
        """
        if self.below is not None:
            pointwise.trace(self, grid, index)
            return None, None
        forward, bounds = np.empty((3, 3)), np.empty((self.output_shape[0], 2), np.int64)
        tracing.trace_view(self.code, self.bits, grid[0], grid[1], index, bounds, forward)
        return forward, bounds


def _erased(noise: Points | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8, 1 where the weight of the noise fills a pixel; bytes are overwritten, for they serve nothing else."""
    where = noise.view(np.bool_) if noise.dtype == np.uint8 else np.empty(noise.shape, np.bool_)
    return np.greater(noise, LEAST_SOURCE_WEIGHT, out=where).view(np.uint8)
