"""``copynce ablate``"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copynce.cli.settings_help import Command, named_list

if TYPE_CHECKING:
    from copynce.recipes.tables import Row, Table
    from copynce.training import TrainConfig

#: Settings with which a run may be continued, but which make another row of a table.
_ANOTHER_ROW = ("optim.epochs", "optim.steps", "precision")


def add(commands: argparse._SubParsersAction[Command]) -> None:
    """Make the command known."""
    parser = commands.add_parser(
        "ablate",
        help="the paper's ablations: trained, evaluated, and as a table beside the paper's figures",
        description="Train and evaluate the runs of one of the paper's tables, one after the other, and write table.md "
        "and table.json with the paper's figures beside. Settings go to every training (all of copynce train but out). "
        "The same command goes on where it was stopped; a row that was trained with other settings is refused.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", metavar="TABLE", help="a table (below)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every training")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the runs and of the table")
    parser.add_argument("--dataset", metavar="DIR", required=True, help="the evaluation set, as of copynce eval")
    parser.add_argument("--split", default="dev", help="its queries (dev, which is dev set II in DISC21)")
    parser.add_argument("--lists", metavar="DIR", help="folder of DISC21's lists; none: the dataset's own folder")
    parser.add_argument("--candidates", metavar="FILE", help="pairs that the matchers score (their tables need it)")
    parser.add_argument("--eval", action="append", default=[], metavar="key=value", help="a setting of copynce eval")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of each training, by torchrun (1)")
    parser.add_argument("--print", action="store_true", help="print the commands, for a scheduler, and stop")
    parser.settings = _settings
    parser.more_help = _tables
    parser.set_defaults(run=run)


def _settings() -> type:
    from copynce.training import TrainConfig

    return TrainConfig


def _tables() -> str:
    from copynce.recipes.tables import TABLES

    return named_list("tables", {name: f"{table.sentence} {len(table.rows)} runs." for name, table in TABLES.items()})


def run(options: argparse.Namespace) -> None:
    """Run a table's rows, or print their commands."""
    import difflib
    import json

    from copynce.errors import ConfigError
    from copynce.recipes.tables import TABLES
    from copynce.training.distributed import launch

    if options.table not in TABLES:
        near = difflib.get_close_matches(options.table, TABLES, n=3) or sorted(TABLES)
        raise ConfigError(f"{options.table!r} is no table; did you mean {' or '.join(near)}?")
    table = TABLES[options.table]
    for text in options.overrides:
        if text.startswith("out=") or "=" not in text:
            raise ConfigError(f"expected settings key=value that every training gets, and not out, got {text!r}")
    if options.processes < 1:
        raise ConfigError(f"--processes must be at least 1, got {options.processes}")
    if launch().size > 1:
        raise ConfigError("copynce ablate starts the processes itself: leave torchrun away, and give --processes=N")
    if table.kind == "matcher" and options.candidates is None:
        raise ConfigError(f"{options.table} needs --candidates=FILE, the pairs that its matchers score")
    if options.print:
        for row in table.rows:
            print(shlex.join([*_launcher(options.processes), *_training(row, options)]))
            print(shlex.join(["copynce", *_evaluation(row, table, options)]))
        return
    _check(table, options)
    found: dict[str, dict[str, Any]] = {}
    for row in table.rows:
        print(f"{options.table}: {row.label}", flush=True)
        _carry_out(_training(row, options), options.processes)
        _carry_out(_evaluation(row, table, options), processes=1)
        found[row.name] = json.loads((_place(row, options) / "metrics.json").read_text())
        _write(table, found, options)
    print((Path(options.out) / "table.md").read_text(), end="")


def _training(row: Row, options: argparse.Namespace) -> list[str]:
    given = [text for text in options.overrides if text.partition("=")[0] not in row.without]
    return ["train", row.run, *given, f"out={Path(options.out) / row.name}"]


def _place(row: Row, options: argparse.Namespace) -> Path:
    """Where a row's evaluation goes."""
    return Path(options.out) / row.name / f"ablation-{options.split}"


def _evaluation(row: Row, table: Table, options: argparse.Namespace) -> list[str]:
    lists = [] if options.lists is None else [f"lists={options.lists}"]
    pairs = [] if table.kind == "descriptor" else [f"candidates={options.candidates}", "local_crops=false"]
    where = [f"dataset={options.dataset}", f"split={options.split}", *lists, f"out={_place(row, options)}"]
    return ["eval", str(Path(options.out) / row.name), *where, *pairs, "shown=0", *options.eval]


def _launcher(processes: int) -> list[str]:
    """What the words of a training are given to."""
    if processes == 1:
        return ["copynce"]
    return ["torchrun", "--standalone", "--nproc-per-node", str(processes), "-m", "copynce.cli"]


def _check(table: Table, options: argparse.Namespace) -> None:
    """Raise an error, before the first training, for what would be one after it or at a later row."""
    from copynce.config import load_config
    from copynce.data import open_dataset
    from copynce.errors import ConfigError, DataError
    from copynce.evaluation.protocols import settle
    from copynce.evaluation.settings import EvalConfig
    from copynce.recipes import named_run
    from copynce.training import TrainConfig

    configs, trainings = [], []
    for row in table.rows:
        trainings.append((row, load_config(TrainConfig, named_run(row.run), _training(row, options)[2:])))
        configs.append(load_config(EvalConfig, None, _evaluation(row, table, options)[2:]))
    split = open_dataset(options.dataset, options.split, lists=options.lists)
    is_matcher = table.kind == "matcher"
    for config in configs:
        settle(config, split, descriptor=not is_matcher, matcher=is_matcher or config.matcher is not None)
    if not any(split.ground_truth.values()):
        raise DataError(f"{options.dataset}: split {options.split!r} has no ground truth, so there is no table to make")
    if options.candidates is not None and not Path(options.candidates).is_file():
        raise ConfigError(f"--candidates={options.candidates}: no such file")
    for row, training in trainings:
        _refuse_another(row, training)


def _refuse_another(row: Row, config: TrainConfig) -> None:
    """Raise RunError where the row's folder holds a training with other settings, which would be taken for its own."""
    from copynce.errors import RunError
    from copynce.training.run import FREE, changes_of

    changes = changes_of(Path(config.out), config)
    differ = {name: pair for name, pair in changes.items() if name not in FREE or name in _ANOTHER_ROW}
    if differ:
        listed = "; ".join(f"{name} was {old}, got {new}" for name, (old, new) in differ.items())
        raise RunError(
            f"{config.out} ({row.label}) was trained with other settings: {listed}. Give another --out, or the same "
            "settings as then"
        )


def _carry_out(words: Sequence[str], processes: int) -> None:
    """Carry a command out; where it fails or is stopped, end as it does: it has said why."""
    from copynce.cli.main import main
    from copynce.errors import Stopped

    if processes == 1:
        status = main(list(words))
    else:
        command = [sys.executable, "-m", "torch.distributed.run", *_launcher(processes)[1:], *words]
        with subprocess.Popen(command) as launched, _passing_on(launched) as passed:
            status = launched.wait()
        if status and passed:  # torchrun's own status tells nothing of it
            raise Stopped(f"stopped by {signal.Signals(passed[0]).name}; the same command goes on")
    if status:
        raise SystemExit(status)


@contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """While it lasts, SIGTERM goes on to ``process``, which ends the training in order; Ctrl-C reaches it by itself.
    Gives the signals that came."""
    came: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        came.append(number)
        if number != signal.SIGINT:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write(table: Table, found: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """table.md and table.json, of the rows that are done."""
    import json

    from copynce.files import atomic_text
    from copynce.provenance import running_commit

    out = Path(options.out)
    facts = {"table": options.table, "dataset": str(Path(options.dataset).absolute()), "split": options.split,
             "settings": list(options.overrides), "commit": running_commit()}  # fmt: skip
    rows = [
        {"label": row.label, "run": row.run, "folder": row.name, "paper_uap": row.paper, **_scores(found[row.name])}
        for row in table.rows
        if row.name in found
    ]
    lines = [
        f"{table.sentence} uAP in %: the paper's on dev set II, ours on {options.split} of {options.dataset}.",
        "",
        "| | paper | ours | RP90 | recall@1 | run |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        paper = row["paper_uap"]
        ours = [f"{100 * row[key]:.1f}" for key in ("uap", "rp90", "recall_at_1")]
        lines.append(f"| {row['label']} | {'-' if paper is None else paper} | {' | '.join(ours)} | {row['folder']} |")
    missing = len(table.rows) - len(rows)
    lines += ["", f"{missing} rows are not done yet."] if missing else []
    with atomic_text(out / "table.json") as file:
        json.dump({**facts, "rows": rows, "missing": missing}, file, indent=2)
        file.write("\n")
    with atomic_text(out / "table.md") as file:
        file.write("\n".join(lines) + "\n")


def _scores(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: metrics[key] for key in ("uap", "rp90", "map", "recall_at_1")}
