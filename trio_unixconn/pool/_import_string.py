"""What a user names as ``"package.module:name"``, imported and looked at.

The rule of this file: what cannot be what was asked for is refused when a worker starts, not
when the first job comes.

Source: https://packaging.python.org/specifications/entry-points/ (object references)
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any


def parse_import_string(reference: str, name: str) -> None:
    """Raise unless ``reference`` has the form ``package.module:name``.

    Args:
      name: the argument that is checked, for the error.

    Raises:
      TypeError, ValueError: it has another form.
    """
    if not isinstance(reference, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f'{name} must be a string "package.module:name", got {type(reference).__name__}; each '
            "worker is a new interpreter that imports it"
        )
    module, colon, names = reference.partition(":")
    if not colon or not all(
        part.isidentifier() for part in (*module.split("."), *names.split("."))
    ):
        raise ValueError(f'{name} must have the form "package.module:name", got {reference!r}')
    if module == "__main__":
        raise ValueError(
            f"{name} cannot be in __main__, which is another module in a worker; use the name of "
            f'the file ("program:{names}" for program.py), and guard the rest of that file with '
            'if __name__ == "__main__"'
        )


def import_from_string(reference: str) -> Any:
    """Import what is named.

    Raises:
      ImportError, AttributeError: it is not there.
      Anything that the module raises.
    """
    module, _, names = reference.partition(":")
    found: Any = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def load_handler(reference: str) -> Any:
    """Import a handler.

    Raises:
      TypeError: it is no async function.
    """
    handler = import_from_string(reference)
    inner = handler
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not inspect.iscoroutinefunction(inner) and not inspect.iscoroutinefunction(
        getattr(inner, "__call__", None)  # noqa: B004 - of an object with an async __call__
    ):
        raise TypeError(f"the handler {reference} must be async: async def f(stream, job)")
    return handler


def load_setup(reference: str) -> Any:
    """Import what is run around a worker's life.

    Raises:
      TypeError: it cannot be called.
    """
    setup = import_from_string(reference)
    if not callable(setup):
        raise TypeError(
            f"the setup {reference} must be a function that returns an async context manager"
        )
    return setup
