"""The README's commands are real."""

import ast
import re
import shlex

import pytest
from conftest import ROOT, run

import cps
import mean_teacher
import stpp
import supervised
import u2pl
from common import compare

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line
]


def test_the_first_two_commands_are_all_the_set_up():
    assert COMMANDS[:2] == ["pip install -r requirements.txt && python cps.py", "python -m pytest -q"]
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text()


SCRIPTS = {script.__file__.rsplit("/", 1)[-1]: script for script in (cps, mean_teacher, stpp, supervised, u2pl)}


@pytest.mark.parametrize("command", [command for command in COMMANDS if any(f" {name}" in command for name in SCRIPTS)])
def test_every_script_command_has_flags_that_exist(command: str):
    words = shlex.split(command)
    name = next(word for word in words if word.endswith(".py"))
    arguments = words[words.index(name) + 1 :]
    if "--help" in arguments or "--resume" in arguments:
        return
    SCRIPTS[name].parse_args(arguments)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python -m common\.compare (.*?)(?:  #|`|\n)", README))))
def test_comparisons_are_real(command: str):
    compare.parse_args(shlex.split(command))


def test_module_commands_exist():
    modules = {match for match in re.findall(r"python -m ([\w.]+)", README)} - {"pytest"}
    for module in modules:
        assert "usage" in run("-m", module, "--help").stdout


def test_links_to_functions_point_at_their_lines():
    links = re.findall(r"\[(\w+)\]\(([\w/]+\.py)#L(\d+)-L(\d+)\)", README)
    assert len(links) > 20 and len(links) == README.count(".py#L")
    for name, path, first, last in links:
        nodes = [node for node in ast.parse((ROOT / path).read_text()).body if getattr(node, "name", "") == name]
        start = min([nodes[0].lineno, *(decorator.lineno for decorator in nodes[0].decorator_list)])
        lines = start, nodes[0].end_lineno
        assert (int(first), int(last)) == lines, f"{path}: {name} is in lines {lines}"


def test_the_readmes_images_are_small():
    assert sum(path.stat().st_size for path in (ROOT / "tests" / "pictures").iterdir()) < 200_000


def test_paths_in_the_readme_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists()
