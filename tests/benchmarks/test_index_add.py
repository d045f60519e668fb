"""What `copynce index add` costs: a few pictures; `python -m benchmarks.index_add` takes as many as one likes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.index_add import main
from copynce.data.synthetic import make_pictures
from copynce.models import build_descriptor, save_checkpoint


@pytest.fixture(autouse=True)
def _cores_and_threads() -> Iterator[None]:
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


def test_the_parts_and_what_is_unchanged_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    weights, found = tmp_path / "tiny.safetensors", tmp_path / "found.json"
    save_checkpoint(weights, build_descriptor(img_size=32, dim=16, backbone_options=options))
    make_pictures(tmp_path / "pictures", 70, seed=5, side_px=(32, 48))  # more than a batch
    assert main([str(weights), str(tmp_path / "pictures"), "--unchanged", "5", "--json", str(found)]) == 0
    out = capsys.readouterr().out
    assert "70 pictures" in out
    assert "nothing new among 5 files" in out
    told = json.loads(found.read_text())
    assert all(seconds > 0 for seconds in told["seconds"].values())
    assert told["unchanged"]["seconds"].keys() == {"one", "many"}
