"""PixTrace for a pipeline of your own: a table for a picture that OpenCV (or anything else) has warped.

    python examples/pixtrace_own_pipeline.py PICTURE --angle 20 --scale 0.8 --shift 12 -7 --out traced.png

A matrix of OpenCV maps pixel *centres* at whole numbers: (0, 0) is the middle of the first pixel. PixTrace's
coordinates are continuous: the first pixel covers [0, 1), its middle is (0.5, 0.5). So a matrix M of OpenCV is here

    T(0.5) M T(-0.5)        with T(s) the shift of x and y by s

and without it every table is off by up to a pixel wherever the picture is scaled or turned. The script warps a picture
whose values are the pixels' own places, as ``cv2.warpPerspective(picture, M, dsize, flags=cv2.INTER_NEAREST)`` does,
and compares each pixel with the table. It needs NumPy and copynce.pixtrace; Pillow and copynce.inspect only draw.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from copynce.inspect import draw_traced_pixels
from copynce.pixtrace import Crop, Pad, Perspective, bridge, trace
from copynce.pixtrace.edits import Edit

SIDE = 224


def warp_of_opencv(matrix: NDArray[np.float64], source_shape: tuple[int, int], dsize: tuple[int, int]) -> list[Edit]:
    """The edits of ``cv2.warpPerspective(picture, matrix, dsize)``; for warpAffine give its 2x3 matrix a third row.

    matrix [3, 3]: forward, as OpenCV takes it (without WARP_INVERSE_MAP). source_shape: (height, width) of the picture,
    dsize: (width, height) of the result.
    """
    half = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
    continuous = half @ matrix @ np.linalg.inv(half)
    (height, width), (new_width, new_height) = source_shape, dsize
    canvas = Pad(0, 0, max(new_width - width, 0), max(new_height - height, 0))  # Perspective keeps the canvas' size
    return [canvas, Perspective(tuple(map(tuple, continuous.tolist()))), Crop(0, 0, new_height, new_width)]


def warp_nearest(picture: NDArray, matrix: NDArray[np.float64], dsize: tuple[int, int], outside: int = 0) -> NDArray:
    """A plain warp: each pixel of the result is the picture's nearest one, as with cv2.INTER_NEAREST."""
    width, height = dsize
    y, x = np.mgrid[:height, :width]
    source_x, source_y, w = np.tensordot(np.linalg.inv(matrix), np.stack([x, y, np.ones_like(x)]), axes=1)
    column, row = (np.floor(value / w + 0.5).astype(int) for value in (source_x, source_y))
    inside = (row >= 0) & (row < picture.shape[0]) & (column >= 0) & (column < picture.shape[1])
    result = np.full((height, width, *picture.shape[2:]), outside, picture.dtype)
    result[inside] = picture[row[inside], column[inside]]
    return result


def rotation(angle_deg: float, scale: float, shift: tuple[float, float], side: int) -> NDArray[np.float64]:
    """cv2.getRotationMatrix2D about the picture's middle, moved, as 3x3."""
    cosine, sine = scale * math.cos(math.radians(angle_deg)), scale * math.sin(math.radians(angle_deg))
    middle = (side - 1) / 2
    x = (1 - cosine) * middle - sine * middle + shift[0]
    y = sine * middle + (1 - cosine) * middle + shift[1]
    return np.array([[cosine, sine, x], [-sine, cosine, y], [0.0, 0.0, 1.0]])


def main(arguments: list[str] | None = None) -> float:
    """Trace, compare, draw; returns the share of the pixels on which warp and table agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--angle", type=float, default=20.0, help="degrees, counter-clockwise")
    parser.add_argument("--scale", type=float, default=0.8)
    parser.add_argument("--shift", type=float, nargs=2, default=(12.0, -7.0), help="pixels, right and down")
    parser.add_argument("--out", type=Path, help="PNG of the traced pixels")
    given = parser.parse_args(arguments)

    original = np.asarray(Image.open(given.picture).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    matrix = rotation(given.angle, given.scale, given.shift, SIDE)
    query_pixels = warp_nearest(original, matrix, (SIDE, SIDE))
    query = trace(warp_of_opencv(matrix, (SIDE, SIDE), (SIDE, SIDE)), (SIDE, SIDE), grid=(SIDE, SIDE))

    places = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)  # a picture whose values are its pixels' places
    agree = float(np.mean(warp_nearest(places, matrix, (SIDE, SIDE), outside=-1) == query.index))
    shown = np.mean(query.index >= 0)
    print(f"{agree:.4%} of the pixels have the place that the table says; {shown:.1%} show the picture")

    # The reference is the picture itself. Two edited views meet through it: these two go into copynce_loss.
    reference = trace([], (SIDE, SIDE), grid=(SIDE, SIDE))
    query_to_reference, reference_to_query = bridge(query, reference), bridge(reference, query)
    if given.out is not None:
        drawn = draw_traced_pixels(query_pixels, original, query_to_reference.index, reference_to_query.index)
        drawn.save(given.out)
    return agree


if __name__ == "__main__":
    main()
