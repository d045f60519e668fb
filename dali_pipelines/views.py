"""From a composed view (``RenderPlan``) to the arrays that the graph is fed with. Plain numbers; no DALI here."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import copynce.pixtrace.kernels as kernels
from copynce.pixtrace import (
    Blur,
    Clahe,
    ColorJitter,
    ColorMatrix,
    Convolve,
    Equalize,
    Grayscale,
    Jpeg,
    LayerPlan,
    Median,
    Noise,
    Pixelate,
    Rain,
    RenderPlan,
    ShufflePixels,
    ToneCurve,
)
from copynce.pixtrace.compose import Empty
from copynce.pixtrace.edits import PHOTOMETRIC_ORDER
from dali_pipelines.sources import EncodedPicture, Size

#: Other pictures that one view can show.
LAYERS = 2

#: A picture is shrunk (antialiased) before the warp if the warp would minify it more than this.
MAX_MINIFICATION = 1.5

#: ITU-R 601 luma of R, G, B.
LUMA = (0.299, 0.587, 0.114)

#: Clipped steps of the colour operator: the four of ColorJitter, then Grayscale.
COLOUR_STEPS = 5
_NO_STEPS = np.tile(np.eye(3, 4, dtype=np.float32), (COLOUR_STEPS, 1, 1))
_LUMA = np.array(LUMA, np.float32)
#: Hue turns about the grey axis in YIQ (NTSC), as DALI's own operator does: by ``_ALONG_GREY`` plus cosine and sine.
_TO_YIQ = np.array([LUMA, (0.596, -0.274, -0.321), (0.211, -0.523, 0.311)])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
_ALONG_GREY = _FROM_YIQ @ np.diag([1.0, 0.0, 0.0]) @ _TO_YIQ
_TURNED_BY_COSINE = _FROM_YIQ @ np.diag([0.0, 1.0, 1.0]) @ _TO_YIQ
_TURNED_BY_SINE = _FROM_YIQ @ [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]] @ _TO_YIQ

#: Offsets of the noise texture per axis; an Erase's ``noise`` chooses one of their square.
_NOISE_OFFSETS = 256

#: Standard deviation in pixels below which a Gaussian leaves an 8-bit picture as it is.
_LEAST_SIGMA = 0.2

#: Pixels that a drop of Rain is high.
_DROP = 20

#: Share of the pixels that ShufflePixels moves.
_SHUFFLED = 0.1

# Name -> (DALI layout, what a sample that does not use the input is fed with).
_OFF = False
_NO_BYTES = np.zeros(1, np.uint8)
_NO_SIZE = np.zeros((1, 1, 0), np.uint8)
_NO_WEIGHT = np.zeros((1, 1, 1), np.uint8)
_NO_MATRIX = np.eye(3, dtype=np.float32)
_NO_POINTS = np.zeros((1, 1, 2), np.float32)
_NO_COLOURS = np.zeros((1, 1, 3), np.float32)
_NO_KERNEL = np.ones((1, 1), np.float32)
_SCENE_INPUTS: dict[str, tuple[str, object]] = {
    "picture_0": ("", _NO_BYTES),
    "plain_0": ("", _OFF),
    "plain_size": ("", _NO_SIZE),
}
_SECOND_PICTURE_INPUTS: dict[str, tuple[str, object]] = {
    "separate": ("", _OFF),
    "picture_1": ("", _NO_BYTES),
    "plain_1": ("", _OFF),
}
_VIEW_INPUTS: dict[str, tuple[str, object]] = {
    "as_plain": ("", _OFF),
    "shrink": ("", _OFF),
    "working": ("", _NO_SIZE),
    "warp": ("", _OFF),
    "matrix": ("", _NO_MATRIX),
    "remap": ("", _OFF),
    "points": ("HWC", _NO_POINTS),
    "blend": ("", _OFF),
    "weight": ("HWC", _NO_WEIGHT),
    **{
        name.format(k): value
        for k in range(LAYERS)
        for name, value in {
            "layer_{}": ("", _OFF),
            "layer_picture_{}": ("", _NO_BYTES),
            "layer_shrink_{}": ("", _OFF),
            "layer_working_{}": ("", _NO_SIZE),
            "layer_matrix_{}": ("", _NO_MATRIX),
            "layer_remap_{}": ("", _OFF),
            "layer_points_{}": ("HWC", _NO_POINTS),
        }.items()
    },
    "layer_weights": ("HWC", _NO_WEIGHT),  # those of all layers, one below the other
    "painted": ("HWC", np.zeros((1, 1, 3), np.uint8)),
    "colour": ("", _OFF),
    "steps": ("", _NO_STEPS),
    "effects": ("", _OFF),
    "mix": ("", _OFF),
    "mixing": ("", np.eye(3, 4, dtype=np.float32)),
    "curve": ("", _OFF),
    "levels": ("", np.zeros(256, np.uint8)),
    "equalize": ("", _OFF),
    "clahe": ("", _OFF),
    "rain": ("", _OFF),
    "drops": ("HWC", _NO_WEIGHT),
    "convolve": ("", _OFF),
    "kernel": ("", _NO_KERNEL),
    "median": ("", _OFF),
    "window": ("", np.array([3], np.int32)),
    "pixelate": ("", _OFF),
    "cells": ("", np.ones(2, np.float32)),
    "shuffle": ("", _OFF),
    "places": ("HWC", _NO_POINTS),
    "grain": ("", _OFF),
    "grains": ("HWC", _NO_COLOURS),
    "blur": ("", _OFF),
    "taps": ("", np.ones(1, np.float32)),
    "jpeg": ("", _OFF),
    "quality": ("", np.int32(100)),
    "mask": ("HWC", _NO_WEIGHT),
    "noise": ("HWC", _NO_COLOURS),
}


#: Shapes of neutral values that are those of all samples.
_DENSE = {(3, 3), (3, 4), (COLOUR_STEPS, 3, 4), (2,), (256,)}


@functools.cache
def input_table(views: int) -> dict[str, tuple[str, object]]:
    """Every input of the graph with ``views`` views, in the order in which they are fed: layout and neutral value."""
    table = dict(_SCENE_INPUTS)
    if views == 2:
        table |= _SECOND_PICTURE_INPUTS
    for v in range(views):
        table |= {f"view_{v}.{name}": value for name, value in _VIEW_INPUTS.items()}
    return table


@dataclass(frozen=True)
class View:
    """One view to render: its composed edits, its picture (0 or 1 of the scene) and the pictures of its layers."""

    plan: RenderPlan
    picture: int = 0
    layers: tuple[EncodedPicture, ...] = ()


@dataclass(frozen=True)
class Scene:
    """One sample of a batch: one or two pictures and the views of them."""

    pictures: tuple[EncodedPicture, ...]
    views: tuple[View, ...]


@dataclass(frozen=True)
class Cut:
    """A view of a picture for evaluation: a box (left, top, right, bottom) of its pixels, or the whole picture turned.

    A box may leave the picture and shows black there; ``box`` None is the whole picture. ``angle``: degrees
    counter-clockwise, on a canvas that holds all of the picture, black elsewhere; with a box it must be 0.
    """

    box: tuple[int, int, int, int] | None = None
    angle: float = 0.0

    def __post_init__(self) -> None:
        if self.box is not None and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise ValueError(
                f"Cut.box must be (left, top, right, bottom) with left < right, top < bottom, got {self.box}"
            )
        if self.box is not None and self.angle:
            raise ValueError(f"Cut.angle must be 0 where a box is given, got {self.angle!r} and {self.box}")

    def row(self, height: int, width: int) -> tuple[float, ...]:
        """Width and height of the view in pixels, and the affine map (a, b, c, d, e, f) of its points to the picture's.

        Turned as ``PIL.Image.rotate(angle, expand=True)`` does it.
        """
        if self.box is not None:
            left, top, right, bottom = self.box
            return right - left, bottom - top, 1.0, 0.0, left, 0.0, 1.0, top
        cos, sin = (round(f(math.radians(-self.angle)), 15) for f in (math.cos, math.sin))
        x, y = width / 2, height / 2
        forth = np.array([[cos, sin], [-sin, cos]])
        corners = forth @ [[-x, x, x, -x], [-y, -y, y, y]] + [[x], [y]]
        canvas = np.ceil(corners.max(axis=1)) - np.floor(corners.min(axis=1))
        if self.angle % 90 == 0:
            canvas = np.abs(forth) @ (width, height)
        shift = (x, y) - forth @ canvas / 2
        return (*canvas.tolist(), cos, sin, float(shift[0]), -sin, cos, float(shift[1]))


def feed(scenes: Sequence[Scene], size: int, empty: Empty = np.empty) -> list[object]:
    """The arrays of one batch, in the order of :func:`input_table`: dense [B, ...], or a list where shapes differ.

    ``empty(shape, dtype)`` gives the memory of the large ones.
    """
    rows = [_scene_inputs(scene, size, empty) for scene in scenes]
    table = input_table(len(scenes[0].views))
    return [_column([row.get(name, neutral) for row in rows], neutral) for name, (_, neutral) in table.items()]


def check_plan(plan: RenderPlan) -> None:
    """Raise ``ValueError``, naming the edit, if the graph cannot render the plan."""
    shown = sum(layer.color is None for layer in plan.pictures())
    if shown > LAYERS:
        raise ValueError(f"a view can show at most {LAYERS} other pictures, this program shows {shown}")
    places: list[int] = []
    for edit in plan.photometric:
        if type(edit) not in PHOTOMETRIC_ORDER:
            raise ValueError(
                f"the graph cannot render the edit {type(edit).__name__}; colour edits are {_names(PHOTOMETRIC_ORDER)}"
            )
        place = PHOTOMETRIC_ORDER.index(type(edit))
        if places and (place < places[-1] or (place == places[-1] and not isinstance(edit, Convolve))):
            raise ValueError(
                f"the graph applies {_names(PHOTOMETRIC_ORDER)} once each (Convolve more often) and in this order, "
                f"got {type(edit).__name__} after {PHOTOMETRIC_ORDER[places[-1]].__name__}"
            )
        places.append(place)


def _names(kinds: Sequence[type]) -> str:
    return ", ".join(kind.__name__ for kind in kinds)


def working_size(extent: tuple[float, float], shape: Size, view: Size) -> Size:
    """(height, width) to which a picture of ``shape`` is shrunk before its warp; ``shape`` itself if it need not be.

    ``extent``: output pixels that its height and width would span. Never larger than the picture. Where the warp alone
    would minify by more than ``MAX_MINIFICATION`` it is the size of the view if that is fine enough and not too fine
    (then the reference's resize serves), else the size at which the warp does not minify at all.
    """
    wanted = tuple(min(have, max(1, math.ceil(span - 1e-3))) for have, span in zip(shape, extent, strict=True))
    if _minifies_little(shape, wanted):
        return shape
    if all(w <= v <= have for w, v, have in zip(wanted, view, shape, strict=True)) and _minifies_little(view, wanted):
        return view
    return wanted[0], wanted[1]


def _minifies_little(have: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return all(h <= MAX_MINIFICATION * w for h, w in zip(have, wanted, strict=True))


def _scene_inputs(scene: Scene, size: int, empty: Empty) -> dict[str, object]:
    """One sample's inputs; what is not named is off."""
    row: dict[str, object] = {"plain_size": _empty_like(size, size)}
    plain = [False, False]
    for v, view in enumerate(scene.views):
        inputs = _view_inputs(view, scene.pictures[view.picture].shape, size, empty)
        plain[view.picture] |= bool(inputs["as_plain"])
        row |= {f"view_{v}.{name}": value for name, value in inputs.items()}
    for p, picture in enumerate(scene.pictures):
        row |= {f"picture_{p}": picture.data, f"plain_{p}": plain[p]}
    return row | {"separate": len(scene.pictures) == 2}


@dataclass(frozen=True)
class _Placed:
    """A picture of a view: its place, as a map or (behind a dense map) point by point, and its weight."""

    layer: LayerPlan
    weight: np.ndarray | None  # uint8 [S, S]; None: it fills the view
    points: np.ndarray | None  # float32 [S, S, 2]

    def working_size(self, shape: Size, size: int) -> Size:
        extent = self.layer.extent() if self.points is None else _dense_extent(self.points)
        return working_size(extent, shape, (size, size))

    def place(self, working: Size) -> tuple[bool, np.ndarray]:
        """Whether the picture goes through a dense map, and that map or the matrix, to its pixels at working size."""
        if self.points is None:
            return False, _to_picture(self.layer, working)
        height, width = working
        # DALI's GPU operator shows black outside of the picture; the border must be held, as the warp does.
        far = np.array([width - 0.5, height - 0.5], np.float32)
        return True, np.clip(self.points * np.array([width, height], np.float32), np.float32(0.5), far)


def _placed(plan: RenderPlan, empty: Empty) -> tuple[list[_Placed], np.ndarray | None, np.ndarray | None]:
    """A view's source and other pictures and colours, the sum of its flat colours [H, W, 3], and where it is erased.

    What the noise will hide still counts for mean luma, blur and JPEG: erasing comes last, as released. No colours or
    nothing erased: None.
    """
    if plan.below is not None:
        placed = [_Placed(surface.layer, surface.weight, surface.points) for surface in plan.surfaces(noise=False)]
        return placed, _painted(placed, plan.output_shape), plan.erase_mask() if plan.erases() else None
    if plan.opaque:
        return [_Placed(plan.source, None, None)], None, None
    weights, painted, erased = plan.blend(empty)
    placed = [_Placed(layer, weights[k], None) for k, layer in enumerate((plan.source, *plan.layers))]
    return placed, painted, erased


def _view_inputs(view: View, shape: Size, size: int, empty: Empty) -> dict[str, object]:
    plan = view.plan
    check_plan(plan)
    if plan.output_shape != (size, size):
        raise ValueError(f"the plan must end at the view's size {(size, size)}, got {plan.output_shape}")
    (source, *others), painted, erased = _placed(plan, empty)
    pictures = [other for other in others if other.layer.color is None]
    if len(view.layers) != len(pictures):
        raise ValueError(f"the plan shows {len(pictures)} other pictures, got {len(view.layers)}")
    working = (size, size) if plan.plain else source.working_size(shape, size)
    as_plain = plan.plain or (working == (size, size) and working != shape)
    row: dict[str, object] = {"as_plain": as_plain}
    if not plan.plain:
        dense, place = source.place(working)
        row |= {"remap": True, "points": place} if dense else {"warp": True, "matrix": place}
    if not as_plain and working != shape:
        row |= {"shrink": True, "working": _empty_like(*working)}
    if source.weight is not None:
        row |= {"blend": True, "weight": source.weight[..., None]}
        for k, (placed, picture) in enumerate(zip(pictures, view.layers, strict=True)):
            row |= _layer_inputs(k, placed, picture, size)
        if pictures:
            planes = [placed.weight for placed in pictures if placed.weight is not None]
            row["layer_weights"] = (planes[0] if len(planes) == 1 else np.concatenate(planes))[..., None]
        if painted is not None:
            row["painted"] = painted
    if erased is not None:
        row |= {"mask": erased[..., None], "noise": _noise(plan.noise, size, empty)}
    return row | _photometric_inputs(plan, size)


def _layer_inputs(k: int, placed: _Placed, picture: EncodedPicture, size: int) -> dict[str, object]:
    working = placed.working_size(picture.shape, size)
    dense, place = placed.place(working)
    return {
        f"layer_{k}": True,
        f"layer_picture_{k}": picture.data,
        f"layer_shrink_{k}": working != picture.shape,
        f"layer_working_{k}": _empty_like(*working),
        f"layer_remap_{k}": dense,
        f"layer_points_{k}" if dense else f"layer_matrix_{k}": place,
    }


def _painted(placed: Sequence[_Placed], shape: Size) -> np.ndarray | None:
    """uint8 [H, W, 3]: the sum of the flat colours, each times its weight, as :meth:`RenderPlan.blend` has it."""
    flat = [(each.weight, each.layer.color) for each in placed if each.layer.color is not None]
    if not flat:
        return None
    painted = np.zeros((*shape, 3), np.float32)
    for weight, colour in flat:
        assert weight is not None, "colours come with weights"
        painted += np.floor(weight[..., None] * np.array(colour, np.float32) + 0.5)
    return np.minimum(painted, 255).astype(np.uint8)


def _photometric_inputs(plan: RenderPlan, size: int) -> dict[str, object]:
    row: dict[str, object] = {}
    colours: list[ColorJitter | Grayscale] = []
    kernel: np.ndarray | None = None
    for edit in plan.photometric:
        match edit:
            case ColorJitter() | Grayscale():
                colours.append(edit)
            case ColorMatrix():
                mixing = np.array(edit.rows, np.float32)
                mixing[:, 3] *= 255.0
                row |= {"mix": True, "mixing": mixing}
            case ToneCurve():
                levels = 255.0 * np.interp(np.linspace(0, len(edit.levels) - 1, 256), _steps(edit), edit.levels)
                row |= {"curve": True, "levels": np.floor(levels + 0.5).astype(np.uint8)}
            case Equalize():
                row["equalize"] = True
            case Clahe():
                row["clahe"] = True
            case Rain():
                row |= {"rain": True, "drops": _drops(edit, size)}
            case Convolve():
                # DALI correlates, and so does Pillow: the kernel is not mirrored.
                new = np.array(edit.kernel, np.float64)
                kernel = new if kernel is None else _convolved(kernel, new)
            case Median():
                row |= {"median": True, "window": np.array([edit.window], np.int32)}
            case Pixelate() if round(edit.ratio * size) < size:
                row |= {"pixelate": True, "cells": np.full(2, max(1, round(edit.ratio * size)), np.float32)}
            case ShufflePixels():
                row |= {"shuffle": True, "places": _shuffled(size)}
            case Noise():
                noise = _noise(edit.noise, size)
                row |= {"grain": True, "grains": edit.luma * noise[..., :1] + edit.chroma * noise[::-1]}
            case Blur() if edit.sigma * size / 224 >= _LEAST_SIGMA:
                row |= {"blur": True, "taps": _gaussian(edit.sigma * size / 224, size)}
            case Jpeg():
                row |= {"jpeg": True, "quality": np.int32(edit.quality)}
    if kernel is not None:
        row |= {"convolve": True, "kernel": kernel.astype(np.float32)}
    if row.keys() & {"mix", "curve", "equalize", "clahe", "rain", "convolve", "median", "pixelate", "shuffle", "grain"}:
        row["effects"] = True
    if colours and (steps := _colour_steps(colours)) is not None:
        row |= {"colour": True, "steps": steps}
    return row


def _colour_steps(edits: Sequence[ColorJitter | Grayscale]) -> np.ndarray | None:
    """float32 [COLOUR_STEPS, 3, 4], or None if the edits change nothing.

    A step is a matrix on (red, green, blue) and what is added to each, times the mean luma.
    """
    steps: list[tuple[str, float]] = []
    for edit in edits:
        if isinstance(edit, ColorJitter):
            steps += [(name, getattr(edit, name)) for name in edit.order]
        else:
            steps.append(("saturation", 0.0))
    filled = _NO_STEPS.copy()
    k = 0
    for name, value in steps:
        if value == (0.0 if name == "hue" else 1.0):
            continue
        step = filled[k]
        if name == "hue":
            cos, sin = math.cos(2.0 * math.pi * value), math.sin(2.0 * math.pi * value)
            step[:, :3] = _ALONG_GREY + cos * _TURNED_BY_COSINE + sin * _TURNED_BY_SINE
        else:
            step *= value
        if name == "contrast":
            step[:, 3] = 1.0 - value
        elif name == "saturation":
            step[:, :3] += (1.0 - value) * _LUMA
        k += 1
    return filled if k else None


def _steps(curve: ToneCurve) -> np.ndarray:
    return np.arange(len(curve.levels))


def _convolved(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The full convolution of two small kernels."""
    (h, w), (height, width) = first.shape, second.shape
    out = np.zeros((h + height - 1, w + width - 1))
    for i in range(height):
        for j in range(width):
            out[i : i + h, j : j + w] += second[i, j] * first
    return out


def _column(values: list[object], neutral: object) -> object:
    """One input of a batch: numbers and arrays of one shape as one dense array, pictures and the like as they are."""
    if not isinstance(neutral, np.ndarray):
        return np.array(values)
    if neutral.shape in _DENSE:
        return np.array(values, neutral.dtype)
    # DALI takes one array in a fraction of the time of many; of most inputs a batch uses none.
    if all(value is neutral for value in values):
        return _repeated(len(values), neutral.shape, neutral.dtype)
    return values


@functools.lru_cache(maxsize=256)
def _repeated(count: int, shape: tuple[int, ...], kind: np.dtype[Any]) -> np.ndarray:
    """``count`` arrays of zeros, read only, in place of neutral ones that nothing reads."""
    repeated = np.zeros((count, *shape), kind)
    repeated.flags.writeable = False
    return repeated


@functools.lru_cache(maxsize=4096)
def _empty_like(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 0]: carries a size to DALI."""
    return np.zeros((height, width, 0), np.uint8)


def _to_picture(layer: LayerPlan, working: Size) -> np.ndarray:
    """float32 [3, 3]: output points to points of the picture at its working size."""
    height, width = working
    inverse = np.empty((3, 3))  # output -> unit square
    kernels.invert(layer.matrix, inverse)
    return (np.array([[width], [height], [1.0]]) * inverse).astype(np.float32)


def _gaussian(sigma: float, size: int) -> np.ndarray:
    """float32 [K], normalised, cut at three standard deviations (and at the picture's size)."""
    radius = min(math.ceil(3.0 * sigma), size - 1)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return (taps / taps.sum()).astype(np.float32)


def _dense_extent(points: np.ndarray) -> tuple[float, float]:
    """Output pixels that a picture's height and width would span where a dense map shows it at its largest (nearly).

    ``points`` [H, W, 2] in the unit square; from the inverse of the map's derivative at each pixel.
    """
    across, down = np.diff(points, axis=1)[:-1], np.diff(points, axis=0)[:, :-1]
    area = np.abs(across[..., 0] * down[..., 1] - across[..., 1] * down[..., 0])
    shown = area > 1e-12
    if not shown.any():
        return 1.0, 1.0
    tall = np.hypot(across[..., 0], down[..., 0])[shown] / area[shown]
    wide = np.hypot(across[..., 1], down[..., 1])[shown] / area[shown]
    return float(np.percentile(tall, 90)), float(np.percentile(wide, 90))


def _drops(rain: Rain, size: int) -> np.ndarray:
    """uint8 0/1 [size, size, 1]: one drop to 600 pixels, where Albumentations 1.3.1 would let them begin."""
    random = np.random.Generator(np.random.PCG64(rain.noise))
    count = size * size // 600
    length = min(_DROP, size - 1)
    x = random.integers(min(rain.slant, 0), max(size - max(rain.slant, 0), 0) + 1, count)
    y = random.integers(0, size - length + 1, count)
    along = np.arange(length + 1)
    rows = y[:, None] + along
    columns = x[:, None] + np.floor(rain.slant * along / length + 0.5).astype(np.int64)
    inside = (rows < size) & (columns >= 0) & (columns < size)
    drops = np.zeros((size, size, 1), np.uint8)
    drops[rows[inside], columns[inside]] = 1
    return drops


@functools.lru_cache(maxsize=4)
def _shuffled(size: int) -> np.ndarray:
    """float32 [size, size, 2]: where each pixel comes from, (x, y) of its centre."""
    random = np.random.Generator(np.random.PCG64(10))
    moved = np.flatnonzero(random.random(size * size) < _SHUFFLED)
    places = np.arange(size * size)
    places[moved] = random.permutation(moved)
    return np.stack([places % size + 0.5, places // size + 0.5], axis=-1).reshape(size, size, 2).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _noise_texture(size: int) -> np.ndarray:
    """N(0, 1) on the [0, 1] colour scale, times 255; the seed is arbitrary but fixed."""
    side = size + _NOISE_OFFSETS
    return 255.0 * np.random.Generator(np.random.PCG64(0)).standard_normal((side, side, 3), dtype=np.float32)


def _noise(number: int, size: int, empty: Empty = np.empty) -> np.ndarray:
    """float32 [size, size, 3]: the window of the texture that ``number`` chooses."""
    y, x = number % _NOISE_OFFSETS, number // _NOISE_OFFSETS % _NOISE_OFFSETS
    noise = empty((size, size, 3), np.float32)
    noise[:] = _noise_texture(size)[y : y + size, x : x + size]
    return noise
