"""Compiled blocks: the numbers of a training that compiles nothing, under the same names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from copynce.errors import ConfigError
from copynce.models import build_matcher
from copynce.training import (
    MatcherLossConfig,
    MatcherObjective,
    TrainConfig,
    compiling,
    load_config,
    read_events,
    read_log,
    train,
)
from copynce.training.activations import checkpoint_activations
from copynce.training.compiling import compile_blocks
from dali_pipelines import PairBatch

pytestmark = pytest.mark.numeric

Tiny = Callable[..., TrainConfig]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The programs that are made, by a backend that runs them as they are: which is quick to compile."""
    made: list[Any] = []

    def keep(program: Any, inputs: list[Tensor]) -> Any:
        made.append(program)
        return program.forward

    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", keep)
    return made


def test_a_run_may_be_compiled_from_some_step_on(tiny: Tiny, programs: list[Any]) -> None:
    """Stochastic depth differs from block to block, and is drawn alike; weights keep their names."""
    options = ("model.drop_path=0.3", "optim.steps=4", "checkpoint_every=2")
    plain, compiled = tiny(*options, out="plain"), tiny(*options, "compile_blocks=true", out="compiled")
    expected, found = (load_file(train(config) / "model.safetensors") for config in (plain, compiled))
    assert len(programs) >= 2  # two blocks
    train(tiny(*options, "optim.steps=2", out="mixed"))
    mixed = load_file(train(tiny(*options, "compile_blocks=true", out="mixed")) / "model.safetensors")
    (event,) = read_events(Path(tiny(out="mixed").out) / "log.jsonl")
    assert "compile_blocks False -> True" in event["text"]
    assert expected.keys() == found.keys() == mixed.keys()
    for out in ("compiled", "mixed"):
        first, second = (read_log(Path(tiny(out=name).out) / "log.jsonl") for name in ("plain", out))
        assert [line["step"] for line in second] == [1, 2, 3, 4]
        for before, after in zip(first, second, strict=True):
            assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)


def test_a_matchers_fusion_is_compiled_too_and_computed_again(programs: list[Any]) -> None:
    found: list[tuple[Tensor, dict[str, Tensor | None]]] = []
    for compiles in (False, True):
        torch.manual_seed(0)
        shape = {"patch_size": 8, "embed_dim": 24, "num_heads": 2}
        model = build_matcher(img_size=32, encoder_blocks=1, fusion_blocks=2, drop_path=0.5, backbone_options=shape)
        objective = MatcherObjective(model, MatcherLossConfig(batch_negatives=1)).train()
        if compiles:
            compile_blocks(model, torch.device("cpu"))
        checkpoint_activations(model)
        torch.manual_seed(1)
        views, tables = torch.randn(2, 4, 3, 32, 32), torch.randint(-1, 32 * 32, (2, 4, 32, 32), dtype=torch.int32)
        every = torch.ones(4, dtype=torch.bool)
        loss, _ = objective(PairBatch(*views, *tables, every, every, list("abcd")))
        loss.backward()
        found.append((loss.detach(), {name: value.grad for name, value in objective.named_parameters()}))
    assert len(programs) >= 3
    (loss, gradients), (same, others) = found
    torch.testing.assert_close(same, loss, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_what_cannot_be_compiled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["out=run", "data.train=list.csv", "model.backbone=resnet50", "compile_blocks=true"]
    with pytest.raises(ConfigError, match=r"compile_blocks must be false with model\.backbone=resnet50"):
        load_config(TrainConfig, None, options)
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = build_matcher(img_size=32, encoder_blocks=1, fusion_blocks=1, backbone_options={"patch_size": 8})
    with pytest.raises(ConfigError, match="there is no no-such-compiler; install one"):
        compile_blocks(model, torch.device("cpu"))
