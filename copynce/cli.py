"""The command line: ``copynce demo | train | eval``; under torchrun it is ``torchrun ... -m copynce.cli train ...``."""

from __future__ import annotations

import os

# OpenMP's threads spin while they wait for each other, and so take the processor from DALI's threads and from whoever
# else is there. Read once, when torch loads OpenMP; a policy that the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import omegaconf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from copynce import __version__
from copynce.config import load_config
from copynce.errors import UserError
from copynce.evaluation.settings import EvalConfig
from copynce.training.config import TrainConfig

#: Exit status for an input that the user can mend.
BAD_INPUT = UserError.exit_status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 for an input that the user can mend."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("interrupted; a training continues with the same command", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"copynce {options.command}: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"copynce {options.command}: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="copynce", description="Find the picture that a picture copies, and the pixels that were copied."
    )
    parser.add_argument("--version", action="version", version=f"copynce {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train and judge a small descriptor in a few minutes, with a report",
        description="Make pictures (or take yours), train a small descriptor, evaluate it before and after on edited "
        "copies and distractors that it never saw, and write metrics.json, loss.png and report.html.",
    )
    demo.add_argument("--data", type=Path, metavar="FOLDER", help="your own pictures instead of made ones")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder of the results (default: %(default)s)")
    demo.add_argument(
        "--steps", type=int, default=None, help="training steps (default: what fits into about 3 minutes)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of pictures, edits and weights (default: %(default)s)")
    demo.set_defaults(run=_demo)

    train = commands.add_parser(
        "train",
        help="train a descriptor",
        description="Train a descriptor on a CSV (uuid,path), a folder of pictures or tar shards. "
        "The same command continues a run that was stopped.",
        epilog=_settings_help(TrainConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", nargs="?", help="YAML file of settings")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "eval",
        help="uAP, RP90, mAP and recall of a trained descriptor",
        description="Extract descriptors, search exactly, write predictions.csv (ISC2021) and metrics.json.",
        epilog=_settings_help(EvalConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("run_folder", metavar="RUN", help="a run, one of its checkpoints, or a weights file")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="settings")
    evaluate.set_defaults(run=_eval)
    return parser


def _settings_help(kind: type) -> str:
    """The settings of a config class as text: name, default, sentence."""
    lines = ["settings:"]

    def walk(cls: Any, prefix: str) -> None:
        sentences = _field_sentences(cls)
        for f in fields(cls):
            inner = f.default_factory
            if isinstance(inner, type) and is_dataclass(inner):
                walk(inner, f"{prefix}{f.name}.")
                continue
            default = f.default if f.default is not MISSING else {}
            shown = "required" if default == omegaconf.MISSING else f"default {default}"
            lines.append(f"  {prefix}{f.name} ({shown})")
            if sentences.get(f.name):
                lines.extend(textwrap.wrap(sentences[f.name], 100, initial_indent="      ", subsequent_indent="      "))

    walk(kind, "")
    return "\n".join(lines)


def _field_sentences(kind: type) -> dict[str, str]:
    """The string that stands under each field of a dataclass, which Python itself does not keep."""
    import ast
    import inspect

    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field_node, text_node in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field_node, ast.AnnAssign)
            and isinstance(field_node.target, ast.Name)
            and isinstance(text_node, ast.Expr)
            and isinstance(text_node.value, ast.Constant)
        ):
            found[field_node.target.id] = " ".join(str(text_node.value.value).split())
    return found


def _demo(options: argparse.Namespace) -> None:
    from copynce.demo import run_demo

    metrics = run_demo(
        options.out,
        data=options.data,
        steps=options.steps,
        seed=options.seed,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    _print_metrics(
        f"held-out copies, {metrics['queries']} queries, {metrics['references']} references",
        {"before": metrics["before"], "after": metrics["after"]},
    )
    print(f"report: {options.out / 'report.html'}")


def _train(options: argparse.Namespace) -> None:
    from copynce.training import train

    overrides = list(options.overrides)
    path = options.config
    if path is not None and "=" in path:  # no file, settings only
        overrides.insert(0, path)
        path = None
    checkpoint = train(load_config(TrainConfig, path, overrides))
    print(f"checkpoint: {checkpoint}")


def _eval(options: argparse.Namespace) -> None:
    from copynce.data import open_dataset
    from copynce.evaluation import evaluate_descriptor
    from copynce.models import load_checkpoint
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
            load_checkpoint(weights),
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
        _print_metrics(f"{config.dataset} {config.split}", {str(weights): metrics})
        print(f"predictions and metrics: {out}")
    else:
        print(f"nothing to score: split {config.split!r} has no ground truth; predictions: {out / 'predictions.csv'}")


class progress_bars:
    """A context whose value is called as ``report(role, done, total)`` and draws one bar per role on stderr."""

    def __enter__(self) -> progress_bars:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._tasks: dict[str, TaskID] = {}
        self._bar.start()
        return self

    def __call__(self, role: str, done: int, total: int) -> None:
        if role not in self._tasks:
            self._tasks[role] = self._bar.add_task(f"{role} descriptors", total=total)
        self._bar.update(self._tasks[role], completed=done)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


_SHOWN = (
    ("uap", "uAP"),
    ("rp90", "RP90"),
    ("map", "mAP"),
    ("recall_at_1", "recall@1"),
    ("uap_sn", "uAP + SN"),
    ("rp90_sn", "RP90 + SN"),
)


def _print_metrics(title: str, rows: dict[str, dict[str, Any]]) -> None:
    shown = [(key, name) for key, name in _SHOWN if any(key in row for row in rows.values())]
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for _, name in shown:
        table.add_column(name, justify="right")
    for name, row in rows.items():
        table.add_row(name, *[f"{row[key]:.4f}" for key, _ in shown])
        skipped = sum(row.get(f"skipped_{role}", 0) for role in ("queries", "references", "training"))
        if skipped:
            print(f"{skipped} broken pictures were skipped; skipped.jsonl lists them", file=sys.stderr)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
