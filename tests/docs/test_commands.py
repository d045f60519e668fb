"""What README, docs and examples tell people to type exists: files, modules, options, settings."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from copynce.cli import main
from copynce.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.py"))]
FOLDERS = "benchmarks|copynce|dali_pipelines|docs|examples|kernels|scripts|tests"
START = re.compile(r"(?:\w+=\S+ )*(?:python|pytest|copynce|torchrun) ")


def commands(page: Path) -> list[list[str]]:
    """Words of every command of a page: indented or fenced lines, and code within a line."""
    text = page.read_text().replace("\\\n", " ")
    fences = r"```\w*\n(.*?)```"
    lines = "\n".join(re.findall(fences, text, re.DOTALL)).splitlines()
    text = re.sub(fences, "", text, flags=re.DOTALL)
    lines += re.findall(r"^ {4,}(.+)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
    found = []
    for line in lines:
        for part in re.split(r" && |  +", line.strip()):
            if START.match(part):
                words = shlex.split(part, comments=True)
                while re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                found.append(words)
    return found


def problems(words: list[str], settings: dict[str, str]) -> list[str]:
    """What a command names and does not exist."""
    program, *rest = words
    if program == "torchrun":
        while rest[0].startswith("-") and rest[0] != "-m":
            rest = rest[1:] if rest[0] == "--standalone" else rest[2:]
        if rest[:2] == ["-m", "copynce.cli"]:
            return problems(["copynce", *rest[2:]], settings)
        program = "python"
    wrong = [
        w for w in rest if re.match(f"({FOLDERS})/", w) and "docs/" not in w and not (ROOT / w.split("::")[0]).exists()
    ]
    if program == "copynce":
        command = rest[0] if rest else ""
        if command in ("--help", "--version"):
            return wrong
        if command not in settings:
            return [*wrong, f"command {command}"]
        keys = [word.split("=")[0] for word in rest if re.match(r"[a-z][\w.]*=", word)]
        wrong += [key for key in keys if not re.search(rf"^ +{re.escape(key)}\b", settings[command], re.MULTILINE)]
        options = [word for word in rest if word.startswith("--")]
        if command == "train" and len(rest) > 1 and re.fullmatch(r"[a-z][\w-]*", rest[1]):
            wrong += [] if rest[1] in RECIPES else [f"named run {rest[1]}"]
        return wrong + [option for option in options if option.split("=")[0] not in settings[command]]
    if program == "pytest":
        given = [word for word in rest if re.match(f"({FOLDERS})\\b", word)]
        sources = [
            f for word in given for f in ([ROOT / word] if (ROOT / word).is_file() else (ROOT / word).rglob("*.py"))
        ]
        if "-k" in rest:
            wanted = rest[rest.index("-k") + 1]
            if not any(wanted in file.read_text() for file in sources if file.is_file()):
                wrong.append(f"-k {wanted}")
        return wrong
    if rest[0] == "-m" and rest[1].startswith("core."):
        return wrong  # the released code's, named beside ours
    if rest[0] == "-m":
        spec = find_spec(rest[1]) if find_spec(rest[1].split(".")[0]) else None
        if spec is None or spec.origin is None:
            return [*wrong, f"module {rest[1]}"]
        source = Path(spec.origin).read_text()
    elif (ROOT / rest[0]).is_file():
        source = (ROOT / rest[0]).read_text()
    else:
        return [*wrong, rest[0]]
    options = [word.split("=")[0] for word in rest if word.startswith("--")]
    return wrong + [word for word in options if not re.search(rf"(?<![\w-]){word}(?![\w-])", source)]


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    """The help of each command, by its name."""

    def help_of(*words: str) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
            main([*words, "--help"])
        return printed.getvalue()

    names = re.findall(r"^    (\w+)(?: |$)", help_of(), re.MULTILINE)
    return {name: help_of(name) for name in names}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_what_exists(page: Path, settings: dict[str, str]) -> None:
    wrong = {" ".join(words): found for words in commands(page) if (found := problems(words, settings))}
    assert wrong == {}


def test_enough_commands_are_found(settings: dict[str, str]) -> None:
    found = {page.name: commands(page) for page in PAGES}
    assert len(found["README.md"]) >= 15
    assert len(found["kernels.md"]) >= 10
    assert all(found[page.name] for page in PAGES if page.parent.name == "examples")
    for line in (
        "python -m benchmarks.gard a b",
        "python -m benchmarks.guard a b --wright",
        "python scripts/none.py",
        "pytest benchmarks/none.py",
        "pytest tests/kernels/triton/cases_copynce.py -k no_such_case",
        "copynce trane x.yaml",
        "copynce train descripter data.train=x",
        "copynce train descriptor data.trane=x",
        "torchrun --nproc-per-node 2 -m copynce.cli train data.trane=x",
    ):
        assert problems(line.split(), settings), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    text = page.read_text()
    named = re.findall(rf"`((?:{FOLDERS})/[\w/.-]+)(?:`| )", text) + re.findall(r"\]\(([\w/.-]+)\)", text)
    assert [path for path in named if not ((ROOT / path).exists() or (page.parent / path).exists())] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=lambda page: page.name)
def test_python_in_docs_runs(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, page.name, "exec"), {})
