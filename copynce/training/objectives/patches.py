"""What a training's log watches of patches: how many are copied, how sharp their affinity is, whether it is right.

Of the query patches of a batch's copies whose pixels were traced, as sums and what they are sums over, so that a mean
can be taken over batches and ranks:

    traced_patches             share of the patches that are copied: of which a pixel has a source
    prior_mass                 sum_j w_ij, the weight that CopyNCE gives a patch (``copynce.kernels``)
    affinity_entropy           E_i = -sum_j p_ij log p_ij in nats (eq. 10), p the softmax of eq. 6, of copied patches
    affinity_entropy_uncopied  the same of the others: copied patches should have the lower one
    patch_retrieval            share of the copied patches whose nearest reference patch shares a pixel with them

Shapes: B pairs, Lq and Lr patches of query and reference, D channels.
Cost: a few [16, Lq, Lr] matrices at a time, and no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from copynce.kernels.patch_overlap_reference import copied_patches, overlap_counts_reference, overlap_prior_reference
from copynce.losses.affinity import affinity, affinity_entropy
from copynce.losses.settings import CopyNCESettings
from dali_pipelines import PairBatch

_AT_ONCE = 16  # pairs


@torch.no_grad()
def watch_patches(
    query_tokens: Tensor, reference_tokens: Tensor, batch: PairBatch, settings: CopyNCESettings
) -> dict[str, Tensor]:
    """The numbers above by name, each float32 [2]: a sum, and over how many patches.

    ``query_tokens`` [B, Lq, D], ``reference_tokens`` [B, Lr, D]: floating point, those that CopyNCE compares; of pairs
    that are no copies, or not traced, they may hold anything. ``batch`` has the tables and flags of the pairs.
    """
    with torch.autocast(query_tokens.device.type, enabled=False):
        found = list(_of_some(query_tokens, reference_tokens, batch, settings))
    return {name: torch.stack([one[name] for one in found]).sum(0) for name in found[0]}


def _of_some(
    query_tokens: Tensor, reference_tokens: Tensor, batch: PairBatch, settings: CopyNCESettings
) -> Iterator[dict[str, Tensor]]:
    columns = query_tokens, reference_tokens, batch.query_to_reference, batch.positive & batch.traced
    for query, reference, table, copies in zip(*(column.split(_AT_ONCE) for column in columns), strict=True):
        counts = overlap_counts_reference(table, settings.patch_size, batch.reference_to_query.shape[1:])
        every = copies[:, None].expand(counts.shape[:2])
        copied = copied_patches(counts) & every
        affinities = affinity(query, reference, settings.temperature)
        entropy = affinity_entropy(affinities)
        nearest = affinities.argmax(-1, keepdim=True)
        yield {
            "traced_patches": _sum_over(copied, every),
            "prior_mass": _sum_over(overlap_prior_reference(counts, settings.gamma, settings.prior).sum(-1), every),
            "affinity_entropy": _sum_over(entropy, copied),
            "affinity_entropy_uncopied": _sum_over(entropy, every & ~copied),
            "patch_retrieval": _sum_over(counts.gather(2, nearest).squeeze(2) > 0, copied),
        }


def _sum_over(values: Tensor, counted: Tensor) -> Tensor:
    """The sum of ``values`` [B, Lq] where ``counted``, and how many these are."""
    return torch.stack([torch.where(counted, values.float(), 0).sum(), counted.float().sum()])
