"""How docstrings are written, as far as ruff does not check it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import trio_unixconn

pytestmark = pytest.mark.once

PACKAGE = Path(trio_unixconn.__file__).parent


def test_raises_sections_have_one_entry_per_exception() -> None:
    """Each exception in a Raises section has an entry of its own, which says when it is raised."""
    pattern = re.compile(r"^ +(?:[\w.]*[A-Z]\w+, )+[\w.]*[A-Z]\w+:(?: |$)", re.MULTILINE)
    found = [
        (path.name, match[0].strip())
        for path in sorted(PACKAGE.rglob("*.py"))
        for match in pattern.finditer(path.read_text())
    ]
    assert found == []
