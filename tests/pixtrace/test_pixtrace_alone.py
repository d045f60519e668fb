"""PixTrace is usable where NumPy and Numba are installed, and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import copynce.pixtrace

_USE = """
import sys

ALLOWED = {"copynce", "numpy", "numba", "llvmlite", *sys.stdlib_module_names}

class OnlyThese:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, OnlyThese())
from copynce.pixtrace import bridge, patch_overlap, sample_program

tables = [sample_program("descriptor", seed=0, epoch=e, uuid="a").trace((60, 80), (32, 32)) for e in (1, 2)]
overlap = patch_overlap(bridge(*tables), patch_size=8)
assert overlap.shape == (16, 16) and 0 <= overlap.sum(1).max() <= 1, overlap
other = sample_program("matcher", seed=0, epoch=0, uuid="b").trace((60, 80), (32, 32))
copynce = {name for name in sys.modules if name.startswith("copynce.")}
print(*sorted(name for name in copynce if not name.startswith("copynce.pixtrace")))
"""


def test_programs_are_sampled_traced_and_counted_without_any_other_package() -> None:
    done = subprocess.run([sys.executable, "-c", _USE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["copynce.compiled_cache"]


#: What stands in the package from top to bottom; each imports from those below it, and a folder from itself.
_PARTS = ["sampling", "extras", "policies", "programs", "tables", "view", "edits", "bitmaps", "matrices", "compiled"]


def test_parts_look_downwards_only() -> None:
    root = Path(copynce.pixtrace.__file__).parent
    assert {path.stem for path in root.iterdir() if path.stem[0] != "_"} == set(_PARTS)
    upwards = []
    for path in sorted(root.rglob("*.py")):
        part = path.relative_to(root).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
            for name in names:
                _, found, below = (name or "").partition("copynce.pixtrace.")
                if found and part in _PARTS and _PARTS.index(below.partition(".")[0]) < _PARTS.index(part):
                    upwards.append(f"{path.relative_to(root)}: {name}")
    assert upwards == []
