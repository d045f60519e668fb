"""``copynce eval`` as a whole table: descriptor, + score normalisation, matcher, + local crops; and its report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from copynce.cli import main
from copynce.cli.main import BAD_INPUT
from copynce.copies.calibration import FEATURES, Calibration
from copynce.copies.searching import find_copies
from copynce.data import Manifest, Quarantine, open_dataset
from copynce.data.synthetic import make_pictures
from copynce.evaluation import read_predictions, score_predictions
from copynce.evaluation.evaluating import RESULTS
from copynce.model import load_model
from copynce.models import build_descriptor, build_matcher, load_matcher, save_checkpoint
from copynce.retrieval.query_views import query_views
from dali_pipelines import CropLoader, Cut, LoaderOptions

WORKER = Path(__file__).parents[1] / "training" / "launch_worker.py"
#: The worker with smaller parts, so that there is something to share.
SMALL = """
import runpy, sys
from copynce.retrieval import extract
extract._PART = 2
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A descriptor, a matcher, and a data set: 4 queries, one of them broken, 5 references, 6 training pictures."""
    root = tmp_path_factory.mktemp("place")
    names = [path.name for path in make_pictures(root / "ds" / "p", 12, seed=5, side_px=(64, 96))]
    (root / "ds" / "p" / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    lists = {"references": ("R", names[:5]), "query_a": ("Q", [*names[:3], "broken.jpg"]), "train": ("T", names[6:])}
    for file, (letter, files) in lists.items():
        lines = [f"{letter}{i},p/{name}" for i, name in enumerate(files)]
        (root / "ds" / f"{file}.csv").write_text("\n".join(["uuid,path", *lines]))
    (root / "ds" / "gt_a.json").write_text(json.dumps({"Q0": ["R0"], "Q1": ["R1"], "Q2": [], "Q3": ["R3"]}))
    options = {"patch_size": 8, "embed_dim": 24, "num_heads": 2}
    descriptor = build_descriptor(img_size=32, dim=16, backbone_options={**options, "depth": 2})
    save_checkpoint(root / "d.safetensors", descriptor)
    matcher = build_matcher(img_size=32, encoder_blocks=2, fusion_blocks=1, backbone_options=options)
    save_checkpoint(root / "m.safetensors", matcher)
    return root


#: Settings of a whole table, and its rows.
WHOLE = ["matcher={}/m.safetensors", "candidates_k=3", "local_views=true"]
ROWS = [
    *("descriptor", "+ score normalisation", "local views", "local views + score normalisation"),
    *("matcher", "+ local crops", "matcher, local views"),
]


def evaluate(place: Path, weights: str, out: Path, *settings: str) -> int:
    fixed = [f"dataset={place / 'ds'}", "split=a", "device=cpu", "precision=fp32", "repetitions=20", f"out={out}"]
    return main(["eval", str(place / weights), *fixed, *settings])


@pytest.fixture(scope="module")
def table(place: Path) -> Path:
    """The folder of a whole table."""
    assert evaluate(place, "d.safetensors", place / "t", *(setting.format(place) for setting in WHOLE)) == 0
    return place / "t"


def test_a_whole_table_is_one_command(place: Path, table: Path) -> None:
    metrics = json.loads((table / "metrics.json").read_text())
    assert [row["name"] for row in metrics["rows"]] == ROWS
    assert (metrics["candidates"], metrics["k"], metrics["start"], metrics["end"]) == (9, 10, 1, 5)
    truth = open_dataset(place / "ds", "a").ground_truth
    for name, suffix in (("matcher", "_matcher"), ("lce", "_lce"), ("matcher-local-views", "_matcher_local_views")):
        found = read_predictions(table / f"predictions-{name}.csv")
        assert len(found.scores) == 9
        assert score_predictions(found, truth)["uap"] == metrics[f"uap{suffix}"]
    assert metrics["uap"] == metrics["rows"][0]["uap"]
    lines = (table / "table.md").read_text().splitlines()
    assert lines[0] == "|  | uAP | RP90 | recall@1 |"
    assert len(lines) == 2 + len(ROWS)
    assert all(line.count("[") == 3 for line in lines[2:])


def test_local_views_are_all_views_with_all_references(table: Path) -> None:
    """Each query view normalised by itself; the best three pairs of a query are matched."""
    columns = {}
    for role in ("query-views", "reference", "training"):
        (file,) = (table / "features").glob(f"{role}-0*.safetensors")
        columns[role] = load_file(file)["values"].astype(np.float64)
    query = columns["query-views"].reshape(3, 23, -1)
    similar = np.einsum("qvd,rd->qvr", query, columns["reference"])
    background = -np.sort(-np.einsum("qvd,td->qvt", query, columns["training"]))
    normal = (similar - background[..., 1:5].mean(-1, keepdims=True)).max(1)
    found = read_predictions(table / "predictions-local-views.csv")
    assert len(found.scores) == 15
    for name, reference, score in zip(*found, strict=True):
        assert score == pytest.approx(similar[int(name[1]), :, int(reference[1])].max(), abs=1e-5)
    matched = read_predictions(table / "predictions-matcher.csv")
    for place in range(3):
        best = {f"R{at}" for at in np.argsort(-normal[place])[:3]}
        assert {r for q, r in zip(matched.queries, matched.references, strict=True) if q == f"Q{place}"} == best
    metrics = json.loads((table / "metrics.json").read_text())
    rows = metrics["rows"]
    assert (metrics["uap_local_views"], metrics["uap_local_views_sn"]) == (rows[2]["uap"], rows[3]["uap"])


def test_the_nearest_view_is_matched(place: Path, table: Path) -> None:
    """With the whole reference; scores of plain passes."""
    (query,) = (load_file(file)["values"] for file in (table / "features").glob("query-views-0*.safetensors"))
    (reference,) = (load_file(file)["values"] for file in (table / "features").glob("reference-0*.safetensors"))
    (training,) = (load_file(file)["values"] for file in (table / "features").glob("training-0*.safetensors"))
    bias = -np.sort(-(query @ training.T).astype(np.float64))[:, 1:5].mean(-1)
    normal = ((query @ reference.T) - bias[:, None]).reshape(3, 23, -1)
    split, matcher = open_dataset(place / "ds", "a"), load_matcher(place / "m.safetensors").eval()

    def picture(manifest: Manifest, at: int, view: Cut) -> torch.Tensor:
        options = LoaderOptions(size=32, batch_size=1)
        loader = CropLoader([manifest.paths[at]], lambda *_: [view], options, on_broken=lambda path, why: None)
        ((_, found),) = loader
        return found[0]

    found = read_predictions(table / "predictions-matcher-local-views.csv")
    views = set()
    for name, other, score in zip(*found, strict=True):
        at, to = int(name[1]), int(other[1])
        with Image.open(split.queries.paths[at]) as opened:
            cuts = query_views(*opened.size)
        nearest = int(normal[at, :, to].argmax())
        views.add(nearest)
        with torch.inference_mode():
            both = picture(split.queries, at, cuts[nearest]), picture(split.references, to, Cut())
            assert score == pytest.approx(float(matcher(*both).sigmoid()), abs=1e-5)
    assert len(views) > 2


def test_local_crops_score_at_least_as_high(table: Path) -> None:
    """PROTOCOLS 15.7; a float32 sum of another batch may round otherwise."""
    plain, crops = (
        {(q, r): s for q, r, s in zip(*read_predictions(table / f"predictions-{name}.csv"), strict=True)}
        for name in ("matcher", "lce")
    )
    assert plain.keys() == crops.keys()
    assert all(crops[pair] >= plain[pair] - 1e-6 for pair in plain)


def test_what_was_done_is_taken_from_the_folder(
    place: Path, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((table / "metrics.json").read_text())
    for loader in ("copynce.retrieval.extract.PictureLoader", "copynce.retrieval.matcher_passes.PictureLoader",
                   "copynce.retrieval.matcher_passes.CropLoader"):  # fmt: skip
        monkeypatch.setattr(loader, lambda *_, **__: pytest.fail("a picture was read"))
    assert evaluate(place, "d.safetensors", table, *(setting.format(place) for setting in WHOLE)) == 0
    assert json.loads((table / "metrics.json").read_text()) == before
    printed = capsys.readouterr().out
    assert [line.split("  ")[0] for line in printed.splitlines()[2 : 2 + len(ROWS)]] == ROWS


def test_two_processes_leave_what_one_leaves(place: Path, table: Path, tmp_path: Path) -> None:
    settings = [f"dataset={place / 'ds'}", "split=a", "device=cpu", "precision=fp32", "repetitions=20"]
    settings += [*(setting.format(place) for setting in WHOLE), f"out={tmp_path / 'two'}"]
    command = ["eval", str(place / "d.safetensors"), *settings]
    (tmp_path / "logs").mkdir()
    arguments = [sys.executable, "-c", SMALL, str(WORKER), str(tmp_path / "logs"), json.dumps([[command, command]])]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (outcome,) = json.loads(done.stdout.splitlines()[-1])
    assert outcome["statuses"] == [0, 0], outcome
    names = [sorted(path.name for path in folder.iterdir()) for folder in (table, tmp_path / "two")]
    assert names[0] == names[1]
    for name in names[0]:
        if name.startswith("predictions"):
            one, two = (read_predictions(folder / name) for folder in (table, tmp_path / "two"))
            assert [list(one.queries), list(one.references)] == [list(two.queries), list(two.references)]
            np.testing.assert_allclose(one.scores, two.scores, atol=1e-5)
    skipped = [(folder / "skipped.jsonl").read_text() for folder in (table, tmp_path / "two")]
    assert skipped[0] == skipped[1] != ""


def test_the_report_shows_errors_as_pictures(table: Path) -> None:
    page = (table / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= 8
    assert page.count("data:image/png;base64,") == 1
    assert "original R3 is not among the predictions" in page  # the broken query
    assert "cannot be shown" in page
    assert "this query copies nothing" in page  # a false match of Q2
    assert (table / "precision_recall.png").stat().st_size > 5000


def test_a_matcher_by_itself(place: Path, tmp_path: Path, table: Path) -> None:
    candidates = tmp_path / "c.json"
    candidates.write_text(json.dumps([["Q0", [["R0", 0], ["R1", 0]]], ["Q1", [["R2", 0]]]]))
    assert evaluate(place, "m.safetensors", tmp_path / "e", f"candidates={candidates}", "local_crops=false") == 0
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert [row["name"] for row in metrics["rows"]] == ["matcher"]
    assert metrics["uap"] == metrics["uap_matcher"]
    whole = {(q, r): s for q, r, s in zip(*read_predictions(table / "predictions-matcher.csv"), strict=True)}
    for query, reference, score in zip(*read_predictions(tmp_path / "e" / "predictions-matcher.csv"), strict=True):
        if (query, reference) in whole:
            assert score == pytest.approx(whole[query, reference], abs=1e-6)


@pytest.mark.parametrize(
    ("weights", "settings", "message"),
    [
        ("m.safetensors", [], "is a matcher's, which scores pairs: give candidates=FILE"),
        ("m.safetensors", ["matcher=m.safetensors"], "with matcher=, the first model is a descriptor's"),
        ("d.safetensors", ["matcher=d.safetensors"], "matcher: d.safetensors is a descriptor's"),
        ("d.safetensors", ["candidates=c.csv"], "candidates=c.csv is for a matcher, but there is none"),
        ("d.safetensors", ["local_crops=true"], "local_crops=true is for a matcher, but there is none; give matcher="),
        ("d.safetensors", ["matcher=m.safetensors", "candidates=c.csv", "candidates_k=3"], "leave out one"),
        ("m.safetensors", ["candidates=good.csv", "whiten=8"], "whiten=8 is for a descriptor, but there is only a"),
        ("m.safetensors", ["candidates=e/predictions.csv", "out=e"], "predictions.csv is a file that this evaluation"),
        ("m.safetensors", ["candidates=c.csv"], "c.csv, line 2: reference 'R9' is not among the 5 references"),
        ("m.safetensors", ["candidates=empty.csv"], "empty.csv: no candidate pair in this file"),
        ("m.safetensors", ["candidates=good.csv", "local_views=true"], "local_views=true is for a descriptor, but"),
        ("d.safetensors", ["queries=x"], "has its own; leave out one"),
        ("d.safetensors", ["ground_truth=other.csv"], "1 queries of the ground truth are not in the query list"),
        ("d.safetensors", ["protocol=sscd", "end=0"], "end must be above start"),
    ],
)
def test_what_does_not_fit(
    weights: str, settings: list[str], message: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    (place / "c.csv").write_text("Q0,R0\nQ0,R9\n")
    (place / "good.csv").write_text("Q0,R0\n")
    (place / "empty.csv").write_text("query_id,reference_id\n")
    (place / "other.csv").write_text("Q8,R0\n")
    assert evaluate(Path(), weights, tmp_path / "e", f"dataset={place / 'ds'}", *settings) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_nothing_of_an_earlier_evaluation_stays(place: Path, tmp_path: Path) -> None:
    """A table by another model's rows would be told beside the new predictions; files of others stay."""
    (tmp_path / "features").mkdir()
    for name in (*RESULTS, "mine.txt", "features/mine"):
        (tmp_path / name).write_text("earlier")
    (place / "good.csv").write_text("Q0,R0\n")
    settings = [f"candidates={place / 'good.csv'}", "local_crops=false", "shown=0"]
    assert evaluate(place, "m.safetensors", tmp_path, *settings) == 0
    files = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert files - {"skipped.jsonl"} == {"mine.txt", "metrics.json", "table.md", "predictions-matcher.csv"}
    assert "earlier" not in (tmp_path / "table.md").read_text()
    assert (tmp_path / "features" / "mine").exists()


def test_any_two_folders(place: Path, tmp_path: Path) -> None:
    for folder, names in (("q", ["a", "b"]), ("r", ["a", "b", "c"])):
        make_pictures(tmp_path / folder, len(names), seed=9, side_px=(64, 96))
        for path, name in zip(sorted((tmp_path / folder).iterdir()), names, strict=True):
            path.rename(path.with_stem(name))
    (tmp_path / "gt.csv").write_text("a,a\nb,b\n")
    arguments = ["queries=q", "references=r", "training=r", "ground_truth=gt.csv", "protocol=sscd", "out=o"]
    settings = [f"{s.split('=')[0]}={tmp_path / s.split('=')[1]}" if s[:4] != "prot" else s for s in arguments]
    assert main(["eval", str(place / "d.safetensors"), *settings, "device=cpu", "shown=0", "repetitions=0"]) == 0
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert (metrics["uap"], metrics["protocol"], metrics["start"], metrics["end"]) == (1.0, "sscd", 0, 3)
    assert [row["name"] for row in metrics["rows"]] == [
        "descriptor", "+ score normalisation", "whitened", "whitened + score normalisation"
    ]  # fmt: skip
    assert metrics["whitened_dims"] == 2  # of three pictures
    assert np.isfinite([metrics["uap_sn"], metrics["uap_whitened"], metrics["uap_whitened_sn"]]).all()


def test_a_box_is_also_judged_as_search_does_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    box = tmp_path / "box"
    box.mkdir()
    for name, own in (("d.safetensors", "descriptor.safetensors"), ("m.safetensors", "matcher.safetensors")):
        (box / own).write_bytes((place / name).read_bytes())
    out = tmp_path / "out"
    assert evaluate(place, str(box), out, "search=true") == BAD_INPUT
    assert "has no calibration" in capsys.readouterr().err
    weights = np.linspace(0.1, 0.5, len(FEATURES))
    Calibration(tuple(weights.tolist()), -1.0, fitted_on="nothing").save(box / "calibration.json")
    assert evaluate(place, str(box), out, "search=true") == 0
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[2:4]] == ["descriptor", "search"]
    split = open_dataset(place / "ds", "a")
    pairs = find_copies(load_model(box), split.queries.paths, split.references.paths, on_broken=lambda *_: None)
    query, reference = (
        dict(zip(map(str, side.paths), side.uuids, strict=True)) for side in (split.queries, split.references)
    )
    expected = {(query[pair.query], reference[pair.reference]): pair.probability for pair in pairs}
    found = read_predictions(out / "predictions-search.csv")
    assert len(found.scores) == 12, "3 queries of 5 references, one of which is the same file"
    assert dict(zip(zip(found.queries, found.references, strict=True), found.scores, strict=True)) == pytest.approx(
        expected, abs=1e-6
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["pairs_search"], metrics["calibrated_on"]) == (12, "nothing")
    assert metrics["uap_search"] == score_predictions(found, split.ground_truth)["uap"] == metrics["rows"][1]["uap"]
    assert len(Quarantine(out / "skipped.jsonl")) == 1
    assert evaluate(place, "m.safetensors", tmp_path / "m", "candidates=no.csv", "search=true") == BAD_INPUT
