"""CopyNCE: cross-entropy of patch affinities under the overlap prior, both directions (eq. 6 and 7 of the paper).

For one pair, with cosines ``c_ij`` of query patch i and reference patch j,

    p_ij = softmax_j(c_ij / tau),   l(q -> r) = -(1 / N_q) sum_ij w_ij log p_ij,   loss = (l(q -> r) + l(r -> q)) / 2

``w`` is the prior of ``patch_overlap_reference``, a constant to the gradient. ``N_q`` is the number of all patches
("released") or of the patches with any source ("paper"; a pair without any has loss 0). The batch loss is the sum over
traced pairs (whose pixels are known) over their number; 0 if there is none.

The cosine form, a rival of the paper's ablations, only pulls: ``l(q -> r) = (1 / N_q) sum_ij w_ij (1 - c_ij)``.

Shapes: B pairs, Lq and Lr patches of query and reference, D channels.
Cost of the twin: three [B, Lq, Lr] matrices and a normalised copy of the tokens are kept for backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..patch_overlap_reference import copied_patches, overlap_counts_reference, overlap_prior_reference


def copynce_reference(
    query_tokens: Tensor,
    reference_tokens: Tensor,
    query_to_reference: Tensor,
    reference_to_query: Tensor,
    traced: Tensor,
    *,
    patch_size: int,
    temperature: float,
    gamma: float,
    prior: str,
    form: str = "nce",
) -> Tensor:
    """CopyNCE loss of a batch in plain PyTorch, scalar in float32 (float64 if the tokens are).

    ``query_tokens`` [B, Lq, D], ``reference_tokens`` [B, Lr, D]: float, of any length, normalised here.
    ``query_to_reference`` [B, Hq, Wq], ``reference_to_query`` [B, Hr, Wr]: int32, pixel of the other picture or -1.
    ``traced`` [B]: bool; the tokens of the other pairs are not used and receive a gradient of exactly 0.
    ``form``: "nce", or "cosine", which has no temperature.
    """
    dtype = torch.float64 if query_tokens.dtype == torch.float64 else torch.float32
    # Tokens of the others are replaced, not multiplied by 0 at the end: a NaN in them must not reach the batch.
    query = torch.where(traced[:, None, None], query_tokens, 1).to(dtype)
    reference = torch.where(traced[:, None, None], reference_tokens, 1).to(dtype)
    cosines = F.normalize(query, dim=-1) @ F.normalize(reference, dim=-1).transpose(1, 2)
    if form == "cosine":
        scores = [cosines - 1, (cosines - 1).transpose(1, 2)]
    else:
        scores = [(cosines / temperature).log_softmax(-1), (cosines / temperature).log_softmax(1).transpose(1, 2)]
    (_, *query_shape), (_, *reference_shape) = query_to_reference.shape, reference_to_query.shape
    settings = patch_size, gamma, prior
    forward = _direction(scores[0], query_to_reference, reference_shape, *settings)
    backward = _direction(scores[1], reference_to_query, query_shape, *settings)
    return ((forward + backward) / 2 * traced).sum() / traced.sum().clamp_min(1)


def _direction(
    scores: Tensor, table: Tensor, target_shape: Sequence[int], patch_size: int, gamma: float, prior: str
) -> Tensor:
    """Loss of one direction for each pair, [B]; ``scores`` [B, L, M] (log p) with the table's patches as rows."""
    counts = overlap_counts_reference(table, patch_size, target_shape)
    weights = overlap_prior_reference(counts, gamma, prior, scores.dtype)
    total = -(weights * scores).sum((1, 2))
    if prior == "released":
        return total / scores.shape[1]
    return total / copied_patches(counts).sum(1).clamp_min(1)
