"""Operators beside their twins, what the host feeds, and the GPU graph as far as it shows without a GPU."""

from __future__ import annotations

import ctypes
import io
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from copynce.pixtrace import (
    POLICIES,
    Blur,
    ColorJitter,
    Crop,
    EditProgram,
    Erase,
    Grayscale,
    HorizontalFlip,
    Overlay,
    Pad,
    PasteOnto,
    Resize,
    sample_program,
)
from dali_pipelines import render_programs
from dali_pipelines.leaves import remap_bilinear, resize_bicubic, warp_bilinear
from dali_pipelines.loaders import MEAN, STD
from dali_pipelines.sources import EncodedPicture
from dali_pipelines.views import COLOUR_STEPS, Scene, View, check_plan, feed, input_table, working_size

SHAPES = [((97, 130), (48, 48)), ((40, 31), (63, 257)), ((1, 1), (7, 5)), ((300, 17), (1, 64)), ((64, 64), (64, 64))]


def noise(shape: tuple[int, int], grain: int = 1) -> np.ndarray:
    """uint8 [height, width, 3]: noise with grains of so many pixels."""
    coarse = -(-shape[0] // grain), -(-shape[1] // grain)
    dots = np.random.default_rng(shape[0]).integers(0, 256, (*coarse, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(dots).resize(shape[::-1], Image.Resampling.BICUBIC)).copy()


@pytest.mark.parametrize(("source", "target"), SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_bicubic_equals_pillow_to_the_bit(source: tuple[int, int], target: tuple[int, int]) -> None:
    out = np.full((*target, 3), 77, np.uint8)
    resize_bicubic(noise(source), out)
    image = Image.fromarray(noise(source))
    # Columns first, as every Pillow did when the published numbers were made; newer ones choose the order by cost.
    narrow = image.resize((target[1], source[0]), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(out, np.asarray(narrow.resize(target[::-1], Image.Resampling.BICUBIC)))


def test_bicubic_equals_pillow_at_any_size() -> None:
    random = np.random.default_rng()
    for _ in range(30):
        height, width, high, wide = np.exp(random.uniform(0.0, 6.0, 4)).astype(int).tolist()
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        out = np.full((high, wide, 3), 77, np.uint8)
        resize_bicubic(pixels, out)
        narrow = Image.fromarray(pixels).resize((wide, height), Image.Resampling.BICUBIC)
        expected = np.asarray(narrow.resize((wide, high), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(out, expected, f"{height} x {width} to {high} x {wide}")


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (3, 5), (70, 9)])
def test_nothing_is_read_behind_a_picture(shape: tuple[int, int]) -> None:
    """Pixels are fetched four bytes at a time: a picture that ends where no memory follows."""
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0) == 0
    size = 3 * shape[0] * shape[1]
    picture = np.frombuffer(memory, np.uint8, size, page - size).reshape(*shape, 3)
    picture[:] = 9
    out = np.zeros((8, 6, 3), np.uint8)
    for fill in (
        lambda: resize_bicubic(picture, out),
        lambda: warp_bilinear(picture, np.diag([1.0, 1.0, 0.05]).astype(np.float32), out),
        lambda: remap_bilinear(picture, np.full((8, 6, 2), 100.0, np.float32), out),
    ):
        out[:] = 0
        fill()
        assert (out == 9).all()


def test_both_resize_operators_agree() -> None:
    from nvidia import dali
    from nvidia.dali import fn

    from dali_pipelines.cpu_operators import resize_operator

    pictures = [noise(source, grain=8) for source, _ in SHAPES[:4]]
    targets = [target for _, target in SHAPES[:4]]

    @dali.pipeline_def(batch_size=4, num_threads=2, device_id=None)
    def both() -> tuple[object, object]:
        picture = fn.external_source(source=lambda: pictures, layout="HWC", batch=True)
        like = fn.external_source(source=lambda: [np.zeros((*t, 0), np.uint8) for t in targets], batch=True)
        sizes = fn.external_source(source=lambda: np.array(targets, np.float32), batch=True)
        twin = fn.resize(picture, size=sizes, interp_type=dali.types.INTERP_CUBIC, antialias=True)
        return resize_operator()(like, picture), twin

    pipeline = both()
    pipeline.build()
    fast, twin = pipeline.run()
    for i, target in enumerate(targets):
        found, expected = np.array(fast[i]).astype(int), np.array(twin[i]).astype(int)
        assert found.shape == expected.shape == (*target, 3)
        # At the border Pillow leaves outside taps out, the twin repeats the border; in between only rounding differs.
        inner = np.abs(found - expected)[2:-2, 2:-2]
        assert inner.size == 0 or inner.max() <= 2, target


@pytest.mark.parametrize(
    "edit",
    [
        ColorJitter(1.4, 0.6, 1.3, 0.1),
        ColorJitter(1.7, 1.5, 0.0, 0.0, order=("contrast", "hue", "brightness", "saturation")),
        ColorJitter(hue=-0.45),
        ColorJitter(0.0, 0.0, 5.0, 0.25, order=("hue", "saturation", "contrast", "brightness")),
        ColorJitter(1.8, 1.9, 1.6, -0.2, order=("saturation", "brightness", "hue", "contrast")),
    ],
    ids=["all", "grey", "hue", "black", "clipped"],
)
def test_both_colour_operators_agree(edit: ColorJitter) -> None:
    from nvidia import dali
    from nvidia.dali import fn

    from dali_pipelines.graph import colour, colour_twin

    picture = EncodedPicture(np.zeros(1, np.uint8), (9, 9))
    plans = [EditProgram(edits).plan((9, 9), (9, 9)) for edits in ((edit,), (edit, Grayscale()))]
    fed = feed([Scene((picture,), (View(plan),)) for plan in plans], 9)
    numbers = fed[list(input_table(1)).index("view_0.steps")]
    assert np.shape(numbers) == (2, COLOUR_STEPS, 3, 4)

    @dali.pipeline_def(batch_size=2, num_threads=2, device_id=None)
    def both() -> tuple[object, object]:
        pictures = [noise(shape, grain=6) for shape in ((33, 57), (8, 1))]
        colours = fn.external_source(source=lambda: pictures, layout="HWC", batch=True)
        steps = fn.external_source(source=lambda: numbers, batch=True)
        return colour(colours, steps, "cpu"), colour_twin(colours, steps)

    pipeline = both()
    pipeline.build()
    fast, twin = pipeline.run()
    for i in range(2):
        assert_levels_agree(fast[i], twin[i])


def test_both_warp_operators_agree() -> None:
    """Affine, with perspective, mirrored, far outside; of pictures of a row, a column and a pixel too."""
    from nvidia import dali
    from nvidia.dali import fn

    from dali_pipelines.graph import warp, warp_twin

    matrices = np.array(
        [
            [[0.7, 0.1, 3.0], [-0.1, 0.8, 2.0], [0.0, 0.0, 1.0]],
            [[0.9, 0.2, -5.0], [-0.1, 1.1, 4.0], [0.003, -0.002, 1.0]],
            [[-1.0, 0.0, 32.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
            [[1.0, 0.0, 900.0], [0.0, 1.0, -900.0], [0.0, 0.0, 1.0]],
            *[[[0.4, 0.0, 0.1], [0.0, 0.4, 0.1], [0.0, 0.0, 1.0]]] * 3,
        ],
        np.float32,
    )
    pictures = [noise(shape, grain=6) for shape in ((40, 52), (33, 31), (32, 32), (20, 20), (1, 30), (30, 1), (1, 1))]

    @dali.pipeline_def(batch_size=len(pictures), num_threads=2, device_id=None)
    def both() -> tuple[object, object]:
        picture = fn.external_source(source=lambda: pictures, layout="HWC", batch=True)
        matrix = fn.external_source(source=lambda: matrices, batch=True)
        like = fn.external_source(source=lambda: np.zeros((len(pictures), 32, 32, 0), np.uint8), batch=True)
        return warp(picture, matrix, like, 32, "cpu"), warp_twin(picture, matrix, 32)

    pipeline = both()
    pipeline.build()
    fast, twin = pipeline.run()
    for i in range(len(pictures)):
        assert_levels_agree(fast[i], twin[i], often=0.02)


def assert_levels_agree(fast: object, twin: object, often: float = 0.005) -> None:
    """The two uint8 pictures are equal, but for a few levels that one rounds up and the other down."""
    found, expected = np.array(fast), np.array(twin)
    assert found.dtype == expected.dtype == np.uint8
    off = np.abs(found.astype(int) - expected)
    assert off.max() <= 1
    assert (off > 0).mean() < often


def test_both_ways_to_blend_blur_and_finish_agree() -> None:
    """What the CPU does in a leaf, and the GPU in DALI's operators; samples with and without each input."""
    from nvidia import dali
    from nvidia.dali import fn

    from dali_pipelines import graph

    side = 24
    erasing = EditProgram((Blur(9.0), Erase(2, 3, 10, 9, noise=5)))
    covered = EditProgram((Pad(8, 8, 0, 0), Overlay(0, 0, 9, 9, opacity=0.5), Blur(40.0)))
    twice = EditProgram((PasteOnto(40, 40, 3, 4, opacity=0.7), Overlay(5, 5, 12, 12, opacity=0.4)))
    programs = [EditProgram(), erasing, covered, twice, EditProgram((*twice.edits, *covered.edits[:1], *erasing.edits))]
    stored = io.BytesIO()
    Image.fromarray(noise((side, side), grain=4)).save(stored, "PNG")
    picture = EncodedPicture(np.frombuffer(stored.getvalue(), np.uint8), (side, side))
    plans = [program.plan((side, side), (side, side)) for program in programs]
    layers = [(picture,) * sum(layer.color is None for layer in plan.pictures()) for plan in plans]
    scenes = [Scene((picture,), (View(plan, 0, others),)) for plan, others in zip(plans, layers, strict=True)]
    blending = [name for name in input_table(1) if name.startswith(("view_0.layer", "view_0.weight"))]
    names = ["picture_0", "plain_size", "view_0.blend", *blending, "view_0.painted"]
    names += ["view_0.blur", "view_0.taps", "view_0.mask", "view_0.noise"]
    row = dict(zip(input_table(1), feed(scenes, side), strict=True))
    layouts = [input_table(1)[name][0] for name in names]

    @dali.pipeline_def(batch_size=len(programs), num_threads=2, device_id=None, enable_conditionals=True)
    def both() -> tuple[object, ...]:
        fed = [row[name] for name in names]
        nodes = fn.external_source(source=lambda: fed, num_outputs=len(names), layout=layouts, batch=True)
        inputs = {name.removeprefix("view_0."): nodes[i] for i, name in enumerate(names)}
        pixels = graph.decode(inputs["picture_0"], "cpu")
        if inputs["blend"]:
            fast = graph.blend(pixels, inputs, side, "cpu")
            twin = graph.blend_twin(pixels, inputs, side, "cpu")
        else:
            fast = pixels
            twin = pixels
        if inputs["blur"]:
            soft = graph.blur(pixels, inputs["taps"], "cpu")
            soft_twin = graph.blur_twin(pixels, inputs["taps"], "cpu")
        else:
            soft = pixels
            soft_twin = pixels
        done = graph.finish(pixels, inputs, (MEAN, STD), side, "cpu")
        return fast, twin, soft, soft_twin, done, graph.finish_twin(pixels, inputs, (MEAN, STD), side, "cpu")

    pipeline = both()
    pipeline.build()
    blended, blended_twin, soft, soft_twin, done, done_twin = pipeline.run()
    for i in range(len(programs)):
        assert_levels_agree(blended[i], blended_twin[i])
        assert_levels_agree(soft[i], soft_twin[i])
        np.testing.assert_allclose(np.array(done[i]), np.array(done_twin[i]), atol=1e-4)
        assert np.array(done[i]).shape == (3, side, side)
    changed = [(np.array(blended[i]) != np.array(soft[0])).any() for i in range(len(programs))]
    assert changed == [False, False, True, True, True]
    assert (np.array(soft[1]) != np.array(soft[0])).any()
    assert np.abs(np.array(done[1]) - np.array(done[0])).max() > 1


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("normalize", [None, (MEAN, STD)], ids=["uint8", "normalised"])
def test_the_gpu_graph_is_valid(views: int, normalize: tuple[tuple[float, ...], tuple[float, ...]] | None) -> None:
    """DALI checks every operator and argument when it serialises, also where no GPU is."""
    from dali_pipelines.graph import build_pipeline

    pipeline = build_pipeline(
        lambda: [], views=views, size=224, batch_size=8, threads=2, device="gpu", device_id=None, normalize=normalize
    )
    assert len(pipeline.serialize()) > 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", POLICIES)
def test_cpu_and_gpu_render_the_same(tmp_path: Path, policy: str) -> None:
    paths = []
    for i in range(8):
        shape = 120 + 30 * i, 300 - 20 * i
        # Fine detail in grey, coarse in colour, as in photographs: what JPEG does to colours differs most.
        colours = noise(shape, grain=64) // 2 + noise(shape, grain=8)[:, :, :1] // 2
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(colours).save(paths[-1])
    programs = [sample_program(policy, seed=0, epoch=0, uuid=str(i)) for i in range(64)]
    cpu, gpu = (render_programs(paths * 8, programs, 96, device=d, pictures=paths).astype(int) for d in ("cpu", "gpu"))
    # Other resize, JPEG, equalisation and warp code; rare outliers at edges.
    apart = np.abs(cpu - gpu).mean(axis=(1, 2, 3))
    assert apart.mean() < 1.0
    worst = int(apart.argmax())
    assert apart[worst] < 6.0, programs[worst]


@pytest.mark.parametrize(
    ("span", "shape", "expected"),
    [
        ((224, 224), (300, 330), (300, 330)),  # minified by less than 1.5: the warp does it alone
        ((224, 224), (375, 500), (224, 224)),
        ((160, 160), (375, 500), (224, 224)),  # the reference's resize is fine enough, and 1.4 times too fine
        ((100, 100), (375, 500), (100, 100)),
        ((448, 300), (375, 3000), (300, 448)),
        ((448, 448), (375, 500), (375, 500)),  # never enlarged
        ((0.2, 0.3), (375, 500), (1, 1)),
    ],
)
def test_working_sizes(span: tuple[float, float], shape: tuple[int, int], expected: tuple[int, int]) -> None:
    assert working_size(span[::-1], shape, (224, 224)) == expected


def test_what_is_off_costs_no_bytes() -> None:
    picture = EncodedPicture(np.zeros(1000, np.uint8), (375, 500))
    names = list(input_table(2))
    plain = EditProgram().plan((375, 500), (224, 224))
    mirrored = EditProgram((HorizontalFlip(),)).plan((375, 500), (224, 224))
    padded = EditProgram((Pad(50, 50, 50, 50),)).plan((375, 500), (224, 224))
    fed = feed([Scene((picture,), (View(p), View(plain))) for p in (plain, mirrored, padded)], 224)
    row = dict(zip(names, fed, strict=True))
    assert row["plain_0"].tolist() == [True, True, True]  # type: ignore[attr-defined]
    assert row["view_0.as_plain"].tolist() == [True, True, True]  # type: ignore[attr-defined]
    assert row["view_0.warp"].tolist() == [False, True, True]  # type: ignore[attr-defined]
    assert row["view_0.blend"].tolist() == [False, False, True]  # type: ignore[attr-defined]
    assert [w.size for w in row["view_0.weight"]] == [1, 1, 224 * 224]  # type: ignore[attr-defined]
    assert [w.size for w in row["view_1.noise"]] == [3, 3, 3]  # type: ignore[attr-defined]
    assert [p.size for p in row["picture_1"]] == [1, 1, 1]  # type: ignore[attr-defined]


def test_plans_that_the_graph_cannot_render_are_named() -> None:
    grid = (32, 32)
    layers = (PasteOnto(40, 40, 0, 0), Overlay(0, 0, 5, 5), Overlay(5, 5, 5, 5))
    with pytest.raises(ValueError, match="at most 2 other pictures, this program shows 3"):
        check_plan(EditProgram(layers).plan((20, 20), grid))
    check_plan(EditProgram((Crop(0, 0, 9, 9), Resize(8, 8), *layers[:2])).plan((20, 20), grid))
