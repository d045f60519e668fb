"""``copynce_loss(backend="triton")``, the operators together: in Triton's interpreter, or compiled on a GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from copynce.losses import copynce_loss
from tests.kernels.triton.inputs import DEVICE, INTERPRETED, Shape, error, exact, make_tables, make_tokens


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
    traced = torch.ones(4, dtype=torch.bool, device=DEVICE)
    loss = copynce_loss(*tokens, *tables, gamma=3, backend="triton")
    (2.5 * loss).backward()
    expected = exact([side.detach() for side in tokens], tables, traced, patch_size=16, gamma=3, prior="released")
    assert loss.dtype == torch.float32
    assert error(loss.detach(), expected[0]) <= 1e-6
    for side, expected_gradient in zip(tokens, expected[1:], strict=True):
        assert side.grad is not None
        assert side.grad.dtype == torch.float16
        assert error(side.grad, expected_gradient) <= 5e-4


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
    traced = torch.ones(2, dtype=torch.bool, device=DEVICE)
    expected = exact([side.detach() for side in tokens], tables, traced, patch_size=16, gamma=3, prior="released")
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
