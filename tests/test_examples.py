"""The examples: each says what it shows and how to run it, and the index has all of them."""

from __future__ import annotations

import ast
import json
import re
import sys
from typing import Any

import pytest

from tests._helpers.processes import ROOT

EXAMPLES = ROOT / "examples"
PROGRAMS = sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py"))
NOTEBOOKS = sorted(
    str(path.relative_to(EXAMPLES))
    for path in EXAMPLES.rglob("*.ipynb")
    if ".ipynb_checkpoints" not in path.parts
)
# What the package itself needs, or brings.
INSTALLED = {"trio", "trio_unixconn", "attrs"}
# By what to install: a module that is not of the package of its name.
PACKAGES = {"gi": "PyGObject", "httpcore": "httpx"}
# What an example starts.
NEEDED_PROGRAMS = {
    "asgi_app.py": {"hypercorn"},
    "with_packages/jeepney_bus.py": {"dbus-daemon"},
}


def cells(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((EXAMPLES / name).read_text())["cells"]
    return found


def source(name: str) -> str:
    if not name.endswith(".ipynb"):
        return (EXAMPLES / name).read_text()
    # A line that begins with "%" is IPython's, and not Python.
    code = ["".join(each["source"]) for each in cells(name) if each["cell_type"] == "code"]
    return re.sub(r"^%.*$", "", "\n".join(code), flags=re.MULTILINE)


def documentation(name: str) -> str:
    return ast.get_docstring(ast.parse(source(name))) or ""


def needed(name: str) -> set[str]:
    """Return the packages and programs that an example needs."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            modules |= {each.name.partition(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            modules.add(node.module.partition(".")[0])
    # One example may import another one, or a file that a cell has written.
    others = modules - sys.stdlib_module_names - INSTALLED
    return {PACKAGES.get(each, each) for each in others} | NEEDED_PROGRAMS.get(name, set())


def index() -> dict[str, tuple[str, set[str]]]:
    """Return what the index says about each example: what it shows, and what it needs."""
    text = (EXAMPLES / "README.md").read_text()
    rows = re.findall(r"^\| \[(.*?)\]\(\1\) \| (.*?) \| (.*?) ?\|$", text, re.MULTILINE)
    return {name: (shown, set(filter(None, needs.split(", ")))) for name, shown, needs in rows}


@pytest.mark.parametrize("name", PROGRAMS)
def test_example_says_how_to_run_it(name: str) -> None:
    """An example begins with what it shows, the command that runs it, and what that needs."""
    text = documentation(name)
    assert f"python examples/{name}" in text.replace("python3 ", "python ")
    missing = {each for each in needed(name) if each not in text}
    assert missing == set()


def test_index_has_every_example() -> None:
    """The index has each program with its first line, each notebook with its title, no other."""
    shown = {name: documentation(name).splitlines()[0] for name in PROGRAMS}
    shown |= {name: cells(name)[0]["source"][0].strip("# \n") for name in NOTEBOOKS}
    assert index() == {name: (text, needed(name)) for name, text in shown.items()}
