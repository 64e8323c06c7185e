"""The READMEs' commands and links are real."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, run

from common import compare
from common.experiments import METHODS

PAGES = [
    ROOT / "README.md",
    *(ROOT / folder / "README.md" for folder in ("common", "kernels", "tests")),
    *(ROOT / "common" / folder / "README.md" for folder in ("results", "splits")),
    ROOT / "kernels" / "results" / "README.md",
]
BY_NAME = {Path(script.__file__).name: script for script in SCRIPTS}


def blocks(page: Path) -> list[str]:
    """The lines of a page's bash blocks, continued ones joined, without comments."""
    joined = [
        block.replace("\\\n", " ")
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
    ]
    lines = [line.split("#")[0].strip() for block in joined for line in block.splitlines()]
    return [line for line in lines if line]


def script_commands() -> list[str]:
    """Every command line in any page, in a block or in the text, that starts a script."""
    names = "|".join(re.escape(name) for name in BY_NAME)
    inline = rf"`((?:python )?(?:{names})(?: [^`]*)?)`"
    found = set()
    for page in PAGES:
        found |= {line for line in blocks(page) if re.search(rf"\b({names})\b", line)}
        found |= set(re.findall(inline, page.read_text()))
    return sorted(line for line in found if "..." not in line)


def test_the_first_two_commands_are_all_the_set_up():
    first, second = blocks(ROOT / "README.md")[:2]
    assert first == "pip install -r requirements.txt && python cps.py"
    assert second == "python -m pytest -q" and second in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("command", script_commands())
def test_every_script_command_has_flags_that_exist(command: str):
    words = shlex.split(command)
    name = next(word for word in words if word in BY_NAME)
    arguments = words[words.index(name) + 1 :]
    if "--resume" in arguments:  # of a run that is not there
        return
    # Placeholders of the text stand for a value.
    arguments = ["1/8" if word == "S" else word for word in arguments]
    BY_NAME[name].parse_args(arguments)


def comparisons() -> list[str]:
    pattern = r"python -m common\.compare(?: ([^`\n#]*))?"
    return sorted({found for page in PAGES for found in re.findall(pattern, page.read_text())})


@pytest.mark.parametrize("command", comparisons())
def test_comparisons_are_real(command: str):
    compare.parse_args(shlex.split(command))


@pytest.mark.slow
def test_modules_that_pages_name_can_be_run():
    named = {name for page in PAGES for name in re.findall(r"python -m ([\w.]+)", page.read_text())}
    for module in sorted(named - {"pytest"}):
        assert "usage" in run("-m", module, "--help").stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.parent.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in {
                re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles
            }


def test_pages_name_tests_that_exist():
    everything = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    named = {name for page in PAGES for name in re.findall(r"`(test_\w{20,})`", page.read_text())}
    assert named and all(f"def {name}(" in everything for name in named)


def test_every_shared_file_is_on_the_map():
    shared = (ROOT / "common" / "README.md").read_text()
    for path in (ROOT / "common").glob("*.py"):
        assert path.name == "__init__.py" or f"`{path.name}`" in shared, path.name


def test_the_readme_names_every_method():
    text = (ROOT / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for name in BY_NAME:
        assert any(line.endswith(f" `{name}` |") or f" `{name} " in line for line in rows), name
    assert f"({len(METHODS)} methods, " in text


def test_the_readme_can_be_read_in_one_sitting():
    text = (ROOT / "README.md").read_text()
    lines, size = len(text.splitlines()), len(text.encode())
    assert lines <= 210 and size <= 17_000, f"{lines} of 210 lines, {size} of 17 000 bytes"
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    wide = [
        line for line in prose.splitlines() if len(line) > 100 and not line.startswith(("|", "!"))
    ]
    assert not wide
