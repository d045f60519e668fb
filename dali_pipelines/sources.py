"""Picture files as bytes that DALI's decoder turns into the right 8-bit RGB picture, or a reason why not.

Most files are handed over as they are. What DALI and the method's reading rule see differently (alpha, CMYK, palettes,
16 bits, rare formats) is decoded by Pillow here and handed over as a lossless PNM file; a broken file is refused.
"""

from __future__ import annotations

import errno
import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

Size = tuple[int, int]

#: Decoded pixels above which a file is refused: 100 megapixels are 300 MB of RGB.
MAX_PIXELS = 100_000_000

#: Bytes at a JPEG's end in which its end marker must stand; some cameras and servers append padding.
_JPEG_TAIL = 4096


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
    struct.error,
)


class BrokenPicture(ValueError):
    """A file that cannot be used as a picture; ``path`` and ``reason`` say which and why."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{os.fspath(path)}: {reason}")
        self.path = path
        self.reason = reason


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


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file or of a :class:`ShardMember`; raises OSError."""
    return path.read_bytes() if isinstance(path, ShardMember) else Path(path).read_bytes()


@dataclass(frozen=True)
class EncodedPicture:
    """``data`` uint8 [bytes]: an encoded picture that decodes to uint8 RGB of ``shape`` (height, width)."""

    data: np.ndarray
    shape: Size


def read_picture(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> EncodedPicture:
    """Read a picture file, or one inside a shard, for the graph.

    EXIF orientation is not applied. Alpha and transparent palette entries are laid over white, 16-bit grey is scaled
    to 8 bits. Raises :class:`BrokenPicture` if the file is missing, empty, no picture, truncated, of more than
    ``max_pixels`` pixels, or of a pixel type without a defined white (32-bit float).
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
    """Whether DALI decodes the file to exactly what Pillow would, judged by its header and its end."""
    if image.format == "JPEG":
        return image.mode in ("RGB", "L") and b"\xff\xd9" in content[-_JPEG_TAIL:]
    if image.format == "PNG":
        return image.mode in ("RGB", "L") and "transparency" not in image.info and b"IEND" in content[-16:]
    return False


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
