"""Make a box of trained models, and calibrate it: what `copynce search`, `scan` and `Model.compare` need.

    python -m scripts.make_box runs/descriptor --matcher runs/matcher --background LIST.csv \\
        --dataset minidisc --split part1 --out box

The box is a folder (`copynce/models/box.py`) that stands wherever a model does; the package's own, `default`, is
copynce/weights. --background: pictures, openly licensed where the box is given away, of which --most become the
background of score normalisation; by some of them the descriptor is centred anew after its rounding to 8 bits.
--dataset, --split: pairs whose truth is known, on which the probability is fitted: each query with what a search
proposes for it, and, where the references hold no copies of each other, each of them with what is nearest to it, so
that look-alikes are among the pairs (--distinct-references).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from copynce.cli.console import progress_bars
from copynce.copies.calibration import Calibration, Signals, expected_calibration_error
from copynce.copies.judging import look
from copynce.copies.scanning import nearest_pairs
from copynce.copies.searching import K, Progress, candidates, described
from copynce.data import EvaluationSplit, Manifest, open_dataset, read_manifest
from copynce.files import whole_file
from copynce.model import Model, load_model
from copynce.models.box import BACKGROUND, CALIBRATION, DESCRIPTOR, MATCHER
from copynce.models.checkpoints import load_descriptor, load_matcher, read_checkpoint_metadata, save_checkpoint
from copynce.models.descriptor import Descriptor
from copynce.models.eight_bits import quantized
from copynce.models.layers import LinearHead
from copynce.models.weight_files import EIGHT_BITS
from copynce.training import find_model
from dali_pipelines import LoaderOptions, PictureLoader
from dali_pipelines.sources import AnyPath

_CENTRING = 500  # pictures by which a descriptor is centred


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("descriptor", help="a run or a weights file")
    parser.add_argument("--matcher", help="a run or a weights file")
    parser.add_argument("--background", required=True, help="a CSV or a folder")
    parser.add_argument("--most", type=int, default=2000, help="pictures of the background (default: %(default)s)")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", required=True)
    parser.add_argument(
        "--distinct-references", action="store_true", help="no reference of the split is a copy of another"
    )
    parser.add_argument("--license", default=None, help="of the weights, for their card")
    parser.add_argument("--trained-on", default=None, help="the pictures, for the card (default: the list's name)")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    for name in (MATCHER, BACKGROUND, CALIBRATION):  # of an earlier box: they may not fit this descriptor
        (out / name).unlink(missing_ok=True)
    card = {key: getattr(options, key) for key in ("license", "trained_on") if getattr(options, key) is not None}
    background = read_manifest(options.background)
    pack(find_model(options.descriptor), options.matcher and find_model(options.matcher), out, card, background)
    write_background(load_model(out), background, options.most, out / BACKGROUND)
    model = load_model(out)
    split = open_dataset(options.dataset, options.split)
    signals, truth = seen_pairs(model, split)
    proposed, told = len(truth), f"{Path(options.dataset).name} {options.split}"
    if options.distinct_references:
        signals += look_alikes(model, split.references)
        truth = np.concatenate([truth, np.zeros(len(signals) - proposed, bool)])
        told += ", and its references among themselves"
    calibration = Calibration.fit(signals, truth, told)
    calibration.save(out / CALIBRATION)
    print(
        f"fitted on {len(truth)} pairs, {int(truth.sum())} of them copies, {proposed} of {len(split.queries)} queries"
    )
    errors = expected_calibration_error(calibration(signals[:proposed]), truth[:proposed])
    print(f"calibration error on the queries' own pairs {errors:.4f}")


def pack(descriptor: Path, matcher: Path | None, out: Path, told: dict[str, Any], background: Manifest) -> None:
    """The models at 8 bits; a matcher with the descriptor's blocks shares them. told: for their cards. background:
    pictures by which the descriptor is centred."""

    def card(path: Path) -> dict[str, Any]:
        # A list's path means nothing to whoever is given the box.
        return _with_names(read_checkpoint_metadata(path)) | told

    exact = load_descriptor(descriptor)
    save_checkpoint(out / DESCRIPTOR, exact, card(descriptor), eight_bits=True)
    recentre(exact, load_descriptor(out / DESCRIPTOR), spread(background, _CENTRING))
    save_checkpoint(out / DESCRIPTOR, exact, card(descriptor), eight_bits=True)
    if matcher is None:
        return
    boxed, tensors = load_descriptor(out / DESCRIPTOR).state_dict(), exact.state_dict()
    model = load_matcher(matcher)
    mine = model.state_dict()
    same = [name for name in mine if name in tensors and torch.equal(mine[name], tensors[name])]
    model.load_state_dict({**mine, **{name: boxed[name] for name in same}})
    save_checkpoint(out / MATCHER, model, card(matcher), eight_bits=True, shares=out / DESCRIPTOR)


def recentre(model: Descriptor, rounded: Descriptor, paths: Sequence[AnyPath]) -> None:
    """Change the head of `model` so that its rounded weights give these pictures the mean that its own give them.

    Class tokens share a large mean, which the rows of the head cancel, up to the head's running mean. Rounding moves
    each row's product with it, for all pictures alike: two different ones have a cosine of .2 instead of 0, and the
    scores of copies and others come closer.
    """
    if model.config.head != "linear_bn":
        return
    heads = [side.heads["linear_head"] for side in (model.eval(), rounded.eval())]
    sums = [torch.zeros(model.dim) for _ in heads]
    count = 0
    options = LoaderOptions(size=model.img_size, batch_size=min(32, len(paths)), device="cpu", threads=2)
    with torch.inference_mode():
        for at, images in PictureLoader(paths, options, on_broken=_tell):
            for total, side, head in zip(sums, (model, rounded), heads, strict=True):
                assert isinstance(head, LinearHead)
                total += head.fc1(side.class_token(images).float()).sum(0)
            count += len(at)
    with torch.no_grad():
        moved = heads[0].get_buffer("bn.running_mean")
        moved += (sums[1] - sums[0]) / max(count, 1)


def spread(manifest: Manifest, most: int) -> list[AnyPath]:
    """The paths of at most so many pictures, evenly spread."""
    places = np.linspace(0, len(manifest) - 1, min(most, len(manifest))).astype(np.int64)
    return [manifest.paths[place] for place in places]


def _with_names(card: dict[str, Any]) -> dict[str, Any]:
    """A card, and those of its starts, with the names of files for their paths."""
    found = dict(card)
    for key, value in card.items():
        if key == "trained_on" and isinstance(value, str):
            found[key] = Path(value).name
        elif isinstance(value, dict):
            found[key] = _with_names(value)
    return found


def write_background(model: Model, manifest: Manifest, most: int, path: Path) -> None:
    """Descriptors of `most` pictures, evenly spread, at 8 bits."""
    rows = model.describe(spread(manifest, most), on_broken=lambda name, reason: None)
    rows = rows[np.isfinite(rows).all(1)]
    with whole_file(path) as file:
        file.write(save(quantized({"descriptors": torch.from_numpy(rows)}), metadata={EIGHT_BITS: "rows"}))


def seen_pairs(model: Model, split: EvaluationSplit) -> tuple[list[Signals], np.ndarray]:
    """(signals, truth bool [N]) of each query and what a search proposes for it."""
    queries, references = split.queries, split.references
    with progress_bars("") as report:
        proposed = candidates(model, queries.paths, references.paths, on_broken=_tell, progress=report)
        found = _looked(model, queries.paths, references.paths, proposed.pairs, proposed.views, report)
    truth = [
        references.uuids[reference] in split.ground_truth.get(queries.uuids[query], ())
        for query, reference in (proposed.pairs[row].tolist() for row, _ in found)
    ]
    return [signals for _, signals in found], np.array(truth)


def look_alikes(model: Model, pictures: Manifest) -> list[Signals]:
    """Of each picture and the `K` that are nearest to it, each pair once."""
    with progress_bars("") as report:
        places, rows = described(model, pictures.paths, "look-alikes", None, 2, _tell, report)
        pairs = places[nearest_pairs(rows, K)]
        found = _looked(model, pictures.paths, pictures.paths, pairs, np.zeros(len(pairs), np.int64), report)
    return [signals for _, signals in found]


def _looked(
    model: Model,
    queries: Sequence[AnyPath],
    references: Sequence[AnyPath],
    pairs: np.ndarray,
    views: np.ndarray,
    report: Progress,
) -> list[tuple[int, Signals]]:
    """(row, signals) of the pairs that can be used."""
    seen = look(
        model,
        queries,
        references,
        pairs,
        views=views,
        on_broken=_tell,
        progress=lambda done: report("pairs", done, len(pairs)),
    )
    return [(row, pair.signals) for row, pair in seen]


def _tell(path: AnyPath, reason: str) -> None:
    print(f"{os.fspath(path)}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
