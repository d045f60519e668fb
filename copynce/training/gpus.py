"""What GPUs multiply at most, from their makers' sheets (dense products, no sparsity)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from copynce.errors import ConfigError

if TYPE_CHECKING:
    import torch

#: Share of the peak that a training is taken to reach.
UTILISATION = 0.4


@dataclass(frozen=True)
class Gpus:
    """``count`` GPUs of one ``name``, and what each multiplies, in FLOP/s by precision: fp32, fp16, maybe bf16."""

    name: str
    count: int
    peaks: Mapping[str, float]

    def __str__(self) -> str:
        return f"{self.count} x {self.name}"


#: TFLOP/s in 16 bits and in float32 (not TF32: PyTorch's default multiplies float32 in full).
_PEAKS: dict[str, tuple[float, float]] = {
    "A10": (125, 31.2),
    "A10G": (70, 35),
    "A30": (165, 10.3),
    "A40": (150, 37.4),
    "A100": (312, 19.5),
    "A6000": (155, 38.7),
    "B200": (2250, 75),
    "H100": (989, 67),
    "H100 PCIE": (756, 51),
    "H200": (989, 67),
    "L4": (121, 30.3),
    "L40": (181, 90.5),
    "L40S": (362, 91.6),
    "RTX 3090": (71, 35.6),
    "RTX 4090": (165, 82.6),
    "T4": (65, 8.1),
    "V100": (125, 15.7),
}
_WITHOUT_BF16 = ("T4", "V100")


def peak_flops(device: torch.device, precision: str) -> float | None:
    """What the ``device`` multiplies at most, in FLOP/s; None for a CPU, and a GPU that is not known here."""
    import torch  # here: the names of GPUs are told without it

    if device.type != "cuda":
        return None
    try:
        return find_gpus(f"{torch.cuda.get_device_name(device).replace(':', ' ')}:1").peaks.get(precision)
    except ConfigError:
        return None


def find_gpus(text: str) -> Gpus:
    """``A100:8`` (or ``A100``: one) as what it means; a name may be as a driver tells it, ``NVIDIA A100-SXM4-80GB``.

    Raises ConfigError for another form, or a GPU that is not known here.
    """
    name, _, count = text.rpartition(":") if ":" in text else (text, "", "1")
    known = [key for key in _PEAKS if re.search(rf"(?<![A-Z0-9]){key}(?![0-9])", name.upper())]
    if not known or not re.fullmatch("[1-9][0-9]{0,5}", count):
        raise ConfigError(
            f"--gpus must be NAME:COUNT with a name of {', '.join(sorted(_PEAKS))}, as A100:8, got {text!r}"
        )
    found = max(known, key=len)
    half, full = _PEAKS[found]
    peaks = {"fp16": half * 1e12, "fp32": full * 1e12}
    return Gpus(found, int(count), peaks if found in _WITHOUT_BF16 else peaks | {"bf16": half * 1e12})
