"""Reading picture files: what is handed over as it is, what Pillow decodes first, what is refused and why."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from copynce.pixtrace import EditProgram
from dali_pipelines import (
    BrokenPicture,
    LoaderOptions,
    Pair,
    PairLoader,
    PictureLoader,
    ShardMember,
    read_picture,
    render_programs,
)
from dali_pipelines.options import MEAN, STD

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


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_not_applied(tmp_path: Path, colours: np.ndarray, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(colours).save(path, exif=exif)
    assert read_picture(path).shape == (48, 60)
    if orientation in (1, 6):
        np.testing.assert_array_equal(plain(path), resized(Image.open(path)))


def png_of_16_bits(values: np.ndarray) -> bytes:
    """``values`` uint16 [H, W, 3]."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def big_endian_tiff(values: np.ndarray, tile: int = 0) -> bytes:
    """``values`` [H, W, 3] of 8 or 16 bits, as one strip or, with ``tile``, one tile of so many pixels a side."""
    height, width, _ = values.shape
    if tile:
        values = np.pad(values, ((0, tile - height), (0, tile - width), (0, 0)))
    pixels = values.astype(values.dtype.newbyteorder(">")).tobytes()
    bits = 8 * values.itemsize
    place = ((322, tile), (323, tile), (324, 8), (325, len(pixels))) if tile else ((273, 8), (279, len(pixels)))
    fields = sorted(((256, width), (257, height), (258, bits), (259, 1), (262, 2), (277, 3), *place))
    end = 8 + len(pixels)
    directory = struct.pack(">H", len(fields))
    for tag, value in fields:
        if tag == 258:  # three numbers, which stand behind the directory
            directory += struct.pack(">HHII", tag, 3, 3, end + 2 + 12 * len(fields) + 4)
        else:
            directory += struct.pack(">HHII", tag, 4, 1, value)
    return b"MM\0*" + struct.pack(">I", end) + pixels + directory + bytes(4) + struct.pack(">HHH", *(bits,) * 3)


def file_of(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def top_down_bmp(image: Image.Image) -> bytes:
    bmp = bytearray(file_of(image.transpose(Image.Transpose.FLIP_TOP_BOTTOM), "BMP"))
    bmp[22:26] = (-image.height).to_bytes(4, "little", signed=True)
    return bytes(bmp)


def ycck_jpeg(image: Image.Image) -> bytes:
    """A CMYK file that says it were YCCK: other colours, but a valid file."""
    content = bytearray(file_of(image.convert("CMYK"), "JPEG"))
    adobe = content.index(b"Adobe")
    assert content[adobe + 11] == 0
    content[adobe + 11] = 2
    return bytes(content)


def odd_files(colours: np.ndarray) -> dict[str, tuple[bytes, Image.Image]]:
    """Valid files that are rare: their bytes, and the RGB picture that they hold where Pillow alone would not say."""
    image = Image.fromarray(colours)
    other = [Image.new("RGB", image.size, "red")]
    clear = image.copy()
    clear.putalpha(Image.fromarray(colours[..., 0]))
    deep = colours.astype(np.uint16) * 257
    grey = Image.fromarray(deep[..., 0])
    over_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), clear).convert("RGB")
    first = image.quantize(64)
    thin = image.resize((1, 3000))
    bits = image.convert("1")
    return {
        "deep.png": (png_of_16_bits(deep), image),
        "deep.tiff": (big_endian_tiff(deep), image),
        "deep_grey.tiff": (file_of(grey, "TIFF", compression="tiff_lzw"), Image.fromarray(colours[..., 0])),
        "big_endian.tiff": (big_endian_tiff(colours), image),
        "tiled.tiff": (big_endian_tiff(colours, tile=64), image),
        "pages.tiff": (file_of(image, "TIFF", save_all=True, append_images=other), image),
        "group4.tiff": (file_of(bits, "TIFF", compression="group4"), bits),
        "clear.webp": (file_of(clear, "WEBP", lossless=True, exact=True), over_white),
        "clear.tiff": (file_of(clear, "TIFF"), over_white),
        "frames.gif": (file_of(first, "GIF", save_all=True, append_images=other), first),
        "frames.webp": (file_of(image, "WEBP", lossless=True, save_all=True, append_images=other), image),
        "frames.png": (file_of(image, "PNG", save_all=True, append_images=other), image),
        "top_down.bmp": (top_down_bmp(image), image),
        "interlaced.png": (file_of(image, "PNG", interlace=1), image),
        "really_a_png.jpg": (file_of(image, "PNG"), image),
        "thin.png": (file_of(thin, "PNG"), thin),
        "wide.bmp": (
            file_of(thin.transpose(Image.Transpose.ROTATE_90), "BMP"),
            thin.transpose(Image.Transpose.ROTATE_90),
        ),
        **{
            name: (content, Image.open(io.BytesIO(content)))
            for name, content in {
                "ycck.jpg": ycck_jpeg(image),
                "really_a_jpeg.png": file_of(image, "JPEG"),
                "progressive_grey.jpg": file_of(image.convert("L"), "JPEG", progressive=True),
                "thin.jpg": file_of(thin, "JPEG"),
                "padded.jpg": file_of(image, "JPEG") + bytes(300),
                "filled.jpg": file_of(image, "JPEG").replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1),
            }.items()
        },
    }


def test_odd_files_are_what_pillow_sees_to_both_loaders(tmp_path: Path, colours: np.ndarray) -> None:
    odd = odd_files(colours)
    for name, (content, _) in odd.items():
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in odd]
    options = LoaderOptions(size=SIZE, batch_size=len(paths))
    pairs = [Pair(path, EditProgram(), path, EditProgram(), positive=True, uuid=path.name) for path in paths]
    (batch,) = PairLoader([pairs], paths, options, substitute=pytest.fail, on_broken=pytest.fail)
    ((indices, pictures),) = PictureLoader(paths, options, on_broken=pytest.fail)
    assert indices.tolist() == list(range(len(paths)))
    for i, (name, (_, expected)) in enumerate(odd.items()):
        for found in (batch.query[i], batch.reference[i], pictures[i]):
            colours = (255 * (found.permute(1, 2, 0).numpy() * np.array(STD) + np.array(MEAN))).round()
            np.testing.assert_array_equal(colours, resized(expected.convert("RGB")), err_msg=name)


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


def test_what_stands_in_for_a_picture_is_named(tmp_path: Path) -> None:
    for content, reason in (
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            "a Git LFS pointer, not the picture; 'git lfs",
        ),
        (b"../.git/annex/objects/x", "a git-annex pointer, not the picture"),
        (b"\n<!DOCTYPE html><html>404", "an HTML page, not a picture"),
        (b"<?xml version='1.0'?><svg/>", "an SVG or XML text"),
        (b'{"error": 404}', "a JSON text, not a picture"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X", "an AppleDouble file of macOS"),
        (b"\x1f\x8b\x08\0", "a compressed file, not a picture"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC picture, which cannot be decoded here"),
    ):
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(BrokenPicture, match=f"a.jpg: {reason}"):
            read_picture(tmp_path / "a.jpg")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_broken_and_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(BrokenPicture, match=r"pipe\.jpg: cannot be read: a named pipe, no file"):
        read_picture(tmp_path / "pipe.jpg")
    with pytest.raises(BrokenPicture, match=r"x\.jpg: cannot be read: a named pipe, no file"):
        read_picture(ShardMember(str(tmp_path / "pipe.jpg"), "x.jpg", 512, 10))
    with pytest.raises(BrokenPicture, match="null: cannot be read: a device, no file"):
        read_picture("/dev/null")


def test_pixel_limit_is_checked_before_decoding(tmp_path: Path) -> None:
    Image.new("RGB", (200, 100)).save(tmp_path / "big.png")
    with pytest.raises(BrokenPicture, match=r"200x100 pixels, more than the limit of 19999"):
        read_picture(tmp_path / "big.png", max_pixels=19_999)
    assert read_picture(tmp_path / "big.png", max_pixels=20_000).shape == (100, 200)
