"""Colour edits of the graph against Pillow and NumPy versions of the same formula."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from copynce.pixtrace import Blur, ColorJitter, Crop, EditProgram, Erase, Grayscale, Jpeg, Pad, Resize
from dali_pipelines import render_programs

SIZE = 64


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Colourful, of the view's size, with values in 60..180 so that moderate factors clip nothing."""
    y, x = np.mgrid[:SIZE, :SIZE]
    waves = [np.sin(x / 5.0) + np.cos(y / 7.0), np.sin((x + y) / 6.0) * 2, np.cos(x * y / 300.0) * 2]
    path = tmp_path_factory.mktemp("photometric") / "waves.png"
    Image.fromarray(np.stack([120 + 30 * wave for wave in waves], axis=-1).astype(np.uint8)).save(path)
    return path


def rendered(picture: Path, *edits: object) -> np.ndarray:
    return render_programs([picture], [EditProgram(tuple(edits))], SIZE)[0].astype(np.float64)  # type: ignore[arg-type]


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


def test_jitter_is_one_linear_map_clipped_at_its_end(picture: Path) -> None:
    jitter = ColorJitter(brightness=1.6, contrast=1.7, saturation=1.5, hue=0.15)
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
    turn = 2 * np.pi * jitter.hue
    rotation = np.array([[1, 0, 0], [0, np.cos(turn), np.sin(turn)], [0, -np.sin(turn), np.cos(turn)]])
    saturate = np.diag([1.0, jitter.saturation, jitter.saturation])
    colours = as_array(picture) @ (np.linalg.inv(to_yiq) @ saturate @ rotation @ to_yiq).T * jitter.brightness
    luma = (colours.mean(axis=(0, 1)) * to_yiq[0]).sum()
    expected = np.clip(jitter.contrast * colours + (1 - jitter.contrast) * luma, 0, 255)
    # The YIQ matrix is published with three to six digits.
    assert np.abs(rendered(picture, jitter) - expected).max() <= 3.0


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
        for edits in ((Blur(9.0),), *[(Erase(8, 16, 20, 30, noise=n), Blur(9.0)) for n in (1, 1, 2)])
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
