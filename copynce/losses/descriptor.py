"""Losses on the descriptors of a batch of pairs: InfoNCE and KoLeo, with columns gathered from all ranks.

Shapes: B pairs of this rank, W ranks of the default process group, D dimensions. Rows are this rank's 2B features,
queries then references; columns are the 2BW features of all ranks in rank order. Features are normalised here; all is
computed in float32 (float64 if the features are). Every rank must hold the same number of pairs.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from copynce.losses.settings import Gather, check_word

_OWN_COSINE = -1.0  # a feature's cosine to itself: the least possible, yet kept in the denominator
_SMALLEST_SQUARED_DISTANCE = 1e-6


def info_nce(
    query: Tensor,
    reference: Tensor,
    log_scale: Tensor,
    *,
    positive: Tensor | None = None,
    gather: Gather = "differentiable",
) -> Tensor:
    """InfoNCE over all features: ``mean_i -log(exp(s c_i+) / sum_j exp(s c_ij))``, ``s = exp(log_scale)``, a scalar.

    Query i's positive is reference i and the other way round; a feature's cosine to itself is set to -1, not removed.
    The mean is over the features of positive pairs; those of other pairs are columns only, to be pushed away from.
    Without a positive pair the loss is 0 and its gradients are 0.

    Any finite log scale will do, also where ``s`` itself exceeds float32 (from 88.73 on): loss and gradients follow
    their float64 twin as far as float32 cosines can tell two columns apart. Where the true value exceeds float32 (a
    column nearer than the positive, times such an ``s``), it is infinite, and gradients may then be NaN.

    Args:
        query: [B, D] floating point, B at least 1.
        reference: [B, D], same dtype and device.
        log_scale: scalar tensor, usually a parameter that starts at ``INITIAL_LOG_SCALE``.
        positive: [B] bool, the pairs whose query is a copy of its reference; all by default. Given on every rank or
            on none.
        gather: where a process group is initialised, "differentiable" takes all ranks' features as columns and sends
            gradients back to them, so that averaged gradients equal those of one large batch; "local_gradient" treats
            the other ranks' features as constants, as the released code does.

    Raises:
        TypeError: an argument is no tensor or of the wrong dtype.
        ValueError: shapes disagree or gather is unknown.

    >>> features = torch.eye(2)  # rows see cosines -1, 0, 1, 0 at scale 1
    >>> float(info_nce(features, features, torch.tensor(0.0)))
    0.626...
    """
    _check(query, reference, positive, gather)
    if not isinstance(log_scale, Tensor) or log_scale.ndim != 0 or not log_scale.is_floating_point():
        raise TypeError(f"log_scale must be a floating scalar tensor, got {_describe(log_scale)}")
    dtype = _working_dtype(query)
    query, reference = (_TimesExponential.apply(side.to(dtype), log_scale) for side in (query, reference))
    cosines, own, partner = _cosines(query, reference, gather)
    losses = _RowLosses.apply(cosines.scatter(1, own[:, None], _OWN_COSINE), partner, log_scale)
    if positive is None:
        return losses.mean()
    rows = positive.repeat(2)
    return losses.where(rows, 0).sum() / _mean_count(rows, gather)


def koleo(
    query: Tensor, reference: Tensor, *, positive: Tensor | None = None, gather: Gather = "differentiable"
) -> Tensor:
    """KoLeo: ``-mean_i log sqrt(max(2 - 2 max_j c_ij, 1e-6))``, j any column but i and its positive; a scalar.

    Arguments and errors as in ``info_nce``; the views of a pair that is not positive leave each other like any two. A
    single pair has no other feature and is a ValueError.

    >>> float(koleo(torch.eye(2), torch.eye(2)))  # nearest others at distance sqrt(2)
    -0.346...
    """
    _check(query, reference, positive, gather)
    cosines, own, partner = _cosines(query, reference, gather)
    if cosines.shape[1] == 2:
        raise ValueError("koleo needs at least 2 pairs over all ranks: a single pair has no neighbours to leave")
    if positive is not None:
        partner = partner.where(positive.repeat(2), own)
    excluded = torch.stack((own, partner), 1)
    nearest = cosines.scatter(1, excluded, -torch.inf).max(1).values
    return -(2 - 2 * nearest).clamp_min(_SMALLEST_SQUARED_DISTANCE).log().mean() / 2


def _cosines(query: Tensor, reference: Tensor, gather: Gather) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines [2B, 2BW] of this rank's features to all, and the columns of each row and its pair, int64 [2B]."""
    with torch.autocast(query.device.type, enabled=False):
        local = F.normalize(torch.cat((query, reference)).to(_working_dtype(query)), dim=-1)
        rows = len(local)
        columns, rank = local, 0
        if dist.is_available() and dist.is_initialized():
            rank = dist.get_rank()
            columns = _GatherRanks.apply(local) if gather == "differentiable" else _gather_constants(local, rank)
        cosines = local @ columns.T
    own = torch.arange(rows, device=local.device)
    return cosines, own + rank * rows, (own + rows // 2) % rows + rank * rows


def _working_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _times_exponential(values: Tensor, log_scale: Tensor) -> Tensor:
    """``values * exp(log_scale)``, rounded twice, wherever the product is in range: the factor need not be.

    The factor is m * 2^(4 q), 1 <= m < 16: 2^q four times over neither overflows nor underflows before the product.
    """
    largest = -4 * round(math.log2(torch.finfo(values.dtype).tiny))  # beyond, all but 0 overflows or vanishes
    exact = log_scale.detach().double().clamp(-largest * math.log(2), largest * math.log(2))
    quarter = (exact / (4 * math.log(2))).floor().clamp(-largest / 4, largest / 4)
    mantissa = (exact - 4 * math.log(2) * quarter).exp().to(values.dtype)
    power = quarter.exp2().to(values.dtype)
    return values * mantissa * power * power * power * power


class _TimesExponential(torch.autograd.Function):
    """Identity whose gradient is multiplied by ``exp(log_scale)``.

    InfoNCE's gradient to a feature is that factor times a number in range, or 0 where columns are equal. So the factor
    comes last, when these have cancelled.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, log_scale: Tensor) -> Tensor:
        ctx.save_for_backward(log_scale)
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _times_exponential(gradient, *ctx.saved_tensors), None


class _RowLosses(torch.autograd.Function):
    """Cross-entropies [N] of cosines [N, M] times ``s = exp(log_scale)`` with the column ``partner`` [N] of each row.

    The gradient to the cosines lacks the factor s, see ``_TimesExponential``. With y = s (c - max c), at most 0, and
    rest = the sum of exp(y) over all columns but the largest, the loss is log(1 + rest) - y of the partner: nothing
    overflows and no digits cancel.
    """

    @staticmethod
    def forward(ctx: Any, cosines: Tensor, partner: Tensor, log_scale: Tensor) -> Tensor:
        largest, nearest = cosines.max(1, keepdim=True)  # one of equals: the others count in rest
        logits = _times_exponential(cosines - largest, log_scale)
        exponentials = logits.exp()
        rest = exponentials.scatter(1, nearest, 0).sum(1, keepdim=True)
        column = partner[:, None]
        ctx.save_for_backward(logits, exponentials / (1 + rest), column, log_scale)
        return (rest.log1p() - logits.gather(1, column)).squeeze(1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, Tensor]:
        logits, probabilities, column, log_scale = ctx.saved_tensors
        others = probabilities.scatter(1, column, 0)
        gradient = others.scatter(1, column, -others.sum(1, keepdim=True))  # probability - 1 without its rounding
        differences = logits - logits.gather(1, column)
        along = torch.where(others == 0, 0, others * differences).sum(1)  # 0 * inf is 0 here
        along = torch.where(upstream == 0, 0, along * upstream).sum()
        return gradient * upstream[:, None], None, along.to(log_scale.dtype)


def _mean_count(rows: Tensor, gather: Gather) -> Tensor:
    """How many of ``rows`` (bool) count, at least 1; with "differentiable" the mean over ranks of that number.

    Each rank's sum over this mean, averaged over the ranks, is the mean over the rows of one large batch.
    """
    count = rows.sum().float()
    if gather == "differentiable" and dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        return count.clamp_min(1) / dist.get_world_size()
    return count.clamp_min(1)


class _GatherRanks(torch.autograd.Function):
    """Features of all ranks in rank order; backward sums over ranks what each rank's loss asks of a feature."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.rows = len(local)
        return torch.cat(_all_gather(local))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.rows
        return total[start : start + ctx.rows]


def _gather_constants(local: Tensor, rank: int) -> Tensor:
    """Features of all ranks in rank order, constants but for this rank's own."""
    features = _all_gather(local.detach())
    features[rank] = local
    return torch.cat(features)


def _all_gather(local: Tensor) -> list[Tensor]:
    features = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(features, local.contiguous())
    return features


def _check(query: Tensor, reference: Tensor, positive: Tensor | None, gather: str) -> None:
    for name, tensor in (("query", query), ("reference", reference)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if query.ndim != 2 or query.shape != reference.shape or 0 in query.shape:
        raise ValueError(
            "query and reference must be descriptors of one shape [B, D] with B and D at least 1, "
            f"got {list(query.shape)} and {list(reference.shape)}"
        )
    if not query.is_floating_point() or query.dtype != reference.dtype:
        raise TypeError(f"query and reference must share one floating dtype, got {query.dtype} and {reference.dtype}")
    if query.device != reference.device:
        raise ValueError(f"query and reference must be on one device, got {query.device} and {reference.device}")
    if positive is not None:
        if not isinstance(positive, Tensor) or positive.dtype != torch.bool:
            raise TypeError(f"positive must be a bool tensor, got {_describe(positive)}")
        if positive.shape != query.shape[:1] or positive.device != query.device:
            raise ValueError(
                f"positive must be [{len(query)}] on {query.device}, one flag a pair, "
                f"got {list(positive.shape)} on {positive.device}"
            )
    check_word("gather", gather, get_args(Gather))


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
