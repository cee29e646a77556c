"""The package on platforms that lack things: it imports, and says what is missing when used."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The socket module loses names before anything else is imported, as it would lack them on
# another system; then everything is tried that could need them.
PROGRAM = """
import contextlib, os, socket, sys

def inet_pair():
    # trio's own wakeup pair, made as on a system without Unix sockets.
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        return client, server.accept()[0]

if "AF_UNIX" in sys.argv[1]:
    socket.socketpair = inet_pair

for name in sys.argv[1].split(","):
    owner, _, attribute = name.rpartition(".")
    delattr({"": socket, "os": os}[owner], attribute)
    if attribute in socket.__all__:
        socket.__all__.remove(attribute)

import trio
import trio_unixconn
from trio_unixconn import *

async def attempt(what, do):
    try:
        value = do()
        if hasattr(value, "__await__"):
            with trio.fail_after(30):
                value = await value
        print(what, "ok")
        return value
    except NotSupportedError as exc:
        print(what, "NotSupportedError")
    except Exception as exc:
        print(what, repr(exc))

async def main():
    pair = await attempt("pair", connection_pair)
    await attempt("connect", lambda: open_unix_connection("/nonexistent"))
    path = f"/tmp/trio-unixconn-test-{os.getpid()}"
    listener = await attempt("listen", lambda: open_unix_listener(path))
    if listener:
        await listener.aclose()
    await attempt("credentials", Credentials)
    if pair:
        one, two = pair
        await attempt("peer", one.get_peer_credentials)
        if await attempt("send_credentials", one.send_credentials):
            await attempt("receive_credentials", two.receive_credentials)
        await one.send_all(b"x")
        if not await attempt("credentials of a byte", two.receive_credentials):
            with contextlib.suppress(BlockingIOError):
                two._receiver.raw.recv(1)  # still there, if nothing was read
        if await attempt("send_fd", lambda: one.send_fd(0)):
            fd = await attempt("receive_fd", two.receive_fd)
            print("inheritable", os.get_inheritable(fd))
            os.close(fd)
        await one.send_all(b"rest")
        await attempt("bytes", two.receive_some)
        await one.aclose()
        await two.aclose()

trio.run(main)
"""

ALL = (
    "AF_UNIX,SCM_RIGHTS,SCM_CREDENTIALS,MSG_CMSG_CLOEXEC,SO_PEERCRED,SO_PASSCRED,"
    "CMSG_SPACE,CMSG_LEN"
)
EVERYTHING = [
    "pair ok",
    (
        "connect FileNotFoundError(2, 'No such file or directory: no such socket; "
        "is the server running, and is this its path?')"
    ),
    "listen ok",
    "credentials ok",
    "peer ok",
    "send_credentials ok",
    "receive_credentials ok",
    "credentials of a byte ok",
    "send_fd ok",
    "receive_fd ok",
    "inheritable False",
    "bytes ok",
]
NOTHING = ["pair NotSupportedError", "connect NotSupportedError", "listen NotSupportedError"]


def but(*not_supported: str, untried: tuple[str, ...] = ()) -> list[str]:
    """Return what is printed when some operations are not supported, and others not tried."""
    lines: list[str] = []
    for line in EVERYTHING:
        what = line.removesuffix(" ok")
        if what in not_supported:
            lines.append(f"{what} NotSupportedError")
        elif what not in untried:
            lines.append(line)
    return lines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("AF_UNIX", [*NOTHING, "credentials ok"]),
        (ALL, [*NOTHING, "credentials ok"]),
        (
            f"{ALL},os.geteuid,os.getegid",
            [*NOTHING, "credentials NotSupportedError"],
        ),
        ("CMSG_SPACE", ["pair NotSupportedError", *EVERYTHING[1:4]]),
        ("SCM_RIGHTS", but("send_fd", untried=("receive_fd", "inheritable False"))),
        ("SCM_CREDENTIALS", but("send_credentials", untried=("receive_credentials",))),
        ("MSG_CMSG_CLOEXEC", EVERYTHING),
        ("MSG_NOSIGNAL", EVERYTHING),
        ("SO_PASSCRED", EVERYTHING),
        ("SO_PEERCRED", but("peer", "credentials of a byte")),
        (
            "SO_PEERCRED,SCM_CREDENTIALS",
            but(
                "peer",
                "send_credentials",
                "credentials of a byte",
                untried=("receive_credentials",),
            ),
        ),
        ("SO_ACCEPTCONN", EVERYTHING),
        ("os.geteuid", but("credentials", "send_credentials", untried=("receive_credentials",))),
    ],
)
def test_what_is_missing(names: str, expected: list[str]) -> None:
    """Without a name of the socket module the rest works; what needs it is NotSupportedError."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, names], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == expected
