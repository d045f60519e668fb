"""Compose a chain of edits on paper: one projective map per picture, regions as half-planes, blending steps.

Walking the edits only notes 3x3 matrices and boxes; one compiled call multiplies them. Then every picture of the view
(the traced source and any other picture) has one forward map from its *unit square* to the output, and every region
(what a canvas once cut off, where a picture was laid, what was erased) is a set of half-planes in output coordinates,
cut by bitmaps where an object was cut out. Nothing touches a pixel here. Numbers stay in one list until the end:
composing must cost less than tracing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from copynce.pixtrace.bitmaps import Bits, mask_of
from copynce.pixtrace.compiled.slots import MAP_ROWS, MOVE_SIZE, NO_BITS, NO_GROUND, NOISE, PART_SIZE
from copynce.pixtrace.compiled.spans import LEAST_SOURCE_WEIGHT
from copynce.pixtrace.compiled.writing import write_code
from copynce.pixtrace.edits.base import Color, Cover, Edit, Photometric, Size, checked_size
from copynce.pixtrace.edits.dense import Remap
from copynce.pixtrace.matrices import scaling
from copynce.pixtrace.view.code import Layer
from copynce.pixtrace.view.composed_view import ComposedView


def compose(edits: Iterable[Edit], source_shape: Size, grid: Size, *, end_at_grid: bool = False) -> ComposedView:
    """The view that a chain of edits makes of a picture of ``source_shape`` (height, width) pixels.

    ``grid`` is the model's input size, to which relative edits refer; with ``end_at_grid`` the view is resized to
    it in the end. Raises ``ValueError`` naming the edit if one does not fit the picture that it meets.
    """
    height, width = checked_size(source_shape, "source_shape")
    grid = checked_size(grid, "grid")
    walk = _Walk(height, width, None)
    for edit in edits:
        if isinstance(edit, Photometric):
            walk.photometric.append(edit)
            continue
        for absolute in edit.absolute(walk.height, walk.width, grid):
            if isinstance(absolute, Remap):
                # Photometric edits commute with a change of place; they are drawn once, on the final view.
                photometric, walk.photometric = walk.photometric, []
                below = walk.finish()
                height, width = absolute.output_size(walk.height, walk.width)
                walk = _Walk(height, width, (below, absolute), photometric)
            else:
                walk.step(absolute)
    if end_at_grid and (walk.height, walk.width) != grid:
        walk.scale_to(*grid)
    return walk.finish()


# What the parts of compiled.slots end with: PART_BITS, then PART_KEPT, PART_LAYER and PART_GROUND.
_UNCUT = (float(NO_BITS), 0.0, 0.0)
_NO_COVER = (0.0, 0.0, float(NO_GROUND))
#: The source itself among those parts: all of its unit square.
_WHOLE = (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, *_UNCUT, *_NO_COVER)
_NOTHING = np.zeros(0, np.uint8)


class _Walk:
    """The state between two edits.

    ``moves``: the maps so far, nine numbers each: unit square of the source -> its pixels -> ... -> current canvas.
    ``clips`` (canvases that later edits exposed the outside of), ``covers`` and ``grounds``: parts, boxes on the canvas
    of their time, twelve numbers each.
    """

    def __init__(
        self,
        height: int,
        width: int,
        below: tuple[ComposedView, Remap] | None,
        photometric: list[Photometric] | None = None,
    ) -> None:
        self.height, self.width = height, width
        self.moves: list[float] = [*scaling(float(width), float(height))]
        self.clips: list[float] = []
        self.covers: list[float] = []
        self.grounds: list[float] = []
        self.kept: list[int] = []  # of each cover: weight of 255 that what lies below keeps
        self.layers: list[tuple[float, Color | None]] = []  # picture_choice and colour
        self.texts: list[str] = []  # rows of all bitmaps
        self.packed = 0  # bits in them
        self.photometric: list[Photometric] = photometric or []
        self.noise_seed = 0 if below is None else below[0].noise_seed
        self.plain = below is None
        self.below = below

    def step(self, edit: Edit) -> None:
        """Apply one absolute edit that moves or covers; raises ``ValueError`` naming it if it does not fit the canvas.

        The order counts: a part notes how many moves lead to its canvas and which clips came before it. So covers come
        before the edit's own move, a ground, which lies on the new canvas, after it.
        """
        height, width = self.height, self.width
        size = edit.output_size(height, width)
        cover = edit.cover(height, width)
        if edit.exposes:
            self.clips += self._part((0, 0, width, height))
        if cover is not None:
            self._lay(cover)
        forward = edit.forward(height, width)
        if forward is not None:
            self.moves += forward
            self.plain = self.plain and edit.only_scales
        self.height, self.width = size
        if cover is not None and cover.beneath:
            self.grounds += self._part((0, 0, self.width, self.height))

    def _lay(self, cover: Cover) -> None:
        """Note a cover of the current canvas."""
        box, keep, picture_choice, color, noise_seed, bits, beneath = cover
        cut = _UNCUT if bits is None else self._pack(bits)
        ground = NO_GROUND
        if beneath:
            # The picture's outline, or the object's, cuts off what later edits would otherwise show of its canvas.
            self.clips += self._part(box, cut)
            ground = len(self.grounds) // PART_SIZE
        if noise_seed is None:
            self.layers.append((picture_choice, color))
            layer = len(self.layers)  # 0 is the source
        else:
            self.noise_seed = noise_seed
            layer = NOISE
        kept = round(255 * keep)
        self.kept.append(kept)
        self.covers += self._part(box, cut, (kept, layer, ground))

    def scale_to(self, height: int, width: int) -> None:
        """Resize the canvas."""
        self.moves += scaling(width / self.width, height / self.height)
        self.height, self.width = height, width

    def finish(self) -> ComposedView:
        """The view that the canvas has become."""
        # Covers that each leave the source visible may hide it where they overlap. Each rounds by up to half a weight,
        # and one more is for safety: drawing weights for nothing costs time, not drawing them a wrong table.
        light = [kept for kept in self.kept if LEAST_SOURCE_WEIGHT <= kept < 255]
        together = len(light) > 1 and 255 * math.prod(kept / 255 for kept in light) < LEAST_SOURCE_WEIGHT + 2
        plain = self.plain and not self.covers
        numbers = [*self.moves, *self.clips, *_WHOLE, *self.covers, *self.grounds]
        code, places = write_code(
            np.fromiter(numbers, np.float64, len(numbers)), len(self.moves) // MOVE_SIZE, len(self.clips) // PART_SIZE,
            len(self.kept), len(self.layers), self.height, self.width, plain, together,
        )  # fmt: skip
        return ComposedView(
            output_shape=(self.height, self.width),
            source=Layer(code[:MAP_ROWS]),
            layers=tuple([Layer(places[k], *look) for k, look in enumerate(self.layers)]),
            photometric=tuple(self.photometric),
            noise_seed=self.noise_seed,
            plain=plain,
            code=code,
            bits=mask_of(("".join(self.texts),)).reshape(-1) if self.texts else _NOTHING,
            below=self.below,
        )

    def _part(
        self,
        box: tuple[int, int, int, int],
        cut: tuple[float, float, float] = _UNCUT,
        cover: tuple[float, float, float] = _NO_COVER,
    ) -> tuple[float, ...]:
        """A box on the current canvas, cut by a bitmap and by the canvases exposed from now on."""
        return (*box, len(self.moves) // MOVE_SIZE, len(self.clips) // PART_SIZE, *cut, *cover)

    def _pack(self, bits: Bits) -> tuple[float, float, float]:
        """Note a bitmap: the number of bits before it, its rows and its columns."""
        start = self.packed
        self.texts += bits
        self.packed += len(bits) * len(bits[0])
        return start, len(bits), len(bits[0])
