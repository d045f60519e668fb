"""CopyNCE, the patch-level loss of the paper (eq. 4 to 7): the public function, what it accepts, and who computes it.

``copynce_loss`` checks its tensors and makes its settings, chooses a backend and hands both to that backend's runner,
which checks what it alone asks for. A runner computes any target: a rival's are tables and settings again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from copynce.kernels.copynce.reference import copynce_reference
from copynce.losses.cpu.op import copynce_cpu_forward
from copynce.losses.rival_targets import rival_tables
from copynce.losses.settings import SMALLEST_TEMPERATURE, CopyNCESettings, Form, Prior, Target, check_word

try:
    from copynce.kernels.copynce.launch_config import LARGEST_PATCH_SIZE, LARGEST_PATCHES, fits, keeps_cosines
    from copynce.kernels.copynce.op import copynce_triton
    from copynce.kernels.launch import runs_on
    from copynce.kernels.patch_overlap import patch_overlap
except ImportError:  # no Triton for this platform
    TRITON = False
else:
    TRITON = True

Backend = Literal["auto", "triton", "cpu", "reference"]
_BACKENDS = get_args(Backend)


class Pairs(NamedTuple):
    """The tensors of a batch of pairs, as ``copynce_loss`` describes them."""

    query_tokens: Tensor
    reference_tokens: Tensor
    query_to_reference: Tensor
    reference_to_query: Tensor
    traced: Tensor  # bool [B]: pairs whose pixels are known, which alone count; ``active`` to the public

    @property
    def needs_gradient(self) -> bool:
        return torch.is_grad_enabled() and (self.query_tokens.requires_grad or self.reference_tokens.requires_grad)


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
        temperature: tau of the softmax over cosines, above 0 (eq. 6).
        gamma: sharpening exponent of the prior in [0, inf] (eq. 5).
        prior: "released" normalises a patch's prior over reference patches and the not-copied share, and averages over
            all patches; "paper" normalises over reference patches only and averages over copied patches.
        target: what w is. "overlap": the prior above. The paper's rivals ("feature", "location", "both") put equal
            weights on a patch's nearest patches instead, as ``copynce.losses.rival_targets`` defines; gamma has no
            meaning for them.
        neighbours: targets of a patch under a rival (k of Table 2), at most as many as there are patches.
        form: "nce", the loss above, or the rival "cosine", ``l(q -> r) = (1/N) sum_ij w_ij (1 - cos_ij)``, in plain
            PyTorch on every device (backend "auto" or "reference").
        active: [B] bool, pairs that count, which are those whose pixels were traced; all by default. The others get
            gradients of exactly 0, whatever their tokens hold.
        backend: "auto" takes the fused path of the tokens' device where it applies, else "reference" (always for
            float64). "cpu" is the fused path on the CPU, which computes in float32 and needs a temperature of 0.025 or
            more. "triton" is the fused path on CUDA (compute capability 8.0 or more): the same temperatures, at most
            1024 patches, 16-bit or float32 tokens, float32 ones in autocast's dtype where that is on; an index outside
            of the other picture counts as no source there, since looking for one would wait for the device.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes disagree, a value is out of range, or the backend asked for cannot take these tensors.
        RuntimeError: backend "triton" where its kernels cannot run.

    >>> tokens = torch.eye(4)[None]  # one pair, 2 x 2 patches of one pixel
    >>> table = torch.arange(4, dtype=torch.int32).view(1, 2, 2)
    >>> float(copynce_loss(tokens, tokens, table, table, patch_size=1, temperature=1.0))  # log(e + 3) - 1
    0.743668...
    """
    settings = CopyNCESettings(
        patch_size=patch_size,
        temperature=temperature,
        gamma=gamma,
        prior=prior,
        target=target,
        neighbours=neighbours,
        form=form,
    )
    _check_backend(backend, settings)
    pairs = _pairs(query_tokens, reference_tokens, query_to_reference, reference_to_query, active, patch_size)
    return _run(pairs, settings, backend)


class CopyNCELoss(nn.Module):
    """``copynce_loss`` with its settings held: ``settings`` (all defaults if none), with those ``changed`` by name.

    >>> CopyNCELoss(gamma=3.0, prior="paper").settings.gamma
    3.0
    """

    def __init__(self, settings: CopyNCESettings | None = None, *, backend: Backend = "auto", **changed: Any) -> None:
        super().__init__()
        self.settings = replace(settings or CopyNCESettings(), **changed)
        self.backend: Backend = backend
        _check_backend(backend, self.settings)

    def forward(
        self,
        query_tokens: Tensor,
        reference_tokens: Tensor,
        query_to_reference: Tensor,
        reference_to_query: Tensor,
        active: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch, a scalar; see ``copynce_loss``."""
        patch_size = self.settings.patch_size
        pairs = _pairs(query_tokens, reference_tokens, query_to_reference, reference_to_query, active, patch_size)
        return _run(pairs, self.settings, self.backend)

    def extra_repr(self) -> str:
        held = {**asdict(self.settings), "backend": self.backend}
        return ", ".join(f"{name}={value!r}" for name, value in held.items())


def _pairs(
    query_tokens: Tensor,
    reference_tokens: Tensor,
    query_to_reference: Tensor,
    reference_to_query: Tensor,
    active: Tensor | None,
    patch_size: int,
) -> Pairs:
    """The tensors together, once they are known to fit each other."""
    tensors = {
        "query_tokens": query_tokens,
        "reference_tokens": reference_tokens,
        "query_to_reference": query_to_reference,
        "reference_to_query": reference_to_query,
    }
    if active is not None:
        tensors["active"] = active
    _check_types(tensors)
    _check_shapes(tensors, patch_size)
    _check_dtypes_and_devices(tensors)
    if active is None:
        active = torch.ones(len(query_tokens), dtype=torch.bool, device=query_tokens.device)
    return Pairs(query_tokens, reference_tokens, query_to_reference, reference_to_query, active)


def _run(pairs: Pairs, settings: CopyNCESettings, backend: Backend) -> Tensor:
    if settings.target != "overlap":
        pairs, settings = _with_tables_of_rivals(pairs, settings)
    if backend == "auto":
        backend = _choose_backend(pairs, settings)
    return _RUNNERS[backend](pairs, settings)


def _with_tables_of_rivals(pairs: Pairs, settings: CopyNCESettings) -> tuple[Pairs, CopyNCESettings]:
    """Pairs whose tables stand for a rival's targets, and the settings under which their overlap is its weight."""
    _check_indices(pairs)
    query_table, reference_table, patch_size = rival_tables(
        *pairs[:4], settings.patch_size, settings.target, settings.neighbours
    )
    pairs = pairs._replace(query_to_reference=query_table, reference_to_query=reference_table)
    return pairs, replace(settings, patch_size=patch_size, gamma=1.0, target="overlap")


def _choose_backend(pairs: Pairs, settings: CopyNCESettings) -> Backend:
    query, reference = pairs.query_tokens, pairs.reference_tokens
    if settings.form == "cosine" or not settings.suits_fused_paths:
        return "reference"
    if query.device.type == "cpu":
        return "cpu" if query.dtype != torch.float64 else "reference"
    if TRITON and runs_on(query.device) and fits(query, reference, settings.patch_size):
        return "triton"
    return "reference"


def _run_cpu(pairs: Pairs, settings: CopyNCESettings) -> Tensor:
    device = pairs.query_tokens.device
    if device.type != "cpu":
        raise ValueError(f"backend='cpu' needs tokens on the CPU, got {device}; use backend='auto'")
    if not settings.suits_fused_paths:
        raise ValueError(
            f"backend='cpu' needs temperature >= {SMALLEST_TEMPERATURE:g}, got {settings.temperature}; "
            "use backend='reference'"
        )
    loss, *_ = copynce_cpu_forward(
        *pairs,
        settings.patch_size,
        float(settings.temperature),
        float(settings.gamma),
        settings.prior == "released",
        pairs.needs_gradient,
    )
    return loss


def _run_triton(pairs: Pairs, settings: CopyNCESettings) -> Tensor:
    query, reference, query_to_reference, reference_to_query, traced = pairs
    device = query.device
    if query.dtype == torch.float32 and torch.is_autocast_enabled(device.type):
        # As for any matrix product: a transformer's residual stream stays float32, which the kernels take slowly.
        dtype = torch.get_autocast_dtype(device.type)
        query, reference = query.to(dtype), reference.to(dtype)
    if not (TRITON and runs_on(device)):
        raise RuntimeError(
            "backend='triton' needs Triton and tokens on a CUDA device of compute capability 8.0 or more, "
            f"got tokens on {device}{'' if TRITON else ' and no Triton'}; use backend='auto'"
        )
    patch_size, temperature, gamma = settings.patch_size, float(settings.temperature), float(settings.gamma)
    if not (settings.suits_fused_paths and fits(query, reference, patch_size)):
        patches = max(query.shape[1], reference.shape[1])
        raise ValueError(
            f"backend='triton' needs float32, float16 or bfloat16 tokens, at most {LARGEST_PATCHES} patches, "
            f"patch_size <= {LARGEST_PATCH_SIZE} and temperature >= {SMALLEST_TEMPERATURE:g}, got {query.dtype}, "
            f"{patches} patches, patch_size {patch_size} and temperature {settings.temperature}; "
            "use backend='reference'"
        )
    released = settings.prior == "released"
    query_overlap = patch_overlap(query_to_reference, *reference_to_query.shape[1:], patch_size, gamma, released)
    reference_overlap = patch_overlap(reference_to_query, *query_to_reference.shape[1:], patch_size, gamma, released)
    stash = pairs.needs_gradient and keeps_cosines(query, reference)
    loss, *_ = copynce_triton(
        query, reference, *query_overlap, *reference_overlap, traced, patch_size, temperature, gamma, released, stash
    )
    return loss


def _run_reference(pairs: Pairs, settings: CopyNCESettings) -> Tensor:
    _check_indices(pairs)
    with torch.autocast(pairs.query_tokens.device.type, enabled=False):
        return copynce_reference(
            *pairs,
            patch_size=settings.patch_size,
            temperature=settings.temperature,
            gamma=settings.gamma,
            prior=settings.prior,
            form=settings.form,
        )


_RUNNERS: dict[str, Callable[[Pairs, CopyNCESettings], Tensor]] = {
    "cpu": _run_cpu,
    "triton": _run_triton,
    "reference": _run_reference,
}


def _check_backend(backend: str, settings: CopyNCESettings) -> None:
    check_word("backend", backend, _BACKENDS)
    if settings.form == "cosine" and backend not in ("auto", "reference"):
        raise ValueError(f"form='cosine' needs backend 'auto' or 'reference', got {backend!r}")


def _check_types(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")


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


def _check_indices(pairs: Pairs) -> None:
    tables = pairs.query_to_reference, pairs.reference_to_query
    if tables[0].device.type != "cpu" or torch.compiler.is_compiling() or not tables[0].numel():
        return  # looking at the values would synchronise the device; there an index out of range asserts in the gather
    for name, table, other in zip(("query_to_reference", "reference_to_query"), tables, reversed(tables), strict=True):
        low, high = (int(bound) for bound in torch.aminmax(table))
        pixels = other.shape[1] * other.shape[2]
        if low < -1 or high >= pixels:
            raise ValueError(
                f"{name} must hold -1 or a pixel index below {pixels} of the other picture, "
                f"got values in [{low}, {high}]"
            )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
