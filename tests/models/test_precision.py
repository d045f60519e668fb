"""Which attention a forward pass takes; and that it makes no difference but in time."""

from __future__ import annotations

import pytest
import torch

from copynce.models import Descriptor, build_descriptor


@pytest.fixture
def model() -> Descriptor:
    options = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return build_descriptor(img_size=32, dim=16, backbone_options=options).eval()


@pytest.mark.parametrize(
    ("bf16", "gradients", "fused"),
    [(False, False, True), (False, True, True), (True, False, True), (True, True, False)],
)
def test_plain_attention_is_for_bfloat16_gradients_on_the_cpu(
    model: Descriptor, bf16: bool, gradients: bool, fused: bool
) -> None:
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(torch.randn(2, 3, 32, 32))
    assert [block.attn.fused_attn for block in model.encoder.blocks] == [fused] * 3


def test_both_attentions_give_the_same_descriptor(model: Descriptor) -> None:
    """bfloat16 keeps 8 bits: the two differ as two orders of rounding do."""
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        exact, _ = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        plain, _ = model(images)
        with torch.no_grad():
            fused, _ = model(images)
    for descriptor in (plain, fused):
        assert torch.cosine_similarity(descriptor, exact).min() > 0.999
