"""A head that is solved for."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from copynce.data.synthetic import make_pictures
from copynce.models import build_descriptor, load_descriptor, save_checkpoint
from scripts import refit_head

OPTIONS = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}


def test_what_edits_change_counts_less() -> None:
    rng = np.random.default_rng(0)
    original = rng.standard_normal((500, 6)) @ np.diag([6, 1, 1, 1, 1, 1.0])
    edited = original + 0.1 * rng.standard_normal((500, 6))
    edited[:, 5] = rng.standard_normal(500)  # nothing of it is left in a copy
    weight, mean = refit_head.solved(original, edited, 6, 512)
    strength = np.linalg.norm(weight, axis=1)
    assert strength[5] < 0.5 * strength[1:5].min()
    assert strength[0] < 0.7 * strength[1:5].min()  # whitened: a wide direction is none that matters more
    assert mean == pytest.approx(original.mean(0))


def test_blocks_weigh_alike_and_the_widest_directions_stay() -> None:
    rng = np.random.default_rng(1)
    original = rng.standard_normal((800, 6)) * [5, 4, 3, 0.05, 0.04, 0.03]
    edited = original + rng.standard_normal((800, 6)) * [0.5, 0.4, 0.3, 0.005, 0.004, 0.003]
    whole, _ = refit_head.solved(original, edited, 3, 512)
    assert whole.shape == (6, 6)
    seen = np.abs(original @ whole - (original @ whole).mean(0))
    assert seen.mean(0) == pytest.approx(np.full(6, seen.mean()), rel=0.3)
    short, _ = refit_head.solved(original, edited, 3, 4)
    assert np.array_equal(short, whole[:, :4])
    assert (whole.std(1)[:3] < 0.05 * whole.std(1)[3:]).all()  # each block by its own scale


@pytest.mark.parametrize("second", [None, 0])
def test_the_head_is_what_was_solved_and_the_encoder_stays(
    second: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = build_descriptor(img_size=32, dim=16, backbone_options=OPTIONS).eval()
    save_checkpoint(tmp_path / "trained.safetensors", model)
    make_pictures(tmp_path / "pictures", 50, seed=5, side_px=(32, 48))
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"none")
    out = tmp_path / "refit.safetensors"
    arguments = [str(tmp_path / "trained.safetensors"), "--pictures", str(tmp_path / "pictures"), "--out", str(out)]
    arguments += [] if second is None else ["--second-block", str(second), "--dim", "20"]
    monkeypatch.setattr(sys, "argv", ["refit_head", *arguments])
    refit_head.main()
    made = load_descriptor(out).eval()
    assert made.dim == (12 if second is None else 20)
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        tokens, descriptors = made.class_token(images), made(images, tokens=False)[0]
        assert torch.equal(tokens[:, :12], model.class_token(images))
        head = made.heads["linear_head"]
        rows = tokens @ head.fc1.weight.T - head.bn.running_mean
    assert descriptors.numpy() == pytest.approx((rows / rows.norm(dim=1, keepdim=True)).numpy(), abs=1e-6)
