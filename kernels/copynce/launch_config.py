"""How the CopyNCE kernels are launched: settings by width, sizes as constants, and the limits of both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGEST_PATCHES = 1024  # a block of rows holds all columns: forward in registers, backward in shared memory
LARGEST_PATCH_SIZE = 181  # the counts of a larger patch would overflow int16
_SMALLEST_KEPT = 64  # patches; with fewer a launch costs more than its products, and fewer errors average out


class Config(NamedTuple):
    """Launch settings of one kernel for one width class."""

    rows: int
    channels: int
    warps: int
    stages: int
    chunk: int = 0  # columns that backward makes at a time; forward holds the products of all


# By columns padded to a power of two. Chosen from compiled resources (benchmarks.kernels --aot): the largest row block
# without spills, since each block reads the whole other picture from L2, and 64 rows are what wgmma needs. Backward up
# to 512 columns: chunks of so few registers that two blocks share a multiprocessor of an H100, where one alone mostly
# waits (docs/kernels.md, also on what was timed, and in which form).
FORWARD = {256: Config(64, 64, 8, 3), 512: Config(32, 64, 8, 2), 1024: Config(16, 32, 8, 2)}
BACKWARD = {256: Config(64, 64, 8, 2, 32), 512: Config(32, 32, 8, 2, 64), 1024: Config(32, 16, 8, 2, 64)}
# Float32 tokens: twice the bytes a tile, and three tf32 products each, for the accuracy of float32.
FORWARD_FLOAT32 = {256: Config(32, 32, 8, 2), 512: Config(16, 16, 8, 2), 1024: Config(16, 16, 16, 1)}
BACKWARD_FLOAT32 = {256: Config(16, 32, 8, 1, 64), 512: Config(16, 16, 8, 1, 64), 1024: Config(16, 16, 8, 1, 64)}


def forward_config(tokens: Tensor, width: int, mode: int) -> Config:
    """Settings of forward for ``tokens`` and so many columns, a power of two; ``mode``: POWER of the kernels."""
    config = _config(FORWARD, FORWARD_FLOAT32, tokens, width)
    if mode == 0 and tokens.dtype.itemsize == 2:  # the gather of powers takes as many registers again
        config = config._replace(rows=max(16, config.rows // 2))
    return config


def backward_config(tokens: Tensor, width: int) -> Config:
    """Settings of backward for ``tokens`` and so many columns, a power of two."""
    return _config(BACKWARD, BACKWARD_FLOAT32, tokens, width)


def _config(half: dict[int, Config], single: dict[int, Config], tokens: Tensor, width: int) -> Config:
    return (single if tokens.dtype.itemsize == 4 else half)[max(256, width)]


def keeps_cosines(query: Tensor, reference: Tensor) -> bool:
    """True where the forward leaves int16 cosines to backward: tokens of 16 bits, and enough of them."""
    return query.dtype.itemsize == 2 and min(query.shape[1], reference.shape[1]) >= _SMALLEST_KEPT


def fits(query_tokens: Tensor, reference_tokens: Tensor, patch_size: int) -> bool:
    """True where the kernels take these sizes, whatever the device."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    patches = max(query_tokens.shape[1], reference_tokens.shape[1])
    return patches <= LARGEST_PATCHES and patch_size <= LARGEST_PATCH_SIZE and query_tokens.dtype in dtypes


def strides(query: Tensor, reference: Tensor) -> dict[str, Any]:
    """Elements from pair to pair and from token to token; channels are contiguous."""
    return {
        "query_stride_b": query.stride(0),
        "query_stride_l": query.stride(1),
        "reference_stride_b": reference.stride(0),
        "reference_stride_l": reference.stride(1),
    }


def sizes(query: Tensor, reference: Tensor, query_counts: Tensor, reference_counts: Tensor) -> dict[str, Any]:
    """Sizes that the kernels are compiled for."""
    return {
        "LQ": query.shape[1],
        "LR": reference.shape[1],
        "SQ": reference_counts.shape[2],
        "SR": query_counts.shape[2],
        "D": query.shape[2],
    }
