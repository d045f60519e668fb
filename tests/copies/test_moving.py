"""Files moved away and brought back, wherever it is interrupted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from copynce.copies import moving
from copynce.copies.moving import Move, common_root, move_files, planned, require_outside, undo
from copynce.errors import ConfigError, DataError, WriteError


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    odd = os.fsencode(tmp_path) + b'/in/sub/\xff, "\n.jpg'
    names = [str(tmp_path / "in/a.jpg"), os.fsdecode(odd)]
    for name in names:
        os.makedirs(os.path.dirname(name), exist_ok=True)
        Path(name).write_text(name, errors="surrogateescape")
        os.utime(name, (1e9, 1e9))
    return names


@pytest.mark.parametrize("links", [True, False])  # False: as between file systems
def test_there_and_back(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def refused(*_: object, **__: object) -> None:
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(moving.os, "link", refused)
    root = common_root([str(tmp_path / "in")], files)
    moves = planned(files, root, tmp_path / "out")
    record = move_files(moves, tmp_path / "out")
    assert record == tmp_path / "out/moved.csv"
    assert [os.path.relpath(target, tmp_path / "out") for _, target in moves] == ["a.jpg", "sub/" + Path(files[1]).name]
    for source, target in moves:
        assert not os.path.exists(source)
        assert Path(target).read_text(errors="surrogateescape") == source
        assert os.path.getmtime(target) == 1e9
    assert undo(record) == (2, [])
    assert undo(record) == (0, [])
    assert all(Path(name).read_text(errors="surrogateescape") == name for name in files)
    assert move_files(moves, tmp_path / "out").name == "moved-2.csv"


def test_nothing_is_overwritten(files: list[str], tmp_path: Path) -> None:
    root = str(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.jpg").write_text("another")
    with pytest.raises(ConfigError, match=r"out/a\.jpg is there already"):
        planned(files, root, tmp_path / "out")
    with pytest.raises(ConfigError, match="lies in"):
        require_outside(tmp_path / "in/copies", ["/usr", root])
    moves = [Move(files[1], str(tmp_path / "out/b.jpg")), Move(files[0], str(tmp_path / "out/a.jpg"))]
    with pytest.raises(WriteError, match=r"1 of 2 are moved, and `copynce scan --undo .*moved\.csv`"):
        move_files(moves, tmp_path / "out")
    assert (tmp_path / "out/a.jpg").read_text() == "another"
    assert undo(tmp_path / "out/moved.csv") == (
        1,
        [(str(tmp_path / "out/a.jpg"), f"another file is at {files[0]} now")],
    )
    assert os.path.exists(files[1])


def test_undo_after_a_kill(files: list[str], tmp_path: Path) -> None:
    moves = planned(files, str(tmp_path / "in"), tmp_path / "out")
    record = move_files(moves, tmp_path / "out")
    os.link(moves[0].target, moves[0].source)  # killed before the old name was removed
    os.unlink(moves[1].target)
    assert undo(record) == (1, [(moves[1].target, "is not there any more")])
    assert not os.path.exists(moves[0].target)
    Path(files[0]).write_text("x")
    with pytest.raises(DataError, match="list of moved files"):
        undo(files[0])


def test_the_root_of_several_sources(tmp_path: Path) -> None:
    for name in ("a", "b/c"):
        (tmp_path / name).mkdir(parents=True)
    both = [str(tmp_path / "a"), str(tmp_path / "b/c")]
    assert common_root(both, [f"{tmp_path}/a/1.jpg", f"{tmp_path}/b/c/2.jpg"]) == str(tmp_path)
    assert common_root(both[:1], [f"{tmp_path}/a/deep/1.jpg"]) == both[0]
    assert common_root(["list.csv"], [f"{tmp_path}/b/c/1.jpg", f"{tmp_path}/b/2.jpg"]) == f"{tmp_path}/b"
