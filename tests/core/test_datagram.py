"""UnixDatagramSocket: send_message, receive_message, and open_unix_datagram."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import socket as stdlib_socket
from contextlib import AsyncExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
import trio.lowlevel
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from tests._helpers.users import as_nobody
from trio_unixconn import (
    AddressInUseError,
    Cancellable,
    ConnectionBusyError,
    ConnectionClosedError,
    Credentials,
    Datagram,
    DatagramTruncatedError,
    DescriptorsRefusedError,
    DescriptorsTruncatedError,
    IOErrorEnum,
    NotSupportedError,
    OperationCancelled,
    SendError,
    UnexpectedControlMessageError,
    UnexpectedDescriptorsError,
    UnixDatagramSocket,
    UnixSocketAddress,
    _kernel,
    _sender,
    open_unix_datagram,
    open_unix_listener,
)
from trio_unixconn.testing import limit_descriptors, open_descriptors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trio.testing import MockClock


def same_file(one: int, two: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(two))


def fill(path: Path) -> int:
    """Send until the queue of the receiver is full; return how many datagrams were sent."""
    with stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        count = 0
        while True:
            try:
                sock.sendto(b"%d" % count, os.fspath(path))
            except BlockingIOError:
                return count
            count += 1


async def test_send_message_carries_bytes_fds_and_sender(unix_socket_path: Path) -> None:
    """receive_message returns the bytes, descriptors, sender, credentials and pidfd of one send."""
    async with (
        await open_unix_datagram(unix_socket_path, credentials=True, pidfds=True) as receiver,
        await open_unix_datagram("") as sender,
    ):
        await sender.send_message(b"hello", unix_socket_path, fds=[receiver])
        async with await receiver.receive_message() as message:
            assert message.data == b"hello"
            assert len(message.fds) == 1
            assert same_file(message.fds[0], receiver.socket.fileno())
            assert not os.get_inheritable(message.fds[0])
            assert message.credentials == Credentials(gid=os.getgid(), uid=os.getuid())
            assert message.pidfd is not None
            assert isinstance(message, Datagram)
            assert message.sender == sender.get_local_address()
            assert message.sender.get_is_abstract()
        await receiver.send_message(b"reply", message.sender)
        async with await sender.receive_message() as reply:
            assert reply.data == b"reply"
            assert reply.sender == receiver.get_local_address()
            assert reply.credentials is None


async def test_send_message_sends_credentials_and_fds_without_bytes(
    unix_socket_path: Path,
) -> None:
    """A datagram without bytes arrives, with its descriptors and explicit credentials."""
    async with (
        await open_unix_datagram(unix_socket_path, credentials=True) as receiver,
        await open_unix_datagram() as sender,
    ):
        await sender.send_message(b"", unix_socket_path)
        await sender.send_message(b"", unix_socket_path, fds=[0], credentials=Credentials())
        async with await receiver.receive_message() as message:
            assert (message.data, list(message.fds)) == (b"", [])
            assert message.sender.get_is_anonymous()
        async with await receiver.receive_message() as message:
            assert message.data == b""
            assert same_file(message.fds[0], 0)
            assert message.credentials == Credentials()


async def test_send_message_to_abstract_and_long_names(unix_socket_path: Path) -> None:
    """An abstract name and a path that is too long for an address can be bound and sent to."""
    long = unix_socket_path.parent / ("d" * 60) / ("e" * 60) / "socket"
    long.parent.mkdir(parents=True)
    for name in (f"\0{unix_socket_path}", os.fspath(long)):
        async with await open_unix_datagram(name) as receiver, await open_unix_datagram() as sender:
            await sender.send_message(b"x", name)
            assert (await receiver.receive_message()).data == b"x"
            await sender.send_message(b"y", receiver.get_local_address())
            assert (await receiver.receive_message()).data == b"y"
    assert not long.exists()


async def test_send_message_and_receive_message_are_checkpoints(unix_socket_path: Path) -> None:
    """Both are checkpoints, and so is aclose."""
    receiver, sender = await open_unix_datagram(unix_socket_path), await open_unix_datagram()
    with assert_checkpoints():
        await sender.send_message(b"x", unix_socket_path)
    with assert_checkpoints():
        await receiver.receive_message()
    with assert_checkpoints(), pytest.raises(SendError):
        await sender.send_message(b"x", "/nonexistent")
    for sock in (sender, receiver):
        with assert_checkpoints():
            await sock.aclose()
        with assert_checkpoints():
            await sock.aclose()
    with assert_checkpoints(), pytest.raises(ConnectionClosedError):
        await sender.send_message(b"x", unix_socket_path)
    with assert_checkpoints(), pytest.raises(ConnectionClosedError):
        await receiver.receive_message()


################################################################
# A full queue
################################################################


async def test_send_message_waits_for_full_queue(unix_socket_path: Path) -> None:
    """While the queue of the receiver is full, send_message sleeps; then it sends."""
    async with (
        await open_unix_datagram(unix_socket_path) as receiver,
        await open_unix_datagram() as sender,
    ):
        count = fill(unix_socket_path)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sender.send_message, b"last", unix_socket_path)
                # Would not return if the task retried all the time.
                await wait_all_tasks_blocked()
                found = [(await receiver.receive_message()).data for _ in range(count)]
            found.append((await receiver.receive_message()).data)
        assert found == [*(b"%d" % number for number in range(count)), b"last"]


async def test_send_message_of_many_tasks_to_full_queue(
    unix_socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks that wait for the same receiver send in turn, and try a few times each."""
    attempts = 0
    advance = _sender._DatagramProgress.advance

    def counted(progress: _sender._DatagramProgress, raw: stdlib_socket.socket) -> int:
        nonlocal attempts
        attempts += 1
        return advance(progress, raw)

    monkeypatch.setattr(_sender._DatagramProgress, "advance", counted)
    numbers = range(30)
    async with AsyncExitStack() as stack:
        receiver = await stack.enter_async_context(await open_unix_datagram(unix_socket_path))
        senders = [await stack.enter_async_context(await open_unix_datagram()) for _ in numbers]
        count = fill(unix_socket_path)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for number, sender in zip(numbers, senders, strict=True):
                    nursery.start_soon(sender.send_message, b"n%d" % number, unix_socket_path)
                    await wait_all_tasks_blocked()
                found: list[bytes] = []
                for _ in range(count + len(numbers)):
                    found.append((await receiver.receive_message()).data)
                    await wait_all_tasks_blocked()
        assert found[count:] == [b"n%d" % number for number in numbers]
        assert attempts <= 4 * len(numbers)


async def test_send_message_takes_turns_after_a_failed_probe(
    unix_socket_path: Path, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    """A task that had no descriptor for the probe, and retries, waits for its turn, too."""
    probes: list[stdlib_socket.socket] = []
    open_probe = _sender._open_probe

    def no_probe(_: UnixSocketAddress) -> stdlib_socket.socket:
        raise OSError(errno.EMFILE, "no file descriptor is free")

    def counted(address: UnixSocketAddress) -> stdlib_socket.socket:
        probes.append(open_probe(address))
        return probes[-1]

    async with AsyncExitStack() as stack:
        receiver = await stack.enter_async_context(await open_unix_datagram(unix_socket_path))
        senders = [await stack.enter_async_context(await open_unix_datagram()) for _ in range(3)]
        fill(unix_socket_path)
        async with trio.open_nursery() as nursery:
            monkeypatch.setattr(_sender, "_open_probe", no_probe)
            nursery.start_soon(senders[0].send_message, b"0", unix_socket_path)
            await wait_all_tasks_blocked()
            monkeypatch.setattr(_sender, "_open_probe", counted)
            nursery.start_soon(senders[1].send_message, b"1", unix_socket_path)
            await wait_all_tasks_blocked()
            await receiver.receive_message()
            await wait_all_tasks_blocked()
            nursery.start_soon(senders[2].send_message, b"2", unix_socket_path)
            await wait_all_tasks_blocked()
            mock_clock.jump(_sender.MAX_BACKOFF)
            await wait_all_tasks_blocked()
            assert len(probes) == 2
            assert [probe.fileno() == -1 for probe in probes] == [True, False]
            nursery.cancel_scope.cancel()


async def test_send_message_looks_for_a_new_receiver(
    unix_socket_path: Path, mock_clock: MockClock
) -> None:
    """A send that waits for a receiver goes to the one that has got its path meanwhile."""
    async with (
        await open_unix_datagram(unix_socket_path),
        await open_unix_datagram() as sender,
        trio.open_nursery() as nursery,
    ):
        fill(unix_socket_path)
        nursery.start_soon(sender.send_message, b"x", unix_socket_path)
        await wait_all_tasks_blocked()
        unix_socket_path.unlink()
        async with await open_unix_datagram(unix_socket_path) as receiver:
            mock_clock.jump(_sender.PROBE_TIMEOUT)
            await wait_all_tasks_blocked()
            assert receiver.socket.is_readable()
            assert (await receiver.receive_message()).data == b"x"


async def test_send_message_forgets_the_turns_of_a_receiver(unix_socket_path: Path) -> None:
    """When no task waits for a receiver any more, nothing is kept about it."""
    async with (
        await open_unix_datagram(unix_socket_path),
        await open_unix_datagram() as one,
        await open_unix_datagram() as two,
    ):
        fill(unix_socket_path)
        async with trio.open_nursery() as nursery:
            for sender in (one, two):
                nursery.start_soon(sender.send_message, b"x", unix_socket_path)
            await wait_all_tasks_blocked()
            assert len(_sender._turns.get()) == 1
            nursery.cancel_scope.cancel()
        gc.collect()
        assert not _sender._turns.get()


async def test_send_message_ends_while_it_waits_for_its_turn(unix_socket_path: Path) -> None:
    """A task that waits after another one can be cancelled, its socket closed; others go on."""
    async with AsyncExitStack() as stack:
        receiver = await stack.enter_async_context(await open_unix_datagram(unix_socket_path))
        senders = [await stack.enter_async_context(await open_unix_datagram()) for _ in range(5)]
        count = fill(unix_socket_path)
        cancellable, scope = Cancellable(), trio.CancelScope()
        ends: list[int] = []

        async def send(number: int, error: type[Exception] | None = None) -> None:
            with pytest.raises(error) if error else nullcontext():
                await senders[number].send_message(
                    b"%d" % number,
                    unix_socket_path,
                    cancellable=cancellable if error is OperationCancelled else None,
                )
            ends.append(number)

        async def send_in_scope() -> None:
            with scope:
                await send(3)

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for start in (
                    partial(send, 0, ConnectionClosedError),
                    partial(send, 1, ConnectionClosedError),
                    partial(send, 2, OperationCancelled),
                    send_in_scope,
                    partial(send, 4),
                ):
                    nursery.start_soon(start)
                    await wait_all_tasks_blocked()
                cancellable.cancel()
                scope.cancel()
                # One that waits for its turn, and then the one that has it.
                await senders[1].aclose()
                await senders[0].aclose()
                await wait_all_tasks_blocked()
                assert sorted(ends) == [0, 1, 2]
                for _ in range(count):
                    await receiver.receive_message()
        assert (await receiver.receive_message()).data == b"4"


async def test_send_message_of_many_tasks_to_receiver_that_closes(unix_socket_path: Path) -> None:
    """All tasks that wait for a receiver get an error when it closes its socket."""
    receiver = await open_unix_datagram(unix_socket_path)
    fill(unix_socket_path)

    async def send() -> None:
        async with await open_unix_datagram() as sender:
            with pytest.raises(FileNotFoundError):
                await sender.send_message(b"x", unix_socket_path)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(send)
            await wait_all_tasks_blocked()
            await receiver.aclose()


async def test_send_message_waits_for_own_buffer(unix_socket_path: Path) -> None:
    """Datagrams that wait with several receivers fill the sender's own buffer; it waits."""
    names = [f"{unix_socket_path}{number}" for number in range(8)]
    receivers = [await open_unix_datagram(name) for name in names]
    async with await open_unix_datagram() as sender:
        sent = 0
        with trio.move_on_after(30) as scope:
            async with trio.open_nursery() as nursery:

                async def send_all() -> None:
                    nonlocal sent
                    for name in names:
                        await sender.send_message(b"x" * 50000, name)
                        sent += 1

                nursery.start_soon(send_all)
                await wait_all_tasks_blocked()
                assert 0 < sent < len(names)
                for each in receivers:
                    assert len((await each.receive_message()).data) == 50000
        assert not scope.cancelled_caught
    for each in receivers:
        await each.aclose()


async def test_send_message_waits_without_free_descriptor(unix_socket_path: Path) -> None:
    """Without a descriptor for the probe, send_message retries after a pause."""
    async with (
        await open_unix_datagram(unix_socket_path) as receiver,
        await open_unix_datagram() as sender,
    ):
        fill(unix_socket_path)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                with limit_descriptors(0):
                    nursery.start_soon(sender.send_message, b"last", unix_socket_path)
                    await wait_all_tasks_blocked()
                    await receiver.receive_message()
                    await trio.lowlevel.checkpoint()
        assert sender.socket.fileno() != -1


async def test_send_message_to_long_path_waits_without_free_descriptor(
    unix_socket_path: Path,
) -> None:
    """A path that is too long takes a descriptor for each attempt, and one more for the probe."""
    long = unix_socket_path.parent / ("d" * 60) / ("e" * 60) / "socket"
    long.parent.mkdir(parents=True)
    link = unix_socket_path.parent / "link"
    link.symlink_to(long)
    async with await open_unix_datagram(long) as receiver, await open_unix_datagram() as sender:
        count = fill(link)
        with trio.fail_after(30), limit_descriptors(1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sender.send_message, b"last", long)
                await wait_all_tasks_blocked()
                for _ in range(count):
                    await receiver.receive_message()
        assert (await receiver.receive_message()).data == b"last"


async def test_send_message_fds_may_be_closed_while_it_waits(unix_socket_path: Path) -> None:
    """The caller may close a descriptor while the send waits: a duplicate is sent."""
    async with (
        await open_unix_datagram(unix_socket_path) as receiver,
        await open_unix_datagram() as sender,
    ):
        count = fill(unix_socket_path)
        fd = os.open(os.devnull, os.O_RDONLY)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    await sender.send_message(b"last", unix_socket_path, fds=[fd])

                nursery.start_soon(send)
                await wait_all_tasks_blocked()
                os.close(fd)
                for _ in range(count):
                    await receiver.receive_message()
            async with await receiver.receive_message() as message:
                assert os.readlink(f"/proc/self/fd/{message.fds[0]}") == os.devnull


async def test_send_message_reports_receiver_that_closes(unix_socket_path: Path) -> None:
    """A send that waits for a full queue fails if the receiver closes its socket."""
    receiver = await open_unix_datagram(unix_socket_path)
    async with await open_unix_datagram() as sender:
        fill(unix_socket_path)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    with pytest.raises(FileNotFoundError):
                        await sender.send_message(b"last", unix_socket_path)

                nursery.start_soon(send)
                await wait_all_tasks_blocked()
                await receiver.aclose()


async def test_aclose_wakes_send_message_and_receive_message(unix_socket_path: Path) -> None:
    """Tasks that wait on a socket get ConnectionClosedError when it is closed."""
    async with await open_unix_datagram(unix_socket_path):
        sender = await open_unix_datagram()
        fill(unix_socket_path)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    with pytest.raises(ConnectionClosedError):
                        await sender.send_message(b"last", unix_socket_path)

                async def receive() -> None:
                    with pytest.raises(ConnectionClosedError):
                        await sender.receive_message()

                nursery.start_soon(send)
                nursery.start_soon(receive)
                await wait_all_tasks_blocked()
                await sender.aclose()


async def test_send_message_can_be_cancelled(unix_socket_path: Path) -> None:
    """A Cancellable or a scope ends a send that waits; nothing was sent."""
    async with (
        await open_unix_datagram(unix_socket_path) as receiver,
        await open_unix_datagram() as sender,
    ):
        cancellable = Cancellable()
        count = fill(unix_socket_path)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    with pytest.raises(OperationCancelled) as caught:
                        await sender.send_message(b"x", unix_socket_path, cancellable=cancellable)
                    assert caught.value.sent == 0

                nursery.start_soon(send)
                await wait_all_tasks_blocked()
                cancellable.cancel()
            with pytest.raises(OperationCancelled):
                await sender.send_message(b"x", unix_socket_path, cancellable=cancellable)
            with pytest.raises(OperationCancelled):
                await receiver.receive_message(cancellable=cancellable)
            for _ in range(count):
                await receiver.receive_message()
            with trio.move_on_after(0):
                await receiver.receive_message()


async def test_two_tasks_in_one_direction_are_busy(unix_socket_path: Path) -> None:
    """A second task that sends, or receives, gets ConnectionBusyError."""
    async with (
        await open_unix_datagram(unix_socket_path) as receiver,
        await open_unix_datagram() as sender,
    ):
        fill(unix_socket_path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.send_message, b"x", unix_socket_path)
            nursery.start_soon(sender.receive_message)
            await wait_all_tasks_blocked()
            with pytest.raises(ConnectionBusyError, match="sending on this socket"):
                await sender.send_message(b"y", unix_socket_path)
            with pytest.raises(ConnectionBusyError, match="receiving from this socket"):
                await sender.receive_message()
            nursery.cancel_scope.cancel()
        assert receiver.socket.fileno() != -1


################################################################
# Errors
################################################################


async def test_send_message_says_who_the_receiver_is_not(unix_socket_path: Path) -> None:
    """A receiver that is not there, or is something else, is an error that says what is there."""
    directory = unix_socket_path.parent
    (directory / "file").write_bytes(b"")
    listener = await open_unix_listener(directory / "stream")
    dead = stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_DGRAM)
    dead.bind(os.fspath(directory / "dead"))
    dead.close()
    cases: list[tuple[str, type[OSError], int, IOErrorEnum, str]] = [
        ("none", FileNotFoundError, errno.ENOENT, IOErrorEnum.NOT_FOUND, "no such socket"),
        ("no/ne", FileNotFoundError, errno.ENOENT, IOErrorEnum.NOT_FOUND, "directory"),
        ("file/x", SendError, errno.ENOTDIR, IOErrorEnum.NOT_DIRECTORY, "not a directory"),
        (
            "file",
            ConnectionRefusedError,
            errno.ECONNREFUSED,
            IOErrorEnum.CONNECTION_REFUSED,
            "not a socket",
        ),
        ("stream", SendError, errno.EPROTOTYPE, IOErrorEnum.FAILED, "not a datagram socket"),
        (
            "dead",
            ConnectionRefusedError,
            errno.ECONNREFUSED,
            IOErrorEnum.CONNECTION_REFUSED,
            "no process has this datagram socket open",
        ),
        (
            "n" * 300,
            SendError,
            errno.ENAMETOOLONG,
            IOErrorEnum.FILENAME_TOO_LONG,
            "choose a shorter path",
        ),
    ]
    async with await open_unix_datagram() as sender, listener:
        for name, kind, number, code, text in cases:
            with pytest.raises(kind, match=text) as caught:
                await sender.send_message(
                    b"x", directory / name, fds=[0], credentials=Credentials()
                )
            assert isinstance(caught.value, SendError)
            assert (caught.value.errno, caught.value.code) == (number, code), name
            assert caught.value.sent == 0
            assert caught.value.filename == os.fspath(directory / name)


async def test_send_message_to_abstract_name_without_receiver() -> None:
    """An abstract name that no process has is refused; a name that is too long names the limit."""
    async with await open_unix_datagram() as sender:
        with pytest.raises(ConnectionRefusedError, match="ss -xa") as caught:
            await sender.send_message(b"x", "\0no such name of a test")
        assert caught.value.filename == "@no such name of a test"
        with pytest.raises(SendError, match="at most 107 bytes"):
            await sender.send_message(b"x", "\0" + "n" * 200)


async def test_send_message_needs_write_permission(unix_socket_path: Path) -> None:
    """A receiver of another user is a PermissionError with its owner and mode."""
    async with await open_unix_datagram(unix_socket_path), await open_unix_datagram() as sender:
        with as_nobody(unix_socket_path.parent), pytest.raises(PermissionError, match="mode 600"):
            await sender.send_message(b"x", unix_socket_path)


async def test_send_message_to_connected_receiver(unix_socket_path: Path) -> None:
    """A receiver that is connected to another socket takes nothing from others: EPERM says so."""
    for name in (os.fspath(unix_socket_path), f"\0{unix_socket_path}"):
        with (
            stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_DGRAM) as one,
            stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_DGRAM) as two,
        ):
            one.bind(name)
            two.bind(f"{name}2")
            one.connect(f"{name}2")
            async with await open_unix_datagram() as sender:
                with pytest.raises(SendError, match="is connected") as caught:
                    await sender.send_message(b"x", name)
                assert caught.value.errno == errno.EPERM
                with pytest.raises(SendError) as caught:
                    await sender.send_message(b"x", name, fds=[0])
                assert caught.value.errno == errno.EPERM


async def test_send_message_names_size_that_is_too_large(unix_socket_path: Path) -> None:
    """EMSGSIZE names the size of the datagram and of the buffer, and the remedy."""
    async with (
        await open_unix_datagram(unix_socket_path) as receiver,
        await open_unix_datagram() as sender,
    ):
        with pytest.raises(SendError, match=r"10000000 bytes.*SO_SNDBUF is .*memfd") as caught:
            await sender.send_message(bytes(10_000_000), unix_socket_path)
        assert caught.value.code == IOErrorEnum.MESSAGE_TOO_LARGE
        with pytest.raises(SendError, match="10000000 bytes"):
            await receiver.send_message(bytes(10_000_000), unix_socket_path)


async def test_send_message_on_connected_socket() -> None:
    """A connected socket sends without an address, until its peer closes; others need one."""
    one, two = stdlib_socket.socketpair(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_DGRAM)
    async with UnixDatagramSocket.from_stdlib_socket(one) as sender:
        async with UnixDatagramSocket.from_stdlib_socket(two) as receiver:
            await sender.send_message(b"x")
            assert (await receiver.receive_message()).data == b"x"
            with trio.fail_after(30):
                async with trio.open_nursery() as nursery:

                    async def send() -> None:
                        for _ in range(1000):
                            await sender.send_message(b"y")

                    nursery.start_soon(send)
                    await wait_all_tasks_blocked()
                    for _ in range(1000):
                        await receiver.receive_message()
        with pytest.raises(ConnectionRefusedError, match="closed"):
            await sender.send_message(b"x")
        with pytest.raises(SendError, match="descriptor to send is closed"):
            await sender.send_message(b"x", fds=[2**20])
    async with await open_unix_datagram() as sender:
        with pytest.raises(SendError, match="pass to=ADDRESS") as caught:
            await sender.send_message(b"x")
        assert caught.value.code == IOErrorEnum.NOT_CONNECTED


async def test_send_message_checks_arguments() -> None:
    """Wrong arguments raise before anything happens."""
    async with await open_unix_datagram() as sender:
        with pytest.raises(TypeError, match="to must be"):
            await sender.send_message(b"x", 3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="anonymous"):
            await sender.send_message(b"x", UnixSocketAddress())
        with pytest.raises(TypeError, match="credentials must be"):
            await sender.send_message(b"x", "/x", credentials="own")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="253"):
            await sender.send_message(b"x", "/x", fds=[0] * 254)
        with pytest.raises(TypeError, match="data must be"):
            await sender.send_message("x", "/x")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="max_bytes"):
            await sender.receive_message(0)
        for max_fds in (-1, 254):
            with pytest.raises(ValueError, match="max_fds"):
                await sender.receive_message(max_fds=max_fds)


async def test_receive_message_reports_truncated_datagram(unix_socket_path: Path) -> None:
    """A datagram that is too large is an error with its size; its descriptors are closed."""
    async with (
        await open_unix_datagram(unix_socket_path, credentials=True) as receiver,
        await open_unix_datagram("") as sender,
    ):
        await sender.send_message(b"0123456789" * 20, unix_socket_path, fds=[0, 1])
        await sender.send_message(b"exact", unix_socket_path)
        await sender.send_message(b"next", unix_socket_path)
        before = open_descriptors()
        with pytest.raises(DatagramTruncatedError, match="at most 10 bytes, got 200") as caught:
            await receiver.receive_message(10)
        error = caught.value
        assert (error.data, error.size) == (b"0123456789", 200)
        assert error.sender == sender.get_local_address()
        assert error.credentials == Credentials(uid=os.getuid(), gid=os.getgid())
        assert (error.errno, error.code) == (errno.EMSGSIZE, IOErrorEnum.MESSAGE_TOO_LARGE)
        copy = pickle.loads(pickle.dumps(error))
        assert (copy.data, copy.size, copy.sender) == (error.data, 200, error.sender)
        assert open_descriptors() == before
        assert (await receiver.receive_message(5)).data == b"exact"
        assert (await receiver.receive_message(1000)).data == b"next"


async def test_receive_message_rejects_descriptors(
    unix_socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More descriptors than max_fds, or any with receive_descriptors=False, are closed."""
    async with await open_unix_datagram() as sender:
        async with await open_unix_datagram(unix_socket_path) as receiver:
            await sender.send_message(b"x", unix_socket_path, fds=[0, 1])
            with pytest.raises(
                UnexpectedControlMessageError, match=r"at most 1.* the socket is still usable"
            ):
                await receiver.receive_message(max_fds=1)
            await sender.send_message(b"x", unix_socket_path, fds=[0, 1, 2])
            with limit_descriptors(1), pytest.raises(DescriptorsTruncatedError) as caught:
                await receiver.receive_message()
            assert caught.value.data == b"x"
        async with await open_unix_datagram(
            unix_socket_path, receive_descriptors=False
        ) as receiver:
            with pytest.raises(DescriptorsRefusedError):
                await sender.send_message(b"x", unix_socket_path, fds=[0])
        monkeypatch.setattr(_kernel, "SO_PASSRIGHTS", None)
        async with await open_unix_datagram(
            unix_socket_path, receive_descriptors=False
        ) as receiver:
            await sender.send_message(b"x", unix_socket_path, fds=[0])
            with pytest.raises(UnexpectedDescriptorsError):
                await receiver.receive_message()
            await sender.send_message(b"y", unix_socket_path)
            assert (await receiver.receive_message()).data == b"y"


################################################################
# Opening and closing
################################################################


async def test_open_unix_datagram_takes_the_path_as_a_listener_does(
    unix_socket_path: Path,
) -> None:
    """A live receiver keeps its path, unless replace=True; a dead socket is replaced."""
    async with await open_unix_datagram(unix_socket_path, mode=0o640) as first:
        assert unix_socket_path.stat().st_mode & 0o777 == 0o640
        assert first.get_local_address() == UnixSocketAddress.path(unix_socket_path)
        with pytest.raises(AddressInUseError, match="datagrams"):
            await open_unix_datagram(unix_socket_path)
        with pytest.raises(AddressInUseError, match="datagrams"):
            await open_unix_listener(unix_socket_path)
        async with (
            await open_unix_datagram(unix_socket_path, replace=True, unlink_on_close=False) as new,
            await open_unix_datagram() as sender,
        ):
            await sender.send_message(b"x", unix_socket_path)
            assert (await new.receive_message()).data == b"x"
    # The first one does not remove the path of the second one.
    assert unix_socket_path.is_socket()
    async with await open_unix_datagram(unix_socket_path):
        pass
    assert not unix_socket_path.exists()
    unix_socket_path.write_bytes(b"")
    with pytest.raises(AddressInUseError, match="not a socket"):
        await open_unix_datagram(unix_socket_path)


async def test_open_unix_datagram_checks_arguments(unix_socket_path: Path) -> None:
    """Wrong arguments raise before anything happens; a bind error closes the socket."""
    with pytest.raises(TypeError, match="path must be"):
        await open_unix_datagram(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode must be"):
        await open_unix_datagram(unix_socket_path, mode=0o10000)
    with pytest.raises(FileNotFoundError):
        await open_unix_datagram(unix_socket_path / "x")
    async with await open_unix_datagram(f"\0{unix_socket_path}"):
        with pytest.raises(AddressInUseError):
            await open_unix_datagram(f"\0{unix_socket_path}")


def listening() -> stdlib_socket.socket:
    return stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_STREAM)


def closed() -> stdlib_socket.socket:
    sock = stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_DGRAM)
    sock.close()
    return sock


def udp() -> stdlib_socket.socket:
    return stdlib_socket.socket(stdlib_socket.AF_INET, stdlib_socket.SOCK_DGRAM)


@pytest.mark.parametrize("make", [listening, closed, udp])
async def test_from_stdlib_socket_rejects_other_sockets(
    make: Callable[[], stdlib_socket.socket],
) -> None:
    """Only an open Unix datagram socket is taken; others stay the caller's, as they were."""
    with make() as sock:
        blocking = sock.gettimeout()
        with pytest.raises(ValueError, match="expected a Unix datagram socket"):
            UnixDatagramSocket.from_stdlib_socket(sock)
        assert sock.gettimeout() == blocking
    with pytest.raises(TypeError, match=r"socket\.socket"):
        UnixDatagramSocket.from_stdlib_socket(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="trio socket"):
        UnixDatagramSocket(3)  # type: ignore[arg-type]


async def test_from_fd_takes_an_inherited_socket(unix_socket_path: Path) -> None:
    """from_fd owns the descriptor of a Unix datagram socket; closing leaves the path."""
    sock = stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_DGRAM)
    sock.bind(os.fspath(unix_socket_path))
    fd = sock.detach()
    os.set_inheritable(fd, True)
    async with UnixDatagramSocket.from_fd(fd) as receiver, await open_unix_datagram() as sender:
        assert not os.get_inheritable(fd)
        await sender.send_message(b"x", unix_socket_path)
        assert (await receiver.receive_message()).data == b"x"
    assert unix_socket_path.is_socket()
    with pytest.raises(ValueError, match="expected a Unix datagram socket"):
        UnixDatagramSocket.from_fd(0)


async def test_aclose_closes_descriptors_in_the_queue(unix_socket_path: Path) -> None:
    """Descriptors of datagrams that no task received are closed, even of those without bytes."""
    read, write = os.pipe()
    async with await open_unix_datagram() as sender:
        receiver = await open_unix_datagram(unix_socket_path)
        await sender.send_message(b"", unix_socket_path, fds=[write])
        os.close(write)
        await receiver.aclose()
        with trio.fail_after(30):
            await trio.lowlevel.wait_readable(read)
        assert os.read(read, 1) == b""
        os.close(read)
        async with await open_unix_datagram(unix_socket_path):
            pass
    assert receiver.is_closed()
    assert repr(receiver) == "<UnixDatagramSocket closed>"
    with pytest.raises(ConnectionClosedError):
        receiver.get_local_address()


async def test_aclose_by_two_tasks_removes_the_path_first(unix_socket_path: Path) -> None:
    """If two tasks close a socket, both return after it is closed, and its path is gone."""
    receiver = await open_unix_datagram(unix_socket_path)

    async def close() -> None:
        await receiver.aclose()
        assert receiver.is_closed()
        assert not unix_socket_path.exists()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(close)
        nursery.start_soon(close)


async def test_repr_names_address(unix_socket_path: Path) -> None:
    """The repr has the descriptor and the name."""
    async with await open_unix_datagram(unix_socket_path) as receiver:
        assert repr(receiver) == (
            f"<UnixDatagramSocket fd={receiver.socket.fileno()} {unix_socket_path}>"
        )
        assert not receiver.is_closed()


async def test_dropped_socket_is_closed_with_a_warning(unix_socket_path: Path) -> None:
    """A socket that is garbage collected with something unread is closed by the closing thread."""
    async with await open_unix_datagram() as sender:
        receiver = await open_unix_datagram(unix_socket_path, unlink_on_close=False)
        await sender.send_message(b"", unix_socket_path, fds=[0])
        receivers = [receiver]
        del receiver
        with pytest.warns(ResourceWarning, match="unclosed"):
            receivers.clear()


async def test_receive_message_skips_lost_pidfd(unix_socket_path: Path) -> None:
    """Without a free descriptor for the pidfd, the datagram arrives without one."""
    async with (
        await open_unix_datagram(unix_socket_path, credentials=True, pidfds=True) as receiver,
        await open_unix_datagram() as sender,
    ):
        await sender.send_message(b"x", unix_socket_path)
        with limit_descriptors(0):
            message = await receiver.receive_message()
        assert (message.data, message.pidfd) == (b"x", None)
        assert message.credentials is not None


def test_send_error_has_the_class_of_its_errno() -> None:
    """A SendError is also the subclass of OSError that belongs to its errno."""
    for number in (errno.EPERM, errno.EACCES, errno.ESRCH, errno.ECONNREFUSED, errno.ENOENT):
        assert isinstance(SendError(number, "x"), type(OSError(number, "x")))


def test_open_unix_datagram_without_sendmsg(monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform whose Python has no sendmsg has no datagrams."""
    one, two = stdlib_socket.socketpair(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_DGRAM)
    monkeypatch.setattr(_kernel, "HAS_SENDMSG", False)
    with one, two, pytest.raises(NotSupportedError, match="sendmsg"):
        UnixDatagramSocket.from_stdlib_socket(one)
