"""Read the blocks of code of a page, and what its comments say about them.

A block of Python is a complete program, and one of ``console`` or ``bash`` is complete commands.
The blocks of a page run in their order, in one directory. A comment of HTML on the line before one
says what is different:

- ``<!-- a file -->``: it is written to its file, and commands that follow run it.
- ``<!-- a part of PATH -->``: its lines are in that file, which tests run. ``...`` stands for any
  lines of it.
- ``<!-- not run: REASON -->``: it is only compiled.
- ``<!-- a cell -->``: of a notebook: it may await, and shares its names with the other cells.
- ``<!-- in the background -->``: the commands go on during the blocks that follow, and are
  terminated at the end of the page. With ``, until it ends`` they end by themselves, and with
  ``, which prints TEXT`` the next block begins when they have printed that.
- ``<!-- output -->``: a block of text that the last program prints. ``, in any order`` and ``, with
  other numbers`` say what may differ. ``...`` stands for any lines.

A program whose first line is a comment with the name of a file is written to that file. Without a
block of its output, each line that it prints is in a comment after its ``print``.

With ``<!-- one session -->`` anywhere, all Python of the page is one program.
"""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Final

import attrs

from tests._helpers.processes import ROOT

if TYPE_CHECKING:
    from pathlib import Path

RUN: Final = {"python": "python", "console": "shell", "bash": "shell"}
# A fence of backticks, which may be in a list; the language, or a directive with its argument.
FENCE: Final = re.compile(
    r"^(?P<indent> *)```(?P<kind>\{?[\w-]*\}?) *(?P<argument>\S*)\n(?P<body>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
COMMENT: Final = re.compile(r"<!-- ((?:(?!-->).)*) -->\n\Z", re.DOTALL)
FILE_NAME: Final = re.compile(r"# (\w+\.py)\n")
ONE_SESSION: Final = "<!-- one session -->"
# Printed by programs of the documentation where the kernel lacks what they show.
OLDER_KERNEL: Final = "an older kernel"
PRINTED: Final = re.compile(r"print\(.*\)  # (.*)$", re.MULTILINE)


@attrs.frozen
class Block:
    """A block of a page.

    Attributes:
      line: of its first line of code, from 1.
      kind: the language, or ``literalinclude``.
      code: without the indentation of the block; of a ``literalinclude`` its options.
      argument: the file that a ``literalinclude`` names.
      note: the comment on the line before.
    """

    line: int
    kind: str
    code: str
    argument: str = ""
    note: str = ""

    @property
    def is_part_of(self) -> str | None:
        """The file that has these lines."""
        match = re.fullmatch(r"a part of (\S+)", self.note)
        return match[1] if match else None

    @property
    def is_run(self) -> bool:
        """Whether it is written to a file, or runs, as it is."""
        if self.note == "a cell":
            return True
        return self.kind in RUN and not self.is_part_of and not self.note.startswith("not run: ")

    @property
    def is_output(self) -> bool:
        """Whether it is what the last program prints."""
        return self.note.partition(",")[0] == "output"


def pages() -> list[Path]:
    """Return the pages that are checked."""
    found = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    return sorted(path for path in found if "_build" not in path.parts)


def blocks(text: str) -> list[Block]:
    """Return the blocks of a page in their order."""
    found = []
    for match in FENCE.finditer(text):
        note = COMMENT.search(text[: match.start()])
        found.append(
            Block(
                text.count("\n", 0, match.start("body")) + 1,
                match["kind"].strip("{}"),
                textwrap.dedent(match["body"]),
                match["argument"],
                " ".join(note[1].split()) if note else "",
            )
        )
    return found


@attrs.frozen
class Step:
    """What runs: a block, or the file that a page includes.

    Attributes:
      how: ``python``, ``session``, ``cell``, ``shell``, or ``file``, which is not run.
      file: where the code is written.
      expected: the block with the expected output.
    """

    line: int
    how: str
    code: str
    file: str
    note: str = ""
    expected: Block | None = None


def steps(page: Path, text: str) -> list[Step]:
    """Return what runs of a page."""
    found = blocks(text)
    result: list[Step] = []
    for block, following in zip(found, [*found[1:], None], strict=False):
        expected = following if following and following.is_output else None
        if block.kind == "literalinclude" and expected:
            path = page.parent / block.argument
            result.append(Step(block.line, "python", path.read_text(), path.name, "", expected))
        elif block.is_run:
            how = {"a cell": "cell", "a file": "file"}.get(block.note) or RUN[block.kind]
            name = FILE_NAME.match(block.code)
            file = name[1] if name else f"block_{block.line}.py"
            result.append(Step(block.line, how, block.code, file, block.note, expected))
    if ONE_SESSION in text and result:
        code = "\n".join(step.code for step in result if step.how == "python")
        return [Step(result[0].line, "session", code, "session.py")]
    return result


def contains(text: str, part: str) -> bool:
    """Whether a file has these lines, at any indentation; ``...`` stands for any lines."""
    pieces = [
        r"(?:.*\n)*?"
        if line.strip() == "..."
        else r"[^\S\n]*" + re.escape(line.strip()) + r"[^\S\n]*\n(?:[^\S\n]*\n)*"
        for line in part.splitlines()
        if line.strip()
    ]
    return re.search("^" + "".join(pieces), text + "\n", re.MULTILINE) is not None


def differs(step: Step, printed: str) -> str | None:
    """Return how the output of a step is not the expected one."""
    got = printed.splitlines()
    if any(line.startswith(OLDER_KERNEL) for line in got):
        return None
    if step.expected is None:
        if step.how in {"shell", "cell"}:
            return None
        wanted = PRINTED.findall(step.code)
        return None if sorted(got) == sorted(wanted) else f"expected {wanted}"
    note = step.expected.note
    want = step.expected.code.splitlines()
    if "with other numbers" in note:
        got, want = ([re.sub(r"\d+", "0", line) for line in each] for each in (got, want))
    if "in any order" in note:
        return None if sorted(got) == sorted(want) else "expected these lines in any order"
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else re.escape(line.rstrip()) + r"[^\S\n]*\n"
        for line in want
    )
    matches = re.fullmatch(pattern, "".join(line + "\n" for line in got))
    return None if matches else "expected the block of its output"
