"""The project installed in each way that it can be, beside another package that is called kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

_PROJECT = Path(__file__).resolve().parents[2]
_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "copynce", "dali_pipelines", "kernels")
_USE = """
import kernels, copynce.kernels
import torch
from copynce.losses import copynce_loss
tokens = torch.eye(4)[None]
table = torch.arange(16, dtype=torch.int32).reshape(1, 4, 4)
assert torch.isfinite(copynce_loss(tokens, tokens, table, table, patch_size=2, backend="reference"))
print(getattr(kernels, "WHOSE", "this one"))
print(copynce.kernels.__file__)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project's files, in which a build may leave what it likes."""
    folder = tmp_path_factory.mktemp("project")
    for name in _SOURCES:
        if (_PROJECT / name).is_dir():
            shutil.copytree(_PROJECT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(_PROJECT / name, folder)
    return folder


def build(project: Path, what: str, out: Path) -> Path:
    """What setuptools builds: ``wheel``, ``editable`` (what ``pip install -e`` installs) or ``sdist``."""
    code = f"import setuptools.build_meta as backend; print(backend.build_{what}({str(out)!r}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


def environment(folder: Path) -> tuple[Path, Path]:
    """A new environment with this one's dependencies, but not its copynce: its Python and its site-packages."""
    venv.create(folder, symlinks=True, with_pip=False)
    (site,) = (folder / "lib").glob("python3*/site-packages")
    # The folder brings its packages; the .pth files in it, such as that of an editable copynce, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("WHOSE = 'another project'\n")
    return folder / "bin" / "python", site


@pytest.mark.parametrize("way", ["wheel", "editable", "checkout"])
def test_the_loss_finds_its_kernels_beside_another_package_called_kernels(
    project: Path, tmp_path: Path, way: str
) -> None:
    python, site = environment(tmp_path / "venv")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if way == "checkout":
        variables["PYTHONPATH"] = str(project)
    else:
        zipfile.ZipFile(build(project, way, tmp_path)).extractall(site)
    done = subprocess.run(
        [python, "-c", _USE], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    owner, where = done.stdout.splitlines()
    # In a checkout on PYTHONPATH the folder kernels/ is what this name means; copynce does not care.
    assert owner == ("this one" if way == "checkout" else "another project")
    assert where.startswith(str(site if way == "wheel" else project / "copynce"))


def test_a_wheel_holds_the_kernels_as_files_of_copynce_and_nothing_called_kernels_at_its_top(
    project: Path, tmp_path: Path
) -> None:
    names = zipfile.ZipFile(build(project, "wheel", tmp_path)).namelist()
    assert {name.partition("/")[0] for name in names if not name.startswith("copynce-")} == {
        "copynce",
        "dali_pipelines",
    }
    expected = {
        str(path.relative_to(project))
        for package in ("copynce", "dali_pipelines")
        for path in [*(project / package).rglob("*.py*"), project / package / "py.typed"]
        if path.suffix in (".py", ".pyi", ".typed")
    }
    expected |= {f"copynce/{path.relative_to(project)}" for path in (project / "kernels").rglob("*.py")}
    expected |= {str(path.relative_to(project)) for path in (project / "copynce" / "weights").iterdir()}
    assert {name for name in names if not name.startswith("copynce-")} == expected


def test_a_wheel_built_from_the_source_archive_equals_the_one_built_from_the_checkout(
    project: Path, tmp_path: Path
) -> None:
    for name in ("direct", "unpacked", "archived"):
        (tmp_path / name).mkdir()
    shutil.unpack_archive(build(project, "sdist", tmp_path), tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheels = (build(project, "wheel", tmp_path / "direct"), build(unpacked, "wheel", tmp_path / "archived"))
    direct, archived = ({entry.filename: entry.CRC for entry in zipfile.ZipFile(wheel).infolist()} for wheel in wheels)
    for of in (direct, archived):
        del of["copynce-0.1.0.dist-info/RECORD"]
    assert direct == archived


def test_the_oldest_python_is_named_alike_wherever_it_stands() -> None:
    settings = tomllib.loads((_PROJECT / "pyproject.toml").read_text())
    oldest = settings["project"]["requires-python"].split(",")[0].removeprefix(">=")
    assert settings["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert settings["tool"]["mypy"]["python_version"] == oldest
    assert f"Programming Language :: Python :: {oldest}" in settings["project"]["classifiers"]
