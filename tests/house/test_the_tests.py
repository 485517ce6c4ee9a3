"""Rules for the tests: where they are, what they import, and how they patch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = TESTS.parent / "shardmerge"
#: Folders that mirror no package.
OTHERS = {"benchmarks", "contracts", "end_to_end", "house", "support", "tools"}
_PATCHES = {"setattr", "delattr", "patch"}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


FILES = {str(path.relative_to(TESTS)): path for path in sorted(TESTS.rglob("*.py"))}
each_file = pytest.mark.parametrize("file", FILES)


def imported(tree: ast.Module) -> Iterator[str]:
    """The dotted name of every import; of ``from a import b`` both ``a`` and ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_test_module(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "tests" and any(part.startswith("test_") for part in parts)


def patched_paths(tree: ast.Module) -> Iterator[str]:
    """The calls of ``monkeypatch.setattr`` and its relatives whose target is a string, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            target = node.args[0]
            is_text = isinstance(target, ast.JoinedStr) or (
                isinstance(target, ast.Constant) and isinstance(target.value, str)
            )
            if name in _PATCHES and is_text:
                yield f"line {node.lineno}: {ast.unparse(node)}"


_PROGRAM = re.compile(r"from (shardmerge[\w.]*) import ([\w, ]+)")


def names_of(module: str) -> set[str]:
    """What a module of the package defines or imports at its top, and its submodules; empty if there is none."""
    path = TESTS.parent.joinpath(*module.split("."))
    files = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
    found = {child.stem for child in path.glob("*")} if path.is_dir() else set()
    for node in (node for file in files for node in parsed(file).body):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            found |= {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
    return found


def stale_programs(tree: ast.Module) -> Iterator[str]:
    """The imports in strings, which are programs for a process of their own, that would fail."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for module, names in _PROGRAM.findall(node.value):
                wanted = {name.partition(" as ")[0].strip() for name in names.split(",")}
                for name in wanted - names_of(module):
                    yield f"line {node.lineno}: {module} has no {name}"


def test_folders_mirror_the_package() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    folders = {path.parent.name for path in TESTS.glob("*/__init__.py")}
    assert folders - OTHERS <= packages
    assert {Path(file).parent.name for file in FILES if Path(file).name.startswith("test_")} <= folders


@each_file
def test_no_test_module_is_imported(file: str) -> None:
    """What several modules need is in ``tests/support``."""
    assert [name for name in imported(parsed(FILES[file])) if is_test_module(name) or name.startswith(".")] == []


@each_file
def test_objects_are_patched_and_not_paths(file: str) -> None:
    """A path in a string survives no move of a module, and no type checker reads it."""
    assert [*patched_paths(parsed(FILES[file]))] == []


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("house/")])
def test_programs_in_strings_import_what_there_is(file: str) -> None:
    """Else a test waits for a process that ended at once, or fails for another reason than the one it is for."""
    assert [*stale_programs(parsed(FILES[file]))] == []


def test_the_rules_find_what_they_forbid() -> None:
    tree = ast.parse(
        "from tests.cli.test_main import invoke\n"
        "from tests.cli import test_init\n"
        "import tests.support.builders\n"
        "from shardmerge.inference import test_time\n"
        "monkeypatch.setattr('os.path.exists', None)\n"
        "patch.setattr(f'{module}.open', None)\n"
        "mock.patch('os.stat')\n"
        "monkeypatch.setattr(os, 'stat', None)\n"
    )
    assert {name for name in imported(tree) if is_test_module(name)} == {
        "tests.cli.test_main",
        "tests.cli.test_main.invoke",
        "tests.cli.test_init",
    }
    programs = ast.parse("""
old = "from shardmerge.gone import x; from shardmerge.errors import PlanError, NoError"
new = "from shardmerge import cli, version; from shardmerge.api import library"
""")
    assert [*stale_programs(programs)] == [
        "line 2: shardmerge.gone has no x",
        "line 2: shardmerge.errors has no NoError",
    ]
    assert [found.partition(":")[0] for found in patched_paths(tree)] == ["line 5", "line 6", "line 7"]
