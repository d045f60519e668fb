"""Pictures of a page: each embedded once and small, or linked to where it lies; one that cannot be read is said so."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from html import escape
from itertools import islice
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from PIL import ExifTags, Image

from copynce.data.shards import read_shard
from copynce.errors import DataError
from copynce.inspect.report import data_url
from dali_pipelines.sources import MAX_PIXELS, AnyPath, BrokenPicture, ShardMember, read_picture, to_rgb

_SIDE, _LEAST_SIDE = 480, 240  # pixels a side of an embedded picture
_FULL = (
    1_000  # pictures that are embedded at full size; above, they shrink so that the page does not grow, to the least
)
_QUALITY = 80
_AHEAD = 64  # pictures that are prepared before they are asked for

#: Formats that every browser shows, and shows as we read them.
_BROWSERS = frozenset({"JPEG", "PNG", "GIF", "WEBP", "BMP"})


class PagePictures:
    """The pictures that a page shows, in the order in which it shows them first.

    names: paths of files, or SHARD.tar/NAME. link_from: the folder of the page, from where pictures are linked; None:
    all are embedded. What a browser would not show as it is stored is embedded in any case: a picture within a shard,
    an animation, one that EXIF turns, a format that browsers do not know. threads: that decode.

    Use it as a context; `html` gives a picture's place in the page, `broken` tells what could not be read, and why.
    """

    def __init__(self, names: Iterable[str], *, link_from: Path | None = None, threads: int = 2) -> None:
        distinct = dict.fromkeys(names)
        self.side = embedded_side(len(distinct))
        self.broken: dict[str, str] = {}
        self._link_from = link_from
        self._waiting = iter(distinct)
        self._coming: dict[str, Future[str]] = {}
        self._sources: dict[str, str] = {}  # of the linked ones the URL, of the embedded ones the element that has it
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> PagePictures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def html(self, name: str, alt: str) -> str:
        """An `img`, or words where the picture cannot be shown. alt: what it is called where it is not seen.

        Of an embedded picture only the first `img` has its content; others name it (`data-same`), for a script to copy.
        """
        described = f"alt='{escape(alt)}' loading='lazy' decoding='async'"
        if name not in self._sources and name not in self.broken:
            try:
                source = self._next(name)
            except BrokenPicture as error:
                self.broken[name] = error.reason
            else:
                if not source.startswith("data:"):
                    self._sources[name] = f"src='{escape(source)}'"
                else:
                    number = len(self._sources)
                    self._sources[name] = f"data-same='i{number}'"
                    return f"<img id='i{number}' {described} src='{source}'>"
        if name in self.broken:
            return f"<span class='absent'>cannot be shown: {escape(printable(self.broken[name]))}</span>"
        return f"<img {described} {self._sources[name]}>"

    def _next(self, name: str) -> str:
        for other in islice(self._waiting, _AHEAD - len(self._coming)):
            self._coming[other] = self._pool.submit(self._source, other)
        return self._coming.pop(name).result()

    def _source(self, name: str) -> str:
        """A URL of the picture."""
        path = find_picture(name)
        if self._link_from is not None and not isinstance(path, ShardMember) and _shown_as_stored(path):
            return file_url(path, self._link_from)
        return data_url(small_picture(path, self.side), True, _QUALITY)


def embedded_side(count: int) -> int:
    """Pixels a side, at most, of each of so many embedded pictures."""
    return max(_LEAST_SIDE, round(_SIDE * min(1.0, (_FULL / max(count, 1)) ** 0.5)))


def find_picture(name: str) -> AnyPath:
    """The file of that name, or the member of a shard that SHARD.tar/NAME means. Raises BrokenPicture for none."""
    if os.path.exists(name):
        return name
    for parent in Path(name).parents:
        if parent.is_file():
            member = _members(str(parent)).get(os.path.relpath(name, parent))
            if member is not None:
                return member
            break
    raise BrokenPicture(name, "no such file")


@lru_cache(maxsize=4)
def _members(shard: str) -> dict[str, ShardMember]:
    try:
        return read_shard(Path(shard))
    except DataError as error:
        raise BrokenPicture(shard, str(error)) from error


def small_picture(path: AnyPath, side: int) -> Image.Image:
    """The picture, RGB, as a model sees it, at most `side` pixels a side. Raises BrokenPicture."""
    content = read_picture(path).data.tobytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.thumbnail((side, side), Image.Resampling.LANCZOS)  # of a JPEG it decodes no more than it needs
            return to_rgb(image)
    except Exception as error:  # whatever a decoder raises: one damaged file must not end a page
        raise BrokenPicture(path, f"cannot be decoded: {error}") from error


def _shown_as_stored(path: AnyPath) -> bool:
    """Whether a browser shows the file as it is stored.

    `image-orientation: none` does not suffice: browsers ignore it for what comes from another origin, as every file
    does from every other.
    """
    try:
        with Image.open(path) as image:
            return (
                image.format in _BROWSERS
                and image.width * image.height <= MAX_PIXELS
                and not getattr(image, "is_animated", False)
                # PNG's own getexif would decode the picture.
                and Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) == 1
            )
    except Exception:  # it is decoded then, which tells the reason
        return False


def file_url(path: str | os.PathLike[str], folder: Path) -> str:
    """The URL of a file for a page in `folder`, every byte of the name kept.

    Relative, so that a tree that holds both can be moved or served; absolute where they share nothing but the root.

    >>> file_url("/data/pictures/a b?.jpg", Path("/data/found"))
    '../pictures/a%20b%3F.jpg'
    >>> file_url("/mnt/a.jpg", Path("/data/found"))
    'file:///mnt/a.jpg'
    """
    absolute, start = os.path.abspath(path), os.path.abspath(folder)
    if os.path.commonpath([absolute, start]) == "/":
        return "file://" + quote(os.fsencode(absolute))
    return quote(os.fsencode(os.path.relpath(absolute, start)))


def printable(text: str) -> str:
    """The text with what cannot be printed written out: bytes that are no UTF-8, line ends, marks that turn the
    direction of writing.

    >>> printable("a\\udcff\\nb")
    'a\\\\xff\\\\nb'
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _written_out(one) for one in text)


def _written_out(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
