"""Ids that do not meet: how those of two files differ, in words."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Number
from pathlib import PurePath
from typing import Any

import numpy as np


def difference(ids: Iterable[Any], known: Iterable[Any]) -> str:
    """In which form the `ids`, none of which is `known`, are known; empty if in none."""
    forms = {_form(other): other for other in known}
    for one in ids:
        if (other := forms.get(_form(one))) is not None:
            return (
                f"{one!r} ({type(one).__name__}) is {other!r} ({type(other).__name__}) there: write ids alike in both"
            )
    kinds = [" and ".join(sorted(kinds_of(side))) for side in (ids, known)]
    return f"ids are of type {kinds[0]} here and {kinds[1]} there" if kinds[0] != kinds[1] else ""


def _form(one: Any) -> str:
    """An id without what its writers add or lose: type, spaces, case, folder, suffix, zeros in front."""
    if isinstance(one, bytes):
        one = one.decode("utf-8", "surrogateescape")
    if isinstance(one, float) and one.is_integer():
        one = int(one)
    text = PurePath(str(one).strip().casefold().replace("\\", "/")).name
    stem = PurePath(text).stem
    return stem.lstrip("0") or stem


def kinds_of(ids: Iterable[Any]) -> set[str]:
    """Types of ids, those that can be equal under one name."""
    return {
        "str" if issubclass(kind, str) else "number" if issubclass(kind, (Number, np.number)) else kind.__name__
        for kind in set(map(type, ids))
    }
