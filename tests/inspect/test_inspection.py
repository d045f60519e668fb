from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from copynce.cli import main
from copynce.inspect.inspection import draw_inspection, inspect_pair, inspection_report
from copynce.inspect.report import write_report
from copynce.models import Descriptor, DescriptorConfig, Matcher, build_matcher, save_checkpoint

SHAPE = {"patch_size": 8, "embed_dim": 24, "num_heads": 2}


def models() -> dict[str, Descriptor | Matcher]:
    torch.manual_seed(0)
    descriptor = Descriptor(DescriptorConfig(img_size=32, dim=16, backbone_options={**SHAPE, "depth": 1}))
    matcher = build_matcher(img_size=32, encoder_blocks=1, fusion_blocks=1, backbone_options=SHAPE)
    return {"descriptor": descriptor, "matcher": matcher}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    paths = tmp_path / "<a>.png", tmp_path / "b.png"
    for path, shape in zip(paths, [(40, 60, 3), (64, 48, 3)], strict=True):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("kind", ["descriptor", "matcher"])
def test_a_pair_is_looked_at_drawn_and_told(kind: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    seen = inspect_pair(models()[kind], *pair, probes=[(59.9, 0), (0, 39)])
    assert seen.probes == [3, 12]
    assert seen.cosines.shape == seen.affinities.shape == (16, 16)
    np.testing.assert_allclose(seen.affinities.sum(1), 1, rtol=1e-5)
    assert np.isfinite(seen.score)
    assert draw_inspection(seen).width > 300
    write_report(tmp_path / "page.html", inspection_report(seen))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data-patch='15'") == 2
    assert "<a>" not in page
    assert not re.search(r"(src|href)=['\"](?!data:)|url\(|@import", page)
    facts = json.loads(page.partition("id='patches'>")[2].partition("</script>")[0])
    assert facts["probe"] == 3
    np.testing.assert_allclose(np.array(facts["cosines"]) / 1000, seen.cosines, atol=5.1e-4)


def test_the_command(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = tmp_path / "model.safetensors", tmp_path / "out"
    save_checkpoint(weights, models()["descriptor"])
    command = ["inspect", *map(str, pair), "--model", str(weights), "--out", str(out)]
    assert main([*command, "--probe", "30,20"]) == 0
    assert {path.name for path in out.iterdir()} == {"inspect.png", "inspect.html", "inspect.json"}
    told = json.loads((out / "inspect.json").read_text())
    assert told["verdict"] == "place unknown"
    assert told["query_region"] is None
    assert "place unknown" in capsys.readouterr().out

    assert main([*command, "--probe", "60,20"]) == 2
    assert "--probe must lie within the 60 x 40 pixels" in capsys.readouterr().err
    pair[1].write_bytes(b"no picture")
    assert main(command) == 2
    assert "b.png cannot be used" in capsys.readouterr().err
