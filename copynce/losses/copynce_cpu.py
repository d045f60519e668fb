"""CopyNCE on the CPU: closed-form gradients around one affinity product forward and two products backward.

With raw tokens Q_i and R_j, their inverse lengths u_i and v_j, ``S_ij = u_i v_j (Q_i . R_j) / tau`` and
``E = exp(S - 1/tau)`` (no running maximum: S is bounded by 1/tau), one matrix gives both softmaxes,

    loss   = (sum_i m_i log sum_j E_ij + sum_j n_j log sum_i E_ij - sum_ij T_ij (S_ij - 1/tau)) / 2
    dS_ij  = (E_ij (m_i / sum_j E_ij + n_j / sum_i E_ij) - T_ij) / 2,      G_ij = u_i v_j dS_ij / tau
    dQ_i   = sum_j G_ij R_j - u_i^2 (sum_j dS_ij S_ij) Q_i                 and the same for R with G transposed,

where T is the sum of both directions' priors, each over its number of patches, and m, n their row masses. Forward
leaves G [B, Lq, Lr] and the two scalings; normalised tokens, priors and softmaxes live for one sample, in cache.
Everything between the products is one Numba pass a sample. ``torch.get_num_threads()`` threads each take a few samples
from first to last, products included: no thread waits for another before the end.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from numba import njit
from torch import Tensor

from kernels.patch_overlap_reference import patch_of_pixel

# exp(S - 1/tau) must stay a normal float32 down to cosine -1, that is exp(-2/tau) > 1e-38.
LARGEST_LOGIT_RANGE = 80.0
_SMALLEST_NORM = 1e-12  # as torch.nn.functional.normalize
_CHUNK_BYTES = 4 << 20  # tokens and affinities that a thread works on at a time: about its share of the caches

Result = TypeVar("Result")

# Sums may be reordered and fused so that they vectorise; NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract", "nsz"}


@njit(nogil=True, cache=True, fastmath=_FAST, inline="always")
def _exp(x: np.float32) -> np.float32:
    """exp(x) for x in [-80, 1], within 2 units in the last place (Cephes' expf); unlike libm's, it vectorises."""
    k = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    y = x - k * np.float32(0.693359375) + k * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * y + np.float32(1.3981999507e-3)
    p = p * y + np.float32(8.3334519073e-3)
    p = p * y + np.float32(4.1665795894e-2)
    p = p * y + np.float32(1.6666665459e-1)
    p = p * y + np.float32(5.0000001201e-1)
    p = p * y * y + y + np.float32(1)
    return p * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(nogil=True, cache=True, fastmath=_FAST)
def _inverse_lengths(tokens: np.ndarray, inverse: np.ndarray) -> None:
    """``inverse`` [L] becomes one over the Euclidean lengths of ``tokens`` [L, D], both float32."""
    for i in range(tokens.shape[0]):
        total = np.float32(0)
        for channel in range(tokens.shape[1]):
            total += tokens[i, channel] * tokens[i, channel]
        inverse[i] = np.float32(1) / max(np.sqrt(total), np.float32(_SMALLEST_NORM))


@njit(nogil=True, cache=True)
def _copied_patches(table: np.ndarray, patch_size: int) -> int:
    """Number of patches with at least one pixel that has a source; table int32 [H, W]."""
    height, width = table.shape
    copied = 0
    for top in range(0, height, patch_size):
        for left in range(0, width, patch_size):
            found = False
            for y in range(top, top + patch_size):
                for x in range(left, left + patch_size):
                    if table[y, x] >= 0:
                        found = True
                        break
                if found:
                    break
            copied += found
    return copied


@njit(nogil=True, cache=True)
def _add_prior(
    table: np.ndarray,
    bin_of: np.ndarray,
    patch_size: int,
    gamma: float,
    released: bool,
    targets: np.ndarray,
    mass: np.ndarray,
) -> bool:
    """Add one direction's prior over its number of patches to ``targets``; its row sums go to ``mass``.

    table int32 [H, W]; bin_of unsigned [1 + pixels of the other picture]: bin of table entry t at t + 1, 0 for no
    source and 1 + patch else; targets float32 [L, M]; mass float32 [L].
    Returns False if an entry of the table lies outside of the other picture.
    """
    height, width = table.shape
    columns = width // patch_size
    patches = (height // patch_size) * columns
    averaged = patches if released else _copied_patches(table, patch_size)
    last_entry = np.uint32(bin_of.size - 1)
    binned = np.empty((patch_size, width), bin_of.dtype)
    counts = np.zeros(targets.shape[1] + 1, np.int32)
    occupied = np.empty(targets.shape[1] + 2, bin_of.dtype)
    weights = np.empty(targets.shape[1] + 1, np.float64)
    mass[:] = 0
    for strip in range(height // patch_size):
        largest_entry = np.uint32(0)
        for y in range(patch_size):
            row = table[strip * patch_size + y]
            for x in range(width):
                entry = np.uint32(row[x] + 1)  # -1 becomes 0; anything below it becomes huge
                largest_entry = max(largest_entry, entry)
                binned[y, x] = bin_of[min(entry, last_entry)]
        if largest_entry > last_entry:
            return False
        for column in range(columns):
            i = strip * columns + column
            bins = np.uint32(0)
            for y in range(patch_size):
                row = binned[y, column * patch_size : (column + 1) * patch_size]
                current = row[0]
                run = 0  # neighbours mostly share their bin: count them in a register
                for x in range(patch_size):
                    if row[x] != current:
                        occupied[bins] = current
                        bins += np.uint32(counts[current] == 0)
                        counts[current] += run
                        current = row[x]
                        run = 0
                    run += 1
                occupied[bins] = current
                bins += np.uint32(counts[current] == 0)
                counts[current] += run
            empty = bins == 1 and occupied[0] == 0
            if empty and (gamma > 0 or not released):
                counts[0] = 0
                continue
            if gamma == 0:  # 0^0 = 1: every bin has a share
                bins = np.uint32(counts.size)
                for k in range(bins):
                    occupied[k] = k
            largest = 1
            for k in range(bins):
                if released or occupied[k] > 0:
                    largest = max(largest, counts[occupied[k]])
            total = inside = 0.0
            for k in range(bins):
                count = counts[occupied[k]]
                weights[k] = 1.0 if count == largest else (count / largest) ** gamma
                if occupied[k] > 0:
                    inside += weights[k]
                if released or occupied[k] > 0:
                    total += weights[k]
            for k in range(bins):
                if occupied[k] > 0:
                    targets[i, occupied[k] - 1] += np.float32(weights[k] / (total * averaged))
                counts[occupied[k]] = 0
            mass[i] = inside / (total * averaged)
    return True


@njit(nogil=True, cache=True, fastmath=_FAST)
def _softmax_rows(
    affinity: np.ndarray,
    query_inverse: np.ndarray,
    reference_inverse: np.ndarray,
    scale: np.float32,
    exponential: np.ndarray,
    row_sum: np.ndarray,
    column_sum: np.ndarray,
) -> None:
    """Turn raw products into S - 1/tau in place and fill E, its row sums and its column sums."""
    column_sum[:] = 0
    for i in range(affinity.shape[0]):
        factor = query_inverse[i] * scale
        total = np.float32(0)
        for j in range(affinity.shape[1]):
            x = affinity[i, j] * factor * reference_inverse[j] - scale
            affinity[i, j] = x
            e = _exp(x)
            exponential[i, j] = e
            total += e
            column_sum[j] += e
        row_sum[i] = total


@njit(nogil=True, cache=True, fastmath=_FAST)
def _cross_entropy(
    shifted: np.ndarray,
    targets: np.ndarray,
    query_mass: np.ndarray,
    reference_mass: np.ndarray,
    row_sum: np.ndarray,
    column_sum: np.ndarray,
) -> float:
    """Loss of one pair from S - 1/tau; summed in float64."""
    total = 0.0
    for i in range(query_mass.size):
        matched = np.float32(0)
        for j in range(reference_mass.size):
            matched += targets[i, j] * shifted[i, j]
        total += query_mass[i] * math.log(row_sum[i]) - matched
    for j in range(reference_mass.size):
        total += reference_mass[j] * math.log(column_sum[j])
    return total / 2


@njit(nogil=True, cache=True, fastmath=_FAST)
def _gradient_rows(
    shifted: np.ndarray,
    exponential: np.ndarray,
    targets: np.ndarray,
    row_ratio: np.ndarray,
    column_ratio: np.ndarray,
    query_inverse: np.ndarray,
    reference_inverse: np.ndarray,
    scale: np.float32,
    weight: np.float32,
    radial_query: np.ndarray,
    radial_reference: np.ndarray,
) -> None:
    """Replace S - 1/tau by G in place and fill the scalings of the tokens themselves."""
    radial_reference[:] = 0
    for i in range(shifted.shape[0]):
        factor = query_inverse[i] * scale
        ratio = row_ratio[i]
        total = np.float32(0)
        for j in range(shifted.shape[1]):
            gradient = weight * (exponential[i, j] * (ratio + column_ratio[j]) - targets[i, j])
            along = gradient * (shifted[i, j] + scale)
            total += along
            radial_reference[j] += along
            shifted[i, j] = gradient * factor * reference_inverse[j]
        radial_query[i] = total * query_inverse[i] * query_inverse[i]
    for j in range(shifted.shape[1]):
        radial_reference[j] *= reference_inverse[j] * reference_inverse[j]


@njit(nogil=True, cache=True)
def _forward_samples(
    affinity: np.ndarray,
    query_tokens: np.ndarray,
    reference_tokens: np.ndarray,
    query_to_reference: np.ndarray,
    reference_to_query: np.ndarray,
    query_bin_of: np.ndarray,
    reference_bin_of: np.ndarray,
    patch_size: int,
    scale: np.float32,
    gamma: float,
    released: bool,
    weight: float,
    needs_gradient: bool,
    loss: np.ndarray,
    radial_query: np.ndarray,
    radial_reference: np.ndarray,
) -> int:
    """Losses of samples from their raw products ``affinity``, which become G where a gradient is needed.

    Returns the first sample whose tables hold an index outside of the other picture, or -1.
    """
    query_patches, reference_patches = affinity.shape[1:]
    targets = np.empty((query_patches, reference_patches), np.float32)
    exponential = np.empty((query_patches, reference_patches), np.float32)
    query_inverse, reference_inverse = np.empty(query_patches, np.float32), np.empty(reference_patches, np.float32)
    query_mass, row_sum = np.empty(query_patches, np.float32), np.empty(query_patches, np.float32)
    reference_mass, column_sum = np.empty(reference_patches, np.float32), np.empty(reference_patches, np.float32)
    for b in range(affinity.shape[0]):
        targets[:] = 0
        if not _add_prior(
            query_to_reference[b], reference_bin_of, patch_size, gamma, released, targets, query_mass
        ) or not _add_prior(
            reference_to_query[b], query_bin_of, patch_size, gamma, released, targets.T, reference_mass
        ):
            return b
        _inverse_lengths(query_tokens[b], query_inverse)
        _inverse_lengths(reference_tokens[b], reference_inverse)
        _softmax_rows(affinity[b], query_inverse, reference_inverse, scale, exponential, row_sum, column_sum)
        loss[b] = weight * _cross_entropy(affinity[b], targets, query_mass, reference_mass, row_sum, column_sum)
        if needs_gradient:
            query_mass /= row_sum
            reference_mass /= column_sum
            _gradient_rows(
                affinity[b],
                exponential,
                targets,
                query_mass,
                reference_mass,
                query_inverse,
                reference_inverse,
                scale,
                np.float32(weight / 2),
                radial_query[b],
                radial_reference[b],
            )
    return -1


@torch.library.custom_op("copynce::copynce_cpu", mutates_args=(), device_types="cpu")
def copynce_cpu_forward(
    query_tokens: Tensor,
    reference_tokens: Tensor,
    query_to_reference: Tensor,
    reference_to_query: Tensor,
    active: Tensor,
    patch_size: int,
    temperature: float,
    gamma: float,
    released: bool,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch loss, float32 scalar, and what backward needs: G [B, Lq, Lr] and the tokens' scalings [B, Lq], [B, Lr].

    The three are empty without ``needs_gradient``, and unwritten for inactive pairs. Arguments as in ``copynce_loss``.
    """
    batch, query_patches, _ = query_tokens.shape
    reference_patches = reference_tokens.shape[1]
    kept = batch if needs_gradient else 0
    affinity = query_tokens.new_empty(kept, query_patches, reference_patches, dtype=torch.float32)
    radial_query = query_tokens.new_empty(kept, query_patches, dtype=torch.float32)
    radial_reference = query_tokens.new_empty(kept, reference_patches, dtype=torch.float32)
    loss = np.zeros(batch)
    weight = 1.0 / max(int(active.sum()), 1)
    tables = query_to_reference.contiguous().numpy(), reference_to_query.contiguous().numpy()
    bins = tuple(_bin_of_entry((table.shape[1], table.shape[2]), patch_size) for table in tables)

    def run(chunk: slice) -> int:
        query, reference = (tokens[chunk].float().contiguous() for tokens in (query_tokens, reference_tokens))
        products = affinity[chunk] if needs_gradient else affinity.new_empty(len(query), *affinity.shape[1:])
        torch.bmm(query, reference.transpose(1, 2), out=products)
        arguments: tuple[Any, ...] = (
            products.numpy(),
            query.numpy(),
            reference.numpy(),
            *(table[chunk] for table in tables),
            *bins,
            patch_size,
            np.float32(1 / temperature),
            float(gamma),
            released,
            weight,
            needs_gradient,
            loss[chunk],
            radial_query[chunk].numpy(),
            radial_reference[chunk].numpy(),
        )
        bad = _forward_samples(*arguments)
        return chunk.start + bad if bad >= 0 else -1

    reports = _on_all_threads(run, active, query_tokens, reference_tokens)
    bad = next((report for report in reports if report >= 0), -1)
    if bad >= 0:
        raise ValueError(
            f"tables of sample {bad} must hold -1 or a pixel index of the other picture, below "
            f"{bins[1].size - 1} in query_to_reference and {bins[0].size - 1} in reference_to_query"
        )
    return torch.tensor(loss.sum(), dtype=torch.float32), affinity, radial_query, radial_reference


@copynce_cpu_forward.register_fake
def _(
    query_tokens: Tensor,
    reference_tokens: Tensor,
    query_to_reference: Tensor,
    reference_to_query: Tensor,
    active: Tensor,
    patch_size: int,
    temperature: float,
    gamma: float,
    released: bool,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = query_tokens.shape[0] if needs_gradient else 0
    patches = query_tokens.shape[1], reference_tokens.shape[1]

    def empty(*shape: int) -> Tensor:
        return query_tokens.new_empty(shape, dtype=torch.float32)

    return empty(), empty(kept, *patches), empty(kept, patches[0]), empty(kept, patches[1])


@torch.library.custom_op("copynce::copynce_cpu_backward", mutates_args=(), device_types="cpu")
def copynce_cpu_backward(
    upstream: Tensor,
    affinity: Tensor,
    radial_query: Tensor,
    radial_reference: Tensor,
    query_tokens: Tensor,
    reference_tokens: Tensor,
    active: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the loss to both token tensors, in their dtype, times the scalar ``upstream``."""
    scale = float(upstream)
    gradients = torch.empty_like(query_tokens), torch.empty_like(reference_tokens)
    if not active.all():
        for gradient in gradients:
            gradient[~active] = 0

    def run(chunk: slice) -> None:
        query, reference = query_tokens[chunk].float(), reference_tokens[chunk].float()
        matrix = affinity[chunk]
        for gradient, own, other, product, radial in (
            (gradients[0][chunk], query, reference, matrix, radial_query[chunk]),
            (gradients[1][chunk], reference, query, matrix.transpose(1, 2), radial_reference[chunk]),
        ):
            # In place where the tokens are float32: the chunk is written once, in cache.
            result = gradient if gradient.dtype == torch.float32 else torch.empty_like(own)
            torch.mul(own, radial[..., None] * -scale, out=result)
            result.baddbmm_(product, other, alpha=scale)
            if result is not gradient:
                gradient.copy_(result)

    _on_all_threads(run, active, query_tokens, reference_tokens)
    return gradients


@copynce_cpu_backward.register_fake
def _(
    upstream: Tensor,
    affinity: Tensor,
    radial_query: Tensor,
    radial_reference: Tensor,
    query_tokens: Tensor,
    reference_tokens: Tensor,
    active: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query_tokens), torch.empty_like(reference_tokens)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query_tokens, reference_tokens, _, _, active = inputs[:5]
    _, affinity, radial_query, radial_reference = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(affinity, radial_query, radial_reference)
    ctx.save_for_backward(affinity, radial_query, radial_reference, query_tokens, reference_tokens, active)


def _backward(ctx: Any, upstream: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return (*copynce_cpu_backward(upstream, *ctx.saved_tensors), *(None,) * 8)


copynce_cpu_forward.register_autograd(_backward, setup_context=_save_for_backward)


@functools.lru_cache(maxsize=16)
def _bin_of_entry(shape: tuple[int, int], patch_size: int) -> np.ndarray:
    """``bin_of`` of ``_add_prior`` for a picture of height x width pixels, in the narrower dtype that holds it."""
    patches = patch_of_pixel(*shape, patch_size).numpy()
    return np.concatenate(([0], patches + 1)).astype(np.uint16 if patches[-1] < 65534 else np.uint32)


def _on_all_threads(
    run: Callable[[slice], Result], active: Tensor, query_tokens: Tensor, reference_tokens: Tensor
) -> list[Result]:
    """Results of ``run`` on each chunk of active samples, in order, worked off by all threads."""
    threads = torch.get_num_threads()
    chunks = list(_chunks(active, query_tokens, reference_tokens, threads))

    def alone(chunk: slice) -> Result:
        with torch.inference_mode():  # a state of the thread, as autocast; nothing here is recorded
            return run(chunk)

    with _exact_products(query_tokens.dtype):
        if threads == 1 or len(chunks) < 2:
            return [alone(chunk) for chunk in chunks]
        torch.set_num_threads(1)  # of each product: the threads share out samples, and new threads start from this
        try:
            with ThreadPoolExecutor(min(threads, len(chunks))) as pool:
                return list(pool.map(alone, chunks))
        finally:
            torch.set_num_threads(threads)


def _chunks(active: Tensor, query_tokens: Tensor, reference_tokens: Tensor, threads: int) -> Iterator[slice]:
    """Runs of neighbouring active samples, short enough for the cache and for each thread to get some."""
    query_patches, channels = query_tokens.shape[1:]
    reference_patches = reference_tokens.shape[1]
    sample = 4 * (channels * (query_patches + reference_patches) + query_patches * reference_patches)
    flags = active.tolist()
    share = math.ceil(sum(flags) / threads)  # of a thread; in rounds of equal length, so that none waits for a last one
    longest = math.ceil(share / math.ceil(share * sample / _CHUNK_BYTES)) if share else 1
    start = 0
    for index, flag in enumerate([*flags, False]):
        if start < index and (not flag or index - start == longest):
            yield slice(start, index)
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
        if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before
