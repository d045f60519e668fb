"""Columns of a CSV by name: what predictions and ground truths are read from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from copynce.data.manifest import read_rows
from copynce.errors import DataError


def read_columns(path: Path, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """(line number from 1, the fields called `names`, in this order) of every row of the CSV `path`.

    A header is optional. Where there is one, its names choose the columns, in any order and in capitals or not; other
    columns are left out. Without a header every row has the fields `names` and no others.
    Raises DataError naming the line: fields that are too few or too many, a header that lacks a name or has it twice,
    another separator than the comma, another encoding than UTF-8.
    """
    expected = ",".join(names)
    places: Sequence[int] = ()
    width = 0
    for line, row in read_rows(path):
        if "\0" in "".join(row):
            raise DataError(
                f"{path}, line {line}: a NUL character; is the file damaged, or UTF-16? Save it as UTF-8 (in a "
                "spreadsheet: CSV UTF-8, comma separated)"
            )
        if not places:
            header = [field.strip().casefold() for field in row]
            width = len(row)
            if wrong := [name for name in names if header.count(name) != 1]:
                if len(wrong) < len(names) or any(name in header for name in wrong):
                    raise DataError(
                        f"{path}, line {line}: the header must name {expected} once each, got {','.join(row)!r}"
                    )
                places, width = range(len(names)), len(names)
            else:
                places = [header.index(name) for name in names]
                continue
        if len(row) != width:
            text = ",".join(row)
            other = next((f"; fields are separated by commas here, not by {s!r}" for s in ";\t|" if s in text), "")
            raise DataError(f"{path}, line {line}: expected {expected}, got {row}{other}")
        yield line, [row[place] for place in places]
