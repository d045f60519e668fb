"""``copynce train``"""

from __future__ import annotations

import argparse
from pathlib import Path

from copynce.cli.console import writing_into
from copynce.cli.settings_help import Command


def add(commands: argparse._SubParsersAction[Command]) -> None:
    """Make the command known."""
    parser = commands.add_parser(
        "train",
        help="train a descriptor",
        description="Train a descriptor on a CSV (uuid,path), a folder of pictures or tar shards. "
        "The same command continues a run that was stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", help="YAML file of settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    parser.settings = _settings
    parser.set_defaults(run=run)


def _settings() -> type:
    from copynce.training import TrainConfig

    return TrainConfig


def run(options: argparse.Namespace) -> None:
    from copynce.config import load_config
    from copynce.training import TrainConfig, train
    from copynce.training.distributed import announced, launch

    overrides = list(options.overrides)
    path = options.config
    if path is not None and "=" in path and not Path(path).is_file():  # no file, settings only
        overrides.insert(0, path)
        path = None
    with announced():
        config = load_config(TrainConfig, path, overrides)
    with writing_into(config.out):
        checkpoint = train(config)
    if launch().rank == 0:
        print(f"checkpoint: {checkpoint}")
