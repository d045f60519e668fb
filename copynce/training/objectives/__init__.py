"""What a training optimises: a model, its losses and their own state; the trainer knows none of them by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from copynce.training.config import TrainConfig
    from copynce.training.objectives.base import Objective


def make_objective(config: TrainConfig) -> Objective:
    """The objective that the settings choose, on the CPU; new weights come from torch's generator."""
    from copynce.models.kinds import build_model
    from copynce.training.objectives.descriptor import DescriptorObjective
    from copynce.training.objectives.matcher import MatcherObjective

    objectives = {"descriptor": DescriptorObjective, "matcher": MatcherObjective}
    return objectives[config.objective](build_model(config.model), config.loss)
