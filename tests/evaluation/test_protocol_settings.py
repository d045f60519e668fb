"""What the protocols ask for where settings leave it open, without a model."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from copynce.data import EvaluationSplit, Manifest
from copynce.errors import ConfigError
from copynce.evaluation import protocols
from copynce.evaluation.descriptor import DescriptorOptions, DescriptorResult
from copynce.evaluation.evaluating import Judging
from copynce.evaluation.metrics import Predictions
from copynce.evaluation.predictions import Candidates
from copynce.evaluation.protocols import Loaded, evaluate, settle
from copynce.evaluation.settings import EvalConfig


def split(protocol: str, training: int | None = None, **more: Any) -> EvaluationSplit:
    def manifest(letter: str, count: int) -> Manifest:
        return Manifest([f"{letter}{i}" for i in range(count)], [Path(f"{letter}{i}") for i in range(count)], Path())

    queries = manifest("Q", 4)
    truth = {uuid: [f"R{i}"] for i, uuid in enumerate(queries.uuids)}
    train = None if training is None else manifest("T", training)
    return EvaluationSplit("s", queries, manifest("R", 4), train, truth, protocol, **more)


def settled(protocol: str, with_matcher: bool = False, training: int | None = None, **settings: Any) -> Any:
    config = EvalConfig(dataset="x", **settings)
    chosen = protocols.PROTOCOLS[protocol]
    return protocols._settled(config, chosen, split(protocol, training), with_matcher=with_matcher)


def test_development_sets() -> None:
    plain = settled("copynce")
    assert (plain.k, plain.start, plain.end, plain.rule, plain.precision) == (10, 1, 5, "step", "auto")
    assert (plain.global_candidates, plain.pairs, plain.score_normalization, plain.whiten) == (None, None, False, None)
    assert settled("copynce", with_matcher=True, training=5).score_normalization
    assert not settled("copynce", with_matcher=True, training=4).score_normalization  # too few to normalise with
    assert not settled("copynce", with_matcher=True, training=5, score_normalization=False).score_normalization


def test_phase_2_looks_at_one_query_at_a_time_and_caps_the_pairs() -> None:
    plain = settled("phase2")
    assert (plain.precision, plain.k, plain.global_candidates, plain.pairs) == ("fp32", 10, None, 40)
    assert settled("phase2", k=20).global_candidates == 40
    assert settled("phase2", precision="bf16").precision == "bf16"
    assert settled("phase2", k=20, global_candidates=70).pairs == 70


def test_copydays_and_sscd() -> None:
    copydays = settled("copydays")
    assert (copydays.k, copydays.rule) == (100, "trapezoid")
    assert settled("copydays", ap="step", k=7).k == 7
    sscd = settled("sscd", training=9)
    assert (sscd.k, sscd.start, sscd.end, sscd.score_normalization, sscd.whiten) == (10, 0, 3, True, 512)
    assert (settled("sscd").score_normalization, settled("sscd").whiten) == (False, None)
    assert settled("sscd", training=9, whiten=0).whiten is None


@pytest.mark.parametrize(
    ("models", "settings", "message"),
    [
        ("d", {"candidates_k": 10}, "candidates_k=10 is for a matcher, but there is none; give matcher= too"),
        ("d", {"local_crops": True}, "local_crops=true is for a matcher"),
        ("d", {"memory": 4.0}, "memory=4.0 is for a matcher"),
        ("d", {"alpha": 0.0}, "alpha=0.0 is for score normalisation, which is off here; give score_normalization=true"),
        ("dm", {"start": 0, "score_normalization": False}, "start=0 is for score normalisation, which is off here"),
        ("dm", {"end": 7}, "end=7 is for score normalisation, which is off here"),  # of six training pictures
        ("m", {"score_normalization": True}, "score_normalization=true is for a descriptor, but there is only a"),
        ("m", {"whiten": 9}, "whiten=9 is for a descriptor"),
        ("m", {"k": 10}, "k=10 is for a descriptor"),
        ("d", {"local_crops": False, "score_normalization": False, "whiten": 0}, None),  # nothing is asked for
        ("m", {"local_crops": False, "score_normalization": False, "whiten": 0, "memory": 1.0}, None),
        ("dm", {"candidates_k": 3, "local_crops": True, "memory": 1.0, "alpha": 2.0, "end": 6, "k": 4}, None),
        ("d", {"score_normalization": True, "alpha": 2.0}, None),
        ("d", {"protocol": "sscd", "start": 1}, None),  # which normalises by itself
    ],
)
def test_a_setting_without_use_is_refused(models: str, settings: dict[str, Any], message: str | None) -> None:
    config = EvalConfig(dataset="x", **settings)
    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        settle(config, split("copynce", 6), descriptor="d" in models, matcher="m" in models)


def test_groups_have_their_own_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copydays reports the mAP of "strong" by itself, and uAP over all."""
    predictions = Predictions(
        np.array(["Q0", "Q1", "Q1", "Q2"], object), np.array(["R0", "R2", "R1", "R0"], object), np.arange(4, 0, -1.0)
    )

    def judged(_model: object, evaluating: Any, options: DescriptorOptions, *_: object) -> DescriptorResult:
        evaluating.prepare()
        row = options.judging.row("descriptor", predictions, evaluating.split.ground_truth)
        return DescriptorResult({"split": "s", **row.metrics}, [row], Candidates(*predictions[:2]))

    monkeypatch.setattr(protocols, "judge_descriptor", judged)
    copydays = split("copydays", groups={"strong": ["Q0", "Q1"], "crops": ["Q2", "Q3"]})
    model: Any = object()
    result = evaluate(EvalConfig(dataset="x", repetitions=0), copydays, Loaded(model, Path("m"), ""), None, tmp_path)
    assert result.metrics["map_strong"] == pytest.approx((1 + (0 + 1 / 2) / 2) / 2)
    assert result.metrics["map_crops"] == 0.0
    expected = Judging("trapezoid").row("", predictions, copydays.ground_truth).metrics["uap"]
    assert result.metrics["uap"] == expected == json.loads((tmp_path / "metrics.json").read_text())["uap"]
    assert (result.protocol, result.metrics["ap"]) == ("copydays", "trapezoid")
