"""The commands, and what becomes of their errors."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from copynce import __version__
from copynce.cli.console import complain, escape_what_cannot_be_shown
from copynce.cli.settings_help import Command
from copynce.errors import Stopped, TrainingError, UserError

#: In the order of the help; each is a file of this folder.
COMMANDS = (
    "demo",
    "train",
    "ablate",
    "eval",
    "extract",
    "knn",
    "candidates",
    "normalize",
    "match",
    "measure",
    "convert",
    "index",
    "search",
    "scan",
    "inspect",
    "report",
)

#: Exit status for an input that the user can mend.
BAD_INPUT = UserError.exit_status
#: Exit status after Ctrl-C where there was nothing to save.
INTERRUPTED = 130

_EXIT_STATUS = f"""exit status:
  0    done
  {BAD_INPUT}    an input, a setting or a machine that is not what the work needs
  {TrainingError.exit_status}    a training whose loss or gradient is no number
  {Stopped.exit_status}   a training that was asked to stop and has saved; the same command continues it
  4    `search` or `scan` with --fail-on-match found a copy
  {INTERRUPTED}  interrupted, nothing was saved
  1    a fault of copynce itself, with a traceback to report
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, see ``copynce --help``."""
    for stream in (sys.stdout, sys.stderr):
        escape_what_cannot_be_shown(stream)
    options = _parser().parse_args(arguments)
    try:
        status: int | None = options.run(options)
    except KeyboardInterrupt:
        print("interrupted; a training continues with the same command", file=sys.stderr)
        return INTERRUPTED
    except (UserError, OSError) as error:
        if not getattr(error, "elsewhere", False):  # another process of the run prints it
            complain(options.command, _sentence(error) if isinstance(error, OSError) else str(error))
        return error.exit_status if isinstance(error, UserError) else BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        complain(options.command, f"out of memory ({_first_line(error)}); smaller batches or pictures need less")
        return BAD_INPUT
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="copynce",
        description="Find the picture that a picture copies, and the pixels that were copied.",
        epilog=_EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"copynce {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Command)
    for name in COMMANDS:
        importlib.import_module(f"copynce.cli.{name}").add(commands)
    return parser


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
