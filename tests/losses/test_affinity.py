from __future__ import annotations

import doctest
import importlib
import math

import pytest
import torch

from copynce.losses.affinity import affinity, affinity_entropy


@pytest.mark.parametrize("lead", [(), (3,)], ids=["one", "batch"])
def test_affinity_is_the_softmax_of_cosines(lead: tuple[int, ...]) -> None:
    query = torch.randn(*lead, 5, 7, dtype=torch.float64)
    reference = torch.randn(*lead, 9, 7, dtype=torch.float64)
    found = affinity(query, reference, temperature=0.1)
    assert found.shape == (*lead, 5, 9)
    assert found.dtype == torch.float32
    cosines = torch.nn.functional.cosine_similarity(query[..., :, None, :], reference[..., None, :, :], dim=-1)
    exponentials = (cosines / 0.1).exp()
    expected = exponentials / exponentials.sum(-1, keepdim=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_closed_forms() -> None:
    tokens = 3.0 * torch.eye(4)
    sharp = affinity(tokens, tokens, temperature=1 / 16)
    expected = math.exp(16) / (math.exp(16) + 3)
    torch.testing.assert_close(sharp.diagonal(), torch.full((4,), expected))
    equal = affinity(torch.ones(2, 6), torch.ones(5, 6))
    torch.testing.assert_close(equal, torch.full((2, 5), 0.2))
    torch.testing.assert_close(affinity_entropy(equal), torch.full((2,), math.log(5)))


def test_entropy_of_certainty_is_zero() -> None:
    torch.testing.assert_close(affinity_entropy(torch.eye(3)), torch.zeros(3))


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="agree in pairs and channels, got"):
        affinity(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="as many dimensions each"):
        affinity(torch.zeros(1, 2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        affinity(torch.zeros(2, 3), torch.zeros(2, 3), 0)


def test_examples() -> None:
    assert doctest.testmod(importlib.import_module("copynce.losses.affinity")).failed == 0
