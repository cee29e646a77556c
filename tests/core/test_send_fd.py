"""send_fd and receive_fd, between processes."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import tempfile
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests._helpers.fds import clog, free_descriptors, look, unclog
from tests._helpers.peers import stdlib_peer
from tests._helpers.programs.stdlib_peer import open_kind
from trio_unixconn import (
    DescriptorsRefusedError,
    DescriptorsTruncatedError,
    EndOfStreamError,
    UnexpectedControlMessageError,
    UnexpectedDescriptorsError,
    connection_pair,
)

KINDS = ["file", "pipe", "tcp", "unix", "listening", "memfd", "pidfd", "epoll"]


@pytest.mark.parametrize("kind", KINDS)
async def test_send_fd_every_kind(kind: str) -> None:
    """The peer gets the same open file, with exactly one NUL byte and one control message."""
    opened = open_kind(kind)
    async with stdlib_peer() as peer:
        assert await peer.conn.send_fd(opened[0]) is True
        ours = look(opened[0])
        for fd in opened:
            os.close(fd)
        got = await peer.ask("receive")
        assert got["fds"] == [ours]
        assert (got["data"], got["messages"], got["credentials"]) == ("00", 1, [])


@pytest.mark.parametrize("kind", KINDS)
async def test_receive_fd_every_kind(kind: str) -> None:
    """We get the same open file, close-on-exec."""
    async with stdlib_peer() as peer:
        (theirs,) = await peer.ask("send", kinds=[[kind]])
        fd = await peer.conn.receive_fd()
        try:
            assert not os.get_inheritable(fd)
            ours = look(fd)
            # The link of a pidfd names no process, and one of an epoll no instance.
            assert (ours["link"], ours["identity"]) == (theirs["link"], theirs["identity"])
        finally:
            os.close(fd)


async def test_send_fd_of_an_unnamed_file() -> None:
    """The peer reads a file that has no name to its end through what it received."""
    with tempfile.TemporaryFile() as file:
        file.write(b"content")
        file.seek(0)
        async with stdlib_peer() as peer:
            await peer.conn.send_fd(file)
            assert bytes.fromhex(await peer.ask("read_behind")) == b"content"


async def test_send_fd_of_objects_with_fileno() -> None:
    """Files, sockets, trio's sockets and trio's files can be sent as they are."""
    one, two = connection_pair()
    async with one, two:
        with open(os.devnull) as file, socket.socket() as sock:
            for each in (file, sock, trio.socket.from_stdlib_socket(sock), trio.wrap_file(file)):
                await one.send_fd(each)
                fd = await two.receive_fd()
                assert os.path.sameopenfile(fd, each.fileno())
                os.close(fd)


class Liar:
    """Something whose fileno() returns what it was told to."""

    def __init__(self, number: Any) -> None:
        self.number = number

    def fileno(self) -> Any:
        return self.number


def closed_file() -> Any:
    file = open(os.devnull)  # noqa: SIM115
    file.close()
    return file


def closed_socket() -> socket.socket:
    sock = socket.socket()
    sock.close()
    return sock


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        (-1, ValueError, "cannot be a negative integer (-1)"),
        (2**31, ValueError, "out of range (2147483648)"),
        (True, TypeError, "got bool"),
        (False, TypeError, "got bool"),
        (1.0, TypeError, "got float"),
        ("1", TypeError, "got str"),
        (b"1", TypeError, "got bytes"),
        (None, TypeError, "got NoneType"),
        (object(), TypeError, "got object"),
        (Liar("3"), TypeError, "got str from fileno() of Liar"),
        (Liar(True), TypeError, "got bool from fileno() of Liar"),
        (Liar(-1), ValueError, "it is closed"),
        (closed_file(), ValueError, "closed file"),
        (closed_socket(), ValueError, "it is closed"),
    ],
)
async def test_send_fd_rejects_other_objects(bad: Any, error: type[Exception], text: str) -> None:
    """What is not a file descriptor raises before anything is sent."""
    one, two = connection_pair()
    async with one, two:
        with pytest.raises(error, match=text.replace("(", r"\(").replace(")", r"\)")):
            await one.send_fd(bad)
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


async def test_send_fd_rejects_closed_fd() -> None:
    """A closed file descriptor is EBADF, nothing is sent, and the connection is usable."""
    one, two = connection_pair()
    async with one, two:
        fd = os.open(os.devnull, os.O_RDONLY)
        os.close(fd)
        with pytest.raises(
            OSError, match="a file descriptor to send is closed; nothing was sent"
        ) as caught:
            await one.send_fd(fd)
        assert caught.value.errno == errno.EBADF
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


async def test_receive_some_around_receive_fd() -> None:
    """Bytes before, between and after descriptors arrive in order, each in its own read."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[], data=b"before".hex())
        await peer.ask("send", kinds=[["file"]])
        await peer.ask("send", kinds=[], data=b"between".hex())
        await peer.ask("send", kinds=[["pipe"]], data=b"xy".hex())
        await peer.ask("send", kinds=[], data=b"after".hex())
        assert await peer.conn.receive_some(6) == b"before"
        os.close(await peer.conn.receive_fd())
        assert await peer.conn.receive_some(7) == b"between"
        os.close(await peer.conn.receive_fd())
        assert await peer.conn.receive_some() == b"yafter"


async def test_send_fd_a_thousand_in_a_row() -> None:
    """Many file descriptors arrive in the order in which they were sent."""
    one, two = connection_pair()
    count = 1000
    got: list[int] = []

    async def send() -> None:
        for number in range(count):
            fd = os.memfd_create("m")
            os.ftruncate(fd, number)
            await one.send_fd(fd)
            os.close(fd)

    async with one, two, trio.open_nursery() as nursery:
        nursery.start_soon(send)
        for _ in range(count):
            fd = await two.receive_fd()
            got.append(os.fstat(fd).st_size)
            os.close(fd)
    assert got == list(range(count))


async def test_receive_fd_end_of_stream() -> None:
    """At the end of the stream, receive_fd raises EndOfStreamError, each time."""
    async with stdlib_peer() as peer:
        await peer.ask("eof")
        for passcred in (0, 1):
            peer.conn.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, passcred)
            for receive in (peer.conn.receive_fd, peer.conn.receive_credentials):
                with pytest.raises(EndOfStreamError, match="end of stream while waiting for"):
                    await receive()
            assert await peer.conn.receive_some() == b""
        await peer.conn.send_all(b"xx")
        assert await peer.ask("plain_receive", size=2) == b"xx".hex()


@pytest.mark.parametrize(
    ("kinds", "credentials", "passcred", "text"),
    [
        ([], False, 0, "got b'\\x00'; "),
        ([["file", "pipe"]], False, 0, "2 file descriptors (closed)"),
        ([["file"] * 253], False, 0, "253 file descriptors (closed)"),
        ([["file"], ["pipe"]], False, 0, "2 file descriptors (closed)"),
        ([], True, 0, "got b'\\x00'; "),
        ([], True, 1, "got b'\\x00' with credentials;"),
        ([["file", "tcp"]], True, 1, "2 file descriptors (closed) and credentials"),
    ],
)
async def test_receive_fd_rejects_another_message(
    kinds: list[list[str]], *, credentials: bool, passcred: int, text: str
) -> None:
    """A message without exactly one file descriptor is an error; the next message is received."""
    async with stdlib_peer() as peer:
        peer.conn.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, passcred)
        await peer.ask("send", kinds=kinds, credentials=credentials)
        await peer.ask("send", kinds=[["file"]])
        with pytest.raises(UnexpectedControlMessageError) as caught:
            await peer.conn.receive_fd()
        assert "expected one file descriptor, got" in str(caught.value)
        assert text in str(caught.value)
        assert caught.value.data == b"\0"
        os.close(await peer.conn.receive_fd())


async def test_receive_fd_with_credentials() -> None:
    """A receiver that has SO_PASSCRED on still receives descriptors, as the kernel adds to all."""
    async with stdlib_peer() as peer:
        peer.conn.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        for credentials in (False, True):
            (theirs,) = await peer.ask("send", kinds=[["file"]], credentials=credentials)
            fd = await peer.conn.receive_fd()
            assert look(fd)["identity"] == theirs["identity"]
            os.close(fd)


async def test_receive_fd_with_a_pidfd() -> None:
    """A receiver that has SO_PASSPIDFD on gets its descriptor, and the pidfd is closed."""
    async with stdlib_peer() as peer:
        try:
            peer.conn.setsockopt(socket.SOL_SOCKET, 76, 1)
        except OSError:
            pytest.skip("this kernel has no SO_PASSPIDFD (Linux 6.5)")
        (theirs,) = await peer.ask("send", kinds=[["file"]])
        fd = await peer.conn.receive_fd()
        assert look(fd)["identity"] == theirs["identity"]
        os.close(fd)
        await peer.ask("send", kinds=[], data="6162")
        assert await peer.conn.receive_some() == b"ab"


@pytest.mark.parametrize("passcred", [0, 1])
async def test_receive_some_rejects_descriptors(passcred: int) -> None:
    """receive_some of bytes with descriptors is an error with the bytes; the next read works."""
    async with stdlib_peer() as peer:
        peer.conn.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, passcred)
        await peer.ask("send", kinds=[["file", "pipe"]], data=b"hello".hex())
        await peer.ask("send", kinds=[], data=b"next".hex())
        with pytest.raises(UnexpectedDescriptorsError, match="2 file descriptors") as caught:
            await peer.conn.receive_some()
        assert caught.value.data == b"hello"
        assert await peer.conn.receive_some() == b"next"


async def test_receive_some_with_passcred_on() -> None:
    """With SO_PASSCRED on, plain bytes are plain bytes."""
    async with stdlib_peer() as peer:
        peer.conn.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        await peer.ask("send", kinds=[], data=b"hello".hex())
        assert await peer.conn.receive_some() == b"hello"


async def test_send_fd_to_a_peer_with_passrights_off() -> None:
    """SO_PASSRIGHTS=0 at the peer is DescriptorsRefusedError, and bytes still flow."""
    async with stdlib_peer() as peer:
        if not await peer.ask("disable_passrights"):
            pytest.skip("this kernel has no SO_PASSRIGHTS (Linux 6.16)")
        with pytest.raises(
            DescriptorsRefusedError, match="peer does not accept file descriptors"
        ) as caught:
            await peer.conn.send_fd(0)
        assert caught.value.errno == errno.EPERM
        await peer.conn.send_all(b"next")
        assert await peer.ask("plain_receive", size=4) == b"next".hex()


@pytest.mark.parametrize("free", [0, 1])
async def test_receive_fd_without_a_free_slot(free: int) -> None:
    """Without a free slot it is DescriptorsTruncatedError; the next descriptor is received."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[["file"] * 2])
        await peer.ask("send", kinds=[["file"]], data=b"ab".hex())
        await peer.ask("send", kinds=[["file"]])
        with free_descriptors(free):
            with pytest.raises(DescriptorsTruncatedError, match="RLIMIT_NOFILE") as caught:
                await peer.conn.receive_fd()
            assert (caught.value.arrived, caught.value.data) == (free, b"\0")
            if not free:
                with pytest.raises(UnexpectedDescriptorsError, match="were lost") as plain:
                    await peer.conn.receive_some()
                assert plain.value.data == b"ab"
        if free:
            os.close(await peer.conn.receive_fd())
            assert await peer.conn.receive_some(1) == b"b"
        os.close(await peer.conn.receive_fd())


async def test_send_fd_original_closed_while_it_waits() -> None:
    """While it waits, the caller may close the file descriptor and reuse the number."""
    one, two = connection_pair()
    count = clog(one)
    fd = os.memfd_create("right")
    identity = os.fstat(fd).st_ino
    async with one, two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send_fd, fd)
            await wait_all_tasks_blocked()
            os.close(fd)
            wrong = os.memfd_create("wrong")
            assert wrong == fd
            await unclog(two, count)
        got = await two.receive_fd()
        assert os.fstat(got).st_ino == identity
        os.close(got)
        os.close(wrong)


async def test_send_fd_without_a_free_fd() -> None:
    """A send that must wait without a free file descriptor raises; nothing is sent."""
    one, two = connection_pair()
    count = clog(one)
    async with one, two:
        with (
            free_descriptors(0),
            pytest.raises(OSError, match="no file descriptor is free for the duplicate") as caught,
        ):
            await one.send_fd(0)
        assert caught.value.errno == errno.EMFILE
        await unclog(two, count)
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


class UnderPressure:
    """A socket whose sendmsg fails with the given errnos before it works."""

    def __init__(self, sock: socket.socket, *refusals: int) -> None:
        self.sock = sock
        self.refusals = list(refusals)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def sendmsg(self, *arguments: Any) -> int:
        if self.refusals:
            number = self.refusals.pop(0)
            raise OSError(number, os.strerror(number))
        return self.sock.sendmsg(*arguments)


async def test_send_fd_retries_with_backoff(autojump_clock: MockClock) -> None:
    """If a resource is exhausted, a send is tried again, with growing pauses."""
    one, two = connection_pair()
    refusals = [errno.ETOOMANYREFS, errno.ENOBUFS, errno.EAGAIN, *[errno.ENOMEM] * 9]
    async with one, two:
        raw = one._sender.raw
        one._sender.raw = UnderPressure(raw, *refusals)  # type: ignore[assignment]
        begin = trio.current_time()
        await one.send_fd(0)
        # 1 and 2 ms before EAGAIN, which starts the backoff again: 1 + 2 + 4 + ... + 64 ms, and
        # then 100 ms each.
        assert trio.current_time() - begin == pytest.approx(0.003 + 0.127 + 2 * 0.1)
        os.close(await two.receive_fd())


async def test_send_fd_rejected_after_a_retry() -> None:
    """An error of another kind after a wait is raised, and the duplicate is closed."""
    one, two = connection_pair()
    async with one, two:
        raw = one._sender.raw
        refusals = [errno.ENOBUFS, errno.EINVAL]
        one._sender.raw = UnderPressure(raw, *refusals)  # type: ignore[assignment]
        with pytest.raises(OSError, match=r"Invalid argument: .*; nothing was sent"):
            await one.send_fd(0)


IN_FLIGHT = """
import errno, os, resource, trio
from trio.testing import MockClock
from trio_unixconn import connection_pair

class Counting:
    "A socket that counts its refusals."
    def __init__(self, sock):
        self.sock, self.refused = sock, 0
    def __getattr__(self, name):
        return getattr(self.sock, name)
    def sendmsg(self, *arguments):
        try:
            return self.sock.sendmsg(*arguments)
        except OSError as exc:
            assert exc.errno == errno.ETOOMANYREFS, exc
            self.refused += 1
            raise

async def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    keep, kept = connection_pair()
    fill = 0
    with trio.move_on_after(0.5):
        while True:
            await keep.send_fd(0)
            fill += 1
    assert 30 < fill < 60, fill
    one, two = connection_pair()
    one._sender.raw = counting = Counting(one._sender.raw)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send_fd, 0)
        # The clock is virtual; these 5 seconds are over as soon as all tasks wait.
        with trio.move_on_after(5):
            assert await two.receive_some(1) and False, "it was sent although too many fly"
        # 1 + 2 + ... + 64 ms, and then every 100 ms: it does not spin.
        assert 40 < counting.refused < 70, counting.refused
        for _ in range(fill):
            os.close(await kept.receive_fd())
        os.close(await two.receive_fd())
    for conn in (keep, kept, one, two):
        await conn.aclose()
    print("done")

trio.run(trio.lowlevel.checkpoint)  # whatever is imported late, while it can be read
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(54321)
    os.setuid(54321)
trio.run(main, clock=MockClock(autojump_threshold=0))
"""


async def test_send_fd_waits_while_too_many_are_in_flight() -> None:
    """While too many file descriptors of a user are in flight, a send waits, and does not spin."""
    # Only an unprivileged user has that limit, so root's test runs as a user of its own.
    done = await trio.run_process(
        [sys.executable, "-c", IN_FLIGHT], capture_stdout=True, capture_stderr=True, check=False
    )
    assert done.stdout == b"done\n", done.stderr.decode()


KEYBOARD_INTERRUPT = """
import os, signal, trio
# The process that started the tests may ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from trio_unixconn import connection_pair

class Interrupting:
    "A socket that gets control-C directly after each receive."
    def __init__(self, sock):
        self.sock = sock
    def __getattr__(self, name):
        return getattr(self.sock, name)
    def recvmsg(self, *arguments):
        received = self.sock.recvmsg(*arguments)
        signal.raise_signal(signal.SIGINT)
        return received

async def main():
    one, two = connection_pair()
    await one.send_fd(0)
    two._receiver.raw = Interrupting(two._receiver.raw)
    fd = await two.receive_fd()
    print("received", os.path.sameopenfile(fd, 0), flush=True)
    await trio.lowlevel.checkpoint()

trio.run(main)
"""


async def test_receive_fd_keyboard_interrupt_loses_nothing() -> None:
    """Control-C directly after recvmsg raises only after the descriptor was returned."""
    done = await trio.run_process(
        [sys.executable, "-W", "ignore", "-c", KEYBOARD_INTERRUPT],
        stdin=subprocess.DEVNULL,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    assert done.stdout == b"received True\n"
    assert b"KeyboardInterrupt" in done.stderr


async def test_send_fd_on_a_socket_made_blocking(autojump_clock: MockClock) -> None:
    """A process that shares the socket may make it blocking; that does not block the loop."""
    one, two = connection_pair()
    async with one, two:
        for conn in (one, two):
            os.set_blocking(conn.socket.fileno(), True)
        for receive in (two.receive_fd, two.receive_credentials, two.receive_some):
            with trio.move_on_after(1) as scope:
                await receive()
            assert scope.cancelled_caught
        await one.send_fd(0)
        os.close(await two.receive_fd())
