"""What the import contracts in pyproject.toml cannot say: see also ``lint-imports``, which ``make lint`` runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE_DIRS = ("fxparam", "passes", "exporters")
HEAVY = {"matplotlib", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "rich", "sklearn", "tensorrt", "yaml"}
API = {"fxparam", "fxparam.__main__", "fxparam.api", "fxparam.cli", "fxparam.testing"}


def python_files(*directories: str) -> list[Path]:
    """Every Python file under these directories once: ``Path.rglob`` does not walk through links."""
    return sorted(path for directory in directories for path in (ROOT / directory).rglob("*.py"))


def imported_names(node: ast.AST) -> list[str]:
    """The absolute dotted names that one import statement names."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=str(module), level=0):
            return [module]
    return []


def at_import_time(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when a module is imported: no function bodies, nothing only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_import_time(child)


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """Which module of fxparam imports which, imports inside functions included."""
    return grimp.build_graph("fxparam", cache_dir=None)


def test_links_make_three_directories_one_package() -> None:
    for name in ("passes", "exporters"):
        link = ROOT / "fxparam" / name
        assert link.is_symlink(), f"{link} was replaced by a copy; type: ln -s ../{name} fxparam/{name}"
        assert link.readlink() == Path("..", name)


def test_no_file_imports_a_bare_part_of_the_package() -> None:
    """``import passes`` would load every pass a second time, as other classes."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {name}; write fxparam.{name}"
        for path in python_files(*PACKAGE_DIRS, "tests", "examples", "benchmarks")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported_names(node)
        if name.partition(".")[0] in ("passes", "exporters")
    ]
    assert not found, "\n".join(found)


def test_optional_packages_are_imported_where_they_are_used() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {name} at module level; import it in the function that uses it"
        for path in python_files(*PACKAGE_DIRS)
        for node in at_import_time(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported_names(node)
        if name.partition(".")[0] in HEAVY
    ]
    assert not found, "\n".join(found)


def test_passes_do_not_import_each_other(graph: grimp.ImportGraph) -> None:
    """Modules whose name starts with ``_`` are what passes share; they know no pass."""
    children = graph.find_children("fxparam.passes")
    passes = {name for name in children if not name.rpartition(".")[2].startswith("_")}
    found = [
        f"{importer} imports {imported}"
        for importer in sorted(children)
        for imported in sorted(passes - {importer})
        if graph.direct_import_exists(importer=importer, imported=imported, as_packages=True)
    ]
    assert not found, "\n".join(found)


def test_nothing_below_the_api_imports_the_api(graph: grimp.ImportGraph) -> None:
    """``from fxparam import orthogonal`` inside the package would make every import order a circle."""
    found = sorted(graph.find_modules_that_directly_import("fxparam") - API)
    assert not found, f"{found} import names from fxparam itself; import them from the submodule that defines them"
