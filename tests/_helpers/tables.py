"""Tables for terminals and in Markdown, and the machine they are about."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable


def machine() -> str:
    """Return a description of this machine."""
    return (
        f"{platform.system()} {platform.release()}, {platform.machine()}, "
        f"{os.cpu_count()} processors"
    )


def row_of(*cells: str) -> list[str]:
    """Return the line of a table in Markdown, in a list."""
    return [f"| {' | '.join(cells)} |"]


def table_of(title: str, headings: Iterable[str], numbers: Iterable[int] = ()) -> Table:
    """Return a table without rows; numbers are the columns that have figures."""
    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i in numbers else "left", overflow="fold")
    return table
