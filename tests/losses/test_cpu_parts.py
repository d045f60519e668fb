"""The CPU path's compiled parts: products in tiles and the bins of table entries, against NumPy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import copynce
from copynce.losses.cpu.prior import bins_of_line, grid_of
from copynce.losses.cpu.tiles import ROWS, WIDTH, multiply_rows, pack_columns, pack_rows, panels_for

pytestmark = pytest.mark.numeric


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def addresses(matrix: np.ndarray, rows: list[int]) -> np.ndarray:
    return np.array([matrix[row].ctypes.data for row in rows], np.intp)


@pytest.mark.parametrize("columns", [1, 7, 16, 33, 384])
@pytest.mark.parametrize("depth", [1, 5, 8, 21, 196])
def test_products_in_tiles(rng: np.random.Generator, depth: int, columns: int) -> None:
    rows = rng.standard_normal((ROWS + 3, depth), np.float32)
    picked = rng.integers(0, len(rows), ROWS).tolist()
    matrix = rng.standard_normal((depth, columns), np.float32)
    block = np.full((ROWS, panels_for(columns) * WIDTH), np.nan, np.float32)

    order = rng.permutation(depth).astype(np.int32)
    panels = np.full((panels_for(columns), depth, WIDTH), np.nan, np.float32)
    pack_rows(matrix, order, panels)
    for some in {depth, depth // 2, 0}:  # a sum over the first of them only
        multiply_rows(addresses(rows, picked), 1, panels, len(panels), some, block)
        expected = rows[picked, :some].astype(np.float64) @ matrix[order[:some]]
        np.testing.assert_allclose(block[:, :columns], expected, atol=2e-6 * depth**0.5)
        assert not block[:, columns:].any()

    order = rng.permutation(columns).astype(np.int32)
    panels[:] = np.nan
    pack_columns(np.ascontiguousarray(matrix.T), order, panels)
    multiply_rows(addresses(rows, picked), 1, panels, len(panels), depth, block)
    expected = rows[picked].astype(np.float64) @ matrix[:, order]
    np.testing.assert_allclose(block[:, :columns], expected, atol=2e-6 * depth**0.5)

    # Rows that are columns of a matrix, the way backward takes them; and only the first panel is made.
    beside = np.ascontiguousarray(rows[picked].T)
    block[:] = np.nan
    multiply_rows(beside.ctypes.data + 4 * np.arange(ROWS), ROWS, panels, 1, depth, block)
    np.testing.assert_allclose(block[:, : min(columns, WIDTH)], expected[:, :WIDTH], atol=2e-6 * depth**0.5)
    assert np.isnan(block[:, WIDTH:]).all()


@pytest.mark.parametrize(
    ("height", "width", "patch_size"),
    [
        (224, 224, 16),
        (336, 336, 16),
        (98, 126, 14),
        (21, 9, 3),
        (5, 7, 1),
        (2048, 2048, 16),
        (1990, 2107, 43),
        (4096, 8192, 64),
    ],
)
def test_bins_are_exact(rng: np.random.Generator, height: int, width: int, patch_size: int) -> None:
    grid = grid_of((height, width), patch_size)
    pixels = height * width
    assert grid.dtype == (np.float32 if pixels <= 2**22 else np.float64)
    edges = np.arange(0, pixels, patch_size)
    entries = np.concatenate(
        (rng.integers(-1, pixels, 5000), edges[-3000:], edges[-3000:] - 1, [0, -1, pixels - 1])
    ).astype(np.int32)
    bins, centres = np.empty(entries.size, np.int32), np.empty(entries.size, grid.dtype)
    largest = bins_of_line(entries, grid, centres, bins)
    y, x = np.divmod(entries, width)
    expected = np.where(entries < 0, 0, 1 + y // patch_size * (width // patch_size) + x // patch_size)
    np.testing.assert_array_equal(bins, expected)
    assert largest == pixels


@pytest.mark.parametrize("bad", [-2, -(2**31)])
def test_an_entry_below_minus_one_counts_as_huge(bad: int) -> None:
    entries = np.array([3, bad, -1, 0], np.int32)
    grid = grid_of((4, 4), 2)
    assert bins_of_line(entries, grid, np.empty(4, grid.dtype), np.empty(4, np.int32)) > 2**31 - 1


ONE_STEP = """
import hashlib
import torch
from copynce.losses import copynce_loss

generator = torch.Generator().manual_seed(0)
query, reference = (torch.randn(4, 49, 100, generator=generator, requires_grad=True) for _ in range(2))
table = torch.arange(56 * 56, dtype=torch.int32).view(1, 56, 56).repeat(4, 1, 1)
table[:, :19], table[:, :, 30:] = -1, -1
loss = copynce_loss(query, reference, table, table, patch_size=8, gamma=3, backend="cpu")
loss.backward()
arrays = [tensor.numpy().tobytes() for tensor in (loss.detach(), query.grad, reference.grad)]
print(hashlib.sha256(b"".join(arrays)).hexdigest())
"""


def test_same_bits_just_compiled_and_from_the_cache(tmp_path: Path) -> None:
    # A copy of the package, beside which nothing is compiled yet.
    shutil.copytree(
        Path(copynce.__file__).parent, tmp_path / "copynce", ignore=shutil.ignore_patterns("__pycache__", "*.compiled")
    )
    bits = [
        subprocess.run([sys.executable, "-c", ONE_STEP], cwd=tmp_path, check=True, capture_output=True).stdout
        for _ in range(2)
    ]
    assert list((tmp_path / "copynce").rglob("passes.*.compiled"))
    assert bits[0] == bits[1] != b""
