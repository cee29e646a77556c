"""What the library does with, and without, what newer kernels offer.

These run on the machine's own kernel, and in guests on kernels that have the feature and on others
that have not (``nox -s kernels``). Each test looks which of both it runs on, and the first test
says whether that is what the version of the kernel promises.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import select
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest
import trio

from tests._helpers.fds import free_descriptors
from tests._helpers.requirements import (
    SO_PASSPIDFD,
    SO_PASSRIGHTS,
    SO_PEERPIDFD,
    kernel_has,
)
from trio_unixconn import (
    DescriptorsRefusedError,
    DescriptorsTruncatedError,
    NotSupportedError,
    PeerGoneError,
    UnexpectedDescriptorsError,
    UnixConnection,
    connection_pair,
)
from trio_unixconn._cli.doctor.examination import examine

RELEASE = re.match(r"(\d+)\.(\d+)", platform.release())
assert RELEASE
VERSION = int(RELEASE[1]), int(RELEASE[2])
# Old kernels allowed sockets in flight to be nested four times.
MORE_THAN_EVER_ALLOWED = 20
# A security module must give labels.
NOT_PROMISED = {"SO_PEERSEC"}


@pytest.mark.skipif("GUEST_KERNEL" not in os.environ, reason="other systems have changed kernels")
def test_doctor_since() -> None:
    """A feature works if the kernel is as new as the doctor says, and not on an older one."""
    for feature in examine().features:
        since = re.search(r"Linux (\d+)\.(\d+)", feature.since)
        if feature.name not in NOT_PROMISED:
            expected = since is None or (int(since[1]), int(since[2])) <= VERSION
            assert (feature.works, feature.name) == (expected, feature.name), feature.seen


################################################################
# SO_PEERPIDFD
################################################################


async def test_peer_pidfd() -> None:
    """There is a pidfd of the peer, or None, and what needs one is NotSupportedError."""
    one, two = connection_pair()
    async with one, two:
        pidfd = one.open_peer_pidfd()
        with one.get_peer_identity() as identity:
            assert not identity.gone
            assert identity.credentials.pid == os.getpid()
            if kernel_has(SO_PEERPIDFD):
                assert pidfd is not None
                os.close(pidfd)
                assert identity.is_alive()
                assert await identity.read_exe() == os.readlink("/proc/self/exe")
            else:
                assert pidfd is None
                with pytest.raises(NotSupportedError, match=r"requires Linux 6\.5"):
                    identity.is_alive()
                with pytest.raises(NotSupportedError, match=r"requires Linux 6\.5"):
                    await identity.read_exe()


CLIENT = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); s.connect(sys.argv[2])"


async def test_pidfd_of_a_reaped_peer(unix_socket_path: os.PathLike[str]) -> None:
    """A peer that was reaped is gone, whichever way the kernel says it; or there is no pidfd."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(os.fspath(unix_socket_path))
        listener.listen()
        command = [sys.executable, "-c", CLIENT, str(client.fileno()), os.fspath(unix_socket_path)]
        # It connects a socket that stays open here.
        subprocess.run(command, check=True, pass_fds=[client.fileno()])
        async with UnixConnection.from_stdlib_socket(listener.accept()[0]) as conn:
            with conn.get_peer_identity() as identity:
                assert identity.gone == kernel_has(SO_PEERPIDFD)
            if kernel_has(SO_PEERPIDFD):
                with pytest.raises(PeerGoneError):
                    conn.open_peer_pidfd()
            else:
                assert conn.open_peer_pidfd() is None


################################################################
# SCM_PIDFD
################################################################


async def test_pidfd_with_a_message() -> None:
    """A message has a pidfd of its sender, or asking for it is NotSupportedError."""
    one, two = connection_pair()
    async with one, two:
        await one.send_message(b"x")
        if kernel_has(SO_PASSPIDFD):
            await two.receive_message(1, pidfd=True)
            await one.send_message(b"y")
            # On this one the option was on when it was sent.
            async with await two.receive_message(1, pidfd=True) as message:
                assert message.data == b"y"
                assert len(message.pidfds) <= 1
        else:
            with pytest.raises(NotSupportedError, match="SO_PASSPIDFD"):
                await two.receive_message(1, pidfd=True)
            # Nothing was lost.
            assert await two.receive_some(1) == b"x"


@pytest.mark.skipif(not kernel_has(SO_PASSPIDFD), reason="this kernel has no SO_PASSPIDFD")
async def test_pidfd_that_has_no_slot() -> None:
    """Without a free descriptor a message has no pidfd, and is received nevertheless."""
    one, two = connection_pair()
    async with one, two:
        two.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 1)
        await one.send_message(b"x")
        await one.send_message(b"y")
        with free_descriptors(0):
            data, ancdata, flags, _ = two.socket._sock.recvmsg(1, 1000)  # type: ignore[attr-defined]
        # The number of the error is where a descriptor would be.
        slots = [int.from_bytes(payload, sys.byteorder, signed=True) for _, _, payload in ancdata]
        assert (data, slots, flags & socket.MSG_CTRUNC) == (b"x", [-errno.EMFILE], 0)
        with free_descriptors(0):
            message = await two.receive_message(1, pidfd=True)
        async with message:
            assert (message.data, len(message.pidfds)) == (b"y", 0)


################################################################
# SO_PASSRIGHTS
################################################################


async def test_receive_descriptors_disabled() -> None:
    """The kernel rejects descriptors at their sender, or they are closed where they arrive."""
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    async with (
        UnixConnection.from_stdlib_socket(ours) as sender,
        UnixConnection.from_stdlib_socket(theirs, receive_descriptors=False) as receiver,
    ):
        if kernel_has(SO_PASSRIGHTS):
            with pytest.raises(DescriptorsRefusedError):
                await sender.send_fd(writer)
            os.close(writer)
        else:
            await sender.send_fd(writer)
            os.close(writer)
            with pytest.raises(UnexpectedDescriptorsError) as caught:
                await receiver.receive_some()
            assert caught.value.data == b"\0"
        await sender.send_all(b"bytes")
        assert await receiver.receive_some() == b"bytes"
        # No process has the writing end.
        assert await trio.to_thread.run_sync(os.read, reader, 1) == b""
        os.close(reader)


################################################################
# Descriptors for which there is no slot
################################################################


async def test_receive_without_a_free_descriptor() -> None:
    """Lost descriptors are DescriptorsTruncatedError, and the next ones are received."""
    one, two = connection_pair()
    async with one, two:
        for free in (0, 1):
            await one.send_message(b"x", fds=[0, 1, 2])
            with free_descriptors(free), pytest.raises(DescriptorsTruncatedError) as caught:
                await two.receive_fds(3)
            assert (caught.value.data, caught.value.arrived) == (b"x", free)
            await one.send_fd(0)
            with free_descriptors(0), pytest.raises(DescriptorsTruncatedError):
                await two.receive_fd()
        await one.send_fd(0)
        os.close(await two.receive_fd())


################################################################
# The collector of sockets in flight
################################################################


async def test_nested_sockets() -> None:
    """Sockets in the queues of sockets that are in the queues of sockets can be sent."""
    with ExitStack() as stack:
        inner, outer = socket.socketpair()
        stack.enter_context(inner)
        for _ in range(MORE_THAN_EVER_ALLOWED):
            one, two = socket.socketpair()
            async with UnixConnection.from_stdlib_socket(one) as conn:
                with outer:
                    await conn.send_fd(outer)
            outer = two
        # All the way back to the first pair.
        inner.sendall(b"x")
        for _ in range(MORE_THAN_EVER_ALLOWED):
            async with UnixConnection.from_stdlib_socket(outer) as conn:
                outer = socket.socket(fileno=await conn.receive_fd())
        with outer:
            assert outer.recv(1) == b"x"


async def test_sockets_that_hold_each_other() -> None:
    """Sockets that are only in each other's queues are collected, and what is in them is closed."""
    reader, writer = os.pipe()
    for _ in range(10):
        one, two = connection_pair()
        async with one, two:
            # The receiver is in its own queue.
            await one.send_fds([one.socket, two.socket, writer], per_message=3)
    os.close(writer)
    with trio.fail_after(60), select.epoll() as ended:
        ended.register(reader, select.EPOLLHUP)
        while not ended.poll(0):
            # The kernel collects when it releases another Unix socket, before or after close(2)
            # returns.
            for each in socket.socketpair():
                each.close()
            await trio.sleep(0.01)
    os.close(reader)
