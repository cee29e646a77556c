"""``serve --asgi``: which handler the workers import, and with which options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ...pool._config import PoolConfig
from .._console import fail

if TYPE_CHECKING:
    from ...asgi import ASGIOptions
    from ...pool import WorkerPoolOptions


def read_handler(
    handler: str, options: WorkerPoolOptions, *, asgi: bool, **asgi_options: Any
) -> tuple[str, WorkerPoolOptions, PoolConfig]:
    """Return the handler that the workers import, and the options of their pool, checked.

    Options that are invalid, or that only an application has, end the command.

    Args:
      asgi: whether ``handler`` is an ASGI application.
      asgi_options: options that only an application has; what was not given is None, "" or False.
    """
    given = {
        name: value
        for name, value in asgi_options.items()
        if value is not None and value is not False and value != ""
    }
    try:
        if asgi:
            from ...asgi._server import pool_arguments  # only for --asgi

            handler, options = pool_arguments(handler, cast("ASGIOptions", {**options, **given}))
        elif given:
            name = next(iter(given)).replace("_", "-")
            fail(f"--{name} can only be used with --asgi", status=2)
        return handler, options, PoolConfig(handler, **options)
    except ValueError as exc:
        return fail(str(exc), status=2)
