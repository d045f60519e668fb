"""An index whose pictures workers of Ray describe."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from copynce.cli import main
from copynce.cli.main import BAD_INPUT
from copynce.data.synthetic import make_pictures
from copynce.errors import RunError
from copynce.index import Index


def test_a_killed_worker_changes_nothing(weights: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    ray = pytest.importorskip("ray")
    make_pictures(tmp_path / "archive", 40, seed=0, side_px=(32, 48))
    (tmp_path / "archive" / "broken.png").write_text("no picture")
    told: list[str] = []
    reported: list[int] = []
    killed: list[int] = []

    def progress(done: int, total: int) -> None:
        reported.append(done)
        if not killed:
            (process,) = re.findall(r"process (\d+)", "".join(told))[:1]
            os.kill(int(process), signal.SIGKILL)
            killed.append(int(process))

    index = Index(tmp_path / "by-ray", weights, **settings)
    try:
        added = index.add(tmp_path / "archive", ray=True, ray_workers=2, progress=progress, say=told.append)
    except RunError as error:
        if "no Ray could be started here" in str(error) and not killed:
            pytest.skip(f"{error}")  # it gives itself 15 seconds, too few on a machine that is busy
        raise
    assert not ray.is_initialized()
    assert not os.path.exists(f"/proc/{killed[0]}")
    assert "a worker of Ray died; its pictures are described again" in told
    assert (added.new, [os.path.basename(path) for path, _ in added.broken]) == (40, ["broken.png"])
    assert reported == sorted(reported)
    alone = Index(tmp_path / "alone", weights, **settings)
    alone.add(tmp_path / "archive")
    found, expected = (sorted_rows(one) for one in (index, alone))
    np.testing.assert_allclose(found.pop("descriptor"), expected.pop("descriptor"), atol=1e-6)
    assert found == expected
    assert index.add(tmp_path / "archive", ray=True).unchanged == 40  # nothing to do, so Ray is not started


def sorted_rows(index: Index) -> dict[str, list[Any]]:
    """{column: values}, by path."""
    assert index._table is not None
    index._table.refresh()
    return index._table.columns(index._table.schema.names).sort_by("path").to_pydict()


def test_what_is_wrong_with_ray_is_said(
    archive: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["index", "add", str(tmp_path / "index"), str(archive), "--model", str(weights)]

    def refused(*more: str) -> str:
        assert main([*command, *more]) == BAD_INPUT
        return capsys.readouterr().err

    assert "is for --ray" in refused("--ray-workers", "2")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "ray", None)
        without.delitem(sys.modules, "copynce.index.on_ray", raising=False)
        assert "pip install 'copynce[ray]'" in refused("--ray")
    pytest.importorskip("ray")
    assert f"got {str(archive)!r}; for a local Ray let --ray be the last word" in refused("--ray", str(archive))
    assert "at least 1, got 0" in refused("--ray", "--ray-workers", "0")
    assert "nobody answers there" in refused("--ray", "127.0.0.1:1")
