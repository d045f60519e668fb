"""Compose a chain of edits on paper: one projective map per picture, regions as half-planes, blending steps.

Walking the edits multiplies 3x3 matrices only. At the end every picture of the view (the traced source and any
other picture) has one forward map from its *unit square* to the output, and every region (what a canvas once cut off,
where a picture was laid, what was erased) is a set of half-planes in output coordinates. Nothing touches a pixel here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from copynce.pixtrace import kernels
from copynce.pixtrace.edits import Edit, Erase, Geometry, Matrix, Overlay, PasteOnto, Photometric, Size
from copynce.pixtrace.kernels import fade, fill

Planes = np.ndarray  # float64 [K, 3]; see copynce.pixtrace.kernels

#: A pixel is a copy if at least this share of its colour comes from the source: a cover of more than half hides it.
LEAST_SOURCE_WEIGHT = 127


@dataclass(frozen=True)
class LayerPlan:
    """Where one picture lies in the view.

    ``matrix`` [3, 3] float64: forward map of the picture's unit square (x = column / width, y = row / height) to output
    pixels; for a picture of h x w pixels the map is ``matrix @ diag(1/w, 1/h, 1)``. ``picture`` in [0, 1): which
    other picture (0 for the source itself).
    """

    matrix: Matrix
    picture: float = 0.0

    def extent(self) -> tuple[float, float]:
        """Output pixels (height, width) that the whole picture's height and width would span at its largest.

        The local scale of the map at five points of the unit square, the largest of each direction; it chooses the
        antialiased working size before a warp.
        """
        m = self.matrix
        tall = wide = 0.0
        for x, y in ((0.5, 0.5), (0.1, 0.1), (0.9, 0.1), (0.1, 0.9), (0.9, 0.9)):
            u, v, w = m @ (x, y, 1.0)
            if w <= 1e-6:
                continue
            wide = max(wide, float(np.hypot(m[0, 0] - u / w * m[2, 0], m[1, 0] - v / w * m[2, 0]) / w))
            tall = max(tall, float(np.hypot(m[0, 1] - u / w * m[2, 1], m[1, 1] - v / w * m[2, 1]) / w))
        return tall, wide


@dataclass(frozen=True)
class Cover:
    """One blending step, in order: fade what lies below inside of ``region``, then show ``layer`` there.

    ``keep`` is the share of what lay below that still shows. ``layer`` numbers the pictures (0 the source), -1 is the
    erasing noise. ``ground`` is the region that a new bottom canvas fills, None unless the layer is such a canvas.
    """

    region: Planes
    keep: float
    layer: int
    ground: Planes | None = None


@dataclass(frozen=True)
class RenderPlan:
    """A view, composed: what the pixel executor draws and the table traces.

    ``visible``: half-planes of the source in output coordinates. ``photometric``: colour edits in order.
    ``noise``: which noise fills the erased region.
    """

    output_shape: Size
    source: LayerPlan
    visible: Planes
    layers: tuple[LayerPlan, ...] = ()
    covers: tuple[Cover, ...] = ()
    photometric: tuple[Photometric, ...] = ()
    noise: int = 0
    #: True if the view is the whole source, resized: no warp needed.
    plain: bool = field(default=False)

    @property
    def opaque(self) -> bool:
        """True if the source fills the whole view: nothing to blend, nothing black, nothing erased."""
        return len(self.visible) == 0 and not self.covers

    def weights(self) -> np.ndarray:
        """uint8 [1 + len(layers), H, W]: share (of 255) that the source and each other picture have in a pixel.

        Sums to at most 255 (within rounding); the rest is black. Erased pixels are 0 throughout.
        """
        return self._blend()[:-1]

    def erase_mask(self) -> np.ndarray:
        """uint8 [H, W]: 1 where the view is filled with noise."""
        return (self._blend()[-1] > LEAST_SOURCE_WEIGHT).astype(np.uint8)

    def source_weight(self) -> np.ndarray:
        """uint8 [H, W]: the source's row of :meth:`weights`, alone."""
        weight = np.zeros(self.output_shape, np.uint8)
        fill(self.visible, 255, weight)
        for cover in self.covers:
            fade(cover.region, cover.keep, weight)
        return weight

    def _blend(self) -> np.ndarray:
        """Blending weights of the source, the other pictures and, last, the noise."""
        weights = np.zeros((2 + len(self.layers), *self.output_shape), np.uint8)
        fill(self.visible, 255, weights[0])
        for cover in self.covers:
            for k in range(len(weights)):
                fade(cover.region, cover.keep, weights[k])
            if cover.ground is None:
                fill(cover.region, round(255 * (1.0 - cover.keep)), weights[cover.layer])
            else:
                fill(cover.ground, 255, weights[cover.layer])
                fade(cover.region, 1.0 - cover.keep, weights[cover.layer])
        return weights

    def trace(self, grid: Size, index: np.ndarray) -> Matrix:
        """Fill ``index`` (int32 [H, W] of the view) with grid pixels; returns the forward map, grid to view."""
        grid_height, grid_width = grid
        forward = np.ascontiguousarray(self.source.matrix @ np.diag([1.0 / grid_width, 1.0 / grid_height, 1.0]))
        kernels.trace_projective(np.linalg.inv(forward), self.visible, grid_height, grid_width, index)
        if self.covers:
            kernels.hide(self.source_weight(), LEAST_SOURCE_WEIGHT, index)
        return forward


def compose(edits: Iterable[Edit], source_shape: Size, grid: Size, *, end_at_grid: bool = False) -> RenderPlan:
    """The plan of a chain of edits on a picture of ``source_shape`` (height, width) pixels.

    ``grid`` is the model's input size, to which size-free edits refer; with ``end_at_grid`` the view is resized to
    it in the end. Raises ``ValueError`` naming the edit if one does not fit the picture that it meets.
    """
    height, width = _checked_size(source_shape, "source_shape")
    grid = _checked_size(grid, "grid")
    walk = _Walk(height, width)
    for edit in edits:
        for concrete in edit.at(walk.height, walk.width, grid):
            walk.step(concrete)
    if end_at_grid and (walk.height, walk.width) != grid:
        walk.scale_to(*grid)
    return walk.finish()


class _Walk:
    """The state between two edits: all maps lead to the *current* canvas."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.forward: Matrix = np.diag([float(width), float(height), 1.0])  # unit square of the source -> canvas
        self.layers: list[tuple[Matrix, float, int, int]] = []  # map at its birth, picture, born at stage
        self.covers: list[tuple[_Region, float, int, _Region | None]] = []
        self.clips: list[_Region] = []  # canvases that later edits exposed the outside of
        self.stages: list[Matrix] = []  # self.forward when a layer or region was made
        self.photometric: list[Photometric] = []
        self.noise = 0
        self.plain = True

    def step(self, edit: Edit) -> None:
        size = edit.output_size(self.height, self.width)
        if isinstance(edit, Photometric):
            self.photometric.append(edit)
            return
        if isinstance(edit, Geometry):
            if edit.exposes:
                self.clips.append(self._region(0.0, 0.0, self.width, self.height))
            self.forward = edit.matrix_for(self.height, self.width) @ self.forward
            self.plain = self.plain and type(edit).__name__ == "Resize"
        elif isinstance(edit, PasteOnto):
            # The whole rectangle of the picture covers the canvas, its black parts too.
            self.clips.append(self._region(0.0, 0.0, self.width, self.height))
            shift = np.array([[1.0, 0.0, edit.left], [0.0, 1.0, edit.top], [0.0, 0.0, 1.0]])
            self.forward = shift @ self.forward
            pasted = self._region(edit.left, edit.top, edit.left + self.width, edit.top + self.height)
            ground = self._region(0.0, 0.0, edit.canvas_width, edit.canvas_height)
            self._add_layer(0.0, 0.0, edit.canvas_width, edit.canvas_height, edit.picture)
            self.covers.append((pasted, edit.opacity, len(self.layers), ground))
        elif isinstance(edit, Overlay):
            box = self._region(edit.left, edit.top, edit.left + edit.width, edit.top + edit.height)
            self._add_layer(edit.left, edit.top, edit.width, edit.height, edit.picture)
            self.covers.append((box, 1.0 - edit.opacity, len(self.layers), None))
        elif isinstance(edit, Erase):
            box = self._region(edit.left, edit.top, edit.left + edit.width, edit.top + edit.height)
            self.covers.append((box, 0.0, -1, None))
            self.noise = edit.noise
        else:
            raise TypeError(f"expected an edit of copynce.pixtrace, got {edit!r}")
        self.height, self.width = size

    def scale_to(self, height: int, width: int) -> None:
        self.forward = np.diag([width / self.width, height / self.height, 1.0]) @ self.forward
        self.height, self.width = height, width

    def finish(self) -> RenderPlan:
        back = np.linalg.inv(self.forward)  # output -> unit square of the source
        # Output coordinates to the canvas of each stage: stages[k] maps the unit square there.
        layers = tuple(
            LayerPlan(np.ascontiguousarray(self.forward @ np.linalg.inv(self.stages[stage]) @ matrix), picture)
            for matrix, picture, stage, _ in self.layers
        )
        covers = tuple(
            Cover(self._planes(region, back), keep, layer, None if ground is None else self._planes(ground, back))
            for region, keep, layer, ground in self.covers
        )
        whole = _Region(0.0, 0.0, 1.0, 1.0, stage=-1, clips=0)
        return RenderPlan(
            output_shape=(self.height, self.width),
            source=LayerPlan(np.ascontiguousarray(self.forward)),
            visible=self._planes(whole, back),
            layers=layers,
            covers=covers,
            photometric=tuple(self.photometric),
            noise=self.noise,
            plain=self.plain and not covers,
        )

    def _region(self, left: float, top: float, right: float, bottom: float) -> _Region:
        self.stages.append(self.forward)
        return _Region(left, top, right, bottom, stage=len(self.stages) - 1, clips=len(self.clips))

    def _add_layer(self, left: float, top: float, width: float, height: float, picture: float) -> None:
        self.stages.append(self.forward)
        place = np.array([[width, 0.0, left], [0.0, height, top], [0.0, 0.0, 1.0]], dtype=np.float64)
        self.layers.append((place, picture, len(self.stages) - 1, 0))

    def _planes(self, region: _Region, back: Matrix) -> Planes:
        """Half-planes of the region and of all canvases that cut it later, in output coordinates, pruned."""
        planes = []
        for box in (region, *self.clips[region.clips :]):
            stage = back if box.stage < 0 else self.stages[box.stage] @ back
            x, y, w = stage
            planes += [x - box.left * w, box.right * w - x, y - box.top * w, box.bottom * w - y]
            if w[0] != 0.0 or w[1] != 0.0:
                planes.append(w)  # in front of the viewer
        found = np.array(planes)
        # Scaled so that a plane's value is the distance in pixels; then "everywhere inside" is a plain comparison.
        norm = np.hypot(found[:, 0], found[:, 1])
        found /= np.where(norm > 0.0, norm, np.abs(found[:, 2]) + 1e-300)[:, None]
        corners = np.array([[0.5, 0.5, 1], [self.width - 0.5, 0.5, 1], [0.5, self.height - 0.5, 1], [self.width - 0.5, self.height - 0.5, 1]])
        cuts = (found @ corners.T).min(axis=1) < 1e-6
        return np.ascontiguousarray(found[cuts])


@dataclass(frozen=True)
class _Region:
    """A box on the canvas of a stage, cut by the canvases exposed from number ``clips`` on."""

    left: float
    top: float
    right: float
    bottom: float
    stage: int
    clips: int


def _checked_size(size: Size, name: str) -> Size:
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be (height, width) of at least 1 pixel, got {tuple(size)}")
    return int(height), int(width)
