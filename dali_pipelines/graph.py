"""The processing graph: encoded pictures and composed edits in, views out; one for training, evaluation and people.

    decode -> shrink (antialiased, where the picture is much larger than it will appear) -> ONE warp -> blend with other
    pictures and paint -> colour -> effects -> blur -> JPEG -> erase and normalise

On the CPU one operator does all from the shrinking to the colours. Functions ``..._twin`` say the same in DALI's own
operators, for the GPU. Between stages colours are 8 bits, rounded, as where Pillow does each stage; within one they are
not.

The graph draws no numbers and composes nothing: :mod:`dali_pipelines.packing` turns a ``ComposedView`` into its inputs.
An ``if`` on a graph node is per scene: where it is off, the operators inside are skipped. An ``if`` marked *build time*
is decided once when the pipeline is built.

This module imports DALI; import it only where a pipeline is built.
"""

# ruff: noqa: SIM108 - DALI makes branches per scene of if statements, not of conditional expressions

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from nvidia import dali
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from dali_pipelines.cpu_operators import (
    blur_operator,
    compose_operator,
    curve_operator,
    cut_operator,
    finish_operator,
    median_operator,
    mix_operator,
    remap_operator,
    resize_operator,
)
from dali_pipelines.numba_ops.layout import COLOUR_STEPS, LAYERS, LUMA, NUMBERS, SLOTS
from dali_pipelines.options import MEAN, STD
from dali_pipelines.packing import FLAGS, SCENE_FLAGS, input_layouts

# DALI's stubs leave out its data types and say "node, nodes or nothing" of every operator.
fn: Any = dali.fn
types: Any = dali.types
math: Any = dali.math
pipeline_def: Any = dali.pipeline.pipeline_def

Nodes = dict[str, DataNode]

#: Tiles a side and clip limit of Clahe, which DALI takes when the graph is built; so it has no parameter in a program.
CLAHE_TILES, CLAHE_LIMIT = 8, 2.5

#: Colour of the drops of Rain and what is left of the brightness: Albumentations' defaults.
RAIN_GREY, RAIN_LIGHT = 200.0, 0.7


def build_pipeline(
    source: Callable[[], Sequence[Any]],
    *,
    views: int,
    size: int,
    batch_size: int,
    threads: int,
    device: str,
    device_id: int | None = None,
    normalized: bool = True,
    prefetch: int = 2,
) -> Pipeline:
    """A pipeline that calls ``source`` for the arrays of one batch and returns ``views`` batches of S x S views.

    ``source`` returns one entry per name of :func:`~dali_pipelines.packing.input_layouts`, or raises ``StopIteration``.
    The views are float32 [B, 3, S, S], ``normalized`` by :data:`~dali_pipelines.options.MEAN` and ``STD``, or else
    uint8 [B, S, S, 3]. ``device_id`` None with ``device="gpu"`` defines a graph that can be serialised but not built.
    """
    layouts = input_layouts(views)

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        enable_conditionals=True,
    )
    def pipeline() -> tuple[DataNode, ...]:
        packed = fn.external_source(source=source, num_outputs=len(layouts), layout=list(layouts.values()), batch=True)
        inputs = {name: packed[i] for i, name in enumerate(layouts)}
        rendered = render(inputs, views=views, size=size, device=device)
        return tuple(finish(pixels, _of_view(inputs, v), normalized, size, device) for v, pixels in enumerate(rendered))

    return pipeline()


def build_cutter(source: Callable[[], Sequence[Any]], *, batch_size: int, threads: int) -> Pipeline:
    """A pipeline of the CPU that decodes once and cuts all views of a picture: float32 [B, 3, V * S, S], normalised.

    ``source`` returns encoded pictures, the table [V, 8] of each (rows of :meth:`~dali_pipelines.cuts.Cut.row`) and
    empty arrays [V * S, S, 0].
    """

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None, prefetch_queue_depth=2)
    def pipeline() -> DataNode:
        encoded, rows, like = fn.external_source(source=source, num_outputs=3, batch=True)
        views = fn.reshape(cut_operator()(like, decode(encoded, "cpu"), rows), layout="HWC")
        return _normalised(views)

    return pipeline()


def build_decoder(
    source: Callable[[], Sequence[Any]], *, batch_size: int = 1, device: str, device_id: int | None = None
) -> Pipeline:
    """A pipeline that only decodes: finds out which files of a failed batch are to blame."""

    @pipeline_def(batch_size=batch_size, num_threads=1, device_id=device_id, prefetch_queue_depth=1)
    def pipeline() -> DataNode:
        return decode(fn.external_source(source=source, batch=True), device)

    return pipeline()


def render(inputs: Nodes, *, views: int, size: int, device: str) -> list[DataNode]:
    """Views uint8 [S, S, 3], nothing erased, from the inputs of :func:`~dali_pipelines.packing.input_layouts`."""
    on = {name: inputs["scene_flags"][k] for k, name in enumerate(SCENE_FLAGS)}
    first = decode(inputs["picture_0"], device)
    first_plain = plain_resize(first, on["plain_0"], inputs["like"], device)
    rendered = [view(first, first_plain, _of_view(inputs, 0), size, device)]
    if views == 2:  # build time
        if on["separate"]:
            second = decode(inputs["picture_1"], device)
            second_plain = plain_resize(second, on["plain_1"], inputs["like"], device)
        else:
            second = first
            second_plain = first_plain
        rendered.append(view(second, second_plain, _of_view(inputs, 1), size, device))
    return rendered


def view(picture: DataNode, plain: DataNode, inputs: Nodes, size: int, device: str) -> DataNode:
    """One view of a decoded picture, before erasing; ``plain`` is its S x S resize where some view asked for it."""
    if flag(inputs, "as_plain"):
        pixels = plain
    else:
        pixels = picture
    if flag(inputs, "edited"):
        pixels = compose(pixels, inputs, size, device)
        if flag(inputs, "effects"):
            pixels = effects(pixels, inputs, size, device)
        if flag(inputs, "blur"):
            pixels = blur(pixels, inputs, device)
        if flag(inputs, "jpeg"):
            pixels = fn.jpeg_compression_distortion(pixels, quality=integer(inputs, "quality"))
    return pixels


def flag(inputs: Nodes, name: str) -> DataNode:
    """Whether something is on for a view."""
    return inputs["flags"][FLAGS.index(name)]


def numbers(inputs: Nodes, name: str) -> DataNode:
    """Some numbers of a view, float in the shape that :data:`~dali_pipelines.numba_ops.layout.NUMBERS` says."""
    slot, shape = SLOTS[name], NUMBERS[name]
    if not shape:  # build time
        return inputs["numbers"][slot.start]
    return fn.reshape(inputs["numbers"][slot.start : slot.stop], shape=shape)


def integer(inputs: Nodes, name: str) -> DataNode:
    """One number of a view, int32."""
    return fn.cast(numbers(inputs, name), dtype=types.INT32)


def finish(pixels: DataNode, inputs: Nodes, normalized: bool, size: int, device: str) -> DataNode:
    """The view as the pipeline delivers it: float32 [3, S, S], erased and normalised, or uint8 [S, S, 3]."""
    if device == "cpu" and normalized:  # build time
        mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
        scale = types.Constant(np.stack([1.0 / (255.0 * std), -mean / std]).astype(np.float32))
        finished = finish_operator()(pixels, inputs["numbers"], inputs["planes"], inputs["noises"], scale)
        return fn.reshape(finished, layout="CHW")
    return finish_twin(pixels, inputs, normalized, size, device)


def finish_twin(pixels: DataNode, inputs: Nodes, normalized: bool, size: int, device: str) -> DataNode:
    """:func:`finish` in DALI's operators: the GPU's way, and that of people's pictures."""
    colours = fn.cast(pixels, dtype=types.FLOAT)
    if flag(inputs, "erase"):
        colours = erase(colours, inputs, size, device)
    if normalized:  # build time
        return _normalised(colours)
    return _as_bytes(colours)


def _normalised(colours: DataNode) -> DataNode:
    return fn.crop_mirror_normalize(
        colours, mean=[255.0 * m for m in MEAN], std=[255.0 * s for s in STD], dtype=types.FLOAT, output_layout="CHW"
    )


def decode(encoded: DataNode, device: str) -> DataNode:
    """uint8 RGB [h, w, 3]; EXIF orientation is not applied (PROTOCOLS 2)."""
    backend = "mixed" if device == "gpu" else "cpu"  # build time
    return fn.decoders.image(encoded, device=backend, output_type=types.RGB, adjust_orientation=False)


def resize(picture: DataNode, like: DataNode, device: str) -> DataNode:
    """Bicubic, antialiased resize to the height and width of the empty ``like`` [H, W, 0]."""
    if device == "cpu":  # build time
        return fn.reshape(resize_operator()(like, picture), layout="HWC")
    extent = fn.slice(like.shape(dtype=types.FLOAT), 0, 2, axes=[0])
    return fn.resize(picture, size=extent, interp_type=types.INTERP_CUBIC, antialias=True)


def plain_resize(picture: DataNode, wanted: DataNode, like: DataNode, device: str) -> DataNode:
    """The whole picture at S x S where ``wanted`` (elsewhere the picture itself, which nothing then uses)."""
    if wanted:
        plain = resize(picture, like, device)
    else:
        plain = picture
    return plain


def compose(pixels: DataNode, inputs: Nodes, size: int, device: str) -> DataNode:
    """The view uint8 [S, S, 3] up to its colours: pictures at their places, blended, and colours jittered."""
    if device == "cpu":  # build time
        if flag(inputs, "layer_0"):
            first = decode(inputs["layer_picture_0"], device)
            if flag(inputs, "layer_1"):
                second = decode(inputs["layer_picture_1"], device)
            else:
                second = inputs["planes"]
        else:
            first = inputs["planes"]  # anything: it has no weight
            second = inputs["planes"]
        composed = compose_operator()(
            pixels, first, second, inputs["numbers"], inputs["planes"], inputs["maps"]
        )  # fmt: skip
        return fn.reshape(composed, layout="HWC")
    return compose_twin(pixels, inputs, size, device)


def compose_twin(pixels: DataNode, inputs: Nodes, size: int, device: str) -> DataNode:
    """:func:`compose` in DALI's operators: the GPU's way."""
    pixels = place(pixels, 0, inputs, size, device)
    if flag(inputs, "blend"):
        colours = pixels * share(inputs, 0, size, device)
        for k in range(1, 1 + LAYERS):
            if flag(inputs, f"layer_{k - 1}"):
                layer = place(decode(inputs[f"layer_picture_{k - 1}"], device), k, inputs, size, device)
                colours = colours + layer * share(inputs, k, size, device)
        if flag(inputs, "painted"):
            painted = part(inputs["planes"], integer(inputs, "painted") * size, 3 * size)
            colours = colours + fn.reshape(_on(painted, device), shape=[size, size, 3], layout="HWC")
        pixels = _as_bytes(colours)
    if flag(inputs, "colour"):
        pixels = colour(pixels, numbers(inputs, "steps"))
    return pixels


def place(picture: DataNode, k: int, inputs: Nodes, size: int, device: str) -> DataNode:
    """The ``k``-th picture of a view (0: its own, which may be in its place already) at its place."""
    if flag(inputs, f"shrink_{k}"):
        picture = fn.resize(
            picture, size=numbers(inputs, "working")[k], interp_type=types.INTERP_CUBIC, antialias=True
        )  # fmt: skip
    if flag(inputs, f"warp_{k}"):
        picture = warp(picture, numbers(inputs, "matrix")[k], size)
    if flag(inputs, f"remap_{k}"):
        at = fn.cast(numbers(inputs, "way")[k], dtype=types.INT32)
        picture = remap(picture, part(inputs["maps"], at * size, size), size, device)
    return picture


def part(stack: DataNode, start: DataNode, rows: int) -> DataNode:
    """``rows`` rows of a stack of planes, maps or noises, from row ``start`` int32 on."""
    return fn.slice(stack, start, rows, axes=[0])


def warp(picture: DataNode, matrix: DataNode, size: int) -> DataNode:
    """Bilinear homography to S x S; ``matrix`` [3, 3] maps output to picture points, corner convention of DESIGN.md."""
    return fn.experimental.warp_perspective(
        picture,
        matrix=matrix,
        size=[size, size],
        interp_type=types.INTERP_LINEAR,
        border_mode="replicate",
        pixel_origin="corner",
    )


def remap(picture: DataNode, points: DataNode, size: int, device: str) -> DataNode:
    """Bilinear dense map; ``points`` [S, S, 2] are (x, y) in the picture's pixels, half a pixel inside of it.

    DALI has no CPU backend of it: there Numba does the same.
    """
    if device == "cpu":  # build time
        return fn.reshape(remap_operator()(points, picture), layout="HWC")
    at = points.gpu()
    return _looked_up(picture, at[:, :, 0], at[:, :, 1], size, size)


def _looked_up(picture: DataNode, x: DataNode, y: DataNode, height: int, width: int) -> DataNode:
    """Bilinear values of a picture at points ``x``, ``y`` float [height, width], all on the GPU.

    DALI's operator gives its output the picture's size and wants maps of the same: both are padded to the larger of
    each side, and the result is cut.
    """
    common = math.max(fn.slice(picture.shape(dtype=types.INT32), 0, 2, axes=[0]), np.array([height, width], np.int32))
    found = fn.experimental.remap(
        fn.pad(picture, axes=[0, 1], shape=common),
        fn.pad(x, axes=[0, 1], shape=common, fill_value=0.5),
        fn.pad(y, axes=[0, 1], shape=common, fill_value=0.5),
        interp=types.INTERP_LINEAR,
        pixel_origin="corner",
    )
    return fn.slice(found, [0, 0], [height, width], axes=[0, 1])


def share(inputs: Nodes, k: int, size: int, device: str) -> DataNode:
    """Weights of the ``k``-th picture as a share in [0, 1], float [S, S, 1]."""
    start = fn.cast(numbers(inputs, "weight")[k], dtype=types.INT32) * size
    return fn.cast(_on(part(inputs["planes"], start, size), device), dtype=types.FLOAT) * np.float32(1.0 / 255.0)


def colour(pixels: DataNode, steps: DataNode) -> DataNode:
    """``steps`` float [COLOUR_STEPS, 3, 4], one after the other: ``matrix @ colours + share * mean luma``, clipped.

    Each step is such a matrix [3, 3] and a column of shares; the mean is that of the view before the step. So
    torchvision's jitter is done, but hue turns about the grey axis in YIQ and nothing is rounded in between.
    """
    luma_of = types.Constant(np.array(LUMA, np.float32))
    colours = fn.cast(pixels, dtype=types.FLOAT)
    for k in range(COLOUR_STEPS):
        luma = fn.reductions.sum(fn.reductions.mean(colours, axes=[0, 1]) * luma_of, axes=[0])
        colours = fn.coord_transform(colours, M=steps[k, :, :3]) + luma * steps[k, 0, 3]
        colours = math.min(math.max(colours, np.float32(0.0)), np.float32(255.0))
    return _as_bytes(colours)


def effects(pixels: DataNode, inputs: Nodes, size: int, device: str) -> DataNode:
    """The rarer colour operations, in the order of ``PHOTOMETRIC_ORDER``: a graph is one fixed chain, which programs
    must follow, and :func:`~dali_pipelines.packing.check_view` refuses those that do not."""
    if flag(inputs, "mix"):
        pixels = mix(pixels, inputs, device)
    if flag(inputs, "curve"):
        pixels = curve(pixels, inputs, size, device)
    if flag(inputs, "equalize"):
        pixels = fn.equalize(pixels)
    if flag(inputs, "clahe"):
        pixels = fn.clahe(pixels, tiles_x=CLAHE_TILES, tiles_y=CLAHE_TILES, clip_limit=CLAHE_LIMIT)
    if flag(inputs, "rain"):
        pixels = rain(pixels, part(inputs["planes"], integer(inputs, "drops") * size, size), device)
    if flag(inputs, "convolve"):
        pixels = fn.filter(pixels, _on(inputs["kernel"], device))
    if flag(inputs, "median"):
        pixels = median(pixels, inputs, device)
    if flag(inputs, "pixelate"):
        pixels = pixelate(pixels, numbers(inputs, "cells"), size)
    if flag(inputs, "shuffle"):
        places = part(inputs["maps"], integer(inputs, "places") * size, size)
        pixels = remap(pixels, places, size, device)
    if flag(inputs, "grain"):
        pixels = _as_bytes(pixels + _on(part(inputs["noises"], integer(inputs, "grain") * size, size), device))
    return pixels


def mix(pixels: DataNode, inputs: Nodes, device: str) -> DataNode:
    """The matrix [3, 4] of ``mixing`` times (red, green, blue, 1)."""
    if device == "cpu":  # build time
        return fn.reshape(mix_operator()(pixels, inputs["numbers"]), layout="HWC")
    return mix_twin(pixels, inputs)


def mix_twin(pixels: DataNode, inputs: Nodes) -> DataNode:
    """:func:`mix` by DALI's own operator: the GPU's way."""
    return _as_bytes(fn.coord_transform(pixels, MT=numbers(inputs, "mixing")))


def rain(pixels: DataNode, drops: DataNode, device: str) -> DataNode:
    """Drops (uint8 0/1 [S, S, 1]) in light grey, a mean of 7 x 7 pixels, and 70 % of the brightness."""
    wet = pixels + _on(drops, device) * (np.float32(RAIN_GREY) - pixels)
    # Two passes of a seventh each; the first also darkens.
    across = fn.filter(wet, _on(types.Constant(np.full((1, 7), RAIN_LIGHT / 7, np.float32)), device))
    return _as_bytes(fn.filter(across, _on(types.Constant(np.full((7, 1), 1.0 / 7, np.float32)), device)))


def curve(pixels: DataNode, inputs: Nodes, size: int, device: str) -> DataNode:
    """``levels`` [256] at the pixels' values."""
    if device == "cpu":  # build time
        return fn.reshape(curve_operator()(pixels, inputs["numbers"]), layout="HWC")
    levels = fn.cast(numbers(inputs, "levels"), dtype=types.UINT8)
    # The curve is a picture of one row, the colours are places on it.
    row = fn.reshape(levels.gpu(), shape=[1, 256, 1], layout="HWC")
    x = fn.reshape(pixels, shape=[size, 3 * size], layout="HW") + np.float32(0.5)
    y = x * np.float32(0.0) + np.float32(0.5)
    return fn.reshape(_looked_up(row, x, y, size, 3 * size), shape=[size, size, 3], layout="HWC")


def median(picture: DataNode, inputs: Nodes, device: str) -> DataNode:
    """Median of ``window`` x ``window`` pixels."""
    if device == "cpu":  # build time
        return fn.reshape(median_operator()(picture, inputs["numbers"]), layout="HWC")
    window = fn.reshape(integer(inputs, "window"), shape=[1])
    return fn.experimental.median_blur(picture, window_size=fn.cat(window, window, axis=0))


def pixelate(pixels: DataNode, cells: DataNode, size: int) -> DataNode:
    """Shrink to ``cells`` (height, width), antialiased, and repeat pixels to enlarge again."""
    few = fn.resize(pixels, size=cells, interp_type=types.INTERP_LINEAR, antialias=True)
    return fn.resize(few, size=[size, size], interp_type=types.INTERP_NN)


def _as_bytes(colours: DataNode) -> DataNode:
    return fn.cast(colours, dtype=types.UINT8)  # rounds and clips


def blur(pixels: DataNode, inputs: Nodes, device: str) -> DataNode:
    """Separable Gaussian of ``sigma`` pixels, cut at ``reach``, mirrored at the border."""
    if device == "cpu":  # build time
        return fn.reshape(blur_operator()(pixels, inputs["numbers"]), layout="HWC")
    return blur_twin(pixels, inputs)


def blur_twin(pixels: DataNode, inputs: Nodes) -> DataNode:
    """:func:`blur` by DALI's own operator: the GPU's way."""
    window = 2 * integer(inputs, "reach") + 1
    return _as_bytes(fn.gaussian_blur(pixels, sigma=numbers(inputs, "sigma"), window_size=window, dtype=types.FLOAT))


def erase(colours: DataNode, inputs: Nodes, size: int, device: str) -> DataNode:
    """Replace masked pixels (mask 0/1) by noise on the scale 0..255, not clipped."""
    mask = _on(part(inputs["planes"], integer(inputs, "mask") * size, size), device)
    noise = _on(part(inputs["noises"], types.Constant(0), size), device)
    return colours + fn.cast(mask, dtype=types.FLOAT) * (noise - colours)


def _of_view(inputs: Nodes, v: int) -> Nodes:
    return {name.removeprefix(f"view_{v}."): node for name, node in inputs.items() if name.startswith(f"view_{v}.")}


def _on(node: DataNode, device: str) -> DataNode:
    return node.gpu() if device == "gpu" else node  # build time
