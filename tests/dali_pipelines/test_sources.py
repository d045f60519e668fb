"""Reading picture files: what is handed over as it is, what Pillow decodes first, what is refused and why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from copynce.pixtrace import EditProgram
from dali_pipelines import BrokenPicture, read_picture, render_programs

SIZE = 32


@pytest.fixture
def colours() -> np.ndarray:
    y, x = np.mgrid[:48, :60]
    return np.stack([x * 4, y * 5, (x + y) * 2], axis=-1).astype(np.uint8)


def plain(path: Path) -> np.ndarray:
    return render_programs([path], [EditProgram()], SIZE)[0].astype(np.int64)


def resized(image: Image.Image) -> np.ndarray:
    """Pillow's resize, columns first (newer releases choose the order by cost, which rounds elsewhere)."""
    return np.asarray(
        image.resize((SIZE, image.height), Image.Resampling.BICUBIC).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    ).astype(np.int64)


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("baseline.jpg", "RGB", {"quality": 90}),
        ("progressive.jpg", "RGB", {"progressive": True}),
        ("subsampled.jpg", "RGB", {"subsampling": 2}),
        ("grey.jpg", "L", {}),
        ("cmyk.jpg", "CMYK", {}),
        ("colour.png", "RGB", {}),
        ("grey.png", "L", {}),
        ("palette.png", "P", {}),
        ("bits.png", "1", {}),
        ("colour.bmp", "RGB", {}),
        ("colour.tiff", "RGB", {}),
        ("colour.webp", "RGB", {"lossless": True}),
        ("colour.gif", "P", {}),
    ],
)
def test_formats_equal_pillow(tmp_path: Path, colours: np.ndarray, name: str, mode: str, options: dict) -> None:
    Image.fromarray(colours).convert(mode).save(tmp_path / name, **options)
    assert read_picture(tmp_path / name).shape == (48, 60)
    expected = resized(Image.open(tmp_path / name).convert("RGB"))
    np.testing.assert_array_equal(plain(tmp_path / name), expected)


def test_exif_orientation_is_not_applied(tmp_path: Path, colours: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(colours).save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").shape == (48, 60)
    np.testing.assert_array_equal(plain(tmp_path / "turned.jpg"), resized(Image.open(tmp_path / "turned.jpg")))


def test_sixteen_bits_are_scaled_not_cut(tmp_path: Path) -> None:
    wide = (np.arange(48 * 60, dtype=np.uint16) * 22).reshape(48, 60)
    Image.fromarray(wide).save(tmp_path / "deep.png")
    expected = Image.fromarray(np.round(wide / 257.0).astype(np.uint8)).convert("RGB")
    np.testing.assert_array_equal(plain(tmp_path / "deep.png"), resized(expected))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_laid_over_white(tmp_path: Path, colours: np.ndarray, mode: str) -> None:
    if mode == "P":
        left_is_zero = np.where(np.arange(60) < 30, 0, 1 + np.arange(60) % 3).astype(np.uint8)
        image = Image.fromarray(np.tile(left_is_zero, (48, 1)), mode="L").convert("P")
        image.putpalette([10, 20, 30, 100, 30, 30, 90, 40, 30, 80, 30, 20])
        image.save(tmp_path / "alpha.png", transparency=0)
    else:
        alpha = np.zeros(colours.shape[:2], np.uint8)
        alpha[:, 30:] = 255
        image = Image.fromarray(np.dstack([colours, alpha])).convert(mode)
        image.save(tmp_path / "alpha.png")
    found = plain(tmp_path / "alpha.png")
    assert (found[2, 1] >= 250).all(), "transparent pixels show white"
    assert found[20, 28].min() < 200, "opaque pixels show themselves"


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_one_pixel_is_a_picture(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (1, 1), (10, 200, 30)).save(tmp_path / f"one.{suffix}")
    found = plain(tmp_path / f"one.{suffix}")
    assert np.ptp(found.reshape(-1, 3), axis=0).max() == 0
    assert np.abs(found[0, 0] - (10, 200, 30)).max() <= 3


def test_broken_files_say_why(tmp_path: Path, colours: np.ndarray) -> None:
    Image.fromarray(colours).save(tmp_path / "whole.jpg")
    Image.fromarray(colours).save(tmp_path / "whole.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    for suffix in ("jpg", "png"):
        content = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(content[: len(content) // 2])
        (tmp_path / f"head.{suffix}").write_bytes(content[:40])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture\n" * 50)
    reasons = {
        "missing.jpg": "cannot be read: No such file",
        "empty.jpg": "the file is empty",
        "text.jpg": "no picture format that can be read",
        "cut.jpg": "cannot be decoded: .*[Tt]runcated",
        "cut.png": "cannot be decoded: .*[Tt]runcated",
        "head.jpg": "",
        "head.png": "",
        "float.tiff": "cannot be decoded: 32-bit float pixels",
    }
    for name, reason in reasons.items():
        with pytest.raises(BrokenPicture, match=f"{name}: {reason}") as caught:
            read_picture(tmp_path / name)
        assert caught.value.path == tmp_path / name


def test_pixel_limit_is_checked_before_decoding(tmp_path: Path) -> None:
    Image.new("RGB", (200, 100)).save(tmp_path / "big.png")
    with pytest.raises(BrokenPicture, match=r"200x100 pixels, more than the limit of 19999"):
        read_picture(tmp_path / "big.png", max_pixels=19_999)
    assert read_picture(tmp_path / "big.png", max_pixels=20_000).shape == (100, 200)
