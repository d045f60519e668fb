"""The probability of a pair: fitted, kept, judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from copynce.copies.calibration import Calibration, Signals, expected_calibration_error
from copynce.errors import DataError


def drawn(count: int, seed: int) -> tuple[list[Signals], np.ndarray]:
    """Pairs whose true probability is the logistic of 8 cosine + 2 agreement - 5."""
    rng = np.random.default_rng(seed)
    cosine, agreement = rng.random(count), rng.random(count)
    truth = rng.random(count) < 1 / (1 + np.exp(-(8 * cosine + 2 * agreement - 5)))
    signals = [
        Signals(c, c - 0.1, 0.0, 0.0, a, False) for c, a in zip(cosine.tolist(), agreement.tolist(), strict=True)
    ]
    return signals, truth


def test_the_fit_finds_the_probabilities() -> None:
    fitted = Calibration.fit(*drawn(4000, 0))
    signals, truth = drawn(4000, 1)
    p = fitted(signals)
    true = [1 / (1 + np.exp(-(8 * one.cosine + 2 * one.agreement - 5))) for one in signals]
    assert np.abs(p - true).max() < 0.06
    assert expected_calibration_error(p, truth) < 0.03
    assert truth[p >= fitted.threshold].mean() > 0.93
    normalised = np.array([one.normalised for one in signals])
    assert (p[normalised < fitted.floor] < 0.1).all()
    assert 0 < (normalised < fitted.floor).mean() < 0.5


def test_copies_that_are_told_apart_without_an_error_give_finite_weights() -> None:
    signals = [Signals(c, c, 3 * c, 100 * c, c, c > 0.5) for c in (0.1, 0.2, 0.8, 0.9)]
    p = Calibration.fit(signals, [False, False, True, True])(signals)
    assert (p[:2] < 0.5).all()
    assert (p[2:] > 0.5).all()
    assert Calibration.fit(signals, [False, False, True, True])([]).shape == (0,)


def test_the_truth_must_have_both_kinds() -> None:
    with pytest.raises(ValueError, match=r"truth must be \[50\], with copies and others"):
        Calibration.fit(drawn(50, 0)[0], [True] * 50)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    fitted = Calibration.fit(*drawn(200, 2), "somewhere")
    fitted.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == fitted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": ["cosine"]}, "another version"),
        ({"weights": [1.0]}, "expected 10 weights, got 1"),
        ({"offset": float("nan")}, "not finite"),
        ({"offset": None}, "holds no calibration"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "c.json"
    Calibration.fit(*drawn(200, 2)).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        Calibration.load(path)


def test_calibration_error_by_hand() -> None:
    # bin .2: two pairs, one copy, mean .25; bin .9: one pair, a copy, .95
    assert expected_calibration_error([0.2, 0.3 - 1e-9, 0.95], [1, 0, 1]) == pytest.approx((2 * 0.25 + 0.05) / 3)
