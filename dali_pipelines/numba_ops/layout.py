"""Where the numbers of a view and of a cut lie in their rows: written by packing, read by the graph and compiled code.

Compiled code takes these places in as constants, so they stand in a file that needs NumPy alone.
"""

from __future__ import annotations

import math

import numpy as np

#: Clipped steps of the colour jitter: its four, then a grayscale.
COLOUR_STEPS = 5

#: Other pictures that one view can show.
LAYERS = 2

#: ITU-R 601 luma of R, G, B, which Pillow's grey and torchvision's jitter mean too.
LUMA = (0.299, 0.587, 0.114)

#: What a view's row of numbers (float32) holds, in this order, and the shape of each. The first four are of the view's
#: own picture and of its layers: how each comes to its place (``AS_IS``, ``BY_MATRIX``, or the number of its dense
#: map), height and width to which it is shrunk before, its matrix (output points to its pixels), and the plane of its
#: weights. Numbers of planes, maps and noises are -1 where there is none.
NUMBERS: dict[str, tuple[int, ...]] = {
    "way": (1 + LAYERS,),
    "working": (1 + LAYERS, 2),
    "matrix": (1 + LAYERS, 3, 3),
    "weight": (1 + LAYERS,),
    "painted": (),  # first of the three planes that hold painted colours
    "steps": (COLOUR_STEPS, 3, 4),
    "mixing": (3, 4),
    "levels": (256,),
    "drops": (),  # plane
    "window": (),
    "cells": (2,),
    "places": (),  # map
    "grain": (),  # noise
    "sigma": (),
    "reach": (),
    "quality": (),
    "mask": (),  # plane; its noise is the first
}
AS_IS, BY_MATRIX = -2, -1


def _slots() -> dict[str, slice]:
    ends = np.cumsum([math.prod(shape) for shape in NUMBERS.values()]).tolist()
    return {name: slice(end - math.prod(NUMBERS[name]), end) for name, end in zip(NUMBERS, ends, strict=True)}


#: Where in the row each of ``NUMBERS`` is.
SLOTS = _slots()
#: Numbers in a row.
WIDTH = sum(math.prod(shape) for shape in NUMBERS.values())

# The same for compiled code, which reads no dict: begin, and end where there are several.
WAY, WEIGHT = SLOTS["way"].start, SLOTS["weight"].start
WORKING, WORKING_END = SLOTS["working"].start, SLOTS["working"].stop
MATRIX, MATRIX_END = SLOTS["matrix"].start, SLOTS["matrix"].stop
STEPS, STEPS_END = SLOTS["steps"].start, SLOTS["steps"].stop
MIXING, MIXING_END = SLOTS["mixing"].start, SLOTS["mixing"].stop
LEVELS, LEVELS_END = SLOTS["levels"].start, SLOTS["levels"].stop
PAINTED, MASK, WINDOW = SLOTS["painted"].start, SLOTS["mask"].start, SLOTS["window"].start
SIGMA, REACH = SLOTS["sigma"].start, SLOTS["reach"].start

#: The row of a cut (float64): width and height of the view in pixels, then the affine map [2, 3] of its points to the
#: picture's.
CUT_WIDTH, CUT_HEIGHT, CUT_MAP = 0, 1, 2
