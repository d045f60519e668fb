"""CopyNCE on the CPU as registered operators, forward and backward; ``copynce.losses.cpu`` states the equations.

Forward leaves G [B, Lq, Lr], patches with a copy first, and the tokens' two scalings for backward; packed tokens,
priors and softmaxes live for one sample, in cache. ``torch.get_num_threads()`` threads, the caller one of them, each
take a few samples from first to last, products included, then the next few that nobody has begun: no thread waits for
another before the end, and a slower one takes fewer. Products are made in tiles where those suit the processor; else
PyTorch makes them, of all patches in raster order.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from copynce.losses.cpu.passes import backward_samples, forward_samples
from copynce.losses.cpu.prior import grid_of
from copynce.losses.cpu.tiles import TILES_PAY, WIDTH
from copynce.processor import multiplies_bfloat16

_CHUNK_BYTES = 4 << 20  # tokens and affinities that a thread works on at a time: about what it has of the caches

Result = TypeVar("Result")


@torch.library.custom_op("copynce::copynce_cpu", mutates_args=(), device_types="cpu")
def copynce_cpu_forward(
    query_tokens: Tensor,
    reference_tokens: Tensor,
    query_to_reference: Tensor,
    reference_to_query: Tensor,
    traced: Tensor,
    patch_size: int,
    temperature: float,
    gamma: float,
    released: bool,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Batch loss, float32 scalar, and what backward needs.

    That is G [B, Lq, at least Lr] with the patches of both sides in order; these orders [B, Lq] and [B, Lr], int32; how
    many patches of either side come first [B, 2], int32; and the tokens' scalings, in order, [B, Lq] and [B, Lr]. All
    are empty without ``needs_gradient``, and unwritten for pairs that are not traced. Arguments as in ``copynce_loss``;
    ``traced`` bool [B] is its ``active``.
    """
    batch = len(query_tokens)
    multiplied = not _in_tiles(query_tokens.dtype)
    kept = _kept(query_tokens, reference_tokens, batch if needs_gradient else 0)
    loss = np.zeros(batch)
    weight = 1.0 / max(int(traced.sum()), 1)
    tables = query_to_reference.contiguous().numpy(), reference_to_query.contiguous().numpy()
    grids = tuple(grid_of((table.shape[1], table.shape[2]), patch_size) for table in tables)

    def run(chunk: slice) -> int:
        query, reference = (tokens[chunk].float().contiguous() for tokens in (query_tokens, reference_tokens))
        if needs_gradient:
            affinity, *others = (tensor[chunk] for tensor in kept)
        else:
            affinity, *others = _kept(query_tokens, reference_tokens, len(query))
        if multiplied:
            torch.bmm(query, reference.transpose(1, 2), out=affinity)
        arguments: tuple[Any, ...] = (
            multiplied,
            affinity.numpy(),
            query.numpy(),
            reference.numpy(),
            *(table[chunk] for table in tables),
            *grids,
            patch_size,
            np.float32(1 / temperature),
            float(gamma),
            released,
            weight,
            needs_gradient,
            loss[chunk],
            *(other.numpy() for other in others),
        )
        bad = forward_samples(*arguments)
        return chunk.start + bad if bad >= 0 else -1

    reports = _on_all_threads(run, traced, query_tokens, reference_tokens)
    bad = next((report for report in reports if report >= 0), -1)
    if bad >= 0:
        raise ValueError(
            f"tables of sample {bad} must hold -1 or a pixel index of the other picture, below "
            f"{tables[1][0].size} in query_to_reference and {tables[0][0].size} in reference_to_query"
        )
    return torch.tensor(loss.sum(), dtype=torch.float32), *kept


@copynce_cpu_forward.register_fake
def _(
    query_tokens: Tensor, reference_tokens: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, needs_gradient = others
    loss = query_tokens.new_empty((), dtype=torch.float32)
    return loss, *_kept(query_tokens, reference_tokens, query_tokens.shape[0] if needs_gradient else 0)


@torch.library.custom_op("copynce::copynce_cpu_backward", mutates_args=(), device_types="cpu")
def copynce_cpu_backward(
    upstream: Tensor,
    affinity: Tensor,
    query_order: Tensor,
    reference_order: Tensor,
    copied: Tensor,
    radial_query: Tensor,
    radial_reference: Tensor,
    query_tokens: Tensor,
    reference_tokens: Tensor,
    traced: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the loss to both token tensors, in their dtype, times the scalar ``upstream``."""
    scale = float(upstream)
    tokens = query_tokens, reference_tokens
    gradients = torch.empty_like(query_tokens), torch.empty_like(reference_tokens)
    if not traced.all():
        for gradient in gradients:
            gradient[~traced] = 0
    in_tiles = _in_tiles(query_tokens.dtype)

    def run(chunk: slice) -> None:
        query, reference = (side[chunk].float().contiguous() for side in tokens)
        # Written once, in cache, where the gradients are float32 in a row.
        targets = [gradient[chunk] for gradient in gradients]
        results = [
            target if target.dtype == torch.float32 and target.is_contiguous() else torch.empty_like(side)
            for target, side in zip(targets, (query, reference), strict=True)
        ]
        kept = [other[chunk] for other in (query_order, reference_order, copied, radial_query, radial_reference)]
        matrix = affinity[chunk]
        if in_tiles:
            arrays = [tensor.numpy() for tensor in (matrix, query, reference, *kept)]
            arguments: tuple[Any, ...] = (*arrays, np.float32(scale), *(result.numpy() for result in results))
            backward_samples(*arguments)
        else:  # patches are in raster order
            for result, own, other, product, radial in (
                (results[0], query, reference, matrix, kept[-2]),
                (results[1], reference, query, matrix.transpose(1, 2), kept[-1]),
            ):
                torch.mul(own, radial[..., None] * -scale, out=result)
                result.baddbmm_(product, other, alpha=scale)
        for target, result in zip(targets, results, strict=True):
            if result is not target:
                target.copy_(result)

    _on_all_threads(run, traced, query_tokens, reference_tokens)
    return gradients


@copynce_cpu_backward.register_fake
def _(upstream: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    *_, query_tokens, reference_tokens, _ = others
    return torch.empty_like(query_tokens), torch.empty_like(reference_tokens)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query_tokens, reference_tokens, _, _, traced = inputs[:5]
    _, *kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*kept, query_tokens, reference_tokens, traced)


def _backward(ctx: Any, upstream: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return (*copynce_cpu_backward(upstream, *ctx.saved_tensors), *(None,) * 8)


copynce_cpu_forward.register_autograd(_backward, setup_context=_save_for_backward)


def _in_tiles(dtype: torch.dtype) -> bool:
    """Whether products of tokens of this dtype are made in tiles; else PyTorch makes them."""
    return TILES_PAY and not (dtype == torch.bfloat16 and multiplies_bfloat16())


def _kept(
    query_tokens: Tensor, reference_tokens: Tensor, pairs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What forward leaves for backward, for so many pairs, unset: see ``copynce_cpu_forward``."""
    query_patches, reference_patches = query_tokens.shape[1], reference_tokens.shape[1]
    pitch = reference_patches
    if _in_tiles(query_tokens.dtype):
        pitch = (pitch + WIDTH - 1) // WIDTH * WIDTH  # not panels_for: it may be a symbol of torch.compile

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return query_tokens.new_empty((pairs, *shape), dtype=dtype)

    return (
        empty(query_patches, pitch),
        empty(query_patches, dtype=torch.int32),
        empty(reference_patches, dtype=torch.int32),
        empty(2, dtype=torch.int32),
        empty(query_patches),
        empty(reference_patches),
    )


@functools.cache
def _helpers(number: int) -> ThreadPoolExecutor:
    """So many threads, kept for the next call: beside busy ones they take long to start, and to end."""
    return ThreadPoolExecutor(number, "copynce-loss")


os.register_at_fork(after_in_child=_helpers.cache_clear)  # threads stay behind in the parent


def _on_all_threads(
    run: Callable[[slice], Result], traced: Tensor, query_tokens: Tensor, reference_tokens: Tensor
) -> list[Result]:
    """Results of ``run`` on each chunk of traced samples, in order, worked off by the caller and helping threads."""
    threads = torch.get_num_threads()
    chunks = list(_chunks(traced, query_tokens, reference_tokens, threads))
    waiting = deque(enumerate(chunks))
    results: dict[int, Result] = {}

    def work() -> None:
        with torch.inference_mode():  # a state of the thread, as autocast; nothing here is recorded
            while True:
                try:
                    index, chunk = waiting.popleft()
                except IndexError:
                    return
                results[index] = run(chunk)

    with _exact_products(query_tokens.dtype):
        if threads == 1 or len(chunks) < 2:
            work()
        else:
            torch.set_num_threads(1)  # of each product: the threads share out samples; helpers start from this
            try:
                helping = [_helpers(threads - 1).submit(work) for _ in range(min(threads, len(chunks)) - 1)]
                try:
                    work()
                finally:
                    begun = [helper for helper in helping if not helper.cancel()]  # none has to come for nothing
                    wait(begun)
                for helper in begun:
                    helper.result()
            finally:
                torch.set_num_threads(threads)
    return [results[index] for index in range(len(chunks))]


def _chunks(traced: Tensor, query_tokens: Tensor, reference_tokens: Tensor, threads: int) -> Iterator[slice]:
    """Runs of neighbouring traced samples that fit into the cache, ever shorter, so that no thread waits at the end."""
    query_patches, channels = query_tokens.shape[1:]
    reference_patches = reference_tokens.shape[1]
    sample = 4 * (channels * (query_patches + reference_patches) + query_patches * reference_patches)
    flags = traced.tolist()
    left = sum(flags)
    start = 0
    for index, flag in enumerate([*flags, False]):
        longest = max(1, min(_CHUNK_BYTES // sample, left // (2 * threads)))
        if start < index and (not flag or index - start >= longest):
            yield slice(start, index)
            left -= index - start
            start = index
        if not flag:
            start = index + 1


@contextlib.contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Float32 products, untouched by autocast; of bfloat16 tokens in the processor's bfloat16 units where it has any.

    Those multiply bfloat16 and add in float32: exact for the affinity of bfloat16 tokens, and in backward G alone is
    rounded, below the rounding of the bfloat16 gradient itself.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    with torch.autocast("cpu", enabled=False):
        if dtype == torch.bfloat16 and multiplies_bfloat16():
            matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before
