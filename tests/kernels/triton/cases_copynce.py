"""The operator ``copynce_triton`` and its backward against the twin: in Triton's interpreter, or compiled on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from copynce.kernels.copynce.launch_config import keeps_cosines
from copynce.kernels.copynce.op import copynce_triton, copynce_triton_backward
from copynce.kernels.patch_overlap import patch_overlap
from tests.kernels.triton.inputs import (
    DEVICE,
    INTERPRETED,
    Shape,
    error,
    exact,
    gradient_bars,
    make_tables,
    make_tokens,
)


def run(
    tokens: list[Tensor], tables: tuple[Tensor, Tensor], traced: Tensor, stash: bool, **settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of the registered operators, with or without int16 cosines, upstream 2.5."""
    patch_size, gamma, released = settings["patch_size"], float(settings["gamma"]), settings["prior"] == "released"
    shapes = [tuple(table.shape[1:]) for table in tables]
    overlaps = [
        *patch_overlap(tables[0], *shapes[1], patch_size, gamma, released),
        *patch_overlap(tables[1], *shapes[0], patch_size, gamma, released),
    ]
    temperature = settings.get("temperature", 1 / 16)
    loss, *kept = copynce_triton(*tokens, *overlaps, traced, patch_size, temperature, gamma, released, stash)
    upstream = torch.tensor(2.5, device=DEVICE)
    return loss, *copynce_triton_backward(upstream, *tokens, *overlaps, *kept, patch_size, temperature, gamma, released)


CASES = [  # query pixels, reference pixels, patch size, channels, gamma, prior
    pytest.param((64, 64), (64, 64), 16, 64, 3, "released", id="square-gamma-3"),
    pytest.param((64, 64), (64, 64), 16, 64, 3, "paper", id="square-gamma-3-paper"),
    pytest.param((64, 112), (80, 48), 16, 33, 1, "released", id="lq-is-not-lr-odd-channels-gamma-1"),
    pytest.param((32, 48), (160, 112), 16, 80, 2, "paper", id="more-reference-than-query-rows-gamma-2-paper"),
    pytest.param((160, 112), (32, 48), 16, 16, 2, "released", id="two-row-blocks-gamma-2"),
    pytest.param((42, 28), (28, 42), 14, 24, 0.5, "released", id="patch-14-gamma-half"),
    pytest.param((15, 27), (21, 9), 3, 5, math.inf, "paper", id="odd-gamma-infinite-paper"),
    pytest.param((16, 16), (48, 32), 16, 7, 0, "released", id="one-query-patch-gamma-0"),
    pytest.param((40, 40), (40, 60), 20, 8, 7, "paper", id="patch-20-gamma-7-paper"),
]


@pytest.mark.parametrize(("shape", "target_shape", "patch_size", "channels", "gamma", "prior"), CASES)
def test_copynce_equals_the_twin(
    shape: Shape, target_shape: Shape, patch_size: int, channels: int, gamma: float, prior: str
) -> None:
    tables = make_tables(shape, target_shape)
    tokens = make_tokens((tables[0][0].numel() // patch_size**2, tables[1][0].numel() // patch_size**2), channels)
    traced = torch.tensor([True, True, True, False], device=DEVICE)
    settings = {"patch_size": patch_size, "gamma": gamma, "prior": prior}
    expected = exact(tokens, tables, traced, **settings)
    bars = gradient_bars(tokens, tables, traced, expected, **settings)
    for stash, bounds in ((False, bars), (True, [2e-4, 2e-4])):
        loss, *gradients = run(tokens, tables, traced, stash, **settings)
        assert error(loss, expected[0]) <= 1e-6
        for gradient, expected_gradient, bound in zip(gradients, expected[1:], bounds, strict=True):
            assert error(gradient, expected_gradient) <= bound
            assert torch.equal(gradient[3], torch.zeros_like(gradient[3]))


@pytest.mark.parametrize("side", [17, 23], ids=["289-patches", "529-patches"])
def test_wider_blocks(side: int) -> None:
    forward, backward = make_tables((2, 2), (side, side))
    tables = forward[2:3], backward[2:3]
    tokens = [tokens[:1] for tokens in make_tokens((4, side**2), 8)]
    traced = torch.ones(1, dtype=torch.bool, device=DEVICE)
    settings = {"patch_size": 1, "gamma": 1, "prior": "released"}
    expected = exact(tokens, tables, traced, **settings)
    loss, *gradients = run(tokens, tables, traced, False, **settings)
    assert error(loss, expected[0]) <= 1e-6
    # A GPU adds the products of many columns less exactly; its bound is an estimate, not yet run.
    bars = gradient_bars(tokens, tables, traced, expected, **settings) if INTERPRETED else [1e-5, 1e-5]
    for gradient, expected_gradient, bar in zip(gradients, expected[1:], bars, strict=True):
        assert error(gradient, expected_gradient) <= bar


def test_int16_cosines_of_certain_matches() -> None:
    # Softmaxes near 1 leave a small difference for a gradient; the rounded cosines must not decide it.
    tables = make_tables((32, 32), (32, 32))
    reference = torch.randn(4, 64, 24, device=DEVICE)
    query = reference + 0.3 * torch.randn(4, 64, 24, device=DEVICE)
    traced = torch.tensor([True, True, False, False], device=DEVICE)
    settings = {"patch_size": 4, "gamma": 1, "prior": "released"}
    expected = exact([query, reference], tables, traced, **settings)
    loss, *gradients = run([query, reference], tables, traced, True, **settings)
    # A loss near 0; a GPU's exponential and logarithm are approximate.
    assert error(loss, expected[0]) <= (1e-6 if INTERPRETED else 1e-5)
    for gradient, expected_gradient in zip(gradients, expected[1:], strict=True):
        assert error(gradient, expected_gradient) <= 2e-4


def test_a_few_patches_are_computed_again() -> None:
    for patches, kept in ((63, False), (64, True)):
        half = torch.empty(1, patches, 8, dtype=torch.bfloat16)
        assert keeps_cosines(half, torch.empty(1, 200, 8, dtype=torch.bfloat16)) is kept
        assert keeps_cosines(half.float(), half.float()) is False


def test_int16_cosines_at_training_size() -> None:
    tables = make_tables((224, 224), (224, 224))
    tables = tables[0][2:3], tables[1][2:3]
    tokens = [side[:1] for side in make_tokens((196, 196), 384)]
    traced = torch.ones(1, dtype=torch.bool, device=DEVICE)
    settings = {"patch_size": 16, "gamma": 3, "prior": "released"}
    expected = exact(tokens, tables, traced, **settings)
    loss, *gradients = run(tokens, tables, traced, True, **settings)
    assert error(loss, expected[0]) <= 1e-6
    for gradient, expected_gradient in zip(gradients, expected[1:], strict=True):
        assert error(gradient, expected_gradient) <= 2e-4


def test_pairs_that_are_not_traced_are_not_read() -> None:
    tables = make_tables((32, 32), (32, 32))
    tokens = make_tokens((4, 4), 16)
    tokens[0][1], tokens[1][1] = torch.nan, torch.inf
    traced = torch.tensor([True, False, True, False], device=DEVICE)
    settings = {"patch_size": 16, "gamma": 1, "prior": "released"}
    loss, *gradients = run(tokens, tables, traced, False, **settings)
    kept = [side[traced] for side in tokens], tuple(table[traced] for table in tables)
    every = torch.ones(2, dtype=torch.bool, device=DEVICE)
    expected = exact(*kept, every, **settings)
    assert error(loss, expected[0]) <= 1e-6
    bars = gradient_bars(*kept, every, expected, **settings)
    for gradient, expected_gradient, bar in zip(gradients, expected[1:], bars, strict=True):
        assert error(gradient[traced], expected_gradient) <= bar
        assert torch.equal(gradient[~traced], torch.zeros_like(gradient[~traced]))
    loss, *gradients = run(tokens, tables, torch.zeros_like(traced), True, **settings)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients)


def test_operator_is_well_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # opcheck compares real and fake outputs of its own
    table, reverse = make_tables((32, 32), (32, 48))
    overlaps = [*patch_overlap(table, 32, 48, 16, 3.0, True), *patch_overlap(reverse, 32, 32, 16, 3.0, True)]
    query, reference = (side.requires_grad_() for side in make_tokens((4, 6), 16))
    traced = torch.tensor([True, True, True, False], device=DEVICE)
    arguments = (query, reference, *overlaps, traced, 16, 1 / 16, 3.0, True, False)
    # What the forward keeps for backward is unwritten for inactive pairs, so their values are not compared.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(copynce_triton, arguments, test_utils=utilities)
