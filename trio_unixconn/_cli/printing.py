"""What the commands print, and how they end.

Invariant: results go to standard output and errors to standard error; neither contains control
characters for a terminal.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import typer

if TYPE_CHECKING:
    from .._address import UnixSocketAddress


def say(line: str) -> None:
    """Print a line, unfolded, so that grep and cut work on it."""
    print(printable(line))  # noqa: T201 - a command line's work


def say_json(value: Any) -> None:
    """Print for machines."""
    print(json.dumps(value, indent=1))  # noqa: T201 - the output of the command


def complain(text: str) -> None:
    """Print what another process says went wrong, in its own lines."""
    for line in text.splitlines():
        print(printable(line), file=sys.stderr)  # noqa: T201 - the output of the command


def fail(*lines: str, status: int = 1) -> NoReturn:
    """Say what went wrong, and end."""
    for line in lines:
        print(f"trio-unixconn: {printable(line)}", file=sys.stderr)  # noqa: T201 - the output of the command
    raise typer.Exit(status)


def argument_of(address: UnixSocketAddress) -> str:
    """Return an address as the commands take it: a path, or ``@name``.

    It is not escaped: JSON keeps every character, and all else is printed with :func:`printable`.
    """
    return f"@{address.get_path()}" if address.get_is_abstract() else address.get_path()


def printable(text: str) -> str:
    """Show what a terminal would act on, and what is no text, as escapes."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )
