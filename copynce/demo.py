"""``copynce demo``: the whole road in a few minutes, on made pictures or on the user's own."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from copynce.config import require_number
from copynce.data import EvaluationSplit, Manifest, Quarantine, read_manifest
from copynce.data.rows import write_rows
from copynce.data.settings import DescriptorData
from copynce.data.synthetic import make_pictures
from copynce.errors import DataError
from copynce.evaluation import evaluate_descriptor, read_predictions
from copynce.files import atomic_text
from copynce.inspect import (
    Figure,
    Found,
    Report,
    Search,
    Section,
    affinity,
    draw_affinity,
    draw_loss_curves,
    draw_traced_pixels,
    metrics_table,
    write_report,
)
from copynce.models import Descriptor, DescriptorConfig, load_descriptor
from copynce.pixtrace import CoordinateTable, EditProgram, patch_overlap, sample_program
from copynce.training import DescriptorLossConfig, OptimConfig, TrainConfig, checkpoints, read_log, train
from dali_pipelines import BrokenPicture, LoaderOptions, PictureLoader, ShardMember, read_picture, render_programs
from dali_pipelines.sources import read_bytes

#: Pictures that the demo makes for itself.
MADE_PICTURES = 600
#: Fewer would leave no held-out queries worth a figure.
LEAST_PICTURES = 60
#: Training steps that take about two minutes on two cores.
STEPS = 270
#: Side of a query picture in pixels; queries are saved as JPEG, as a finder of copies would meet them.
QUERY_SIDE = 256
_POLICY = "light"  # a small model learns little from the full policy in three minutes
_MODEL = DescriptorConfig(
    backbone="vit_small_patch16_224",
    backbone_options={"embed_dim": 192, "depth": 3, "num_heads": 3, "patch_size": 16},
    img_size=96,
    dim=128,
    freeze_patch_embed=False,  # nothing pretrained is worth keeping
)


@dataclass(frozen=True)
class _Query:
    """A query picture: where it lies, and what it was made of (``original`` is a row of the references, or None)."""

    path: Path
    program: EditProgram
    original: int | None


def run_demo(
    out: Path,
    *,
    data: Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train and judge a small descriptor; returns what metrics.json holds (uap, rp90, ..., before, after).

    ``data``: a folder (or CSV, or shards) of at least 60 pictures; None makes pictures. A run that was killed
    continues; ``out`` is made if absent. ``say`` is told what happens. Raises DataError if there are too few pictures
    that can be decoded, or if ``out`` holds a demo of other settings.
    """
    steps = STEPS if steps is None else steps
    require_number("steps", steps, least=0, most=10**12)
    require_number("seed", seed, least=0, below=2**63)
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, {"data": None if data is None else str(data.resolve()), "steps": steps, "seed": seed})
    if data is None:
        say(f"making {MADE_PICTURES} pictures")
        make_pictures(out / "pictures", MADE_PICTURES, seed, processes=len(os.sched_getaffinity(0)))
    manifest = read_manifest(data or out / "pictures")
    quarantine = Quarantine(out / "broken.jsonl")
    manifest.report(say, quarantine.add)
    training, references, strangers = _divide(manifest, seed)
    say("editing held-out pictures into queries")
    queries = _make_queries(out / "queries", training, references, strangers, seed, quarantine)
    _write_list(out / "train.csv", training)

    config = TrainConfig(
        out=str(out / "run"),
        data=DescriptorData(
            train=str(out / "train.csv"), root=str(training.root), policy=_POLICY, batch_size=min(48, len(training))
        ),
        model=_MODEL,
        loss=DescriptorLossConfig(),
        optim=OptimConfig(lr=1e-2, steps=steps),
        seed=seed,
        log_every=5,
        checkpoint_every=100,
    )
    say(f"training for {steps} steps")
    last = train(config)
    first = checkpoints(out / "run")[0]

    split = EvaluationSplit(
        name="held-out",
        queries=Manifest([q.path.stem for q in queries], [q.path for q in queries], out / "queries"),
        references=references,
        training=None,
        ground_truth={q.path.stem: [] if q.original is None else [references.uuids[q.original]] for q in queries},
    )
    say("evaluating before and after")
    models = {
        name: load_descriptor(folder / "model.safetensors") for name, folder in (("before", first), ("after", last))
    }
    results = {name: evaluate_descriptor(model, split, out / f"eval-{name}") for name, model in models.items()}
    metrics: dict[str, Any] = {
        **{key: results["after"][key] for key in ("uap", "rp90", "map", "recall_at_1")},
        "queries": len(queries),
        "references": len(references),
        "pictures": "made" if data is None else str(data),
        "seed": seed,
        "steps": steps,
        **results,
    }
    with atomic_text(out / "metrics.json") as file:
        json.dump(metrics, file, indent=2)
        file.write("\n")
    _report(out, metrics, queries, references, models)
    return metrics


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Note the demo's settings in its folder; a folder of other settings must not be continued."""
    file = out / "demo.json"
    if file.is_file():
        try:
            found = json.loads(file.read_bytes())
        except ValueError as error:
            raise DataError(
                f"{file}: not the settings of a demo ({error}); remove it or choose another --out"
            ) from error
        if found != settings:
            raise DataError(f"{out} holds a demo with {found}, got {settings}; choose another --out or remove it")
        return
    with atomic_text(file) as text:
        json.dump(settings, text)


def _divide(manifest: Manifest, seed: int) -> tuple[Manifest, Manifest, Manifest]:
    """Disjoint pictures to train on, to search in, and to make distractors of: 60, 25 and 15 percent."""
    if len(manifest) < LEAST_PICTURES:
        raise DataError(f"{manifest.root}: the demo needs at least {LEAST_PICTURES} pictures, got {len(manifest)}")
    order = np.random.default_rng((seed, 0xD1)).permutation(len(manifest)).tolist()
    first, second = math.ceil(0.6 * len(order)), math.ceil(0.85 * len(order))
    return manifest.select(order[:first]), manifest.select(order[first:second]), manifest.select(order[second:])


def _make_queries(
    folder: Path, training: Manifest, references: Manifest, strangers: Manifest, seed: int, quarantine: Quarantine
) -> list[_Query]:
    """Edited copies of the first references, as many edited strangers; other pictures in them come from training's."""
    folder.mkdir(parents=True, exist_ok=True)
    half = min(len(strangers), len(references))
    wanted: list[tuple[str, Path | ShardMember, int | None]] = []
    for i in range(half):
        wanted.append((f"copy-{i:04d}", references.paths[i], i))
        wanted.append((f"distractor-{i:04d}", strangers.paths[i], None))
    wanted = [item for item in wanted if _readable(item[1], quarantine)]
    programs = [sample_program(_POLICY, seed=seed, epoch=-1, uuid=name) for name, _, _ in wanted]
    pictures = render_programs([path for _, path, _ in wanted], programs, size=QUERY_SIDE, pictures=training.paths)
    queries = []
    for (name, _, row), program, pixels in zip(wanted, programs, pictures, strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.jpg", quality=90)
        queries.append(_Query(folder / f"{name}.jpg", program, row))
    if not any(query.original is not None for query in queries):
        raise DataError(f"{references.root}: no picture for a query could be decoded; {quarantine.summary()}")
    return queries


def _readable(path: Path | ShardMember, quarantine: Quarantine) -> bool:
    try:
        read_picture(path)
    except BrokenPicture as error:
        quarantine.add(error.path, error.reason)
        return False
    return True


def _raise_broken(path: str | os.PathLike[str], reason: str) -> None:
    raise DataError(f"{os.fspath(path)}: {reason}")


def _write_list(path: Path, manifest: Manifest) -> None:
    lines = (
        (uuid, os.path.relpath(picture, manifest.root))
        for uuid, picture in zip(manifest.uuids, manifest.paths, strict=True)
    )
    write_rows(path, itertools.chain([("uuid", "path")], lines))


# ------------------------------------------------------------------------------------------------ report


def _report(
    out: Path, metrics: dict[str, Any], queries: list[_Query], references: Manifest, models: dict[str, Descriptor]
) -> None:
    curve = draw_loss_curves(read_log(out / "run" / "log.jsonl")) if metrics["steps"] else None
    if curve is not None:
        curve.save(out / "loss.png")
    copies = [query for query in queries if query.original is not None]
    before, after = metrics["before"], metrics["after"]
    sections = [
        Section("Before and after", "", [metrics_table({"before": before, "after": after})]),
        Section(
            "What was found",
            "Edited copies and the three most similar references after training; the true original is marked.",
            _searches(out, copies[:6], references),
        ),
        Section(
            "Traced pixels",
            "PixTrace knows for every query pixel which reference pixel it copies: bright pixels are copied, lines "
            "join corresponding points.",
            [Figure(_traced(query, references), query.path.name) for query in copies[:4]],
        ),
        Section(
            "Patch affinity",
            "Where one patch of the query looks for its copy in the reference, before and after training; the "
            "outlined patches are the traced target of CopyNCE.",
            [Figure(_probe(query, references, models), query.path.name) for query in copies[:4]],
        ),
    ]
    if curve is not None:
        sections.insert(1, Section("Training", f"{metrics['steps']} steps.", [Figure(curve)]))
    write_report(
        out / "report.html",
        Report(
            "copynce demo",
            f"{metrics['queries']} held-out queries, half of them edited copies, searched in {metrics['references']} "
            f"references; pictures: {metrics['pictures']}; seed {metrics['seed']}",
            [
                ("uAP", f"{after['uap']:.3f}", f"before training {before['uap']:.3f}"),
                ("RP90", f"{after['rp90']:.3f}", f"before training {before['rp90']:.3f}"),
                ("recall@1", f"{after['recall_at_1']:.3f}", f"before training {before['recall_at_1']:.3f}"),
            ],
            sections,
        ),
    )


def _searches(out: Path, queries: list[_Query], references: Manifest) -> list[Search]:
    found: dict[str, list[tuple[float, str]]] = {}
    predictions = read_predictions(out / "eval-after" / "predictions.csv")
    for name, reference, score in zip(*predictions, strict=True):
        found.setdefault(name, []).append((float(score), reference))
    paths = dict(zip(references.uuids, references.paths, strict=True))
    searches = []
    for query in queries:
        assert query.original is not None
        truth = references.uuids[query.original]
        best = sorted(found.get(query.path.stem, []), reverse=True)
        ranks = [rank for rank, (_, uuid) in enumerate(best, start=1) if uuid == truth]
        note = (
            ""
            if ranks and ranks[0] <= 3
            else f"original at rank {ranks[0]}"
            if ranks
            else "original not in the first 10"
        )
        hits = [Found(_open(paths[uuid]), score, uuid == truth, uuid) for score, uuid in best[:3]]
        searches.append(Search(_open(query.path), hits, query.path.name, note))
    return searches


def _open(path: Path | ShardMember) -> Image.Image:
    with Image.open(io.BytesIO(read_bytes(path))) as picture:
        return picture.convert("RGB")


def _table(query: _Query, references: Manifest, size: int) -> CoordinateTable:
    """q -> r at ``size`` pixels; the reference is the plain picture, so q -> source is q -> r."""
    assert query.original is not None
    width, height = _open(references.paths[query.original]).size
    return query.program.trace((height, width), (size, size))


def _pixels(path: Path | ShardMember, size: int) -> NDArray[np.uint8]:
    return np.asarray(_open(path).resize((size, size), Image.Resampling.BICUBIC))


def _traced(query: _Query, references: Manifest) -> Image.Image:
    assert query.original is not None
    table = _table(query, references, 224)
    return draw_traced_pixels(
        _pixels(query.path, 224), _pixels(references.paths[query.original], 224), table.index, table.reverse().index
    )


def _probe(query: _Query, references: Manifest, models: dict[str, Descriptor]) -> Image.Image:
    assert query.original is not None
    model = models["after"]
    overlap = patch_overlap(_table(query, references, model.img_size), model.patch_size)
    copied = overlap.sum(1)
    # The wholly copied patch nearest to the middle of the copied region.
    rows, columns = np.divmod(np.arange(len(copied)), model.grid)
    weight = np.maximum(copied, 1e-9)
    distance = (rows - np.average(rows, weights=weight)) ** 2 + (columns - np.average(columns, weights=weight)) ** 2
    patch = int(np.argmin(distance + 1e6 * (copied < copied.max() - 1e-6)))
    maps = {}
    for name, each in models.items():
        pair = [query.path, references.paths[query.original]]
        loader = PictureLoader(pair, LoaderOptions(size=each.img_size, batch_size=2), on_broken=_raise_broken)
        images = torch.cat([batch for _, batch in loader])
        with torch.inference_mode():
            _, tokens = each(images)
        maps[name] = affinity(tokens[:1], tokens[1:], 1 / 16)[0][patch].numpy()
    return draw_affinity(
        _pixels(query.path, 224),
        _pixels(references.paths[query.original], 224),
        patch,
        maps,
        overlap[patch],
        grid=model.grid,
    )
