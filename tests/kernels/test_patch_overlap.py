"""The twin of the patch overlap and its prior, against loops written from the equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from copynce.kernels.patch_overlap_reference import overlap_counts_reference, overlap_prior_reference


def random_table(batch: int, shape: tuple[int, int], target_shape: tuple[int, int]) -> Tensor:
    """Indices drawn without any order, a third of them -1, the first patch rows of sample 0 all -1."""
    table = torch.randint(0, target_shape[0] * target_shape[1], (batch, *shape), dtype=torch.int32)
    table[torch.rand(table.shape) < 0.33] = -1
    table[0, : shape[0] // 2] = -1
    return table


def loop_counts(table: Tensor, patch_size: int, target_shape: tuple[int, int]) -> Tensor:
    batch, height, width = table.shape
    columns, target_columns = width // patch_size, target_shape[1] // patch_size
    targets = (target_shape[0] // patch_size) * target_columns
    counts = torch.zeros(batch, (height // patch_size) * columns, targets + 1, dtype=torch.int32)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                index = int(table[b, y, x])
                row, column = divmod(index, target_shape[1])
                target = targets if index < 0 else row // patch_size * target_columns + column // patch_size
                counts[b, y // patch_size * columns + x // patch_size, target] += 1
    return counts


@pytest.mark.parametrize(
    ("shape", "target_shape", "patch_size"),
    [((8, 8), (8, 8), 4), ((6, 12), (9, 6), 3), ((4, 4), (12, 8), 4), ((14, 28), (28, 14), 14), ((3, 5), (2, 2), 1)],
)
def test_counts_equal_a_loop(shape: tuple[int, int], target_shape: tuple[int, int], patch_size: int) -> None:
    table = random_table(2, shape, target_shape)
    counts = overlap_counts_reference(table, patch_size, target_shape)
    assert torch.equal(counts, loop_counts(table, patch_size, target_shape))
    assert (counts.sum(-1) == patch_size**2).all()


@pytest.mark.parametrize("prior", ["released", "paper"])
@pytest.mark.parametrize("gamma", [0, 0.5, 1, 3, 150, math.inf])
def test_prior_is_the_equation(prior: str, gamma: float) -> None:
    bins = [[10, 4, 0, 2], [0, 0, 0, 16], [8, 0, 8, 0], [5, 0, 3, 8], [6, 6, 4, 0]]  # last column: not copied
    weights = overlap_prior_reference(torch.tensor([bins], dtype=torch.int32), gamma, prior, torch.float64)[0]
    for row, counts in zip(weights.tolist(), bins, strict=True):
        shares = counts if prior == "released" else counts[:-1]
        if not any(counts[:-1]) and (prior == "paper" or gamma > 0):
            expected = [0.0] * 3
        elif math.isinf(gamma):
            expected = [(share == max(shares)) / shares.count(max(shares)) for share in counts[:-1]]
        else:
            expected = [(share / 16) ** gamma / sum((other / 16) ** gamma for other in shares) for share in counts[:-1]]
        assert row == pytest.approx(expected, rel=1e-12)


def test_large_gamma_goes_to_the_limit() -> None:
    counts = overlap_counts_reference(random_table(2, (16, 16), (8, 8)), 4, (8, 8))
    for prior in ("released", "paper"):
        limit = overlap_prior_reference(counts, math.inf, prior, torch.float64)
        torch.testing.assert_close(overlap_prior_reference(counts, 1e4, prior, torch.float64), limit)


def test_counts_equal_the_released_ones(oracle) -> None:
    import numpy as np

    with np.load(oracle / "copynce_224.npz") as file:
        for name in ("que_to_ref", "ref_to_que"):
            y, x = torch.from_numpy(file[name].astype(np.int32)).unbind(1)
            table = torch.where(y < 0, -1, y * 224 + x).int()
            counts = overlap_counts_reference(table, 16, (224, 224))
            assert torch.equal(counts, torch.from_numpy(file[f"counts_{name}"].astype(np.int32)))
        prior = overlap_prior_reference(
            torch.from_numpy(file["counts_que_to_ref"].astype(np.int32)), 3, "released", torch.float32
        )
        torch.testing.assert_close(prior, torch.from_numpy(file["gamma3/prior_full_que_to_ref"][..., :-1]))
