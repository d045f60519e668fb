"""The matcher's objective."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from copynce.losses import CopyNCELoss
from copynce.models import Matcher
from copynce.training.objectives.base import Objective
from copynce.training.objectives.patches import watch_patches
from copynce.training.objectives.settings import MatcherLossConfig
from dali_pipelines import PairBatch


class MatcherObjective(Objective):
    """A matcher with binary cross-entropy and CopyNCE (PROTOCOLS 8).

    The parts are ``bce``, the mean over all pairs, and ``copynce``, of the fusion head's tokens, whose mean is over the
    ``traced`` pairs; as released, negative ones are among them and give 0. With them the log has the share of pairs
    that are ``positives``, and that of pairs on the right side of logit 0, ``accuracy``. A part of weight 0 is still
    measured, without gradient. Without CopyNCE's weight the fusion head, which nothing else asks, keeps its own. The
    fusion head's patches are watched (``objectives.patches``).

    Where a step has several batches (``optim.accumulate``), its loss is the mean of theirs: that of all its pairs, but
    for CopyNCE where the batches hold different numbers of traced pairs, whose mean is then that of each batch.
    """

    model: Matcher

    def __init__(self, model: Matcher, config: MatcherLossConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.copynce = CopyNCELoss(config.copynce(model.patch_size))
        if config.copynce_weight == 0:
            model.heads["fusion_head"].requires_grad_(False)  # DDP waits for the gradient of every other parameter

    def forward(self, batch: PairBatch, watch: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        others = min(config.batch_negatives, len(batch.uuids) - 1)
        unlike: list[Tensor] = []
        if others == 0:
            logits, query_tokens, reference_tokens = self.model.with_tokens(batch.query, batch.reference)
        else:
            query, reference = self.model.encode(torch.cat([batch.query, batch.reference])).chunk(2)
            logits, query_tokens, reference_tokens = self.model.fuse_with_tokens(query, reference)
            for shift in _shifts(others):
                rolled = batch.uuids[shift:] + batch.uuids[:shift]
                # A picture that is there twice is no negative of its copy.
                rows = [i for i, (own, other) in enumerate(zip(batch.uuids, rolled, strict=True)) if own != other]
                partners = [(row + shift) % len(rolled) for row in rows]
                unlike.append(self.model.fuse(query[rows], reference[partners]))
        if config.copynce_weight == 0:
            query_tokens, reference_tokens = query_tokens.detach(), reference_tokens.detach()
        positive = batch.positive.float()
        every = torch.cat([logits, *unlike])
        copied = F.pad(positive, (0, len(every) - len(positive)))
        bce = F.binary_cross_entropy_with_logits(every, copied)
        copynce = self.copynce(
            query_tokens, reference_tokens, batch.query_to_reference, batch.reference_to_query, batch.traced
        )
        copynce = copynce * _part_of_ranks(batch.traced)
        # A part of weight 0 stays in the sum: DDP wants a gradient, if only of zero, for every parameter.
        total = config.copynce_weight * copynce + config.bce_weight * bce
        measures = {
            "copynce": copynce,
            "bce": bce,
            "accuracy": ((every > 0) == (copied > 0)).float().mean(),
            "positives": copied.mean(),
        }
        if watch:
            measures |= watch_patches(query_tokens, reference_tokens, batch, self.copynce.settings)
        return total, {name: value.detach() for name, value in measures.items()}

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing is learnt beside the model."""

    def facts(self) -> dict[str, float]:
        return {}


def _shifts(count: int) -> list[int]:
    """1, -1, 2, -2, ..."""
    return [(i // 2 + 1) * (-1 if i % 2 else 1) for i in range(count)]


def _part_of_ranks(flags: Tensor) -> Tensor:
    """How many of ``flags`` (bool) are true here, by the mean of that number over the ranks (0 by 0 is 0).

    A rank's mean over its flagged pairs, times this, averaged over the ranks, is the mean over all of them: also where
    ranks hold different numbers, as of pairs whose pixels are not known. One process has 1.
    """
    count = flags.sum().float()
    if not (dist.is_available() and dist.is_initialized()):
        return torch.ones_like(count)
    total = count.clone()
    dist.all_reduce(total)
    return count * dist.get_world_size() / total.clamp_min(1)
