"""From what a pair shows to the probability that it is a copy.

    p = 1 / (1 + exp(-(a + sum_i w_i f_i)))      logistic regression over the signals f_i of a pair (`Signals`)

fitted on pairs whose truth is known, as they come out of a search: a query with its nearest references. So it is the
probability for a pair that a search proposes, where about as many queries have a copy as there; with look-alikes among
the pairs (`python -m scripts.make_box --distinct-references`) it is less.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from copynce.errors import DataError
from copynce.files import atomic_text

#: Of what is listed where nothing else is asked for.
PRECISION = 0.95

#: Below every normalised cosine.
NO_FLOOR = -2.0

_RIDGE = 1.0  # of standardised weights: some hundred copies tell no more
_STEPS = 100
_FORMAT = 3
_PLAUSIBLE = 0.05  # probability of a copy that is not to be lost by the floor


@dataclass(frozen=True)
class Signals:
    """What a pair shows.

    cosine: of both descriptors. normalised: the cosine less what the query has with the background, or the cosine
    itself where there is none. logit: a matcher's, 0 without one. evidence: nats that speak for one place
    (`copynce.copies.regions`). agreement: share of that place's patches that agree. found: whether the place is known.
    cropped: whether all this is of a part of the query, not of the whole. coarse, fine, blocks: how the pixels of that
    place agree (`copynce.copies.pixels`).
    """

    cosine: float
    normalised: float
    logit: float
    evidence: float
    agreement: float
    found: bool
    cropped: bool = False
    coarse: float = 0.0
    fine: float = 0.0
    blocks: int = 0

    def row(self) -> list[float]:
        """As the features of the regression."""
        evidence = float(np.log1p(max(self.evidence, 0.0) / 10))
        return [
            self.cosine,
            self.normalised,
            self.logit,
            evidence,
            self.agreement,
            float(self.found),
            float(self.cropped),
            self.coarse,
            self.fine,
            float(np.log1p(self.blocks)),
        ]


FEATURES = [
    *("cosine", "normalised", "logit", "log evidence", "agreement", "found", "cropped"),
    *("coarse correlation", "fine correlation", "log blocks"),
]


@dataclass(frozen=True)
class Calibration:
    """The fitted regression.

    weights [F], in the order of `FEATURES`; offset. threshold: the least probability from which on a share of
    `PRECISION` of the fitted pairs were copies. floor: the least normalised cosine of the fitted copies but for those
    that are given up anyway (a probability below 5 %); a pair below it need not be looked at. fitted_on: which pairs
    those are.
    """

    weights: tuple[float, ...]
    offset: float
    threshold: float = 0.5
    floor: float = NO_FLOOR
    fitted_on: str = ""

    def __call__(self, signals: Sequence[Signals]) -> NDArray[np.float64]:
        """Probabilities [N] of pairs."""
        if not signals:
            return np.empty(0)
        rows = np.array([one.row() for one in signals])
        return _sigmoid(rows @ np.array(self.weights) + self.offset)

    @classmethod
    def fit(cls, signals: Sequence[Signals], truth: ArrayLike, fitted_on: str = "") -> Self:
        """The most likely regression for these pairs, truth bool [N], with a small ridge. ValueError unless both kinds
        of pairs are there."""
        answers = np.asarray(truth, np.float64)
        if answers.shape != (len(signals),) or not 0 < answers.sum() < len(answers):
            raise ValueError(f"truth must be [{len(signals)}], with copies and others among it")
        rows = np.array([one.row() for one in signals])
        mean, scale = rows.mean(0), rows.std(0)
        scale[scale < 1e-9] = np.inf  # what never changes tells nothing
        unit = np.column_stack([(rows - mean) / scale, np.ones(len(rows))])
        ridge = np.diag([*[_RIDGE] * rows.shape[1], 1e-9])
        weights = np.zeros(unit.shape[1])
        for _ in range(_STEPS):  # Newton
            p = _sigmoid(unit @ weights)
            gradient = unit.T @ (p - answers) + ridge @ weights
            step = np.linalg.solve((unit * (p * (1 - p))[:, None]).T @ unit + ridge, gradient)
            weights = weights - step
            if np.abs(step).max() < 1e-10:
                break
        found = weights[:-1] / scale
        p = _sigmoid(unit @ weights)
        kept = np.array([one.normalised for one in signals])[(answers > 0) & (p >= _PLAUSIBLE)]
        offset = float(weights[-1] - found @ mean)
        floor = float(kept.min()) if len(kept) else NO_FLOOR
        return cls(tuple(found.tolist()), offset, _threshold(p, answers), floor, fitted_on)

    def save(self, path: str | Path) -> None:
        """As JSON."""
        with atomic_text(path) as file:
            json.dump({"format": _FORMAT, "features": FEATURES, **asdict(self)}, file, indent=2)
            file.write("\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote. Raises DataError for anything else."""
        try:
            told: dict[str, Any] = json.loads(Path(path).read_bytes())
            if told["format"] != _FORMAT or told["features"] != FEATURES:
                raise ValueError("it was written by another version; make the box anew (scripts.make_box)")
            weights = tuple(float(weight) for weight in told["weights"])
            if len(weights) != len(FEATURES):
                raise ValueError(f"expected {len(FEATURES)} weights, got {len(weights)}")
            offset, threshold, floor = (float(told[name]) for name in ("offset", "threshold", "floor"))
            found = cls(weights, offset, threshold, floor, str(told["fitted_on"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} holds no calibration: {error}") from error
        if not np.isfinite([*found.weights, found.offset, found.threshold, found.floor]).all():
            raise DataError(f"{path} holds no calibration: a number of it is not finite")
        return found


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1 + np.tanh(logits / 2))  # 1 / (1 + exp(-logits)), of any size


def _threshold(probabilities: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    """The least probability from which on `PRECISION` of the pairs are copies; .5 if there is none."""
    order = np.argsort(-probabilities, kind="stable")
    precision = truth[order].cumsum() / np.arange(1, len(order) + 1)
    enough = np.flatnonzero(precision >= PRECISION)
    return float(probabilities[order[enough[-1]]]) if len(enough) else 0.5


def expected_calibration_error(probabilities: ArrayLike, truth: ArrayLike, bins: int = 10) -> float:
    """ECE: the mean over pairs of |share of copies - mean probability| of their bin; bins of equal width in [0, 1]."""
    p, answers = np.asarray(probabilities, np.float64), np.asarray(truth, np.float64)
    if p.shape != answers.shape or p.ndim != 1 or not len(p):
        raise ValueError(
            f"probabilities and truth must be [N], N at least 1, got {list(p.shape)}, {list(answers.shape)}"
        )
    bin_of = np.minimum((p * bins).astype(np.int64), bins - 1)
    gap = np.bincount(bin_of, answers - p, minlength=bins)
    return float(np.abs(gap).sum() / len(p))
