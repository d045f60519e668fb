"""The minutes on a GPU: their time boxes and report with parts that are played, and the measurements on a processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_parts
from benchmarks.gpu import BESIDE, PARTS, Part, run_parts
from copynce.data.synthetic import make_pictures

_ROW = (
    "import json, pathlib, sys; pathlib.Path(sys.argv[1], sys.argv[2]).write_text(json.dumps({'rate': 3.5}) + '\\n');"
)


def played(name: str, code: str, seconds: float = 1.0, **others: Any) -> Part:
    return Part(
        name, seconds, f"about {name}", ("-c", code, "{out}", f"{name.replace(' ', '-')}.jsonl", "{seconds}"), **others
    )


def test_each_part_has_its_box_and_none_ends_another(tmp_path: Path) -> None:
    child = "import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']).wait()"
    parts = [
        played("early", f"{_ROW} pathlib.Path(sys.argv[1], 'ready').read_text()", after="beside"),
        played("broken", "raise SystemExit('no such kernel')"),
        played("endless", f"{_ROW} {child}", 0.15),
        played("large", "", gpus=2),
        played("tests", "print('[gw0] [ 50%] PASSED a::b\\n[gw1] [100%] FAILED a::c[x y]\\nFAILED a::c')"),
        played("cut short", f"{_ROW} open(sys.argv[1] + '/cut-short.jsonl', 'a').write('[1, ')"),
    ]
    beside = played("beside", "import pathlib, sys; pathlib.Path(sys.argv[1], 'ready').touch()")
    said: list[str] = []
    found = {
        result.name: result
        for result in run_parts(parts, tmp_path, 40.0, device="cpu", gpus=1, beside=beside, say=said.append)
    }
    assert {name: result.status for name, result in found.items()} == {
        "large": "left out: it needs 2 GPUs, 1 are here",
        "beside": "done",
        "early": "done",
        "broken": "failed with status 1",
        "endless": found["endless"].status,
        "tests": "done",
        "cut short": "done",
    }
    assert found["endless"].status.startswith("cut off after ")
    assert found["endless"].rows == found["early"].rows == found["cut short"].rows == [{"rate": 3.5}]
    assert found["tests"].rows == [{"passed": 1, "failed": 1, "error": 0, "skipped": 0}]
    assert [result.failed for result in found.values()].count(True) == 2
    assert len(said) == 7
    report = json.loads((tmp_path / "report.json").read_text())
    assert [part["name"] for part in report["parts"]] == ["large", "beside", "early", *list(found)[3:]]
    text = (tmp_path / "report.md").read_text()
    assert "## broken: about broken" in text
    assert "no such kernel" in text
    assert "| rate |\n| --- |\n| 3.5 |" in text


def test_the_parts_fill_eight_minutes_and_what_they_run_is_there() -> None:
    assert sum(part.seconds for part in PARTS) == 480
    root = Path(gpu.__file__).parents[1]
    for part in (*PARTS, BESIDE):
        named = [
            Path(root, argument.partition("::")[0]) for argument in part.arguments if argument.startswith("tests/")
        ]
        assert all(path.exists() for path in named), part.name
    with pytest.raises(SystemExit):
        gpu.main(["--budget", "0"])


def test_a_step_its_profile_and_a_training_are_measured(tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", 8, side_px=(64, 96))
    config = gpu_parts.settings(
        tmp_path,
        "run",
        "cpu",
        "data.batch_size=4",
        "data.threads=1",
        "threads=1",
        "model.img_size=32",
        "model.dim=16",
        "model.backbone_options={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
        "precision=fp32",
    )
    rows: list[dict[str, Any]] = []

    def emit(row: Any) -> None:
        rows.append(dict(row))

    batch = gpu_parts.fixed_batch(config)
    step = gpu_parts.Step(config, batch)
    losses = [float(step()) for _ in range(3)]
    assert len(set(losses)) == 3
    row = gpu_parts._measure_step(config, batch, 0.1, 1.0, compiled=False, graph=False)
    assert row["first loss"] == losses[0]
    assert row["pictures/s"] == pytest.approx(8e3 / row["ms"])

    gpu_parts.measure_profile(config, emit, steps=1, rows=5)
    kinds = {row["kind"]: row["share"] for row in rows if "name" not in row}
    assert kinds.keys() == {"all", *gpu_parts.KINDS, "other"}
    assert sum(kinds.values()) == pytest.approx(2)
    assert kinds["matrix products"] > 0
    assert gpu_parts.kind_of("_copynce_fwd_kernel") == "CopyNCE"
    assert gpu_parts.kind_of("sm90_xmma_gemm_bf16") == "matrix products"

    found = gpu_parts.measure_training(config, 0.2)
    assert found["pictures/s"] > 0
    assert found["steps"] > 0
    assert not Path(config.out).exists()
    assert gpu_parts._loader_rate(config, 0, 0.1)["pictures/s"] > 0
    failed = gpu_parts._attempt(emit, {"step": "graph"}, lambda: torch.zeros(2).view(3))
    assert "RuntimeError" in failed["error"]
    assert rows[-1]["step"] == "graph"


def test_a_part_writes_its_rows_and_tells_of_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(config: Any, seconds: float, emit: Any) -> None:
        emit({"step": "eager", "seconds": seconds, "pairs": config.data.batch_size})
        emit({"step": "graph", "error": "RuntimeError: it waits"})

    monkeypatch.setattr(gpu_parts, "measure_steps", measure)
    with pytest.raises(SystemExit, match="1 of the measurements failed"):
        gpu_parts.main("step", str(tmp_path / "out"), "gpu", "7.5")
    rows = [json.loads(line) for line in (tmp_path / "out" / "step.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": "eager", "seconds": 7.5, "pairs": 96},
        {"step": "graph", "error": "RuntimeError: it waits"},
    ]
