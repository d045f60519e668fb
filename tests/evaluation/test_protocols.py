"""From picture files to metrics.json, with a small real model and pictures of every kind, broken ones among them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from copynce import __version__
from copynce.data import EvaluationSplit, Manifest, Quarantine, open_dataset, read_manifest
from copynce.errors import ConfigError, DataError, UserError
from copynce.evaluation import evaluate_descriptor, read_predictions, score_predictions
from copynce.models import build_descriptor, load_checkpoint, save_checkpoint
from copynce.retrieval import extract as extract_module
from copynce.retrieval.extract import extract
from copynce.retrieval.features import read_features
from copynce.retrieval.search import normalised

SIZE = 32


class Thumbnail(nn.Module):
    """The picture's own 8 x 8 thumbnail as descriptor: no training, yet it finds plain copies."""

    img_size = SIZE

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)  # makes training mode visible in the output

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        thumbnail = nn.functional.avg_pool2d(images, SIZE // 8).flatten(1)
        return self.dropout(thumbnail), thumbnail[:, :, None]


class Infinite(Thumbnail):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        descriptor, tokens = super().forward(images)
        return descriptor / 0.0, tokens


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((70, 50), Image.Resampling.BICUBIC)


@pytest.fixture
def split(tmp_path: Path) -> EvaluationSplit:
    """Six queries, four references, six training pictures: two copies, two distractors, two broken copies."""
    root = tmp_path / "data"
    for folder in ["references", "queries", "training"]:
        (root / folder).mkdir(parents=True)
    for i in range(4):
        picture(i).save(root / "references" / f"R{i}.png")
    for i in range(6):
        picture(20 + i).save(root / "training" / f"T{i}.jpg")
    picture(0).save(root / "queries" / "Q0.jpg", quality=40)
    picture(1).convert("CMYK").save(root / "queries" / "Q1.jpg", quality=90)
    picture(10).convert("P").save(root / "queries" / "Q2.png")
    picture(11).save(root / "queries" / "Q3.webp")
    (root / "queries" / "Q4.jpg").write_bytes(b"")
    (root / "queries" / "Q5.jpg").write_text("this is no picture")
    ground_truth = {"Q0": ["R0"], "Q1": ["R1"], "Q2": [], "Q3": [], "Q4": ["R2"], "Q5": ["R3"]}
    manifests = [read_manifest(root / folder) for folder in ("queries", "references", "training")]
    return EvaluationSplit("tiny", manifests[0], manifests[1], manifests[2], ground_truth)


def test_extract(split: EvaluationSplit) -> None:
    quarantine = Quarantine()
    done: list[int] = []
    model = Thumbnail().train()
    features = extract(model, split.queries, batch_size=3, quarantine=quarantine, progress=done.append)
    assert features.uuids == ["Q0", "Q1", "Q2", "Q3"]
    assert features.values.shape == (4, 192)
    assert features.values.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features.values, axis=1), 1.0, rtol=1e-6)
    assert {Path(path).name for path, _ in quarantine.entries()} == {"Q4.jpg", "Q5.jpg"}
    assert done == [3, 4, 6]  # the second batch has one good picture, and the end counts all
    assert model.training

    # Each row belongs to its uuid, whatever the batches and their order were.
    pixels = np.asarray(picture(11).resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32) / 255
    pixels = (pixels - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    descriptor, _ = model.eval()(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    assert float(features.values[3] @ normalised(descriptor.numpy())[0]) > 0.995  # WebP is lossy
    again = extract(model, split.queries.select([3, 0]), batch_size=1)
    assert again.uuids == ["Q3", "Q0"]
    np.testing.assert_allclose(again.values, features.values[[3, 0]], atol=1e-6)


def test_evaluate(split: EvaluationSplit, tmp_path: Path) -> None:
    progress: list[tuple[str, int, int]] = []
    metrics = evaluate_descriptor(
        Thumbnail(),
        split,
        tmp_path / "out" / "eval",
        batch_size=4,
        score_normalization=True,
        progress=lambda *state: progress.append(state),
    )
    # Two of four copies are found, the broken two count as missed.
    assert (metrics["uap"], metrics["rp90"], metrics["map"], metrics["recall_at_1"]) == (0.5, 0.5, 0.5, 0.5)
    assert (metrics["uap_sn"], metrics["rp90_sn"]) == (0.5, 0.5)
    assert (metrics["queries"], metrics["positives"], metrics["references"]) == (6, 4, 4)
    assert (metrics["skipped_queries"], metrics["skipped_references"], metrics["skipped_training"]) == (2, 0, 0)
    assert metrics["predictions"] == 4 * 4  # ten are asked for, there are four references
    assert ("reference", 4, 4) in progress
    assert ("training", 6, 6) in progress

    out = tmp_path / "out" / "eval"
    assert json.loads((out / "metrics.json").read_text()) == metrics
    again = score_predictions(read_predictions(out / "predictions.csv"), split.ground_truth)
    assert again == {key: metrics[key] for key in again}
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {Path(line["path"]).name for line in skipped} == {"Q4.jpg", "Q5.jpg"}
    assert all(line["reason"] for line in skipped)
    assert sorted(path.name for path in out.iterdir()) == ["metrics.json", "predictions.csv", "skipped.jsonl"]


@pytest.fixture
def evaluate(split: EvaluationSplit, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], list[str]]]:
    """Evaluates a small real descriptor as the command does; gives the metrics and the sentences said."""
    options = {"patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
    save_checkpoint(tmp_path / "a.safetensors", build_descriptor(img_size=SIZE, dim=16, backbone_options=options))

    def run(file: str = "a.safetensors", split: EvaluationSplit = split, **settings: Any) -> Any:
        said: list[str] = []
        path = tmp_path / file
        model = load_checkpoint(path)
        return evaluate_descriptor(model, split, tmp_path / "out", model_file=path, say=said.append, **settings), said

    return run


def kept(folder: Path) -> dict[str, int]:
    """The files of features, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("features/*"))}


def test_features_are_kept_and_serve_the_next_evaluation(evaluate: Any, split: EvaluationSplit, tmp_path: Path) -> None:
    metrics, _ = evaluate(score_normalization=True)
    predictions = (tmp_path / "out" / "predictions.csv").read_bytes()
    first = kept(tmp_path / "out")
    assert list(first) == ["query-0000.safetensors", "reference-0000.safetensors", "training-0000.safetensors"]
    again, _ = evaluate(score_normalization=True, batch_size=2)
    assert kept(tmp_path / "out") == first
    assert again == metrics | {"batch_size": 2}
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == predictions
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 2  # told again, though not read again

    # Only what was made from something else is made anew.
    picture(7).save(tmp_path / "data" / "references" / "R2.png")
    evaluate()
    second = kept(tmp_path / "out")
    assert [name for name in first if second[name] != first[name]] == ["reference-0000.safetensors"]
    shorter = dataclasses.replace(split, queries=split.queries.select([0, 1]))
    shorter = dataclasses.replace(shorter, ground_truth={"Q0": ["R0"], "Q1": ["R1"]})
    evaluate(split=shorter)
    third = kept(tmp_path / "out")
    assert [name for name in second if third[name] != second[name]] == ["query-0000.safetensors"]


def test_another_model_makes_its_own_features(evaluate: Any, tmp_path: Path) -> None:
    first, _ = evaluate()
    model = load_checkpoint(tmp_path / "a.safetensors")
    torch.nn.init.normal_(model.heads["linear_head"].fc1.weight)
    save_checkpoint(tmp_path / "b.safetensors", model)
    second, _ = evaluate("b.safetensors")
    features = read_features(tmp_path / "out" / "features" / "query-0000.safetensors")
    assert features.made_from["model"] == second["model_sha256"] != first["model_sha256"]
    assert (first["model"], second["model"]) == (str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"))


def test_an_evaluation_that_was_killed_goes_on(evaluate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the first and the second half of the references."""
    whole, _ = evaluate()
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(extract_module, "_PART", 2)

    def kill(role: str, done: int, total: int) -> None:
        if (role, done) == ("reference", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(progress=kill, batch_size=1)
    first = kept(tmp_path / "out")
    assert list(first) == [*(f"query-000{i}.safetensors" for i in range(3)), "reference-0000.safetensors"]
    done: list[tuple[str, int]] = []
    metrics, _ = evaluate(progress=lambda role, count, total: done.append((role, count)), batch_size=1)
    assert first.items() <= kept(tmp_path / "out").items()
    assert done == [("query", 2), ("query", 4), ("query", 6), *(("reference", i) for i in (2, 3, 4, 4))]
    assert {name: metrics[name] for name in ("uap", "skipped_queries")} == {"uap": whole["uap"], "skipped_queries": 2}
    assert list(read_features(tmp_path / "out" / "features" / "query-0002.safetensors").features.uuids) == []


def test_a_damaged_file_of_features_is_made_anew(evaluate: Any, tmp_path: Path) -> None:
    metrics, _ = evaluate()
    file = tmp_path / "out" / "features" / "query-0000.safetensors"
    for content in (b"", file.read_bytes()[:-7], b"{}"):
        file.write_bytes(content)
        assert evaluate()[0] == metrics
        assert read_features(file).features.uuids == ["Q0", "Q1", "Q2", "Q3"]


def test_a_hidden_ground_truth_leaves_predictions(evaluate: Any, split: EvaluationSplit, tmp_path: Path) -> None:
    hidden = dataclasses.replace(split, ground_truth={query: [] for query in split.ground_truth})
    evaluate()
    predictions = (tmp_path / "out" / "predictions.csv").read_bytes()
    metrics, said = evaluate(split=hidden, score_normalization=True)
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == predictions
    assert "nothing to score" in said[0]
    assert (metrics["positives"], "uap" in metrics, "uap_sn" in metrics) == (0, False, False)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics


def test_metrics_say_what_they_are_of(evaluate: Any, tmp_path: Path) -> None:
    metrics, _ = evaluate(precision="fp32", score_normalization=True, alpha=0.5, start=0, end=2)
    digest = hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    expected = {"model_sha256": digest, "split": "tiny", "precision": "fp32", "k": 10, "version": __version__}
    assert expected.items() <= metrics.items()
    assert {"alpha": 0.5, "start": 0, "end": 2}.items() <= metrics.items()
    assert Path(metrics["dataset"]) == tmp_path / "data" / "references"
    assert metrics["commit"]
    assert "core" in metrics["processor"]


def test_normalization_settings_reach_the_scores(evaluate: Any) -> None:
    """alpha 0 subtracts nothing."""
    metrics, _ = evaluate(score_normalization=True, alpha=0.0, end=2)
    assert metrics["rp90_threshold_sn"] == metrics["rp90_threshold"]
    assert evaluate(score_normalization=True, end=2)[0]["rp90_threshold_sn"] != metrics["rp90_threshold"]


def test_a_global_cap_keeps_the_best_pairs_of_all_queries(evaluate: Any, tmp_path: Path) -> None:
    evaluate()
    everything = read_predictions(tmp_path / "out" / "predictions.csv")
    metrics, _ = evaluate(global_candidates=5)
    capped = read_predictions(tmp_path / "out" / "predictions.csv")
    assert sorted(capped.scores) == sorted(everything.scores)[-5:]
    pairs = list(zip(*everything, strict=True))
    assert list(zip(*capped, strict=True)) == [pair for pair in pairs if pair in set(zip(*capped, strict=True))]
    assert (metrics["predictions"], metrics["global_candidates"]) == (5, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"score_normalization": True, "start": 2, "end": 2}, "0 <= start < end, got 2 and 2"),
        ({"score_normalization": True, "end": 7}, "split 'tiny': score normalisation with end=7 needs .* got 6"),
        ({"global_candidates": 0}, "global_candidates must be at least 1"),
        ({"global_candidates": 60}, "below the 60 predictions of k=10 for 6 queries; raise k, got 60"),
    ],
)
def test_what_cannot_work_is_said_before_a_picture_is_read(
    settings: dict[str, Any], message: str, evaluate: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(**settings, progress=lambda *_: pytest.fail("a picture was read"))
    assert not (tmp_path / "out").exists()


def test_out_is_no_folder(evaluate: Any, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match=r"out: .*out must be a folder, or not there yet, but it is a file"):
        evaluate()
    (tmp_path / "out").unlink()
    (tmp_path / "out" / "metrics.json").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"metrics.json must be a file, or not there yet, but it is a folder"):
        evaluate()


class Coarse(Thumbnail):
    """A linear map in whose bfloat16 products small differences between pictures get lost."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        thumbnail, tokens = super().forward(images)
        sums = torch.nn.functional.linear(thumbnail, torch.eye(192))
        return sums + self.scale * (sums - thumbnail), tokens


@pytest.fixture
def bf16_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract_module, "bf16_in_hardware", lambda device: True)


@pytest.mark.usefixtures("bf16_is_fast")
def test_bf16_is_taken_where_descriptors_agree(split: EvaluationSplit) -> None:
    said: list[str] = []
    exact = extract(Coarse(0), split.references, precision="fp32")
    auto = extract(Coarse(0), split.references, say=said.append)
    assert (exact.precision, auto.precision, said) == ("fp32", "bf16", [])
    assert not np.array_equal(exact.values, auto.values)
    assert (exact.values * auto.values).sum(axis=1).min() >= 0.9999


@pytest.mark.usefixtures("bf16_is_fast")
def test_bf16_stays_off_where_descriptors_differ(split: EvaluationSplit) -> None:
    said: list[str] = []
    auto = extract(Coarse(100), split.references, batch_size=2, say=said.append)
    assert auto.precision == "fp32"
    assert len(said) == 1
    assert "goes on in fp32" in said[0]
    np.testing.assert_array_equal(auto.values, extract(Coarse(100), split.references, precision="fp32").values)
    assert extract(Coarse(100), split.references, precision="bf16").precision == "bf16"  # who asks for it gets it


@pytest.mark.usefixtures("bf16_is_fast")
def test_all_pictures_of_an_evaluation_have_one_precision(evaluate: Any, tmp_path: Path) -> None:
    def used() -> list[str]:
        return [read_features(path).features.precision for path in sorted((tmp_path / "out").glob("features/*"))]

    assert evaluate(precision="fp32")[0]["precision"] == "fp32"
    assert used() == ["fp32", "fp32"]
    assert evaluate(precision="bf16")[0]["precision"] == "bf16"
    assert used() == ["bf16", "bf16"]
    (tmp_path / "out" / "features" / "query-0000.safetensors").unlink()
    assert evaluate(precision="fp32")[0]["precision"] == "fp32"
    assert used() == ["fp32", "fp32"]


def test_normalization_needs_training_pictures(split: EvaluationSplit, tmp_path: Path) -> None:
    bare = EvaluationSplit(split.name, split.queries, split.references, None, split.ground_truth)
    with pytest.raises(DataError, match="split 'tiny': score normalisation needs training pictures"):
        evaluate_descriptor(Thumbnail(), bare, tmp_path, score_normalization=True)


def test_nothing_can_be_decoded(split: EvaluationSplit) -> None:
    with pytest.raises(DataError, match="none of the 2 pictures could be decoded; 2 broken pictures skipped"):
        extract(Thumbnail(), split.queries.select([4, 5]))


def test_a_model_that_diverged(split: EvaluationSplit) -> None:
    with pytest.raises(ValueError, match="descriptors of the model: 4 of 4 rows are zero or not finite"):
        extract(Infinite(), split.references)


def test_a_model_without_input_size(split: EvaluationSplit) -> None:
    with pytest.raises(TypeError, match="model must have an integer attribute img_size"):
        extract(nn.Identity(), split.references)


def test_minidisc(minidisc: Path, tmp_path: Path) -> None:
    whole = open_dataset(minidisc, "part2")
    queries = [i for i, uuid in enumerate(whole.queries.uuids) if whole.ground_truth[uuid]][:20]
    uuids = [whole.queries.uuids[i] for i in queries]
    wanted = {reference for uuid in uuids for reference in whole.ground_truth[uuid]}
    references: Manifest = whole.references.select(i for i, u in enumerate(whole.references.uuids) if u in wanted)
    small = EvaluationSplit(
        "few", whole.queries.select(queries), references, None, {u: whole.ground_truth[u] for u in uuids}
    )
    metrics = evaluate_descriptor(Thumbnail(), small, tmp_path)
    assert (metrics["queries"], metrics["positives"], metrics["skipped_queries"]) == (20, 20, 0)
    assert float(metrics["recall_at_10"] or 0) > 0.5  # chance: 10 of 20 references
