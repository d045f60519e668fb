"""The settings of the losses: one object for the function, the module and a training run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from copynce.losses import CopyNCELoss, CopyNCESettings, copynce_loss
from copynce.losses.settings import SMALLEST_TEMPERATURE
from copynce.training.objectives.settings import DescriptorLossConfig, MatcherLossConfig


def test_settings_are_given_by_name_and_do_not_change() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        CopyNCESettings(16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        CopyNCESettings().gamma = 3.0


def test_a_module_takes_settings_changes_by_name_or_both() -> None:
    expected = CopyNCESettings(patch_size=14, gamma=3.0)
    assert CopyNCELoss(expected).settings == expected
    assert CopyNCELoss(patch_size=14, gamma=3.0).settings == expected
    assert CopyNCELoss(CopyNCESettings(gamma=3.0), patch_size=14).settings == expected
    with pytest.raises(TypeError, match="unexpected keyword argument 'gama'"):
        CopyNCELoss(gama=3.0)
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, inf\], got -1"):
        CopyNCELoss(expected, gamma=-1.0)


def test_a_run_hands_every_setting_on() -> None:
    other = {"temperature": 0.1, "gamma": 2.0, "prior": "paper", "target": "both", "neighbours": 3, "form": "cosine"}
    assert {field.name for field in dataclasses.fields(CopyNCESettings)} == {"patch_size", *other}
    for objective in (DescriptorLossConfig, MatcherLossConfig):
        assert objective(**other).copynce(14) == CopyNCESettings(patch_size=14, **other)


def test_the_smallest_temperature_is_the_fused_path_s() -> None:
    table = torch.arange(16, dtype=torch.int32).view(1, 4, 4)
    batch = torch.randn(1, 4, 8), torch.randn(1, 4, 8), table, table
    for temperature in (SMALLEST_TEMPERATURE, SMALLEST_TEMPERATURE * (1 - 1e-9)):
        backend = "cpu" if CopyNCESettings(temperature=temperature).suits_fused_paths else "reference"
        loss = copynce_loss(*batch, patch_size=2, temperature=temperature)
        assert torch.equal(loss, copynce_loss(*batch, patch_size=2, temperature=temperature, backend=backend))
    assert CopyNCESettings(temperature=SMALLEST_TEMPERATURE).suits_fused_paths
    assert backend == "reference"
