"""Pictures moved into a folder, by a list that is written before and leads back."""

from __future__ import annotations

import csv
import filecmp
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from copynce.errors import ConfigError, DataError, WriteError
from copynce.files import atomic_text, whole_path

COLUMNS = ["from", "to"]


class Move(NamedTuple):
    """A file and where it is to be, absolute paths."""

    source: str
    target: str


def common_root(sources: Sequence[str], files: Sequence[str]) -> str:
    """The innermost folder that holds all `files` and, of `sources`, those that are folders."""
    folders = [os.path.abspath(source) for source in sources if os.path.isdir(source)]
    inside = tuple(folder.rstrip("/") + "/" for folder in folders)
    return os.path.commonpath([*folders, *{os.path.dirname(file) for file in files if not file.startswith(inside)}])


def require_outside(folder: str | os.PathLike[str], others: Sequence[str]) -> None:
    """ConfigError if `folder` lies in one of the `others`, where what is moved into it would be found again."""
    into = os.path.realpath(folder)
    for other in map(os.path.realpath, others):
        if os.path.commonpath([other, into]) == other:
            raise ConfigError(f"{into} lies in {other}, which the pictures are to leave; choose a folder outside")


def planned(files: Sequence[str], root: str, folder: str | os.PathLike[str]) -> list[Move]:
    """Where each of `files` below `root` goes in `folder`, by its path from there. Raises ConfigError if that is
    taken."""
    into = os.path.abspath(folder)
    moves = [Move(file, os.path.join(into, os.path.relpath(file, root))) for file in files]
    for move in moves:
        if os.path.lexists(move.target):
            raise ConfigError(f"{move.target} is there already and is not overwritten; nothing was moved")
    return moves


def move_files(moves: Sequence[Move], folder: str | os.PathLike[str]) -> Path:
    """Move files, also to another file system; the list of what goes where, which is on the disk before the first is
    moved: `folder`/moved.csv, or moved-2.csv and so on beside earlier ones. Nothing is overwritten.

    Raises WriteError where one cannot be moved, which names it and the list; those before it stay moved.
    """
    os.makedirs(folder, exist_ok=True)
    record, number = Path(folder) / "moved.csv", 1
    while record.exists():
        number += 1
        record = record.with_name(f"moved-{number}.csv")
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerows([COLUMNS, *moves])
    with atomic_text(record) as file:
        file.write(text.getvalue())
    for done, move in enumerate(moves):
        try:
            _move(move)
        except OSError as error:
            raise WriteError(
                f"{move.source} could not be moved to {move.target}: {error.strerror or error}; {done} of {len(moves)} "
                f"are moved, and `copynce scan --undo {record}` brings them back"
            ) from error
    return record


def undo(record: str | os.PathLike[str]) -> tuple[int, list[tuple[str, str]]]:
    """Bring back what a list of `move_files` tells: (how many files were, [(path, why not)] of the others).

    What was not moved, or is back, is passed over, so it may be called again, also where moving was killed. Raises
    DataError for a file that is no such list.
    """
    try:
        with open(record, encoding="utf-8", errors="surrogateescape", newline="") as file:
            header, *rows = csv.reader(file)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{os.fspath(record)}: no list of moved files: {error}") from error
    if header != COLUMNS or any(len(row) != 2 for row in rows):
        raise DataError(f"{os.fspath(record)}: expected a list of moved files, with the columns {','.join(COLUMNS)}")
    back, left = 0, []
    for source, target in reversed(rows):
        there, here = os.path.lexists(target), os.path.lexists(source)
        if there and not here:
            _move(Move(target, source))
            back += 1
        elif there and filecmp.cmp(source, target, shallow=False):  # killed between writing one and removing the other
            os.unlink(target)
            back += 1
        elif there:
            left.append((target, f"another file is at {source} now"))
        elif not here:
            left.append((target, "is not there any more"))
    return back, left


def _move(move: Move) -> None:
    os.makedirs(os.path.dirname(move.target), exist_ok=True)
    try:
        os.link(move.source, move.target, follow_symlinks=False)  # unlike a renaming it never overwrites
    except FileExistsError:
        raise
    except OSError:  # another file system, or one that knows no second name of a file
        if os.path.lexists(move.target):
            raise
        with whole_path(move.target) as temporary:
            shutil.copy2(move.source, temporary)
    os.unlink(move.source)
