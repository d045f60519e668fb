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
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

Size = tuple[int, int]
AnyPath = str | os.PathLike[str]

#: Decoded pixels above which a file is refused: 100 megapixels are 300 MB of RGB.
MAX_PIXELS = 100_000_000

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


class Broken:
    """The broken files of one loader: each is reported once, with its reason, and never tried again."""

    def __init__(self, report: Callable[[AnyPath, str], None] | None) -> None:
        self._report = report
        self._lock = threading.Lock()
        self.reasons: dict[str, str] = {}

    def __contains__(self, path: AnyPath) -> bool:
        return os.fspath(path) in self.reasons

    def add(self, error: BrokenPicture) -> None:
        with self._lock:
            new = os.fspath(error.path) not in self.reasons
            self.reasons.setdefault(os.fspath(error.path), error.reason)
        if new and self._report is not None:
            self._report(error.path, error.reason)

    def known(self) -> dict[str, str]:
        """The reasons as they are now, by path."""
        with self._lock:
            return dict(self.reasons)


@dataclass(frozen=True, slots=True)
class ShardMember:
    """A file inside an uncompressed tar, read where it lies; as a path (``os.fspath``) it is SHARD/NAME.

    offset, size: of its content in the tar, in bytes. The tar is opened for each reading, as a file would be: a member
    holds no handle, and many threads and processes can read it.
    """

    shard: str
    name: str
    offset: int
    size: int

    def __fspath__(self) -> str:
        return f"{self.shard}/{self.name}"

    __str__ = __fspath__

    def read_bytes(self) -> bytes:
        """The content; OSError if the tar cannot be read or is too short."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(errno.EIO, f"the shard ends {self.size - len(content)} bytes too early", self.shard)
        return content


def read_bytes(path: AnyPath) -> bytes:
    """The content of a file or of a :class:`ShardMember`; raises OSError."""
    return path.read_bytes() if isinstance(path, ShardMember) else Path(path).read_bytes()


@dataclass(frozen=True)
class EncodedPicture:
    """``data`` uint8 [bytes]: an encoded picture that decodes to uint8 RGB of ``shape`` (height, width)."""

    data: np.ndarray
    shape: Size


def read_picture(path: AnyPath, *, max_pixels: int = MAX_PIXELS, apply_exif: bool = False) -> EncodedPicture:
    """Read a picture file, or one inside a shard, for the graph.

    EXIF orientation is not applied (PROTOCOLS 2) unless ``apply_exif``. Alpha and transparent palette entries are laid
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
            if apply_exif and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                return _as_pnm(_to_rgb(ImageOps.exif_transpose(image)))
            if _decodes_as_is(image, content):
                return EncodedPicture(np.frombuffer(content, np.uint8), (height, width))
            return _as_pnm(_to_rgb(image))
    except BrokenPicture:
        raise
    except UnidentifiedImageError:
        raise BrokenPicture(path, "no picture format that can be read") from None
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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        wide = np.asarray(image).astype(np.int64)
        return Image.fromarray(((np.clip(wide, 0, 65535) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no defined white; save the picture with 8 or 16 bits")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")
    return image.convert("RGB")


def _as_pnm(image: Image.Image) -> EncodedPicture:
    header = f"P6\n{image.width} {image.height}\n255\n".encode()
    return EncodedPicture(np.frombuffer(header + image.tobytes(), np.uint8), (image.height, image.width))
