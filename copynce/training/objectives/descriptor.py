"""The descriptor's objective."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from copynce.losses import CopyNCELoss, info_nce, koleo
from copynce.models import Descriptor
from copynce.training.objectives.base import Objective
from copynce.training.objectives.patches import watch_patches
from copynce.training.objectives.settings import DescriptorLossConfig
from dali_pipelines import PairBatch


class DescriptorObjective(Objective):
    """A descriptor with InfoNCE, KoLeo and CopyNCE (PROTOCOLS 8).

    The parts are ``copynce``, ``info_nce`` and ``koleo``. Only ``positive`` pairs are matches of InfoNCE and KoLeo.
    CopyNCE's mean is over the ``traced`` pairs; as released, those that are not positive are among them and give 0. A
    part of weight 0 is still measured, without gradient, so that runs with and without it can be compared. Its patches
    are watched (``objectives.patches``).

    One call sees one batch of every rank: where a step has several (``optim.accumulate``), the columns of InfoNCE and
    the neighbours of KoLeo are those of each batch, and the step's loss is the mean of the batches'.
    """

    model: Descriptor

    def __init__(self, model: Descriptor, config: DescriptorLossConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.copynce = CopyNCELoss(config.copynce(model.patch_size))
        self.log_scale = nn.Parameter(torch.tensor(config.log_scale))

    def forward(self, batch: PairBatch, watch: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        descriptors, tokens = self.model(torch.cat([batch.query, batch.reference]), sides=2)
        query_descriptor, reference_descriptor = descriptors.chunk(2)
        query_tokens, reference_tokens = tokens.chunk(2)
        if config.copynce_weight == 0:
            query_tokens, reference_tokens = query_tokens.detach(), reference_tokens.detach()
        parts = {
            "copynce": self.copynce(
                query_tokens, reference_tokens, batch.query_to_reference, batch.reference_to_query, batch.traced
            ),
            "info_nce": info_nce(
                query_descriptor, reference_descriptor, self.log_scale, positive=batch.positive, gather=config.gather
            ),
            "koleo": koleo(query_descriptor, reference_descriptor, positive=batch.positive, gather=config.gather),
        }
        weights = {
            "copynce": config.copynce_weight,
            "info_nce": config.info_nce_weight,
            "koleo": config.koleo_weight,
        }
        # Parts of weight 0 stay in the sum: DDP wants a gradient, if only of zero, for every parameter.
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        measures = {name: part.detach() for name, part in parts.items()}
        if watch:
            measures |= watch_patches(query_tokens, reference_tokens, batch, self.copynce.settings)
        return total, measures

    def state(self) -> dict[str, Any]:
        return {"log_scale": self.log_scale.detach().cpu()}

    def load_state(self, state: dict[str, Any]) -> None:
        if "log_scale" in state:
            with torch.no_grad():
                self.log_scale.copy_(state["log_scale"])

    def facts(self) -> dict[str, float]:
        return {"temperature": float(self.log_scale.detach().neg().exp())}
