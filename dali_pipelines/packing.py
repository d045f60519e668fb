"""From composed views (``ComposedView``) to the arrays that the graph takes. Plain numbers; no DALI here."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import copynce.pixtrace.compiled.maps as maps
from copynce.pixtrace import (
    Blur,
    Clahe,
    ColorJitter,
    ColorMatrix,
    ComposedView,
    Convolve,
    Equalize,
    Grayscale,
    Jpeg,
    Layer,
    Median,
    Noise,
    Pixelate,
    Rain,
    ShufflePixels,
    Surface,
    ToneCurve,
)
from copynce.pixtrace.edits import PHOTOMETRIC_ORDER
from copynce.pixtrace.view.composed_view import Empty
from dali_pipelines.numba_ops.layout import AS_IS, BY_MATRIX, COLOUR_STEPS, LAYERS, LUMA, NUMBERS, SLOTS, WIDTH
from dali_pipelines.patterns import drops, noise, shuffled
from dali_pipelines.sources import EncodedPicture, Size

#: A picture is shrunk (antialiased) before the warp if the warp would minify it more than this. Bilinear weights span 2
#: pixels: at 1.5 each pixel still counts, beyond 2 some would be left out. A shrinking costs as much as the warp.
MAX_MINIFICATION = 1.5

_NO_STEPS = np.tile(np.eye(3, 4, dtype=np.float32), (COLOUR_STEPS, 1, 1))
_LUMA = np.array(LUMA, np.float32)
#: Hue turns about the grey axis in YIQ (NTSC), as DALI's own operator does: by ``_ALONG_GREY`` plus cosine and sine.
_TO_YIQ = np.array([LUMA, (0.596, -0.274, -0.321), (0.211, -0.523, 0.311)])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
_ALONG_GREY = _FROM_YIQ @ np.diag([1.0, 0.0, 0.0]) @ _TO_YIQ
_TURNED_BY_COSINE = _FROM_YIQ @ np.diag([0.0, 1.0, 1.0]) @ _TO_YIQ
_TURNED_BY_SINE = _FROM_YIQ @ [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]] @ _TO_YIQ

#: Standard deviation in pixels below which a Gaussian leaves an 8-bit picture as it is: the next pixel weighs 4e-6.
_LEAST_SIGMA = 0.2

#: Side in pixels of the views for which a Blur's sigma is given; other views get as much of their side.
_BLUR_SIDE = 224

_EFFECTS = ("mix", "curve", "equalize", "clahe", "rain", "convolve", "median", "pixelate", "shuffle", "grain")

#: What is on for a scene: of its pictures, and of each of its views. The graph skips what is off.
SCENE_FLAGS = ("plain_0", "separate", "plain_1")
FLAGS = (
    *("as_plain", "edited", "layer_0", "layer_1", "effects", "blur", "jpeg"),
    *_EFFECTS,
    # Only for a graph that takes several operators for what the CPU does in one; 0 is the view's picture.
    *("shrink_0", "shrink_1", "shrink_2", "warp_0", "warp_1", "warp_2", "remap_0", "remap_1", "remap_2"),
    *("blend", "painted", "colour", "erase"),
)

#: Inputs of a view whose shapes differ from view to view, and their DALI layouts.
_LARGE = {
    "layer_picture_0": "",
    "layer_picture_1": "",
    "planes": "HWC",  # weights, erase mask, paint, drops: uint8 [N * S, S, 1]
    "maps": "HWC",  # places of pictures, of shuffled pixels: float32 [M * S, S, 2]
    "kernel": "",
    "noises": "HWC",  # for erasing, for grain: float32 [M * S, S, 3]
}
_NO_BYTES = np.zeros(1, np.uint8)
_FLAG = {name: k for k, name in enumerate(FLAGS)}


def _plain_numbers() -> NDArray[np.float32]:
    """The numbers of a view of which nothing is edited."""
    numbers = np.zeros(WIDTH, np.float32)
    for name in ("weight", "painted", "drops", "places", "grain", "mask"):
        numbers[SLOTS[name]] = -1
    numbers[SLOTS["way"]] = AS_IS
    numbers[SLOTS["steps"]] = _NO_STEPS.reshape(-1)
    return numbers


_PLAIN_NUMBERS = _plain_numbers()


def input_layouts(views: int) -> dict[str, str]:
    """Every input of the graph with ``views`` views, in the order in which they are packed, and its DALI layout."""
    layouts = {"scene_flags": "", "like": "HWC", "picture_0": ""} | ({"picture_1": ""} if views == 2 else {})
    for v in range(views):
        layouts |= {f"view_{v}.flags": "", f"view_{v}.numbers": ""}
        layouts |= {f"view_{v}.{name}": layout for name, layout in _LARGE.items()}
    return layouts


@dataclass(frozen=True)
class View:
    """One view to render: its composed edits, its picture (0 or 1 of the scene) and the pictures of its layers."""

    composed: ComposedView
    picture: int = 0
    layers: tuple[EncodedPicture, ...] = ()


@dataclass(frozen=True)
class Scene:
    """One or two pictures and the views of them: what DALI calls a sample of a batch."""

    pictures: tuple[EncodedPicture, ...]
    views: tuple[View, ...]


def pack_batch(scenes: Sequence[Scene], size: int, empty: Empty = np.empty) -> list[object]:
    """The arrays of one batch, in the order of :func:`input_layouts`: dense [B, ...], or a list where shapes differ.

    ``empty(shape, dtype)`` gives the memory of the large ones.
    """
    batch = len(scenes)
    scene_flags = np.zeros((batch, len(SCENE_FLAGS)), bool)
    seconds: list[NDArray[Any]] = []
    views: list[list[_PackedView]] = [[] for _ in scenes[0].views]
    flags = np.zeros((len(views), batch, len(FLAGS)), bool)
    numbers = np.tile(_PLAIN_NUMBERS, (len(views), batch, 1))
    for i, scene in enumerate(scenes):
        seconds.append(scene.pictures[1].data if len(scene.pictures) == 2 else _NO_BYTES)
        scene_flags[i, SCENE_FLAGS.index("separate")] = len(scene.pictures) == 2
        for v, view in enumerate(scene.views):
            packed = _PackedView(flags[v, i], numbers[v, i], size, empty)
            packed.fill(view, scene.pictures[view.picture].shape)
            scene_flags[i, SCENE_FLAGS.index(f"plain_{view.picture}")] |= flags[v, i, _FLAG["as_plain"]]
            views[v].append(packed)
    like = _zeros((batch, size, size, 0), np.dtype(np.uint8))
    inputs: list[object] = [scene_flags, like, [scene.pictures[0].data for scene in scenes]]
    if len(views) == 2:
        inputs.append(_column(seconds, _NO_BYTES))
    unused = _unused(size)
    for v, of_scenes in enumerate(views):
        inputs += [flags[v], numbers[v]]
        large = [packed.large() for packed in of_scenes]
        inputs += [_column([arrays.get(name, unused[name]) for arrays in large], unused[name]) for name in _LARGE]
    return inputs


def check_view(composed: ComposedView) -> None:
    """Raise ``ValueError``, naming the edit, if the graph cannot render the view."""
    shown = sum(layer.color is None for layer in composed.pictures())
    if shown > LAYERS:
        raise ValueError(f"a view can show at most {LAYERS} other pictures, this program shows {shown}")
    places: list[int] = []
    for edit in composed.photometric:
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
    # Less a thousandth: rounding must not make a picture that keeps its size a pixel larger.
    wanted = tuple(min(have, max(1, math.ceil(span - 1e-3))) for have, span in zip(shape, extent, strict=True))
    if _minifies_little(shape, wanted):
        return shape
    if all(w <= v <= have for w, v, have in zip(wanted, view, shape, strict=True)) and _minifies_little(view, wanted):
        return view
    return wanted[0], wanted[1]


def _minifies_little(have: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return all(h <= MAX_MINIFICATION * w for h, w in zip(have, wanted, strict=True))


class _PackedView:
    """A view's flags and numbers (:data:`~dali_pipelines.numba_ops.layout.NUMBERS`), and its large arrays."""

    def __init__(self, flags: NDArray[np.bool_], numbers: NDArray[np.float32], size: int, empty: Empty) -> None:
        self.flags, self.numbers = flags, numbers
        self.size, self.empty = size, empty
        self.pictures: tuple[EncodedPicture, ...] = ()
        self.planes: list[NDArray[np.uint8]] = []  # [N, S, S] each
        self.maps: list[NDArray[Any]] = []
        self.kernel: NDArray[np.float32] | None = None
        self.noises: list[NDArray[Any]] = []

    def fill(self, view: View, shape: Size) -> None:
        """Note what a composed view says of a picture of ``shape``."""
        composed, size = view.composed, self.size
        check_view(composed)
        if composed.output_shape != (size, size):
            raise ValueError(f"the program must end at the view's size {(size, size)}, got {composed.output_shape}")
        shown = sum(layer.color is None for layer in composed.pictures())
        if len(view.layers) != shown:
            raise ValueError(f"the view shows {shown} other pictures, got {len(view.layers)}")
        self.pictures = view.layers
        if composed.plain:
            self.switch("as_plain")
        else:
            self.compose(composed, shape)
        if composed.erases():
            self.switch("erase")
            self.noises.append(noise(composed.noise_seed, size, self.empty))
        self.change_colours(composed)
        if not composed.plain or composed.photometric:
            self.switch("edited")

    def switch(self, name: str) -> None:
        """On with a flag."""
        self.flags[_FLAG[name]] = True

    def note(self, name: str, value: Any, k: int | None = None) -> None:
        """Set numbers; with ``k`` those of the ``k``-th picture."""
        of_name = self.numbers[SLOTS[name]].reshape(NUMBERS[name])
        of_name[... if k is None else k] = value

    def compose(self, composed: ComposedView, shape: Size) -> None:
        """Note the places of a view's pictures, their weights, paint and where it is erased.

        What the noise will hide still counts for mean luma, blur and JPEG: erasing comes last, as released.
        """
        points: Sequence[NDArray[np.float32] | None]
        if composed.below is not None:
            surfaces = composed.surfaces()
            layers, points = [surface.layer for surface in surfaces], [surface.points for surface in surfaces]
            self.planes.append(_planes_of(surfaces, composed))
        else:
            layers = [composed.source, *composed.layers]
            points = [None] * len(layers)
            if not composed.opaque:
                self.planes.append(composed.blend(self.empty))
        if self.planes:
            self.switch("blend")
            self.note("weight", 0, 0)
            # Planes lie as ``blend`` gives them: the weights of all layers, the mask, three of paint.
            if composed.erases():
                self.note("mask", len(layers))
            if composed.paints():
                self.switch("painted")
                self.note("painted", len(layers) + composed.erases())
        self.place(0, layers[0], points[0], shape)
        shown = [number for number, layer in enumerate(layers) if number and layer.color is None]
        for k, number in enumerate(shown):
            self.switch(f"layer_{k}")
            self.note("weight", number, 1 + k)
            self.place(1 + k, layers[number], points[number], self.pictures[k].shape)

    def place(self, k: int, layer: Layer, points: NDArray[np.float32] | None, shape: Size) -> None:
        """Note how the ``k``-th picture (0: the view's own) of ``shape`` comes to its place: through its matrix, or
        through a dense map of ``points`` [S, S, 2] in its unit square."""
        extent = layer.extent() if points is None else _dense_extent(points)
        working = working_size(extent, shape, (self.size, self.size))
        self.note("working", working, k)
        if working != shape:
            # The plain resize of a picture is made once, whoever asks for it.
            self.switch("as_plain" if k == 0 and working == (self.size, self.size) else f"shrink_{k}")
        if points is None:
            self.switch(f"warp_{k}")
            self.note("way", BY_MATRIX, k)
            self.note("matrix", _to_picture(layer, working), k)
        else:
            self.switch(f"remap_{k}")
            self.note("way", len(self.maps), k)
            height, width = working
            # DALI's GPU operator shows black outside of the picture; the border must be held, as the warp does.
            far = np.array([width - 0.5, height - 0.5], np.float32)
            self.maps.append(np.clip(points * np.array([width, height], np.float32), np.float32(0.5), far))

    def change_colours(self, composed: ComposedView) -> None:
        """Note the colour edits."""
        size = self.size
        colours: list[ColorJitter | Grayscale] = []
        kernel: np.ndarray | None = None
        for edit in composed.photometric:
            match edit:
                case ColorJitter() | Grayscale():
                    colours.append(edit)
                case ColorMatrix():
                    mixing = np.array(edit.rows)
                    mixing[:, 3] *= 255.0
                    self.switch("mix")
                    self.note("mixing", mixing)
                case ToneCurve():
                    levels = 255.0 * np.interp(np.linspace(0, len(edit.levels) - 1, 256), _steps(edit), edit.levels)
                    self.switch("curve")
                    self.note("levels", np.floor(levels + 0.5))
                case Equalize():
                    self.switch("equalize")
                case Clahe():
                    self.switch("clahe")
                case Rain():
                    self.switch("rain")
                    self.note("drops", sum(map(len, self.planes)))
                    self.planes.append(drops(edit, size))
                case Convolve():
                    # DALI correlates, and so does Pillow: the kernel is not mirrored.
                    new = np.array(edit.kernel, np.float64)
                    kernel = new if kernel is None else _convolved(kernel, new)
                case Median():
                    self.switch("median")
                    self.note("window", edit.window)
                case Pixelate() if round(edit.ratio * size) < size:
                    self.switch("pixelate")
                    self.note("cells", max(1, round(edit.ratio * size)))
                case ShufflePixels():
                    self.switch("shuffle")
                    self.note("places", len(self.maps))
                    self.maps.append(shuffled(size))
                case Noise():
                    grain = noise(edit.noise_seed, size)
                    self.switch("grain")
                    self.note("grain", len(self.noises))
                    self.noises.append(edit.luma * grain[..., :1] + edit.chroma * grain[::-1])
                case Blur() if edit.sigma * size / _BLUR_SIDE >= _LEAST_SIGMA:
                    sigma = edit.sigma * size / _BLUR_SIDE
                    self.switch("blur")
                    self.note("sigma", sigma)
                    # Beyond three sigma lie 0.3 % of a Gaussian; a mirrored border has no more than the view's pixels.
                    self.note("reach", min(math.ceil(3.0 * sigma), size - 1))
                case Jpeg():
                    self.switch("jpeg")
                    self.note("quality", edit.quality)
        if kernel is not None:
            self.switch("convolve")
            self.kernel = kernel.astype(np.float32)
        if any(self.flags[_FLAG[name]] for name in _EFFECTS):
            self.switch("effects")
        if colours and (steps := _colour_steps(colours)) is not None:
            self.switch("colour")
            self.note("steps", steps)

    def large(self) -> dict[str, NDArray[Any]]:
        """Those of the large arrays (``_LARGE``) that the view uses."""
        large: dict[str, NDArray[Any]] = {f"layer_picture_{k}": picture.data for k, picture in enumerate(self.pictures)}
        if self.kernel is not None:
            large["kernel"] = self.kernel
        for name, arrays in (("planes", self.planes), ("maps", self.maps), ("noises", self.noises)):
            if arrays:
                large[name] = _stacked(arrays, self.size)
        return large


@functools.cache
def _unused(size: int) -> dict[str, NDArray[Any]]:
    """What goes in for each of ``_LARGE`` where a view does not use it; planes are always as wide as the view."""
    return {
        "layer_picture_0": _NO_BYTES,
        "layer_picture_1": _NO_BYTES,
        "planes": np.zeros((0, size, 1), np.uint8),
        "maps": np.zeros((1, 1, 2), np.float32),
        "kernel": np.ones((1, 1), np.float32),
        "noises": np.zeros((1, 1, 3), np.float32),
    }


def _stacked(arrays: Sequence[NDArray[Any]], size: int) -> NDArray[Any]:
    """[N * S, S, C]: arrays [..., S, S, C], or [..., S, S] with one channel, one below the other."""
    flat = [array.reshape(-1, size, 1 if array.dtype == np.uint8 else array.shape[-1]) for array in arrays]
    return flat[0] if len(flat) == 1 else np.concatenate(flat)


def _planes_of(surfaces: Sequence[Surface], composed: ComposedView) -> NDArray[np.uint8]:
    """What :meth:`ComposedView.blend` gives, of a view of a dense map."""
    planes = [surface.weight for surface in surfaces]
    if composed.erases():
        planes.append(composed.erase_mask())
    painted = np.zeros((*composed.output_shape, 3), np.float32)
    for surface in surfaces:
        if surface.layer.color is not None:
            painted += np.floor(surface.weight[..., None] * np.array(surface.layer.color, np.float32) + 0.5)
    if composed.paints():
        planes += [*np.minimum(painted, 255).astype(np.uint8).reshape(3, *composed.output_shape)]
    return np.stack(planes)


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


def _column(values: list[NDArray[Any]], unused: NDArray[Any]) -> object:
    """One large input of a batch: a list, or one dense array if no view uses it.

    DALI takes one array in a fraction of the time of many.
    """
    if all(value is unused for value in values):
        return _zeros((len(values), *unused.shape), unused.dtype)
    return values


@functools.lru_cache(maxsize=256)
def _zeros(shape: tuple[int, ...], kind: np.dtype[Any]) -> NDArray[Any]:
    """Zeros that nobody may write."""
    zeros = np.zeros(shape, kind)
    zeros.flags.writeable = False
    return zeros


def _to_picture(layer: Layer, working: Size) -> np.ndarray:
    """float32 [3, 3]: output points to points of the picture at its working size."""
    height, width = working
    inverse = np.empty((3, 3))  # output -> unit square
    maps.invert(layer.matrix, inverse)
    return (np.array([[width], [height], [1.0]]) * inverse).astype(np.float32)


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
    # Not the very largest: the few pixels at which a map tears or folds would have the picture at any size.
    return float(np.percentile(tall, 90)), float(np.percentile(wide, 90))
