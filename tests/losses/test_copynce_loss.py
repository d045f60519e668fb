"""CopyNCE: the released code's values, closed forms, the twin's gradients, and the fused CPU path against the twin."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from copynce.losses import CopyNCELoss, copynce_loss
from copynce.losses.cpu import op

pytestmark = pytest.mark.numeric

BACKENDS = ["reference", "cpu"]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def scaled_table(shape: tuple[int, int], target_shape: tuple[int, int], zoom: float) -> Tensor:
    """Table of a picture with the target from the top left on, at ``zoom`` times the size that would fill it."""
    y = (torch.arange(shape[0]) * target_shape[0] / shape[0] / zoom).long()
    x = (torch.arange(shape[1]) * target_shape[1] / shape[1] / zoom).long()
    inside = (y < target_shape[0])[:, None] & (x < target_shape[1])
    return torch.where(inside, y[:, None] * target_shape[1] + x, -1).int()


def reverse(table: Tensor, target_shape: tuple[int, int]) -> Tensor:
    reverse = torch.full((target_shape[0] * target_shape[1],), -1, dtype=torch.int32)
    for pixel, index in enumerate(table.flatten().tolist()):
        if index >= 0:
            reverse[index] = pixel
    return reverse.view(target_shape)


def make_batch(
    query_shape: tuple[int, int], reference_shape: tuple[int, int], patch_size: int, channels: int, kind: str = "mixed"
) -> Batch:
    """Four pairs: a zoomed-in copy, a zoomed-out copy, tables of noise, no copy ("mixed"); or four of one kind."""
    zooms = {"mixed": (1.7, 0.6, None, None), "downscale": (1 / 12,) * 4, "empty": (None,) * 4}[kind]
    forward, backward = [], []
    for index, zoom in enumerate(zooms):
        if zoom is None:
            forward.append(torch.full(query_shape, -1, dtype=torch.int32))
            backward.append(torch.full(reference_shape, -1, dtype=torch.int32))
            if index == 2 and kind == "mixed":
                forward[2] = torch.randint(-1, math.prod(reference_shape), query_shape, dtype=torch.int32)
                backward[2] = torch.randint(-1, math.prod(query_shape), reference_shape, dtype=torch.int32)
        else:
            forward.append(scaled_table(query_shape, reference_shape, zoom))
            backward.append(reverse(forward[-1], reference_shape))
    tokens = [
        torch.randn(4, math.prod(side // patch_size for side in shape), channels) * 3
        for shape in (query_shape, reference_shape)
    ]
    return tokens[0], tokens[1], torch.stack(forward), torch.stack(backward)


def loss_and_gradients(batch: Batch, upstream: float = 2.5, **settings) -> tuple[Tensor, Tensor, Tensor]:
    query, reference = (tokens.clone().requires_grad_() for tokens in batch[:2])
    loss = copynce_loss(query, reference, *batch[2:], **settings)
    (loss * upstream).backward()
    return loss.detach(), query.grad, reference.grad


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


# ---- the released code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [1, 3])
def test_equals_the_released_loss(oracle: Path, gamma: int, backend: str) -> None:
    expected = json.loads((oracle / "copynce.json").read_text())["224"]["results"][f"gamma{gamma}"]
    with np.load(oracle / "copynce_224.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file}
    tables = []
    for name in ("que_to_ref", "ref_to_que"):
        y, x = arrays[name].int().unbind(1)
        tables.append(torch.where(y < 0, -1, y * 224 + x).int())
    batch = (arrays["que_tokens"].float(), arrays["ref_tokens"].float(), *tables)
    settings = {"gamma": gamma, "backend": backend}
    loss, *gradients = loss_and_gradients(batch, upstream=1.0, active=arrays["copynce_flag"], **settings)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    for gradient, name in zip(gradients, ("que", "ref"), strict=True):
        assert relative_error(gradient, arrays[f"gamma{gamma}/grad_{name}"]) < 1e-6
    assert float(copynce_loss(*batch, **settings)) == pytest.approx(expected["loss_all_flags_true"], rel=1e-6)
    none = torch.zeros(4, dtype=torch.bool)
    assert float(copynce_loss(*batch, **settings, active=none)) == expected["loss_all_flags_false"] == 0
    for item in range(4):
        one = torch.arange(4) == item
        both = (expected["per_item_qr"][item] + expected["per_item_rq"][item]) / 2
        assert float(copynce_loss(*batch, **settings, active=one)) == pytest.approx(both, rel=1e-6)


# ---- closed forms ---------------------------------------------------------------------------------------------------


def identity_table(batch: int, side: int) -> Tensor:
    return torch.arange(side * side, dtype=torch.int32).view(1, side, side).repeat(batch, 1, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prior", ["released", "paper"])
def test_identical_views(backend: str, prior: str) -> None:
    # Tokens with one cosine between any two: e_i + a makes 1 + 2a + a^2 L over itself, 2a + a^2 L to the others.
    patches, shift = 9, 0.3
    tokens = (torch.eye(patches) + shift).repeat(2, 1, 1)
    cosine = (2 * shift + shift**2 * patches) / (1 + 2 * shift + shift**2 * patches)
    table = identity_table(2, 12)
    loss = copynce_loss(tokens, tokens * 7, table, table, patch_size=4, prior=prior, backend=backend)
    expected = math.log(math.exp(16) + (patches - 1) * math.exp(16 * cosine)) - 16
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_patch_is_free(backend: str) -> None:
    # A softmax over one patch is 1: no loss and no gradient, however the tokens disagree.
    table = identity_table(2, 4)
    batch = (torch.randn(2, 1, 5), torch.randn(2, 1, 5), table, table)
    loss, *gradients = loss_and_gradients(batch, patch_size=4, backend=backend)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    for gradient in gradients:
        assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_copied_patch(backend: str) -> None:
    # Orthogonal tokens, 1 x 2 patches of 2 x 2 pixels; half of query patch 0 shows reference patch 0, and that is all.
    forward = torch.tensor([[[0, -1, -1, -1], [4, -1, -1, -1]]], dtype=torch.int32)
    backward = torch.full((1, 2, 4), -1, dtype=torch.int32)
    tokens = torch.eye(2)[None]
    log_p = 1 - math.log(math.e + 1)
    settings = {"patch_size": 2, "temperature": 1.0, "backend": backend}
    released = copynce_loss(tokens, tokens, forward, backward, gamma=3, **settings)
    assert float(released) == pytest.approx(
        -0.5 / 2 * log_p / 2, rel=1e-5
    )  # half the mass, mean of 2, half of both ways
    paper = copynce_loss(tokens, tokens, forward, backward, gamma=3, prior="paper", **settings)
    assert float(paper) == pytest.approx(-log_p / 2, rel=1e-5)
    quarter = forward.clone()
    quarter[0, 1, 0] = -1
    sharpened = copynce_loss(tokens, tokens, quarter, backward, gamma=3, **settings)
    assert float(sharpened) == pytest.approx(-(1 / (1 + 27)) / 2 * log_p / 2, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prior", ["released", "paper"])
def test_no_copy_is_exactly_zero(backend: str, prior: str) -> None:
    batch = make_batch((12, 12), (12, 12), 4, 6, "empty")
    loss, *gradients = loss_and_gradients(batch, patch_size=4, gamma=3, prior=prior, backend=backend)
    assert loss.item() == 0
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gamma_0_spreads_over_all_bins(backend: str) -> None:
    # 0^0 = 1: the released prior is 1/(L + 1) everywhere, also without any copy; the paper's is 1/L in copied patches.
    batch = make_batch((8, 8), (8, 8), 4, 6, "empty")
    logits = torch.nn.functional.normalize(batch[0], dim=-1) @ torch.nn.functional.normalize(batch[1], dim=-1).mT * 16
    expected = -(logits.log_softmax(-1) + logits.log_softmax(-2)).sum((1, 2)).mean() / 2 / 4 / 5
    assert float(copynce_loss(*batch, patch_size=4, gamma=0, backend=backend)) == pytest.approx(
        float(expected), rel=1e-5
    )
    assert float(copynce_loss(*batch, patch_size=4, gamma=0, prior="paper", backend=backend)) == 0


# ---- the twin's gradient, and the fused path against the twin -------------------------------------------------------


@pytest.mark.parametrize("prior", ["released", "paper"])
@pytest.mark.parametrize("gamma", [0, 2.5, math.inf])
def test_gradcheck_of_the_twin(prior: str, gamma: float) -> None:
    batch = make_batch((4, 6), (6, 4), 2, 3)
    active = torch.tensor([True, True, False, True])
    query, reference = (tokens.double().requires_grad_() for tokens in batch[:2])
    assert torch.autograd.gradcheck(
        lambda q, r: copynce_loss(
            q, r, *batch[2:], patch_size=2, temperature=0.3, gamma=gamma, prior=prior, active=active
        ),
        (query, reference),
    )


SHAPES = [  # query pixels, reference pixels, patch size, channels
    pytest.param((96, 96), (96, 96), 16, 64, id="square"),
    pytest.param((64, 112), (80, 48), 16, 33, id="non-square-and-lq-is-not-lr"),
    pytest.param((126, 98), (98, 98), 14, 20, id="patch-14"),
    pytest.param((16, 16), (48, 32), 16, 7, id="one-query-patch"),
    pytest.param((16, 16), (16, 16), 16, 1, id="one-patch-one-channel"),
    pytest.param((15, 27), (21, 9), 3, 5, id="odd"),
    pytest.param((336, 336), (336, 336), 16, 48, id="336-px"),
]


@pytest.fixture(params=["tiles", "library"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who makes the CPU path's products: one of the two suits this processor, both must be right."""
    monkeypatch.setattr(op, "TILES_PAY", request.param == "tiles")
    return request.param


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("prior", ["released", "paper"])
@pytest.mark.parametrize("gamma", [0, 0.5, 3, math.inf])
@pytest.mark.parametrize(("query_shape", "reference_shape", "patch_size", "channels"), SHAPES)
def test_cpu_equals_the_twin(
    query_shape: tuple[int, int],
    reference_shape: tuple[int, int],
    patch_size: int,
    channels: int,
    gamma: float,
    prior: str,
) -> None:
    batch = make_batch(query_shape, reference_shape, patch_size, channels)
    settings = {"patch_size": patch_size, "gamma": gamma, "prior": prior, "active": torch.tensor([1, 1, 1, 0]).bool()}
    exact = loss_and_gradients((batch[0].double(), batch[1].double(), *batch[2:]), backend="reference", **settings)
    fused = loss_and_gradients(batch, backend="cpu", **settings)
    assert float(fused[0]) == pytest.approx(float(exact[0]), rel=2e-6, abs=1e-6)
    for value, expected in zip(fused[1:], exact[1:], strict=True):
        # Against the gradient's own size; where it vanishes (one patch, one channel), against rounding of the softmax.
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=2e-6 * (float(expected.abs().max()) + 1))
        if expected.norm() > 1e-3:
            assert relative_error(value, expected) < 2e-6


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("prior", ["released", "paper"])
def test_cpu_equals_the_twin_where_few_patches_are_copied(prior: str) -> None:
    # The corner that the products leave out: of any size, on either side, and with a copy in one direction only.
    query_shape, reference_shape, patch_size = (72, 80), (56, 64), 8
    query, reference, *tables = make_batch(query_shape, reference_shape, patch_size, 40)
    for table, other in zip(tables, (reference_shape, query_shape), strict=True):
        table.copy_(torch.randint(0, math.prod(other), table.shape))
    tables[0][0, :32], tables[1][0, 16:] = -1, -1
    tables[0][1], tables[1][1, :, :56] = -1, -1
    tables[0][2, 8:], tables[1][2] = -1, -1
    hidden = torch.rand(9, 10).repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1) < 0.7
    tables[0][3][hidden], tables[1][3][hidden[:56, :64]] = -1, -1
    settings = {"patch_size": patch_size, "gamma": 3, "prior": prior}
    exact = loss_and_gradients((query.double(), reference.double(), *tables), **settings)
    fused = loss_and_gradients((query, reference, *tables), backend="cpu", **settings)
    assert float(fused[0]) == pytest.approx(float(exact[0]), rel=2e-6)
    for value, expected in zip(fused[1:], exact[1:], strict=True):
        for sample in range(4):
            assert relative_error(value[sample], expected[sample]) < 2e-6


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("gamma", [15, 18, 18.2, 40])
def test_shares_below_the_smallest_float32(gamma: float) -> None:
    # One pixel of 256 is copied: its share is 256^-gamma, its gradient may not even be a denormal number.
    batch = make_batch((48, 48), (48, 48), 16, 8, "empty")
    for table in batch[2:]:
        table[:, ::16, ::16] = torch.arange(9).view(3, 3).int() * 200
    loss, *gradients = loss_and_gradients(batch, gamma=gamma, temperature=1.0, backend="cpu")
    assert 0 <= loss.item() < 1e-30
    for gradient in gradients:
        assert gradient.abs().max() < 1e-30


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("prior", ["released", "paper"])
def test_cpu_equals_the_twin_under_extreme_downscale(prior: str) -> None:
    batch = make_batch((96, 96), (96, 96), 16, 16, "downscale")
    exact = loss_and_gradients((batch[0].double(), batch[1].double(), *batch[2:]), gamma=3, prior=prior)
    fused = loss_and_gradients(batch, gamma=3, prior=prior, backend="cpu")
    assert float(fused[0]) == pytest.approx(float(exact[0]), rel=2e-6)
    for value, expected in zip(fused[1:], exact[1:], strict=True):
        assert relative_error(value, expected) < 2e-6


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("temperature", [0.025, 0.07, 1.0, 50.0])
def test_cpu_equals_the_twin_at_any_temperature(temperature: float) -> None:
    batch = make_batch((64, 64), (64, 64), 16, 16)
    batch = (batch[0], torch.cat((batch[0][:2], -batch[1][2:])), *batch[2:])  # cosines of exactly 1 as well
    exact = loss_and_gradients((batch[0].double(), batch[1].double(), *batch[2:]), temperature=temperature)
    fused = loss_and_gradients(batch, temperature=temperature, backend="cpu")
    assert float(fused[0]) == pytest.approx(float(exact[0]), rel=1e-5)
    for value, expected in zip(fused[1:], exact[1:], strict=True):
        assert relative_error(value, expected) < 1e-5


# Rounding of the tokens is shared; what differs is one rounding of the gradient to the dtype, half its last place.
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 5e-4), (torch.bfloat16, 4e-3)])
def test_half_precision_tokens(dtype: torch.dtype, bound: float) -> None:
    batch = make_batch((64, 64), (64, 64), 16, 32)
    tokens = batch[0].to(dtype), batch[1].to(dtype)
    exact = loss_and_gradients((tokens[0].double(), tokens[1].double(), *batch[2:]))
    for backend in BACKENDS:
        loss, *gradients = loss_and_gradients((*tokens, *batch[2:]), backend=backend)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(float(exact[0]), rel=1e-6)
        for value, expected in zip(gradients, exact[1:], strict=True):
            assert value.dtype == dtype
            assert relative_error(value, expected) < bound


# ---- behaviour ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_inactive_pairs_do_not_count(backend: str) -> None:
    batch = make_batch((64, 64), (64, 64), 16, 8)
    batch[0][1], batch[1][1] = torch.nan, torch.inf
    active = torch.tensor([True, False, True, False])
    loss, *gradients = loss_and_gradients(batch, active=active, backend=backend)
    kept: Batch = tuple(tensor[active] for tensor in batch)  # type: ignore[assignment]
    expected, *expected_gradients = loss_and_gradients(kept, backend=backend)
    assert loss.item() == pytest.approx(float(expected), rel=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient[active], expected_gradient)
        assert torch.equal(gradient[~active], torch.zeros_like(gradient[~active]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_active_pair_is_zero_with_a_graph(backend: str) -> None:
    batch = make_batch((32, 32), (32, 32), 16, 8)
    loss, *gradients = loss_and_gradients(batch, active=torch.zeros(4, dtype=torch.bool), backend=backend)
    assert loss.item() == 0
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_is_zero(backend: str) -> None:
    batch: Batch = tuple(tensor[:0] for tensor in make_batch((32, 32), (32, 32), 16, 8))  # type: ignore[assignment]
    loss, *_ = loss_and_gradients(batch, backend=backend)
    assert loss.item() == 0


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("pair", [0, 3])  # of the second nothing is copied
@pytest.mark.parametrize("side", [0, 1])
def test_a_token_that_is_not_finite_reaches_the_loss(side: int, pair: int, bad: float, backend: str) -> None:
    batch = make_batch((32, 32), (32, 32), 16, 8)
    batch[side][pair, 3, 0] = bad
    assert torch.isnan(copynce_loss(*batch, backend=backend))


def test_cpu_is_bitwise_repeatable_and_independent_of_threads(products: str) -> None:
    batch = make_batch((96, 96), (96, 96), 16, 32)
    first, second = loss_and_gradients(batch, backend="cpu"), loss_and_gradients(batch, backend="cpu")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads == 1 else 1)
        other_threads = loss_and_gradients(batch, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(first, other_threads, strict=True):
        if products == "tiles":  # a library may sum in another order for another number of samples
            assert torch.equal(one, other)
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("products")
def test_a_thread_that_does_not_come_is_not_waited_for() -> None:
    batch = make_batch((96, 96), (96, 96), 16, 32)
    alone = loss_and_gradients(batch, backend="cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    gate = threading.Event()
    try:
        held = [op._helpers(2).submit(gate.wait, 300) for _ in range(2)]
        without_help = loss_and_gradients(batch, backend="cpu")
        assert not any(one.done() for one in held)
    finally:
        gate.set()
        torch.set_num_threads(threads)
    for one, other in zip(alone, without_help, strict=True):
        torch.testing.assert_close(one, other)


def test_graph_can_be_used_twice_and_one_sided() -> None:
    batch = make_batch((32, 32), (32, 32), 16, 8)
    query = batch[0].requires_grad_()  # the reference tokens are constants
    loss = copynce_loss(query, *batch[1:], backend="cpu") + copynce_loss(query, *batch[1:], backend="cpu", gamma=3)
    (once,) = torch.autograd.grad(loss, query, retain_graph=True)
    (again,) = torch.autograd.grad(loss, query)
    assert torch.equal(once, again)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_inside(backend: str) -> None:
    batch = make_batch((64, 64), (64, 64), 16, 32)
    plain = loss_and_gradients(batch, upstream=1.0, backend=backend)
    query, reference = (tokens.clone().requires_grad_() for tokens in batch[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = copynce_loss(query, reference, *batch[2:], backend=backend)
    loss.backward()
    for one, other in zip(plain, (loss.detach(), query.grad, reference.grad), strict=True):
        assert torch.equal(one, other)


def test_non_contiguous_inputs() -> None:
    batch = make_batch((64, 64), (64, 64), 16, 8)
    with_class_token = torch.cat((torch.randn(4, 1, 8), batch[0]), 1)
    strided = (with_class_token[:, 1:], batch[1].mT.contiguous().mT, batch[2].mT.contiguous().mT, batch[3])
    for one, other in zip(loss_and_gradients(batch), loss_and_gradients(strided), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("products")
def test_cpu_operator_is_well_formed() -> None:
    from copynce.losses.cpu.op import copynce_cpu_forward

    query, reference, *tables = make_batch((8, 8), (8, 12), 4, 5)
    arguments = (query.requires_grad_(), reference.requires_grad_(), *tables, torch.ones(4, dtype=torch.bool))
    torch.library.opcheck(copynce_cpu_forward, (*arguments, 4, 1 / 16, 1.0, True, True))


def test_compiles_without_a_graph_break() -> None:
    batch = make_batch((32, 32), (32, 32), 16, 8)
    eager = loss_and_gradients(batch)
    compiled = torch.compile(copynce_loss, fullgraph=True, backend="aot_eager")
    query, reference = (tokens.clone().requires_grad_() for tokens in batch[:2])
    loss = compiled(query, reference, *batch[2:])
    (loss * 2.5).backward()
    for one, other in zip(eager, (loss.detach(), query.grad, reference.grad), strict=True):
        torch.testing.assert_close(one, other)


def test_auto_takes_the_fused_path_where_it_applies() -> None:
    batch = make_batch((32, 32), (32, 32), 16, 8)
    for temperature, backend in ((1 / 16, "cpu"), (0.02, "reference")):
        automatic = copynce_loss(*batch, temperature=temperature)
        assert torch.equal(automatic, copynce_loss(*batch, temperature=temperature, backend=backend))
    double = copynce_loss(batch[0].double(), batch[1].double(), *batch[2:])
    assert double.dtype == torch.float64


def test_module_is_the_function() -> None:
    batch = make_batch((42, 42), (42, 42), 14, 8)
    active = torch.tensor([True, True, False, True])
    module = CopyNCELoss(patch_size=14, gamma=3, prior="paper")
    assert torch.equal(
        module(*batch, active), copynce_loss(*batch, patch_size=14, gamma=3, prior="paper", active=active)
    )
    assert "prior='paper'" in repr(module)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("query_tokens", [[1.0]], TypeError, r"query_tokens must be a torch\.Tensor, got list"),
        ("active", [True], TypeError, r"active must be a torch\.Tensor, got list"),
        ("query_tokens", torch.zeros(4, 4), ValueError, r"query_tokens must be \[B, Lq, D\].*\[4, 4\]"),
        ("reference_tokens", torch.zeros(4, 4, 9), ValueError, r"agree in batch and channels.*\[4, 4, 9\]"),
        ("query_tokens", torch.zeros(4, 5, 8), ValueError, r"has 4 patches of 16 pixels.*\[4, 5, 8\]; drop the class"),
        ("query_to_reference", torch.zeros(3, 32, 32).int(), ValueError, r"\[B, H, W\] with B = 4.*\[3, 32, 32\]"),
        ("reference_to_query", torch.zeros(4, 30, 32).int(), ValueError, r"divisible by patch_size = 16, got 30 x 32"),
        ("active", torch.ones(3).bool(), ValueError, r"active must be \[B\] = \[4\], got \[3\]"),
        ("query_tokens", torch.zeros(4, 4, 8).int(), TypeError, r"one floating dtype, got torch\.int32"),
        ("query_tokens", torch.zeros(4, 4, 8).half(), TypeError, r"one floating dtype, got torch\.float16"),
        ("query_to_reference", torch.zeros(4, 32, 32), TypeError, r"must be torch\.int32.*got torch\.float32"),
        ("active", torch.ones(4), TypeError, r"active must be torch\.bool, got torch\.float32"),
        ("query_to_reference", torch.zeros(4, 32, 32).int().to("meta"), ValueError, r"tokens' device cpu, got meta"),
        ("patch_size", 16.0, TypeError, r"patch_size must be an int in pixels, got float"),
        ("patch_size", 0, ValueError, r"patch_size must be at least 1 pixel, got 0"),
        ("temperature", 0.0, ValueError, r"temperature must be a finite number above 0, got 0\.0"),
        ("temperature", "hot", TypeError, r"temperature must be a float, got str"),
        ("gamma", -1.0, ValueError, r"gamma must lie in \[0, inf\], got -1\.0"),
        ("gamma", math.nan, ValueError, r"gamma must lie in \[0, inf\], got nan"),
        ("prior", "published", ValueError, r"prior must be one of 'released', 'paper', got 'published'"),
        ("backend", "cuda", ValueError, r"backend must be one of 'auto', 'triton', 'cpu', 'reference', got 'cuda'"),
    ],
)
def test_bad_arguments_say_what_is_wrong(name: str, value: object, error: type[Exception], match: str) -> None:
    tensors = ("query_tokens", "reference_tokens", "query_to_reference", "reference_to_query")
    arguments = dict(zip(tensors, make_batch((32, 32), (32, 32), 16, 8), strict=True))
    with pytest.raises(error, match=match):
        copynce_loss(**{**arguments, name: value})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [-2, 32 * 32, 2**31 - 1, -(2**31)])
def test_index_outside_of_the_other_picture(backend: str, bad: int) -> None:
    batch = make_batch((32, 32), (32, 32), 16, 8)
    batch[3][2, 31, 31] = bad
    with pytest.raises(ValueError, match=r"must hold -1 or a pixel index.*below 1024"):
        copynce_loss(*batch, backend=backend)


def test_backend_that_cannot_run() -> None:
    batch = make_batch((32, 32), (32, 32), 16, 8)
    with pytest.raises(ValueError, match=r"backend='cpu' needs temperature >= 0\.025, got 0\.02"):
        copynce_loss(*batch, temperature=0.02, backend="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"backend='triton' needs Triton.*got tokens on cpu"):
            copynce_loss(*batch, backend="triton")
