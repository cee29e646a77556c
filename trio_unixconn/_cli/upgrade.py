"""``trio-unixconn upgrade``: have a server replaced, and say how that has ended.

Invariant: exit status 0 means that the successor serves; 1, that the server serves as before, or
that this is not known because it has ended.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from .._policy import PeerPolicy
from ..errors import UpgradeFailedError
from ._console import address_of, complain, fail, run, say, say_json

if TYPE_CHECKING:
    from .._address import UnixSocketAddress
    from ..handover import Upgrade


def upgrade(
    path: Annotated[str, typer.Argument(metavar="PATH", help="The --upgrade-socket of a server.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Replace the server at PATH with a new process, and wait until that serves.

    The same as SIGUSR2, and it says how it has ended: prints the new process id,
    or exits with status 1 and what the successor has written. Then the server
    goes on as before.
    """
    result = run(partial(_request, address_of(path)))
    if isinstance(result, UpgradeFailedError):
        reason = str(result.args[0])
        if as_json:
            say_json({"error": reason, "traceback": result.traceback})
        complain(result.traceback)
        fail(f"upgrade failed, the server goes on: {reason}")
    if as_json:
        say_json({"pid": result.pid, "number": result.number, "seconds": result.seconds})
    else:
        say(str(result.pid))


async def _request(address: UnixSocketAddress) -> Upgrade | UpgradeFailedError:
    from ..handover import request_upgrade  # other commands need none of it

    uids = [os.geteuid()]
    if not uids[0] and not address.get_is_abstract():
        # Nothing is revealed to the server; the owner of the path is the one to be asked.
        uids.append(os.stat(address.get_path()).st_uid)
    try:
        return await request_upgrade(address, policy=PeerPolicy(uids=uids))
    except UpgradeFailedError as exc:
        return exc
