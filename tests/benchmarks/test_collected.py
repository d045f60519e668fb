"""Benchmarks are run by hand; that their modules can be imported is held here."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import benchmarks.guard

FOLDER = Path(benchmarks.guard.__file__).parent


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "conftest"))
def test_what_benchmarks_import_is_there(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")
