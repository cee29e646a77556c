"""PeerPolicy: which peers are admitted, at both ends, and how the others are denied."""

from __future__ import annotations

import errno
import functools
import grp
import importlib
import itertools
import logging
import operator
import os
import pwd
import socket
import sys
import types
import unittest.mock
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.lowlevel
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from tests._helpers.fds import free_descriptors
from tests._helpers.peers import (
    PeerProcess,
    client_process,
    report_of,
    reporting_process,
    shared_directory,
)
from tests._helpers.requirements import mount_namespaces, peer_pidfds, unshared, user_namespaces
from tests._helpers.users import OTHER_UID, as_root
from tests._helpers.waiting import counted, until
from trio_unixconn import (
    ConnectionClosedError,
    Credentials,
    IOErrorEnum,
    NotSupportedError,
    PeerDeniedError,
    PeerGoneError,
    PeerIdentity,
    PeerPolicy,
    UnixConnection,
    UnixListener,
    UnixServer,
    _identity,
    _kernel,
    _policy,
    open_unix_connection,
    open_unix_listener,
    serve_unix,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

GROUP = 54321


def identity(uid: int = 1000, gid: int = 1000, groups: tuple[int, ...] | None = ()) -> PeerIdentity:
    return PeerIdentity(Credentials(1, uid, gid), groups)


def answering(answer: Any, asked: list[PeerIdentity] | None = None) -> Callable[..., Any]:
    async def check(peer: PeerIdentity) -> Any:
        if asked is not None:
            asked.append(peer)
        await trio.lowlevel.checkpoint()
        return answer

    return check


@pytest.fixture
async def path() -> AsyncIterator[Path]:
    """A path in a directory that every user can enter."""
    with shared_directory() as directory:
        yield directory / "s"


################################################################
# Which peers a policy admits
################################################################


@pytest.mark.parametrize(
    ("policy", "peer", "admitted"),
    [
        (PeerPolicy(uids=[1000]), identity(1000), True),
        (PeerPolicy(uids={1, 2}), identity(3), False),
        (PeerPolicy(uids=[1000]), identity(1, 1000, (1000,)), False),
        (PeerPolicy(gids=[5]), identity(1, 5), True),
        (PeerPolicy(gids=[5]), identity(1, 6, (4, 5)), True),
        (PeerPolicy(gids=[5]), identity(5, 6, (7,)), False),
        (PeerPolicy(gids=[5]), identity(1, 6, None), False),
        (PeerPolicy(gids=[5]), identity(1, 5, None), True),
        (PeerPolicy(uids=[1], gids=[5]), identity(1, 1), True),
        (PeerPolicy(uids=[1], gids=[5]), identity(2, 5), True),
        (PeerPolicy(uids=[1], gids=[5]), identity(2, 2), False),
        (PeerPolicy(uids=[0]), identity(-1, -1), False),
        (PeerPolicy.root(), identity(0), True),
        (PeerPolicy.root(), identity(1, 0, (0,)), False),
        (PeerPolicy.same_user(), identity(os.geteuid()), True),
        (PeerPolicy.same_user(), identity(os.geteuid() + 1), False),
        (PeerPolicy(users=["root"]), identity(0), True),
        (PeerPolicy(users=["root"]), identity(1), False),
        (PeerPolicy(users=["root"], uids=[1]), identity(1), True),
        (PeerPolicy(groups=[grp.getgrgid(0).gr_name]), identity(1, 1, (0,)), True),
        (PeerPolicy(groups=[grp.getgrgid(0).gr_name]), identity(0, 1, (1,)), False),
    ],
)
async def test_admits_listed_peers(
    policy: PeerPolicy, peer: PeerIdentity, *, admitted: bool
) -> None:
    """A listed user is admitted, and so is a peer in a listed group, primary or supplementary."""
    assert await policy.admits(peer) is admitted
    assert not policy.needs_pidfd


async def test_admits_with_a_check() -> None:
    """A check alone decides. With lists, it is asked about listed peers only."""
    asked: list[PeerIdentity] = []
    yes, no = identity(1), identity(2)
    policy = PeerPolicy(uids=[1], check=answering(True, asked))
    assert policy.needs_pidfd
    assert await policy.admits(yes)
    assert not await policy.admits(no)
    assert asked == [yes]
    assert not await PeerPolicy(uids=[1], check=answering(False)).admits(yes)
    assert await PeerPolicy(check=answering(True)).admits(no)
    assert not await PeerPolicy(check=answering(False)).admits(no)


class Checker:
    async def __call__(self, peer: PeerIdentity) -> bool:
        return peer.credentials.uid == 1


async def test_admits_with_callable_objects() -> None:
    """A check can be an object that is called, or a partial function."""

    async def is_user(uid: int, peer: PeerIdentity) -> bool:
        return peer.credentials.uid == uid

    for check in (Checker(), partial(is_user, 1)):
        assert await PeerPolicy(check=check).admits(identity(1))
        assert not await PeerPolicy(check=check).admits(identity(2))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
async def test_composed(*, left: bool, right: bool) -> None:
    """| and & work as for bools, and ask the right policy only if the left does not decide."""
    for policy, answer, open_after in (
        (PeerPolicy.__or__, left or right, False),
        (PeerPolicy.__and__, left and right, True),
    ):
        asked: list[PeerIdentity] = []
        one = PeerPolicy(check=answering(left))
        two = PeerPolicy(check=answering(right, asked))
        assert await policy(one, two).admits(identity()) is answer
        assert bool(asked) is (left is open_after)


async def test_composed_asks_a_check_only_if_the_user_does_not_decide(path: Path) -> None:
    """A policy that admits a user asks no check; with ``&`` it does."""
    asked: list[PeerIdentity] = []

    async def check(peer: PeerIdentity) -> bool:
        asked.append(peer)
        return True

    me, checked = PeerPolicy.same_user(), PeerPolicy(check=check)
    others = PeerPolicy(uids=[OTHER_UID])
    for policy, times in [
        (me, 0),
        (PeerPolicy(uids=[os.geteuid()], check=check), 1),
        (me | checked, 0),
        (me & me, 0),
        (others | me, 0),
        (me & checked, 1),
        (others | checked, 1),
        (checked & me, 1),
    ]:
        asked.clear()
        async with (
            await open_unix_listener(path, policy=policy) as listener,
            await open_unix_connection(path),
            await listener.accept(),
        ):
            assert len(asked) == times


async def test_admits_of_a_subclass_is_asked(path: Path) -> None:
    """A subclass decides, even about a user that its base class admits, and in a composed one."""

    class Never(PeerPolicy):
        async def admits(self, peer: PeerIdentity) -> bool:
            return False

    never = Never(uids=[os.geteuid()])
    for policy in (never, PeerPolicy.same_user() & never):
        async with (
            await open_unix_listener(path, policy=policy) as listener,
            trio.open_nursery() as nursery,
            await open_unix_connection(path) as client,
        ):
            nursery.start_soon(listener.accept)
            assert await client.receive_some() == b""
            await until(lambda: listener.denied == 1)
            nursery.cancel_scope.cancel()


async def test_composed_of_composed() -> None:
    """Compositions compose, and need a pidfd if any of them does."""
    one, two, three = PeerPolicy(uids=[1]), PeerPolicy(gids=[2]), PeerPolicy(uids=[3])
    policy = (one & two) | three
    assert [uid for uid in (1, 2, 3) if await policy.admits(identity(uid, 2))] == [1, 3]
    assert [uid for uid in (1, 2, 3) if await policy.admits(identity(uid, 1))] == [3]
    assert not policy.needs_pidfd
    checked = PeerPolicy(check=answering(True))
    assert (policy | checked).needs_pidfd
    assert (checked & policy).needs_pidfd


def test_composed_with_something_else() -> None:
    """Only policies compose."""
    policy: Any = PeerPolicy.root()
    for other in (None, True, [0]):
        with pytest.raises(TypeError, match="unsupported operand"):
            policy | other
        with pytest.raises(TypeError, match="unsupported operand"):
            policy & other


async def test_policy_if_the_credentials_cannot_be_read_first(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole identity is read then, and decides."""
    calls = 0

    def fail(_: object) -> Credentials:
        nonlocal calls
        calls += 1
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(_policy, "peer_credentials", fail)
    policy = PeerPolicy(uids=[os.getuid()])
    async with (
        await open_unix_listener(path, policy=policy) as listener,
        await open_unix_connection(path) as client,
        await listener.accept() as server,
    ):
        await server.send_all(b"admitted")
        assert await client.receive_some() == b"admitted"
    assert calls == 1


async def is_fine(_: PeerIdentity) -> bool:
    return True


def test_policy_repr() -> None:
    """The repr of a policy has what it admits, for a log."""
    lists = PeerPolicy(uids=[2, 1], gids=[10])
    assert repr(lists) == "PeerPolicy(uids={1, 2}, gids={10})"
    checked = PeerPolicy(uids=[1], check=is_fine)
    assert repr(checked) == "PeerPolicy(uids={1}, check=is_fine)"
    assert repr(PeerPolicy(check=Checker())).startswith("PeerPolicy(check=<")
    assert repr(lists & checked | PeerPolicy.root()) == (
        "((PeerPolicy(uids={1, 2}, gids={10}) & PeerPolicy(uids={1}, check=is_fine)) | "
        "PeerPolicy(uids={0}))"
    )
    assert repr(PeerPolicy(users=[pwd.getpwuid(0).pw_name])) == "PeerPolicy(uids={0})"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, ValueError, "requires at least one of uids, gids, users, groups, check"),
        ({"uids": []}, ValueError, "requires at least one of uids, gids, users, groups, check"),
        ({"uids": ["0"]}, TypeError, "uids must be an iterable of ints, got str in it"),
        ({"uids": "0"}, TypeError, "uids must be an iterable of ints, got str in it"),
        ({"uids": [True]}, TypeError, "uids must be an iterable of ints, got bool in it"),
        ({"uids": 0}, TypeError, "uids must be an iterable of ints, got int"),
        ({"uids": [-1]}, ValueError, "uids must be from 0 to 4294967294, got -1"),
        ({"gids": [2**32 - 1]}, ValueError, "gids must be from 0 to 4294967294, got 4294967295"),
        ({"gids": [1.5]}, TypeError, "gids must be an iterable of ints, got float in it"),
        (
            {"users": "root"},
            TypeError,
            r"users must be .*, got str; use \['root'\]",
        ),
        (
            {"groups": "root"},
            TypeError,
            r"groups must be .*, got str; use \['root'\]",
        ),
        ({"groups": 5}, TypeError, "groups must be an iterable of names, got int"),
        ({"users": ["no such user"]}, ValueError, "no such user: 'no such user'"),
        ({"groups": ["no such group"]}, ValueError, "no such group: 'no such group'"),
        ({"users": [0]}, TypeError, "users must be an iterable of names, got int in it"),
        ({"check": 3}, TypeError, r"async function of one argument \(a PeerIdentity\), got int"),
    ],
)
def test_policy_rejects_arguments(arguments: Any, error: type[Exception], text: str) -> None:
    """The constructor rejects wrong arguments, and its errors name them."""
    with pytest.raises(error, match=text):
        PeerPolicy(**arguments)


def test_policy_without_user_databases(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a platform without databases of users and groups, names are NotSupportedError."""
    real = importlib.import_module

    def missing(name: str) -> Any:
        if name in {"pwd", "grp"}:
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    for arguments in ({"users": ["root"]}, {"groups": ["root"]}):
        with pytest.raises(NotSupportedError):
            PeerPolicy(**arguments)  # type: ignore[arg-type]


################################################################
# Checks that go wrong
################################################################


@functools.wraps(is_fine)
def says_it_is_async(_: PeerIdentity) -> bool:
    """Only a call shows that this is not async."""
    return True


async def raising(_: PeerIdentity) -> bool:
    await trio.lowlevel.checkpoint()
    raise KeyError("the check's own")


WRONG: list[Any] = [
    (says_it_is_async, TypeError, "must be an async function, but .* returned True"),
    (answering(1), TypeError, "must return a bool, got 1"),
    (answering(None), TypeError, "must return a bool, got None"),
    (raising, KeyError, "the check's own"),
]


@pytest.mark.parametrize(("check", "error", "text"), WRONG)
async def test_policy_check_that_raises(
    path: Path, check: Any, error: type[Exception], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception of a check is raised where the policy is asked; the connection is closed."""
    policy = PeerPolicy(check=check)
    async with (
        await open_unix_listener(path, policy=policy) as listener,
        await open_unix_connection(path) as client,
    ):
        with pytest.raises(error, match=text):
            await listener.accept()
        assert await client.receive_some() == b""
        assert listener.denied == 0
        assert caplog.records == []
        listener._policy = None
        with pytest.raises(error, match=text):
            await open_unix_connection(path, policy=policy)
        async with await listener.accept() as server:
            assert await server.receive_some() == b""


@pytest.mark.parametrize(("check", "error", "text"), WRONG)
async def test_serve_unix_policy_check_that_raises(
    path: Path, check: Any, error: type[Exception], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A server counts and logs an exception of a check as one of a handler, and goes on."""

    async def handler(_: UnixConnection) -> None:
        raise AssertionError

    async with trio.open_nursery() as nursery:
        server: UnixServer = await nursery.start(
            partial(serve_unix, handler, path, policy=PeerPolicy(check=check), handler_errors="log")
        )
        for _ in range(2):
            async with await open_unix_connection(path) as client:
                assert await client.receive_some() == b""
        await until(lambda: server.connections == 0)
        assert (server.accepted, server.denied, server.crashed) == (2, 0, 2)
        server.drain()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert f"the peer was Credentials(pid={os.getpid()}" in messages[0]
    with pytest.raises(BaseException) as caught:
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve_unix, handler, path, policy=PeerPolicy(check=check)))
            async with await open_unix_connection(path) as client:
                await client.receive_some()
                await trio.sleep_forever()
    found: Any = caught.value
    while hasattr(found, "exceptions"):
        (found,) = found.exceptions
    assert isinstance(found, error)


async def accept_all(listener: UnixListener) -> None:
    """Accept the connections in the queue, all of which are denied."""

    async def accept() -> None:
        await listener.accept()
        raise AssertionError

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def test_policy_check_cancelled(path: Path) -> None:
    """If a check is cancelled, its connection is closed, at both ends; that is not a denial."""

    async def forever(_: PeerIdentity) -> bool:
        await trio.sleep_forever()
        raise AssertionError

    policy = PeerPolicy(check=forever)
    async with await open_unix_listener(path, policy=policy) as listener:
        for accept in (listener.accept, lambda: open_unix_connection(path, policy=policy)):
            async with await open_unix_connection(path) as client:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(accept)
                    await wait_all_tasks_blocked()
                    nursery.cancel_scope.cancel()
                if accept == listener.accept:
                    assert await client.receive_some() == b""
                else:
                    listener._policy = None
                    async with await listener.accept(), await listener.accept() as server:
                        assert await server.receive_some() == b""
        assert listener.denied == 0


async def test_policy_denies_while_cancelled(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A denial that is decided while the task is cancelled is closed, logged and counted."""
    scope = trio.CancelScope()

    async def late(_: PeerIdentity) -> bool:
        scope.cancel()
        return False

    async with (
        await open_unix_listener(path, policy=PeerPolicy(check=late)) as listener,
        await open_unix_connection(path) as client,
    ):
        with scope:
            await listener.accept()
        assert scope.cancelled_caught
        assert listener.denied == len(caplog.records) == 1
        assert await client.receive_some() == b""


async def test_policy_check_gets_an_identity(path: Path) -> None:
    """A check gets an identity with a pidfd, which is closed after its answer."""
    kept: list[PeerIdentity] = []

    async def check(peer: PeerIdentity) -> bool:
        kept.append(peer)
        await trio.lowlevel.checkpoint()
        return peer.pidfd is None or (peer.is_alive() and "python" in await peer.read_exe())

    async with (
        await open_unix_listener(path, policy=PeerPolicy(check=check)) as listener,
        await open_unix_connection(path),
        await listener.accept(),
    ):
        assert [peer.credentials for peer in kept] == [Credentials()]
        assert kept[0].pidfd is None


################################################################
# Denial
################################################################

DENY_ALL = PeerPolicy(uids=[OTHER_UID + 1])


async def test_listener_policy_denies(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A denied connection is closed, logged once with its peer, and counted."""
    async with await open_unix_listener(path, policy=DENY_ALL) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.accept)
            async with client_process(path) as client:
                assert await client.ask("receive") == "end"
                await wait_all_tasks_blocked()
                assert listener.denied == 1
            nursery.cancel_scope.cancel()
        (record,) = caplog.records
        assert (record.name, record.levelno) == ("trio_unixconn", logging.WARNING)
        said = record.getMessage()
        assert said.startswith(f"{path}: denied pid {client.pid} uid {os.geteuid()} gid ")
        assert said.endswith(f"by PeerPolicy(uids={{{OTHER_UID + 1}}})")


async def test_policy_denies_before_a_byte_is_read(path: Path) -> None:
    """What a denied client has sent is not read; file descriptors in it are closed."""
    reader, writer = os.pipe()
    async with (
        await open_unix_listener(path, policy=DENY_ALL) as listener,
        await open_unix_connection(path) as client,
    ):
        await client.send_fd(writer)
        os.close(writer)
        with pytest.MonkeyPatch.context() as patch:

            def never(*_: object, **__: object) -> Any:
                raise AssertionError

            patch.setattr("trio_unixconn._receiver.Receiver.receive", never)
            await accept_all(listener)
        assert listener.denied == 1
        # No process holds the writing end anymore.
        assert await trio.to_thread.run_sync(os.read, reader, 1) == b""
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
    os.close(reader)


async def test_accept_continues_after_a_denial(path: Path) -> None:
    """accept() returns the next connection that is admitted."""
    turn = [False, False, True]

    async def check(_: PeerIdentity) -> bool:
        return turn.pop(0)

    async with await open_unix_listener(path, policy=PeerPolicy(check=check)) as listener:
        clients = [await open_unix_connection(path) for _ in range(3)]
        with assert_checkpoints():
            conn = await listener.accept()
        async with conn:
            assert listener.denied == 2
            await conn.send_all(b"hello")
            assert [await client.receive_some() for client in clients] == [b"", b"", b"hello"]
        for client in clients:
            await client.aclose()


async def test_serve_unix_policy_denies(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server asks in the connection's own task: a check that waits delays no other one."""
    go_on = trio.Event()
    handled: list[UnixConnection] = []
    order = iter([False, True])

    async def check(_: PeerIdentity) -> bool:
        first = next(order)
        if first is False:
            await go_on.wait()
        return first

    async def handler(conn: UnixConnection) -> None:
        handled.append(conn)
        await conn.send_all(b"hello")

    async with trio.open_nursery() as nursery:
        server: UnixServer = await nursery.start(
            partial(serve_unix, handler, path, policy=PeerPolicy(check=check))
        )
        async with await open_unix_connection(path) as one, await open_unix_connection(path) as two:
            assert await two.receive_some() == b"hello"
            assert server.denied == 0
            go_on.set()
            assert await one.receive_some() == b""
        await until(lambda: server.connections == 0)
        assert (server.accepted, server.denied, len(handled)) == (2, 1, 1)
        server.drain()
    assert len(caplog.records) == 1


async def test_drain_asks_the_policy_of_the_listener(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A drain handles a connection in the queue only if the listener's policy admits it."""
    handled: list[UnixConnection] = []

    async def handler(conn: UnixConnection) -> None:
        handled.append(conn)

    turn = iter([True, False, True])

    async def check(_: PeerIdentity) -> bool:
        return next(turn)

    listener = await open_unix_listener(path, policy=PeerPolicy(check=check))
    async with trio.open_nursery() as nursery:
        server: UnixServer = await nursery.start(
            partial(serve_unix, handler, listener, max_connections=1)
        )
        # Accepting stops before these clients connect.
        server.drain()
        clients = []
        for _ in range(3):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(path))
            clients.append(sock)
    assert (server.accepted, len(handled), listener.denied, server.denied) == (3, 2, 1, 1)
    assert len(caplog.records) == 1
    for sock in clients:
        sock.close()


async def test_drain_that_is_cancelled_while_a_check_waits(path: Path) -> None:
    """At the deadline of a drain, a connection whose check still waits is closed."""

    async def forever(_: PeerIdentity) -> bool:
        await trio.sleep_forever()
        raise AssertionError

    async def handler(_: UnixConnection) -> None:
        raise AssertionError

    listener = await open_unix_listener(path, policy=PeerPolicy(check=forever))
    async with trio.open_nursery() as nursery:
        server: UnixServer = await nursery.start(serve_unix, handler, listener)
        server.drain(0.05)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            with trio.fail_after(30):
                await server.drained.wait()
            assert sock.recv(1) == b""
    assert (server.accepted, server.connections) == (1, 0)


################################################################
# A full table
################################################################


async def test_policy_without_a_check_needs_no_descriptor(path: Path) -> None:
    """A policy without a check needs no free file descriptor."""
    async with await open_unix_listener(path) as listener:
        clients = [await open_unix_connection(path) for _ in range(2)]
        with free_descriptors(1):
            listener._policy = PeerPolicy.same_user()
            conn = await listener.accept()
        async with conn:
            listener._policy = DENY_ALL
            with free_descriptors(1):
                await accept_all(listener)
            assert listener.denied == 1
        for client in clients:
            await client.aclose()


async def test_policy_check_waits_for_a_descriptor(
    path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """If no file descriptor is free for the pidfd, a check waits for one, logged once."""
    admitted: list[PeerIdentity] = []
    policy = PeerPolicy(check=answering(True, admitted))
    real, failures = _identity.open_peer_pidfd, [errno.EMFILE, errno.ENFILE, errno.EMFILE]

    def rarely(sock: socket.socket) -> int | None:
        if failures:
            raise OSError(failures.pop(), "none is free")
        return real(sock)

    async with await open_unix_listener(path, policy=policy) as listener:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_identity, "open_peer_pidfd", rarely)
            async with await open_unix_connection(path), await listener.accept():
                assert len(admitted) == 1
        (record,) = caplog.records
        assert "cannot open a pidfd of a peer (none is free), retrying" in record.getMessage()
        with pytest.MonkeyPatch.context() as patch:
            failures.append(errno.EIO)
            patch.setattr(_identity, "open_peer_pidfd", rarely)
            async with await open_unix_connection(path):
                with pytest.raises(OSError, match="none is free"):
                    await listener.accept()


@peer_pidfds
async def test_policy_check_with_a_full_table(path: Path) -> None:
    """With a table that is really full, a check is asked when a file descriptor is free."""
    asked: list[PeerIdentity] = []
    policy = PeerPolicy(check=answering(True, asked))
    async with (
        await open_unix_listener(path, policy=policy) as listener,
        await open_unix_connection(path),
        trio.open_nursery() as nursery,
    ):

        async def accept() -> None:
            async with await listener.accept():
                assert asked

        with free_descriptors(1):
            nursery.start_soon(accept)
            await wait_all_tasks_blocked()
            assert not asked


################################################################
# Real users
################################################################


@asynccontextmanager
async def accepting(path: Path, policy: PeerPolicy) -> AsyncIterator[UnixServer]:
    """Serve admitted peers with a greeting."""

    async def handler(conn: UnixConnection) -> None:
        await conn.send_all(b"hello")

    async with trio.open_nursery() as nursery:
        yield await nursery.start(partial(serve_unix, handler, path, policy=policy, mode=0o666))
        nursery.cancel_scope.cancel()


@as_root
@pytest.mark.parametrize(
    ("policy", "admitted"),
    [
        (PeerPolicy(uids=[OTHER_UID]), True),
        (PeerPolicy(uids=[OTHER_UID + 1]), False),
        (PeerPolicy.same_user(), False),
        (PeerPolicy.root(), False),
        (PeerPolicy(users=["root"]), False),
        (PeerPolicy(gids=[GROUP]), True),
        (PeerPolicy(gids=[4712]), True),
        (PeerPolicy(gids=[0]), False),
        (PeerPolicy(gids=[OTHER_UID]), False),
        (PeerPolicy(uids=[OTHER_UID]) & PeerPolicy(gids=[4711]), True),
        (PeerPolicy(uids=[OTHER_UID]) & PeerPolicy(gids=[4713]), False),
        (PeerPolicy.root() | PeerPolicy(gids=[4711]), True),
    ],
    ids=repr,
)
async def test_policy_of_another_user(path: Path, policy: PeerPolicy, *, admitted: bool) -> None:
    """Another user is admitted by its own id and groups only."""
    async with (
        accepting(path, policy) as server,
        client_process(path, uid=OTHER_UID, gid=GROUP, groups=[4711, 4712]) as client,
    ):
        assert await client.ask("receive") == ("hello" if admitted else "end")
        await until(lambda: server.connections == 0)
        assert server.denied == (not admitted)


@as_root
async def test_policy_of_root_and_mode(path: Path) -> None:
    """Root is admitted as root; a path with mode 0o600 rejects others before a policy."""
    async with accepting(path, PeerPolicy.root()), client_process(path) as client:
        assert await client.ask("receive") == "hello"
    async with (
        await open_unix_listener(path, policy=PeerPolicy(uids=[OTHER_UID])),
        client_process(path, uid=OTHER_UID, gid=GROUP, groups=[]) as client,
    ):
        assert client.first_line == "PermissionError"


@as_root
async def test_policy_denies_a_client_that_has_sent(path: Path) -> None:
    """A denied client that has sent something gets a reset, or the end of the stream."""
    async with (
        await open_unix_listener(path, policy=PeerPolicy.root(), mode=0o666) as listener,
        client_process(path, uid=OTHER_UID, gid=GROUP, groups=[]) as client,
    ):
        assert await client.ask("send secret") == "6"
        await accept_all(listener)
        assert listener.denied == 1
        assert await client.ask("receive") in {"reset", "end"}


################################################################
# User namespaces
################################################################


@user_namespaces
@as_root
async def test_policy_in_a_user_namespace_rejects_overflow_id(path: Path) -> None:
    """A user from outside of the namespace is reported as 65534, which no policy admits."""
    async with reporting_process("accept", path, under=unshared("-Ur")) as process:
        assert await PeerProcess(process).read_line() == "listening"
        async with client_process(path, uid=OTHER_UID, gid=OTHER_UID, groups=[]):
            report = await report_of(process)
    assert report["ids"][1:] == [65534, 65534]
    assert report["admitted"] == []


@user_namespaces
async def test_policy_in_a_user_namespace_admits_mapped_user(path: Path) -> None:
    """The user that a namespace maps to 0 is user 0 for its policies."""
    async with reporting_process("accept", path, under=unshared("-Ur")) as process:
        assert await PeerProcess(process).read_line() == "listening"
        async with client_process(path):
            report = await report_of(process)
    assert report["ids"][1:] == [0, 0]
    assert report["admitted"] == ["uids 0", "gids 0"]


@user_namespaces
async def test_policy_in_a_user_namespace_without_map(path: Path) -> None:
    """Without a map every user is reported as 65534, even the own one, and none is admitted."""
    async with (
        await open_unix_listener(path, mode=0o666) as listener,
        reporting_process("connect", path, under=unshared("-U")) as process,
        await listener.accept(),
    ):
        report = await report_of(process)
    assert report["ids"][1:] == [65534, 65534]
    assert report["admitted"] == []


NO_PROC = "mount -t tmpfs none /proc && "


@user_namespaces
@mount_namespaces
@as_root
@pytest.mark.parametrize(
    ("under", "reported", "admitted"),
    [
        ([*unshared("-m", then=NO_PROC), "unshare", "-U"], 65534, []),
        (unshared("-Urm", then=NO_PROC), 0, ["uids 0", "gids 0"]),
    ],
    ids=["unmapped", "mapped"],
)
async def test_policy_in_a_user_namespace_without_proc(
    path: Path, under: list[str], reported: int, admitted: list[str]
) -> None:
    """If the map cannot be read, no policy admits 65534; other ids are known nevertheless."""
    async with (
        await open_unix_listener(path, mode=0o666) as listener,
        reporting_process("connect", path, under=under) as process,
        await listener.accept(),
    ):
        report = await report_of(process)
    assert report["ids"][1:] == [reported, reported]
    assert report["admitted"] == admitted


WHOLE = "         0          0 4294967295\n"
CONTAINER = "         0     100000      65536\n"
OWN = "      1000          0          1\n"


@pytest.mark.parametrize(
    ("mapped", "own", "others"),
    [
        (WHOLE, [0, 1000, 65534, 2**32 - 2], []),
        (CONTAINER, [0, 1000, 65533, 65535], [65534, 65536, -1]),
        (OWN, [1000], [0, 999, 1001, 65534]),
        ("", [], [0, 1000, 65534]),
        (OWN + "     65530     165530         10\n", [1000, 65530, 65533, 65539], [65534, 65540]),
        (None, [0, 1000, 65533, 2**32 - 2], [65534, -1]),
    ],
)
def test_is_mapped(tmp_path: Path, mapped: str | None, own: list[int], others: list[int]) -> None:
    """An id is own if the map has it; the overflow id never is, unless all ids are mapped."""
    ids, overflow = tmp_path / "uid_map", tmp_path / "overflowuid"
    if mapped is not None:
        ids.write_text(mapped)
    for _ in range(2):
        # At first without the file of the overflow id, and so with Linux's default.
        for number in (*own, *others):
            assert _kernel._is_mapped(number, str(ids), str(overflow)) is (number in own), number
        overflow.write_text("65534\n")


def test_is_mapped_with_another_overflow_id(tmp_path: Path) -> None:
    """The overflow id is the one that the system is configured with."""
    ids, overflow = tmp_path / "uid_map", tmp_path / "overflowuid"
    ids.write_text(CONTAINER)
    overflow.write_text("99\n")
    mapped = [n for n in (98, 99, 65534) if _kernel._is_mapped(n, str(ids), str(overflow))]
    assert mapped == [98, 65534]


def test_is_mapped_on_other_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems without user namespaces have no overflow id."""
    monkeypatch.setattr(sys, "platform", "freebsd14")
    missing = str(tmp_path / "missing")
    assert _kernel._is_mapped(65534, missing, missing)


################################################################
# The client's side
################################################################


async def test_open_unix_connection_policy_denies(path: Path) -> None:
    """A client's policy is asked before anything is sent; the server gets the end of the stream."""
    async with await open_unix_listener(path) as listener:
        with (
            pytest.raises(PeerDeniedError, match="is not admitted by PeerPolicy") as caught,
            assert_checkpoints(),
        ):
            await open_unix_connection(path, policy=DENY_ALL)
        assert isinstance(caught.value, PermissionError)
        assert caught.value.errno == errno.EACCES
        assert caught.value.code is IOErrorEnum.PERMISSION_DENIED
        assert caught.value.filename == str(path)
        assert f"pid {os.getpid()} uid {os.geteuid()}" in str(caught.value)
        async with await listener.accept() as conn:
            assert await conn.receive_some() == b""


async def test_open_unix_connection_policy_admits(path: Path) -> None:
    """A client's policy that admits the server returns a connection to it."""
    asked: list[PeerIdentity] = []
    policy = PeerPolicy.same_user() & PeerPolicy(check=answering(True, asked))
    async with (
        await open_unix_listener(path) as listener,
        await open_unix_connection(path, policy=policy) as client,
        await listener.accept() as server,
    ):
        await client.send_all(b"x")
        assert await server.receive_some() == b"x"
        assert [peer.credentials for peer in asked] == [Credentials()]


################################################################
# Checks that cannot be asked, and peers that cannot be looked at
################################################################


async def takes_two(peer: PeerIdentity, other: object) -> bool:
    return True


async def takes_none() -> bool:
    return True


async def yields(peer: PeerIdentity) -> AsyncIterator[bool]:
    yield True


def is_sync(peer: PeerIdentity) -> bool:
    return True


class NotAsync:
    def __call__(self, peer: PeerIdentity) -> bool:
        return True

    def check(self, peer: PeerIdentity) -> bool:
        return True


class ReturnsCoroutine:
    def __call__(self, peer: PeerIdentity) -> Any:
        return is_fine(peer)


class TakesNone:
    async def __call__(self) -> bool:
        return True


class Yields:
    async def __call__(self, peer: PeerIdentity) -> AsyncIterator[bool]:
        yield True


@pytest.mark.parametrize(
    "check",
    [
        NotAsync(),
        NotAsync().__call__,
        NotAsync().check,
        partial(NotAsync()),
        types.MethodType(NotAsync(), identity()),
        NotAsync,
        partial(NotAsync),
        ReturnsCoroutine(),
        TakesNone(),
        Yields(),
        operator.methodcaller("check_me"),
        unittest.mock.Mock(return_value=True),
        takes_two,
        takes_none,
        yields,
        is_sync,
        lambda peer: "python" in peer.exe,
        lambda peer: is_fine(peer),  # noqa: PLW0108 - not async, although it returns a coroutine
        partial(is_sync),
        partial(is_fine, identity()),
        "text".startswith,
    ],
    ids=map(str, itertools.count()),
)
def test_policy_rejects_check(check: Any) -> None:
    """A check that is not async, or not a function of one argument, is rejected at once."""
    with pytest.raises(TypeError, match="check must be an async function of one argument"):
        PeerPolicy(check=check)


async def test_policy_accepts_check() -> None:
    """Methods, partial functions, decorated functions and objects are checks if they are async."""

    class Database:
        async def check(self, peer: PeerIdentity) -> bool:
            return True

        @classmethod
        async def check_class(cls, peer: PeerIdentity) -> bool:
            return peer.credentials.uid == 1000

    def plain(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return function(*args)

        return wrapper

    @functools.wraps(is_sync)
    async def async_wrapper(peer: PeerIdentity) -> bool:
        return is_sync(peer)

    class Decorated:
        @plain
        async def __call__(self, peer: PeerIdentity) -> bool:
            return True

    async def takes_checker(_: object, peer: PeerIdentity) -> bool:
        return is_sync(peer)

    database = Database()
    for check in (
        database.check,
        Database.check_class,
        partial(takes_two, other=1),
        partial(partial(database.check)),
        Checker(),
        Checker().__call__,
        partial(Checker()),
        plain(is_fine),
        async_wrapper,
        Decorated(),
        types.MethodType(takes_checker, database),
        unittest.mock.AsyncMock(return_value=True),
    ):
        is_checker = "Checker" in repr(check)
        assert await PeerPolicy(check=check).admits(identity(1 if is_checker else 1000))


def test_policy_rejects_check_that_wraps_itself() -> None:
    """A decorated function that refers to itself does not hang the policy."""

    def wrapper(peer: PeerIdentity) -> bool:
        return True

    wrapper.__wrapped__ = wrapper  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="is not async; if it returns an awaitable, call it from"):
        PeerPolicy(check=wrapper)  # type: ignore[arg-type]


UNKNOWN = [
    PeerGoneError(errno.ESRCH, "has exited"),
    PermissionError(errno.EACCES, "is hidden"),
    NotSupportedError("no pidfd"),
]


@pytest.mark.parametrize("error", UNKNOWN, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("in_nursery", [False, True])
async def test_policy_check_of_unknown_peer_denies(
    path: Path, caplog: pytest.LogCaptureFixture, error: Exception, *, in_nursery: bool
) -> None:
    """A check that cannot look at its peer denies it, with the reason in the log."""

    async def fail() -> None:
        raise error

    async def check(_: PeerIdentity) -> bool:
        if in_nursery:
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                nursery.start_soon(fail)
        raise error

    policy = PeerPolicy(check=check)
    assert not await policy.admits(identity())
    assert await (policy | PeerPolicy(uids=[1000])).admits(identity())
    assert not await (policy & PeerPolicy(uids=[1000])).admits(identity())
    async with accepting(path, policy) as server:
        for _ in range(2):
            async with await open_unix_connection(path) as client:
                assert await client.receive_some() == b""
        await until(lambda: server.connections == 0)
        assert (server.accepted, server.denied, server.crashed) == (2, 2, 0)
        with pytest.raises(PeerDeniedError, match=str(error.args[-1])):
            await open_unix_connection(path, policy=policy)
    assert all(f"({error})" in record.getMessage() for record in caplog.records)


async def test_policy_check_of_unknown_peer_and_another_error() -> None:
    """If a check fails for another reason at the same time, that is raised."""

    async def check(_: PeerIdentity) -> bool:
        raise ExceptionGroup("both", [UNKNOWN[0], ZeroDivisionError()])

    with pytest.raises(ExceptionGroup):
        await PeerPolicy(check=check).admits(identity())

    async def crash(_: PeerIdentity) -> bool:
        raise ExceptionGroup("one", [ZeroDivisionError()])

    with pytest.raises(ExceptionGroup):
        await PeerPolicy(check=crash).admits(identity())


@peer_pidfds
async def test_policy_check_of_a_peer_that_exits(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that exits early is denied, and does not end the server."""

    async def is_python(peer: PeerIdentity) -> bool:
        await exited.wait()
        return "python" in await peer.read_exe()

    exited = trio.Event()
    async with accepting(path, PeerPolicy(check=is_python)) as server:
        async with client_process(path) as client:
            await client.end()
            client.reap()
            exited.set()
            await until(lambda: server.denied == 1)
        async with await open_unix_connection(path) as other:
            assert await other.receive_some() == b"hello"
    (record,) = caplog.records
    assert f"denied pid {client.pid}" in record.getMessage()
    assert "(the peer has exited" in str(record.getMessage()).replace("[Errno 3] ", "")


async def test_policy_asks_for_what_it_needs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups and label are system calls that a policy of users does not make."""
    groups = counted(monkeypatch, _identity, "get_peer_groups")
    labels = counted(monkeypatch, _identity, "get_peer_security_context")
    async with await open_unix_listener(path) as listener:
        for policy, asked in (
            (PeerPolicy.same_user(), (0, 0)),
            (PeerPolicy(gids=[os.getegid()]) & PeerPolicy.same_user(), (1, 0)),
            (PeerPolicy(check=is_fine), (1, 1)),
            (PeerPolicy(uids=[OTHER_UID]) | PeerPolicy(check=is_fine), (1, 1)),
        ):
            groups.clear()
            labels.clear()
            listener._policy = policy
            async with await open_unix_connection(path), await listener.accept():
                assert (len(groups), len(labels)) == asked


async def test_policy_check_of_a_closed_connection(path: Path) -> None:
    """A connection that is closed while its policy is asked can still be denied."""
    async with await open_unix_listener(path) as listener, await open_unix_connection(path):
        conn = await listener.accept()

        async def closes(_: PeerIdentity) -> bool:
            await conn.aclose()
            return False

        assert not await _policy.admit_or_close(conn, PeerPolicy(check=closes))

        with pytest.raises(ConnectionClosedError):
            await _policy.admit_or_close(conn, PeerPolicy.same_user())


async def test_policy_check_that_waits_for_a_descriptor_of_a_closed_connection(
    path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A connection that is closed while its check waits for a descriptor is not asked about."""

    def fail(_: socket.socket) -> int:
        raise OSError(errno.EMFILE, "none is free")

    monkeypatch.setattr(_identity, "open_peer_pidfd", fail)
    async with (
        await open_unix_listener(path) as listener,
        await open_unix_connection(path),
        trio.open_nursery() as nursery,
    ):
        conn = await listener.accept()

        async def admit() -> None:
            with pytest.raises(ConnectionClosedError):
                await _policy.admit_or_close(conn, PeerPolicy(check=is_fine))

        nursery.start_soon(admit)
        await wait_all_tasks_blocked()
        await conn.aclose()
