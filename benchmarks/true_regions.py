"""Where MiniDISC's queries show their references, from the edits that queries_meta.jsonl tells.

The numbers of an edit and the sizes of both files give the projective map of reference to query, and the polygon of the
query that shows the reference. What covers a part of it (emoji, text, stripes, another photo) is not cut out of the
polygon: the region is that of the picture as it lies in the query. Not told, and so no region:

* the corners of ``perspective``, and where in its template ``screenshot`` has the picture;
* the shape of a ``crop`` (only its area) where an ``onto_photo`` later hides it: else the query's shape tells it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from copynce.copies.polygons import clipped, mapped, rectangle

_UNTOLD = ("perspective", "screenshot")
_STILL = ("color_jitter", "grayscale", "saturation", "sharpen", "blur", "noise", "pixelize", "jpeg", "shuffle_pixels",
          "overlay_text", "overlay_emoji", "overlay_stripes", "overlay_photo")  # fmt: skip
_SHAPES = np.exp(np.linspace(-1.5, 1.5, 6001))  # width by height of a crop, relative to the picture's
_AGREES = 0.03  # of the shape that the edits give and the query's own: files have whole pixels


@dataclass(frozen=True)
class TrueRegion:
    """geometry: float64 [3, 3], points of the reference in pixels to those of the query. query, reference: polygons
    [n, 2] in pixels of the files."""

    geometry: NDArray[np.float64]
    query: NDArray[np.float64]
    reference: NDArray[np.float64]


def true_region(
    edits: Sequence[Mapping[str, Any]], reference_size: tuple[int, int], query_size: tuple[int, int]
) -> TrueRegion | None:
    """The copied region of a query, None where the edits do not tell it; sizes are (width, height) in pixels."""
    names = [str(edit["op"]) for edit in edits]
    if any(name in _UNTOLD for name in names):
        return None
    shape = 1.0
    if "crop" in names and not set(names[names.index("crop") :]) & {"onto_photo"}:
        wanted = query_size[0] / query_size[1]
        frames = [_frame(edits, reference_size, query_size, shape) for shape in _SHAPES]
        off = [abs(math.log(f.width / f.height / wanted)) if f is not None else math.inf for f in frames]
        near = _SHAPES[np.array(off) < _AGREES / 3]  # a turned picture may have the same shape by two crops
        if not len(near) or near[-1] / near[0] > 1 + 3 * _AGREES:
            return None
        shape = float(_SHAPES[int(np.argmin(off))])
    elif "crop" in names:
        return None
    frame = _frame(edits, reference_size, query_size, shape)
    if frame is None or abs(math.log(frame.width / frame.height * query_size[1] / query_size[0])) > _AGREES:
        return None
    to_file = np.diag([query_size[0] / frame.width, query_size[1] / frame.height, 1.0])
    geometry = to_file @ frame.geometry
    query = mapped(to_file, frame.polygon)
    return TrueRegion(geometry, query, mapped(np.linalg.inv(geometry), query))


@dataclass
class _Frame:
    """The picture so far: its size, the map of the reference's points to it, and the polygon that shows them."""

    width: float
    height: float
    geometry: NDArray[np.float64]
    polygon: NDArray[np.float64]

    def move(self, matrix: NDArray[np.float64], width: float, height: float) -> None:
        self.geometry = matrix @ self.geometry
        self.width, self.height = width, height
        self.polygon = clipped(mapped(matrix, self.polygon), rectangle(width, height))


def _frame(
    edits: Sequence[Mapping[str, Any]], reference_size: tuple[int, int], query_size: tuple[int, int], shape: float
) -> _Frame | None:
    """The picture after all edits, None for a crop of this shape that leaves it."""
    width, height = reference_size
    frame = _Frame(float(width), float(height), np.eye(3), rectangle(width, height))
    for edit in edits:
        name, w, h = edit["op"], frame.width, frame.height
        if name in _STILL:
            continue
        if name == "hflip":
            frame.move(np.array([[-1, 0, w], [0, 1, 0], [0, 0, 1.0]]), w, h)
        elif name == "vflip":
            frame.move(np.array([[1, 0, 0], [0, -1, h], [0, 0, 1.0]]), w, h)
        elif name == "crop":
            cut = w * math.sqrt(edit["area"] * shape), h * math.sqrt(edit["area"] / shape)
            if edit["x"] * w + cut[0] > w * 1.01 or edit["y"] * h + cut[1] > h * 1.01:
                return None
            frame.move(_shift(-edit["x"] * w, -edit["y"] * h), *cut)
        elif name == "aspect_ratio":
            frame.move(np.diag([math.sqrt(edit["factor"]), 1 / math.sqrt(edit["factor"]), 1.0]),
                       w * math.sqrt(edit["factor"]), h / math.sqrt(edit["factor"]))  # fmt: skip
        elif name == "pad":
            frame.move(_shift(edit["w"] * w, edit["h"] * h), w * (1 + 2 * edit["w"]), h * (1 + 2 * edit["h"]))
        elif name == "meme":
            frame.move(_shift(0, edit["band"] * h), w, h * (1 + (2 if edit["both"] else 1) * edit["band"]))
        elif name == "skew":  # x of the input = x + factor * (y - h / 2)
            frame.move(np.array([[1, -edit["factor"], edit["factor"] * h / 2], [0, 1, 0], [0, 0, 1]]), w, h)
        elif name == "rotate":
            frame.move(*_rotation(edit, w, h))
        elif name == "onto_photo":
            # The picture keeps its shape and takes size ** 2 of the photo's area, whose shape is the query's.
            canvas = query_size[0] / query_size[1], 1.0
            scale = edit["size"] * math.sqrt(canvas[0] / (w * h))
            matrix = _shift(edit["x"] * canvas[0], edit["y"]) @ np.diag([scale, scale, 1.0])
            frame.move(matrix, *canvas)
        else:
            return None
    return frame


def _shift(x: float, y: float) -> NDArray[np.float64]:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])


def _rotation(edit: Mapping[str, Any], w: float, h: float) -> tuple[NDArray[np.float64], float, float]:
    """A turn counter-clockwise about the middle, on a canvas that holds all of the picture, or (corners "cut") on the
    largest upright rectangle within it."""
    angle = math.radians(edit["degrees"])
    cos, sin = math.cos(angle), math.sin(angle)
    if edit.get("corners") == "cut":
        width, height = _largest_within(w, h, abs(sin), abs(cos))
    else:
        width, height = w * abs(cos) + h * abs(sin), w * abs(sin) + h * abs(cos)
    turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    return _shift(width / 2, height / 2) @ turn @ _shift(-w / 2, -h / 2), width, height


def _largest_within(w: float, h: float, sin: float, cos: float) -> tuple[float, float]:
    """The upright rectangle of largest area in a turned one of w x h."""
    long, short = max(w, h), min(w, h)
    if short <= 2 * sin * cos * long:  # two of its corners touch the long side
        half = short / 2
        return (half / sin, half / cos) if w >= h else (half / cos, half / sin)
    both = cos * cos - sin * sin
    return (w * cos - h * sin) / both, (h * cos - w * sin) / both
