"""PixTrace is usable where NumPy and Numba are installed, and nothing else."""

from __future__ import annotations

import subprocess
import sys

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
