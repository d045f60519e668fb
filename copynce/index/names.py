"""Names of files as text that a table can hold, and back.

A name on Linux is bytes, and some are no UTF-8 (in Python they have surrogates), but a column of text is UTF-8. Such
bytes become characters of a private range, and what stands in that range in a name becomes the bytes it consists of: so
every name comes back as it was, and all ordinary names stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

_BASE = 0xEF00  # U+EF80 to U+EFFF stand for the bytes 0x80 to 0xFF
_ESCAPES = "[\uef80-\uefff]"


def stored(names: list[str]) -> pa.Array:
    """The names as a column of text."""
    try:
        column = pa.array(names, pa.string())
    except UnicodeEncodeError:
        return pa.array([_escaped(name) for name in names], pa.string())
    return pa.array([_escaped(name) for name in names], pa.string()) if _any_escape(column) else column


def restored(column: pa.Array | pa.ChunkedArray) -> list[str]:
    """The names of such a column."""
    names: list[str] = column.to_pylist()
    return [_unescaped(name) for name in names] if _any_escape(column) else names


def _any_escape(column: pa.Array | pa.ChunkedArray) -> bool:
    return bool(pc.any(pc.match_substring_regex(column, _ESCAPES)).as_py())


def _escaped(name: str) -> str:
    def one(character: str) -> str:
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF or _BASE + 0x80 <= code <= _BASE + 0xFF:
            return _of_bytes(character.encode("utf-8", "surrogateescape"))
        return character

    return "".join(map(one, name))


def _of_bytes(raw: Iterable[int]) -> str:
    return "".join(chr(_BASE + byte) for byte in raw)


def _unescaped(name: str) -> str:
    raw = b"".join(
        bytes([ord(character) - _BASE]) if _BASE + 0x80 <= ord(character) <= _BASE + 0xFF else character.encode()
        for character in name
    )
    return raw.decode("utf-8", "surrogateescape")
