"""The command line: ``copynce demo | train | eval``; under torchrun it is ``torchrun ... -m copynce.cli train ...``."""

from __future__ import annotations

import os

# OpenMP's threads spin while they wait for each other, and so take the processor from DALI's threads and from whoever
# else is there. Read once, when torch loads OpenMP; a policy that the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import contextlib
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from copynce import __version__
from copynce.errors import Stopped, TrainingError, UserError

if TYPE_CHECKING:  # each command imports what it needs, so that help and wrong arguments take no time
    from rich.progress import TaskID

#: Exit status for an input that the user can mend.
BAD_INPUT = UserError.exit_status
#: Exit status after Ctrl-C where there was nothing to save.
INTERRUPTED = 130

_EXIT_STATUS = f"""exit status:
  0    done
  {BAD_INPUT}    an input, a setting or a machine that is not what the work needs
  {TrainingError.exit_status}    a training whose loss or gradient is no number
  {Stopped.exit_status}   a training that was asked to stop and has saved; the same command continues it
  {INTERRUPTED}  interrupted, nothing was saved
  1    a fault of copynce itself, with a traceback to report
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, see ``copynce --help``."""
    for stream in (sys.stdout, sys.stderr):
        _escape_what_cannot_be_shown(stream)
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("interrupted; a training continues with the same command", file=sys.stderr)
        return INTERRUPTED
    except (UserError, OSError) as error:
        if not getattr(error, "elsewhere", False):  # another process of the run prints it
            _complain(options.command, _sentence(error) if isinstance(error, OSError) else str(error))
        return error.exit_status if isinstance(error, UserError) else BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        _complain(options.command, f"out of memory ({_first_line(error)}); smaller batches or pictures need less")
        return BAD_INPUT
    return 0


def _escape_what_cannot_be_shown(stream: TextIO) -> None:
    """A name that the terminal's encoding lacks must not end the command."""
    reconfigure = getattr(stream, "reconfigure", None)  # absent where somebody has put another object there
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _complain(command: str, text: str) -> None:
    """One error on stderr. A name may hold control characters, which would move the cursor."""
    shown = "".join(c if c == "\n" or not c.isascii() or c.isprintable() else repr(c)[1:-1] for c in str(text))
    print(f"copynce {command}: {shown}", file=sys.stderr, flush=True)


def _sentence(error: OSError) -> str:
    if error.filename is None:
        return error.strerror or str(error)
    name = " -> ".join(os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes))
    return f"{name or error.filename}: {error.strerror}"


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _writing_into(folder: str | Path) -> Iterator[None]:
    """Names the folder in an OSError that names no file: a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(folder)
        raise


class _Command(argparse.ArgumentParser):
    """A command whose help lists the ``settings`` class that this returns, which is imported only for that."""

    settings: Callable[[], type] | None = None

    def format_help(self) -> str:
        if self.settings is not None:
            self.description = textwrap.fill(self.description or "", _width())
            self.epilog = _settings_help(self.settings())
        return super().format_help()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="copynce",
        description="Find the picture that a picture copies, and the pixels that were copied.",
        epilog=_EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"copynce {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Command)

    demo = commands.add_parser(
        "demo",
        help="train and judge a small descriptor in a few minutes, with a report",
        description="Make pictures (or take yours), train a small descriptor, evaluate it before and after on edited "
        "copies and distractors that it never saw, and write metrics.json, loss.png and report.html.",
    )
    demo.add_argument("--data", type=Path, metavar="FOLDER", help="your own pictures instead of made ones")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder of the results (default: %(default)s)")
    demo.add_argument(
        "--steps", type=_whole_number, default=None, help="training steps (default: what fits into about 3 minutes)"
    )
    demo.add_argument(
        "--seed", type=_whole_number, default=0, help="of pictures, edits and weights (default: %(default)s)"
    )
    demo.set_defaults(run=_demo)

    train = commands.add_parser(
        "train",
        help="train a descriptor",
        description="Train a descriptor on a CSV (uuid,path), a folder of pictures or tar shards. "
        "The same command continues a run that was stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", nargs="?", help="YAML file of settings")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    train.settings = _train_settings
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "eval",
        help="uAP, RP90, mAP and recall of a trained descriptor",
        description="Extract descriptors, search exactly, write predictions.csv (ISC2021) and metrics.json.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("run_folder", metavar="RUN", help="a run, one of its checkpoints, or a weights file")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="settings")
    evaluate.settings = _eval_settings
    evaluate.set_defaults(run=_eval)
    return parser


def _train_settings() -> type:
    from copynce.training import TrainConfig

    return TrainConfig


def _eval_settings() -> type:
    from copynce.evaluation.settings import EvalConfig

    return EvalConfig


def _whole_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def _settings_help(kind: type) -> str:
    """The settings of a config class as text: name, default, sentence."""
    from copynce.config import setting_types

    lines = ["settings:"]

    def walk(cls: Any, prefix: str) -> None:
        sentences, types = _field_sentences(cls), setting_types(cls)
        for f in fields(cls):
            if is_dataclass(types[f.name]):
                walk(types[f.name], f"{prefix}{f.name}.")
                continue
            required = f.default is MISSING and f.default_factory is MISSING
            default = f.default if f.default is not MISSING else {}
            shown = "required" if required else f"default {'none' if default is None else default}"
            lines.append(f"  {prefix}{f.name} ({shown})")
            if sentences.get(f.name):
                lines.extend(
                    textwrap.wrap(sentences[f.name], _width(), initial_indent=" " * 6, subsequent_indent=" " * 6)
                )

    walk(kind, "")
    return "\n".join(lines)


def _width() -> int:
    """Columns of the terminal, as far as lines of text should use them."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, 40), 106)


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

    with _writing_into(options.out):
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
    with _writing_into(config.out):
        checkpoint = train(config)
    if launch().rank == 0:
        print(f"checkpoint: {checkpoint}")


def _eval(options: argparse.Namespace) -> None:
    from copynce.config import load_config
    from copynce.data import open_dataset
    from copynce.evaluation import evaluate_descriptor
    from copynce.evaluation.settings import EvalConfig
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
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
    """The metrics below each other, so that no terminal is too narrow; names stand whole on lines of their own."""
    print(title)
    if len(rows) == 1:
        print(*rows)
    else:
        print(" " * 11, *[f"{name:>8}" for name in rows])
    for key, label in _SHOWN:
        values = [row.get(key) for row in rows.values()]
        if any(value is not None for value in values):
            print(f"  {label:9}", *["       -" if value is None else f"{value:8.4f}" for value in values])
    for row in rows.values():
        skipped = sum(row.get(f"skipped_{role}", 0) for role in ("queries", "references", "training"))
        if skipped:
            print(f"{skipped} broken pictures were skipped; skipped.jsonl lists them", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
