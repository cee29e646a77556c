"""Message, UnixFDMessage, UnixCredentialsMessage, and send_fake_credentials."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
from typing import Any

import pytest
import trio
from trio.testing import assert_checkpoints

from tests._helpers.fds import sizes, some
from tests._helpers.fuse import file_with_failing_close
from tests._helpers.peers import stdlib_peer
from tests._helpers.requirements import SO_PASSPIDFD, kernel_has, message_pidfds
from trio_unixconn import (
    Cancellable,
    Credentials,
    Message,
    OperationCancelled,
    UnixCredentialsMessage,
    UnixFDList,
    UnixFDMessage,
    connection_pair,
)

################################################################
# Message as an owner
################################################################


async def one_message(count: int) -> Message:
    """Receive a message with that many descriptors."""
    one, two = connection_pair()
    async with one, two:
        with some(count) as fds:
            await one.send_message(b"x", fds=fds)
        return await two.receive_message(1)


async def test_message_close() -> None:
    """close(), even twice, and a with block close what was not taken out."""
    message = await one_message(2)
    taken = message.fds.take(1)
    message.close()
    message.close()
    assert os.fstat(taken).st_size == 1
    os.close(taken)
    with await one_message(2) as message:
        assert sizes(message.fds) == [0, 1]
    assert len(message.fds) == 0


async def test_message_close_closes_all_if_one_fails() -> None:
    """An error of close(2) is raised when the descriptors and the pidfd are closed."""
    one, two = connection_pair()
    async with one, two:
        with file_with_failing_close() as file:
            await one.send_message(b"x", fds=[file.fd, 0])
            message = await two.receive_message(1, pidfd=kernel_has(SO_PASSPIDFD))
            given = [*message.fds, *message.pidfds]
            with pytest.raises(OSError) as caught:
                message.close()
            assert caught.value.errno == errno.EIO
            for fd in given:
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.get_inheritable(fd)


async def test_message_del() -> None:
    """A message that is collected with descriptors closes them, and warns."""
    message = await one_message(2)
    with pytest.warns(ResourceWarning, match="unclosed UnixFDList: file descriptors"):
        del message


@message_pidfds
async def test_message_del_with_a_pidfd() -> None:
    """The pidfd of a message that is collected is closed, with a warning."""
    one, two = connection_pair()
    async with one, two:
        await one.send_all(b"x")
        await two.receive_message(1, pidfd=True)
        await one.send_message(b"x", credentials=Credentials())
        message = await two.receive_message(1, pidfd=True)
        with pytest.warns(ResourceWarning, match="unclosed UnixFDList: file descriptors"):
            del message


async def test_message_is_compared_by_identity() -> None:
    """Two messages with the same bytes are two messages, and neither can be changed."""
    with await one_message(0) as message, await one_message(0) as other:
        assert message != other
        assert len({message, other}) == 2
        with pytest.raises(AttributeError):
            message.data = b""  # type: ignore[misc]


################################################################
# Gio's control messages
################################################################


def test_unix_fd_message() -> None:
    """UnixFDMessage has Gio's accessors, and its payload is the numbers as C ints."""
    message = UnixFDMessage()
    with open(os.devnull) as file:
        message.append_fd(file)
        message.append_fd(file.fileno())
    with message.get_fd_list() as fds:
        assert message.fd_list is fds
        assert list(fds) == list(struct.unpack("2i", message.serialize()))
        assert (message.get_level(), message.get_msg_type()) == (
            socket.SOL_SOCKET,
            socket.SCM_RIGHTS,
        )
        assert message.get_size() == 8
        stolen = message.steal_fds()
        assert len(fds) == 0
    for fd in stolen:
        os.close(fd)


def test_unix_fd_message_over_a_socket() -> None:
    """to_control_message() is sent as it is, and deserialize() owns what was received."""
    one, two = socket.socketpair()
    with one, two:
        with UnixFDMessage(some(3)).get_fd_list() as fds:
            one.sendmsg([b"x"], [UnixFDMessage(fds).to_control_message()])
        _, ancdata, _, _ = two.recvmsg(1, 1024, socket.MSG_CMSG_CLOEXEC)
        message = UnixFDMessage.deserialize(*ancdata[0])
        assert message is not None
        with message.fd_list as fds:
            assert sizes(fds) == [0, 1, 2]


def test_unix_fd_message_rejects_other_fds() -> None:
    """append_fd() rejects wrong file descriptors, and 254 are too many to be sent."""
    message = UnixFDMessage()
    bad: Any
    for bad, error in ((True, TypeError), ("0", TypeError), (-1, ValueError)):
        with pytest.raises(error):
            message.append_fd(bad)
    assert message.get_size() == 0
    numbers = list(range(100, 354))
    message = UnixFDMessage(UnixFDList(numbers))
    with pytest.raises(ValueError, match="at most 253"):
        message.serialize()
    assert message.steal_fds() == numbers


def test_deserialize_of_other_kinds() -> None:
    """deserialize() of another kind of message is None, as in Gio."""
    payload = UnixCredentialsMessage().serialize()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS)
    ids = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
    assert UnixFDMessage.deserialize(*ids, payload) is None
    assert UnixFDMessage.deserialize(socket.SOL_SOCKET, 99, b"1234") is None
    assert UnixFDMessage.deserialize(socket.IPPROTO_IP, socket.SCM_RIGHTS, b"1234") is None
    assert UnixCredentialsMessage.deserialize(*rights, b"") is None
    assert UnixCredentialsMessage.deserialize(socket.IPPROTO_IP, ids[1], payload) is None
    # Malformed, and of no process.
    assert UnixCredentialsMessage.deserialize(*ids, payload[:-1]) is None
    assert UnixCredentialsMessage.deserialize(*ids, struct.pack("iII", 0, 65534, 65534)) is None


def test_unix_credentials_message() -> None:
    """UnixCredentialsMessage has Gio's accessors, and comes back from its payload equal."""
    assert UnixCredentialsMessage.is_supported()
    assert UnixCredentialsMessage().get_credentials() == Credentials()
    message = UnixCredentialsMessage(Credentials(1, 2, 3))
    assert message.serialize() == struct.pack("iII", 1, 2, 3)
    assert message.get_size() == 12
    assert (message.get_level(), message.get_msg_type()) == (
        socket.SOL_SOCKET,
        socket.SCM_CREDENTIALS,
    )
    back = UnixCredentialsMessage.deserialize(*message.to_control_message())
    assert back == message
    assert back != UnixCredentialsMessage()


################################################################
# Credentials of another process
################################################################

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may forge credentials")


@needs_root
async def test_send_fake_credentials() -> None:
    """A privileged process can send the credentials of another one."""
    async with stdlib_peer() as peer:
        fake = Credentials(peer.process.pid, 54321, 54322)
        one, two = connection_pair()
        async with one, two:
            assert await one.send_fake_credentials(fake) is True
            assert await two.receive_credentials() == fake
            await one.send_message(b"x", credentials=fake)
            with await two.receive_message(1, credentials=True) as message:
                assert message.credentials == fake
        await peer.ask("passcred")
        await peer.conn.send_fake_credentials(fake)
        assert (await peer.ask("receive"))["credentials"] == [fake.pid, 54321, 54322]


@needs_root
async def test_send_fake_credentials_of_an_ended_process() -> None:
    """The pid of a process that has ended is ProcessLookupError, and nothing is sent."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    one, two = connection_pair()
    async with one, two:
        fake = Credentials(gone.pid, 0, 0)
        with assert_checkpoints(), pytest.raises(ProcessLookupError, match="no process has the"):
            await one.send_fake_credentials(fake)
        with pytest.raises(ProcessLookupError, match="no process has the pid"):
            await one.send_message(b"x", fds=[0], credentials=fake)
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


async def test_send_fake_credentials_rejects_other_arguments() -> None:
    """Another type is rejected at once; a cancelled Cancellable is OperationCancelled."""
    one, two = connection_pair()
    cancellable = Cancellable()
    cancellable.cancel()
    async with one, two:
        with pytest.raises(TypeError, match="must be Credentials, got tuple"):
            await one.send_fake_credentials((1, 2, 3))  # type: ignore[arg-type]
        with pytest.raises(OperationCancelled):
            await one.send_fake_credentials(Credentials(), cancellable)
        await one.send_fake_credentials(Credentials())
        assert await two.receive_credentials() == Credentials()


UNPRIVILEGED = """
import errno, os, trio
from trio_unixconn import Credentials, SendError, connection_pair

async def main():
    one, two = connection_pair()
    own = Credentials()
    for fake in (Credentials(1, own.uid, own.gid), Credentials(own.pid, 0, own.gid),
                 Credentials(own.pid, own.uid, 0)):
        for send in (lambda: one.send_fake_credentials(fake),
                     lambda: one.send_message(b"x", fds=[0], credentials=fake)):
            try:
                await send()
            except PermissionError as exc:
                assert isinstance(exc, SendError), type(exc)
                assert (exc.errno, exc.sent) == (errno.EPERM, 0), exc
                assert "only a privileged process" in str(exc), exc
                assert "nothing was sent" in str(exc), exc
            else:
                raise AssertionError("forged without privilege")
    assert await one.send_fake_credentials(own) is True
    assert await two.receive_credentials() == own
    await one.aclose()
    await two.aclose()
    print("done")

trio.run(trio.lowlevel.checkpoint)  # whatever is imported late, while it can be read
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(54321)
    os.setuid(54321)
trio.run(main)
"""


async def test_send_fake_credentials_without_privilege() -> None:
    """Without privilege, other credentials are PermissionError with the reason; own ones go."""
    done = await trio.run_process(
        [sys.executable, "-c", UNPRIVILEGED], capture_stdout=True, capture_stderr=True, check=False
    )
    assert done.stdout == b"done\n", done.stderr.decode()
