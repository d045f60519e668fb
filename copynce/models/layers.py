"""Layers that timm and torch do not have."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn


class _AllReduceSum(torch.autograd.Function):
    """Sum over the ranks whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total


class BatchNorm(nn.BatchNorm1d):
    """`BatchNorm1d` whose batch is that of all ranks: PyTorch's `SyncBatchNorm` refuses CPU tensors.

    x [B, dim] float32 -> [B, dim]. One process: exactly `BatchNorm1d`. Several: mean and variance over the rows of
    all ranks, which may hold different numbers of rows; gradients flow through them to every rank. Evaluation uses
    the running statistics.
    """

    def forward(self, x: Tensor) -> Tensor:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (self.training and distributed and torch.distributed.get_world_size() > 1):
            if self.training and x.shape[0] < 2:
                raise ValueError(f"training needs at least 2 pictures a side for its BatchNorm, got {x.shape[0]}")
            return super().forward(x)
        # Two sums, not one of squares: E[x^2] - E[x]^2 loses digits where the mean is large.
        totals = _AllReduceSum.apply(torch.cat([x.sum(0), x.new_full((1,), float(x.shape[0]))]))
        count = totals[-1].detach()
        mean = totals[:-1] / count
        var = _AllReduceSum.apply((x - mean).square().sum(0)) / count
        with torch.no_grad():
            assert self.running_mean is not None, "made with running statistics"
            assert self.running_var is not None, "made with running statistics"
            assert self.num_batches_tracked is not None, "made with running statistics"
            assert self.momentum is not None, "made with a fixed momentum"
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), self.momentum)
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


class LinearHead(nn.Module):
    """Class token [B, C] -> linear without bias -> BatchNorm -> unit vector [B, dim], in float32."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, dim, bias=False)
        self.bn = BatchNorm(dim)
        nn.init.xavier_normal_(self.fc1.weight)

    def forward(self, cls_token: Tensor) -> Tensor:
        with torch.autocast(cls_token.device.type, enabled=False):
            return F.normalize(self.bn(self.fc1(cls_token.float())), dim=-1)
