"""Reading for a loader: files side by side, broken ones once only, and the other pictures that layers show."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from copynce.pixtrace import ComposedView, Layer
from dali_pipelines.options import LoaderOptions
from dali_pipelines.sources import AnyPath, BrokenPicture, EncodedPicture, read_picture


class Quarantine:
    """The broken files of one loader: each is reported once, with its reason, and never tried again.

    It lives as long as the loader; :class:`copynce.data.Quarantine` keeps those of a whole run, by way of ``report``.
    """

    def __init__(self, report: Callable[[AnyPath, str], None] | None) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._reasons: dict[str, str] = {}

    def __contains__(self, path: AnyPath) -> bool:
        return os.fspath(path) in self._reasons

    def reason(self, path: AnyPath) -> str:
        """Why a file is in it; KeyError if it is not."""
        return self._reasons[os.fspath(path)]

    def add(self, path: AnyPath, reason: str) -> None:
        """Leave a file out from now on; the first reason stays."""
        with self._lock:
            new = os.fspath(path) not in self._reasons
            self._reasons.setdefault(os.fspath(path), reason)
        if new and self._report is not None:
            self._report(path, reason)

    def learn(self, reasons: dict[str, str]) -> None:
        """Leave out what others found broken, and reported."""
        with self._lock:
            for path, reason in reasons.items():
                self._reasons.setdefault(path, reason)

    def reasons(self) -> dict[str, str]:
        """The reasons as they are now, by path."""
        with self._lock:
            return dict(self._reasons)


class Reader:
    """Reads files for a loader; leaves out broken ones, chooses the other pictures of layers."""

    def __init__(self, pictures: Sequence[AnyPath], quarantine: Quarantine, options: LoaderOptions) -> None:
        self._pictures = pictures
        self._quarantine = quarantine
        self._max_pixels = options.max_pixels
        self._pool = ThreadPoolExecutor(options.threads, thread_name_prefix="dali_pipelines reader")

    def read(self, path: AnyPath) -> EncodedPicture:
        """Raises :class:`BrokenPicture`, also for a file that failed before."""
        if path in self._quarantine:
            raise BrokenPicture(path, self._quarantine.reason(path))
        try:
            return read_picture(path, max_pixels=self._max_pixels)
        except BrokenPicture as error:
            self._quarantine.add(path, error.reason)
            raise

    def try_all(self, paths: Iterable[AnyPath]) -> list[EncodedPicture | BrokenPicture]:
        """Read files side by side; the order of the result is that of ``paths``."""
        return list(self._pool.map(self._try, paths))

    def layers(self, composed: ComposedView) -> list[tuple[AnyPath, EncodedPicture]]:
        """The other pictures of a view; a broken one is replaced by the next of the list."""
        return [self._layer(layer) for layer in composed.pictures() if layer.color is None]

    def _try(self, path: AnyPath) -> EncodedPicture | BrokenPicture:
        try:
            return self.read(path)
        except BrokenPicture as error:
            return error

    def _layer(self, layer: Layer) -> tuple[AnyPath, EncodedPicture]:
        count = len(self._pictures)
        if count == 0:
            raise ValueError("the program shows another picture, but pictures is empty")
        # By its share of the list, as the program says, so that one program fits lists of any length; what stands in
        # for a broken one depends on the list alone, not on who found out first.
        first = int(layer.picture_choice * count)
        for step in range(count):
            path = self._pictures[(first + step) % count]
            found = self._try(path)
            if isinstance(found, EncodedPicture):
                return path, found
        raise ValueError(f"none of the {count} pictures can be read; the last one: {found}")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
