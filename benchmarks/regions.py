"""Where copies were copied: copied regions against MiniDISC's true edits, and what the geometry says of false matches.

    python -m benchmarks.regions runs/descriptor --dataset minidisc --part 1 --pairs 250

Every copy of the part with its reference (a true pair), and every query with the reference that the descriptor takes
for the likeliest of the wrong ones (a false pair). Printed: of the true pairs whose region the edits tell
(``benchmarks.true_regions``) the mean intersection over union, query and reference, of those that were found (a pair
without a verdict of place gives no region, and counts as 0 in the mean over all); the share of ``place unknown``; and
the share of the false pairs that the geometry exposes by that verdict. One thread; seconds are the processor's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.true_regions import TrueRegion, true_region
from copynce.copies.polygons import overlap
from copynce.copies.regions import CopiedRegion, copied_region
from copynce.data import Manifest, open_dataset
from copynce.models import load_descriptor
from copynce.models.descriptor import Descriptor
from copynce.retrieval.patches import with_patches
from copynce.training import find_model

#: Columns of the rows that ``measure`` gives.
COLUMNS = (
    *("query", "reference", "is_copy", "score"),
    *("verdict", "evidence", "agreement", "inliers", "matches"),
    *("told", "iou_query", "iou_reference"),
)


@dataclass(frozen=True)
class Encoded:
    """uuids; float32 [n, D]; float16 [n, L, C], unit rows; [(width, height)] in pixels."""

    uuids: list[str]
    descriptors: NDArray[np.float32]
    tokens: NDArray[np.float16]
    sizes: list[tuple[int, int]]


def encoded(model: Descriptor, pictures: Manifest) -> Encoded:
    """What the model makes of these pictures."""
    places, descriptors, tokens = [], [], []
    for batch in with_patches(model, pictures.paths, threads=1, on_broken=lambda path, reason: None):
        places += batch.places.tolist()
        descriptors.append(batch.descriptors)
        tokens.append((batch.tokens / np.linalg.norm(batch.tokens, axis=2, keepdims=True)).astype(np.float16))
    sizes = []
    for place in places:
        with Image.open(pictures.paths[place]) as image:
            sizes.append(image.size)
    uuids = [pictures.uuids[place] for place in places]
    return Encoded(uuids, np.concatenate(descriptors), np.concatenate(tokens), sizes)


def pairs_of(
    queries: Encoded, references: Encoded, truth: dict[str, list[str]], count: int
) -> list[tuple[int, int, bool]]:
    """(query, reference, whether it is a copy): of the first `count` copies the true pair, and each query's likeliest
    wrong one, distractors among them, as many."""
    number = {uuid: place for place, uuid in enumerate(references.uuids)}
    true, false = [], []
    for place, uuid in enumerate(queries.uuids):
        originals = [number[name] for name in truth[uuid] if name in number]
        true += [(place, original, True) for original in originals]
        cosines = references.descriptors @ queries.descriptors[place]
        cosines[originals] = -np.inf
        false.append((place, int(cosines.argmax()), False))
    return true[:count] + false[:count]


def measure(
    queries: Encoded, references: Encoded, pairs: Sequence[tuple[int, int, bool]], edits: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row of `COLUMNS` for each pair."""
    rows = []
    for query, reference, is_copy in pairs:
        region = copied_region(
            queries.tokens[query], references.tokens[reference], queries.sizes[query], references.sizes[reference]
        )
        uuid = queries.uuids[query]
        true = true_region(edits[uuid], references.sizes[reference], queries.sizes[query]) if is_copy else None
        score = float(queries.descriptors[query] @ references.descriptors[reference])
        row = (
            *(uuid, references.uuids[reference], is_copy, score),
            *(region.verdict, region.evidence, region.agreement, region.inliers, region.matches),
            *(true is not None, *overlaps(region, true)),
        )
        rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows


def overlaps(region: CopiedRegion, true: TrueRegion | None) -> tuple[float | None, float | None]:
    """Intersection over union in query and reference, None where the truth is not told."""
    if true is None:
        return None, None
    return overlap(region.query, true.query), overlap(region.reference, true.reference)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The figures of the module's text."""
    copies = [row for row in rows if row["is_copy"]]
    others = [row for row in rows if not row["is_copy"]]
    found = [row for row in copies if row["verdict"] == "found"]
    told = [row for row in copies if row["told"]]
    told_found = [row for row in found if row["told"]]
    figures: dict[str, float] = {"true_pairs": len(copies), "false_pairs": len(others), "told": len(told)}
    figures["place_unknown"] = 1 - len(found) / len(copies)
    figures["told_found"] = len(told_found)
    for side in ("query", "reference"):
        values = np.array([row[f"iou_{side}"] for row in told_found])
        figures[f"iou_{side}"] = float(values.mean())
        figures[f"iou_{side}_all"] = float(values.sum() / len(told))
    figures["wrong_regions"] = float(np.mean([row["iou_query"] < 0.3 for row in told_found]))
    figures["exposed"] = float(np.mean([row["verdict"] != "found" for row in others]))
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description="Copied regions against MiniDISC's true edits.")
    parser.add_argument("model", help="a descriptor: a run, a checkpoint or a weights file")
    parser.add_argument("--dataset", type=Path, required=True, help="the folder of MiniDISC")
    parser.add_argument("--part", choices=["1", "2"], default="1", help="choices are made on 1 (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=250, help="true and false ones each (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write figures and rows here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = load_descriptor(find_model(options.model))
    split = open_dataset(options.dataset, f"part{options.part}")
    lines = (options.dataset / "queries_meta.jsonl").read_text().splitlines()
    edits = {row["uuid"]: row["ops"] for row in map(json.loads, lines)}
    queries, references = encoded(model, split.queries), encoded(model, split.references)
    truth = {query: list(originals) for query, originals in split.ground_truth.items()}
    started = time.process_time()
    rows = measure(queries, references, pairs_of(queries, references, truth, options.pairs), edits)
    figures = {**summary(rows), "seconds_a_pair": (time.process_time() - started) / len(rows)}
    for name, value in figures.items():
        print(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")
    if options.json is not None:
        options.json.write_text(json.dumps({**figures, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
