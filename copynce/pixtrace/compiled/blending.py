"""What the pixel executor blends a view's pictures with: their weights in every pixel, and flat colours painted."""

from __future__ import annotations

import numpy as np

from copynce.compiled_cache import njit
from copynce.pixtrace.compiled.maps import OPTIONS
from copynce.pixtrace.compiled.slots import (
    COVERS,
    FIRST_REGION,
    GROUND,
    KEPT,
    LAYER,
    NO_GROUND,
    NOISE,
    REGION_ROWS,
    bitmaps_of,
    is_cut,
    next_region,
)
from copynce.pixtrace.compiled.spans import draw_region, fade, fill, new_scratch, spans_of


@njit("void(float64[:, ::1], uint8[::1], float32[:, ::1], uint8[:, :, ::1], uint8[:, :, ::1])", **OPTIONS)
def blend(code, bits, colours, weights, painted):  # type: ignore[no-untyped-def]
    """Blending weights of a view, and its flat colours painted.

    ``weights`` uint8 [1 + L (+ 1), H, W]: the weight (of 255) of the source and of each layer, as if nothing were
    erased, and, last, of the noise if some erases. ``colours`` float32 [L, 3]: red, green and
    blue in [0, 1] of the layers that are a colour, -1 for pictures. ``painted`` uint8 [H, W, 3]: the sum of the
    colours, each times its weight, rounded; empty to leave it out.
    """
    count, height, width = weights.shape
    weights[:] = 0
    painted[:] = 0
    scratch = new_scratch(height, width)
    drawn = scratch.drawn
    shown = np.zeros(count, np.bool_)
    shown[0] = True
    fill(draw_region(code, FIRST_REGION, bits, scratch), is_cut(code, FIRST_REGION), drawn, 255, weights[0])
    covers = int(code[COVERS])
    first_cover = next_region(code, FIRST_REGION)
    first_ground = first_cover
    for _ in range(covers):
        first_ground = next_region(code, first_ground)
    head = first_cover
    for _ in range(covers):
        kept = int(code[head, KEPT])
        layer = int(code[head + 1, LAYER])
        number = int(code[head + 1, GROUND])
        own = weights[layer]  # NOISE is -1, and its weights are the last
        if number != NO_GROUND:
            ground = first_ground
            for _ in range(number):
                ground = next_region(code, ground)
            fill(draw_region(code, ground, bits, scratch), is_cut(code, ground), drawn, 255, own)
        cut = is_cut(code, head)
        spans = draw_region(code, head, bits, scratch)
        if layer != NOISE:
            for k in range(count):
                if shown[k]:
                    fade(spans, cut, drawn, kept, weights[k])
        if number != NO_GROUND:  # the canvas is in the way: it gives room to the picture that lies on it
            fade(spans, cut, drawn, 255 - kept, own)
        else:
            fill(spans, cut, drawn, 255 - kept, own)
        shown[layer] = True
        head = next_region(code, head)
    if painted.size == 0:
        return
    head = first_cover
    for _ in range(covers):
        layer = int(code[head + 1, LAYER])
        if layer > 0 and colours[layer - 1, 0] >= 0.0:
            red = colours[layer - 1, 0]
            green = colours[layer - 1, 1]
            blue = colours[layer - 1, 2]
            # A colour shows nowhere but in the region that it was laid on.
            spans = spans_of(code, head + REGION_ROWS, bitmaps_of(code, head), scratch)
            for i in range(height):
                for j in range(spans[i, 0], spans[i, 1]):
                    if weights[layer, i, j] != 0:
                        weight = np.float32(weights[layer, i, j])
                        painted[i, j, 0] = min(255, painted[i, j, 0] + int(weight * red + 0.5))
                        painted[i, j, 1] = min(255, painted[i, j, 1] + int(weight * green + 0.5))
                        painted[i, j, 2] = min(255, painted[i, j, 2] + int(weight * blue + 0.5))
        head = next_region(code, head)
