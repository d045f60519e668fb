"""From picture files to metrics.json, with a small real model and pictures of every kind, broken ones among them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from copynce.data import DataError, EvaluationSplit, Manifest, Quarantine, open_dataset, read_manifest
from copynce.evaluation import evaluate_descriptor, extract, read_predictions, score_predictions
from copynce.evaluation.search import normalised

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
