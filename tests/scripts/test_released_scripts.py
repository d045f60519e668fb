"""The released README's steps, in its order and with its arguments, on a folder in DISC21's form."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from copynce.data.sources import open_source
from copynce.recipes import named_run
from copynce.training import TrainConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
#: What makes the released trainings small: the backbone of the files, small pictures, two steps.
SMALL = ["data.batch_size=2", "data.threads=1", "optim.steps=2", "optim.epochs=1", "precision=fp32", "device=cpu"]
SMALL_MODEL = ["model.backbone=vit_tiny_patch16_224", "model.img_size=32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures a role, lists and ground truth of dev sets I and II, a backbone: what the README downloads."""
    root = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    disc = root / "datasets" / "DISC21"
    names = {
        "training_images": [f"T{i:06d}" for i in range(12)],
        "reference_images": [f"R{i:06d}" for i in range(12)],
        "query_images": [f"Q{i:05d}" for i in range(3)] + [f"Q{i:05d}" for i in range(25_000, 25_003)],
    }
    for folder, stems in names.items():
        (disc / folder).mkdir(parents=True)
        for stem in stems:
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(disc / folder / f"{stem}.jpg")
    data = root / "data"
    data.mkdir()
    (data / "DISC21_train.json").write_text(json.dumps([f"{stem}.jpg" for stem in names["training_images"]]))
    for split, queries in (("val", names["query_images"][:3]), ("dev", names["query_images"][3:])):
        lines = "".join(f"{query},query_images/{query}.jpg\n" for query in queries)
        (data / f"isc_25k_matching_{split}_set_query.csv").write_text("uuid,path\n" + lines)
        truth = {query: [f"R{i:06d}"] if i < 2 else [] for i, query in enumerate(queries)}
        (data / f"isc_25k_matching_{split}_set_gt.json").write_text(json.dumps(truth))
    pairs = [[query, [[f"R{i:06d}", 0.0] for i in range(3)]] for query in names["query_images"][3:]]
    (data / "isc_copynce_matching_dev_set_pairs.json").write_text(json.dumps(pairs))
    (root / "weights").mkdir()
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=3)
    torch.save(backbone.state_dict(), root / "weights" / "dino_deitsmall16_pretrain.pth")
    return root


def step(place: Path, script: str, *arguments: str, **environment: str) -> str:
    """What a script prints; it must end well."""
    interpreter = "bash" if script.endswith(".sh") else sys.executable
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [interpreter, str(SCRIPTS / script), *arguments],
        cwd=place,
        env={**os.environ, "PATH": path, "PYTHONPATH": search, "NPROC": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_descriptor_is_prepared_trained_and_measured(place: Path) -> None:
    step(
        place,
        "run/modify_dino_weights.py",
        *("--layers", "3", "--encoder-layers", "3"),
        *("--weights-path", "weights/dino_deitsmall16_pretrain.pth", "--output-path", "weights/dino_enc-3.pth"),
    )
    step(place, "run/extract_dino_features.sh", "isc", "dev/vits_lin.yaml", "dino_vits_isc_train.pth", "device=cpu")
    features = "outputs/dino/eval/dino_vits_isc_train.pth"
    step(
        place,
        "run/build_knn.py",
        *("--query-feature-path", features, "--reference-feature-path", features),
        *("--output-path", "weights/dino_vits_isc_knn.pth", "--k", "5"),
    )
    table = torch.load(place / "weights" / "dino_vits_isc_knn.pth", weights_only=True)
    assert table.shape == (12, 6)
    assert table[:, 0].tolist() == list(range(12))
    small = [*SMALL, *SMALL_MODEL, "model.backbone_options={depth: 3}"]
    arguments = ["copynce_descriptor", "weights/dino_enc-3.pth", "copynce.yaml", "dev/vits_lin.yaml"]
    step(place, "train/train_des.sh", *arguments, *small)
    out = place / "outputs" / "copynce_descriptor" / "eval" / "vits_lin"
    assert 0 <= json.loads((out / "metrics.json").read_text())["uap"] <= 1
    step(place, "run/extract_features.sh", "copynce_descriptor", "isc", "dev/vits_lin.yaml", "train_feat_ep-30.pth")
    assert list((out / "train_feat_ep-30.pth").glob("*.safetensors"))
    for script in ("score_normalization", "feature_stretching"):
        step(
            place,
            f"run/{script}.py",
            *("--query-feature-path", str(out / "query_feat_ep-30.pth")),
            *("--reference-feature-path", str(out / "reference_feat_ep-30.pth")),
            *("--auxiliary-feature-path", str(out / "train_feat_ep-30.pth"), "--output-path", f"{script}.json"),
        )
        assert {len(found) for _, found in json.loads((place / f"{script}.json").read_text())} == {10}
    crops = ["copynce_descriptor", "dev/vits_lin_loc-ver.yaml", "device=cpu", "k=7"]
    step(place, "eval/eval_des_local_verification.sh", *crops)
    found = json.loads((out.with_name("vits_lin_loc-ver") / "candidates.json").read_text())
    assert {len(references) for _, references in found} == {7}


def test_a_matcher_is_prepared_trained_and_measured(place: Path) -> None:
    step(
        place,
        "run/modify_dino_weights.py",
        *("--layers", "3", "--encoder-layers", "2"),
        *("--weights-path", "weights/dino_deitsmall16_pretrain.pth", "--output-path", "weights/dino_enc-2_fus-1.pth"),
    )
    step(
        place,
        "run/interpolate_pos_embed.py",
        *("--weights-path", "weights/dino_enc-2_fus-1.pth", "--img-size", "48"),
        *("--output-path", "weights/dino_enc-2_fus-1_pos-emb-3x3.pth.tar"),
    )
    np.save(place / "knn.npy", (np.arange(12)[:, None] + np.arange(1, 4)) % 12)
    small = [*SMALL, "model.backbone=vit_tiny_patch16_224", "model.img_size=48"]
    small += ["model.encoder_blocks=2", "model.fusion_blocks=1"]
    weights = "weights/dino_enc-2_fus-1_pos-emb-3x3.pth.tar"
    arguments = ["copynce_matcher", weights, "copynce.yaml", "dev/isc_copynce-cand.yaml"]
    step(place, "train/train_cls.sh", *arguments, *small, KNN="knn.npy")
    out = place / "outputs" / "copynce_matcher" / "eval"
    assert 0 <= json.loads((out / "isc_copynce-cand" / "metrics.json").read_text())["uap"] <= 1
    crops = "isc_copynce-cand_local-verification"
    step(place, "eval/eval_cls_local_verification.sh", "copynce_matcher", f"dev/{crops}.yaml", "device=cpu")
    plain, best = (
        {line.rpartition(",")[0]: float(line.rpartition(",")[2]) for line in text.splitlines()[1:]}
        for text in ((out / name / "predictions.csv").read_text() for name in ("isc_copynce-cand", crops))
    )
    assert plain.keys() == best.keys()
    assert all(best[pair] >= plain[pair] - 1e-6 for pair in plain)
    step(place, "eval/measure_cls.sh", f"outputs/copynce_matcher/eval/{crops}/predictions.json", "dev/vits_lin.yaml")
    scores = [f"outputs/copynce_matcher/eval/{name}/predictions.json" for name in ("isc_copynce-cand", crops)]
    step(place, "run/concat_and_trim_scores.py", *scores, "--output-path", "both.json", "--k", "2")
    assert {len(found) for _, found in json.loads((place / "both.json").read_text())} == {2}


@pytest.mark.parametrize("encoder_layers", ["2", "1"])
def test_a_backbone_of_other_blocks_is_refused(
    encoder_layers: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--weights-path", str(place / "weights" / "dino_deitsmall16_pretrain.pth"), "--output-path", "out.pth"]
    monkeypatch.setattr(sys, "argv", ["modify", "--layers", "2", "--encoder-layers", encoder_layers, *files])
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / "run" / "modify_dino_weights.py"), run_name="__main__")
    assert end.value.code == 2
    assert "its encoder has " in capsys.readouterr().err
    assert not Path("out.pth").exists()


@pytest.mark.parametrize(("script", "items"), [("train_des.sh", 2), ("train_cls.sh", 2 + 1)])
def test_fine_tuning_finds_its_pictures(script: str, items: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the scripts hand to the command line, as it reads it: two known copies, and one of twelve pictures."""
    monkeypatch.chdir(place)
    np.save("ring.npy", (np.arange(12)[:, None] + np.arange(1, 4)) % 12)
    Path("told").mkdir(exist_ok=True)
    (Path("told") / "python").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (Path("told") / "python").chmod(0o755)
    told = subprocess.run(
        ["bash", str(SCRIPTS / "train" / script), "tuned", "weights", "finetune.yaml", "dev/isc_copynce-cand.yaml"],
        env={**os.environ, "PATH": f"told{os.pathsep}{os.environ['PATH']}", "NPROC": "1", "KNN": "ring.npy"},
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    assert told[:3] == ["-m", "copynce.cli", "train"]
    name, *overrides = told[3:]
    overrides = overrides[: next((i for i, word in enumerate(overrides) if "=" not in word), None)]
    config = load_config(TrainConfig, named_run(name), overrides)
    assert len(open_source(config.data, 0)) == items


@pytest.mark.parametrize("script", sorted(str(p.relative_to(SCRIPTS)) for p in SCRIPTS.glob("*/*") if p.is_file()))
def test_help(script: str, tmp_path: Path) -> None:
    said = step(tmp_path, script, "--help")
    assert Path(script).name in said or "usage:" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "folder"),
    [
        ("dev/vits_lin.yaml", "vits_lin"),
        ("test/vits_lin_test.yaml", "vits_lin_test"),
        ("test/vits_lin.yaml", "vits_lin_test"),
        ("val/vits_lin.yaml", "vits_lin_val"),
    ],
)
def test_splits_have_folders_of_their_own(config: str, folder: str) -> None:
    told = subprocess.run(
        ["bash", "-c", f". {shlex.quote(str(SCRIPTS / 'common.sh'))} x; stem_of {config}"],
        capture_output=True,
        text=True,
    )
    assert told.stdout.strip() == folder, told.stderr


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPTS / "eval/eval_des.sh"), "a", "dev/x.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "datasets/DISC21 has no query_images; DISC21=FOLDER says where" in done.stderr
