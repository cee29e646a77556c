"""``--upgrade-socket`` and ``--take-over``: a server as a generation.

Invariant: until a successor has been told that it serves, this process owns the pid file, speaks to
the service manager, and has the terminal. From then on the successor does, and not before.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

import attrs

from ..._policy import PeerPolicy
from ...handover import open_generation
from ...handover._generation import explain_failure
from ...handover._spawn import claim_connection, is_successor
from .._console import address_of, explain, fail
from .binds import absolute_address

if TYPE_CHECKING:
    from ..._address import UnixSocketAddress
    from ...handover import Generation, ServiceNotifier
    from ...pool._server import AcceptMode

# A service of another kind at the same path is not a predecessor.
_NAME: Final = "trio-unixconn serve"


@attrs.frozen(kw_only=True)
class UpgradeOptions:
    """How a server is replaced.

    Attributes:
      path: where a successor, or a request for one, is answered.
      take_over: whether a server that has the path is replaced by this one.
      directory: where a successor is started; None: that of this process is unknown.
    """

    path: UnixSocketAddress
    take_over: bool
    timeout: float
    probation: float
    directory: str | None

    @property
    def may_inherit(self) -> bool:
        """Whether another server may hand its listeners over to this process."""
        return self.take_over or is_successor()


def read_upgrade_options(
    upgrade_socket: str | None,
    take_over: str | None,
    *,
    timeout: float,
    probation: float,
    replace: bool,
    accept: AcceptMode,
) -> UpgradeOptions | None:
    """Read the options, or end with exit status 2; None if a server is not a generation."""
    text = upgrade_socket if take_over is None else take_over
    if text is None:
        if probation:
            fail("--probation can only be used with --upgrade-socket or --take-over", status=2)
        return None
    if upgrade_socket not in (None, text):
        fail("--upgrade-socket and --take-over must be the same path", status=2)
    if replace:
        fail(
            "--replace cannot be used with --upgrade-socket or --take-over: a successor inherits "
            "the paths",
            status=2,
        )
    if accept == "workers":
        fail(
            "--accept workers cannot be used with --upgrade-socket or --take-over: a generation "
            "decides when its own process accepts",
            status=2,
        )
    if not 0 < timeout < math.inf:
        fail(f"--upgrade-timeout must be positive and finite, got {timeout}", status=2)
    if not 0 <= probation < math.inf:
        fail(f"--probation must be non-negative and finite, got {probation}", status=2)
    try:
        path = absolute_address(address_of(text))
    except FileNotFoundError:
        fail(f"{text}: the current directory was deleted; use an absolute path")
    return UpgradeOptions(
        path=path,
        take_over=take_over is not None,
        timeout=timeout,
        probation=probation,
        directory=_current_directory(),
    )


def _current_directory() -> str | None:
    """Return the current directory as the parent process has named it, perhaps a symbolic link."""
    name = os.environ.get("PWD", "")
    with suppress(OSError):
        if os.path.isabs(name) and os.path.samefile(name, "."):
            return name
    with suppress(FileNotFoundError):
        return os.getcwd()
    return None


def claim_streams() -> None:
    """Get the standard error of the process that has started this one as its successor.

    Before anything is redirected.
    """
    claim_connection()


@asynccontextmanager
async def opened_generation(
    options: UpgradeOptions, manager: ServiceNotifier | None, streams: tuple[int, int]
) -> AsyncGenerator[Generation, None]:
    """Be a generation in this block.

    Args:
      streams: standard output and error of a successor.
    """
    async with open_generation(
        options.path,
        name=_NAME,
        # Root may do anything with the process anyway.
        policy=PeerPolicy(uids=[os.geteuid(), 0]),
        take_over=options.take_over,
        cwd=options.directory,
        stdout=streams[0],
        stderr=streams[1],
        timeout=options.timeout,
        probation=options.probation,
        service_manager=manager,
    ) as generation:
        try:
            yield generation
        except Exception as exc:
            # What the upgrade command prints: the same as this process, unless it is a bug.
            with suppress(Exception):
                explain_failure(generation, "\n".join(explain(exc)[0]))
            raise


def set_workers(generation: Generation, wanted: int | None, workers: Callable[[], int]) -> None:
    """Have a successor start as many workers as there are then, after SIGTTIN and SIGTTOU.

    Args:
      wanted: what the command line says.
    """
    generation.set_state(lambda: json.dumps({"option": wanted, "workers": workers()}).encode())


def workers_of(generation: Generation, wanted: int | None) -> int | None:
    """Return how many workers to start, if the command line has not changed since."""
    if generation.state is None:
        return wanted
    try:
        state = json.loads(generation.state)
        if state["option"] == wanted and state["workers"] > 0:
            return int(state["workers"])
    except (ValueError, TypeError, KeyError):
        # Of another version.
        pass
    return wanted
