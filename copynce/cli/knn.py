"""``copynce knn``"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from copynce.cli.console import progress_bars, writing_into
from copynce.cli.settings_help import Command

if TYPE_CHECKING:
    from copynce.retrieval.features import FeatureFile
    from copynce.retrieval.settings import KnnConfig
    from copynce.training.distributed import World


def add(commands: argparse._SubParsersAction[Command]) -> None:
    """Make the command known."""
    parser = commands.add_parser(
        "knn",
        help="nearest neighbours of every picture: mined negatives for a training, or predictions",
        description="Find the k most similar other pictures of every picture, exactly, and write them as .npy or .json "
        "(data.neighbours of a training), .csv (predictions) or .pth (the released table). The same command goes on "
        "where it was stopped; under torchrun the processes share the work.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("features", metavar="FEATURES", help="features, or with model= pictures")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the table: .npy, .json, .csv or .pth")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings")
    parser.settings = _settings
    parser.set_defaults(run=run)


def _settings() -> type:
    from copynce.retrieval.settings import KnnConfig

    return KnnConfig


def run(options: argparse.Namespace) -> None:
    """Find neighbours, and print where they are."""
    from copynce.config import load_config
    from copynce.errors import DataError
    from copynce.retrieval.mining import check_form, mine, read_classes
    from copynce.retrieval.settings import KnnConfig
    from copynce.training.distributed import announced, world

    with announced():
        config = load_config(KnnConfig, None, options.overrides)
        check_form(options.out)
        classes = None if config.classes is None else read_classes(config.classes)
    with (
        world(config.device) as here,
        writing_into(options.out.parent),
        progress_bars("", shown=here.is_main) as report,
    ):
        query, reference = _features(options, config, here, report)
        if classes is not None:
            with here.together():
                for found in (query, reference):
                    uuids = found.features.uuids
                    if uuids and classes.keys().isdisjoint(uuids):
                        raise DataError(
                            f"{config.classes}: none of its {len(classes)} ids is among the {len(uuids)} of "
                            f"{found.source}, such as {uuids[0]!r}"
                        )
        total = len(query.features.uuids)
        mine(
            query,
            reference,
            options.out,
            k=config.k,
            classes=classes,
            gpus=[] if here.device.type == "cpu" else None if here.size == 1 else [here.device.index or 0],
            approximate=config.approximate,
            probes=config.probes,
            processes=here,
            progress=lambda done: report("neighbours", done, total),
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    if here.is_main:
        print(f"neighbours of {total} pictures among {len(reference.features.uuids)}: {options.out}")


def _features(
    options: argparse.Namespace, config: KnnConfig, here: World, report: progress_bars
) -> tuple[FeatureFile, FeatureFile]:
    """The features to search with, and in; of pictures, described first."""
    from copynce.data import read_manifest
    from copynce.retrieval.describe import describe_lists
    from copynce.retrieval.features import read_features
    from copynce.training import find_model

    if config.model is None:
        with here.together():
            query = read_features(options.features, side=config.side, ids=config.ids)
            if config.references is None and config.references_side is None:
                return query, query
            other = options.features if config.references is None else config.references
            return query, read_features(other, side=config.references_side, ids=config.references_ids)
    with here.together():
        weights = find_model(config.model)
        lists = {"query": read_manifest(options.features)}
        if config.references is not None:
            lists["reference"] = read_manifest(config.references)
    folder = Path(f"{options.out}.features")
    describe_lists(
        weights,
        lists,
        folder,
        batch_size=config.batch_size,
        device=here.device,
        precision=config.precision,
        threads=config.threads,
        processes=here,
        progress=report,
        say=(lambda text: print(text, file=sys.stderr, flush=True)) if here.is_main else None,
    )
    with here.together():
        found = [read_features(folder, side=name) for name in lists]
    return found[0], found[-1]
