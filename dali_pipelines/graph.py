"""The processing graph: encoded pictures and composed edits in, views out; one for training, evaluation and people.

    decode -> shrink (antialiased, where the picture is much larger than it will appear) -> ONE warp -> blend with other
    pictures and paint -> colour -> effects -> blur -> JPEG -> erase and normalise

Between stages colours are 8 bits, rounded, as where Pillow does each stage; within one they are not.

The graph samples nothing and composes nothing: :mod:`dali_pipelines.views` turns a ``RenderPlan`` into its inputs. An
``if`` on a graph node is per sample: samples that are off skip the operators inside. An ``if`` marked *build time* is
decided once when the pipeline is built.

This module imports DALI; import it only where a pipeline is built.
"""

# ruff: noqa: SIM108 - DALI makes per-sample branches of if statements, not of conditional expressions

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from nvidia import dali
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from dali_pipelines.cpu_operators import (
    blend_operator,
    blur_operator,
    colour_operator,
    curve_operator,
    cut_operator,
    finish_operator,
    median_operator,
    remap_operator,
    resize_operator,
    warp_operator,
)
from dali_pipelines.views import COLOUR_STEPS, LAYERS, LUMA, input_table

# DALI's stubs leave out its data types and say "node, nodes or nothing" of every operator.
fn: Any = dali.fn
types: Any = dali.types
math: Any = dali.math
pipeline_def: Any = dali.pipeline.pipeline_def

Nodes = dict[str, DataNode]
Statistics = tuple[Sequence[float], Sequence[float]]

#: Tiles a side and clip limit of Clahe, which DALI takes when the graph is built.
CLAHE_TILES, CLAHE_LIMIT = 8, 2.5

#: Colour of the drops of Rain and what is left of the brightness.
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
    normalize: Statistics | None = None,
    prefetch: int = 2,
) -> Pipeline:
    """A pipeline that calls ``source`` for the arrays of one batch and returns ``views`` batches of S x S views.

    ``source`` returns one entry per name of :func:`~dali_pipelines.views.input_table`, or raises ``StopIteration``. The
    views are float32 [B, 3, S, S], normalised by ``normalize`` = (mean, std) on the [0, 1] scale, or uint8 [B, S, S, 3]
    if it is None. ``device_id`` None with ``device="gpu"`` defines a graph that can be serialised but not built.
    """
    layouts = {name: layout for name, (layout, _) in input_table(views).items()}

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        enable_conditionals=True,
    )
    def pipeline() -> tuple[DataNode, ...]:
        fed = fn.external_source(source=source, num_outputs=len(layouts), layout=list(layouts.values()), batch=True)
        inputs = {name: fed[i] for i, name in enumerate(layouts)}
        rendered = render(inputs, views=views, size=size, device=device)
        return tuple(finish(pixels, _of_view(inputs, v), normalize, size, device) for v, pixels in enumerate(rendered))

    return pipeline()


def build_cutter(
    source: Callable[[], Sequence[Any]],
    *,
    size: int,
    batch_size: int,
    threads: int,
    normalize: Statistics,
) -> Pipeline:
    """A pipeline of the CPU that decodes once and cuts all views of a picture: float32 [B, 3, V * S, S], normalised.

    ``source`` returns encoded pictures, the table [V, 8] of each (rows of :meth:`~dali_pipelines.views.Cut.row`) and
    empty arrays [V * S, S, 0].
    """

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None, prefetch_queue_depth=2)
    def pipeline() -> DataNode:
        encoded, rows, like = fn.external_source(source=source, num_outputs=3, batch=True)
        views = fn.reshape(cut_operator()(like, decode(encoded, "cpu"), rows), layout="HWC")
        return _normalised(views, normalize)

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
    """Views uint8 [S, S, 3], nothing erased, from the inputs of :func:`~dali_pipelines.views.input_table`."""
    first = decode(inputs["picture_0"], device)
    first_plain = plain_resize(first, inputs["plain_0"], inputs["plain_size"], device)
    rendered = [view(first, first_plain, _of_view(inputs, 0), size, device)]
    if views == 2:  # build time
        if inputs["separate"]:
            second = decode(inputs["picture_1"], device)
            second_plain = plain_resize(second, inputs["plain_1"], inputs["plain_size"], device)
        else:
            second = first
            second_plain = first_plain
        rendered.append(view(second, second_plain, _of_view(inputs, 1), size, device))
    return rendered


def view(picture: DataNode, plain: DataNode, inputs: Nodes, size: int, device: str) -> DataNode:
    """One view of a decoded picture, before erasing; ``plain`` is its S x S resize where some view asked for it."""
    if inputs["as_plain"]:
        working = plain
    else:
        if inputs["shrink"]:
            working = resize(picture, inputs["working"], device)
        else:
            working = picture
    if inputs["warp"]:
        warped = warp(working, inputs["matrix"], inputs["plain_size"], size, device)
    else:
        warped = working
    if inputs["remap"]:
        pixels = remap(warped, inputs["points"], size, device)
    else:
        pixels = warped
    if inputs["blend"]:
        pixels = blend(pixels, inputs, size, device)
    if inputs["colour"]:
        pixels = colour(pixels, inputs["steps"], device)
    if inputs["effects"]:
        pixels = effects(pixels, inputs, size, device)
    if inputs["blur"]:
        pixels = blur(pixels, inputs["taps"], device)
    if inputs["jpeg"]:
        pixels = fn.jpeg_compression_distortion(pixels, quality=inputs["quality"])
    return pixels


def finish(pixels: DataNode, inputs: Nodes, normalize: Statistics | None, size: int, device: str) -> DataNode:
    """The view as the pipeline delivers it: float32 [3, S, S], erased and normalised, or uint8 [S, S, 3]."""
    if device == "cpu" and normalize is not None:  # build time
        mean, std = (np.array(numbers, np.float32) for numbers in normalize)
        scale = types.Constant(np.stack([1.0 / (255.0 * std), -mean / std]).astype(np.float32))
        return fn.reshape(finish_operator()(pixels, inputs["mask"], inputs["noise"], scale), layout="CHW")
    return finish_twin(pixels, inputs, normalize, size, device)


def finish_twin(pixels: DataNode, inputs: Nodes, normalize: Statistics | None, size: int, device: str) -> DataNode:
    """:func:`finish` in DALI's operators: the GPU's way, and that of people's pictures."""
    colours = fn.cast(pixels, dtype=types.FLOAT)
    if inputs["mask"].shape()[0] == size:
        colours = erase(colours, inputs, device)
    if normalize is None:  # build time
        return _as_bytes(colours)
    return _normalised(colours, normalize)


def _normalised(colours: DataNode, normalize: Statistics) -> DataNode:
    mean, std = normalize
    return fn.crop_mirror_normalize(
        colours, mean=[255.0 * m for m in mean], std=[255.0 * s for s in std], dtype=types.FLOAT, output_layout="CHW"
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


def warp(picture: DataNode, matrix: DataNode, like: DataNode, size: int, device: str) -> DataNode:
    """Bilinear homography to S x S, the size of the empty ``like`` [S, S, 0].

    ``matrix`` [3, 3] maps output to picture points, corner convention of DESIGN.md.
    """
    if device == "cpu":  # build time
        return fn.reshape(warp_operator()(like, picture, matrix), layout="HWC")
    return warp_twin(picture, matrix, size)


def warp_twin(picture: DataNode, matrix: DataNode, size: int) -> DataNode:
    """:func:`warp` by DALI's own operator: the GPU's way."""
    return fn.experimental.warp_perspective(
        picture,
        matrix=matrix,
        size=[size, size],
        interp_type=types.INTERP_LINEAR,
        border_mode="replicate",
        pixel_origin="corner",
    )


def remap(picture: DataNode, points: DataNode, size: int, device: str) -> DataNode:
    """Bilinear dense map; ``points`` float [H, W, 2] are (x, y) in the picture's pixels, corner convention.

    DALI has no CPU backend of it: there a Numba leaf does the same.
    """
    if device == "cpu":  # build time
        return fn.reshape(remap_operator()(points, picture), layout="HWC")
    return remap_twin(picture, points, size)


def remap_twin(picture: DataNode, points: DataNode, size: int) -> DataNode:
    """:func:`remap` by DALI's own operator; ``points`` [S, S, 2] must lie half a pixel inside of the picture."""
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


def share(weight: DataNode, device: str) -> DataNode:
    """Blending weights uint8 [S, S, 1] as a share in [0, 1]."""
    return fn.cast(_on(weight, device), dtype=types.FLOAT) * np.float32(1.0 / 255.0)


def blend(pixels: DataNode, inputs: Nodes, size: int, device: str) -> DataNode:
    """The view with its other pictures and paint, each times its weight."""
    if device == "cpu":  # build time
        first, second = _layer_or_nothing(inputs, 0, size, device), _layer_or_nothing(inputs, 1, size, device)
        weights = inputs["weight"], inputs["layer_weights"]
        blended = blend_operator()(pixels, first, second, *weights, inputs["painted"])
        return fn.reshape(blended, layout="HWC")
    return blend_twin(pixels, inputs, size, device)


def _layer_or_nothing(inputs: Nodes, k: int, size: int, device: str) -> DataNode:
    if inputs[f"layer_{k}"]:
        placed = layer(inputs, k, size, device)
    else:
        placed = inputs["painted"]  # any picture: its weight is empty
    return placed


def blend_twin(pixels: DataNode, inputs: Nodes, size: int, device: str) -> DataNode:
    """:func:`blend` in DALI's operators: the GPU's way."""
    colours = pixels * share(inputs["weight"], device)
    for k in range(LAYERS):
        if inputs[f"layer_{k}"]:
            weight = inputs["layer_weights"][k * size : (k + 1) * size]
            colours = colours + layer(inputs, k, size, device) * share(weight, device)
    return _as_bytes(colours + _on(inputs["painted"], device))


def layer(inputs: Nodes, k: int, size: int, device: str) -> DataNode:
    """Another picture at its place: uint8 [S, S, 3]."""
    picture = decode(inputs[f"layer_picture_{k}"], device)
    if inputs[f"layer_shrink_{k}"]:
        working = resize(picture, inputs[f"layer_working_{k}"], device)
    else:
        working = picture
    if inputs[f"layer_remap_{k}"]:
        placed = remap(working, inputs[f"layer_points_{k}"], size, device)
    else:
        placed = warp(working, inputs[f"layer_matrix_{k}"], inputs["plain_size"], size, device)
    return placed


def colour(pixels: DataNode, steps: DataNode, device: str) -> DataNode:
    """``steps`` float [COLOUR_STEPS, 3, 4], one after the other: ``matrix @ colours + share * mean luma``, clipped.

    Each step is such a matrix [3, 3] and a column of shares; the mean is that of the view before the step. So
    torchvision's jitter is done, but hue turns about the grey axis in YIQ and nothing is rounded in between.
    """
    if device == "cpu":  # build time
        return fn.reshape(colour_operator()(pixels, steps), layout="HWC")
    return colour_twin(pixels, steps)


def colour_twin(pixels: DataNode, steps: DataNode) -> DataNode:
    """:func:`colour` in DALI's operators: the GPU's way."""
    luma_of = types.Constant(np.array(LUMA, np.float32))
    colours = fn.cast(pixels, dtype=types.FLOAT)
    for k in range(COLOUR_STEPS):
        luma = fn.reductions.sum(fn.reductions.mean(colours, axes=[0, 1]) * luma_of, axes=[0])
        colours = fn.coord_transform(colours, M=steps[k, :, :3]) + luma * steps[k, 0, 3]
        colours = math.min(math.max(colours, np.float32(0.0)), np.float32(255.0))
    return _as_bytes(colours)


def effects(pixels: DataNode, inputs: Nodes, size: int, device: str) -> DataNode:
    """The rarer colour operations, in the order of :data:`copynce.pixtrace.edits.PHOTOMETRIC_ORDER`."""
    if inputs["mix"]:
        pixels = _as_bytes(fn.coord_transform(pixels, MT=inputs["mixing"]))
    if inputs["curve"]:
        pixels = curve(pixels, inputs["levels"], size, device)
    if inputs["equalize"]:
        pixels = fn.equalize(pixels)
    if inputs["clahe"]:
        pixels = fn.clahe(pixels, tiles_x=CLAHE_TILES, tiles_y=CLAHE_TILES, clip_limit=CLAHE_LIMIT)
    if inputs["rain"]:
        pixels = rain(pixels, inputs["drops"], device)
    if inputs["convolve"]:
        pixels = fn.filter(pixels, _on(inputs["kernel"], device))
    if inputs["median"]:
        pixels = median(pixels, inputs["window"], device)
    if inputs["pixelate"]:
        pixels = pixelate(pixels, inputs["cells"], size)
    if inputs["shuffle"]:
        pixels = remap(pixels, inputs["places"], size, device)
    if inputs["grain"]:
        pixels = _as_bytes(pixels + _on(inputs["grains"], device))
    return pixels


def rain(pixels: DataNode, drops: DataNode, device: str) -> DataNode:
    """Drops (uint8 0/1 [S, S, 1]) in light grey, a mean of 7 x 7 pixels, and 70 % of the brightness."""
    wet = pixels + _on(drops, device) * (np.float32(RAIN_GREY) - pixels)
    # Two passes of a seventh each; the first also darkens.
    across = fn.filter(wet, _on(types.Constant(np.full((1, 7), RAIN_LIGHT / 7, np.float32)), device))
    return _as_bytes(fn.filter(across, _on(types.Constant(np.full((7, 1), 1.0 / 7, np.float32)), device)))


def curve(pixels: DataNode, levels: DataNode, size: int, device: str) -> DataNode:
    """``levels`` uint8 [256] at the pixels' values."""
    if device == "cpu":  # build time
        return fn.reshape(curve_operator()(pixels, levels), layout="HWC")
    # The curve is a picture of one row, the colours are places on it.
    row = fn.reshape(levels.gpu(), shape=[1, 256, 1], layout="HWC")
    x = fn.reshape(pixels, shape=[size, 3 * size], layout="HW") + np.float32(0.5)
    y = x * np.float32(0.0) + np.float32(0.5)
    return fn.reshape(_looked_up(row, x, y, size, 3 * size), shape=[size, size, 3], layout="HWC")


def median(picture: DataNode, window: DataNode, device: str) -> DataNode:
    """Median of ``window`` int32 [1] x ``window`` pixels."""
    if device == "cpu":  # build time
        return fn.reshape(median_operator()(picture, window), layout="HWC")
    return fn.experimental.median_blur(picture, window_size=fn.cat(window, window, axis=0))


def pixelate(pixels: DataNode, cells: DataNode, size: int) -> DataNode:
    """Shrink to ``cells`` (height, width), antialiased, and repeat pixels to enlarge again."""
    few = fn.resize(pixels, size=cells, interp_type=types.INTERP_LINEAR, antialias=True)
    return fn.resize(few, size=[size, size], interp_type=types.INTERP_NN)


def _as_bytes(colours: DataNode) -> DataNode:
    return fn.cast(colours, dtype=types.UINT8)  # rounds and clips


def blur(pixels: DataNode, taps: DataNode, device: str) -> DataNode:
    """Separable Gaussian of ``taps`` float [K], mirrored at the border."""
    if device == "cpu":  # build time
        return fn.reshape(blur_operator()(pixels, taps), layout="HWC")
    return blur_twin(pixels, taps, device)


def blur_twin(pixels: DataNode, taps: DataNode, device: str) -> DataNode:
    """:func:`blur` in DALI's operators: the GPU's way."""
    row, column = fn.reshape(taps, shape=[1, -1]), fn.reshape(taps, shape=[-1, 1])
    across = fn.filter(pixels, _on(row, device), dtype=types.FLOAT)
    return _as_bytes(fn.filter(across, _on(column, device)))


def erase(colours: DataNode, inputs: Nodes, device: str) -> DataNode:
    """Replace masked pixels (mask uint8 0/1 [S, S, 1]) by noise float [S, S, 3] on the scale 0..255, not clipped."""
    noise = _on(inputs["noise"], device)
    return colours + fn.cast(_on(inputs["mask"], device), dtype=types.FLOAT) * (noise - colours)


def _of_view(inputs: Nodes, v: int) -> Nodes:
    own = {name.removeprefix(f"view_{v}."): node for name, node in inputs.items() if name.startswith(f"view_{v}.")}
    return own | {"plain_size": inputs["plain_size"]}


def _on(node: DataNode, device: str) -> DataNode:
    return node.gpu() if device == "gpu" else node  # build time
