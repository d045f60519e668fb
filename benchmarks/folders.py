"""Copies found among a dataset's references, as `copynce search` finds them, beside a 64-bit perceptual hash.

    python -m benchmarks.folders default --dataset minidisc --split part2 --out runs/folders

Prints, and leaves as OUT/folders.json: uAP and copies found at 95 % precision (the largest recall at which the
precision of the pairs above is still as high) by probability, by cosine and by pHash (`pip install imagehash`; Hamming
distance, each query's nearest ten of all references too); what `search` lists without more said; seconds of both; the
expected calibration error of the judged pairs, and over each query's best alone; with MiniDISC's queries_meta.jsonl the
IoU of the copied regions. OUT/reliability.png is the calibration as a picture.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from benchmarks.true_regions import true_region
from copynce.copies.calibration import expected_calibration_error
from copynce.copies.pair import CopyPair
from copynce.copies.polygons import overlap
from copynce.copies.searching import K, find_copies
from copynce.data import EvaluationSplit, open_dataset
from copynce.evaluation.metrics import micro_average_precision
from copynce.files import atomic_text, whole_file
from copynce.inspect.curves import picture_of
from copynce.model import load_model

PRECISION = 0.95

Scored = list[tuple[str, str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-hash", action="store_true", help="without pHash")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    split = open_dataset(options.dataset, options.split)
    model = load_model(options.model)

    begin = time.perf_counter()
    pairs = find_copies(
        model,
        split.queries.paths,
        split.references.paths,
        threads=options.threads,
        on_broken=lambda path, reason: print(f"{path}: {reason}"),
    )
    seconds = time.perf_counter() - begin
    names = [_by_path(split.queries), _by_path(split.references)]
    ids = [(names[0][pair.query], names[1][pair.reference]) for pair in pairs]
    truth = np.array([reference in split.ground_truth.get(query, ()) for query, reference in ids])
    p = np.array([pair.probability for pair in pairs])

    results: dict[str, Any] = {"pairs": len(pairs), "seconds": round(seconds, 1)}
    for name, scores in (("probability", p), ("cosine", np.array([pair.score for pair in pairs]))):
        scored = [(*pair, float(score)) for pair, score in zip(ids, scores, strict=True)]
        results[name] = judged(scored, split)
    threshold = model.calibrated().threshold
    listed = p >= threshold
    results["listed"] = {
        "threshold": threshold,
        "pairs": int(listed.sum()),
        "precision": float(truth[listed].mean()) if listed.any() else None,
        "copies": int((truth & listed).sum()),
    }
    results["calibration_error"] = expected_calibration_error(p, truth)
    best = _best_of_each([query for query, _ in ids], p)
    results["calibration_error_best"] = expected_calibration_error(p[best], truth[best])
    results["regions"] = regions(pairs, ids, truth, listed, Path(options.dataset) / "queries_meta.jsonl")
    if not options.no_hash:
        begin = time.perf_counter()
        hashed = by_hash(split)
        results["phash"] = judged(hashed, split) | {"seconds": round(time.perf_counter() - begin, 1)}
    text = json.dumps(results, indent=2)
    print(text)
    with atomic_text(options.out / "folders.json") as file:
        file.write(text + "\n")
    with whole_file(options.out / "reliability.png") as picture:
        reliability(p, truth).save(picture, format="png")


def judged(scored: Scored, split: EvaluationSplit) -> dict[str, Any]:
    """uAP, and the most copies that stand above a precision of `PRECISION`."""
    order = sorted(range(len(scored)), key=lambda i: -scored[i][2])
    hits = np.array([scored[i][1] in split.ground_truth.get(scored[i][0], ()) for i in order])
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    # Equal scores cannot be told apart: a threshold lies behind the last of them.
    scores = np.array([scored[i][2] for i in order])
    ends = np.append(scores[1:] != scores[:-1], True)
    enough = np.flatnonzero((precision >= PRECISION) & ends)
    return {
        "uap": micro_average_precision(scored, split.ground_truth),
        "copies_at_95": int(hits[: enough[-1] + 1].sum()) if len(enough) else 0,
        "copies": sum(len(originals) for originals in split.ground_truth.values()),
    }


def by_hash(split: EvaluationSplit) -> Scored:
    """Each query's `K` nearest references by pHash, scored by minus the bits that differ."""
    import imagehash

    sides = []
    for manifest in (split.queries, split.references):
        rows = []
        for path in manifest.paths:
            with Image.open(path) as image:
                rows.append(imagehash.phash(image).hash.ravel())
        sides.append(np.array(rows, np.float32))
    distance = sides[0].sum(1)[:, None] + sides[1].sum(1) - 2 * sides[0] @ sides[1].T  # of bits: |a - b|^2
    near = np.argsort(distance, axis=1, kind="stable")[:, :K]
    return [
        (query, split.references.uuids[place], -float(distance[row, place]))
        for row, query in enumerate(split.queries.uuids)
        for place in near[row]
    ]


def regions(
    pairs: list[CopyPair], ids: list[tuple[str, str]], truth: NDArray[np.bool_], listed: NDArray[np.bool_], meta: Path
) -> dict[str, Any] | None:
    """IoU of the copied regions of listed copies, against the edits of `meta`; how many false pairs have no place."""
    if not meta.is_file():
        return None
    edits = {told["uuid"]: told["ops"] for told in map(json.loads, meta.read_text().splitlines())}
    overlaps, unknown, told = [], 0, 0
    for pair, (query, _), copy, shown in zip(pairs, ids, truth, listed, strict=True):
        if not (copy and shown) or query not in edits:
            continue
        true = true_region(edits[query], pair.reference_size, pair.query_size)
        unknown += not pair.region.found
        if true is None:
            continue
        told += 1
        if pair.region.found:
            overlaps.append((overlap(pair.region.query, true.query), overlap(pair.region.reference, true.reference)))
    mean = np.mean(overlaps, axis=0).tolist() if overlaps else [None, None]
    false = [pair.region.found for pair, copy in zip(pairs, truth, strict=True) if not copy and pair.probability > 0.05]
    return {
        "listed_copies": int((truth & listed).sum()),
        "place_unknown": unknown,
        "region_told": told,
        "found_of_these": len(overlaps),
        "iou_query": mean[0],
        "iou_reference": mean[1],
        "false_pairs_above_5_percent": len(false),
        "of_these_with_a_place": int(sum(false)),
    }


def reliability(p: NDArray[np.float64], truth: NDArray[np.bool_], bins: int = 10) -> Image.Image:
    """Share of copies over mean probability, a dot a bin, with how many pairs it stands for."""
    figure = Figure(figsize=(4.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#9aa1ad", linewidth=0.8, linestyle=(0, (4, 3)))
    number = np.minimum((p * bins).astype(int), bins - 1)
    for one in range(bins):
        here = number == one
        if here.any():
            axes.plot(p[here].mean(), truth[here].mean(), "o", color="#2166ac", markersize=5)
            axes.annotate(str(int(here.sum())), (p[here].mean(), truth[here].mean()), xytext=(5, -9),
                          textcoords="offset points", fontsize=7, color="#6b7280")  # fmt: skip
    axes.set_xlabel("probability", fontsize=9)
    axes.set_ylabel("share of copies", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return picture_of(figure)


def _best_of_each(queries: list[str], p: NDArray[np.float64]) -> NDArray[np.int64]:
    best: dict[str, int] = {}
    for row, query in enumerate(queries):
        if query not in best or p[row] > p[best[query]]:
            best[query] = row
    return np.array(list(best.values()), np.int64)


def _by_path(manifest: Any) -> dict[str, str]:
    return {str(path): uuid for path, uuid in zip(manifest.paths, manifest.uuids, strict=True)}


if __name__ == "__main__":
    main()
