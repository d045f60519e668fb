"""Picture files as bytes that DALI's decoder turns into the right 8-bit RGB picture, or a reason why not.

JPEG and PNG files of ordinary structure are handed over as they are. All others are decoded by Pillow here and handed
over as a lossless PNM file: what DALI and the method's reading rule see differently (alpha, CMYK, palettes, 16 bits,
rare formats), and what looks damaged, so that Pillow decides and gives the reason. DALI must not see files that its
parser refuses: the exception leaves its other threads running on what is freed, and they crash.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import logging
import os
import re
import stat
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError, features

Size = tuple[int, int]
AnyPath = str | os.PathLike[str]

#: Decoded pixels above which a file is refused: 100 megapixels are 300 MB of RGB.
MAX_PIXELS = 100_000_000

#: Bytes; in a tar, headers and contents begin at multiples of it.
TAR_BLOCK = 512

#: Bytes at a JPEG's end in which its end marker must stand; some cameras and servers append padding.
_JPEG_TAIL = 4096

#: Pixels that a byte of a JPEG can stand for: a one-bit code for each block of 8 x 8, 10 blocks to 1,024 pixels.
_JPEG_PIXELS = 1_000

# Pillow warns of damaged metadata and large pictures without naming the file; BrokenPicture says what matters.
# Filters are global: they cannot be set around a call while other threads read.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())
# The same of libtiff, which writes to the standard error; its names are there unless Pillow was linked statically.
with contextlib.suppress(AttributeError):
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)  # type: ignore[attr-defined]

#: What Pillow's decoders raise on damaged files, depending on format and place.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    Warning,  # where a program's filters make errors of them
    struct.error,
)


class BrokenPicture(ValueError):
    """A file that cannot be used as a picture; ``path`` and ``reason`` say which and why."""

    def __init__(self, path: AnyPath, reason: str) -> None:
        super().__init__(f"{os.fspath(path)}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.path, self.reason)


@dataclass(frozen=True, slots=True)
class ShardMember:
    """A file inside an uncompressed tar, read where it lies; as a path (``os.fspath``) it is SHARD/NAME.

    offset, size: of its content in the tar, in bytes. header: CRC-32 of the block before it, the member's header, by
    which a reading sees that the tar is another than it was; -1 if it is not known. The tar is opened for each reading,
    as a file would be: a member holds no handle, and many threads and processes can read it.
    """

    shard: str
    name: str
    offset: int
    size: int
    header: int = -1

    def __fspath__(self) -> str:
        return f"{self.shard}/{self.name}"

    __str__ = __fspath__

    def read_bytes(self) -> bytes:
        """The content; OSError if the tar cannot be read, is too short, or has another file there by now."""
        before = TAR_BLOCK if self.header >= 0 else 0
        _require_file(self.shard)
        with open(self.shard, "rb") as file:
            file.seek(self.offset - before)
            content = file.read(before + self.size)
        missing = before + self.size - len(content)
        if missing > 0:
            raise OSError(errno.EIO, f"the shard ends {missing} bytes too early", self.shard)
        if before and zlib.crc32(memoryview(content)[:before]) != self.header:
            raise OSError(errno.ESTALE, "the shard has changed since its files were listed", self.shard)
        return content[before:]


class Content:
    """What stands in a list of paths where no plain file does: ``os.fspath`` names it, and it gives its own bytes."""

    def __fspath__(self) -> str:
        raise NotImplementedError

    def read_bytes(self) -> bytes:
        """An encoded picture; OSError if there is none. Called by the threads of a loader."""
        raise NotImplementedError


def read_bytes(path: AnyPath) -> bytes:
    """The content of a file, a :class:`ShardMember` or a :class:`Content`; raises OSError, also for what is no regular
    file."""
    if isinstance(path, ShardMember | Content):
        return path.read_bytes()
    _require_file(path)
    return Path(path).read_bytes()


def _require_file(path: AnyPath) -> None:
    """OSError for what must not even be opened: a pipe waits for a writer, a device may do anything."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"{kind_of_entry(mode)}, no file", os.fspath(path))


def kind_of_entry(mode: int) -> str:
    """What something in a folder is, by its ``st_mode``: "a named pipe", "a folder", ..."""
    return _ENTRIES.get(stat.S_IFMT(mode), "something unknown")


_ENTRIES = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link to nothing",  # one that leads somewhere is what it leads to
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

#: Bytes at the beginning of a file, and at its end, that tell what it is.
HEAD, TAIL = 64, 18


def picture_format(head: bytes, tail: bytes = b"") -> str | None:
    """The format of a picture by the first HEAD bytes of its file, None for what is no picture.

    tail: the last TAIL bytes, which alone tell a TGA. Formats are named whether they can be decoded here or not.
    """
    for name, start in _SIGNATURES:
        if head.startswith(start):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in (12, 16, 40, 52, 56, 64, 108, 124):
        return "BMP"
    if _PNM.match(head):
        return "PNM"
    if head[4:8] == b"ftyp":
        # The brands that the file fits; a HEIC may begin with a general one.
        brands = {head[i : i + 4] for i in (8, *range(16, min(int.from_bytes(head[:4], "big"), len(head)) - 3, 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}:
            return "HEIC"
        if brands & {b"crx "}:
            return "CR3"
    return "TGA" if tail == b"TRUEVISION-XFILE.\0" else None


def can_decode(format: str) -> bool:
    """Whether pictures of a format that :func:`picture_format` names can be read here."""
    if format == "AVIF":
        return bool(features.check("avif"))
    return format not in _PLUGINS or _PLUGINS[format] in Image.OPEN


#: Formats that Pillow reads once a package has registered itself, under this name.
_PLUGINS = {"HEIC": "HEIF", "JPEG XL": "JXL", "CR3": "CR3"}

_SIGNATURES = (
    ("JPEG", b"\xff\xd8\xff"),
    ("PNG", b"\x89PNG\r\n\x1a\n"),
    ("GIF", b"GIF87a"),
    ("GIF", b"GIF89a"),
    ("TIFF", b"II*\0"),
    ("TIFF", b"MM\0*"),
    ("TIFF", b"II+\0"),
    ("TIFF", b"MM\0+"),
    ("JPEG 2000", b"\0\0\0\x0cjP  \r\n\x87\n"),
    ("JPEG 2000", b"\xff\x4f\xff\x51"),
    ("JPEG XL", b"\0\0\0\x0cJXL \r\n\x87\n"),
    ("JPEG XL", b"\xff\x0a"),
)
_PNM = re.compile(rb"P[1-6]\s+(#|\d+\s)")


def _no_picture(content: bytes) -> str:
    """Why a file that no decoder knows is no picture, where its beginning says what it is."""
    format = picture_format(content[:HEAD])
    if format is not None and not can_decode(format):
        return f"a {format} picture, which cannot be decoded here"
    start = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for what, signatures in _OTHERS.items():
        if start.startswith(signatures):
            return what
    return "no picture format that can be read"


#: What stands under pictures' names, by the first bytes in small letters.
_OTHERS = {
    "a Git LFS pointer, not the picture; 'git lfs pull' fetches it": (b"version https://git-lfs",),
    "a git-annex pointer, not the picture; 'git annex get' fetches it": (b"/annex/objects/", b"../.git/annex/"),
    "an HTML page, not a picture": (b"<!doctype html", b"<html", b"<head", b"<body"),
    "an SVG or XML text, not a picture of pixels": (b"<?xml", b"<svg"),
    "a JSON text, not a picture": (b"{", b"["),
    "an AppleDouble file of macOS, not the picture": (b"\x00\x05\x16\x07",),
    "a compressed file, not a picture": (b"\x1f\x8b", b"bzh", b"\xfd7zxz\0", b"\x28\xb5\x2f\xfd", b"pk\x03\x04"),
}


@dataclass(frozen=True)
class EncodedPicture:
    """``data`` uint8 [bytes]: an encoded picture that decodes to uint8 RGB of ``shape`` (height, width)."""

    data: np.ndarray
    shape: Size


def read_picture(path: AnyPath, *, max_pixels: int = MAX_PIXELS) -> EncodedPicture:
    """Read a picture file, or one inside a shard, for the graph.

    EXIF orientation is not applied (PROTOCOLS 2). Alpha and transparent palette entries are laid
    over white, for training and evaluation alike: what is hidden under them is arbitrary. (The released code drops the
    alpha of RGBA files, PROTOCOLS 2 and 6.3; DISC21's JPEG files have none.) Of several pages or frames the first
    counts; 16-bit grey is scaled to 8 bits. Raises :class:`BrokenPicture` if the file is missing, empty, no picture,
    truncated, of more than ``max_pixels`` pixels, or of a pixel type without a defined white (32-bit float).
    """
    try:
        content = read_bytes(path)
    except OSError as error:
        raise BrokenPicture(path, f"cannot be read: {error.strerror or error}") from error
    if not content:
        raise BrokenPicture(path, "the file is empty")
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BrokenPicture(path, f"{width}x{height} pixels, more than the limit of {max_pixels}")
            if image.format == "JPEG" and width * height > _JPEG_PIXELS * len(content):
                raise BrokenPicture(path, f"{width}x{height} pixels, more than {len(content)} bytes can hold")
            if _decodes_as_is(image, content):
                return EncodedPicture(np.frombuffer(content, np.uint8), (height, width))
            return _as_pnm(to_rgb(image))
    except BrokenPicture:
        raise
    except UnidentifiedImageError:
        raise BrokenPicture(path, _no_picture(content)) from None
    except _DAMAGE as error:
        raise BrokenPicture(path, f"cannot be decoded: {error}") from error
    except Image.DecompressionBombError as error:
        raise BrokenPicture(path, f"more pixels than the limit of {max_pixels}: {error}") from error


def _decodes_as_is(image: Image.Image, content: bytes) -> bool:
    """Whether DALI decodes the file to exactly what Pillow would, judged by its structure, not its pixels."""
    if image.mode not in ("RGB", "L"):
        return False
    if image.format == "JPEG":
        return _is_ordinary_jpeg(content)
    return image.format == "PNG" and "transparency" not in image.info and _is_ordinary_png(content)


def _is_ordinary_jpeg(content: bytes) -> bool:
    """Segments without gaps up to the first scan, one frame header that makes sense, and an end; Huffman codes only."""
    if b"\xff\xd9" not in content[-_JPEG_TAIL:]:
        return False
    at = 2
    components: bytes | None = None
    while content[at : at + 1] == b"\xff":
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        body = content[at + 4 : at + 2 + length]
        if length < 2 or len(body) != length - 2:
            return False
        if marker in (0xC0, 0xC1, 0xC2):
            if components is not None or len(body) not in (9, 15) or body[0] != 8 or len(body) != 6 + 3 * body[5]:
                return False
            components = body[6::3]
            factors = [half for byte in body[7::3] for half in (byte >> 4, byte & 15)]
            if not all(1 <= factor <= 4 for factor in factors) or max(body[8::3]) > 3:
                return False
        elif marker == 0xDA:
            scanned = body[1 : 1 + 2 * body[0] : 2] if body else b""
            return components is not None and len(scanned) > 0 and set(scanned) <= set(components)
        elif marker not in (0xC4, 0xDB, 0xDD, 0xFE) and not 0xE0 <= marker <= 0xEF:
            return False
        at += 2 + length
    return False


def _is_ordinary_png(content: bytes) -> bool:
    """A header of 8 bits that makes sense, and chunks without gaps or wrong checksums up to the end."""
    if content[12:16] != b"IHDR" or content[24] != 8 or content[26:28] != bytes(2) or content[28] > 1:
        return False
    view = memoryview(content)
    at, kind, kinds = 8, b"", set()
    while at + 12 <= len(content) and kind != b"IEND":
        length, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        end = at + 8 + length
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            return False
        kinds.add(kind)
        at = end + 4
    return kind == b"IEND" and b"IDAT" in kinds


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture as all models see it: 8-bit RGB, alpha laid over white. ValueError for 32-bit floats."""
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        wide = np.asarray(image).astype(np.int64)
        # 65,535 = 257 * 255; half of 257 rounds to the nearest level.
        return Image.fromarray(((np.clip(wide, 0, 65535) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no defined white; save the picture with 8 or 16 bits")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")
    return image.convert("RGB")


def pnm_bytes(image: Image.Image) -> bytes:
    """An RGB picture as the bytes of a PNM file, which loses nothing."""
    return f"P6\n{image.width} {image.height}\n255\n".encode() + image.tobytes()


def _as_pnm(image: Image.Image) -> EncodedPicture:
    return EncodedPicture(np.frombuffer(pnm_bytes(image), np.uint8), (image.height, image.width))
