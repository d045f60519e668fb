"""``copynce demo``"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from copynce.cli.console import print_metrics, whole_number, writing_into
from copynce.cli.settings_help import Command


def add(commands: argparse._SubParsersAction[Command]) -> None:
    """Make the command known."""
    parser = commands.add_parser(
        "demo",
        help="train and judge a small descriptor in a few minutes, with a report",
        description="Make pictures (or take yours), train a small descriptor, evaluate it before and after on edited "
        "copies and distractors that it never saw, and write metrics.json, loss.png and report.html.",
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="your own pictures instead of made ones")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the results (default: %(default)s)")
    parser.add_argument(
        "--steps", type=whole_number, default=None, help="training steps (default: what fits into about 3 minutes)"
    )
    parser.add_argument(
        "--seed", type=whole_number, default=0, help="of pictures, edits and weights (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the demo, and print its table."""
    from copynce.demo import run_demo

    with writing_into(options.out):
        metrics = run_demo(
            options.out,
            data=options.data,
            steps=options.steps,
            seed=options.seed,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    print_metrics(
        f"held-out copies, {metrics['queries']} queries, {metrics['references']} references",
        {"before": metrics["before"], "after": metrics["after"]},
    )
    print(f"report: {options.out / 'report.html'}")
