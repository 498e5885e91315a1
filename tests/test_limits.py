"""How many arguments a function may take by position, and how long the algorithm's may be."""

import ast

import pytest

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "dfkd_jax"
ALGORITHM = ("methods", "distillation", "synthesis", "replay", "losses")
MOST_ARGUMENTS, MOST_LINES = 6, 90


def functions(root):
    """(file below the package, function) of all files below a folder."""
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path.relative_to(PACKAGE).as_posix(), node


def by_position(function):
    arguments = [*function.args.posonlyargs, *function.args.args]
    return [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]


def lines(function):
    """With the docstring, without decorators."""
    return function.end_lineno - function.lineno + 1


def test_no_function_takes_many_arguments_by_position():
    """A call with more cannot be read; what has a name at the call may be more."""
    found = {
        (file, function.name)
        for file, function in functions(PACKAGE)
        if len(by_position(function)) > MOST_ARGUMENTS
    }
    assert not found


@pytest.mark.parametrize("folder", ALGORITHM)
def test_the_algorithms_functions_fit_on_a_screen_or_two(folder):
    found = list(functions(PACKAGE / folder))
    assert found
    long = [(file, f.name, lines(f)) for file, f in found if lines(f) > MOST_LINES]
    assert not long
