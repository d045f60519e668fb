"""Patch affinity of a query to a reference, and its entropy.

Shapes: `Lq`, `Lr` patches of query and reference, `C` channels; leading dimensions (pairs) are kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def affinity(query_tokens: Tensor, reference_tokens: Tensor, temperature: float = 1 / 16) -> Tensor:
    """p_ij = softmax_j(cos(query_i, reference_j) / temperature), float32 [..., Lq, Lr], rows sum to 1.

    query_tokens [..., Lq, C], reference_tokens [..., Lr, C]: float, any length; temperature > 0. This is the p of the
    CopyNCE loss (equation 6). Raises ValueError where shapes or temperature do not fit.

    >>> tokens = torch.eye(2)
    >>> affinity(tokens, tokens, temperature=0.5).diagonal()
    tensor([0.8808, 0.8808])
    """
    if query_tokens.ndim < 2 or reference_tokens.ndim != query_tokens.ndim:
        raise ValueError(
            "query_tokens and reference_tokens must be [..., L, C] with as many dimensions each, "
            f"got {list(query_tokens.shape)} and {list(reference_tokens.shape)}"
        )
    if query_tokens.shape[:-2] != reference_tokens.shape[:-2] or query_tokens.shape[-1] != reference_tokens.shape[-1]:
        raise ValueError(
            "query_tokens and reference_tokens must agree in pairs and channels, "
            f"got {list(query_tokens.shape)} and {list(reference_tokens.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    query = F.normalize(query_tokens.float(), dim=-1)
    reference = F.normalize(reference_tokens.float(), dim=-1)
    return torch.softmax(query @ reference.transpose(-1, -2) / temperature, dim=-1)


def affinity_entropy(affinities: Tensor) -> Tensor:
    """E_i = -sum_j p_ij log p_ij (equation 10) in nats, [..., Lq] from affinities [..., Lq, Lr].

    Between 0 (one reference patch takes all) and log Lr (uniform). A low value marks a patch that was copied.
    """
    return torch.special.entr(affinities).sum(-1)
