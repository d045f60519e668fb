"""What the sources of an index stand for."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from copynce.errors import DataError
from copynce.index.listing import Listing, list_files


def listed(*sources: object, standard_input: bytes = b"") -> tuple[Listing, dict[str, str]]:
    """(what is listed, {path: reason} of what is skipped)."""
    skipped: dict[str, str] = {}
    given = [str(source) for source in sources]
    found = list_files(given, skipped.__setitem__, lambda text: None, standard_input=io.BytesIO(standard_input))
    return found, skipped


def test_folders_lists_pictures_shards_and_the_standard_input(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(archive / "0.png", "0.png")
    (archive / "more" / "circle").symlink_to(archive, target_is_directory=True)
    (archive / "names.csv").write_text("uuid,path\nR1,1.png\n")
    paths = f"{archive}/2.png\n{archive}/none.png\n{archive}\n".encode()
    found, skipped = listed(
        archive, archive / "names.csv", archive / "1.png", tmp_path / "shard.tar", "-", standard_input=paths
    )
    assert found.names.to_pylist() == [
        *(f"{archive}/{i}.png" for i in range(4)),
        f"{archive}/more/4.png",
        f"{archive}/more/5.png",
        f"{tmp_path}/shard.tar/0.png",
    ]
    assert found.ids.to_pylist() == [None, "R1", None, None, None, None, None]
    assert found.size[6] == found.size[0] == (archive / "0.png").stat().st_size
    assert found.mtime_ns[1] == (archive / "1.png").stat().st_mtime_ns
    assert skipped == {f"{archive}/none.png": "no such file", str(archive): "a folder, no file"}
    assert len(listed("-", standard_input=os.fsencode(archive / "0.png") + b"\0")[0]) == 1
    with pytest.raises(DataError, match="no such file or folder"):
        listed(archive / "nowhere")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_skipped(archive: Path) -> None:
    (archive / "more").chmod(0)
    try:
        found, skipped = listed(archive)
    finally:
        (archive / "more").chmod(0o755)
    assert len(found) == 4
    assert skipped == {f"{archive}/more": "a folder that cannot be read: Permission denied"}
