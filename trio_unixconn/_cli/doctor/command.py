"""``trio-unixconn doctor``: its option, and whether the library works on this system."""

from __future__ import annotations

from typing import Annotated

import attrs
import typer

from .._console import fail, say_json


def doctor(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Try what this library needs of the kernel and Python, and list the limits in force.

    Exit status 1 if descriptors or credentials were not seen to pass.
    What is missing otherwise costs only what the table says.
    """
    from .examination import examine  # --help needs none of it

    found = examine()
    if as_json:
        say_json({**attrs.asdict(found), "works": found.works})
    else:
        from .tables import print_tables

        print_tables(found)
    if not found.works:
        fail(
            *(
                f"{each.name}: {each.seen}"
                for each in found.features
                if each.is_core and not each.works
            )
        )
