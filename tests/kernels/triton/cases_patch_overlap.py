"""The operator ``patch_overlap`` against its twin: in Triton's interpreter, or compiled on a GPU."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from copynce.kernels.patch_overlap import patch_overlap
from copynce.kernels.patch_overlap_reference import overlap_counts_reference, overlap_prior_reference
from tests.kernels.triton.inputs import DEVICE, Shape, make_tables

PICTURES = [  # query pixels, reference pixels, patch size
    pytest.param((64, 96), (48, 80), 16, id="lq-is-not-lr"),
    pytest.param((28, 70), (42, 28), 14, id="patch-14"),
    pytest.param((40, 40), (60, 20), 20, id="patch-20-int16"),
    pytest.param((3, 5), (2, 2), 1, id="patch-1"),
]


@pytest.mark.parametrize("prior", ["released", "paper"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.0, 150.0, math.inf])
@pytest.mark.parametrize(("shape", "target_shape", "patch_size"), PICTURES)
def test_patch_overlap_equals_the_twin(
    shape: Shape, target_shape: Shape, patch_size: int, gamma: float, prior: str
) -> None:
    table, _ = make_tables(shape, target_shape)
    table[3, 0, 0] = math.prod(target_shape)  # outside of the other picture: no source
    counts, rows = patch_overlap(table, *target_shape, patch_size, gamma, prior == "released")
    table[3, 0, 0] = -1
    expected = overlap_counts_reference(table, patch_size, target_shape)
    patches = expected.shape[2] - 1
    largest = 255 if patch_size <= 16 else patch_size**2
    assert torch.equal(counts[..., :patches].int(), expected[..., :-1].clamp_max(largest))
    assert not counts[..., patches:].any()
    assert counts.stride(1) % 16 == 0
    mass = overlap_prior_reference(expected, gamma, prior, torch.float64).sum(-1)
    torch.testing.assert_close(rows[:, 1].double(), mass, rtol=0, atol=1e-6)
    assert torch.isfinite(rows).all()


def test_patch_overlap_equals_the_released_counts(oracle: Path) -> None:
    with np.load(oracle / "copynce_224.npz") as file:
        for name in ("que_to_ref", "ref_to_que"):
            y, x = torch.from_numpy(file[name].astype(np.int32)).unbind(1)
            table = torch.where(y < 0, -1, y * 224 + x).int().to(DEVICE)
            counts, _ = patch_overlap(table, 224, 224, 16, 3.0, True)
            expected = torch.from_numpy(file[f"counts_{name}"].astype(np.int32))[..., :-1]
            assert torch.equal(counts[..., :196].int().cpu(), expected.clamp_max(255))


def test_operator_is_well_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # opcheck compares real and fake outputs of its own
    table, _ = make_tables((32, 32), (32, 48))
    torch.library.opcheck(patch_overlap, (table, 32, 48, 16, 2.5, True))
