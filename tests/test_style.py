"""What keeps the code easy to read: short functions. (ruff keeps the lines short.)"""

import ast

import pytest
from conftest import ROOT

FILES = [*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("kernels/*.py")]


def is_kernel(function: ast.FunctionDef) -> bool:
    """A Triton kernel is one piece of registers; cutting it up would hide what it holds."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_has_more_than_60_lines(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not is_kernel(node):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_import_nothing_above_them(path):
    if path.parent.name != "kernels":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        names = (
            [alias.name for alias in getattr(node, "names", ())]
            if isinstance(node, ast.Import)
            else []
        )
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        above = ("common", *(path.stem for path in ROOT.glob("*.py")))
        assert not any(name.split(".")[0] in above for name in names), path
