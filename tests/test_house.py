"""The tests lie in the folders of what they test, and none imports another."""

import ast

from tests.helpers.paths import ROOT

TESTS = ROOT / "tests"
NOT_OF_THE_PACKAGE = {"helpers", "launch", "docs"}


def imported(path):
    """Every name that a file imports, or imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.name for alias in node.names)


def test_no_module_imports_a_test_module_or_conftest():
    """What several of them need is in `tests/helpers`."""
    modules = list(TESTS.rglob("*.py"))
    assert len(modules) > 60
    for path in modules:
        parts = {part for name in imported(path) for part in name.split(".")}
        assert not {part for part in parts if part == "conftest" or part.startswith("test_")}, path


def test_the_folders_are_those_of_the_package():
    folders = {path.parent.name for path in TESTS.glob("*/test_*.py")}
    package = {path.parent.name for path in (ROOT / "dfkd_jax").glob("*/__init__.py")}
    assert len(folders) > 8
    assert folders <= package | NOT_OF_THE_PACKAGE
    # Packages, so that the names of modules may repeat.
    assert all((TESTS / name / "__init__.py").exists() for name in folders)
