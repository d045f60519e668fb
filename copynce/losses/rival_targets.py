"""The paper's rival targets (its ablations, Tables 2 and 3): nearest patches instead of the overlap prior.

The rivals' code was not released and the paper states them in a phrase each; where it is silent, this is what they are:

    "feature"   FeatNN: the k patches of the other picture with the largest cosine to the patch's token, no gradient
    "location"  LocNN: the k patches of the other picture whose centres lie nearest to the patch's traced centroid, the
                mean position of those of its pixels that have a source
    "both"      the mean of the two losses: k targets of each kind, at half the weight

Each target of a patch has weight 1/k, or 1/2k (twice that where both kinds name the same patch). As in eq. 6 only
copied patches have targets: a patch without any source has none under any rival, and two unrelated pictures lose
nothing. The paper measures centroids in the original's coordinates; here it is in those of the other picture, which is
the same where that is the original itself. Among equals the first patch in raster order is nearer.

A rival needs no loss of its own. Its targets are again a coordinate table, of patches of n x n pixels for n targets:
column c of a patch comes from its c-th target. The overlap of these tables *is* the rival's weight (gamma 1), in both
forms of the prior and in every implementation of the loss.

Shapes: B pairs, Lq and Lr patches of query and reference, D channels.
Cost: a [B, Lq, Lr] affinity and a sort of its rows for "feature", the same in int64 for "location".
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from copynce.losses.settings import Target


@torch.no_grad()
def rival_tables(
    query_tokens: Tensor,
    reference_tokens: Tensor,
    query_to_reference: Tensor,
    reference_to_query: Tensor,
    patch_size: int,
    target: Target,
    neighbours: int,
) -> tuple[Tensor, Tensor, int]:
    """Tables that stand for a rival's targets, int32 [B, n rows, n columns] in both directions, and their patch size n.

    ``query_tokens`` [B, Lq, D], ``reference_tokens`` [B, Lr, D]: floating point. ``query_to_reference`` [B, Hq, Wq],
    ``reference_to_query`` [B, Hr, Wr]: int32 pixel of the other picture or -1, with patches of ``patch_size`` pixels.
    ``target``: "feature", "location" or "both". ``neighbours``: k, at most as many as the other picture has patches.
    """
    tables = query_to_reference, reference_to_query
    grids = [(table.shape[1] // patch_size, table.shape[2] // patch_size) for table in tables]
    traced = [
        _traced(table, (other.shape[1], other.shape[2]), patch_size)
        for table, other in zip(tables, reversed(tables), strict=True)
    ]
    chosen: list[list[Tensor]] = [[], []]
    if target in ("feature", "both"):
        dtype = torch.float64 if query_tokens.dtype == torch.float64 else torch.float32
        with torch.autocast(query_tokens.device.type, enabled=False):
            query, reference = (F.normalize(tokens.to(dtype), dim=-1) for tokens in (query_tokens, reference_tokens))
            away = -(query @ reference.transpose(1, 2))
        for kinds, distance in zip(chosen, (away, away.transpose(1, 2)), strict=True):
            kinds.append(_nearest(distance, neighbours))
    if target in ("location", "both"):
        for kinds, (pixels, position), other in zip(chosen, traced, reversed(grids), strict=True):
            kinds.append(_nearest(_squared_distance(pixels, position, other, patch_size), neighbours))
    targets = [torch.cat(kinds, dim=-1) for kinds in chosen]
    size = math.lcm(*(indices.shape[-1] for indices in targets))  # alike but in pictures of fewer than k patches
    query_table, reference_table = (
        torch.where((pixels > 0).view(-1, grid[0], 1, grid[1], 1), _entries(indices, grid, other, size), -1).view(
            -1, grid[0] * size, grid[1] * size
        )
        for indices, (pixels, _), grid, other in zip(targets, traced, grids, reversed(grids), strict=True)
    )
    return query_table, reference_table, size


def _traced(table: Tensor, other_shape: tuple[int, int], patch_size: int) -> tuple[Tensor, Tensor]:
    """Pixels of each patch that have a source, int64 [B, L], and the sum of 2y + 1 and 2x + 1 over these, [B, L, 2].

    ``table`` int32 [B, H, W] indexes a picture of ``other_shape``; an entry outside of it is no source.
    """
    batch, height, width = table.shape
    inside = (table >= 0) & (table < other_shape[0] * other_shape[1])
    entry = torch.where(inside, table, 0).long()
    # Twice the pixel's centre, so that all is exact in integers.
    facts = torch.stack(
        (inside.long(), (entry // other_shape[1] * 2 + 1) * inside, (entry % other_shape[1] * 2 + 1) * inside)
    )
    sums = facts.view(3, batch, height // patch_size, patch_size, width // patch_size, patch_size).sum((3, 5))
    pixels, *position = sums.flatten(2)
    return pixels, torch.stack(position, -1)


def _squared_distance(pixels: Tensor, position: Tensor, other: tuple[int, int], patch_size: int) -> Tensor:
    """Squared distance of traced centroids to the other picture's patch centres, times a factor of the row, [B, L, M].

    ``pixels`` and ``position`` as ``_traced`` returns them; ``other``: rows and columns of the other picture's patches.
    """
    squares = []
    for axis, count in enumerate(other):
        centre = (torch.arange(count, device=pixels.device) * 2 + 1) * patch_size
        squares.append((position[..., axis, None] - pixels[..., None] * centre) ** 2)
    return (squares[0][..., :, None] + squares[1][..., None, :]).flatten(2)


def _nearest(distance: Tensor, neighbours: int) -> Tensor:
    """Columns of the smallest entries of each row, int64 [B, L, min(neighbours, M)], the first among equals."""
    return distance.sort(dim=-1, stable=True).indices[..., :neighbours]


def _entries(indices: Tensor, grid: tuple[int, int], other: tuple[int, int], size: int) -> Tensor:
    """Tables [B, rows, size, columns, size] int32 whose patches show their targets, each in as many pixel columns.

    ``indices`` [B, L, n]: patches of the other picture, whose rows and columns are ``other``; n divides ``size``.
    """
    corner = (indices // other[1] * size * other[1] + indices % other[1]) * size  # the target's first pixel
    columns = corner.repeat_interleave(size // indices.shape[-1], dim=-1).int()
    return columns.view(len(indices), grid[0], 1, grid[1], size).expand(-1, -1, size, -1, -1)
