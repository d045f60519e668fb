"""``copynce match`` with what people type: forms of candidates and scores, parts kept, ids that do not meet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from copynce.cli import main
from copynce.cli.main import BAD_INPUT
from copynce.data.synthetic import make_pictures
from copynce.evaluation import read_predictions
from copynce.models import build_descriptor, build_matcher, save_checkpoint

OPTIONS = {"patch_size": 8, "embed_dim": 24, "num_heads": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A matcher, a descriptor, 3 queries and 4 references, of which R3 is broken, and candidates in both forms."""
    root = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    matcher = build_matcher(img_size=32, encoder_blocks=1, fusion_blocks=1, backbone_options=OPTIONS)
    torch.nn.init.normal_(matcher.heads["cls_head"].classifier.weight, std=2.0)
    save_checkpoint(root / "m.safetensors", matcher)
    save_checkpoint(
        root / "d.safetensors", build_descriptor(img_size=32, dim=16, backbone_options={**OPTIONS, "depth": 1})
    )
    names = [path.name for path in make_pictures(root / "ds" / "p", 4, seed=5, side_px=(40, 64))]
    (root / "ds" / "p" / "broken.jpg").write_text("nothing")
    for file, letter, files in (("query_a", "Q", names[:3]), ("references", "R", [*names[:3], "broken.jpg"])):
        lines = [f"{letter}{i},p/{name}" for i, name in enumerate(files)]
        (root / "ds" / f"{file}.csv").write_text("\n".join(["uuid,path", *lines]))
    pairs = {"Q2": ["R0", "R3", "R2"], "Q0": ["R1", "R0"]}
    (root / "c.json").write_text(json.dumps([[q, [[r, 0.5] for r in found]] for q, found in pairs.items()]))
    (root / "c.csv").write_text("\n".join(f"{q},{r}" for q, found in pairs.items() for r in found))
    return root


def arguments(place: Path, out: Path, *settings: str, candidates: str = "c.csv", model: str = "m") -> list[str]:
    given = [f"dataset={place / 'ds'}", "split=a", f"out={out}", "device=cpu", "precision=fp32", *settings]
    return ["match", str(place / f"{model}.safetensors"), str(place / candidates), *given]


def test_scores_in_both_forms_of_candidates_in_both_forms(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(place, tmp_path / "a")) == 0
    said = capsys.readouterr()
    assert "4 pairs scored in fp32: 5 encoder passes, 4 fusion passes" in said.out
    assert "1 pairs have no score" in said.err
    lists = [
        f"{name}={place / 'ds' / file}" for name, file in (("queries", "query_a.csv"), ("references", "references.csv"))
    ]
    matched = [
        "match",
        str(place / "m.safetensors"),
        str(place / "c.json"),
        f"out={tmp_path / 'b'}",
        *lists,
        "device=cpu",
    ]
    assert main([*matched, "precision=fp32", "part=2", "memory=0"]) == 0
    found = read_predictions(tmp_path / "a" / "predictions.csv")
    assert list(zip(found.queries, found.references, strict=True)) == [
        ("Q2", "R0"), ("Q2", "R2"), ("Q0", "R1"), ("Q0", "R0"),
    ]  # fmt: skip
    assert np.std(found.scores) > 1e-3
    others = read_predictions(tmp_path / "b" / "predictions.csv")
    assert others.references.tolist() == found.references.tolist()
    np.testing.assert_allclose(others.scores, found.scores, atol=1e-6)
    released = json.loads((tmp_path / "a" / "predictions.json").read_text())
    assert [query for query, _ in released] == ["Q2", "Q0"]
    assert all(list_ == sorted(list_, key=lambda pair: -pair[1]) for _, list_ in released)
    assert sorted(score for _, list_ in released for _, score in list_) == sorted(found.scores.tolist())
    assert (tmp_path / "a" / "unscored.csv").read_text().split() == ["query_id,reference_id", "Q2,R3"]
    assert "broken.jpg" in (tmp_path / "a" / "skipped.jsonl").read_text()
    facts = json.loads((tmp_path / "a" / "match.json").read_text())
    assert {
        "pairs": 4,
        "unscored": 1,
        "encoder_passes": 5,
        "fusion_passes": 4,
        "local_crops": False,
    }.items() <= facts.items()


def test_no_pair_with_a_score_is_an_error(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "none.csv").write_text("Q0,R3\nQ2,R3\n")
    (tmp_path / "o").mkdir()
    for name in ("predictions.csv", "predictions.json", "match.json"):
        (tmp_path / "o" / name).write_text("of an earlier matching")
    assert main(arguments(place, tmp_path / "o", candidates="none.csv")) == BAD_INPUT
    assert "none.csv: none of the 2 pairs can be scored, in each a picture is broken" in capsys.readouterr().err
    assert (tmp_path / "o" / "unscored.csv").read_text().split() == ["query_id,reference_id", "Q0,R3", "Q2,R3"]
    assert "broken.jpg" in (tmp_path / "o" / "skipped.jsonl").read_text()
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["parts", "skipped.jsonl", "unscored.csv"]


def test_the_same_command_scores_nothing_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(arguments(place, tmp_path / "o", "local_crops=true")) == 0
    first = (tmp_path / "o" / "predictions.csv").read_bytes()
    monkeypatch.setattr("copynce.models.Matcher.encode", None)  # calling it would fail
    assert main(arguments(place, tmp_path / "o", "local_crops=true", candidates="c.json")) == 0
    assert (tmp_path / "o" / "predictions.csv").read_bytes() == first
    facts = json.loads((tmp_path / "o" / "match.json").read_text())
    assert (facts["encoder_passes"], facts["fusion_passes"]) == (2 * 25 + 3 * 10, 4 * 34)


def test_processes_give_what_one_gives(place: Path, tmp_path: Path) -> None:
    assert main(arguments(place, tmp_path / "one", "part=1")) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "copynce.cli"]
    done = subprocess.run(
        [*command, *arguments(place, tmp_path / "two", "part=1")],
        capture_output=True, text=True, check=False, env=dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads())),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pairs scored") == 1
    for name in ("predictions.csv", "predictions.json", "unscored.csv"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    assert json.loads((tmp_path / "two" / "match.json").read_text())["processes"] == 2


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ("Q0,R1\nQ0,R9", r"bad.csv, line 2: reference 'R9' is not among the 4 references"),
        ("Q0,R1\nQ7,R1", r"bad.csv, line 2: query 'Q7' is not among the 3 queries"),
        ("query_id,reference_id\n", r"bad.csv: no candidate pair in this file"),
        ("Q0\n", r"bad.csv, line 1: expected query_id,reference_id"),
    ],
)
def test_candidates_that_do_not_fit(
    candidates: str, message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "bad.csv").write_text(candidates)
    assert main(arguments(place, tmp_path / "o", candidates="bad.csv")) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["batch_size=0"], "batch_size must be at least 1, got 0"),
        (["part=0"], "part must be at least 1, got 0"),
        (["memory=-1"], "memory must be at least 0"),
        (["queries=q.csv"], "give the pictures as queries= and references=, or as dataset= and split="),
        (["local_crop=true"], "unknown setting local_crop; did you mean local_crops"),
    ],
)
def test_wrong_settings(
    settings: list[str], message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(place, tmp_path / "o", *settings)) == BAD_INPUT
    assert message in capsys.readouterr().err


def test_a_descriptor_is_no_matcher(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(place, tmp_path / "o", model="d")) == BAD_INPUT
    error = capsys.readouterr().err
    assert "d.safetensors" in error
    assert "descriptor" in error
    assert "matcher" in error
