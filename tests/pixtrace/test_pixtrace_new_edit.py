"""A new edit is one class: the example of docs/edits.md is traced and drawn without another line anywhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from copynce.pixtrace import EditProgram, HorizontalFlip, Resize, Rotation, trace
from dali_pipelines import render_programs

ROOT = Path(__file__).resolve().parents[2]
SECTION = (ROOT / "docs" / "edits.md").read_text().partition("## To add an edit")[2]


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The page's example as a module, as dataclasses want one."""
    (code,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    module = ModuleType("the_example_of_the_page")
    sys.modules[module.__name__] = module
    exec(compile("from __future__ import annotations\n" + code, "docs/edits.md", "exec"), module.__dict__)
    yield module
    del sys.modules[module.__name__]


def test_the_example_is_traced(example: ModuleType) -> None:
    expected = np.arange(6 * 8).reshape(6, 8)
    expected[1:3] = -1
    for fused in (True, False):
        assert (trace((example.Band(1, 2),), (6, 8), (6, 8), fused=fused).index == expected).all()
    (band,) = example.RelativeBand(0.3, 0.5).absolute(100, 40, (10, 10))
    assert band == example.Band(35, 30)
    chain = (example.RelativeBand(0.2, 0.3), Rotation(30.0), HorizontalFlip(), Resize(40, 50))
    found, twin = (trace(chain, (200, 250), (40, 50), fused=fused) for fused in (True, False))
    assert ((found.index >= 0) == (twin.index >= 0)).mean() > 0.97
    with pytest.raises(ValueError, match="Band must end inside of the 6 rows, got top=5, height=2"):
        trace((example.Band(5, 2),), (6, 8), (6, 8))
    with pytest.raises(ValueError, match=r"Band.grey must be a number in \[0, 1\], got 2"):
        example.Band(0, 1, 2.0)
    with pytest.raises(ValueError, match="mode='released' has no table for Band"):
        trace((example.Band(0, 1),), (6, 8), (6, 8), mode="released")


def test_the_example_is_drawn_where_the_table_says(example: ModuleType, tmp_path: Path) -> None:
    Image.new("RGB", (80, 60), (255, 255, 255)).save(tmp_path / "white.png")
    program = EditProgram((example.Band(20, 10), HorizontalFlip()))
    (pixels,) = render_programs([tmp_path / "white.png"], [program], 60)
    hidden = program.trace((60, 80), (60, 60)).index < 0
    assert hidden.any()
    np.testing.assert_array_equal(pixels.max(axis=2) == 0, hidden)
    np.testing.assert_array_equal(pixels.min(axis=2) == 255, ~hidden)


def test_the_page_names_files_that_exist() -> None:
    """Those of the folder of edits; tests of the docs look at the others."""
    named = set(re.findall(r"`(\w+\.py)`", SECTION))
    assert named == {"base.py", "geometry.py", "layers.py", "dense.py", "colour.py"}
    assert all((ROOT / "copynce" / "pixtrace" / "edits" / name).is_file() for name in named)
