"""The tables of ``trio-unixconn doctor``; only this file needs rich."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .._console import printable, say, writing

if TYPE_CHECKING:
    from .report import Examination

WORKS: Final = {True: "yes", False: "no", None: "unknown"}


def print_tables(found: Examination) -> None:
    """Print every version, feature and limit."""
    console = Console()
    for name, version in found.versions.items():
        say(f"{name}: {version}")
    table = Table(title="Features", title_justify="left")
    table.add_column("feature", overflow="fold", max_width=20)
    table.add_column("since", max_width=12)
    table.add_column("works")
    table.add_column("observed", overflow="fold")
    for feature in found.features:
        seen = printable(feature.seen)
        if feature.works is False:
            seen += f"\nwithout it: {feature.otherwise}"
        table.add_row(
            feature.name,
            feature.since,
            WORKS[feature.works],
            escape(seen),
            style="" if feature.works else "red" if feature.is_core else "yellow",
        )
    with writing():
        console.print(table)
    table = Table(title="Limits", title_justify="left")
    table.add_column("limit", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("meaning", overflow="fold")
    for limit in found.limits:
        value = "unknown" if limit.value is None else str(limit.value)
        table.add_row(limit.name, value, escape(printable(limit.meaning)))
    with writing():
        console.print(table)
    say(conclusion(found))


def conclusion(found: Examination) -> str:
    """Return whether the library works here, in one line."""
    if found.works:
        return "descriptors and credentials pass: this library works here"
    if any(each.works is False for each in found.features if each.is_core):
        return "descriptors or credentials do not pass: this library does not work here"
    return "whether descriptors and credentials pass is unknown; is the machine very busy?"
