"""Nearest neighbours of features in features, for mining (PROTOCOLS 5): exact, in float32.

Features are what `extract_features.sh` and `extract_dino_features.sh` make, or anything that `copynce knn` takes. A
picture is no neighbour of its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from copynce.cli import main


def _command() -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--query-feature-path", required=True, help="features whose neighbours are looked for")
    parser.add_argument("--reference-feature-path", required=True, help="features in which they are looked for")
    parser.add_argument("--output-path", required=True, help="the table (.pth, .npy, .json, .csv)")
    parser.add_argument("--k", type=int, default=128, help="neighbours of each (default: %(default)s)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of copynce knn")
    given = parser.parse_args()
    command = ["knn", given.query_feature_path, "--out", given.output_path, f"k={given.k}", *given.settings]
    if Path(given.reference_feature_path).resolve() != Path(given.query_feature_path).resolve():
        command.append(f"references={given.reference_feature_path}")
    return command


if __name__ == "__main__":
    sys.exit(main(_command()))
