"""The rooms: who may import whom, who may import torch, and what starting up does not import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.support.builders import make_place, run_python

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "shardmerge"

_ROW = re.compile(r"\| (\d+) \| `(\w+)` \|")


def levels() -> dict[str, int]:
    """The level of every package, by the table in CONTRIBUTING."""
    rows = _ROW.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    found = {package: int(level) for level, package in rows}
    assert len(found) == len(rows), "a package has two rows"
    return found


LEVEL = levels()
#: Rooms that compute: they may import torch when they are imported.
COMPUTES = frozenset(
    {
        "codecs.ggml_blocks",
        "codecs.grids",
        "codecs.nearest",
        "codecs.packing",
        "codecs.rounding",
        "codecs.stochastic",
        "codecs.tables",
        "execution.devices",
        "execution.factors",
        "execution.fidelity",
        "execution.nonfinite",
        "execution.tiles",
        "execution.worker",
        "inference.comparison",
        "system.torch_devices",
        "verification",
    }
)
#: Never needed to merge: the base's own code is not run, and PEFT is an oracle of the tests. ``hf`` imports them.
FOREIGN = ("transformers", "peft", "accelerate", "safetensors", "numpy", "gguf", "sentencepiece")
#: Who else may import them: the one has PEFT's generator, the other asks the format's library about an output.
_ALSO = {"numpy": ("adapters.methods.unilora",), "safetensors": ("verification.structure",)}
#: What `__init__` may import eagerly; all else it finds when it is asked for.
EAGER = frozenset({"version"})


@dataclass(frozen=True)
class Import:
    """An import of ``name``, a dotted module, in ``module``; ``deferred`` if it stands in a function."""

    module: str
    name: str
    line: int
    deferred: bool

    def __str__(self) -> str:
        return f"{self.module}, line {self.line}: imports {self.name}"


def module_name(path: Path) -> str:
    """``shardmerge/planning/layout.py`` → ``planning.layout``; a package's ``__init__`` is the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_in(module: str, name: str) -> bool:
    """Whether a module is the package or module ``name``, or lies in it."""
    return module == name or module.startswith(f"{name}.")


def room(module: str) -> str:
    return module.partition(".")[0]


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports(module: str, source: str) -> Iterator[Import]:
    """Every import but those for type checkers alone, ``importlib.import_module("literal")`` among them."""
    yield from _imports_of(module, ast.parse(source), deferred=False)


def _imported_by_call(call: ast.Call) -> str:
    if ast.unparse(call.func).endswith(("import_module", "__import__")) and isinstance(call.args[0], ast.Constant):
        return str(call.args[0].value)
    return ""


def _imports_of(module: str, node: ast.AST, *, deferred: bool) -> Iterator[Import]:
    if isinstance(node, ast.If) and _is_type_checking(node.test):
        for statement in node.orelse:
            yield from _imports_of(module, statement, deferred=deferred)
        return
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(module, alias.name, node.lineno, deferred)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{module}, line {node.lineno}: imports are absolute"
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            is_module = full.removeprefix("shardmerge.") in MODULES and full.startswith("shardmerge.")
            yield Import(module, full if is_module else str(node.module), node.lineno, deferred)
    elif isinstance(node, ast.Call) and (literal := _imported_by_call(node)):
        yield Import(module, literal, node.lineno, deferred)
    inner = deferred or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    for child in ast.iter_child_nodes(node):
        yield from _imports_of(module, child, deferred=inner)


@cache
def all_imports() -> list[Import]:
    return [found for module, path in MODULES.items() for found in imports(module, path.read_text())]


def within(found: Import) -> str | None:
    """The room that an import goes to, if it is one of ours."""
    top, _, rest = found.name.partition(".")
    return (room(rest) if rest else "__init__") if top == "shardmerge" else None


# --- levels -----------------------------------------------------------------------------------------------------------


def test_every_module_has_a_level_and_every_level_is_of_a_module() -> None:
    assert {room(module) for module in MODULES} - {"__init__"} == LEVEL.keys()


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__"])
def test_imports_go_down(module: str) -> None:
    for found in all_imports():
        target = within(found)
        if found.module != module or target in (None, room(module)):
            continue
        assert target != "__init__", f"{found}: the package itself is for those outside"
        assert target in LEVEL and LEVEL[target] < LEVEL[room(module)], str(found)


def test_imports_within_a_folder_make_no_circle() -> None:
    edges: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in all_imports():
        name = found.name.removeprefix("shardmerge.")
        if name in MODULES and not found.deferred:
            edges[found.module].add(name)
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path, module))
        if module not in finished:
            for target in edges[module]:
                visit(target, (*path, module))
            finished.add(module)

    for module in MODULES:
        visit(module, ())


def test_the_package_itself_imports_its_version_and_finds_the_rest_later() -> None:
    mine = [found for found in all_imports() if found.module == "__init__"]
    assert {within(found) for found in mine if not found.deferred} - {None} == EAGER


def test_progress_knows_the_api_only_by_its_type() -> None:
    assert {within(found) for found in all_imports() if found.module == "cli.progress"} == {None, "reporting"}


# --- torch and others -------------------------------------------------------------------------------------------------


def _of(library: str) -> list[Import]:
    return [found for found in all_imports() if found.name.partition(".")[0] == library]


def test_torch_is_imported_at_once_only_where_it_computes() -> None:
    eager = {found.module for found in _of("torch") if not found.deferred}
    assert {name for name in COMPUTES if any(is_in(module, name) for module in eager)} == COMPUTES
    assert not [module for module in eager if not any(is_in(module, name) for name in COMPUTES)]


@pytest.mark.parametrize("library", FOREIGN)
def test_foreign_libraries_are_imported_by_one_room_and_late(library: str) -> None:
    rooms = {"inference.hf", *_ALSO.get(library, ())}
    wrong = [str(found) for found in _of(library) if found.module not in rooms or not found.deferred]
    assert not wrong


def test_no_room_but_the_engine_sees_both_files_and_tensors() -> None:
    """A module that imports both torch and a source or a sink: the engine, the reader of factors below it, and the
    reader of what proves them."""
    torch = {found.module for found in _of("torch")}
    files = {found.module for found in all_imports() if within(found) in {"sources", "destinations"}}
    assert torch & files <= {"execution.engine", "execution.factors", "verification.reading"}


# --- the reader of imports itself -------------------------------------------------------------------------------------

_SAMPLE = """
from __future__ import annotations
import torch
from typing import TYPE_CHECKING
from shardmerge.planning import layout, unknown
if TYPE_CHECKING:
    import one
else:
    import two
class C:
    import three
    def f(self):
        import four.five
        importlib.import_module("six")
if typing.TYPE_CHECKING:
    from seven import x
try:
    import eight
except ImportError:
    pass
"""


def test_the_reader_finds_every_import() -> None:
    found = {(item.name, item.deferred) for item in imports("sample", _SAMPLE)}
    assert found == {
        ("__future__", False),
        ("torch", False),
        ("typing", False),
        ("shardmerge.planning.layout", False),
        ("shardmerge.planning", False),
        ("two", False),
        ("three", False),
        ("four.five", True),
        ("six", True),
        ("eight", False),
    }


# --- starting up ------------------------------------------------------------------------------------------------------

_REPORT = "; import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
_HELP = """
import os, sys
from shardmerge.cli.main import main
os._exit = sys.exit  # the command ends its process at once; here there is something to say yet
sys.argv = ["shardmerge", {}"--help"]
try:
    main()
except SystemExit as error:
    assert not error.code, error.code
"""
_STARTS = {
    "import": "import shardmerge; import shardmerge.cli.main",
    "help": _HELP.format(""),
    "help-of-run": _HELP.format('"run", '),
}


@pytest.mark.parametrize("code", _STARTS.values(), ids=_STARTS)
def test_starting_up_imports_nothing_heavy(code: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code + _REPORT.removeprefix("; " if "\n" in code else "")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    loaded = set(result.stdout.splitlines()[-1].split())
    assert "shardmerge" in loaded
    heavy = {"torch", "transformers", "peft", "huggingface_hub", "pydantic", "numpy", "yaml", "tqdm", "filelock"}
    assert not heavy & loaded


_RUN = """
import os, sys
from shardmerge.cli.main import main
os._exit = sys.exit
sys.argv = ["shardmerge", "run", {!r}, "--quiet"]
try:
    main()
except SystemExit as error:
    assert not error.code, error.code
print(*sorted(sys.modules))
"""


def test_a_run_imports_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    done = run_python("-c", _RUN.format(str(make_place(tmp_path).config_file())))
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"torch", "shardmerge.execution.worker", "shardmerge.destinations.shard_writer"} <= loaded
    others = {"transformers", "peft", "huggingface_hub", "safetensors", "requests", "scipy"}
    rooms = {
        f"shardmerge.{room}"
        for room in ("gguf", "verification", "inference", "reporting.inspection", "reporting.origin")
    }
    assert not (others | rooms) & loaded
