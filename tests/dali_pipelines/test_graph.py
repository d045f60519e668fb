"""Operators beside their twins, what the host packs, and the GPU graph as far as it shows without a GPU."""

from __future__ import annotations

import ctypes
import io
import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from copynce.pixtrace import (
    POLICIES,
    Blur,
    ColorJitter,
    ColorMatrix,
    Crop,
    EditProgram,
    Erase,
    Grayscale,
    HorizontalFlip,
    Noise,
    Overlay,
    Pad,
    PasteOnto,
    Perspective,
    Remap,
    Resize,
    Stamp,
    sample_program,
)
from dali_pipelines import render_programs
from dali_pipelines.numba_ops.resize import resize_bicubic
from dali_pipelines.numba_ops.warp import remap_bilinear, warp_bilinear
from dali_pipelines.packing import FLAGS, Scene, View, check_view, input_layouts, pack_batch, working_size
from dali_pipelines.sources import EncodedPicture

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


def assert_levels_agree(fast: object, twin: object, often: float = 0.005, most: int = 1) -> None:
    """The two uint8 pictures are equal, but for a few levels that one rounds up and the other down."""
    found, expected = np.array(fast), np.array(twin)
    assert found.dtype == expected.dtype == np.uint8
    off = np.abs(found.astype(int) - expected)
    assert off.max() <= most
    assert (off > 0).mean() < often


def both_ways(
    programs: list[EditProgram], shape: tuple[int, int], side: int, what: Callable[..., tuple[object, ...]]
) -> tuple[list[np.ndarray], ...]:
    """What ``what(picture, inputs of the view)`` makes of a picture of ``shape`` with each program, by DALI."""
    from nvidia import dali
    from nvidia.dali import fn

    from dali_pipelines import graph

    stored = io.BytesIO()
    Image.fromarray(noise(shape, grain=6)).save(stored, "PNG")
    picture = EncodedPicture(np.frombuffer(stored.getvalue(), np.uint8), shape)
    composed = [program.composed(shape, (side, side)) for program in programs]
    layers = [(picture,) * sum(layer.color is None for layer in view.pictures()) for view in composed]
    packed = pack_batch(
        [Scene((picture,), (View(p, 0, others),)) for p, others in zip(composed, layers, strict=True)], side
    )  # fmt: skip
    layouts = input_layouts(1)

    @dali.pipeline_def(batch_size=len(programs), num_threads=2, device_id=None, enable_conditionals=True)
    def both() -> tuple[object, ...]:
        nodes = fn.external_source(
            source=lambda: packed, num_outputs=len(packed), layout=list(layouts.values()), batch=True
        )  # fmt: skip
        inputs = {name: nodes[i] for i, name in enumerate(layouts)}
        shown, of_view = graph.decode(inputs["picture_0"], "cpu"), graph._of_view(inputs, 0)
        shown = graph.plain_resize(shown, graph.flag(of_view, "as_plain"), inputs["like"], "cpu")
        return what(shown, of_view)

    pipeline = both()
    pipeline.build()
    return tuple([np.array(output[i]) for i in range(len(programs))] for output in pipeline.run())


JITTERS = (
    ColorJitter(1.4, 0.6, 1.3, 0.1),
    ColorJitter(1.7, 1.5, 0.0, 0.0, order=("contrast", "hue", "brightness", "saturation")),
    ColorJitter(hue=-0.45),
    ColorJitter(0.0, 0.0, 5.0, 0.25, order=("hue", "saturation", "contrast", "brightness")),
    ColorJitter(1.8, 1.9, 1.6, -0.2, order=("saturation", "brightness", "hue", "contrast")),
)


def test_composing_agrees_with_dalis_operators() -> None:
    """Places, weights, paint and colours of a view: in one operator, and as on the GPU; alone and together."""
    from dali_pipelines import graph

    side = 24
    around = Pad(8, 8, 0, 0)
    pasted = (PasteOnto(56, 60, 3, 4, opacity=0.7), Overlay(5, 5, 12, 12, opacity=0.4))
    stamp = Stamp(("1011", "0110"), 3, 2, 9, 8, color=(0.9, 0.3, 0.1), opacity=0.6)
    turned = (Perspective(((0.8, 0.3, 2.0), (-0.2, 0.9, 4.0), (0.003, -0.002, 1.0))),)
    layer = Overlay(0, 0, 9, 9, opacity=0.5)
    jitters = [EditProgram((jitter, *grey)) for jitter in JITTERS for grey in ((), (Grayscale(),))]
    y, x = np.mgrid[:25, :27] + 0.5
    waves = (Remap(np.stack([x + 2 * np.sin(y / 3), y + np.cos(x / 4)], axis=-1)), layer)
    single = [
        EditProgram(edits) for edits in ((), (HorizontalFlip(),), turned, (around, layer), pasted, (stamp,), waves)
    ]
    together = [
        EditProgram((*pasted, stamp, around, Erase(2, 3, 10, 9, noise_seed=5), JITTERS[0])),
        EditProgram((*pasted, *turned, JITTERS[4])),
        EditProgram((*pasted, Pad(40, 30, 20, 0))),  # shrunk to half and less, layers too
    ]

    def both(picture: object, inputs: dict[str, object]) -> tuple[object, object]:
        return graph.compose(picture, inputs, side, "cpu"), graph.compose_twin(picture, inputs, side, "cpu")

    for programs, shape in (([*jitters, *single], (25, 27)), (together, (40, 44))):
        fast, twin = both_ways(programs, shape, side, both)
        for program, found, expected in zip(programs, fast, twin, strict=True):
            if programs is together:
                # DALI's resize rounds elsewhere, and jitters of 1.8 x 1.9 x 1.6 magnify what is rounded before.
                off = np.abs(found.astype(int) - expected)
                assert found.shape == expected.shape == (side, side, 3)
                assert off.mean() < 0.6, program
                assert off.max() <= 3 * 1.8 * 1.9 * 1.6, program
            else:
                # DALI's warp on the CPU rounds places to 1/32 of a pixel; a blend adds up to three of them.
                often, most = (0.15, 2) if program in single else (0.005, 1)
                assert_levels_agree(found, expected, often, most)
        assert len({found.tobytes() for found in fast}) >= len(programs) - 2, "two of the jitters make grey anyway"


def test_mixing_blurring_and_finishing_agree_with_dalis_operators() -> None:
    from dali_pipelines import graph

    side = 24
    erasing = (Erase(2, 3, 10, 9, noise_seed=5),)
    effects = (ColorMatrix(((0.4, 0.7, 0.2, 0.1), (1.3, -0.6, 0.1, -0.1), (0.0, 0.0, 1.0, 0.0))), Noise(0.1))
    programs = [EditProgram((*more, *effects, Blur(sigma))) for sigma in (9.0, 40.0, 100.0) for more in ((), erasing)]

    def both(picture: object, inputs: dict[str, object]) -> tuple[object, ...]:
        fast, twin = (finish(picture, inputs, True, side, "cpu") for finish in (graph.finish, graph.finish_twin))
        mixed = graph.mix(picture, inputs, "cpu"), graph.mix_twin(picture, inputs)
        return *mixed, graph.blur(picture, inputs, "cpu"), graph.blur_twin(picture, inputs), fast, twin

    mixed, mixed_twin, soft, soft_twin, done, done_twin = both_ways(programs, (side, side), side, both)
    for i in range(len(programs)):
        assert_levels_agree(mixed[i], mixed_twin[i])
        assert_levels_agree(soft[i], soft_twin[i])
        np.testing.assert_allclose(done[i], done_twin[i], atol=1e-4)
        assert done[i].shape == (3, side, side)
    assert len({pixels.tobytes() for pixels in soft}) == 3
    assert np.abs(done[1] - done[0]).max() > 1


def test_warping_agrees_with_dalis_operator() -> None:
    """Affine, with perspective, mirrored, far outside; of pictures of a row, a column and a pixel too."""
    from nvidia import dali
    from nvidia.dali import fn

    from dali_pipelines.graph import warp

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
    def by_dali() -> object:
        picture = fn.external_source(source=lambda: pictures, layout="HWC", batch=True)
        return warp(picture, fn.external_source(source=lambda: matrices, batch=True), 32)

    pipeline = by_dali()
    pipeline.build()
    (expected,) = pipeline.run()
    for i, picture in enumerate(pictures):
        found = np.full((32, 32, 3), 77, np.uint8)
        warp_bilinear(picture, matrices[i], found)
        assert_levels_agree(found, expected[i], often=0.02)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("normalized", [False, True], ids=["uint8", "normalised"])
def test_the_gpu_graph_is_valid(views: int, normalized: bool) -> None:
    """DALI checks every operator and argument when it serialises, also where no GPU is."""
    from dali_pipelines.graph import build_pipeline

    pipeline = build_pipeline(
        lambda: [], views=views, size=224, batch_size=8, threads=2, device="gpu", device_id=None, normalized=normalized
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
    names = list(input_layouts(2))
    plain = EditProgram().composed((375, 500), (224, 224))
    mirrored = EditProgram((HorizontalFlip(),)).composed((375, 500), (224, 224))
    padded = EditProgram((Pad(50, 50, 50, 50),)).composed((375, 500), (224, 224))
    packed = pack_batch([Scene((picture,), (View(p), View(plain))) for p in (plain, mirrored, padded)], 224)
    row = dict(zip(names, packed, strict=True))
    assert row["scene_flags"].tolist() == [[True, False, False]] * 3
    flags = dict(zip(FLAGS, row["view_0.flags"].T.tolist(), strict=True))
    assert flags["as_plain"] == [True, True, True]
    assert flags["edited"] == flags["warp_0"] == [False, True, True]
    assert flags["blend"] == [False, False, True]
    assert [w.size for w in packed[names.index("view_0.planes")]] == [0, 0, 224 * 224]  # type: ignore[attr-defined]
    assert [w.size for w in packed[names.index("view_1.noises")]] == [3, 3, 3]  # type: ignore[attr-defined]
    assert [p.size for p in row["picture_1"]] == [1, 1, 1]


def test_views_that_the_graph_cannot_render_are_named() -> None:
    grid = (32, 32)
    layers = (PasteOnto(40, 40, 0, 0), Overlay(0, 0, 5, 5), Overlay(5, 5, 5, 5))
    with pytest.raises(ValueError, match="at most 2 other pictures, this program shows 3"):
        check_view(EditProgram(layers).composed((20, 20), grid))
    check_view(EditProgram((Crop(0, 0, 9, 9), Resize(8, 8), *layers[:2])).composed((20, 20), grid))
