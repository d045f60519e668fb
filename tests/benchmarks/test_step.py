"""The two steps that ``benchmarks.step`` compares are one: the same loss on the same batch, before and after a step."""

from __future__ import annotations

import pytest

from benchmarks.step import our_step, product_share, released_step


def test_both_steps_have_one_loss() -> None:
    released, ours = released_step(3, 48), our_step(3, 48, "fp32")
    for _ in range(2):
        assert float(released()) == pytest.approx(float(ours()), rel=1e-3)
    assert 0 < product_share(ours) < 1
