"""Scores of the nearest references of each query, the queries stretched by training pictures (PROTOCOLS 3).

    python scripts/run/feature_stretching.py --query-feature-path Q --reference-feature-path R \
        --auxiliary-feature-path T --output-path scores.json

`copynce knn`, then `copynce normalize recipe=stretch`.
"""

from __future__ import annotations

import sys

from score_normalization import nearest_then, parser_of  # type: ignore[import-not-found]  # run as a file

if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument(
        "--alpha", type=float, default=2.5, help="factor of the queries' lengths (default: %(default)s)"
    )
    given = parser.parse_args()
    sys.exit(nearest_then(["recipe=stretch", f"scale={given.alpha}"], given))
