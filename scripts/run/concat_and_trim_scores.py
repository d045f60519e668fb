"""Merge files of scores, the highest of each pair, and keep the best of each query.

    python scripts/run/concat_and_trim_scores.py a.json b.json --output-path scores.json --k 400

Scores are read and written as released JSON or as CSV, by their names.
"""

from __future__ import annotations

import argparse
import sys

from copynce.errors import UserError
from copynce.evaluation import merge_predictions, read_predictions, write_predictions


def main() -> int:
    """Merge and write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="scores")
    parser.add_argument("--output-path", default="scores.json", help="what is written (default: %(default)s)")
    parser.add_argument("--k", type=int, default=400, help="references kept of a query (default: %(default)s)")
    given = parser.parse_args()
    if given.k < 1:
        parser.error(f"--k must be at least 1, got {given.k}")
    if not given.output_path.endswith((".json", ".csv")):
        parser.error(f"--output-path must end in .json or .csv, got {given.output_path}")
    try:
        parts = [read_predictions(file, merge=True) for file in given.files]
        merged = merge_predictions(parts, given.k)
        write_predictions(given.output_path, merged)
    except (UserError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"{len(merged.scores)} scores: {given.output_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
