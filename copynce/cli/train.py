"""``copynce train``"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from copynce.cli.console import writing_into
from copynce.cli.settings_help import Command, named_list


def add(commands: argparse._SubParsersAction[Command]) -> None:
    """Make the command known."""
    parser = commands.add_parser(
        "train",
        help="train a descriptor or a matcher",
        description="Train a descriptor or a matcher (objective=matcher) on a CSV (uuid,path), a folder of pictures "
        "or tar shards. The same command continues a run that was stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("start", nargs="?", metavar="NAME", help="a named run (below), or a YAML file of settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over those")
    parser.add_argument("--list", action="store_true", help="print the named runs, and stop")
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print all settings as YAML, and stop; given back as a file they make the same run. What must still be "
        "given (out, data.train) is left out of it",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="open everything, read some batches, say what the training would be and whether GPUs would be fed, and "
        "stop; nothing is written",
    )
    parser.add_argument(
        "--gpus",
        metavar="NAME:COUNT",
        help="with --dry-run: the GPUs that it is about, as A100:8 (the default where none is here)",
    )
    parser.add_argument(
        "--replay",
        metavar="FILE",
        help="repeat a step whose loss or gradient was no number, by RUN/failed-step-NUMBER/step.json, and say where "
        "that begins; of the settings device, precision, threads and the like may be given",
    )
    parser.add_argument("--seconds", type=_seconds, help="with --dry-run: how long the loader is measured (10)")
    parser.settings = _settings
    parser.more_help = _named_runs
    parser.set_defaults(run=run)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 3600, got {text!r}")
    return seconds


def _settings() -> type:
    from copynce.training import TrainConfig

    return TrainConfig


def _named_runs() -> str:
    from copynce.recipes import RECIPES, sentence

    return named_list("named runs", {name: sentence(name) for name in RECIPES})


def run(options: argparse.Namespace) -> None:
    """Train, and print where the newest checkpoint is; or print what would be trained."""
    if options.list:
        print(_named_runs())
        return
    if options.replay is not None:
        _replay(options)
        return
    from copynce.config import load_config, resolved_text
    from copynce.recipes import named_run
    from copynce.recipes.base import Run
    from copynce.training import TrainConfig, train
    from copynce.training.distributed import announced, launch

    overrides: list[str] = list(options.overrides)
    start: str | Run | None = options.start
    with announced():
        _check_dry_run(options)
        if isinstance(start, str) and not Path(start).is_file():
            if "=" in start:  # settings only
                overrides.insert(0, start)
                start = None
            elif not start.endswith((".yaml", ".yml")):
                start = named_run(start)
        if options.print_config:
            text = resolved_text(TrainConfig, start, overrides)
            if launch().rank == 0:
                print(text, end="")
            return
        config = load_config(TrainConfig, start, overrides)
    if options.dry_run:
        if launch().rank == 0:
            from copynce.training.dry_run import dry_run

            found = dry_run(config, gpus=options.gpus, seconds=options.seconds or 10.0, say=_say)
            print("\n".join(found.lines))
        return
    with writing_into(config.out):
        checkpoint = train(config)
    if launch().rank == 0:
        print(f"checkpoint: {checkpoint}")


def _replay(options: argparse.Namespace) -> None:
    """Repeat a failed step, and print what is found."""
    from copynce.errors import ConfigError
    from copynce.training.distributed import announced, launch
    from copynce.training.replay import replay

    overrides = [options.start, *options.overrides] if options.start is not None else []
    with announced():
        if options.dry_run or options.print_config or any("=" not in text for text in overrides):
            raise ConfigError("--replay takes its settings from the file; give nothing beside it but key=value")
        _check_dry_run(options)
    found = replay(options.replay, overrides)
    if launch().rank == 0:
        print("\n".join(found.lines))


def _check_dry_run(options: argparse.Namespace) -> None:
    """Raise ConfigError for what only a dry run understands, where none is asked for."""
    from copynce.errors import ConfigError

    for name in ("gpus", "seconds"):
        value = getattr(options, name)
        if value is not None and not options.dry_run:
            raise ConfigError(f"--{name}={value} is for --dry-run; give --dry-run too, or leave out --{name}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
