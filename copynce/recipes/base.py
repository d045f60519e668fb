"""What a recipe is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: {dotted setting: value}
Run = dict[str, Any]
#: Takes a run, and returns it with what differs; its docstring is what users read.
Recipe = Callable[[Run], Run]
