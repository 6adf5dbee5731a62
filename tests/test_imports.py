"""Who imports whom, read from the source, and how large the core is.

The direction is utils <- datasets, losses <- model <- evaluation <- entry scripts <- scripts. Imports inside
functions count, too. Nobody imports in a circle, neither files nor folders.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from utils.yaml_io import read_yaml

FOLDERS = ("utils", "datasets", "losses", "model", "evaluation")
BELOW = {
    "utils": set(),
    "datasets": {"utils"},
    "losses": {"utils"},
    "model": {"utils", "datasets", "losses"},
    "evaluation": {"utils", "datasets", "losses", "model"},
    "entry": {*FOLDERS},
    "scripts": {*FOLDERS, "entry"},
}
CORE = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))])
FILES = {path.relative_to(ROOT).as_posix(): path for path in [*CORE, *ROOT.glob("scripts/**/*.py")]}


def group_of(name: str) -> str:
    """The folder of a file, "entry" at the top."""
    return name.split("/")[0] if "/" in name else "entry"


def file_of(module: str) -> str | None:
    """The file of a module of ours."""
    stem = module.replace(".", "/")
    return next((name for name in (f"{stem}.py", f"{stem}/__init__.py") if name in FILES), None)


def imports_of(path: Path) -> Iterator[str]:
    """The files of ours that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [part if file_of(part) else node.module for part in parts]
        else:
            continue
        yield from (name for name in map(file_of, modules) if name)


GRAPH = {name: set(imports_of(path)) - {name} for name, path in FILES.items()}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The names that reach themselves."""
    reached = {name: set(found) for name, found in graph.items()}
    for middle in graph:
        for found in reached.values():
            if middle in found:
                found |= reached[middle]
    return sorted(name for name, found in reached.items() if name in found)


def test_imports_point_downwards():
    wrong = {
        f"{name} imports {other}"
        for name, found in GRAPH.items()
        for other in found
        if group_of(other) not in {*BELOW[group_of(name)], group_of(name)}
    }
    assert wrong == set()


def test_no_script_looks_for_the_repository():
    """But for the one that people call as a file; the others are called with -m, by their shell scripts."""
    looking = [name for name, path in FILES.items() if "sys.path" in path.read_text()]
    assert looking == ["scripts/convert_weights.py"]


def test_no_file_imports_itself_through_others():
    assert circles(GRAPH) == []


def test_no_folder_imports_itself_through_others():
    folders = {group: set() for group in BELOW}
    for name, found in GRAPH.items():
        folders[group_of(name)] |= {group_of(other) for other in found} - {group_of(name)}
    assert circles(folders) == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]


@pytest.mark.parametrize(
    "statement", ["import utils.cli", "from utils import cli", "from utils.cli import x"]
)
def test_each_kind_of_import_is_read(tmp_path, statement):
    (tmp_path / "x.py").write_text(f"def f():\n    {statement}\n")
    assert list(imports_of(tmp_path / "x.py")) == ["utils/cli.py"]


def test_the_core_stays_small():
    lines = {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in CORE}
    keys = sum(len(section) for section in read_yaml(ROOT / "configs/base.yaml").values())
    assert len(lines) <= 76 and sum(lines.values()) <= 11866 and keys <= 70  # aims: 62, 7400
    assert {name: n for name, n in lines.items() if n > 350} == {}
