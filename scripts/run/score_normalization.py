"""Scores of the nearest references of each query, normalised by training pictures (PROTOCOLS 3).

    python scripts/run/score_normalization.py --query-feature-path Q --reference-feature-path R \
        --auxiliary-feature-path T --output-path normalized_scores.json --alpha 1. --start 1 --end 5

The ten nearest references are chosen before scores are normalised, as released: `copynce knn`, `copynce normalize`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from copynce.cli import main


def nearest_then(recipe: list[str], given: argparse.Namespace) -> int:
    """The nearest references of the queries, and their scores changed by `copynce normalize` with `recipe`."""
    query, query_side = _features(given.query_feature_path, "query")
    reference, reference_side = _features(given.reference_feature_path, "reference")
    training, training_side = _features(given.auxiliary_feature_path, "training")
    out = Path(given.output_path)
    out.parent.mkdir(parents=True, exist_ok=True)
    scores = out.with_name(f"{out.stem}-before.csv")
    knn = ["knn", query, "--out", str(scores), f"k={given.k}", f"references={reference}"]
    settings = {"side": query_side, "references_side": reference_side}
    settings |= {"ids": given.query_csv, "references_ids": given.reference_csv}
    status = main([*knn, *_given(settings)])
    if status:
        return status
    normalize = ["normalize", str(scores), "--out", str(out), f"queries={query}", f"training={training}", *recipe]
    settings = {"queries_side": query_side, "queries_ids": given.query_csv}
    settings |= {"training_side": training_side, "training_ids": given.auxiliary_csv}
    return main([*normalize, *_given(settings)])


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """What both scripts take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--query-feature-path", required=True, help="features of the queries")
    parser.add_argument("--reference-feature-path", required=True, help="features of the references")
    parser.add_argument("--auxiliary-feature-path", required=True, help="features of the training pictures")
    for name in ("--query-csv", "--reference-csv", "--auxiliary-csv"):
        parser.add_argument(name, help="list of their ids, for features that hold none")
    parser.add_argument("--output-path", required=True, help="scores, as .json or .csv")
    parser.add_argument("--k", type=int, default=10, help="references of each query (default: %(default)s)")
    return parser


def _features(path: str, side: str) -> tuple[str, str | None]:
    """Features and which of them. What an evaluation has described lies in its folder, in `features`: there the
    released `query_feat_ep-30.pth` stands for the queries, and so on."""
    described = Path(path).parent / "features"
    if (
        not Path(path).exists()
        and Path(path).name.startswith(f"{side.removesuffix('ing')}_feat")
        and described.is_dir()
    ):
        print(f"{path}: taken from what the evaluation described, {described}, {side}", file=sys.stderr)
        return str(described), side
    return path, None


def _given(settings: dict[str, str | None]) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items() if value is not None]


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--alpha", type=float, default=1.0, help="weight of what is subtracted (default: %(default)s)")
    parser.add_argument("--start", type=int, default=1, help="first rank that is averaged, from 0 (default: 1)")
    parser.add_argument("--end", type=int, default=5, help="the rank after the last of them (default: %(default)s)")
    given = parser.parse_args()
    ranks = [f"weight={given.alpha}", f"start={given.start}", f"end={given.end}"]
    sys.exit(nearest_then(["recipe=copynce", *ranks], given))
