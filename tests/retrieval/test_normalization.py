"""Every recipe of normalisation against its formula and the released numbers; the command on features and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from copynce.cli import main
from copynce.cli.main import BAD_INPUT
from copynce.errors import ConfigError, DataError
from copynce.evaluation import Predictions, ranked_predictions, read_predictions, score_predictions, write_predictions
from copynce.retrieval import parts as parts_module
from copynce.retrieval import reference as twins
from copynce.retrieval.feature_formats import write_hdf5
from copynce.retrieval.features import Features, read_features, write_features
from copynce.retrieval.mining import check_pair
from copynce.retrieval.normalization import (
    BIASES,
    Whitening,
    database_augmented,
    least_variable,
    score_normalization,
    stretch_factors,
    stretched_scores,
    with_column,
    without_negatives,
)
from copynce.retrieval.search import ExactSearch, normalised, search


def random(rows: int, columns: int = 12, seed: int = 0) -> np.ndarray:
    return normalised(np.random.default_rng(seed).normal(size=(rows, columns)) + 0.3)


QUERY, REFERENCE, TRAINING = random(9, seed=1), random(15, seed=2), random(30, seed=3)


@pytest.mark.parametrize(("recipe", "start", "end", "weight"), [("copynce", 1, 5, 1.0), ("sscd", 0, 3, 1.0),
                                                                 ("isc", 9, 10, 1.0), ("vsc", 0, 1, 1.2)])  # fmt: skip
def test_a_column_holds_the_bias_of_each_recipe(recipe: str, start: int, end: int, weight: float) -> None:
    bias = BIASES[recipe].of(search(QUERY, TRAINING, 12)[0])
    expected = weight * twins.mean_of_ranks(QUERY, TRAINING, start, end)
    np.testing.assert_allclose(bias, expected, atol=1e-6)
    wide = with_column(QUERY, -bias) @ with_column(REFERENCE, 1.0).T
    np.testing.assert_allclose(wide, QUERY @ REFERENCE.T - expected[:, None], atol=1e-6)
    place = least_variable(TRAINING)
    assert place == int(np.argmin(TRAINING.var(axis=0)))
    narrow = with_column(QUERY, -bias, place) @ with_column(REFERENCE, 1.0, place).T
    others = np.delete(QUERY, place, 1) @ np.delete(REFERENCE, place, 1).T
    np.testing.assert_allclose(narrow, others - expected[:, None], atol=1e-6)


def test_stretching_gives_the_released_scores(oracle: Path) -> None:
    with np.load(oracle / "features.npz") as file:
        query, reference, auxiliary = (file[name].astype(np.float32) for name in ("query", "reference", "auxiliary"))
        index, score = file["stretch/ref_index"], file["stretch/score"]
    scores, found = search(query, reference, k=10)
    np.testing.assert_array_equal(found, index)
    factors = stretch_factors(search(query, auxiliary, 5)[0])
    # the released code rounds to float32 before it squares and takes the root
    np.testing.assert_allclose(stretched_scores(scores, factors[:, None]), score, atol=2e-6)
    all_pairs = twins.stretched_distances(query, reference, auxiliary)
    np.testing.assert_allclose(np.take_along_axis(all_pairs, found.astype(int), axis=1), score, atol=2e-6)


@examples(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(BIASES)))
def test_the_order_inside_a_query_stays(seed: int, recipe: str) -> None:
    """mAP and recall do not change, whatever features and ground truth are."""
    generator = np.random.default_rng(seed)
    query, reference, auxiliary = (generator.normal(size=(n, 6)).astype(np.float32) for n in (12, 15, 11))
    scores, indices = search(query, reference, k=8)
    bias = BIASES[recipe]
    normal = score_normalization(scores, query, auxiliary, start=bias.start, end=bias.end, alpha=bias.weight)
    factors = stretch_factors(search(query, auxiliary, 5)[0])[:, None]
    stretched = stretched_scores(scores, np.abs(factors))  # a negative one, of few auxiliary pictures, turns the order
    names = [f"q{i}" for i in range(12)], [f"r{i}" for i in range(15)]
    truth = {f"q{i}": [f"r{int(generator.integers(15))}"] for i in range(12)}
    plain = score_predictions(ranked_predictions(*names, scores, indices), truth)
    for changed in (normal, stretched):
        found = score_predictions(ranked_predictions(*names, changed, indices), truth)
        for metric in ("map", "recall_at_1", "recall_at_10"):
            assert found[metric] == plain[metric]


def test_whitening_is_that_of_faiss_and_makes_the_training_white() -> None:
    training = random(300, 8) * np.linspace(1, 3, 8, dtype=np.float32)
    whitening = Whitening.fit(training, 5)
    centred = training @ whitening.matrix.T + whitening.offset
    np.testing.assert_allclose(centred.T @ centred, np.eye(5), atol=1e-3)  # faiss does not divide by the rows
    index = faiss.index_factory(8, "PCAW5,L2norm,Flat")
    index.train(training)
    np.testing.assert_allclose(whitening(training[:9]), index.chain.at(1).apply(index.chain.at(0).apply(training[:9])),
                               atol=1e-5)  # fmt: skip
    with pytest.raises(ConfigError, match=r"dims must be from 1 to the 8 columns and 300 rows .*, got 9"):
        Whitening.fit(training, 9)


def test_negatives_are_subtracted_as_written() -> None:
    def mean(rows: np.ndarray, database: np.ndarray, power: int) -> np.ndarray:
        cosines = twins.cosines(rows, database)
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :4]
        weights = np.take_along_axis(cosines, order, axis=1) ** power
        return (weights[..., None] * database[order]).sum(axis=1)

    augmented = database_augmented(TRAINING, TRAINING, ExactSearch(TRAINING, 4))
    np.testing.assert_allclose(augmented, normalised(mean(TRAINING, TRAINING, 3)), atol=1e-6)
    expected = QUERY.astype(np.float64)
    for iterations in (1, 2):
        expected = normalised(expected - 0.35 * mean(expected, augmented, 0) / 4).astype(np.float64)
        found = without_negatives(QUERY, augmented, ExactSearch(augmented, 4), iterations=iterations)
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Features of an evaluation."""
    for name, letter, values in (("query", "Q", QUERY), ("reference", "R", REFERENCE), ("training", "T", TRAINING)):
        names = [f"{letter}{i}" for i in range(len(values))]
        write_features(tmp_path / "f" / f"{name}-0000.safetensors", Features(names, values), {"model": "m", "size": 1})
    return tmp_path / "f"


def normalise(source: Path, out: Path, *settings: str) -> int:
    return main(["normalize", str(source), "--out", str(out), "device=cpu", *settings])


def values(path: Path, side: str) -> np.ndarray:
    return np.asarray(read_features(path, side=side).features.values)


def test_the_command_on_features(folder: Path, tmp_path: Path) -> None:
    expected = QUERY @ REFERENCE.T - twins.mean_of_ranks(QUERY, TRAINING, 1, 5)[:, None]
    assert normalise(folder, tmp_path / "sn") == 0
    np.testing.assert_allclose(values(tmp_path / "sn", "query") @ values(tmp_path / "sn", "reference").T, expected,
                               atol=1e-6)  # fmt: skip
    assert not list((tmp_path / "sn").glob("training*"))
    assert not list((tmp_path / "sn").glob(".*"))
    assert normalise(folder, tmp_path / "sn.h5", "recipe=sscd", "weight=2") == 0
    expected = QUERY @ REFERENCE.T - 2 * twins.mean_of_ranks(QUERY, TRAINING, 0, 3)[:, None]
    found = read_features(tmp_path / "sn.h5", side="reference").features
    order = [list(found.uuids).index(f"R{i}") for i in range(15)]
    np.testing.assert_allclose(
        values(tmp_path / "sn.h5", "query") @ np.asarray(found.values)[order].T, expected, atol=1e-6
    )
    # The file tells of the column; so its rows are not taken for plain ones.
    for query, reference in [(folder, tmp_path / "sn.h5"), (tmp_path / "sn.h5", folder)]:
        pair = read_features(query, side="query"), read_features(reference, side="reference")
        with pytest.raises(DataError, match=r"sn\.h5, .*: these features are compared by inner product, not by cos"):
            check_pair(*pair)
    training = f"training={folder}", "training_side=training"
    assert normalise(tmp_path / "sn.h5", tmp_path / "twice", *training) == BAD_INPUT
    assert normalise(folder, tmp_path / "vsc", "recipe=vsc") == 0
    assert values(tmp_path / "vsc", "query").shape == QUERY.shape
    assert normalise(folder, tmp_path / "stretch", "recipe=stretch") == 0
    distances = np.linalg.norm(
        values(tmp_path / "stretch", "query")[:, None] - values(tmp_path / "stretch", "reference"), axis=2
    )
    np.testing.assert_allclose(-distances, twins.stretched_distances(QUERY, REFERENCE, TRAINING), atol=1e-6)


def test_whitening_then_score_normalisation(folder: Path, tmp_path: Path) -> None:
    assert normalise(folder, tmp_path / "white", "recipe=whiten", "dims=6") == 0
    whitening = Whitening.fit(TRAINING, 6)
    for side, rows in (("query", QUERY), ("reference", REFERENCE), ("training", TRAINING)):
        np.testing.assert_allclose(values(tmp_path / "white", side), whitening(rows), atol=1e-5)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "white").iterdir()}
    assert normalise(folder, tmp_path / "white", "recipe=whiten", "dims=6") == 0  # nothing is made again
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "white").iterdir()} == before
    assert normalise(tmp_path / "white", tmp_path / "both", "recipe=sscd") == 0
    assert values(tmp_path / "both", "query").shape == (9, 7)
    mixed = [f"training={folder}", "training_side=training"]
    assert normalise(tmp_path / "white", tmp_path / "mixed", *mixed) == BAD_INPUT


def test_negative_subtraction_leaves_the_augmented_training(folder: Path, tmp_path: Path) -> None:
    assert normalise(folder, tmp_path / "n", "recipe=negative", "neighbours=4", "augment=3") == 0
    augmented = database_augmented(TRAINING, TRAINING, ExactSearch(TRAINING, 3))
    np.testing.assert_allclose(values(tmp_path / "n", "training"), augmented, atol=1e-6)
    expected = without_negatives(QUERY, augmented, ExactSearch(augmented, 4))
    np.testing.assert_allclose(values(tmp_path / "n", "query"), expected, atol=1e-6)


def test_the_command_on_predictions(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "_PART", 4)
    scores, indices = search(QUERY, REFERENCE, k=3)
    names = [f"Q{i}" for i in range(9)], [f"R{i}" for i in range(15)]
    write_predictions(tmp_path / "p.csv", ranked_predictions(*names, scores, indices))
    training = [f"training={folder}", "training_side=training", f"queries={folder}"]
    for recipe, expected in (
        ("isc", scores - np.sort(-twins.cosines(QUERY, TRAINING), axis=1)[:, 6:7] * -1),
        ("stretch", np.take_along_axis(twins.stretched_distances(QUERY, REFERENCE, TRAINING), indices, axis=1)),
    ):
        more = ["end=7"] if recipe == "isc" else []
        assert normalise(tmp_path / "p.csv", tmp_path / f"{recipe}.csv", f"recipe={recipe}", *training, *more) == 0
        found = read_predictions(tmp_path / f"{recipe}.csv")
        np.testing.assert_allclose(found.scores, expected.ravel(), atol=1e-6)
        assert found.references.tolist() == [names[1][i] for i in indices.ravel()]
        assert not (tmp_path / f"{recipe}.csv.parts").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["start=5"], "start and end must satisfy 0 <= start < end, got 5 and 5"),
        (["recipe=whiten", "weight=1"], "weight must be left out with recipe=whiten"),
        (["recipe=whiten", "dims=13"], "dims must be from 1 to the 12 columns and 30 rows"),
        (["end=31"], "this recipe looks at the 31 nearest training pictures, but there are only 30"),
        (["role=query"], "role is of one set of features, but"),
        (["training=FILE"], " 7; features must come from one model"),
        (["scale=nan"], "scale must be a number"),
        (["recipe=stretch", "scale=0"], "scale must be above 0, got 0"),
        (["scale=2.5"], "scale must be left out with recipe=copynce, got 2.5"),
        (["dims=4"], "dims must be left out with recipe=copynce, got 4"),
        (["recipe=whiten", "beta=0.3"], "beta must be left out with recipe=whiten"),
        (["recipe=stretch", "augment=0"], "augment must be left out with recipe=stretch"),
        (["neighbours=3"], "neighbours must be left out with"),
        (["iterations=1"], "iterations must be left out with"),
        (
            ["recipe=negative", "neighbours=31"],
            "neighbours=31 asks for as many nearest training pictures, but there are",
        ),
        (
            ["recipe=negative", "augment=31"],
            "augment=31 asks for as many nearest training pictures, but there are only 30",
        ),
    ],
)
def test_what_is_wrong_is_a_sentence(
    settings: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_features(tmp_path / "FILE", Features(["a"], np.ones((1, 7), np.float32)), {})
    settings = [text.replace("FILE", str(tmp_path / "FILE")) for text in settings]
    assert normalise(folder, tmp_path / "out", *settings) == BAD_INPUT
    assert message in capsys.readouterr().err


def test_ids_that_do_not_meet_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_predictions(tmp_path / "p.csv", Predictions(*(np.array([x], object) for x in ("Q0", "R0")), np.ones(1)))
    training = [f"training={folder}", "training_side=training"]
    cases: list[tuple[Path, list[str], str]] = [
        (tmp_path / "p.csv", training, "queries must name the features of the predictions' queries"),
        (
            tmp_path / "p.csv",
            [*training, f"queries={folder}", "queries_side=reference"],
            "no features of the query 'Q0'",
        ),
        (
            tmp_path / "p.csv",
            [*training, f"queries={folder}", "recipe=whiten"],
            "recipe=whiten changes features, not the",
        ),
        (tmp_path / "p.csv", [f"queries={folder}"], "training must name features of training pictures"),
        (folder / "query-0000.safetensors", training, "role must be given, query or reference"),
    ]
    for source, settings, message in cases:
        assert normalise(source, tmp_path / "out.csv", *settings) == BAD_INPUT
        assert message in capsys.readouterr().err
    assert normalise(folder / "query-0000.safetensors", tmp_path / "q", "role=query", *training) == 0
    assert normalise(tmp_path / "q", tmp_path / "again", "role=query", *training) == BAD_INPUT
    assert "these features are compared by inner product, not by cosine" in capsys.readouterr().err
    write_hdf5(tmp_path / "x.h5", Features(["a"], QUERY[:1]), Features(["b"], QUERY[1:2]))
    assert normalise(tmp_path / "x.h5", tmp_path / "h", *training) == 0
    assert values(tmp_path / "h", "query").shape == (1, 13)


def test_nothing_is_written_over_what_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "sn.h5.features").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    write_predictions(Path("p.csv"), Predictions(*(np.array([x], object) for x in ("Q0", "R0")), np.ones(1)))
    Path("other.csv").symlink_to("p.csv")
    write_hdf5("x.h5", Features(["a"], QUERY[:1]), Features(["b"], QUERY[1:2]))
    before = {path: path.read_bytes() for path in [*folder.iterdir(), Path("p.csv"), Path("x.h5")]}
    from_folder, training = ["training=f", "training_side=training"], "f/training-0000.safetensors"
    cases: list[tuple[str, str, list[str], str]] = [
        ("f", "f", [], "INPUT, f;"),
        ("f", "f/../f/", [], "INPUT, f;"),
        ("f", "link", [], "INPUT, f;"),
        ("link", "f", ["recipe=whiten"], "INPUT, link;"),
        ("f", "sn.h5", [], "INPUT, f;"),
        ("f/query-0000.safetensors", "f", ["role=query", *from_folder], "INPUT, f/query-0000"),
        ("x.h5", "f", from_folder, "training, f;"),
        ("x.h5", "f", [f"training={training}"], f"training, {training};"),
        ("x.h5", "x.h5", from_folder, "INPUT, x.h5;"),
        ("p.csv", "p.csv", ["queries=f", *from_folder], "INPUT, p.csv;"),
        ("p.csv", "other.csv", ["queries=f", *from_folder], "INPUT, p.csv;"),
        ("p.csv", "x.h5", ["queries=x.h5", *from_folder], "queries, x.h5;"),
    ]
    for source, out, settings, message in cases:
        assert normalise(Path(source), Path(out), *settings) == BAD_INPUT, (source, out)
        assert f"would write over {message}" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    assert normalise(folder, Path("other.csv")) == BAD_INPUT
    assert "--out other.csv: features are written as a folder, but this is a file" in capsys.readouterr().err
    Path("pictures").mkdir()
    assert normalise(folder, Path("pictures")) == 0  # an empty one will do
    assert normalise(folder, Path("pictures")) == 0  # and what it has written
    for path in Path("pictures").iterdir():
        path.unlink()
    Path("pictures", "a.jpg").touch()
    assert normalise(folder, Path("pictures")) == BAD_INPUT
    Path("pictures").rename("y.h5.features")
    assert normalise(folder, Path("y.h5")) == BAD_INPUT
    assert capsys.readouterr().err.count("the folder holds other files, such as a.jpg, and no features") == 2
    assert [path.name for path in Path("y.h5.features").iterdir()] == ["a.jpg"]


def test_unfit_training_is_a_data_error(tmp_path: Path) -> None:
    flat: Any = np.repeat(QUERY[:2], 10, axis=0)
    with pytest.raises(DataError, match="the training features vary in fewer than dims=5 directions"):
        Whitening.fit(flat, 5)
