"""Import strings: handlers and setups that a user names as ``"package.module:name"``.

Invariant: an object that cannot be a handler or a setup is rejected when the worker starts, not
when its first job arrives.

Source: https://packaging.python.org/specifications/entry-points/ (object references)
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


def parse_import_string(reference: str, name: str) -> None:
    """Raise unless ``reference`` has the form ``package.module:name``.

    Args:
      name: the argument that is checked, for the error.

    Raises:
      TypeError: it is not a str.
      ValueError: it has another form.
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
    """Import an object.

    Raises:
      ImportError: there is no such module.
      AttributeError: there is no such object in it.
      Anything that the module raises.
    """
    module, _, names = reference.partition(":")
    found: Any = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def import_handler(reference: str) -> Any:
    """Import a handler.

    Raises:
      TypeError: it is not an async function.
      All that :func:`import_from_string` raises.
    """
    handler = import_from_string(reference)
    inner = handler
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not inspect.iscoroutinefunction(inner) and not inspect.iscoroutinefunction(
        getattr(inner, "__call__", None)  # noqa: B004 - of an object with an async __call__
    ):
        raise TypeError(
            f"handler {reference} must be an async function (async def f(stream, job)), got "
            f"{type(handler).__name__}"
        )
    return handler


def import_setup(reference: str) -> tuple[Callable[..., Any], bool]:
    """Import a setup.

    Returns:
      The function, and whether it takes an argument.

    Raises:
      TypeError: it cannot be called, or needs more than one argument.
      All that :func:`import_from_string` raises.
    """
    setup = import_from_string(reference)
    expected = (
        f"setup {reference} must be a function that returns an async context manager, and takes "
        "no argument or a WorkerInfo"
    )
    if not callable(setup):
        raise TypeError(f"{expected}, got {type(setup).__name__}")
    try:
        parameters = inspect.signature(setup).parameters.values()
    except ValueError:
        # Some functions in C have no signature.
        return setup, False
    required = [
        parameter
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}
    ]
    if len(required) > 1 or any(each.kind not in _POSITIONAL for each in required):
        names = ", ".join(parameter.name for parameter in required)
        raise TypeError(f"{expected}, got one that requires {names}")
    return setup, bool(required)
