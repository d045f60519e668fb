"""Compose a chain of edits on paper: one projective map per picture, regions as half-planes, blending steps.

Walking the edits only notes 3x3 matrices and boxes; one compiled call multiplies them. Then every picture of the view
(the traced source and any other picture) has one forward map from its *unit square* to the output, and every region
(what a canvas once cut off, where a picture was laid, what was erased) is a set of half-planes in output coordinates,
cut by bitmaps where an object was cut out. Nothing touches a pixel here. Numbers stay in one list until the end:
composing must cost less than tracing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

import copynce.pixtrace.kernels as kernels
from copynce.pixtrace.bitmaps import Bits, mask_of
from copynce.pixtrace.edits import (
    Edit,
    Erase,
    Geometry,
    Matrix,
    Matte,
    Overlay,
    PasteOnto,
    Photometric,
    Remap,
    Resize,
    Size,
    Stamp,
)
from copynce.pixtrace.kernels import LEAST_SOURCE_WEIGHT, TIE
from copynce.pixtrace.matrices import scaling, translation
from copynce.pixtrace.shares import bilinear

Points = NDArray[np.floating]
Planes = NDArray[np.float64]  # [K, 3]; see copynce.pixtrace.kernels
_Point = tuple[Points, Points, Points]  # x, y, weight
#: Gives an array of a shape and a type, its content arbitrary, as ``np.empty``.
Empty = Callable[[tuple[int, ...], DTypeLike], NDArray[Any]]


@dataclass(eq=False, slots=True)
class LayerPlan:
    """Where one picture lies in the view.

    ``matrix`` [3, 3] float64: forward map of the picture's unit square (x = column / width, y = row / height) to output
    pixels; for a picture of h x w pixels the map is ``matrix @ diag(1/w, 1/h, 1)``. ``picture`` in [0, 1): which
    other picture (0 for the source itself). ``color``: the layer is no picture but one colour (red, green, blue in
    [0, 1]).
    """

    matrix: Matrix
    picture: float = 0.0
    color: tuple[float, float, float] | None = None

    def extent(self) -> tuple[float, float]:
        """Output pixels (height, width) that the whole picture's height and width would span at its largest.

        The local scale of the map at five points of the unit square, the largest of each direction; it chooses the
        antialiased working size before a warp.
        """
        (a, b, c), (d, e, f), (g, h, i) = self.matrix.tolist()
        tall = wide = 0.0
        for x, y in ((0.5, 0.5), (0.1, 0.1), (0.9, 0.1), (0.1, 0.9), (0.9, 0.9)):
            w = g * x + h * y + i
            if w <= 1e-6:
                continue
            u, v = (a * x + b * y + c) / w, (d * x + e * y + f) / w
            wide = max(wide, ((a - u * g) ** 2 + (d - v * g) ** 2) ** 0.5 / w)
            tall = max(tall, ((b - u * h) ** 2 + (e - v * h) ** 2) ** 0.5 / w)
        return tall, wide


_Spread = tuple[LayerPlan, Points, Points, Points]  # with x, y in its unit square and weight


@dataclass(eq=False, slots=True)
class Bitmap:
    """A bitmap that cuts a region: a point of the view belongs to it if ``matrix`` sends it onto a 1 of ``bits``.

    ``matrix`` [3, 3] float64 maps output points to points of the bitmap, one unit per bit; ``bits`` uint8 [h, w].
    """

    matrix: Matrix
    bits: NDArray[np.uint8]

    def at(self, x: Points, y: Points) -> NDArray[np.bool_]:
        """True where the points (x, y) of the view fall on a 1."""
        u, v, w = _apply(self.matrix, x, y)
        with np.errstate(divide="ignore", invalid="ignore"):
            column, row = np.floor(u / w + TIE), np.floor(v / w + TIE)
        inside = (w > 0) & (column >= 0) & (column < self.bits.shape[1]) & (row >= 0) & (row < self.bits.shape[0])
        hit = self.bits[np.where(inside, row, 0).astype(np.int64), np.where(inside, column, 0).astype(np.int64)]
        return inside & (hit != 0)


@dataclass(eq=False, slots=True)
class Region:
    """A part of the view: inside of all half-planes, on a 1 of all bitmaps."""

    planes: Planes
    bitmaps: tuple[Bitmap, ...] = ()

    def at(self, x: Points, y: Points) -> NDArray[np.bool_]:
        """True where the points (x, y) of the view belong to the region."""
        inside = np.ones(x.shape, bool)
        for a, b, c in self.planes:
            inside &= a * x + b * y + c >= 0.0
        for bitmap in self.bitmaps:
            inside &= bitmap.at(x, y)
        return inside


@dataclass(eq=False, slots=True)
class Surface:
    """A picture of a view, point by point: ``points`` float32 [H, W, 2] in its unit square (x, y), ``weight`` uint8."""

    layer: LayerPlan
    points: NDArray[np.float32]
    weight: NDArray[np.uint8]


@dataclass(eq=False, slots=True)
class Cover:
    """One blending step, in order: fade what lies below inside of ``region``, then show ``layer`` there.

    ``keep`` is the share of what lay below that still shows. ``layer`` numbers the pictures (0 the source), -1 is the
    erasing noise. ``ground`` is the region that a new bottom canvas fills, None unless the layer is such a canvas.
    """

    region: Region
    keep: float
    layer: int
    ground: Region | None = None


@dataclass(eq=False, slots=True)
class RenderPlan:
    """A view, composed: what the pixel executor draws and the table traces.

    ``photometric``: colour edits in order. ``noise``: which noise fills the erased region. ``plain``: True if the view
    is the whole source, resized, so that no warp is needed. ``code`` and ``bits``: where the source shows and what
    covers it, for :mod:`copynce.pixtrace.kernels`; :attr:`visible` and :attr:`covers` read the same. ``below``: if not
    None, the "source" of this view is not the picture but another view of it, ``below[0]``, drawn and sent through the
    dense map ``below[1]``.
    """

    output_shape: Size
    source: LayerPlan
    layers: tuple[LayerPlan, ...]
    photometric: tuple[Photometric, ...]
    noise: int
    plain: bool
    code: NDArray[np.float64]
    bits: NDArray[np.uint8]
    below: tuple[RenderPlan, Remap] | None = None

    @property
    def visible(self) -> Region:
        """The source's part of the view, before anything covers it."""
        return self._regions()[0]

    @property
    def covers(self) -> tuple[Cover, ...]:
        """The blending steps, in order."""
        first_ground = 1 + int(self.code[4, 0])
        regions, heads = self._regions(), self._heads()
        covers = []
        for region, head in zip(regions[1:first_ground], heads[1:first_ground], strict=True):
            layer, ground = (int(number) for number in self.code[head + 1, :2])
            below = regions[first_ground + ground] if ground >= 0 else None
            covers.append(Cover(region, float(self.code[head, 2]) / 255.0, layer, below))
        return tuple(covers)

    @property
    def opaque(self) -> bool:
        """True if the source fills the whole view: nothing to blend, nothing black, nothing erased."""
        return not (self.code[5, 0] or self.code[5, 1] or self.code[4, 0])

    def pictures(self) -> tuple[LayerPlan, ...]:
        """The other pictures and colours of the view, those below a dense map first."""
        return self.layers if self.below is None else (*self.below[0].pictures(), *self.layers)

    def erases(self) -> bool:
        """True if noise fills a part of the view."""
        return bool(self.code[4, 2]) or (self.below is not None and self.below[0].erases())

    def paints(self) -> bool:
        """True if some layers are one colour."""
        return any(layer.color is not None for layer in self.pictures())

    def weights(self) -> NDArray[np.uint8]:
        """uint8 [1 + len(pictures()), H, W]: share (of 255) that the source and each other picture have in a pixel.

        Sums to at most 255 (within rounding); the rest is black. Erased pixels are 0 throughout.
        """
        if self.below is None:
            return self._blend()[: 1 + len(self.layers)]
        return np.stack([s.weight for s in self.surfaces()])

    def erase_mask(self) -> NDArray[np.uint8]:
        """uint8 [H, W]: 1 where the view is filled with noise."""
        if self.below is None:
            return _erased(self._blend()[-1]) if self.erases() else np.zeros(self.output_shape, np.uint8)
        return _erased(self._spread(*_centres(self.output_shape))[1])

    def surfaces(self, *, noise: bool = True) -> list[Surface]:
        """The source and the other pictures, in the order of :meth:`pictures`, as point by point maps of the view.

        For views of a dense map, where ``layer.matrix`` alone does not say what a pixel shows. ``noise=False``: as if
        nothing were erased.
        """
        spread, _ = self._spread(*_centres(self.output_shape), noise=noise)
        return [
            Surface(layer, np.stack([u, v], axis=-1).astype(np.float32), np.round(weight).astype(np.uint8))
            for layer, u, v, weight in spread
        ]

    def blend(self, empty: Empty = np.empty) -> NDArray[np.uint8]:
        """What the pixel executor blends with, before anything is erased: planes uint8 [N, H, W].

        First those of :meth:`weights`; then :meth:`erase_mask`, if anything is erased; then, if some layers are one
        colour, three planes that hold [H, W, 3], the sum of these colours, each times its weight. ``empty(shape,
        dtype)`` gives the memory. Not for views of a dense map.
        """
        planes = self._blend(noise=False, paint=self.paints(), empty=empty)
        if self.erases():
            _erased(planes[1 + len(self.layers)])
        return planes

    def pull(self, x: Points, y: Points) -> tuple[Points, Points, Points]:
        """Points (x, y) of the view to the source's unit square: (u, v, weight), the weight as in :meth:`weights`.

        The long way, point by point, for views that are no single projective map (and to check those that are).
        """
        ((_, u, v, weight), *_), _ = self._spread(x, y, others=False)
        return u, v, weight

    def trace(self, grid: Size, index: NDArray[np.int32]) -> tuple[Matrix, NDArray[np.int64]] | tuple[None, None]:
        """Fill ``index`` (int32 [H, W] of the view) with grid pixels or -1.

        Returns the forward map from grid to view, float64 [3, 3], and int64 [H, 2], the columns [first, last) outside
        of which each row is -1; None and None if the view is no single projective map.
        """
        if self.below is None:
            forward, bounds = np.empty((3, 3)), np.empty((self.output_shape[0], 2), np.int64)
            kernels.trace_view(self.code, self.bits, grid[0], grid[1], index, bounds, forward)
            return forward, bounds
        u, v, weight = self.pull(*_centres(self.output_shape))
        column = np.clip(np.floor(u * grid[1] + TIE), 0, grid[1] - 1)
        row = np.clip(np.floor(v * grid[0] + TIE), 0, grid[0] - 1)
        index[:] = np.where(weight >= LEAST_SOURCE_WEIGHT - 0.5, row * grid[1] + column, -1)
        return None, None

    def _blend(self, *, noise: bool = True, paint: bool = False, empty: Empty = np.empty) -> NDArray[np.uint8]:
        """Planes: weights of the source, the layers and, if there is any, the noise; the painted colours in three."""
        height, width = self.output_shape
        weights = 1 + len(self.layers) + self.erases()
        planes = empty((weights + 3 * paint, height, width), np.uint8)
        painted = planes[weights:].reshape((height, width, 3) if paint else (0, 0, 3))
        colours = [layer.color or (-1.0, -1.0, -1.0) for layer in self.layers]
        filled = np.array(colours, np.float32).reshape(-1, 3)
        kernels.blend(self.code, self.bits, noise, filled, planes[:weights], painted)
        return planes

    def _heads(self) -> list[int]:
        """The code's row of each region."""
        heads, row = [], 5
        while row < len(self.code):
            heads.append(row)
            row += 2 + int(self.code[row, 0]) + 4 * int(self.code[row, 1])
        return heads

    def _regions(self) -> list[Region]:
        """The source's region, those of the covers and their grounds."""
        regions = []
        for head in self._heads():
            start = head + 2 + int(self.code[head, 0])
            bitmaps = []
            for row in range(start, start + 4 * int(self.code[head, 1]), 4):
                place, height, width = self.code[row + 3].astype(int).tolist()
                bits = self.bits[place : place + height * width].reshape(height, width)
                bitmaps.append(Bitmap(self.code[row : row + 3], bits))
            regions.append(Region(self.code[head + 2 : start], tuple(bitmaps)))
        return regions

    def _spread(self, x: Points, y: Points, *, others: bool = True, noise: bool = True) -> tuple[list[_Spread], Points]:
        """At points (x, y) of the view: (layer, u, v, weight) of the source and each other picture, and the noise."""
        weights = [np.where(self.visible.at(x, y), 255.0, 0.0)]
        weights += [np.zeros(x.shape) for _ in range(len(self.layers) + 1)]
        for cover in self.covers:
            if cover.layer < 0 and not noise:
                continue
            inside = cover.region.at(x, y)
            for k in range(len(weights) if others else 1):
                weights[k] = np.where(inside, weights[k] * cover.keep, weights[k])
            if not others:
                continue
            shown = np.where(inside, 255.0 * (1.0 - cover.keep), 0.0)
            if cover.ground is None:
                weights[cover.layer] += shown
            else:
                weights[cover.layer] = np.where(inside, shown, np.where(cover.ground.at(x, y), 255.0, 0.0))
        erased = weights[-1]
        u, v, weight = _onto_unit_square(self.source.matrix, x, y, weights[0])
        spread = [(self.source, u, v, weight)]
        if self.below is not None:
            view, remap = self.below
            height, width = remap.field.shape[:2]
            point = bilinear(remap.field, u * width - 0.5, v * height - 0.5)
            px, py = point[..., 0], point[..., 1]
            height, width = view.output_shape
            weight = np.where((px >= 0) & (py >= 0) & (px < width) & (py < height), weight, 0.0)
            spread, under = view._spread(px, py, others=others, noise=noise)
            spread = [(layer, u, v, weight * below / 255.0) for layer, u, v, below in spread]
            erased = erased + weight * under / 255.0
        if others:
            spread += [
                (layer, *_onto_unit_square(layer.matrix, x, y, weight))
                for layer, weight in zip(self.layers, weights[1:-1], strict=True)
            ]
        return spread, erased


def compose(edits: Iterable[Edit], source_shape: Size, grid: Size, *, end_at_grid: bool = False) -> RenderPlan:
    """The plan of a chain of edits on a picture of ``source_shape`` (height, width) pixels.

    ``grid`` is the model's input size, to which size-free edits refer; with ``end_at_grid`` the view is resized to
    it in the end. Raises ``ValueError`` naming the edit if one does not fit the picture that it meets.
    """
    height, width = checked_size(source_shape, "source_shape")
    grid = checked_size(grid, "grid")
    walk = _Walk(height, width, None)
    for edit in edits:
        for concrete in edit.at(walk.height, walk.width, grid):
            if isinstance(concrete, Remap):
                # Photometric edits commute with a change of place; they are drawn once, on the final view.
                photometric, walk.photometric = walk.photometric, []
                below = walk.finish()
                height, width = concrete.output_size(walk.height, walk.width)
                walk = _Walk(height, width, (below, concrete), photometric)
            else:
                walk.step(concrete)
    if end_at_grid and (walk.height, walk.width) != grid:
        walk.scale_to(*grid)
    return walk.finish()


# What every part of :func:`copynce.pixtrace.kernels.write_code` ends with.
_NO_BITS = (-1.0, 0.0, 0.0)
_NO_COVER = (0.0, 0.0, -1.0)
#: The source itself among those parts: all of its unit square.
_WHOLE = (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, *_NO_BITS, *_NO_COVER)
_NOTHING = np.zeros(0, np.uint8)


class _Walk:
    """The state between two edits.

    ``moves``: the maps so far, nine numbers each: unit square of the source -> its pixels -> ... -> current canvas.
    ``clips`` (canvases that later edits exposed the outside of), ``covers`` and ``grounds``: boxes on the canvas of
    their time, twelve numbers each.
    """

    def __init__(
        self,
        height: int,
        width: int,
        below: tuple[RenderPlan, Remap] | None,
        photometric: list[Photometric] | None = None,
    ) -> None:
        self.height, self.width = height, width
        self.moves: list[float] = [*scaling(float(width), float(height))]
        self.clips: list[float] = []
        self.covers: list[float] = []
        self.grounds: list[float] = []
        self.keeps: list[int] = []  # of each cover: weight of 255 that what lies below keeps
        self.layers: list[tuple[float, tuple[float, float, float] | None]] = []  # picture and colour
        self.texts: list[str] = []  # rows of all bitmaps
        self.packed = 0  # bits in them
        self.photometric: list[Photometric] = photometric or []
        self.noise = 0 if below is None else below[0].noise
        self.plain = below is None
        self.below = below

    def step(self, edit: Edit) -> None:
        """Apply one concrete edit; raises ``ValueError`` naming it if it does not fit the canvas."""
        if isinstance(edit, Photometric):
            self.photometric.append(edit)
            return
        height, width = self.height, self.width
        size = edit.output_size(height, width)
        if isinstance(edit, Geometry):
            if edit.exposes:
                self.clips += self._part(0, 0, width, height)
            self.moves += edit.forward(height, width)
            self.plain = self.plain and isinstance(edit, Resize)
        elif isinstance(edit, (PasteOnto, Matte)):
            # The whole rectangle of the picture covers the canvas, its black parts too; of a matte only the object.
            bits = self._pack(edit.mask) if isinstance(edit, Matte) else _NO_BITS
            self.clips += self._part(0, 0, width, height, bits)
            cover = self._cover(edit.opacity, self._layer(edit.picture), len(self.grounds) // 12)
            self.covers += self._part(0, 0, width, height, bits, cover)
            self.moves += edit.forward(height, width) if isinstance(edit, Matte) else translation(edit.left, edit.top)
            self.grounds += self._part(0, 0, edit.canvas_width, edit.canvas_height)
        elif isinstance(edit, (Overlay, Stamp, Erase)):
            bits = _NO_BITS
            if isinstance(edit, Overlay):
                cover = self._cover(1.0 - edit.opacity, self._layer(edit.picture))
            elif isinstance(edit, Stamp):
                bits = self._pack(edit.bits)
                cover = self._cover(1.0 - edit.opacity, self._layer(0.0, edit.color))
            else:
                self.noise = edit.noise
                cover = self._cover(0.0, -1)
            self.covers += self._part(
                edit.left, edit.top, edit.left + edit.width, edit.top + edit.height, bits, cover
            )  # fmt: skip
        else:
            raise TypeError(f"expected an edit of copynce.pixtrace, got {edit!r}")
        self.height, self.width = size

    def scale_to(self, height: int, width: int) -> None:
        """Resize the canvas."""
        self.moves += scaling(width / self.width, height / self.height)
        self.height, self.width = height, width

    def finish(self) -> RenderPlan:
        """The plan of the view that the canvas has become."""
        # Covers that each leave the source visible may hide it where they overlap.
        light = [kept for kept in self.keeps if LEAST_SOURCE_WEIGHT <= kept < 255]
        together = len(light) > 1 and 255 * math.prod(kept / 255 for kept in light) < LEAST_SOURCE_WEIGHT + 2
        plain = self.plain and not self.covers
        numbers = [*self.moves, *self.clips, *_WHOLE, *self.covers, *self.grounds]
        code, places = kernels.write_code(
            np.fromiter(numbers, np.float64, len(numbers)), len(self.moves) // 9, len(self.clips) // 12,
            len(self.keeps), len(self.layers), self.height, self.width, plain, together,
        )  # fmt: skip
        return RenderPlan(
            output_shape=(self.height, self.width),
            source=LayerPlan(code[:3]),
            layers=tuple([LayerPlan(places[k], *look) for k, look in enumerate(self.layers)]),
            photometric=tuple(self.photometric),
            noise=self.noise,
            plain=plain,
            code=code,
            bits=mask_of(("".join(self.texts),)).reshape(-1) if self.texts else _NOTHING,
            below=self.below,
        )

    def _part(
        self, left: float, top: float, right: float, bottom: float,
        bits: tuple[float, float, float] = _NO_BITS, cover: tuple[float, float, float] = _NO_COVER,
    ) -> tuple[float, ...]:  # fmt: skip
        """A box on the current canvas, cut by ``bits`` and by the canvases exposed from now on."""
        return (left, top, right, bottom, len(self.moves) // 9, len(self.clips) // 12, *bits, *cover)

    def _pack(self, bits: Bits) -> tuple[float, float, float]:
        """Note a bitmap: the number of bits before it, its rows and its columns."""
        place = self.packed
        self.texts += bits
        self.packed += len(bits) * len(bits[0])
        return place, len(bits), len(bits[0])

    def _cover(self, keep: float, layer: int, ground: int = -1) -> tuple[float, float, float]:
        """Note what a cover leaves of what lies below: its weight, its layer and its ground."""
        self.keeps.append(round(255 * keep))
        return self.keeps[-1], layer, ground

    def _layer(self, picture: float, color: tuple[float, float, float] | None = None) -> int:
        """Note the look of the next cover's layer; returns its number (0 is the source)."""
        self.layers.append((picture, color))
        return len(self.layers)


def _erased(noise: Points | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8, 1 where the weight of the noise fills a pixel; bytes are overwritten, for they serve nothing else."""
    where = noise.view(np.bool_) if noise.dtype == np.uint8 else np.empty(noise.shape, np.bool_)
    return np.greater(noise, LEAST_SOURCE_WEIGHT, out=where).view(np.uint8)


def _centres(shape: Size) -> tuple[Points, Points]:
    """x and y, each [H, W], of the pixel centres."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    return x, y


def _onto_unit_square(matrix: Matrix, x: Points, y: Points, weight: Points) -> _Point:
    """Points of the view to a picture's unit square: (u, v, weight), weight 0 and (0.5, 0.5) behind the viewer."""
    u, v, w = _apply(np.linalg.inv(matrix), x, y)
    hidden = (w <= 0) | (weight == 0)
    depth = np.where(hidden, 1.0, w)
    return np.where(hidden, 0.5, u) / depth, np.where(hidden, 0.5, v) / depth, np.where(hidden, 0.0, weight)


def _apply(matrix: Points, x: Points, y: Points) -> tuple[Points, Points, Points]:
    """Homogeneous images of the points (x, y)."""
    m = matrix
    return (
        m[0, 0] * x + m[0, 1] * y + m[0, 2],
        m[1, 0] * x + m[1, 1] * y + m[1, 2],
        m[2, 0] * x + m[2, 1] * y + m[2, 2],
    )


def checked_size(size: Size, name: str) -> Size:
    """``size`` as two ints; raises ``ValueError`` naming it if a side is shorter than a pixel."""
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be (height, width) of at least 1 pixel, got {tuple(size)}")
    return int(height), int(width)
