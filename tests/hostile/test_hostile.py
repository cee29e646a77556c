"""Peers that mean harm: no leak, no hang, no error that is not documented.

``HOSTILE_MESSAGES`` says how many messages are sent in all, ``HOSTILE_SEED`` which ones.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import attrs
import pytest
import trio

from tests._helpers.fds import free_descriptors
from tests._helpers.processes import open_descriptors
from tests.hostile.calls import MIXES, Driver, names, one_call
from trio_unixconn import ConnectionBrokenError, UnixConnection

# One Python is enough.
pytestmark = [pytest.mark.slow, pytest.mark.once]

HERE = Path(__file__).parent
MESSAGES = int(os.environ.get("HOSTILE_MESSAGES", "100000"))
SEED = int(os.environ.get("HOSTILE_SEED", "1"))
SO_PASSPIDFD = 76
# Of an ordinary user's hostile peer.
MAX_IN_FLIGHT = 500

# Which peer, SO_PASSCRED, SO_PASSPIDFD, and whether descriptors run out.
CASES = [
    (peer, passcred, passpidfd, full)
    for peer in ("c", "python")
    for passcred, passpidfd, full in (
        (False, False, False),
        (True, False, False),
        (False, True, False),
        (True, True, False),
        (True, True, True),
    )
]


@attrs.define
class Totals:
    """What happened in one test."""

    connections: int = 0
    calls: int = 0
    received: int = 0
    sent: int = 0
    refused: int = 0


@pytest.fixture(scope="module")
def hostile_in_c(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The program, compiled."""
    compiler = shutil.which("cc")
    if compiler is None:
        if os.environ.get("CI"):
            pytest.fail("no C compiler (cc), and this test must not be skipped here")
        pytest.skip("no C compiler (cc)")
    program = tmp_path_factory.mktemp("hostile") / "hostile"
    subprocess.run(
        [compiler, "-std=c11", "-Wall", "-Wextra", "-O1", "-o", program, HERE / "hostile.c"],
        check=True,
    )
    return str(program)


@pytest.fixture
def command(case: tuple[str, bool, bool, bool], request: pytest.FixtureRequest) -> list[str]:
    """How the peer is started, unless this machine lacks what the case is about."""
    if case[2]:
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 0)
            except OSError:
                pytest.skip("this kernel has no SO_PASSPIDFD (Linux 6.5)")
    if case[0] == "c":
        return [request.getfixturevalue("hostile_in_c")]
    return [sys.executable, "-I", str(HERE / "hostile_peer.py")]


def open_count() -> int:
    """Return how many descriptors are open."""
    return open_descriptors(os.getpid())


async def everything_closed(before: int) -> None:
    """Assert that no more descriptors are open than before."""
    if open_count() == before:
        return
    # What a reference circle still holds (a traceback, say) is not leaked, nor what a thread
    # has been told to close.
    gc.collect()
    with trio.move_on_after(10):
        while open_count() != before:
            await trio.sleep(0.001)
    assert open_count() == before, "descriptors leaked"


def passcred(conn: UnixConnection) -> bool:
    """Return what no receive may change."""
    return bool(conn.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED))


async def drive(driver: Driver, number: int, totals: Totals, *, full: bool) -> None:
    """Receive from one connection until its end, or until we have had enough."""
    mix = MIXES[number % len(MIXES)]
    patience = driver.random.choice([10, 100, 10**9, 10**9])
    before = passcred(driver.conn)
    for _ in range(patience):
        totals.calls += 1
        ended = await one_call(driver, mix, full=full)
        assert passcred(driver.conn) == before
        if ended:
            # And it stays so.
            try:
                assert await driver.conn.receive_some() == b""
            except ConnectionBrokenError:
                assert await driver.conn.receive_some() == b""
            return


async def one_connection(
    sock: socket.socket, seed: str, number: int, case: tuple[str, bool, bool, bool], totals: Totals
) -> None:
    """Receive from one connection, and close it."""
    _, with_credentials, with_pidfd, full = case
    rng = random.Random(f"{seed} {number}")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, with_credentials)
    if with_pidfd:
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 1)
    conn = UnixConnection.from_stdlib_socket(sock)
    driver = Driver(conn, rng)
    async with conn:
        if rng.random() < 0.3:
            # A peer that leaves this unread resets the connection when it closes.
            with suppress(ConnectionBrokenError):
                await conn.send_all(b"unread")
        room = rng.choice([0, 1, 2, 5, 20]) if full else None
        with nullcontext() if room is None else free_descriptors(room):
            await drive(driver, number, totals, full=full)
    totals.received += driver.received


async def connections(
    control: socket.socket, seed: str, case: tuple[str, bool, bool, bool], totals: Totals
) -> None:
    """Take one connection after the other from the peer, until it reports."""
    while True:
        before = open_count()
        control.send(b"n")
        with trio.fail_after(60):
            await trio.lowlevel.wait_readable(control)
        said, fds, _, _ = socket.recv_fds(control, 64, 1)
        if not fds:
            assert said, "the peer died"
            totals.sent, totals.refused = map(int, said.split())
            return
        number = totals.connections
        totals.connections += 1
        which = f"seed {seed!r}, connection {number}: {names(MIXES[number % len(MIXES)])}"
        try:
            with trio.fail_after(60):
                await one_connection(socket.socket(fileno=fds[0]), seed, number, case, totals)
            await everything_closed(before)
        except Exception as exc:
            raise AssertionError(f"{which}: {exc!r}") from exc


@pytest.mark.parametrize(
    "case",
    CASES,
    ids=lambda case: "-".join(
        [case[0]]
        + [name for name, on in zip(("passcred", "passpidfd", "full"), case[1:], strict=True) if on]
    ),
)
async def test_nothing_is_lost_leaked_or_misread(
    case: tuple[str, bool, bool, bool],
    command: list[str],
    tmp_path: Path,
) -> None:
    """Random messages against every receiving call: no leak, no hang, documented errors only."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        count = -(-MESSAGES // len(CASES))
        # Another seed for each case, so that they do not all send the same.
        seed = SEED * len(CASES) + CASES.index(case)
        arguments = [str(theirs.fileno()), str(seed), str(count)]
        process = await trio.lowlevel.open_process(
            [*command, *arguments], pass_fds=[theirs.fileno()], cwd=tmp_path
        )
        if os.geteuid() != 0:
            # The kernel limits what all processes of an ordinary user have in flight, to the
            # RLIMIT_NOFILE of each sender. Leave the tests that run meanwhile their share.
            _, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
            limits = min(MAX_IN_FLIGHT, hard), hard
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)
        theirs.close()
        totals = Totals()
        try:
            await connections(ours, f"HOSTILE_SEED={SEED} {case}", case, totals)
            with trio.fail_after(30):
                assert await process.wait() == 0
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
    # Shown with -s, and in the report of a failure.
    sys.stdout.write(f"\n{totals}\n")
    assert totals.sent >= count
    # The peers are of use only if much of what they send is well-formed.
    assert case[3] or totals.received > count // 10, totals
