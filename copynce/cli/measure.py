"""``copynce measure``"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from copynce.cli.settings_help import Command


def add(commands: argparse._SubParsersAction[Command]) -> None:
    """Make the command known."""
    parser = commands.add_parser(
        "measure",
        help="uAP, RP90, mAP and recall of predictions in files",
        description="Measure predictions against a ground truth: a table with bootstrap intervals over queries, "
        "metrics.json, and the precision-recall curves as a picture. Predictions are CSV query_id,reference_id,score "
        "or the released JSON; the ground truth is CSV query_id,reference_id or JSON {query: [references]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("predictions", metavar="PREDICTIONS", help="a file of predictions; more of them may follow")
    parser.add_argument(
        "overrides", nargs="*", metavar="GROUND_TRUTH key=value", help="the ground truth last; settings"
    )
    parser.add_argument("--merge", action="store_true", help="the same as merge=true")
    parser.settings = _settings
    parser.set_defaults(run=run)


def _settings() -> type:
    from copynce.evaluation.settings import MeasureConfig

    return MeasureConfig


def run(options: argparse.Namespace) -> None:
    """Measure, print the table, write the files."""
    from copynce.config import load_config
    from copynce.data.layouts import read_ground_truth
    from copynce.errors import ConfigError, DataError
    from copynce.evaluation.predictions import best_of_all, merge_predictions, read_predictions
    from copynce.evaluation.settings import MeasureConfig
    from copynce.evaluation.tables import MORE_COLUMNS, curves_of, judge, markdown_table, row_facts, text_table
    from copynce.files import atomic_text, whole_file
    from copynce.inspect.precision_recall import draw_precision_recall

    overrides = [text for text in options.overrides if re.match(r"[A-Za-z_][\w.]*=", text) and not Path(text).exists()]
    files = [options.predictions, *(text for text in options.overrides if text not in overrides)]
    if len(files) < 2:
        raise ConfigError("give the ground truth after the predictions: copynce measure PREDICTIONS GROUND_TRUTH")
    config = load_config(MeasureConfig, None, [*overrides, *(["merge=true"] if options.merge else [])])
    *paths, truth_file = files
    out = Path(config.out) if config.out else Path(paths[0]).with_name(f"{Path(paths[0]).name}-measured")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: {out} must be a folder, or not there yet, but it is a file; choose another out")
    truth = read_ground_truth(truth_file)
    parts = {path: read_predictions(path, merge=config.merge) for path in paths}
    if config.merge:
        parts = {" + ".join(parts): merge_predictions(list(parts.values()))}
    rows = []
    for name, predictions in parts.items():
        kept = predictions if config.k is None else merge_predictions([predictions], config.k)
        try:
            row = judge(
                name,
                best_of_all(kept, config.global_candidates),
                truth,
                rule=config.ap,
                repetitions=config.repetitions,
                seed=config.seed,
            )
        except DataError as error:
            raise DataError(f"{name} against {truth_file}: {error}") from error
        rows.append(row)

    out.mkdir(parents=True, exist_ok=True)
    table = markdown_table(rows, MORE_COLUMNS)
    settings = {"ground_truth": str(Path(truth_file).absolute()), "ap": config.ap, "k": config.k,
                "global_candidates": config.global_candidates, "merge": config.merge,
                "repetitions": config.repetitions, "seed": config.seed}  # fmt: skip
    # One result has its metrics at the top, as those of an evaluation have.
    facts = row_facts(rows[0]) if len(rows) == 1 else {"rows": [row_facts(row) for row in rows]}
    with atomic_text(out / "metrics.json") as file:
        json.dump(facts | settings, file, indent=2)
        file.write("\n")
    with atomic_text(out / "table.md") as file:
        file.write(table)
    with whole_file(out / "precision_recall.png") as picture:
        draw_precision_recall(curves_of(rows, truth)).save(picture, format="png")
    print(text_table(rows, MORE_COLUMNS))
    for row in rows:
        threshold = row.metrics["rp90_threshold"]
        reached = (
            "never reaches precision 0.9" if threshold is None else f"has precision 0.9 from score {threshold:.6g}"
        )
        print(f"{row.name} {reached}; {row.metrics['predictions']} predictions, {row.metrics['positives']} true pairs")
        if row.metrics["warning"]:
            print(f"{row.name}: {row.metrics['warning']}", file=sys.stderr)
    print(f"metrics, table and curves: {out}")
