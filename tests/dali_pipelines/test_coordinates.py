"""The heart of the suite: a picture whose colours encode its coordinates must come out as the table says.

The pixel executor (DALI) and the coordinate executor (PixTrace) share the program's numbers and nothing else, so they
can only agree if both are right. COPYNCE_PROGRAMS sets how many random programs of each policy are drawn (default 200);
COPYNCE_DEVICE=gpu renders the pictures on the GPU.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from copynce.pixtrace import (
    POLICIES,
    Affine,
    Crop,
    Edit,
    EditProgram,
    Erase,
    HorizontalFlip,
    Lens,
    Matte,
    Mesh,
    Overlay,
    Pad,
    PasteOnto,
    Perspective,
    RelativeMatte,
    RelativeStamp,
    Remap,
    Resize,
    Rotation,
    Stamp,
    Swirl,
    VerticalFlip,
    Wave,
    bits_of,
    sample_program,
    stroke_bits,
    text_bits,
)
from dali_pipelines import render_programs

SIZE = 224
#: Blue tells what a pixel shows: the source, another picture, or nothing (black).
SOURCE_BLUE, OTHER_BLUE = 128, 255
PROGRAMS = int(os.environ.get("COPYNCE_PROGRAMS", "200"))
DEVICE = os.environ.get("COPYNCE_DEVICE", "cpu")


def coded_picture(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: red codes the column, green the row."""
    y, x = np.mgrid[:height, :width]
    red, green = x * levels_per_pixel(width), y * levels_per_pixel(height)
    return np.stack([red, green, np.full_like(red, SOURCE_BLUE)], axis=-1).round().astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("coded")
    for name, shape in {"wide": (97, 128), "tall": (127, 70), "large": (640, 480)}.items():
        Image.fromarray(coded_picture(*shape)).save(path / f"{name}.png")
    Image.new("RGB", (90, 70), (0, 0, OTHER_BLUE)).save(path / "other.png")
    return path


def levels_per_pixel(side: int) -> float:
    """Two levels a pixel, so that 8-bit rounding between the steps costs little, or what fits into 255."""
    return min(2.0, 255 / (side - 1))


def neighbourhood(mask: np.ndarray, radius: int = 2) -> np.ndarray:
    """True where the mask holds in the whole window: the interior of what shows, away from blended edges."""
    padded = np.pad(mask, radius, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * radius + 1, 2 * radius + 1))
    return windows.all(axis=(2, 3))


def bare(program: EditProgram) -> EditProgram:
    """The geometry and layers of a program, what is painted in the blue of other pictures."""
    return EditProgram(
        tuple(
            dataclasses.replace(edit, color=(0.0, 0.0, 1.0)) if isinstance(edit, (Stamp, RelativeStamp)) else edit
            for edit in program.geometry_only().edits
        )
    )


def check(path: Path, programs: Sequence[EditProgram], other: Path) -> None:
    """Assert that pixels and tables agree; says which program does not."""
    with Image.open(path) as image:
        width, height = image.size
    programs = [bare(program) for program in programs]
    rendered = render_programs([path] * len(programs), programs, SIZE, DEVICE, [other]).astype(np.float64)
    pixels_per_level = np.array([1 / levels_per_pixel(width), 1 / levels_per_pixel(height)])
    # One source pixel. A source larger than the grid: one pixel of the grid, the table's unit, and one grey level.
    unit = np.ones(2)
    if min(height, width) > SIZE:
        unit = np.array([width / SIZE, height / SIZE]) + pixels_per_level
    good = total = 0
    for program, pixels in zip(programs, rendered, strict=True):
        table = program.trace((height, width), (SIZE, SIZE))
        visible = table.index >= 0
        erased = program.composed((height, width), (SIZE, SIZE)).erase_mask() > 0
        interior, exterior = neighbourhood(visible), neighbourhood(~visible & ~erased)
        # What shows the source must look like it, what does not must not.
        assert (np.abs(pixels[interior][:, 2] - SOURCE_BLUE) <= 1).all(), program
        blue = pixels[exterior][:, 2]
        assert (np.minimum(blue, np.abs(blue - OTHER_BLUE)) <= 1).all(), program
        # Pixel k has the colour k, times the levels: its centre is at k + 0.5.
        found = pixels[interior][:, :2] * pixels_per_level + 0.5
        y, x = table.coordinates()
        expected = np.stack([(x + 0.5) * width / SIZE, (y + 0.5) * height / SIZE], axis=-1)[interior]
        agrees = (np.abs(found - expected) <= unit + 1e-6).all(axis=1)
        if interior.any():
            assert agrees.mean() >= 0.99, f"{agrees.mean():.4f} of {interior.sum()} pixels agree for {program}"
        good, total = good + int(agrees.sum()), total + len(agrees)
    assert total > 0
    assert good / total >= 0.99


_Y, _X = np.mgrid[:80, :60] + 0.5
DISC = np.hypot((_Y - 40) / 36, (_X - 30) / 25) < 1
#: Twice as large, mirrored, and partly from outside of the picture.
SPREAD = np.stack([75.0 - np.mgrid[:150, :160][1] / 2, np.mgrid[:150, :160][0] / 2 + 20.0], axis=-1)

SINGLE: dict[str, tuple[Edit, ...]] = {
    "none": (),
    "crop": (Crop(13, 11, 70, 57),),
    "tiny crop": (Crop(40, 50, 5, 9),),
    "resize": (Resize(77, 301),),
    "horizontal flip": (HorizontalFlip(),),
    "vertical flip": (VerticalFlip(),),
    "rotation 90": (Rotation(90.0),),
    "rotation 30": (Rotation(30.0),),
    "shear": (Affine(((1.0, 0.4, -12.5), (0.1, 0.9, 3.25), (0.0, 0.0, 1.0))),),
    "perspective": (Perspective(((0.8, 0.1, 6.0), (-0.05, 0.9, 14.0), (0.0006, 0.0011, 1.0))),),
    "pad": (Pad(31, 7, 12, 44),),
    "paste onto": (Resize(80, 60), PasteOnto(200, 170, 33, 51)),
    "overlay": (Overlay(20, 10, 61, 47),),
    "erase": (Erase(11, 5, 50, 60, noise_seed=5),),
    "stamp": (Stamp(bits_of(np.tri(6, 8)), 9, 7, 60, 55),),
    "text": (RelativeStamp(text_bits("COPY"), 0.4, 0.3, 0.6),),
    "stroke": (RelativeStamp(stroke_bits(((0.1, 0.2), (0.9, 0.5), (0.2, 0.9)), 0.15), 0.9, 0.5, 0.5),),
    "matte": (
        Resize(80, 60),
        Matte(bits_of(DISC), ((0.9, -0.4, 30.0), (0.3, 1.1, 10.0), (0.001, 0.0, 1.0)), 120, 130, picture_choice=0.4),
    ),
    "swirl": (Swirl(0.15, 0.6, 0.4, 0.55),),
    "wave": (Wave(0.04, 0.03, 2.5, 0.2),),
    "lens": (Lens(0.5),),
    "pulled lens": (Lens(-0.4),),
    "mesh": (Mesh((((0.0, 0.1), (0.05, 0.0)), ((-0.1, 0.0), (0.0, -0.08)), ((0.1, 0.1), (0.0, 0.0)))),),
    "remap of another size": (Resize(90, 80), Remap(SPREAD)),
}
CHAINS: dict[str, tuple[Edit, ...]] = {
    "flip then paste then rotate": (HorizontalFlip(), PasteOnto(700, 600, 12, 20), Rotation(17.0), Pad(5, 6, 7, 8)),
    "overlay then shear then crop": (
        Overlay(10, 5, 70, 50),
        Affine(((1.0, 0.3, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))),
        Crop(8, 8, 80, 55),
    ),
    "paste, overlay": (PasteOnto(690, 550, 40, 10), Overlay(60, 20, 90, 75), VerticalFlip()),
    "erase then tilt": (
        Erase(30, 30, 40, 40),
        Perspective(((1.0, 0.2, 0.0), (0.1, 1.0, 0.0), (0.0005, 0.0, 1.0))),
        Resize(100, 90),
    ),
    "stamp, then matte, then turn": (
        RelativeStamp(text_bits("OK"), 0.5, 0.2, 0.3),
        RelativeMatte(bits_of(DISC), 0.8, 30.0, 0.4, 0.6),
        Rotation(-20.0),
    ),
    "overlay, swirl, crop, paste": (
        Overlay(20, 10, 40, 30),
        Swirl(-0.1),
        Crop(30, 30, 150, 160),
        PasteOnto(200, 200, 10, 30),
    ),
    "erase and stamp below two dense maps": (
        Erase(10, 10, 30, 20, noise_seed=9),
        RelativeStamp(("1",), 0.2, 0.9, 0.9),
        Lens(0.3),
        HorizontalFlip(),
        Wave(0.03, 0.0, 1.5),
        Pad(10, 20, 30, 40),
    ),
}


@pytest.mark.parametrize("picture", ["wide", "tall", "large"])
def test_single_edits_and_chains(folder: Path, picture: str) -> None:
    programs = [EditProgram(edits) for edits in (*SINGLE.values(), *CHAINS.values())]
    check(folder / f"{picture}.png", programs, folder / "other.png")


EVERYTHING = dataclasses.replace(POLICIES["phase2"], text="effective", emoji=0.3, stroke=0.3, matte=0.2, remap=0.4)


@pytest.mark.parametrize("policy", [*POLICIES, "everything"])
def test_random_programs(folder: Path, policy: str) -> None:
    chosen = EVERYTHING if policy == "everything" else policy
    programs = [sample_program(chosen, seed=3, epoch=1, uuid=f"picture {i}") for i in range(PROGRAMS)]
    # Twice as many on small pictures, where a pixel has two levels of its colour.
    for part, picture in enumerate(("wide", "tall", "large", "wide", "tall")):
        check(folder / f"{picture}.png", programs[part::5], folder / "other.png")


def test_layers_show_at_their_opacity(folder: Path) -> None:
    program = EditProgram((Overlay(0, 0, 97, 64, opacity=0.25),))
    pixels = render_programs([folder / "wide.png"], [program], SIZE, DEVICE, [folder / "other.png"])[0]
    left, right = pixels[100, 20].astype(float), pixels[100, 200].astype(float)
    assert right[2] == pytest.approx(SOURCE_BLUE, abs=1)
    assert left[2] == pytest.approx(0.75 * SOURCE_BLUE + 0.25 * OTHER_BLUE, abs=2)


def test_paint_shows_in_its_colour_at_its_opacity(folder: Path) -> None:
    box = Stamp(("1",), 0, 0, 97, 64, color=(1.0, 0.5, 0.0), opacity=0.75)
    dot = Stamp(("1",), 0, 0, 97, 32, color=(0.0, 0.0, 1.0))
    pixels = render_programs([folder / "wide.png"], [EditProgram((box, dot))], SIZE, DEVICE)[0].astype(float)
    plain = render_programs([folder / "wide.png"], [EditProgram()], SIZE, DEVICE)[0].astype(float)
    np.testing.assert_allclose(pixels[:, :54], np.broadcast_to([0, 0, 255], (SIZE, 54, 3)), atol=1)
    blended = 0.25 * plain[:, 58:110] + 0.75 * np.array([255, 127.5, 0])
    np.testing.assert_allclose(pixels[:, 58:110], blended, atol=1.5)
    np.testing.assert_array_equal(pixels[:, 114:], plain[:, 114:])


def test_a_program_that_the_graph_cannot_render_is_named(folder: Path) -> None:
    layers = EditProgram(tuple(Overlay(0, 0, 20, 20) for _ in range(3)))
    with pytest.raises(ValueError, match="at most 2 other pictures, this program shows 3"):
        render_programs([folder / "wide.png"], [layers], SIZE, DEVICE, [folder / "other.png"])
