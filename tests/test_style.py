"""What keeps the code easy to read, and its text files alike everywhere.

ruff keeps the lines short.
"""

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


def opens_text_without_encoding(node: ast.AST) -> bool:
    """Whether it is a call of `open`, `read_text` or `write_text` in the locale's encoding."""
    if not isinstance(node, ast.Call):
        return False
    name = ast.unparse(node.func).rpartition(".")[2]
    opens_image = ast.unparse(node.func) == "Image.open"
    if name not in ("open", "read_text", "write_text") or opens_image:
        return False
    binary = any(ast.unparse(part) in ("'rb'", "'wb'") for part in node.args)
    return not binary and all(keyword.arg != "encoding" for keyword in node.keywords)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_files_are_utf_8_whatever_the_locale(path):
    """Names of images and classes are in any language, and runs move between machines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not opens_text_without_encoding(node), f"line {node.lineno}"


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
