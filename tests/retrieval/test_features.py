"""Files of features: what comes back, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from copynce.errors import DataError
from copynce.retrieval.features import Features, read_features, write_features

FEATURES = Features(["a", "name \u00e9\udcff,\n", "c"], np.eye(3, 5, dtype=np.float32), "bf16")


def test_everything_comes_back_and_rows_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "new" / "f.safetensors"
    write_features(path, FEATURES, {"model": "x", "size": 32}, [("q", "empty file")])
    found = read_features(path)
    assert found.features.uuids == FEATURES.uuids
    assert found.features.precision == "bf16"
    assert not found.features.values.flags.owndata
    np.testing.assert_array_equal(found.features.values, FEATURES.values)
    assert found.made_from == {"model": "x", "size": 32}
    assert found.broken == [("q", "empty file")]
    assert [file.name for file in path.parent.iterdir()] == ["f.safetensors"]


def test_no_rows_at_all(tmp_path: Path) -> None:
    write_features(tmp_path / "f", Features([], np.empty((0, 0), np.float32)), {})
    assert read_features(tmp_path / "f").features.values.shape[0] == 0


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_features(tmp_path / "f", FEATURES, {})
    with pytest.raises(TypeError):
        write_features(tmp_path / "f", FEATURES, {"no": object()})
    assert read_features(tmp_path / "f").features.uuids == FEATURES.uuids
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "other safetensors"])
def test_another_or_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "f"
    write_features(path, FEATURES, {})
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[:-4], "text": b"hello, world", "other safetensors": b""}[damage])
    if damage == "other safetensors":
        from safetensors.numpy import save_file

        save_file({"values": FEATURES.values}, path)
    with pytest.raises(DataError, match="not a readable file of features"):
        read_features(path)


def test_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_features(tmp_path / "none")
