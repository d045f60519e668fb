"""Triton kernels against their twins: on the CPU in Triton's interpreter, on a CUDA device as compiled.

``test_triton_kernels.py`` runs this file in a process of its own, since ``TRITON_INTERPRET=1`` must be set before the
kernels are imported. Fresh buffers hold NaN (or 99s), so that an element that no program writes fails.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from copynce.kernels.coordinate_table import coordinate_table
from copynce.kernels.coordinate_table_reference import coordinate_table_reference, fixed_point_matrix
from copynce.kernels.copynce import copynce_triton, copynce_triton_backward, keeps_cosines
from copynce.kernels.copynce_reference import copynce_reference
from copynce.kernels.patch_overlap import patch_overlap, patch_overlap_of_matrix
from copynce.kernels.patch_overlap_reference import overlap_counts_reference, overlap_prior_reference
from copynce.losses import copynce_loss

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
Shape = tuple[int, int]

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="neither TRITON_INTERPRET=1 nor a CUDA device"
)


@pytest.fixture(autouse=True)
def _nan_in_fresh_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    new_empty = Tensor.new_empty

    def filled(self: Tensor, *arguments: object, **settings: object) -> Tensor:
        buffer = new_empty(self, *arguments, **settings)
        return buffer.fill_(math.nan if buffer.is_floating_point() else 99)

    monkeypatch.setattr(Tensor, "new_empty", filled)
    return


def zoomed(shape: Shape, target_shape: Shape, zoom: float) -> Tensor:
    """Table of a picture that shows the target from the top left on, ``zoom`` times the size that would fill it."""
    y = (torch.arange(shape[0]) * target_shape[0] / shape[0] / zoom).long()
    x = (torch.arange(shape[1]) * target_shape[1] / shape[1] / zoom).long()
    inside = (y < target_shape[0])[:, None] & (x < target_shape[1])
    return torch.where(inside, y[:, None] * target_shape[1] + x, -1).int()


def reversal(table: Tensor, target_shape: Shape) -> Tensor:
    """Reverse of one table by a loop: the last pixel in raster order wins."""
    reverse = torch.full((math.prod(target_shape),), -1, dtype=torch.int32)
    for pixel, index in enumerate(table.flatten().tolist()):
        if index >= 0:
            reverse[index] = pixel
    return reverse.view(target_shape)


def make_tables(shape: Shape, target_shape: Shape) -> tuple[Tensor, Tensor]:
    """Both directions of four pairs: the same picture (full), a 12 times smaller one, noise, no copy (empty)."""
    forward = [zoomed(shape, target_shape, zoom) for zoom in (1.0, 1 / 12)]
    forward += [torch.randint(-1, math.prod(target_shape), shape, dtype=torch.int32)]
    forward += [torch.full(shape, -1, dtype=torch.int32)]
    backward = [reversal(table, target_shape) for table in forward]
    return torch.stack(forward).to(DEVICE), torch.stack(backward).to(DEVICE)


def make_tokens(patches: tuple[int, int], channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Four pairs of any length: a common offset in one channel of all, one reference token 100 times the others."""
    tokens = [torch.randn(4, count, channels) * 3 for count in patches]
    for side in tokens:
        side[:, :, 0] += 10
    tokens[1][:, -1] *= 100
    return [side.to(DEVICE, dtype) for side in tokens]


def error(value: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(value).all()
    return float((value.double() - expected).norm() / expected.norm().clamp_min(1e-30))


# ---- coordinate table -----------------------------------------------------------------------------------------------

MATRICES = {
    "identity": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "half-a-pixel": [[1, 0, 0.5], [0, 1, -0.5], [0, 0, 1]],
    "quarter-turn": [[0, -1, 64], [1, 0, 0], [0, 0, 1]],
    "rotated-and-magnified": [[0.5, -0.3, 40], [0.3, 0.5, -3], [0, 0, 1]],
    "twelfth-with-perspective": [[12, -1, -64], [1, 12, 0], [0, 0.003, 1]],
    "horizon-inside": [[1, 0, 0], [0, 1, 0], [0.03, -0.02, 0.4]],
}


@pytest.mark.parametrize("source", [(48, 80), (63, 65)])
def test_coordinate_table_is_the_twins_bit_for_bit(source: Shape) -> None:
    matrix = torch.tensor(list(MATRICES.values()), dtype=torch.float64, device=DEVICE)
    table = coordinate_table(matrix, 63, 96, *source)
    assert torch.equal(table, coordinate_table_reference(matrix, (63, 96), source))
    assert ((table >= 0).sum((1, 2)) > 0).all()
    # The integers themselves, in Python, at pixels spread over the picture.
    for fixed, sample in zip(fixed_point_matrix(matrix).tolist(), table.tolist(), strict=True):
        for y, x in ((0, 0), (0, 95), (62, 0), (31, 47), (40, 90), (5, 64), (47, 3)):
            u, v, w = (row[0] * (2 * x + 1) + row[1] * (2 * y + 1) + 2 * row[2] for row in fixed)
            column, line = (u // w, v // w) if w > 0 else (-1, -1)
            inside = 0 <= column < source[1] and 0 <= line < source[0]
            assert sample[y][x] == (line * source[1] + column if inside else -1)


# ---- patch overlap --------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(("query", "reference"), [((64, 96), (48, 80)), ((32, 32), (64, 48))])
def test_patch_overlap_of_matrix_is_table_reversal_and_counts(
    monkeypatch: pytest.MonkeyPatch, query: Shape, reference: Shape
) -> None:
    matrix = torch.tensor(list(MATRICES.values()), dtype=torch.float64, device=DEVICE)
    # Room for two tables at a time: each slice finds the scratch as the one before left it.
    monkeypatch.setattr("copynce.kernels.patch_overlap._SCRATCH_BYTES", 2 * 4 * math.prod(reference))
    query_counts, query_rows, reference_counts, reference_rows = patch_overlap_of_matrix(
        matrix, *query, *reference, 16, 3.0, True
    )
    table = coordinate_table_reference(matrix, query, reference)
    reverse = torch.stack([reversal(one.cpu(), reference) for one in table]).to(DEVICE)
    for entries, target, counts, rows in (
        (table, reference, query_counts, query_rows),
        (reverse, query, reference_counts, reference_rows),
    ):
        expected, expected_rows = patch_overlap(entries, *target, 16, 3.0, True)
        assert torch.equal(counts, expected)
        assert torch.equal(rows, expected_rows)


def test_patch_overlap_equals_the_released_counts(oracle: Path) -> None:
    with np.load(oracle / "copynce_224.npz") as file:
        for name in ("que_to_ref", "ref_to_que"):
            y, x = torch.from_numpy(file[name].astype(np.int32)).unbind(1)
            table = torch.where(y < 0, -1, y * 224 + x).int().to(DEVICE)
            counts, _ = patch_overlap(table, 224, 224, 16, 3.0, True)
            expected = torch.from_numpy(file[f"counts_{name}"].astype(np.int32))[..., :-1]
            assert torch.equal(counts[..., :196].int().cpu(), expected.clamp_max(255))


# ---- CopyNCE --------------------------------------------------------------------------------------------------------


def run(
    tokens: list[Tensor], tables: tuple[Tensor, Tensor], active: Tensor, stash: bool, **settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of the registered operators, with or without int16 cosines, upstream 2.5."""
    patch_size, gamma, released = settings["patch_size"], float(settings["gamma"]), settings["prior"] == "released"
    shapes = [tuple(table.shape[1:]) for table in tables]
    overlaps = [
        *patch_overlap(tables[0], *shapes[1], patch_size, gamma, released),
        *patch_overlap(tables[1], *shapes[0], patch_size, gamma, released),
    ]
    temperature = settings.get("temperature", 1 / 16)
    loss, *kept = copynce_triton(*tokens, *overlaps, active, patch_size, temperature, gamma, released, stash)
    upstream = torch.tensor(2.5, device=DEVICE)
    return loss, *copynce_triton_backward(upstream, *tokens, *overlaps, *kept, patch_size, temperature, gamma, released)


def exact(
    tokens: list[Tensor],
    tables: tuple[Tensor, Tensor],
    active: Tensor,
    dtype: torch.dtype = torch.float64,
    **settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the twin in float64, or in another dtype."""
    query, reference = (side.to(dtype, copy=True).requires_grad_() for side in tokens)
    loss = copynce_reference(query, reference, *tables, active, **{"temperature": 1 / 16, **settings})
    (2.5 * loss).backward()
    assert query.grad is not None
    assert reference.grad is not None
    return loss.detach(), query.grad, reference.grad


def gradient_bars(
    tokens: list[Tensor], tables: tuple[Tensor, Tensor], active: Tensor, expected: tuple[Tensor, ...], **settings
) -> list[float]:
    """Twice the errors of plain float32, and what the kernels round besides: a logit and its line's logarithm, both up
    to 1/temperature, where plain float32 subtracts the largest logit first. How numbers are added up differs between
    processors, and so does each of these errors.
    """
    plain = exact(tokens, tables, active, torch.float32, **settings)
    rounding = 2 * 2.0**-24 / settings.get("temperature", 1 / 16)
    return [2 * error(one, other) + rounding for one, other in zip(plain[1:], expected[1:], strict=True)]


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
    active = torch.tensor([True, True, True, False], device=DEVICE)
    settings = {"patch_size": patch_size, "gamma": gamma, "prior": prior}
    expected = exact(tokens, tables, active, **settings)
    bars = gradient_bars(tokens, tables, active, expected, **settings)
    for stash, bounds in ((False, bars), (True, [2e-4, 2e-4])):
        loss, *gradients = run(tokens, tables, active, stash, **settings)
        assert error(loss, expected[0]) <= 1e-6
        for gradient, expected_gradient, bound in zip(gradients, expected[1:], bounds, strict=True):
            assert error(gradient, expected_gradient) <= bound
            assert torch.equal(gradient[3], torch.zeros_like(gradient[3]))


@pytest.mark.parametrize("side", [17, 23], ids=["289-patches", "529-patches"])
def test_wider_blocks(side: int) -> None:
    forward, backward = make_tables((2, 2), (side, side))
    tables = forward[2:3], backward[2:3]
    tokens = [tokens[:1] for tokens in make_tokens((4, side**2), 8)]
    active = torch.ones(1, dtype=torch.bool, device=DEVICE)
    settings = {"patch_size": 1, "gamma": 1, "prior": "released"}
    expected = exact(tokens, tables, active, **settings)
    loss, *gradients = run(tokens, tables, active, False, **settings)
    assert error(loss, expected[0]) <= 1e-6
    # A GPU adds the products of many columns less exactly; its bound is an estimate, not yet run.
    bars = gradient_bars(tokens, tables, active, expected, **settings) if INTERPRETED else [1e-5, 1e-5]
    for gradient, expected_gradient, bar in zip(gradients, expected[1:], bars, strict=True):
        assert error(gradient, expected_gradient) <= bar


def test_int16_cosines_of_certain_matches() -> None:
    # Softmaxes near 1 leave a small difference for a gradient; the rounded cosines must not decide it.
    tables = make_tables((32, 32), (32, 32))
    reference = torch.randn(4, 64, 24, device=DEVICE)
    query = reference + 0.3 * torch.randn(4, 64, 24, device=DEVICE)
    active = torch.tensor([True, True, False, False], device=DEVICE)
    settings = {"patch_size": 4, "gamma": 1, "prior": "released"}
    expected = exact([query, reference], tables, active, **settings)
    loss, *gradients = run([query, reference], tables, active, True, **settings)
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
    active = torch.ones(1, dtype=torch.bool, device=DEVICE)
    settings = {"patch_size": 16, "gamma": 3, "prior": "released"}
    expected = exact(tokens, tables, active, **settings)
    loss, *gradients = run(tokens, tables, active, True, **settings)
    assert error(loss, expected[0]) <= 1e-6
    for gradient, expected_gradient in zip(gradients, expected[1:], strict=True):
        assert error(gradient, expected_gradient) <= 2e-4


def test_equals_the_released_loss(oracle: Path) -> None:
    gamma = 3
    expected = json.loads((oracle / "copynce.json").read_text())["224"]["results"][f"gamma{gamma}"]
    with np.load(oracle / "copynce_224.npz") as file:
        arrays = {name: torch.from_numpy(file[name]).to(DEVICE) for name in file}
    tables = []
    for name in ("que_to_ref", "ref_to_que"):
        y, x = arrays[name].int().unbind(1)
        tables.append(torch.where(y < 0, -1, y * 224 + x).int())
    query, reference = (arrays[f"{name}_tokens"].float().requires_grad_() for name in ("que", "ref"))
    loss = copynce_loss(query, reference, *tables, gamma=gamma, active=arrays["copynce_flag"].bool(), backend="triton")
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    for side, name in ((query, "que"), (reference, "ref")):
        assert error(side.grad, arrays[f"gamma{gamma}/grad_{name}"].double()) < 2e-6


@pytest.mark.parametrize("shape", [(64, 64), (160, 112)], ids=["16-patches", "70-patches-in-chunks"])
def test_half_precision_tokens(shape: Shape) -> None:
    # One rounding of the gradient, half of float16's last place, with that of G and of the int16 cosines.
    tables = make_tables(shape, shape)
    patches = math.prod(shape) // 16**2
    tokens = [side.requires_grad_() for side in make_tokens((patches, patches), 32, torch.float16)]
    active = torch.ones(4, dtype=torch.bool, device=DEVICE)
    loss = copynce_loss(*tokens, *tables, gamma=3, backend="triton")
    (2.5 * loss).backward()
    expected = exact([side.detach() for side in tokens], tables, active, patch_size=16, gamma=3, prior="released")
    assert loss.dtype == torch.float32
    assert error(loss.detach(), expected[0]) <= 1e-6
    for side, expected_gradient in zip(tokens, expected[1:], strict=True):
        assert side.grad is not None
        assert side.grad.dtype == torch.float16
        assert error(side.grad, expected_gradient) <= 5e-4


def test_inactive_pairs_are_not_read() -> None:
    tables = make_tables((32, 32), (32, 32))
    tokens = make_tokens((4, 4), 16)
    tokens[0][1], tokens[1][1] = torch.nan, torch.inf
    active = torch.tensor([True, False, True, False], device=DEVICE)
    settings = {"patch_size": 16, "gamma": 1, "prior": "released"}
    loss, *gradients = run(tokens, tables, active, False, **settings)
    kept = [side[active] for side in tokens], tuple(table[active] for table in tables)
    every = torch.ones(2, dtype=torch.bool, device=DEVICE)
    expected = exact(*kept, every, **settings)
    assert error(loss, expected[0]) <= 1e-6
    bars = gradient_bars(*kept, every, expected, **settings)
    for gradient, expected_gradient, bar in zip(gradients, expected[1:], bars, strict=True):
        assert error(gradient[active], expected_gradient) <= bar
        assert torch.equal(gradient[~active], torch.zeros_like(gradient[~active]))
    loss, *gradients = run(tokens, tables, torch.zeros_like(active), True, **settings)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients)


def test_repeats_bit_for_bit_and_serves_twice() -> None:
    query_to_reference, reference_to_query = make_tables((48, 48), (48, 48))
    query, reference = (side.requires_grad_() for side in make_tokens((9, 9), 16))
    tables = query_to_reference, reference_to_query
    loss = copynce_loss(query, reference, *tables, backend="triton")
    loss = loss + copynce_loss(query, reference, *tables, backend="triton", gamma=3)
    once = torch.autograd.grad(loss, (query, reference), retain_graph=True)
    again = torch.autograd.grad(loss, (query, reference))
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


def test_class_token_sliced_off_and_other_strides() -> None:
    tables = make_tables((32, 32), (32, 32))
    query, reference = make_tokens((4, 4), 16)
    plain = copynce_loss(query, reference, *tables, backend="triton")
    with_class_token = torch.cat((torch.full((4, 1, 16), torch.nan, device=DEVICE), query), 1)
    strided = with_class_token[:, 1:], reference.mT.contiguous().mT, tables[0].mT.contiguous().mT, tables[1]
    assert torch.equal(plain, copynce_loss(*strided, backend="triton"))


def test_empty_batch_is_zero() -> None:
    tokens, tables = make_tokens((4, 4), 16), make_tables((32, 32), (32, 32))
    query, reference = (side[:0].requires_grad_() for side in tokens)
    loss = copynce_loss(query, reference, *(table[:0] for table in tables), backend="triton")
    loss.backward()
    assert loss.item() == 0


def test_no_copy_is_exactly_zero() -> None:
    tables = [table[3:] for table in make_tables((32, 32), (32, 32))]
    for prior in ("released", "paper"):
        query, reference = (side[3:].requires_grad_() for side in make_tokens((4, 4), 16))
        loss = copynce_loss(query, reference, *tables, gamma=3, prior=prior, backend="triton")
        loss.backward()
        assert loss.item() == 0
        assert not query.grad.any()
        assert not reference.grad.any()


@pytest.mark.parametrize("target", ["feature", "location", "both"])
def test_rival_targets_are_tables_too(target: str) -> None:
    tables = make_tables((32, 48), (48, 32))
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        tokens = [side.requires_grad_() for side in make_tokens((6, 6), 16)]
        loss = copynce_loss(*tokens, *tables, target=target, neighbours=2, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, tokens)))
    assert error(results[0][0], results[1][0].double()) <= 1e-6
    for gradient, expected in zip(results[0][1:], results[1][1:], strict=True):
        assert error(gradient, expected.double()) <= 4e-6  # both sides in float32


def test_temperature_that_the_exponential_cannot_hold() -> None:
    tokens, tables = make_tokens((4, 4), 16), make_tables((32, 32), (32, 32))
    for temperature in (0.025, 1.0):
        values = [
            float(copynce_loss(*tokens, *tables, temperature=temperature, backend=backend))
            for backend in ("triton", "reference")
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    with pytest.raises(ValueError, match=r"temperature >= 0\.025, got torch\.float32, 4 patches.*temperature 0\.02"):
        copynce_loss(*tokens, *tables, temperature=0.02, backend="triton")


# ---- torch.library --------------------------------------------------------------------------------------------------


def test_operators_are_well_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # opcheck compares real and fake outputs of its own
    table, reverse = make_tables((32, 32), (32, 48))
    torch.library.opcheck(patch_overlap, (table, 32, 48, 16, 2.5, True))
    torch.library.opcheck(coordinate_table, (torch.eye(3, device=DEVICE).double()[None], 8, 8, 8, 8))
    matrix = torch.eye(3, device=DEVICE).double()[None]
    torch.library.opcheck(patch_overlap_of_matrix, (matrix, 8, 8, 8, 8, 4, 1.0, False))
    overlaps = [*patch_overlap(table, 32, 48, 16, 3.0, True), *patch_overlap(reverse, 32, 32, 16, 3.0, True)]
    query, reference = (side.requires_grad_() for side in make_tokens((4, 6), 16))
    active = torch.tensor([True, True, True, False], device=DEVICE)
    arguments = (query, reference, *overlaps, active, 16, 1 / 16, 3.0, True, False)
    # What the forward keeps for backward is unwritten for inactive pairs, so their values are not compared.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(copynce_triton, arguments, test_utils=utilities)


def test_compiles_without_a_graph_break() -> None:
    tables = make_tables((32, 32), (32, 32))
    compiled = torch.compile(copynce_loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (copynce_loss, compiled):
        query, reference = (side.requires_grad_() for side in make_tokens((4, 4), 16))
        torch.manual_seed(0)
        with torch.no_grad():
            query.copy_(torch.randn(query.shape))
            reference.copy_(torch.randn(reference.shape))
        loss = function(query, reference, *tables, gamma=3, backend="triton")
        (loss * 2.5).backward()
        results.append((loss.detach(), query.grad, reference.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_autocast_takes_float32_tokens_in_its_dtype() -> None:
    tables = make_tables((32, 32), (32, 32))
    tokens = [side.requires_grad_() for side in make_tokens((4, 4), 16)]
    half = [side.detach().half().requires_grad_() for side in tokens]
    expected = copynce_loss(*half, *tables, backend="triton")
    with torch.autocast(DEVICE, dtype=torch.float16):  # bfloat16 in training; the interpreter multiplies that wrongly
        loss = copynce_loss(*tokens, *tables, backend="triton")
        assert torch.equal(copynce_loss(*half, *tables, backend="triton"), expected)  # nothing else is touched
    assert torch.equal(loss, expected)
    gradients = torch.autograd.grad(loss, tokens)
    for gradient, rounded in zip(gradients, torch.autograd.grad(expected, half), strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, rounded.float())


# ---- on a CUDA device alone -----------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies bfloat16 wrongly")
@pytest.mark.parametrize("side", [224, 256, 336])
def test_bfloat16_tokens_at_training_size(side: int) -> None:
    tables = tuple(table[:2].contiguous() for table in make_tables((side, side), (side, side)))
    patches = (side // 16) ** 2
    tokens = [tokens[:2].requires_grad_() for tokens in make_tokens((patches, patches), 384, torch.bfloat16)]
    loss = copynce_loss(*tokens, *tables, gamma=3, backend="triton")
    gradients = torch.autograd.grad(2.5 * loss, tokens)
    active = torch.ones(2, dtype=torch.bool, device=DEVICE)
    expected = exact([side.detach() for side in tokens], tables, active, patch_size=16, gamma=3, prior="released")
    assert error(loss.detach(), expected[0]) <= 1e-5
    for gradient, expected_gradient in zip(gradients, expected[1:], strict=True):
        assert error(gradient, expected_gradient) <= 3e-3


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph of a whole step can be captured, and replays on other tokens."""
    monkeypatch.undo()
    tables = make_tables((64, 64), (64, 64))
    query, reference = (side.requires_grad_() for side in make_tokens((16, 16), 32))

    def step() -> tuple[Tensor, ...]:
        loss = copynce_loss(query, reference, *tables, gamma=2.5, backend="triton")
        return loss.detach(), *torch.autograd.grad(loss, (query, reference))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for side in (query, reference):
            side.copy_(torch.randn_like(side))
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_inductor_compiles_a_model_with_the_loss() -> None:
    tables = make_tables((32, 32), (32, 32))
    projection = torch.nn.Linear(16, 16, device=DEVICE)
    query, reference = make_tokens((4, 4), 16)

    def step() -> Tensor:
        return copynce_loss(projection(query), projection(reference), *tables, gamma=3, backend="triton")

    expected = torch.autograd.grad(step(), projection.weight)[0]
    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(), projection.weight)[0]
    assert error(found, expected.double()) <= 1e-4
