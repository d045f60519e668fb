"""Files that are whole or absent, and their hashes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from copynce.errors import UserError, WriteError
from copynce.files import file_sha256, whole_file


def test_a_file_appears_only_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    with pytest.raises(KeyError), whole_file(path) as file:  # noqa: PT012 - the block is what fails
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_what_the_system_refuses_is_told_with_the_path(tmp_path: Path) -> None:
    path = tmp_path / "no folder" / "x.bin"
    with pytest.raises(WriteError, match=r"x\.bin could not be written: No such file or directory"), whole_file(path):
        pass
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(WriteError, match=r"folder could not be written: Is a directory"),
        whole_file(tmp_path / "folder"),
    ):
        pass
    assert os.listdir(tmp_path) == ["folder"]
    assert issubclass(WriteError, UserError)


def test_the_error_of_another_file_stays_its_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), whole_file(tmp_path / "x.bin") as file:
        file.write((tmp_path / "absent").read_bytes())


def test_hash_of_a_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()
