"""``copynce ablate``: a table of tiny runs, its commands, and what is wrong before the first of them."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from copynce.cli import main
from copynce.cli.main import BAD_INPUT
from copynce.data.synthetic import make_pictures
from copynce.recipes.tables import TABLES, Row, Table

TINY = [
    "data.batch_size=2", "data.threads=1", "model.img_size=32", "optim.steps=1", "device=cpu", "threads=1",
    "precision=fp32", "tensorboard=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 pictures that are references and, the first three, queries and their own copies."""
    root = tmp_path_factory.mktemp("set")
    names = [path.name for path in make_pictures(root / "p", 4, seed=5, side_px=(64, 96))]
    for file, letter in (("references", "R"), ("query_a", "Q")):
        lines = [f"{letter}{i},p/{name}" for i, name in enumerate(names)]
        (root / f"{file}.csv").write_text("\n".join(["uuid,path", *lines]))
    (root / "gt_a.json").write_text(json.dumps({f"Q{i}": [f"R{i}"] for i in range(3)}))
    pairs = [f"Q{i},R{j}" for i in range(3) for j in range(2)]
    (root / "pairs.csv").write_text("\n".join(["query_id,reference_id", *pairs]))
    return root


def ablate(table: str, dataset: Path, out: Path, *words: str) -> int:
    where = [f"--out={out}", f"--dataset={dataset}", "--split=a", f"data.train={dataset / 'p'}"]
    return main(["ablate", table, *where, *words])


@pytest.mark.parametrize("kind", ["descriptor", "matcher"])
def test_a_table_is_trained_evaluated_and_goes_on(
    kind: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weightless = "ablation-weight-0" if kind == "descriptor" else "ablation-matcher-weight-0"
    rows = (Row("full", kind, 70.5), Row("w = 0", weightless, "fails"))
    monkeypatch.setitem(TABLES, "tiny", Table("Tiny.", rows, kind))  # type: ignore[arg-type]
    shape = {"patch_size": 8, "embed_dim": 24, "num_heads": 2}
    if kind == "descriptor":
        model = ["model.dim=16", f"model.backbone_options={json.dumps(shape | {'depth': 1})}"]
    else:
        model = [f"model.backbone_options={json.dumps(shape)}", "model.encoder_blocks=1", "model.fusion_blocks=1"]
        model += [f"--candidates={dataset / 'pairs.csv'}"]
    words = [*TINY, *model, "--eval=device=cpu", "--eval=precision=fp32", "--eval=repetitions=0"]

    assert ablate("tiny", dataset, tmp_path, *words) == 0
    found = json.loads((tmp_path / "table.json").read_text())
    assert [(row["folder"], row["paper_uap"]) for row in found["rows"]] == [(kind, 70.5), (weightless, "fails")]
    assert all(0 <= row["uap"] <= 1 for row in found["rows"])
    assert found["missing"] == 0
    written = (tmp_path / "table.md").read_text()
    assert "| w = 0 | fails | " in written
    assert written in capsys.readouterr().out

    logs = {path: path.read_bytes() for path in tmp_path.glob("*/log.jsonl")}
    (tmp_path / "table.json").unlink()  # as after a kill
    assert len(logs) == 2
    assert ablate("tiny", dataset, tmp_path, *words) == 0
    assert json.loads((tmp_path / "table.json").read_text())["rows"] == found["rows"]
    assert {path: path.read_bytes() for path in logs} == logs  # nothing was trained again

    # A row that is there is none of another table's; one that is not there yet is not begun either.
    shutil.move(tmp_path / kind, tmp_path / "away")
    capsys.readouterr()
    assert ablate("tiny", dataset, tmp_path, *words, "optim.steps=2", "log_every=5") == BAD_INPUT
    said = capsys.readouterr().err
    assert f"{weightless} (w = 0) was trained with other settings: optim.steps was 1, got 2. Give another --out" in said
    assert not (tmp_path / kind).exists()


def test_commands_for_a_scheduler(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--print", "--processes=8", "data.neighbours=a b.npy", "seed=7"]
    assert ablate("descriptor-mining", dataset, tmp_path / "t", *words) == 0
    printed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == 8
    assert printed[0][:6] == ["torchrun", "--standalone", "--nproc-per-node", "8", "-m", "copynce.cli"]
    assert {"train", "seed=7", "data.neighbours=a b.npy", f"out={tmp_path / 't' / 'descriptor'}"} <= set(printed[0])
    assert printed[1][:3] == ["copynce", "eval", str(tmp_path / "t" / "descriptor")]
    assert ["data.neighbours=a b.npy" in line for line in printed[::2]] == [True, True, False, False]
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("table", "words", "message"),
    [
        ("descriptor-wieght", [], "'descriptor-wieght' is no table; did you mean descriptor-weight"),
        ("matcher-weight", [], "matcher-weight needs --candidates=FILE"),
        ("descriptor-weight", ["out=x"], "and not out, got 'out=x'"),
        ("descriptor-weight", ["--split=none"], "none"),
        ("descriptor-weight", ["optim.lrr=1"], "optim.lrr"),
        ("descriptor-weight", ["--eval=kk=1"], "kk"),
        ("descriptor-weight", ["--eval=alpha=2"], "alpha=2.0 is for score normalisation, which is off here"),
    ],
)
def test_what_is_wrong_is_a_sentence_and_no_folder(
    table: str, words: list[str], message: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate(table, dataset, tmp_path / "t", *words) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
