"""``copynce eval``"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from copynce.cli.console import progress_bars
from copynce.cli.settings_help import Command

if TYPE_CHECKING:
    from copynce.data import EvaluationSplit
    from copynce.evaluation.protocols import Evaluation, Loaded
    from copynce.evaluation.settings import EvalConfig


def add(commands: argparse._SubParsersAction[Command]) -> None:
    """Make the command known."""
    parser = commands.add_parser(
        "eval",
        help="uAP, RP90, mAP and recall of a descriptor, a matcher, or both",
        description="Evaluate a descriptor: exact search, predictions.csv (ISC2021), metrics.json, a table with "
        "bootstrap intervals, and report.html with the curves and the worst errors as pictures. With matcher= the "
        "descriptor's candidates are matched too, for the whole table: descriptor, + score normalisation, matcher, "
        "+ local crops; with local_views=true queries are asked in parts as well, which finds more of these "
        "candidates; with search=true, of a box such as default, what copynce search finds. A matcher by itself needs "
        "candidates=. The same command takes what was done from the folder; under torchrun the processes share the "
        "work.",
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
    """Evaluate models on a split, print their table, write the report."""
    from copynce.config import load_config
    from copynce.evaluation.protocols import evaluate
    from copynce.evaluation.settings import EvalConfig
    from copynce.evaluation.tables import text_table
    from copynce.models.box import DESCRIPTOR, MATCHER
    from copynce.training.distributed import announced, world

    with announced():
        config = load_config(EvalConfig, None, options.overrides)
        model = _load(options.run_folder, DESCRIPTOR)
        searching = None
        if config.search:
            from copynce.model import load_model

            searching = load_model(options.run_folder, device=config.device)
            searching.calibrated()
        matcher = None if config.matcher is None else _load(config.matcher, MATCHER)
        folder = Path(options.run_folder)
        # Two weights files in one folder have an evaluation each.
        default = folder / "eval" if folder.is_dir() else folder.with_name(f"{folder.name}-eval")
        split = _open(config)
        out = Path(config.out) if config.out else default.with_name(f"{default.name}-{split.name}")
    with world(config.device) as here, progress_bars("", "", shown=here.is_main) as report:
        result = evaluate(
            config,
            split,
            model,
            matcher,
            out,
            searching=searching,
            device=here.device,
            processes=here,
            progress=report,
            say=_say,
        )
    if not here.is_main:
        return
    if not result.rows:
        print(f"nothing to score: split {split.name!r} has no ground truth; predictions: {out}")
        return
    print(f"{config.dataset or config.queries} {split.name}")
    print(text_table(result.rows))
    for name in split.groups:
        if f"map_{name}" in result.metrics:
            print(f"{name}: mAP {100 * result.metrics[f'map_{name}']:.1f}")
    for row in result.rows:
        if row.metrics["warning"]:
            _say(f"{row.name}: {row.metrics['warning']}")
    skipped = sum(result.metrics.get(f"skipped_{role}", 0) for role in ("queries", "references", "training"))
    if skipped:
        _say(f"{skipped} broken pictures were skipped; skipped.jsonl lists them")
    if config.shown:
        _report(config, split, result, out)
    print(f"predictions, metrics and report: {out}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _load(path: str, boxed: str) -> Loaded:
    from copynce.evaluation.protocols import Loaded
    from copynce.files import file_sha256
    from copynce.models import load_checkpoint
    from copynce.training import find_model

    file = find_model(path, boxed=boxed)
    return Loaded(load_checkpoint(file), file, file_sha256(file))


def _open(config: EvalConfig) -> EvaluationSplit:
    from copynce.data import open_dataset, open_pictures

    if config.dataset is not None:
        return open_dataset(config.dataset, config.split, lists=config.lists, ground_truth=config.ground_truth)
    assert config.queries is not None, "checked when the settings were made"
    assert config.references is not None, "as well"
    return open_pictures(config.queries, config.references, training=config.training, ground_truth=config.ground_truth)


def _report(config: EvalConfig, split: EvaluationSplit, result: Evaluation, out: Path) -> None:
    from copynce.files import whole_file
    from copynce.inspect.evaluation_report import evaluation_report, shown_facts
    from copynce.inspect.report import Figure, write_report

    title = f"{Path(config.dataset or config.queries or '').name} {split.name}"
    report = evaluation_report(result.rows, split, title=title, facts=shown_facts(result.metrics), shown=config.shown)
    write_report(out / "report.html", report)
    for section in report.sections:
        for block in section.blocks:
            if isinstance(block, Figure):
                with whole_file(out / "precision_recall.png") as picture:
                    block.image.save(picture, format="png")
