"""The running mean of the weights: its values, and where a checkpoint has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from copynce.models import read_checkpoint_metadata
from copynce.training import TrainConfig, checkpoints, train
from copynce.training.checkpoints import read_state

pytestmark = pytest.mark.numeric


def test_a_checkpoints_model_is_the_mean_and_its_state_has_the_trained_weights(
    tiny: Callable[..., TrainConfig],
) -> None:
    options = ("optim.steps=3", "checkpoint_every=1", "keep_checkpoints=9", "optim.lr=0.05")
    train(tiny(*options, out="plain"))
    train(tiny(*options, "ema=0.75", out="mean"))
    plain, mean = (checkpoints(Path(tiny(out=out).out)) for out in ("plain", "mean"))
    trained = [load_file(folder / "model.safetensors") for folder in plain]
    expected = {name: value.double() for name, value in trained[1].items()}
    for step in range(4):
        found, state = load_file(mean[step] / "model.safetensors"), read_state(mean[step])["ema"]
        assert state["updates"] == step
        for name, value in trained[step].items():
            assert torch.equal(state["trained"][name], value), name
            if step < 2 or "running_" in name or "num_batches" in name:  # BatchNorm's statistics are copied
                assert torch.equal(found[name], value), name
            else:
                expected[name] = 0.75 * expected[name] + 0.25 * value.double()
                torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-6, atol=1e-7, msg=name)
    name = "heads.linear_head.fc1.weight"
    assert not torch.equal(load_file(mean[3] / "model.safetensors")[name], trained[3][name])
    assert read_checkpoint_metadata(mean[3] / "model.safetensors")["ema"] == 0.75
    assert "ema" not in read_checkpoint_metadata(plain[3] / "model.safetensors")
