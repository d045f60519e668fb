"""What an index notes of a file beside its descriptor, taken from the one reading that the loader does anyway."""

from __future__ import annotations

import hashlib
import io
import os
from datetime import datetime
from typing import NamedTuple

from PIL import Image

from copynce.index.listing import File
from dali_pipelines.sources import Content, read_bytes

_EXIF, _TAKEN, _CHANGED = 0x8769, 36867, 306  # the Exif folder, DateTimeOriginal in it, DateTime beside it
_MAKE, _MODEL = 271, 272


class Facts(NamedTuple):
    """sha256: of the content, hexadecimal. width, height: pixels as stored, no EXIF rotation. taken: when, by EXIF."""

    sha256: str
    width: int
    height: int
    taken: datetime | None


class Exif(NamedTuple):
    """taken: when the camera took it. changed: when a program wrote it last. camera: maker and model.

    Times are those of the clocks there, which know no time zone."""

    taken: datetime | None
    changed: datetime | None
    camera: str | None


class NotedFile(Content):
    """A file whose reading leaves its `facts`."""

    def __init__(self, file: File) -> None:
        self._file = file
        self.facts: Facts | None = None

    def __fspath__(self) -> str:
        return self._file if isinstance(self._file, str) else os.fspath(self._file)

    def read_bytes(self) -> bytes:
        content = read_bytes(self._file)
        self.facts = _facts(content)
        return content


def content_hash(file: File) -> str | None:
    """The SHA-256 of a file's content, hexadecimal; None if it cannot be read."""
    try:
        return hashlib.sha256(read_bytes(file)).hexdigest()
    except OSError:
        return None


def _facts(content: bytes) -> Facts:
    digest = hashlib.sha256(content).hexdigest()
    try:
        with Image.open(io.BytesIO(content)) as image:
            exif = read_exif(image)
            return Facts(digest, *image.size, exif.taken or exif.changed)
    except Exception:  # a broken picture: the loader finds out and says why
        return Facts(digest, 0, 0, None)


def read_exif(image: Image.Image) -> Exif:
    """What a picture's EXIF data say; nothing where they are damaged."""
    if image.format == "PNG" and "exif" not in image.info:
        return Exif(None, None, None)  # Pillow would decode all pixels to look for it behind them
    try:
        exif = image.getexif()
        camera = " ".join(text.strip("\0 ") for tag in (_MAKE, _MODEL) if isinstance(text := exif.get(tag), str))
        return Exif(_time(exif.get_ifd(_EXIF).get(_TAKEN)), _time(exif.get(_CHANGED)), camera or None)
    except Exception:  # damaged metadata; Pillow raises whatever its parsers do
        return Exif(None, None, None)


def _time(text: object) -> datetime | None:
    try:
        return datetime.strptime(text.strip("\0 ")[:19], "%Y:%m:%d %H:%M:%S") if isinstance(text, str) else None
    except ValueError:
        return None
