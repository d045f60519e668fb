"""``copynce eval``"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from copynce.cli.console import print_metrics, progress_bars
from copynce.cli.settings_help import Command


def add(commands: argparse._SubParsersAction[Command]) -> None:
    """Make the command known."""
    parser = commands.add_parser(
        "eval",
        help="uAP, RP90, mAP and recall of a trained descriptor",
        description="Extract descriptors, search exactly, write predictions.csv (ISC2021) and metrics.json.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", metavar="RUN", help="a run, one of its checkpoints, or a weights file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings")
    parser.settings = _settings
    parser.set_defaults(run=run)


def _settings() -> type:
    from copynce.evaluation.settings import EvalConfig

    return EvalConfig


def run(options: argparse.Namespace) -> None:
    """Evaluate a model on a split, and print its table."""
    from copynce.config import load_config
    from copynce.data import open_dataset
    from copynce.evaluation import evaluate_descriptor
    from copynce.evaluation.settings import EvalConfig
    from copynce.models import load_descriptor
    from copynce.training import find_model
    from copynce.training.distributed import choose_device

    config = load_config(EvalConfig, None, options.overrides)
    device = choose_device(config.device)
    weights = find_model(options.run_folder)
    folder = Path(options.run_folder)
    # Two weights files in one folder have an evaluation each.
    default = folder / "eval" if folder.is_dir() else folder.with_name(f"{folder.name}-eval")
    out = Path(config.out) if config.out else default.with_name(f"{default.name}-{config.split}")
    split = open_dataset(config.dataset, config.split, lists=config.lists)
    with progress_bars() as report:
        metrics = evaluate_descriptor(
            load_descriptor(weights),
            split,
            out,
            batch_size=config.batch_size,
            device=device,
            precision=config.precision,
            k=config.k,
            global_candidates=config.global_candidates,
            score_normalization=config.score_normalization,
            alpha=config.alpha,
            start=config.start,
            end=config.end,
            threads=config.threads,
            model_file=weights,
            progress=report,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    if "uap" in metrics:
        print_metrics(f"{config.dataset} {config.split}", {str(weights): metrics})
        print(f"predictions and metrics: {out}")
    else:
        print(f"nothing to score: split {config.split!r} has no ground truth; predictions: {out / 'predictions.csv'}")
