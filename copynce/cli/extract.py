"""``copynce extract``"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from copynce.cli.console import progress_bars, writing_into
from copynce.cli.settings_help import Command

if TYPE_CHECKING:
    from copynce.data import Manifest
    from copynce.retrieval.settings import ExtractConfig


def add(commands: argparse._SubParsersAction[Command]) -> None:
    """Make the command known."""
    parser = commands.add_parser(
        "extract",
        help="descriptors of pictures, into memory-mapped files with ids",
        description="Describe the pictures of a CSV (uuid,path), a folder, tar shards or a split of an evaluation set. "
        "The same command goes on where it was stopped; under torchrun the processes share the work.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a run, one of its checkpoints, or a weights file")
    parser.add_argument("pictures", metavar="PICTURES", help="a CSV, a folder, shards, or with split= a dataset")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the features")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings")
    parser.settings = _settings
    parser.set_defaults(run=run)


def _settings() -> type:
    from copynce.retrieval.settings import ExtractConfig

    return ExtractConfig


def run(options: argparse.Namespace) -> None:
    """Describe pictures, and print what was made."""
    from copynce.config import load_config
    from copynce.retrieval.describe import SKIPPED, describe_lists
    from copynce.retrieval.feature_formats import write_hdf5
    from copynce.retrieval.features import check_folder
    from copynce.retrieval.settings import ExtractConfig
    from copynce.training import find_model
    from copynce.training.distributed import announced, world

    with announced():
        config = load_config(ExtractConfig, None, options.overrides)
        check_folder(options.out)
        weights = find_model(options.model)
        lists = _lists(options.pictures, config)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with world(config.device) as here, writing_into(options.out), progress_bars(shown=here.is_main) as report:
        found = describe_lists(
            weights,
            lists,
            options.out,
            batch_size=config.batch_size,
            device=here.device,
            precision=config.precision,
            threads=config.threads,
            processes=here,
            progress=report,
            say=say if here.is_main else None,
        )
        if here.is_main and config.hdf5 is not None:
            write_hdf5(config.hdf5, found["query"], found["reference"], say=say)
    if here.is_main:
        for name, features in found.items():
            rows, columns = features.values.shape
            print(f"{name}: {rows} descriptors of {columns} numbers, computed in {features.precision}")
        broken = sum(map(len, lists.values())) - sum(len(features.uuids) for features in found.values())
        if broken:
            print(f"{broken} broken pictures were skipped; {options.out / SKIPPED} lists them", file=sys.stderr)
        print(f"features: {options.out}")
        if config.hdf5 is not None:
            print(f"descriptor track: {config.hdf5}")


def _lists(pictures: str, config: ExtractConfig) -> dict[str, Manifest]:
    """{name: pictures} of what is to be described."""
    from copynce.data import open_dataset, read_manifest
    from copynce.errors import DataError

    if config.split is None:
        return {"features": read_manifest(pictures, root=config.root)}
    split = open_dataset(pictures, config.split, lists=config.lists)
    roles = {"query": split.queries, "reference": split.references, "training": split.training}
    if config.role != "all" and roles[config.role] is None:
        raise DataError(f"{pictures}: split {split.name!r} has no {config.role} pictures")
    return {role: list_ for role, list_ in roles.items() if list_ is not None and config.role in ("all", role)}
