"""The public names."""

from __future__ import annotations

import inspect

import trio_unixconn
from trio_unixconn import errors


def test_all_is_what_there_is() -> None:
    """__all__ names exactly the public names of the package."""
    public = {
        name
        for name, value in vars(trio_unixconn).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert set(trio_unixconn.__all__) == public | {"__version__"}


def test_every_error_is_at_the_root() -> None:
    """Every exception of the errors module can be imported from the package."""
    assert set(errors.__all__) <= set(trio_unixconn.__all__)


def test_everything_public_is_described() -> None:
    """Every public class, function and method has a docstring."""
    missing: list[str] = []
    for name in trio_unixconn.__all__:
        value = getattr(trio_unixconn, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        members = [(name, value)]
        if inspect.isclass(value):
            members += [
                (f"{name}.{key}", member)
                for key, member in vars(value).items()
                if inspect.isfunction(member) and not key.startswith("_")
            ]
        missing += [key for key, member in members if not inspect.getdoc(member)]
    assert missing == []
