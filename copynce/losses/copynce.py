"""CopyNCE, the patch-level loss of the paper (eq. 4 to 7): public function, validation and choice of implementation."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from copynce.kernels.copynce_reference import copynce_reference
from copynce.losses.copynce_cpu import LARGEST_LOGIT_RANGE, copynce_cpu_forward
from copynce.losses.rival_targets import Target, rival_tables

try:
    from copynce.kernels.copynce import LARGEST_PATCH_SIZE, LARGEST_PATCHES, copynce_triton, fits, keeps_cosines
    from copynce.kernels.launch import runs_on
    from copynce.kernels.patch_overlap import patch_overlap
except ImportError:  # no Triton for this platform
    TRITON = False
else:
    TRITON = True

Prior = Literal["released", "paper"]
Form = Literal["nce", "cosine"]
Backend = Literal["auto", "triton", "cpu", "reference"]


def copynce_loss(
    query_tokens: Tensor,
    reference_tokens: Tensor,
    query_to_reference: Tensor,
    reference_to_query: Tensor,
    *,
    patch_size: int = 16,
    temperature: float = 1 / 16,
    gamma: float = 1.0,
    prior: Prior = "released",
    target: Target = "overlap",
    neighbours: int = 1,
    form: Form = "nce",
    active: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """CopyNCE loss of a batch of pairs, a float32 scalar (float64 from "reference" on float64 tokens).

    ``loss = sum_b active_b (l(q -> r) + l(r -> q)) / 2 / sum_b active_b`` with
    ``l(q -> r) = -(1/N) sum_ij w_ij log softmax_j(cos_ij / temperature)``;
    ``copynce.kernels`` defines the prior w (``patch_overlap_reference``) and the number of patches N
    (``copynce_reference``).
    If no pair is active the loss is 0 and its gradients are 0.

    Args:
        query_tokens: [B, Lq, D] floating point, patches in row-major order without the class token, of any length.
        reference_tokens: [B, Lr, D], same dtype and device.
        query_to_reference: [B, Hq, Wq] int32, for each query pixel the row-major index of its reference pixel or -1;
            ``Lq = Hq / patch_size * Wq / patch_size``.
        reference_to_query: [B, Hr, Wr] int32, the other direction.
        patch_size: side of a patch in pixels.
        temperature: tau of the softmax over cosines, above 0 (tau in eq. 6).
        gamma: sharpening exponent of the prior in [0, inf] (eq. 5).
        prior: "released" normalises a patch's prior over reference patches and the not-copied share, and averages over
            all patches; "paper" normalises over reference patches only and averages over copied patches.
        target: what w is. "overlap": the prior above. The paper's rivals ("feature", "location", "both") put equal
            weights on a patch's nearest patches instead, as ``copynce.losses.rival_targets`` defines; gamma has no
            meaning for them.
        neighbours: targets of a patch under a rival (k of Table 2), at most as many as there are patches.
        form: "nce", the loss above, or the rival "cosine", ``l(q -> r) = (1/N) sum_ij w_ij (1 - cos_ij)``, in plain
            PyTorch on every device (backend "auto" or "reference").
        active: [B] bool, pairs that count; all by default. The others get gradients of exactly 0, whatever their
            tokens hold.
        backend: "auto" takes the fused path of the tokens' device where it applies, else "reference" (always for
            float64). "cpu" is the fused path on the CPU, which computes in float32 and needs 2 / temperature <= 80.
            "triton" is the fused path on CUDA (compute capability 8.0 or more): the same temperatures, at most 1024
            patches, 16-bit or float32 tokens, float32 ones in autocast's dtype where that is on; an index outside of
            the other picture counts as no source there, since looking for one would wait for the device.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes disagree, a value is out of range, or the backend asked for cannot take these tensors.
        RuntimeError: backend "triton" where its kernels cannot run.

    >>> tokens = torch.eye(4)[None]  # one pair, 2 x 2 patches of one pixel
    >>> table = torch.arange(4, dtype=torch.int32).view(1, 2, 2)
    >>> float(copynce_loss(tokens, tokens, table, table, patch_size=1, temperature=1.0))  # log(e + 3) - 1
    0.743668...
    """
    tensors = {
        "query_tokens": query_tokens,
        "reference_tokens": reference_tokens,
        "query_to_reference": query_to_reference,
        "reference_to_query": reference_to_query,
    }
    if active is not None:
        tensors["active"] = active
    _check_types(tensors)
    _check_scalars(patch_size, temperature, gamma, prior, target, neighbours, form, backend)
    _check_shapes(tensors, patch_size)
    _check_dtypes_and_devices(tensors)
    if active is None:
        active = torch.ones(len(query_tokens), dtype=torch.bool, device=query_tokens.device)
    if target != "overlap":
        _check_indices(query_to_reference, reference_to_query)
        query_to_reference, reference_to_query, patch_size = rival_tables(
            query_tokens, reference_tokens, query_to_reference, reference_to_query, patch_size, target, neighbours
        )
        gamma = 1.0
    if form == "cosine":
        backend = "reference"
    elif backend == "auto":
        backend = _choose_backend(query_tokens, reference_tokens, temperature, patch_size)
    if backend == "cpu":
        _check_cpu(query_tokens, temperature)
        needs_gradient = torch.is_grad_enabled() and (query_tokens.requires_grad or reference_tokens.requires_grad)
        loss, *_ = copynce_cpu_forward(
            query_tokens,
            reference_tokens,
            query_to_reference,
            reference_to_query,
            active,
            patch_size,
            float(temperature),
            float(gamma),
            prior == "released",
            needs_gradient,
        )
        return loss
    if backend == "triton":
        device = query_tokens.device.type
        if query_tokens.dtype == torch.float32 and torch.is_autocast_enabled(device):
            # As for any matrix product: a transformer's residual stream stays float32, which the kernels take slowly.
            dtype = torch.get_autocast_dtype(device)
            query_tokens, reference_tokens = query_tokens.to(dtype), reference_tokens.to(dtype)
        _check_triton(query_tokens, reference_tokens, temperature, patch_size)
        settings = patch_size, float(gamma), prior == "released"
        query_overlap = patch_overlap(query_to_reference, *reference_to_query.shape[1:], *settings)
        reference_overlap = patch_overlap(reference_to_query, *query_to_reference.shape[1:], *settings)
        needs_gradient = torch.is_grad_enabled() and (query_tokens.requires_grad or reference_tokens.requires_grad)
        loss, *_ = copynce_triton(
            query_tokens,
            reference_tokens,
            *query_overlap,
            *reference_overlap,
            active,
            patch_size,
            float(temperature),
            float(gamma),
            prior == "released",
            needs_gradient and keeps_cosines(query_tokens, reference_tokens),
        )
        return loss
    _check_indices(query_to_reference, reference_to_query)
    with torch.autocast(query_tokens.device.type, enabled=False):
        return copynce_reference(
            query_tokens,
            reference_tokens,
            query_to_reference,
            reference_to_query,
            active,
            patch_size=patch_size,
            temperature=temperature,
            gamma=gamma,
            prior=prior,
            form=form,
        )


class CopyNCELoss(nn.Module):
    """``copynce_loss`` with its settings held; the arguments are those of the function."""

    def __init__(
        self,
        *,
        patch_size: int = 16,
        temperature: float = 1 / 16,
        gamma: float = 1.0,
        prior: Prior = "released",
        target: Target = "overlap",
        neighbours: int = 1,
        form: Form = "nce",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _check_scalars(patch_size, temperature, gamma, prior, target, neighbours, form, backend)
        self.patch_size = patch_size
        self.temperature = temperature
        self.gamma = gamma
        self.prior: Prior = prior
        self.target: Target = target
        self.neighbours = neighbours
        self.form: Form = form
        self.backend: Backend = backend

    def forward(
        self,
        query_tokens: Tensor,
        reference_tokens: Tensor,
        query_to_reference: Tensor,
        reference_to_query: Tensor,
        active: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch, a scalar; see ``copynce_loss``."""
        return copynce_loss(
            query_tokens,
            reference_tokens,
            query_to_reference,
            reference_to_query,
            patch_size=self.patch_size,
            temperature=self.temperature,
            gamma=self.gamma,
            prior=self.prior,
            target=self.target,
            neighbours=self.neighbours,
            form=self.form,
            active=active,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"patch_size={self.patch_size}, temperature={self.temperature:g}, gamma={self.gamma:g}, "
            f"prior={self.prior!r}, target={self.target!r}, neighbours={self.neighbours}, form={self.form!r}, "
            f"backend={self.backend!r}"
        )


def _choose_backend(query_tokens: Tensor, reference_tokens: Tensor, temperature: float, patch_size: int) -> Backend:
    device = query_tokens.device
    if device.type == "cpu":
        fused = query_tokens.dtype != torch.float64 and 2 / temperature <= LARGEST_LOGIT_RANGE
        return "cpu" if fused else "reference"
    if TRITON and runs_on(device) and fits(query_tokens, reference_tokens, temperature, patch_size):
        return "triton"
    return "reference"


def _check_types(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")


def _check_scalars(
    patch_size: int,
    temperature: float,
    gamma: float,
    prior: str,
    target: str,
    neighbours: int,
    form: str,
    backend: str,
) -> None:
    if isinstance(patch_size, bool) or not isinstance(patch_size, int):
        raise TypeError(f"patch_size must be an int in pixels, got {type(patch_size).__name__}")
    if isinstance(neighbours, bool) or not isinstance(neighbours, int):
        raise TypeError(f"neighbours must be an int, got {type(neighbours).__name__}")
    for name, number in (("temperature", temperature), ("gamma", gamma)):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"{name} must be a float, got {type(number).__name__}")
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1 pixel, got {patch_size}")
    if neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, got {neighbours}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
    if not gamma >= 0:
        raise ValueError(f"gamma must lie in [0, inf], got {gamma}")
    for name, value, known in (
        ("prior", prior, ("released", "paper")),
        ("target", target, ("overlap", "feature", "location", "both")),
        ("form", form, ("nce", "cosine")),
        ("backend", backend, ("auto", "triton", "cpu", "reference")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    if form == "cosine" and backend not in ("auto", "reference"):
        raise ValueError(f"form='cosine' needs backend 'auto' or 'reference', got {backend!r}")


def _check_shapes(tensors: dict[str, Tensor], patch_size: int) -> None:
    query, reference = tensors["query_tokens"], tensors["reference_tokens"]
    for name, letter in (("query_tokens", "q"), ("reference_tokens", "r")):
        if tensors[name].ndim != 3 or 0 in tensors[name].shape[1:]:
            raise ValueError(f"{name} must be [B, L{letter}, D] with no empty side but B, got {_shape(tensors[name])}")
    if query.shape[0] != reference.shape[0] or query.shape[2] != reference.shape[2]:
        raise ValueError(
            "query_tokens and reference_tokens must agree in batch and channels, "
            f"got {_shape(query)} and {_shape(reference)}"
        )
    for name, tokens in (("query_to_reference", query), ("reference_to_query", reference)):
        table = tensors[name]
        if table.ndim != 3 or len(table) != len(tokens):
            raise ValueError(f"{name} must be [B, H, W] with B = {len(tokens)} as the tokens, got {_shape(table)}")
        height, width = table.shape[1:]
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"{name} must have sides divisible by patch_size = {patch_size}, got {height} x {width} pixels"
            )
        patches = (height // patch_size) * (width // patch_size)
        if patches != tokens.shape[1]:
            raise ValueError(
                f"{name} of {height} x {width} pixels has {patches} patches of {patch_size} pixels, but its tokens are "
                f"{_shape(tokens)}; drop the class token, or check patch_size"
            )
    active = tensors.get("active")
    if active is not None and active.shape != query.shape[:1]:
        raise ValueError(f"active must be [B] = [{len(query)}], got {_shape(active)}")


def _check_dtypes_and_devices(tensors: dict[str, Tensor]) -> None:
    query, reference = tensors["query_tokens"], tensors["reference_tokens"]
    if not query.is_floating_point() or query.dtype != reference.dtype:
        raise TypeError(
            f"query_tokens and reference_tokens must share one floating dtype, got {query.dtype} and {reference.dtype}"
        )
    for name in ("query_to_reference", "reference_to_query"):
        if tensors[name].dtype != torch.int32:
            raise TypeError(f"{name} must be torch.int32 (pixel index or -1), got {tensors[name].dtype}")
    if "active" in tensors and tensors["active"].dtype != torch.bool:
        raise TypeError(f"active must be torch.bool, got {tensors['active'].dtype}")
    for name, tensor in tensors.items():
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the tokens' device {query.device}, got {tensor.device}")


def _check_cpu(query_tokens: Tensor, temperature: float) -> None:
    if query_tokens.device.type != "cpu":
        raise ValueError(f"backend='cpu' needs tokens on the CPU, got {query_tokens.device}; use backend='auto'")
    if 2 / temperature > LARGEST_LOGIT_RANGE:
        raise ValueError(
            f"backend='cpu' needs temperature >= {2 / LARGEST_LOGIT_RANGE:g}, got {temperature}; "
            "use backend='reference'"
        )


def _check_triton(query_tokens: Tensor, reference_tokens: Tensor, temperature: float, patch_size: int) -> None:
    device = query_tokens.device
    if not (TRITON and runs_on(device)):
        raise RuntimeError(
            "backend='triton' needs Triton and tokens on a CUDA device of compute capability 8.0 or more, "
            f"got tokens on {device}{'' if TRITON else ' and no Triton'}; use backend='auto'"
        )
    if not fits(query_tokens, reference_tokens, temperature, patch_size):
        patches = max(query_tokens.shape[1], reference_tokens.shape[1])
        raise ValueError(
            f"backend='triton' needs float32, float16 or bfloat16 tokens, at most {LARGEST_PATCHES} patches, "
            f"patch_size <= {LARGEST_PATCH_SIZE} and temperature >= {2 / LARGEST_LOGIT_RANGE:g}, got "
            f"{query_tokens.dtype}, {patches} patches, patch_size {patch_size} and temperature {temperature}; "
            "use backend='reference'"
        )


def _check_indices(query_to_reference: Tensor, reference_to_query: Tensor) -> None:
    if query_to_reference.device.type != "cpu" or torch.compiler.is_compiling() or not query_to_reference.numel():
        return  # looking at the values would synchronise the device; there an index out of range asserts in the gather
    for name, table, other in (
        ("query_to_reference", query_to_reference, reference_to_query),
        ("reference_to_query", reference_to_query, query_to_reference),
    ):
        low, high = (int(bound) for bound in torch.aminmax(table))
        pixels = other.shape[1] * other.shape[2]
        if low < -1 or high >= pixels:
            raise ValueError(
                f"{name} must hold -1 or a pixel index below {pixels} of the other picture, "
                f"got values in [{low}, {high}]"
            )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
