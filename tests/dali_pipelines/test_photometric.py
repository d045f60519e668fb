"""Colour edits of the graph against Pillow and NumPy versions of the same formula.

COPYNCE_DEVICE=gpu renders them on the GPU.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

import copynce.pixtrace.extras as extras
from copynce.pixtrace import (
    Blur,
    Clahe,
    ColorJitter,
    ColorMatrix,
    Convolve,
    Crop,
    EditProgram,
    Equalize,
    Erase,
    Grayscale,
    Jpeg,
    Median,
    Noise,
    Pad,
    Photometric,
    Pixelate,
    Rain,
    Resize,
    ShufflePixels,
    ToneCurve,
    sample_program,
)
from dali_pipelines import EncodedPicture, render_programs
from dali_pipelines.packing import Scene, View, input_layouts, pack_batch

SIZE = 64
DEVICE = os.environ.get("COPYNCE_DEVICE", "cpu")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Colourful, of the view's size, with values in 60..180 so that moderate factors clip nothing."""
    y, x = np.mgrid[:SIZE, :SIZE]
    waves = [np.sin(x / 5.0) + np.cos(y / 7.0), np.sin((x + y) / 6.0) * 2, np.cos(x * y / 300.0) * 2]
    path = tmp_path_factory.mktemp("photometric") / "waves.png"
    Image.fromarray(np.stack([120 + 30 * wave for wave in waves], axis=-1).astype(np.uint8)).save(path)
    return path


def rendered(picture: Path, *edits: object) -> np.ndarray:
    return render_programs([picture], [EditProgram(tuple(edits))], SIZE, DEVICE)[0].astype(np.float64)  # type: ignore[arg-type]


def as_array(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(np.float64)


@pytest.mark.parametrize(
    ("edit", "enhancer", "factor"),
    [
        (ColorJitter(brightness=0.6), ImageEnhance.Brightness, 0.6),
        (ColorJitter(brightness=1.3), ImageEnhance.Brightness, 1.3),
        (ColorJitter(contrast=0.5), ImageEnhance.Contrast, 0.5),
        (ColorJitter(contrast=1.4), ImageEnhance.Contrast, 1.4),
        (ColorJitter(saturation=0.5), ImageEnhance.Color, 0.5),
        (ColorJitter(saturation=1.2), ImageEnhance.Color, 1.2),
    ],
    ids=["darker", "brighter", "flatter", "contrasty", "paler", "vivid"],
)
def test_jitter_factors_are_those_of_pillow(
    picture: Path, edit: ColorJitter, enhancer: type[ImageEnhance._Enhance], factor: float
) -> None:
    expected = np.asarray(enhancer(Image.open(picture)).enhance(factor)).astype(np.float64)
    # Pillow rounds the grey picture and the mean grey to whole levels and cuts the result instead of rounding it.
    assert np.abs(rendered(picture, edit) - expected).max() <= 2.0


def jittered(colours: np.ndarray, jitter: ColorJitter) -> np.ndarray:
    """The four steps as formulas on float colours, clipped after each."""
    luma = np.array([0.299, 0.587, 0.114])
    to_yiq = np.array([luma, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
    turn = 2 * np.pi * jitter.hue
    rotation = np.array([[1, 0, 0], [0, np.cos(turn), np.sin(turn)], [0, -np.sin(turn), np.cos(turn)]])
    for name in jitter.order:
        if name == "brightness":
            colours = jitter.brightness * colours
        elif name == "contrast":
            colours = jitter.contrast * colours + (1 - jitter.contrast) * (colours @ luma).mean()
        elif name == "saturation":
            colours = jitter.saturation * colours + (1 - jitter.saturation) * (colours @ luma)[..., None]
        else:
            colours = colours @ (np.linalg.inv(to_yiq) @ rotation @ to_yiq).T
        colours = np.clip(colours, 0, 255)
    return colours


ORDERS = list(itertools.permutations(ColorJitter().order))


def test_jitter_steps_run_in_their_order_and_clip(picture: Path) -> None:
    jitters = [ColorJitter(1.6, 1.7, 1.5, 0.15, order=order) for order in ORDERS]
    programs = [EditProgram((jitter,)) for jitter in jitters]
    batch = render_programs([picture] * len(ORDERS), programs, SIZE, DEVICE)
    for jitter, found in zip(jitters, batch, strict=True):
        # The YIQ matrix is published with three to six digits.
        assert np.abs(found - jittered(as_array(picture), jitter)).max() <= 2.5, jitter.order
    assert len({found.tobytes() for found in batch}) >= 12, "orders differ where colours are clipped"


def test_jitter_orders_are_torchvisions(picture: Path) -> None:
    """As ``torchvision.transforms.ColorJitter`` does on Pillow's pictures, but for hue."""
    enhancers = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }
    for order in ORDERS[::3]:
        jitter = ColorJitter(1.4, 1.5, 1.45, order=order)
        expected = Image.open(picture)
        for name in order:
            expected = enhancers[name](expected).enhance(getattr(jitter, name)) if name in enhancers else expected
        # Pillow rounds to whole levels after each step, and the next ones magnify that.
        off = np.abs(rendered(picture, jitter) - np.asarray(expected).astype(np.float64))
        assert off.max() <= 6.0
        assert off.mean() <= 1.5


def test_jitter_order_is_a_permutation_that_json_keeps() -> None:
    program = EditProgram((ColorJitter(hue=0.1, order=("hue", "contrast", "saturation", "brightness")),))
    assert EditProgram.from_json(program.to_json()) == program
    for wrong in (("hue",), ("hue", "hue", "contrast", "saturation"), "hue"):
        with pytest.raises(ValueError, match=r"ColorJitter\.order must be a permutation of"):
            ColorJitter(order=wrong)  # type: ignore[arg-type]
    drawn = [sample_program("descriptor", seed=0, epoch=0, uuid=str(i)).edits for i in range(400)]
    orders = [edit.order for edits in drawn for edit in edits if isinstance(edit, ColorJitter)]
    assert len(orders) == 400
    assert set(orders) == set(ORDERS)


def test_hue_turns_red_towards_green_as_in_hsv(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (200, 40, 40)).save(tmp_path / "red.png")
    red, green, blue = rendered(tmp_path / "red.png", ColorJitter(hue=1 / 3))[4, 4]
    assert green > 2 * max(red, blue)


def test_grayscale_is_itu_601_luma(picture: Path) -> None:
    expected = np.asarray(Image.open(picture).convert("L")).astype(np.float64)
    assert np.abs(rendered(picture, Grayscale()) - expected[..., None]).max() <= 1.0


@pytest.mark.parametrize("sigma", [0.05, 1.4, 4.9, 14.0], ids=lambda sigma: f"sigma {sigma}")
def test_blur_is_a_gaussian_scaled_with_the_view(picture: Path, sigma: float) -> None:
    scaled = sigma * SIZE / 224
    radius = 1 + int(3 * scaled)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / scaled) ** 2)
    expected = np.pad(as_array(picture), ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    for axis in (0, 1):
        expected = np.apply_along_axis(np.convolve, axis, expected, taps / taps.sum(), mode="valid")
    # Rounding, and the tails cut at three standard deviations.
    assert np.abs(rendered(picture, Blur(sigma)) - expected).max() <= 1.5


@pytest.mark.parametrize("quality", [10, 50, 90])
def test_jpeg_leaves_what_saving_leaves(picture: Path, quality: int) -> None:
    saved = io.BytesIO()
    Image.open(picture).save(saved, "JPEG", quality=quality)
    saved.seek(0)
    expected = np.asarray(Image.open(saved)).astype(np.float64)
    original, found = as_array(picture), rendered(picture, Jpeg(quality))
    # Same quantisation tables; chroma is upsampled by another filter and the transform rounds elsewhere.
    assert np.abs(found - expected).mean() <= 0.5 * np.abs(expected - original).mean() + 1.0


def test_order_is_colour_blur_jpeg(picture: Path) -> None:
    blurred_then_gray = rendered(picture, ColorJitter(hue=0.2), Grayscale(), Blur(6.0), Jpeg(90))
    assert np.ptp(blurred_then_gray, axis=2).max() <= 4  # grey, but for JPEG's chroma rounding
    with pytest.raises(ValueError, match="in this order, got Grayscale after Blur"):
        rendered(picture, Blur(6.0), Grayscale())
    with pytest.raises(ValueError, match="in this order, got ColorJitter after ColorJitter"):
        rendered(picture, ColorJitter(), ColorJitter())


def test_erasing_comes_last_with_its_own_noise(picture: Path) -> None:
    plain, first, again, second = (
        rendered(picture, *edits)
        for edits in ((Blur(9.0),), *[(Erase(8, 16, 20, 30, noise_seed=n), Blur(9.0)) for n in (1, 1, 2)])
    )
    box = np.zeros((SIZE, SIZE), bool)
    box[8:28, 16:46] = True
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[~box], plain[~box])
    assert np.abs(first[box] - second[box]).mean() > 50
    # N(0, 1) on the [0, 1] scale, clipped to 8 bits: half of it black, a sixth white.
    assert (first[box] == 0).mean() == pytest.approx(0.5, abs=0.06)
    assert (first[box] == 255).mean() == pytest.approx(0.16, abs=0.04)


def test_uncovered_pixels_are_black_before_colours(picture: Path) -> None:
    darker = rendered(picture, Crop(0, 0, 32, 32), Pad(16, 16, 16, 16), Resize(SIZE, SIZE), ColorJitter(brightness=0.5))
    assert (darker[:15, :15] == 0).all()
    assert darker[32, 32].min() > 20


SEPIA = ((0.393, 0.769, 0.189, 0.0), (0.349, 0.686, 0.168, 0.0), (0.272, 0.534, 0.131, 0.0))
SHIFTED = ((1.0, 0.0, 0.0, 0.4), (0.0, 0.0, 1.0, -0.3), (0.0, -1.0, 0.0, 1.0))
EDGES = {
    ImageFilter.EDGE_ENHANCE: ((-0.5, -0.5, -0.5), (-0.5, 5.0, -0.5), (-0.5, -0.5, -0.5)),
    ImageFilter.EDGE_ENHANCE_MORE: ((-1.0, -1.0, -1.0), (-1.0, 9.0, -1.0), (-1.0, -1.0, -1.0)),
}


@pytest.mark.parametrize("rows", [SEPIA, SHIFTED], ids=["sepia", "shifted and swapped"])
def test_a_colour_matrix_is_one_product(picture: Path, rows: tuple[tuple[float, float, float, float], ...]) -> None:
    matrix = np.array(rows)
    expected = np.clip(as_array(picture) @ matrix[:, :3].T + 255 * matrix[:, 3], 0, 255)
    assert np.abs(rendered(picture, ColorMatrix(rows)) - expected).max() <= 0.51


@pytest.mark.parametrize(
    "levels",
    [
        tuple(((k / 255) ** 1.7) for k in range(256)),
        tuple((k & 0xF0) / 255 for k in range(256)),
        (1.0, 0.0),
        (0.2, 0.9, 0.1),
    ],
    ids=["gamma", "posterized", "inverted", "three stops"],
)
def test_a_tone_curve_is_interpolated(picture: Path, levels: tuple[float, ...]) -> None:
    expected = 255 * np.interp(as_array(picture) / 255, np.linspace(0, 1, len(levels)), levels)
    assert np.abs(rendered(picture, ToneCurve(levels)) - expected).max() <= 0.51


def test_equalizing_flattens_each_histogram(picture: Path) -> None:
    expected = as_array(picture).astype(int)
    for c in range(3):
        counts = np.bincount(expected[..., c].ravel(), minlength=256).cumsum()
        least = counts[counts > 0][0]
        expected[..., c] = (np.clip(counts - least, 0, None) * 255 / (SIZE * SIZE - least)).round()[expected[..., c]]
    assert np.abs(rendered(picture, Equalize()) - expected).max() <= 1


def test_clahe_raises_local_contrast_and_keeps_grey(picture: Path) -> None:
    def local_contrast(colours: np.ndarray) -> float:
        luma = colours @ (0.299, 0.587, 0.114)
        return float(luma.reshape(8, SIZE // 8, 8, SIZE // 8).std(axis=(1, 3)).mean())

    assert local_contrast(rendered(picture, Clahe())) > 1.2 * local_contrast(as_array(picture))
    assert np.ptp(rendered(picture, Grayscale(), Clahe()), axis=2).max() <= 1


@pytest.mark.parametrize("name", EDGES, ids=lambda kernel: kernel.name)
def test_convolving_is_pillows_kernel(picture: Path, name: type[ImageFilter.BuiltinFilter]) -> None:
    expected = np.asarray(Image.open(picture).filter(name)).astype(np.float64)
    # Pillow leaves the border as it was.
    assert np.abs(rendered(picture, Convolve(EDGES[name])) - expected)[1:-1, 1:-1].max() <= 1


def test_kernels_are_correlated_and_merged(picture: Path) -> None:
    left = ((1.0, 0.0, 0.0),)  # each pixel takes its left neighbour
    below = ((0.0,), (0.0,), (1.0,))
    moved = rendered(picture, Convolve(left), Convolve(below))
    np.testing.assert_array_equal(moved[:-1, 1:], as_array(picture)[1:, :-1])


@pytest.mark.parametrize("window", [3, 5, 7])
def test_median_is_pillows(picture: Path, window: int) -> None:
    expected = np.asarray(Image.open(picture).filter(ImageFilter.MedianFilter(window)))
    np.testing.assert_array_equal(rendered(picture, Median(window)), expected)


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.77])
def test_pixelating_is_shrinking_and_repeating(picture: Path, ratio: float) -> None:
    side = round(ratio * SIZE)
    small = Image.open(picture).resize((side, side), Image.Resampling.BILINEAR)
    expected = np.asarray(small.resize((SIZE, SIZE), Image.Resampling.NEAREST)).astype(np.float64)
    cell = SIZE // side + 1
    # At the border of the picture Pillow leaves outside taps out, DALI repeats the border.
    off = np.abs(rendered(picture, Pixelate(ratio)) - expected)[cell:-cell, cell:-cell]
    # A pixel whose centre lies on the border of two cells may fall to either.
    assert np.percentile(off, 97) <= 2
    np.testing.assert_array_equal(rendered(picture, Pixelate(1.0)), as_array(picture))


def test_shuffling_moves_a_tenth_of_the_pixels(picture: Path) -> None:
    plain, shuffled = as_array(picture), rendered(picture, ShufflePixels())
    assert 0.07 < (plain != shuffled).any(axis=2).mean() < 0.12
    assert sorted(map(tuple, plain.reshape(-1, 3))) == sorted(map(tuple, shuffled.reshape(-1, 3)))


def test_noise_has_its_strength_and_number(picture: Path) -> None:
    plain = as_array(picture)
    grey, coloured, again = (rendered(picture, Noise(*n)) - plain for n in ((0.04, 0, 7), (0, 0.02, 7), (0, 0.02, 8)))
    assert grey.std() == pytest.approx(0.04 * 255, rel=0.1)
    assert np.ptp(grey, axis=2).max() <= 1
    assert coloured.std() == pytest.approx(0.02 * 255, rel=0.1)
    assert np.abs(np.corrcoef(coloured.reshape(-1, 3).T)[np.triu_indices(3, 1)]).max() < 0.1
    assert np.abs(coloured - again).mean() > 3


def test_all_effects_together_and_one_at_a_time_in_a_batch(picture: Path) -> None:
    effects = (
        ColorJitter(hue=0.1), Grayscale(), ColorMatrix(SEPIA), ToneCurve((0.0, 1.0)), Equalize(), Clahe(), Rain(3),
        Convolve(EDGES[ImageFilter.EDGE_ENHANCE]), Median(3), Pixelate(0.5), ShufflePixels(), Noise(0.01),
        Blur(4.0), Jpeg(50),
    )  # fmt: skip
    programs = [EditProgram(effects), EditProgram(), *(EditProgram((effect,)) for effect in effects)]
    batch = render_programs([picture] * len(programs), programs, SIZE, DEVICE)
    for program, pixels in zip(programs, batch, strict=True):
        np.testing.assert_array_equal(pixels, render_programs([picture], [program], SIZE, DEVICE)[0])
    with pytest.raises(ValueError, match="in this order, got Noise after Blur"):
        rendered(picture, Blur(4.0), Noise(0.1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ColorMatrix(((1.0, 0.0, 0.0),) * 3), "ColorMatrix.rows must be three rows of four finite numbers"),
        (lambda: ToneCurve((0.0, 1.2)), r"ToneCurve.levels must be 2 to 256 numbers in \[0, 1\]"),
        (lambda: Convolve(((1.0, 0.0),)), "Convolve.kernel must be rows of one length, all sides odd"),
        (lambda: Convolve(((float("nan"),),)), "Convolve.kernel must be finite"),
        (lambda: Median(4), "Median.window must be odd"),
        (lambda: Pixelate(0.0), "Pixelate.ratio must be a number in"),
        (lambda: Noise(2.0), "Noise.luma must be a number in"),
    ],
)
def test_wrong_numbers_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Fixed:
    """A stream of numbers that are all the same share of their range."""

    def __init__(self, share: float) -> None:
        self.share = share

    def unit(self) -> float:
        return self.share

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.share

    def integer(self, below: int) -> int:
        return int(below * self.share)


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_extra_operations_equal_their_formulas(picture: Path, share: float) -> None:
    plain, draw = as_array(picture), Fixed(share)
    low_to_high = 0.8 + 0.4 * share
    expected = {
        extras.solarize: np.where(plain >= 128, 255 - plain, plain),
        extras.posterize: plain.astype(int) & 0xF0,
        extras.gamma: 255 * (plain / 255) ** low_to_high,
        extras.invert: 255 - plain,
        extras.multiplicative_noise: plain * (0.9 + 0.2 * share),
        extras.brightness_contrast: plain * low_to_high + 255 * (0.4 * share - 0.2),
        extras.rgb_shift: plain + 40 * share - 20,
    }
    for operation, colours in expected.items():
        assert np.abs(rendered(picture, operation(draw)) - np.clip(colours, 0, 255)).max() <= 1.0, operation.__name__
    assert np.asarray(extras.hue_saturation_value(draw).rows)[:, :3].sum(axis=1) == pytest.approx(1.0, abs=2e-3)  # type: ignore[attr-defined]
    assert np.sum(extras.motion_blur(draw).kernel) == pytest.approx(1.0)  # type: ignore[attr-defined]
    alpha, lightness = 0.2 + 0.3 * share, 0.5 + 0.5 * share
    assert np.sum(extras.sharpen(draw).kernel) == pytest.approx(1.0 - alpha + alpha * lightness)  # type: ignore[attr-defined]


@pytest.mark.parametrize("operation", extras.EXTRAS, ids=lambda operation: operation.__name__)
def test_every_extra_operation_renders(picture: Path, operation: Callable[[Fixed], Photometric]) -> None:
    assert np.abs(rendered(picture, operation(Fixed(0.7))) - as_array(picture)).max() > 0


@pytest.mark.parametrize("slant", [-9, 0, 4])
def test_rain_is_slanted_grey_lines_a_mean_and_darker(picture: Path, slant: int) -> None:
    composed = EditProgram((Rain(slant, noise_seed=3),)).composed((SIZE, SIZE), (SIZE, SIZE))
    encoded = EncodedPicture(np.zeros(1, np.uint8), (SIZE, SIZE))
    packed = pack_batch([Scene((encoded,), (View(composed),))], SIZE)
    drops = packed[list(input_layouts(1)).index("view_0.planes")][0] > 0  # type: ignore[index]
    # Six drops of 21 pixels; some overlap or leave at the side.
    assert 60 < drops.sum() <= SIZE * SIZE // 600 * 21
    rows, columns = np.nonzero(drops[..., 0])
    top = np.flatnonzero(rows == rows.min())[0]
    ends = columns[rows == rows[top] + 20] - columns[top]
    assert slant in ends or columns[top] + slant >= SIZE or columns[top] + slant < 0
    wet = np.pad(np.where(drops, 200.0, as_array(picture)), ((3, 3), (3, 3), (0, 0)), mode="reflect")
    for axis in (0, 1):
        wet = np.apply_along_axis(np.convolve, axis, wet, np.full(7, 1 / 7), mode="valid")
    assert np.abs(rendered(picture, Rain(slant, noise_seed=3)) - 0.7 * wet).max() <= 1.0
    assert not np.array_equal(
        rendered(picture, Rain(slant, noise_seed=3)), rendered(picture, Rain(slant, noise_seed=4))
    )
