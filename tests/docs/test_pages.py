"""Every block of the README and the documentation: it runs, or is a part of what runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from tests._helpers.environment import environment
from tests._helpers.processes import ROOT

from .pages import Block, Step, blocks, contains, differs, pages, steps

PAGES = {path.relative_to(ROOT).as_posix(): path for path in pages()}
TEXTS = {name: path.read_text() for name, path in PAGES.items()}
BLOCKS = {name: blocks(text) for name, text in TEXTS.items()}
STEPS = {name: steps(PAGES[name], text) for name, text in TEXTS.items()}
README = "README.md"


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, found in STEPS.items() if found])
def test_blocks_run(tmp_path: Path, name: str) -> None:
    """Each program and each command runs without a warning, and prints what the page says."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.docs.run_page"],
        cwd=tmp_path,
        env={
            **environment(),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
        },
        input=json.dumps([attrs.asdict(step) for step in STEPS[name]]),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    problems = []
    for step, (output, errors, failure) in zip(STEPS[name], json.loads(done.stdout), strict=True):
        wrong = failure or differs(step, output)
        if not wrong and step.how in {"python", "session", "cell"} and errors:
            wrong = "expected no output to standard error"
        if wrong:
            problems.append(f"{name}:{step.line}: {wrong}\n{output}\n{errors}")
    assert not problems, "\n\n".join(problems)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_complete_or_marked(name: str) -> None:
    """A block that is not run compiles, and its file has it; each block says its language."""
    for block in BLOCKS[name]:
        where = f"{name}:{block.line}"
        assert block.kind, f"{where}: expected a language after the fence; text is one"
        if block.is_part_of:
            text = (ROOT / block.is_part_of).read_text()
            assert contains(text, block.code), f"{where}: {block.is_part_of} has other lines"
        elif block.kind == "literalinclude":
            path = (PAGES[name].parent / block.argument).resolve()
            assert path.is_relative_to(ROOT / "examples"), f"{where}: expected a file of examples"
        elif block.kind == "python" and not block.is_run:
            code = "async def fragment():\n" + "".join(
                f"    {line}\n" for line in block.code.splitlines()
            )
            compile(code, where, "exec")


def test_readme_begins_with_the_two_commands() -> None:
    """The first two blocks are the commands: the demonstration, and the tests."""
    assert [block.kind for block in BLOCKS[README][:3]] == ["console", "console", "python"]
    assert BLOCKS[README][0].code.splitlines()[-1].endswith("trio-unixconn demo")
    assert "nox -s tests" in BLOCKS[README][1].code


def test_readme_has_short_examples() -> None:
    """There is one for a descriptor, credentials, callbacks, a Cancellable, workers; all short."""
    programs = [block for block in BLOCKS[README] if block.kind == "python"]
    assert len(programs) == 5
    for block in programs:
        assert len(block.code.splitlines()) <= 40, block.line


def block(note: str, code: str = "", kind: str = "python") -> Block:
    return Block(1, kind, code, note=note)


def test_blocks_reads_notes_and_lists() -> None:
    """A comment before a block is its note; a block in a list loses its indentation."""
    code = "  ```python\n  if x:\n      y\n  ```\n"
    text = f"- a\n\n  <!-- not run: why\n  not -->\n{code}\n```text\n```\n"
    first, second = blocks(text)
    assert first == Block(6, "python", "if x:\n    y\n", note="not run: why not")
    assert not first.is_run
    assert second == Block(11, "text", "")


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("a = 1\nb = 2\n", True),
        ("  a = 1\n\n  b = 2", True),
        ("a = 1\n...\nc = 3", True),
        ("b = 2\na = 1", False),
        ("a = 1\nc = 3", False),
        ("= 1", False),
    ],
)
def test_contains(part: str, expected: bool) -> None:  # noqa: FBT001
    """The lines are in the file, one after the other, at any indentation."""
    assert contains("def f():\n    a = 1\n    b = 2\n    c = 3\n", part) is expected


@pytest.mark.parametrize(
    ("note", "printed", "is_same"),
    [
        ("output", "a 1\nb\n", True),
        ("output", "b\na 1\n", False),
        ("output, in any order", "b\na 1\n", True),
        ("output, with other numbers", "a 217\nb\n", True),
        ("output", "a 217\nb\n", False),
    ],
)
def test_differs(note: str, printed: str, is_same: bool) -> None:  # noqa: FBT001
    """Output is compared exactly, but for what the note allows."""
    step = Step(1, "python", "", "x", expected=block(note, "a 1\nb\n", "text"))
    assert (differs(step, printed) is None) is is_same


def test_differs_from_the_comments() -> None:
    """Without a block of output, each printed line is in a comment."""
    step = Step(1, "python", "print(1)  # 1\nprint(2)  # 2\n", "x")
    assert differs(step, "2\n1\n") is None
    assert differs(step, "1\n") is not None
