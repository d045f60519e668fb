"""Activation checkpointing: the gradients of a step that keeps everything, and that the blocks are computed again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from copynce.errors import ConfigError
from copynce.models import Descriptor, DescriptorConfig, build_matcher
from copynce.models.training_block import TrainingBlock
from copynce.training import (
    DescriptorLossConfig,
    DescriptorObjective,
    MatcherLossConfig,
    MatcherObjective,
    TrainConfig,
    load_config,
)
from copynce.training.activations import checkpoint_activations
from copynce.training.objectives.base import Objective
from dali_pipelines import PairBatch

pytestmark = pytest.mark.numeric

SHAPE = {"patch_size": 8, "embed_dim": 24, "num_heads": 2}


def objective(kind: str) -> Objective:
    torch.manual_seed(0)
    if kind == "descriptor":
        config = DescriptorConfig(img_size=32, dim=16, drop_path=0.5, backbone_options={**SHAPE, "depth": 3})
        return DescriptorObjective(Descriptor(config), DescriptorLossConfig()).train()
    matcher = build_matcher(img_size=32, encoder_blocks=2, fusion_blocks=2, drop_path=0.5, backbone_options=SHAPE)
    return MatcherObjective(matcher, MatcherLossConfig()).train()


def step(kind: str, again: bool) -> tuple[float, dict[str, Tensor | None], dict[str, int]]:
    """Loss and gradients, and how often each block was computed."""
    made = objective(kind)
    names = {module: name for name, module in made.model.named_modules() if isinstance(module, TrainingBlock)}
    calls = dict.fromkeys(names.values(), 0)
    forward = TrainingBlock.forward

    def counted(block: TrainingBlock, *args: Any) -> Tensor:
        calls[names[block]] += 1
        return forward(block, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingBlock, "forward", counted)
        if again:
            checkpoint_activations(made.model)
        torch.manual_seed(1)
        views, tables = torch.randn(2, 6, 3, 32, 32), torch.randint(-1, 32 * 32, (2, 6, 32, 32), dtype=torch.int32)
        every = torch.ones(6, dtype=torch.bool)
        loss, _ = made(PairBatch(*views, *tables, every, every, list("abcdef")))
        loss.backward()
    return loss.item(), {name: value.grad for name, value in made.named_parameters()}, calls


@pytest.mark.parametrize(("kind", "blocks"), [("descriptor", 3), ("matcher", 4)])
def test_gradients_stay_and_every_block_is_computed_twice(kind: str, blocks: int) -> None:
    loss, gradients, once = step(kind, again=False)
    same, found, twice = step(kind, again=True)
    assert same == pytest.approx(loss, rel=1e-6)
    assert list(once.values()) == [1] * blocks
    assert list(twice.values()) == [2] * blocks
    for name, gradient in gradients.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6, msg=name)


def test_a_resnet_has_no_blocks_to_compute_again() -> None:
    options = ["out=run", "data.train=list.csv", "model.backbone=resnet50", "checkpoint_activations=true"]
    with pytest.raises(ConfigError, match=r"checkpoint_activations must be false with model\.backbone=resnet50"):
        load_config(TrainConfig, None, options)
