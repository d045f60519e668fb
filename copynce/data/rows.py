"""CSV files of names: one writer and one reader, so that every name comes back as it was.

Names of files hold commas, quotes, line ends, blanks at their ends, and bytes that are no UTF-8 (surrogateescape).
"""

from __future__ import annotations

import csv
import itertools
import os
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from copynce.errors import DataError
from copynce.files import atomic_text

#: What a field must be quoted for: it would end there, begin a quotation, or lose blanks or a byte order mark.
_QUOTED = re.compile(r'[,"\r\n]|^[\s\ufeff]|\s\Z')

_BLOCK = 4 * 2**20  # bytes of plain rows that are split at once
_ROWS = 50_000  # of a block of others
_ENDS = np.frombuffer(b",,\n", np.uint8)  # of a row's fields, three at most


def write_rows(path: str | os.PathLike[str], rows: Iterable[Iterable[str]]) -> None:
    """Write the CSV `path`, which appears only once it is complete; :func:`read_rows` gives the same rows.

    A row must not be empty: a blank line is none. Raises DataError for a text that UTF-8 with escaped bytes cannot
    give back, such as half of a surrogate pair.
    """
    with atomic_text(path) as file:
        for row in rows:
            line = ",".join(_quoted(field) for field in row) or '""'
            if not line.isascii() and _returned(line) != line:
                raise _unwritable(path, line)
            file.write(line + "\n")


def write_columns(
    path: str | os.PathLike[str], names: Sequence[str], texts: Sequence[Iterable[str]], numbers: Iterable[float] = ()
) -> None:
    """As :func:`write_rows`, of a header and columns: ``texts``, where most fields repeat, and maybe one of numbers."""
    quoted = _Quoted(path)
    columns = [map(quoted.__getitem__, column) for column in texts]
    if len(names) > len(texts):
        columns.append(map(repr, numbers))
    lines = map(",".join, zip(*columns, strict=True))
    with atomic_text(path) as file:
        file.write(",".join(names) + "\n")
        while chunk := "\n".join(itertools.islice(lines, _ROWS)):
            file.write(chunk + "\n")


class _Quoted(dict[str, str]):
    """Fields as they are written to the file ``path``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = path

    def __missing__(self, field: str) -> str:
        written = self[field] = _quoted(field)
        if not written.isascii() and _returned(written) != written:
            raise _unwritable(self.path, written)
        return written


def _quoted(field: str) -> str:
    return '"' + field.replace('"', '""') + '"' if _QUOTED.search(field) else field


def _unwritable(path: str | os.PathLike[str], text: str) -> DataError:
    return DataError(f"{path}: {text!r} cannot be written as UTF-8 or as the bytes of file names")


def _returned(text: str) -> str | None:
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return None


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number from 1, fields) of every row of a CSV that is not blank; DataError where it is no readable CSV.

    Fields are taken as they stand, blanks included. There is one exception, for people write ``uuid, path``: where the
    first line has a blank outside of quotes after a comma, such blanks belong to the commas, in the whole file. In any
    other file they are an error, for nobody can tell whether they belong to a name; in quotes they do. A field of
    blanks alone is empty.
    """
    raw: list[str] = []  # the physical lines of a row
    spaced: bool | None = None

    def lines(file: Iterable[str]) -> Iterator[str]:
        for line in file:
            raw.append(line)
            yield line

    try:
        # utf-8-sig: spreadsheets put a byte order mark before the header; surrogateescape: names need not be UTF-8.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(lines(file), strict=True)
            for row in reader:
                text = "".join(raw) if len(raw) > 1 else raw[0]
                raw.clear()
                if not row:
                    continue
                if ", " in text:
                    without = next(csv.reader([text], skipinitialspace=True, strict=True))
                    blank = without[1:] != row[1:]
                    if spaced is None:
                        spaced = blank
                    if blank and not spaced:
                        _require_names(row, without, path, reader.line_num)
                    row = [row[0], *without[1:]]
                spaced = bool(spaced)
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not a CSV line ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


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


def read_column_blocks(path: Path, names: Sequence[str]) -> Iterator[tuple[Sequence[int], list[list[str]]]]:
    """What :func:`read_columns` gives, by blocks of rows: (line numbers, one list of fields per name).

    Large files of plain rows (no quotes, blanks after commas or blank lines) are split as a whole, ten times faster.
    """
    done = yield from _plain_blocks(path, names)
    if done is None:
        return
    rows = ((line, row) for line, row in read_columns(path, names) if line > done)
    while chunk := list(itertools.islice(rows, _ROWS)):
        yield [line for line, _ in chunk], [list(column) for column in zip(*(row for _, row in chunk), strict=True)]


def _plain_blocks(path: Path, names: Sequence[str]) -> Generator[tuple[range, list[list[str]]], None, int | None]:
    """The blocks of whole plain rows that the file begins with; none if its first line is not plain or not ``names``.

    Returns the number of the last line given, for what follows is left to :func:`read_columns` to read, or to complain
    about; None if nothing follows.
    """
    line = 1
    try:
        with path.open("rb") as file:
            first = file.readline(1 << 16)
            header = first.decode("ascii", "replace").rstrip("\n").split(",")
            if header == list(names):
                line = 2
            elif len(header) != len(names) or {field.strip().casefold() for field in header}.intersection(names):
                return 0
            else:
                file.seek(0)
            while content := file.read(_BLOCK):
                content += file.readline()
                if any(mark in content for mark in (b'"', b"\r", b"\0", b", ", b"\xef\xbb\xbf")):
                    return line - 1
                if not content.endswith(b"\n"):  # the last line of the file
                    content += b"\n"
                bytes_ = np.frombuffer(content, np.uint8)
                ends = bytes_[(bytes_ == ord(",")) | (bytes_ == ord("\n"))]
                if len(ends) % len(names) or np.any(ends.reshape(-1, len(names)) != _ENDS[-len(names) :]):
                    return line - 1
                fields = content[:-1].decode("utf-8", "surrogateescape").replace("\n", ",").split(",")
                count = len(fields) // len(names)
                yield range(line, line + count), [fields[i :: len(names)] for i in range(len(names))]
                line += count
            return None
    except OSError:
        return line - 1  # the other reader says what is wrong


def _require_names(row: list[str], without: list[str], path: Path, line: int) -> None:
    """DataError for a field that is more than the blanks it begins with; ``without`` them the row is another."""
    for field, bare in zip(row[1:], without[1:], strict=False):
        if field != bare and bare:
            raise DataError(
                f"{path}, line {line}: a blank after a comma, before {bare[:80]!r}; remove it, or write the field in "
                'quotes, "...", if the blank belongs to the name'
            )
