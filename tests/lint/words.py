"""Refuse words that this project does not use, in its code, tests and documentation.

A subject is a task, a process, a worker, a socket or a file descriptor, and a thing has the name
that trio, CPython and the man pages give it. Then a reader can search for it.

A program: ``python -m tests.lint.words``. It prints what to change, and exits with status 1.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parents[2]
# What is checked; each name in the root is a file or a directory.
CHECKED: Final = (
    *("trio_unixconn", "tests", "docs", "examples", ".ci"),
    *("noxfile.py", "pyproject.toml", ".pre-commit-config.yaml"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
)
SUFFIXES: Final = {".py", ".md", ".toml", ".c", ".js", ".pml", ".yaml", ".sh", ".cfg", ""}
SKIPPED: Final = {"__pycache__", "_build"}


class Rule(NamedTuple):
    """A pattern that is refused, and what to write in its place.

    In a pattern, ``~`` is the space between two words, which may be the end of a line and what
    begins the next one. A match with a group is allowed.
    """

    pattern: str
    better: str


RULES: Final = (
    Rule(r"\b(?:is|are|was|were|be)~due\b", "expected X, got Y"),
    Rule(r"\bwho(?:m|ever)?\b", "name the task, process, user or peer"),
    Rule(r"\b(?:no|some|any)(?:body\b|~?one\b(?!~of))", "name the task, process or user"),
    Rule(r"\bfolders?\b", "directory"),
    Rule(r"\balso~when\b", "even if"),
    Rule(r"(\bthere~)?\b(?:is|are)~no\b(?!~(?:longer|more)\b)", "is not a ..."),
    Rule(r"\bcame\b", "got, arrived or was received"),
    Rule(r"\bbehind\b([ -]an?\b|~(?:balancers?|proxies|nginx|HAProxy)\b)?", "after"),
    Rule(r"\bfor~ever\b", "without end"),
    Rule(r"\bas~above\b", "say it again, or name the place"),
    Rule(r"\bif~left~out\b", "if omitted, or default: ..."),
    Rule(r"\bthe~rule~of~this~file\b", "Invariant: ..., if there is one"),
)

GAP: Final = r"(?:\s+(?:[#*|>/]+\s+)?)"

# Text that may have a refused word, by the file (a glob; the pattern of the text; why).
EXCEPTIONS: Final[tuple[tuple[str, str, str], ...]] = (
    ("tests/lint/*", r"(?s).*", "these files say what is refused"),
    ("*", r"NOBODY|as_nobody|[\"`]nobody\b", "the user of that name"),
    ("*", r"(?i)decide[- ]who[- ]may[- ]connect", "the name of a page: users are persons"),
    ("tests/cli/test_serve_binds.py", r"\bno one\b", "a name that no user has"),
)


class Finding(NamedTuple):
    """A place with a refused word."""

    line: int
    text: str
    better: str


def check(name: str, text: str) -> list[Finding]:
    """Return the refused words in a text.

    Args:
      name: its path in the project, for the exceptions.
    """
    for glob, allowed, _ in EXCEPTIONS:
        if Path(name).match(glob):
            # As many lines as before.
            text = re.sub(allowed, lambda match: "\n" * match[0].count("\n"), text)
    found = [
        Finding(text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), rule.better)
        for rule in RULES
        for match in re.finditer(rule.pattern.replace("~", GAP), text, re.IGNORECASE)
        if match.lastindex is None
    ]
    return sorted(found)


def files() -> list[Path]:
    """Return the files that are checked."""
    found: list[Path] = []
    for name in CHECKED:
        path = ROOT / name
        if path.is_file():
            found.append(path)
        found += [
            each
            for each in sorted(path.rglob("*"))
            if each.is_file()
            and each.suffix in SUFFIXES
            and not SKIPPED.intersection(each.relative_to(ROOT).parts)
        ]
    return found


def main() -> int:
    """Print every refused word; return the exit status."""
    status = 0
    for path in files():
        name = path.relative_to(ROOT).as_posix()
        for finding in check(name, path.read_text()):
            print(f"{name}:{finding.line}: {finding.text!r}: {finding.better}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
