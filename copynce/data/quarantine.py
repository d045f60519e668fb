"""The list of broken pictures: skipped, counted and named, so that none of them ends a run or goes unnoticed."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from pathlib import Path

from copynce.errors import DataError


class Quarantine:
    """Broken pictures with the reason of each; safe to feed from several threads.

    path: JSON-lines file with one {"path", "reason"} per picture. Entries already in it (an earlier part of the same
        run) are loaded, so a picture is listed once however often it is met. Each entry is on disk before `add`
        returns. None keeps the list in memory only.
    Raises DataError if the file holds anything but such lines.

    >>> quarantine = Quarantine()
    >>> quarantine.add("a.jpg", "empty file")
    >>> quarantine.summary()
    '1 broken picture skipped: 1 empty file'
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()
        if self.path is not None and self.path.exists():
            self._load(self.path)

    def _load(self, path: Path) -> None:
        content = path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):  # killed while it wrote the last line; that picture will be met again
            os.truncate(path, complete)
        for number, line in enumerate(content[:complete].splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._reasons[entry["path"]] = entry["reason"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f'{path}, line {number}: expected {{"path": ..., "reason": ...}}, got {line[:80]!r}'
                ) from error

    def add(self, path: str | os.PathLike[str], reason: str) -> None:
        """Lists the picture `path` as broken for `reason` (a short phrase); does nothing if it is listed already."""
        name = os.fspath(path)
        with self._lock:
            if name in self._reasons:
                return
            self._reasons[name] = reason
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:  # one short write in append mode: lines never mix
                    file.write(json.dumps({"path": name, "reason": reason}) + "\n")

    __call__ = add  # a Quarantine is itself the `on_broken` of a loader

    def __len__(self) -> int:
        return len(self._reasons)

    def __contains__(self, path: str | os.PathLike[str]) -> bool:
        return os.fspath(path) in self._reasons

    def entries(self) -> list[tuple[str, str]]:
        """(path, reason) of every listed picture, in the order they were met."""
        with self._lock:
            return list(self._reasons.items())

    def counts(self) -> dict[str, int]:
        """How many pictures are listed for each reason, the most frequent first."""
        return dict(Counter(reason for _, reason in self.entries()).most_common())

    def summary(self) -> str:
        """One sentence for the user."""
        if not self._reasons:
            return "no broken pictures"
        total = len(self._reasons)
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts().items())
        where = "" if self.path is None else f" (listed in {self.path})"
        return f"{total} broken picture{'s' if total > 1 else ''} skipped: {reasons}{where}"
