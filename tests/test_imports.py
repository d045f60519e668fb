"""What is imported by what: help takes no time, small parts need few libraries, and rooms only look downwards."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from copynce.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]

#: The rooms from top to bottom; one imports from those below it (and from itself). Some modules of the evaluation, its
#: metrics and its files, need data alone and stand as low: who makes predictions gives them in that form.
ROOMS = [
    "copynce.cli",
    "copynce.demo",
    "copynce.inspect",
    "copynce.recipes",
    "copynce.training",
    "copynce.evaluation",
    "copynce.copies",
    "copynce.index",
    "copynce.model",
    "copynce.retrieval",
    "copynce.models",
    "copynce.copies.regions",
    "copynce.copies.geometry",
    "copynce.copies.polygons",
    "copynce.copies.calibration",
    "copynce.evaluation.predictions",
    "copynce.evaluation.metrics",
    "copynce.evaluation.ids",
    "copynce.data",
    "copynce.losses",
    "dali_pipelines",
    "copynce.pixtrace",
    "copynce.kernels",
    "copynce.provenance",
    "copynce.config",
    "copynce.files",
    "copynce.compiled_cache",
    "copynce.processor",
    "copynce.errors",
    "copynce",
]

#: Of a model's methods, what reads and writes every kind of model; and what compares pictures by one.
UPWARDS = {
    ("copynce.models.pretrained", "copynce.models.checkpoints"),
    ("copynce.model", "copynce.copies.searching"),
    ("copynce.model", "copynce.copies.pair"),
}


def loaded(code: str) -> set[str]:
    """The top-level packages beyond Python's own that are loaded once ``code`` has run."""
    code += "\nimport sys; print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = set(done.stdout.rpartition("LOADED ")[2].split())
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS), ["nonsense"]]
)
def test_help_needs_no_heavy_library(arguments: list[str]) -> None:
    code = f"from copynce.cli import main\ntry: main({arguments!r})\nexcept SystemExit: pass"
    heavy = {"torch", "numba", "nvidia", "faiss", "timm", "triton", "matplotlib", "numpy", "PIL"}
    assert not loaded(code) & heavy


def test_the_package_itself_needs_no_library_before_its_names_are_used() -> None:
    found = loaded("import copynce; copynce.__version__")
    assert {name for name in found if not name.startswith("_")} <= {"copynce", "lazy_loader"}
    assert not loaded("from copynce.index import IndexConfig") & {"torch", "lancedb", "pyarrow", "numba", "faiss"}
    # Where nothing is new, an index is brought up to date without a model.
    assert not loaded("from copynce.index import Index") & {"torch", "numba", "nvidia", "faiss", "timm"}


def test_metrics_need_numpy_alone() -> None:
    packages = loaded("import copynce.evaluation.metrics") - {"copynce", "lazy_loader"}
    assert {name for name in packages if not name.startswith("_")} == {"numpy"}


def test_predictions_and_data_need_no_torch() -> None:
    code = "from copynce.evaluation import read_predictions; from copynce.data import open_dataset"
    assert not loaded(code) & {"torch", "numba", "nvidia", "faiss", "timm"}


def imports(*, typing: bool = True) -> Iterator[tuple[str, str, int]]:
    """(module, what it imports of ours, line) of every import in the packages, those inside of functions too; and,
    if ``typing``, those that only names of types need."""
    for package in ("copynce", "dali_pipelines", "kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if (ROOT / "copynce" / "kernels") in path.parents:
                continue  # a link to kernels/
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = ".".join(("copynce", *parts) if package == "kernels" else parts).removesuffix(".__init__")
            package_parts = module.split(".")[: None if path.stem == "__init__" else -1]
            for node in nodes(ast.parse(path.read_text()), typing):
                if isinstance(node, ast.ImportFrom):
                    base = package_parts[: len(package_parts) - node.level + 1] if node.level else []
                    for name in node.names:
                        yield module, ".".join([*base, *filter(None, [node.module]), name.name]), node.lineno
                elif isinstance(node, ast.Import):
                    for name in node.names:
                        yield module, name.name, node.lineno


def nodes(tree: ast.AST, typing: bool) -> Iterator[ast.AST]:
    """All nodes below ``tree``, but for those of ``if TYPE_CHECKING`` where ``typing`` is false."""
    for node in ast.iter_child_nodes(tree):
        if typing or not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from nodes(node, typing)


def room(name: str) -> int | None:
    """The place of a module in ``ROOMS``; None for others' packages."""
    found = [known for known in ROOMS if name == known or name.startswith(f"{known}.")]
    return ROOMS.index(max(found, key=len)) if found else None


def test_rooms_look_downwards_only() -> None:
    upwards = []
    for module, imported, line in imports():
        here, there = room(module), room(imported)
        named = (module, imported) in UPWARDS or (module, imported.rpartition(".")[0]) in UPWARDS
        if there is not None and here is not None and there < here and not named:
            upwards.append(f"{module}, line {line}: {imported}")
    assert not upwards, "\n".join(upwards)


def test_no_module_needs_itself() -> None:
    """An import inside of a function that only dodges a cycle is one all the same."""
    modules = {module for module, *_ in imports()}
    needed: dict[str, set[str]] = {}
    for module, imported, _ in imports(typing=False):
        target = imported if imported in modules else imported.rpartition(".")[0]
        if target in modules and (module, target) not in UPWARDS:
            needed.setdefault(module, set()).add(target)
    graphlib.TopologicalSorter(needed).prepare()  # raises CycleError, which tells the cycle


def test_training_and_its_evaluations_start_no_threads() -> None:
    """An index's engine does, where it is imported; a process with threads must not fork (`benchmarks.kills` does)."""
    code = (
        "import sys, threading, copynce.training.trainer, copynce.evaluation.protocols\n"
        "print(threading.active_count(), sorted(sys.modules.keys() & {'lancedb', 'copynce.index'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split("\n")[0] == "1 []", done.stdout
