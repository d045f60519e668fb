"""The evaluation of what `copynce search` does: queries asked whole, turned and in parts, and what is near judged."""

from __future__ import annotations

import numpy as np

from copynce.copies.judging import judge
from copynce.copies.searching import candidates
from copynce.evaluation.evaluating import Evaluating, Judging
from copynce.evaluation.metrics import Predictions
from copynce.evaluation.predictions import best_of_all, write_predictions
from copynce.evaluation.tables import Metrics, Row
from copynce.model import Model


def judge_search(
    model: Model, evaluating: Evaluating, judging: Judging, threads: int, global_candidates: int | None
) -> tuple[Metrics, list[Row]]:
    """(facts for metrics.json, the row; none where there is no ground truth) of a search with `model`: the probability
    of each pair that it judges is the score.

    Leaves predictions-search.csv. global_candidates: keep only so many predictions, the best over all queries. Raises
    DataError if the model has no calibration. It is for one process.
    """
    model.calibrated()
    evaluating.prepare()
    split = evaluating.split
    queries, references = split.queries, split.references

    def progress(what: str, done: int, total: int) -> None:
        evaluating.progress(f"search: {what}", done, total)

    proposed = candidates(
        model,
        queries.paths,
        references.paths,
        threads=threads,
        on_broken=evaluating.quarantine.add,
        progress=progress,
    )
    judged = judge(
        model,
        queries.paths,
        references.paths,
        proposed.pairs,
        views=proposed.views,
        on_broken=evaluating.quarantine.add,
        progress=lambda done: progress("pairs", done, len(proposed.pairs)),
        threads=threads,
    )
    rows = [(*proposed.pairs[row], pair.probability) for row, pair in enumerate(judged) if pair is not None]
    predictions = Predictions(
        np.array([queries.uuids[query] for query, _, _ in rows], object),
        np.array([references.uuids[reference] for _, reference, _ in rows], object),
        np.array([probability for _, _, probability in rows], np.float64),
    )
    predictions = best_of_all(predictions, global_candidates)
    evaluating.forget()
    write_predictions(evaluating.out / "predictions-search.csv", predictions)
    metrics: Metrics = {"pairs_search": len(rows), "calibrated_on": model.calibrated().fitted_on}
    if not evaluating.positives:
        return metrics, []
    row = judging.row("search", predictions, split.ground_truth)
    keys = ("uap", "rp90", "rp90_threshold", "map", "recall_at_1", "recall_at_10")
    return metrics | {f"{key}_search": row.metrics[key] for key in keys}, [row]
