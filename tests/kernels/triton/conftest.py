"""Every case runs where Triton does, and fresh buffers hold NaN (or 99s): an element that no program writes fails."""

from __future__ import annotations

import math

import pytest
import torch
import triton
from torch import Tensor


@pytest.fixture(autouse=True)
def _nan_in_fresh_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    if not triton.knobs.runtime.interpret and not torch.cuda.is_available():
        pytest.skip("neither TRITON_INTERPRET=1 nor a CUDA device")
    new_empty = Tensor.new_empty

    def filled(self: Tensor, *arguments: object, **settings: object) -> Tensor:
        buffer = new_empty(self, *arguments, **settings)
        return buffer.fill_(math.nan if buffer.is_floating_point() else 99)

    monkeypatch.setattr(Tensor, "new_empty", filled)
