"""Patch overlap: how many pixels of each patch come from each patch of the other picture, and the prior made of them.

``n_ij`` is the number of pixels of patch i whose entry in the coordinate table lies in patch j of the other picture,
``n_i0`` the number with no source; ``n_i0 + sum_j n_ij = P`` (eq. 4 of the paper is ``n_ij / P``). The prior is

    released:  w_ij = n_ij^gamma / (n_i0^gamma + sum_k n_ik^gamma)     mass below 1 for partly copied patches
    paper:     w_ij = n_ij^gamma / sum_k n_ik^gamma                    mass 1 for each patch with any source (eq. 5)

with ``0^0 = 1``, so that gamma 0 gives a constant (in "paper" only to patches with any source), and gamma infinity the
largest bins in equal shares. Each row is divided by its largest bin before it is raised to gamma: no power underflows.

Shapes: B pairs, H x W pixels of the table, L its patches, M patches of the other picture, P pixels a patch.
Cost of the twin: O(B H W) index work and a [B, L, M + 1] tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def patch_of_pixel(height: int, width: int, patch_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Patch index of every pixel, int64 [height * width], both in row-major order."""
    row = torch.arange(height, device=device) // patch_size
    column = torch.arange(width, device=device) // patch_size
    return (row[:, None] * (width // patch_size) + column).flatten()


def overlap_counts_reference(table: Tensor, patch_size: int, target_shape: Sequence[int]) -> Tensor:
    """Pixels that each patch shares with each patch of the other picture, int32 [B, L, M + 1].

    ``table`` [B, H, W]: int32 pixel index into the other picture, -1 where there is no source. ``target_shape``: height
    and width of the other picture in pixels. The last column counts pixels without source; rows sum to patch_size ** 2.
    """
    batch, height, width = table.shape
    target_height, target_width = target_shape
    patch_of = patch_of_pixel(target_height, target_width, patch_size, table.device)
    bins = (target_height // patch_size) * (target_width // patch_size) + 1
    target = torch.where(table >= 0, patch_of[table.clamp_min(0).long()], bins - 1)
    target = target.view(batch, height // patch_size, patch_size, width // patch_size, patch_size)
    target = target.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    counts = torch.zeros(batch, target.shape[1], bins, dtype=torch.int32, device=table.device)
    return counts.scatter_add_(2, target, torch.ones_like(target, dtype=torch.int32))


def overlap_prior_reference(counts: Tensor, gamma: float, prior: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sharpened prior of eq. 5, ``dtype`` [B, L, M], from ``overlap_counts_reference``'s counts [B, L, M + 1].

    ``gamma``: sharpening exponent in [0, inf]. ``prior``: "released" or "paper", as in the module's docstring.
    """
    bins = counts.to(dtype) if prior == "released" else counts[..., :-1].to(dtype)
    power = (bins / bins.amax(-1, keepdim=True).clamp_min(1)) ** gamma
    weights = power / power.sum(-1, keepdim=True).clamp_min(1)  # the largest bin's power is 1: clamps empty rows only
    if prior == "released":
        return weights[..., :-1]
    return weights * copied_patches(counts)[..., None]


def copied_patches(counts: Tensor) -> Tensor:
    """True for each patch with at least one pixel that has a source, bool [B, L]; ``counts`` int32 [B, L, M + 1]."""
    return counts[..., :-1].any(-1)
