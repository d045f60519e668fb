"""The block that trains on a processor as one operation, against timm's, from which it takes its weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from copynce.models import build_descriptor, build_matcher
from copynce.models.training_block import TrainingBlock

_FORMS: list[dict[str, Any]] = [
    {"qkv_bias": True},
    {"qkv_bias": False},
    {"qkv_bias": True, "init_values": 0.3},
    {"qkv_bias": False, "proj_bias": False, "init_values": 0.3},
]


def pair(width: int = 24, heads: int = 2, **form: Any) -> tuple[TrainingBlock, Block]:
    """The block and timm's with the same random weights."""
    ours, theirs = TrainingBlock(width, heads, **form), Block(width, heads, **form)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def gradients(block: Block, tokens: Tensor, of_output: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """What the block makes of the tokens, and the gradients of the tokens and of all weights."""
    tokens = tokens.clone().requires_grad_()
    made = block(tokens)
    made.backward(of_output)
    return made.detach(), [tokens.grad, *(parameter.grad for parameter in block.parameters())]


def is_one_operation(made: Tensor) -> bool:
    return made.grad_fn is not None and "_OneBlock" in type(made.grad_fn).__name__


@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("shape", [(3, 7, 24), (1, 1, 24), (2, 65, 24)])
def test_equals_timm_in_float64(form: dict[str, Any], shape: tuple[int, ...]) -> None:
    ours, theirs = (block.double() for block in pair(**form))
    tokens, of_output = torch.randn(2, *shape, dtype=torch.float64)
    assert is_one_operation(ours(tokens))
    made, wanted = gradients(ours, tokens, of_output), gradients(theirs, tokens, of_output)
    torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_function() -> None:
    block = pair(8, 2, qkv_bias=True, init_values=0.3)[0].double()
    names, weights = zip(*block.named_parameters(), strict=True)

    def function(tokens: Tensor, *values: Tensor) -> Tensor:
        made: Tensor = torch.func.functional_call(block, dict(zip(names, values, strict=True)), tokens)
        return made

    tokens = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (tokens, *weights))


@pytest.mark.numeric
@pytest.mark.parametrize("form", _FORMS)
def test_bfloat16_is_as_near_to_float64_as_timm(form: dict[str, Any]) -> None:
    ours, theirs = pair(64, 4, **form)
    tokens, of_output = torch.randn(2, 4, 50, 64)
    exact = gradients(copy.deepcopy(theirs).double(), tokens.double(), of_output.double())[1]
    with torch.autocast("cpu", torch.bfloat16):
        ours_made, mine = gradients(ours, tokens, of_output)
        _, timms = gradients(theirs, tokens, of_output)
    assert ours_made.dtype == torch.float32
    for one, other, true in zip(mine, timms, exact, strict=True):
        assert one is not None
        assert other is not None
        assert true is not None
        assert one.dtype == torch.float32
        assert (one - true).norm() <= 1.5 * (other - true).norm() + 1e-3 * true.norm()


@pytest.mark.parametrize("frozen", ["norm1", "attn.qkv", "attn", "mlp", "norm2.weight", "ls1", ""])
def test_frozen_weights_get_no_gradient_and_change_no_other(frozen: str) -> None:
    ours, theirs = (block.double() for block in pair(qkv_bias=True, init_values=0.3))
    for block in (ours, theirs):
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen) if frozen else True)
    tokens, of_output = torch.randn(2, 2, 5, 24, dtype=torch.float64)
    made, wanted = gradients(ours, tokens, of_output)[1], gradients(theirs, tokens, of_output)[1]
    assert [one is None for one in made] == [one is None for one in wanted]
    torch.testing.assert_close(
        [one for one in made if one is not None], [one for one in wanted if one is not None], rtol=1e-12, atol=1e-12
    )
    for block in (ours, theirs):
        block.zero_grad()
        block(tokens).backward(of_output)  # tokens that want no gradient
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "form",
    [{"drop_path": 0.2}, {"proj_drop": 0.1}, {"attn_drop": 0.1}, {"qk_norm": True}, {"scale_mlp_norm": True}],
)
def test_any_other_block_is_timms(form: dict[str, Any]) -> None:
    ours, theirs = pair(**form)
    tokens, of_output = torch.randn(2, 3, 7, 24)
    results = []
    for block in (ours, theirs):
        torch.manual_seed(3)
        assert not is_one_operation(block(tokens))
        torch.manual_seed(3)
        results.append(gradients(block, tokens, of_output))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_only_where_gradients_are_asked_for() -> None:
    ours, theirs = pair()
    tokens = torch.randn(2, 5, 24)
    with torch.no_grad():
        assert torch.equal(ours(tokens), theirs(tokens))
    for block in (ours, theirs):
        block.requires_grad_(False)
    assert torch.equal(ours(tokens), theirs(tokens))


def test_a_trace_with_gradients_holds_timms_operators() -> None:
    ours, theirs = pair()
    tokens = torch.randn(2, 5, 24)
    trace: Any = torch.jit.trace
    traced = trace(ours, tokens)
    assert "PythonOp" not in str(traced.graph)
    assert "_OneBlock" not in str(traced.graph)
    torch.testing.assert_close(traced(tokens), theirs(tokens))


def test_all_models_are_made_of_it() -> None:
    options: Any = {"patch_size": 8, "embed_dim": 24, "num_heads": 2}
    descriptor = build_descriptor(img_size=32, dim=16, backbone_options={**options, "depth": 3})
    matcher = build_matcher(img_size=32, backbone_options=options, encoder_blocks=2, fusion_blocks=1)
    blocks = [*descriptor.encoder.blocks, *matcher.encoder.blocks, *matcher.fusion.blocks]
    assert len(blocks) == 6
    assert all(isinstance(block, TrainingBlock) for block in blocks)
    _, patch_tokens = descriptor(torch.randn(2, 3, 32, 32))
    assert patch_tokens is not None
    assert patch_tokens.requires_grad
