"""From a composed view (``RenderPlan``) to the arrays that the graph is fed with. Plain numbers; no DALI here."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from copynce.pixtrace import Blur, ColorJitter, Grayscale, Jpeg, LayerPlan, RenderPlan
from dali_pipelines.sources import EncodedPicture, Size

#: Other pictures that one view can show.
LAYERS = 2

#: A picture is shrunk (antialiased) before the warp if the warp would minify it more than this.
MAX_MINIFICATION = 1.5

#: ITU-R 601 luma of R, G, B.
LUMA = (0.299, 0.587, 0.114)

#: Offsets of the noise texture per axis; an Erase's ``noise`` chooses one of their square.
_NOISE_OFFSETS = 256

#: Standard deviation in pixels below which a Gaussian leaves an 8-bit picture as it is.
_LEAST_SIGMA = 0.2

# Name -> (DALI layout, what a sample that does not use the input is fed with).
_OFF = False
_NO_BYTES = np.zeros(1, np.uint8)
_NO_SIZE = np.zeros((1, 1, 0), np.uint8)
_NO_WEIGHT = np.zeros((1, 1, 1), np.uint8)
_NO_MATRIX = np.eye(3, dtype=np.float32)
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
            "layer_weight_{}": ("HWC", _NO_WEIGHT),
        }.items()
    },
    "colour": ("", _OFF),
    "factors": ("", np.array([1.0, 1.0, 1.0, 0.0], np.float32)),
    "blur": ("", _OFF),
    "blur_row": ("", _NO_KERNEL),
    "blur_column": ("", _NO_KERNEL),
    "jpeg": ("", _OFF),
    "quality": ("", np.int32(100)),
    "erase": ("", _OFF),
    "mask": ("HWC", _NO_WEIGHT),
    "noise": ("HWC", np.zeros((1, 1, 3), np.float32)),
}


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


def feed(scenes: Sequence[Scene], size: int) -> list[object]:
    """The arrays of one batch, in the order of :func:`input_table`: dense [B, ...], or a list where shapes differ."""
    rows = [_scene_inputs(scene, size) for scene in scenes]
    table = input_table(len(scenes[0].views))
    return [_column([row.get(name, neutral) for row in rows]) for name, (_, neutral) in table.items()]


def check_plan(plan: RenderPlan) -> None:
    """Raise ``ValueError``, naming the edit, if the graph cannot render the plan."""
    if plan.special:
        raise ValueError(f"the graph cannot render {', '.join(plan.special)}; these edits can only be traced")
    if len(plan.layers) > LAYERS:
        raise ValueError(f"a view can show at most {LAYERS} other pictures, this program shows {len(plan.layers)}")
    names = [type(edit).__name__ for edit in plan.photometric]
    order = [kind.__name__ for kind in (ColorJitter, Grayscale, Blur, Jpeg)]
    for at, name in enumerate(names):
        if name not in order:
            raise ValueError(f"the graph cannot render the edit {name}; colour edits are {', '.join(order)}")
        if at and order.index(name) <= order.index(names[at - 1]):
            raise ValueError(
                f"the graph applies {', '.join(order)} once each and in this order, got {name} after {names[at - 1]}"
            )


def working_size(layer: LayerPlan, shape: Size, view: Size) -> Size:
    """(height, width) to which a picture of ``shape`` is shrunk before its warp; ``shape`` itself if it need not be.

    Never larger than the picture. Where the warp alone would minify by more than ``MAX_MINIFICATION`` it is the size of
    the view if that is fine enough and not too fine (then the reference's resize serves), else the size at which the
    warp does not minify at all.
    """
    wanted = tuple(min(have, max(1, math.ceil(span - 1e-3))) for have, span in zip(shape, layer.extent(), strict=True))
    if _minifies_little(shape, wanted):
        return shape
    if all(w <= v <= have for w, v, have in zip(wanted, view, shape, strict=True)) and _minifies_little(view, wanted):
        return view
    return wanted[0], wanted[1]


def _minifies_little(have: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return all(h <= MAX_MINIFICATION * w for h, w in zip(have, wanted, strict=True))


def _scene_inputs(scene: Scene, size: int) -> dict[str, object]:
    """One sample's inputs; what is not named is off."""
    row: dict[str, object] = {"plain_size": _empty_like(size, size)}
    plain = [False, False]
    for v, view in enumerate(scene.views):
        inputs = _view_inputs(view, scene.pictures[view.picture].shape, size)
        plain[view.picture] |= bool(inputs["as_plain"])
        row |= {f"view_{v}.{name}": value for name, value in inputs.items()}
    for p, picture in enumerate(scene.pictures):
        row |= {f"picture_{p}": picture.data, f"plain_{p}": plain[p]}
    return row | {"separate": len(scene.pictures) == 2}


def _view_inputs(view: View, shape: Size, size: int) -> dict[str, object]:
    plan = view.plan
    check_plan(plan)
    if plan.output_shape != (size, size):
        raise ValueError(f"the plan must end at the view's size {(size, size)}, got {plan.output_shape}")
    if len(view.layers) != len(plan.layers):
        raise ValueError(f"the plan shows {len(plan.layers)} other pictures, got {len(view.layers)}")
    working = (size, size) if plan.plain else working_size(plan.source, shape, (size, size))
    as_plain = plan.plain or (working == (size, size) and working != shape)
    row: dict[str, object] = {"as_plain": as_plain}
    if not plan.plain:
        row |= {"warp": True, "matrix": _to_picture(plan.source, working)}
    if not as_plain and working != shape:
        row |= {"shrink": True, "working": _empty_like(*working)}
    shown = tuple(cover for cover in plan.covers if cover.layer >= 0)
    if shown != plan.covers:
        row |= {"erase": True, "mask": plan.erase_mask()[..., None], "noise": _noise(plan.noise, size)}
        # What the noise will hide still counts for mean luma, blur and JPEG: erasing comes last, as released.
        plan = dataclasses.replace(plan, covers=shown)
    if not plan.opaque:
        weights = plan.weights()
        row |= {"blend": True, "weight": weights[0][..., None]}
        for k, (layer, picture) in enumerate(zip(plan.layers, view.layers, strict=True)):
            row |= _layer_inputs(k, layer, picture, weights[1 + k])
    return row | _photometric_inputs(plan, size)


def _layer_inputs(k: int, layer: LayerPlan, picture: EncodedPicture, weight: np.ndarray) -> dict[str, object]:
    height, width = weight.shape
    working = working_size(layer, picture.shape, (height, width))
    return {
        f"layer_{k}": True,
        f"layer_picture_{k}": picture.data,
        f"layer_shrink_{k}": working != picture.shape,
        f"layer_working_{k}": _empty_like(*working),
        f"layer_matrix_{k}": _to_picture(layer, working),
        f"layer_weight_{k}": weight[..., None],
    }


def _photometric_inputs(plan: RenderPlan, size: int) -> dict[str, object]:
    row: dict[str, object] = {}
    factors = [1.0, 1.0, 1.0, 0.0]
    for edit in plan.photometric:
        match edit:
            case ColorJitter():
                factors = [edit.brightness, edit.contrast, edit.saturation, 360.0 * edit.hue]
            case Grayscale():
                factors[2] = 0.0
            case Blur() if edit.sigma * size / 224 >= _LEAST_SIGMA:
                kernel = _gaussian(edit.sigma * size / 224, size)
                row |= {"blur": True, "blur_row": kernel[None, :], "blur_column": kernel[:, None]}
            case Jpeg():
                row |= {"jpeg": True, "quality": np.int32(edit.quality)}
    if factors != [1.0, 1.0, 1.0, 0.0]:
        row |= {"colour": True, "factors": np.array(factors, np.float32)}
    return row


def _column(values: list[object]) -> object:
    """One input of a batch: numbers and matrices as one dense array, pictures and the like as they are."""
    if not isinstance(values[0], np.ndarray):
        return np.array(values)
    if values[0].shape == _NO_MATRIX.shape:
        return np.array(values, np.float32)
    return values


@functools.lru_cache(maxsize=4096)
def _empty_like(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 0]: carries a size to DALI."""
    return np.zeros((height, width, 0), np.uint8)


def _to_picture(layer: LayerPlan, working: Size) -> np.ndarray:
    """float32 [3, 3]: output points to points of the picture at its working size."""
    height, width = working
    inverse = np.linalg.inv(layer.matrix)  # output -> unit square
    return (np.array([[width], [height], [1.0]]) * inverse).astype(np.float32)


def _gaussian(sigma: float, size: int) -> np.ndarray:
    """float32 [K], normalised, cut at three standard deviations (and at the picture's size)."""
    radius = min(math.ceil(3.0 * sigma), size - 1)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return (taps / taps.sum()).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _noise_texture(size: int) -> np.ndarray:
    """N(0, 1) on the [0, 1] colour scale, times 255; the seed is arbitrary but fixed."""
    side = size + _NOISE_OFFSETS
    return 255.0 * np.random.Generator(np.random.PCG64(0)).standard_normal((side, side, 3), dtype=np.float32)


def _noise(number: int, size: int) -> np.ndarray:
    """float32 [size, size, 3]: the window of the texture that ``number`` chooses."""
    y, x = number % _NOISE_OFFSETS, number // _NOISE_OFFSETS % _NOISE_OFFSETS
    return np.ascontiguousarray(_noise_texture(size)[y : y + size, x : x + size])
