"""Compiled code finds a place wherever a package is installed, and never outlives the source it came from.

Each test runs small functions of a package of its own in processes of their own, as an installation would.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import copynce

_FUNCTIONS = """
import numpy as np
from copynce.compiled_cache import cfunc, njit
from copynce.helper import OFFSET, twice

@njit("int64(int64)", nogil=True, cache=True)
def twice_and_offset(x):
    return twice(x) + OFFSET

@njit(cache=True)
def total(values):
    return values.sum() + twice_and_offset(0)

@cfunc("int64(int64)", cache=True)
def callback(x):
    return twice_and_offset(x)
"""
_HELPER = """
from copynce.compiled_cache import njit

OFFSET = 1

@njit(cache=True)
def twice(x):
    return 2 * x
"""
_USE = """
import numpy as np
from copynce import functions
print(functions.twice_and_offset(3), functions.total(np.ones(3)), functions.callback.ctypes(5))
"""
#: What ``_USE`` prints.
_RESULT = "7 4.0 11"
_COMPILES = "compiling for this processor"


class Installation:
    """A small package with compiled functions, in a folder of its own, and how to run it."""

    def __init__(self, folder: Path):
        self.site, self.temporary = folder / "site", folder / "tmp"
        self.package = self.site / "copynce"
        self.package.mkdir(parents=True)
        self.temporary.mkdir()
        source = Path(copynce.__file__).parent
        for name in ("__init__.py", "compiled_cache.py"):
            shutil.copy(source / name, self.package / name)
        (self.package / "functions.py").write_text(_FUNCTIONS)
        (self.package / "helper.py").write_text(_HELPER)
        self.beside = self.package / "__pycache__"
        self.beside.mkdir()

    def close(self) -> None:
        """Nobody may write beside the source any more."""
        for folder in (self.beside, self.package):
            folder.chmod(0o555)

    def start(self, prepare: Callable[[], None] | None = None, **variables: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(self.site),
            "HOME": "/nonexistent",
            "TMPDIR": str(self.temporary),
            **variables,
        }
        return subprocess.Popen(
            [sys.executable, "-c", _USE],
            cwd=self.site,  # comes before PYTHONPATH
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=prepare or obey_modes,
        )

    def run(self, prepare: Callable[[], None] | None = None, **variables: str) -> str:
        """Use the functions once in a new process; returns what it said on stderr."""
        process = self.start(prepare, **variables)
        out, said = process.communicate()
        assert (process.returncode, out.strip()) == (0, _RESULT), said
        return said

    @property
    def own(self) -> Path:
        return self.temporary / f"copynce-{os.geteuid()}"


def obey_modes() -> None:
    """Let modes bind root too: a process without CAP_DAC_OVERRIDE writes only what its user may write."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return Installation(tmp_path)


def kept(folder: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in folder.rglob("*.compiled"))


_ALL = ["functions.callback", "functions.total", "functions.twice_and_offset", "helper.twice"]


def test_code_is_kept_beside_its_source_and_the_second_process_compiles_nothing(installation: Installation) -> None:
    said = installation.run()
    assert _COMPILES in said
    assert str(installation.beside) in said
    assert kept(installation.beside) == _ALL
    assert installation.run() == ""


def test_a_package_that_cannot_be_written_and_no_home_keep_code_in_a_closed_folder_for_temporary_files(
    installation: Installation,
) -> None:
    installation.close()
    said = installation.run()
    assert _COMPILES in said
    assert str(installation.own) in said
    assert kept(installation.own) == _ALL
    for folder in (installation.own, *(f for f in installation.own.rglob("*") if f.is_dir())):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert installation.run() == ""


def test_a_home_comes_before_the_folder_for_temporary_files(installation: Installation, tmp_path: Path) -> None:
    installation.close()
    (tmp_path / "home").mkdir()
    installation.run(HOME=str(tmp_path / "home"))
    assert kept(tmp_path / "home" / ".cache" / "copynce") == _ALL
    installation.run(XDG_CACHE_HOME=str(tmp_path / "xdg"))
    assert kept(tmp_path / "xdg" / "copynce") == _ALL


def test_the_variable_comes_first(installation: Installation, tmp_path: Path) -> None:
    said = installation.run(COPYNCE_CACHE_DIR=str(tmp_path / "asked" / "for"))
    assert str(tmp_path / "asked" / "for") in said
    assert kept(tmp_path / "asked") == _ALL
    assert kept(installation.beside) == []


def test_a_variable_that_names_no_folder_is_named_and_the_work_goes_on(
    installation: Installation, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    said = installation.run(COPYNCE_CACHE_DIR=str(tmp_path / "file"))
    assert said.count("cannot be kept where COPYNCE_CACHE_DIR says") == 1
    assert f"{tmp_path / 'file'}" in said
    assert f"goes to {installation.beside}" in said
    assert kept(installation.beside) == _ALL


def test_what_an_installer_compiled_serves_users_who_cannot_write_there(installation: Installation) -> None:
    installation.run()
    installation.close()
    assert installation.run() == ""
    assert not installation.own.exists()


@pytest.mark.parametrize("which", ["above", "itself"])
def test_a_folder_that_others_can_write_is_neither_read_nor_written(installation: Installation, which: str) -> None:
    installation.close()
    installation.run()
    (folder,) = (path for path in installation.own.iterdir() if path.is_dir())
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (installation.own if which == "above" else folder).chmod(0o777)
    said = installation.run()
    assert _COMPILES in said
    assert "others can write it" in said
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_neither_read_nor_written(installation: Installation) -> None:
    installation.close()
    installation.run()
    for path in (installation.own, *installation.own.rglob("*")):
        os.chown(path, 12345, 12345)
    said = installation.run()
    assert _COMPILES in said
    assert "belongs to another user" in said


def test_a_link_in_the_place_of_the_own_folder_is_not_followed(installation: Installation, tmp_path: Path) -> None:
    installation.close()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    installation.own.symlink_to(tmp_path / "elsewhere")
    assert "compiled code can be kept nowhere" in installation.run()


def test_where_nothing_can_be_written_one_warning_names_the_folders_and_the_way_out(
    installation: Installation,
) -> None:
    installation.close()
    installation.own.write_text("")
    said = installation.run(XDG_CACHE_HOME=str(installation.package / "below"))
    assert said.count("compiled code can be kept nowhere") == 1
    for folder in (installation.beside, installation.package / "below", installation.own):
        assert str(folder) in said
    assert "set COPYNCE_CACHE_DIR" in said


def test_a_disk_without_room_costs_the_cache_only_and_leaves_no_half_file(installation: Installation) -> None:
    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))

    said = installation.run(no_room, PYTHONDONTWRITEBYTECODE="1")
    assert said.count("compiled code can be kept nowhere") == 1
    assert str(installation.beside) in said
    assert not list(installation.beside.iterdir())


def test_a_damaged_file_is_compiled_anew(installation: Installation) -> None:
    installation.run()
    for path, damage in zip(sorted(installation.beside.glob("*.compiled")), (0, 40, 200, -1), strict=True):
        content = bytearray(path.read_bytes())
        path.write_bytes(b"" if damage == 0 else content[:damage])
    assert _COMPILES in installation.run()
    assert installation.run() == ""


@pytest.mark.parametrize(
    ("old", "new", "result"),
    [("return 2 * x", "return x + x + 10", "17 14.0 21"), ("OFFSET = 1", "OFFSET = 2", "8 5.0 12")],
    ids=["function", "constant"],
)
def test_an_edit_of_a_file_that_the_functions_import_makes_their_code_stale(
    installation: Installation, old: str, new: str, result: str
) -> None:
    installation.run()
    (installation.package / "helper.py").write_text(_HELPER.replace(old, new))
    process = installation.start()
    assert process.communicate()[0].strip() == result
    assert kept(installation.beside) == _ALL  # the new code took the old one's place


def test_an_edit_of_a_file_that_the_functions_do_not_import_changes_nothing(installation: Installation) -> None:
    installation.run()
    (installation.package / "other.py").write_text("OFFSET = 5\n")
    assert installation.run() == ""


def test_of_the_processes_of_a_launcher_the_first_one_says_that_it_compiles(installation: Installation) -> None:
    assert installation.run(RANK="1") == ""
    assert kept(installation.beside) == _ALL


def test_processes_that_compile_at_once_do_not_disturb_each_other(installation: Installation) -> None:
    together = [installation.start() for _ in range(4)]
    assert [process.communicate()[0].strip() for process in together] == [_RESULT] * 4
    assert kept(installation.beside) == _ALL
    assert installation.run() == ""
