"""``copynce report``"""

from __future__ import annotations

import argparse
from pathlib import Path

from copynce.cli.settings_help import Command


def add(commands: argparse._SubParsersAction[Command]) -> None:
    """Make the command known."""
    parser = commands.add_parser(
        "report",
        help="the curves of one or several trainings",
        description="Draw the curves of trainings over their steps, with last values, settings in which they differ, "
        "and what happened to them, into one HTML file.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of trainings")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the report, FILE.html (default: report.html in the first of the folders)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the report."""
    from copynce.errors import ConfigError
    from copynce.inspect.report import write_report
    from copynce.inspect.run_report import run_report

    out = options.out or Path(options.runs[0]) / "report.html"
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out must be a name that ends in .html or .htm, got {str(out)!r}")
    report = run_report(options.runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_report(out, report)
    print(f"report: {out}")
