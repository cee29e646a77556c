"""When the other end does what was not agreed: our errors, GLib's, and what works afterwards."""

from __future__ import annotations

import errno
import socket
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
import trio.testing

from tests._helpers.glib import (
    OURS,
    GLibPeer,
    connected,
    in_step,
    operate,
    ours_in_step,
    passcred,
    receive_described,
)
from tests._helpers.programs.open_files import opened
from trio_unixconn import (
    Cancellable,
    ConnectionBrokenError,
    ConnectionBusyError,
    ConnectionClosedError,
    Credentials,
    DescriptorsRefusedError,
    EndOfStreamError,
    IOErrorEnum,
    OperationCancelled,
    UnexpectedControlMessageError,
    UnexpectedDescriptorsError,
    UnixConnection,
    UnixConnectionError,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.usefixtures("real_glib")]

ours = pytest.mark.parametrize("form", OURS)

# Linux 6.16; Python has no name for it.
SO_PASSRIGHTS = 83


@attrs.frozen
class Surprise:
    """A message that is not what the receiver asks for; either end can send it."""

    operation: str
    data: bytes
    fds: int = 0
    credentials: bool = False

    def __str__(self) -> str:
        """Name the test."""
        content = f"{self.fds} fds{' and credentials' if self.credentials else ''}"
        return f"{self.operation}: {self.data!r} with {content}"

    async def from_glib(self, peer: GLibPeer) -> None:
        """Have GLib send it."""
        await peer.ask(
            "send_message", data=self.data.hex(), fds=self.fds, credentials=self.credentials
        )

    def from_us(self, conn: UnixConnection) -> None:
        """Send it; the library itself has no way to send most of them."""
        messages: list[tuple[int, int, bytes]] = []
        with ExitStack() as stack:
            if self.credentials:
                native = Credentials().to_native()
                messages.append((socket.SOL_SOCKET, socket.SCM_CREDENTIALS, native))
            if self.fds:
                fds = [stack.enter_context(opened("pipe", b"x")) for _ in range(self.fds)]
                packed = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
                messages.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, packed))
            assert conn._receiver.raw.sendmsg([self.data], messages) == len(self.data)


SURPRISES = [
    Surprise("receive_fd", b"A"),
    Surprise("receive_fd", b"A", fds=2),
    Surprise("receive_fd", b"A", fds=3, credentials=True),
    Surprise("receive_fd", b"A", credentials=True),
    Surprise("receive_credentials", b"A", fds=1),
    Surprise("receive_credentials", b"A", fds=2),
    Surprise("receive_credentials", b"A", fds=1, credentials=True),
]


@ours
@pytest.mark.parametrize("surprise", SURPRISES, ids=str)
async def test_unexpected_message(tmp_path: Path, surprise: Surprise, form: str) -> None:
    """An unexpected message raises an error with its byte, and the stream continues after it."""
    async with connected(tmp_path) as (conn, peer):
        await surprise.from_glib(peer)
        with pytest.raises(UnexpectedControlMessageError) as caught:
            await operate(form, conn, surprise.operation)
        assert type(caught.value) is UnexpectedControlMessageError
        assert caught.value.data == b"A"
        assert passcred(conn) == 0
        # The same message the other way round: GLib refuses it too, with this code.
        surprise.from_us(conn)
        assert caught.value.code == await peer.refusal(surprise.operation) == IOErrorEnum.FAILED
        await in_step(conn, peer)


@ours
async def test_credentials_and_a_descriptor(tmp_path: Path, form: str) -> None:
    """receive_fd takes the descriptor of a message with credentials too, as GLib's does.

    Without SO_PASSCRED at the receiving end the kernel drops the credentials.
    """
    surprise = Surprise("receive_fd", b"A", fds=1, credentials=True)
    async with connected(tmp_path) as (conn, peer):
        await surprise.from_glib(peer)
        assert (await receive_described(conn, form))["kind"] == "p"
        surprise.from_us(conn)
        assert (await peer.ask("receive_fd"))["kind"] == "p"
        await in_step(conn, peer)


@ours
@pytest.mark.parametrize("credentials", [False, True])
async def test_a_descriptor_with_passcred_on(
    tmp_path: Path, form: str, *, credentials: bool
) -> None:
    """With SO_PASSCRED on, receive_fd accepts a descriptor with credentials.

    The kernel adds them to every message then, sent or not. GLib refuses such a message.
    """
    surprise = Surprise("receive_fd", b"A", fds=1, credentials=credentials)
    async with connected(tmp_path) as (conn, peer):
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        await surprise.from_glib(peer)
        assert (await receive_described(conn, form))["kind"] == "p"
        assert passcred(conn) == 1
        await peer.ask("set_option", level=socket.SOL_SOCKET, option=socket.SO_PASSCRED, value=1)
        surprise.from_us(conn)
        assert await peer.refusal("receive_fd") == IOErrorEnum.FAILED
        await peer.ask("set_option", level=socket.SOL_SOCKET, option=socket.SO_PASSCRED, value=0)
        await in_step(conn, peer)


@pytest.mark.parametrize("fds", [1, 3, 253])
async def test_descriptors_among_plain_bytes(tmp_path: Path, fds: int) -> None:
    """Descriptors in a plain read are an error that has the bytes, not a silent loss."""
    async with connected(tmp_path) as (conn, peer):
        await peer.ask("send_message", data=b"plain".hex(), fds=fds)
        with pytest.raises(UnexpectedDescriptorsError) as caught:
            await conn.receive_some(100)
        assert caught.value.data == b"plain"
        assert caught.value.code == IOErrorEnum.FAILED
        await in_step(conn, peer)


async def test_rest_of_a_message(tmp_path: Path) -> None:
    """Of a longer message, the first byte brings the descriptor and the rest is plain."""
    async with connected(tmp_path) as (conn, peer):
        await peer.ask("send_message", data=b"plain".hex(), fds=1)
        assert (await receive_described(conn))["content"] == b"0".hex()
        assert await conn.receive_some(100) == b"lain"
        await peer.ask("send_message", data=b"plain".hex(), fds=2)
        with pytest.raises(UnexpectedControlMessageError) as caught:
            await conn.receive_fd()
        assert caught.value.data == b"p"
        assert await conn.receive_some(100) == b"lain"
        await in_step(conn, peer)


@ours
@pytest.mark.parametrize("how", ["shutdown", "close"])
@pytest.mark.parametrize("operation", ["receive_fd", "receive_credentials"])
async def test_end_of_stream(tmp_path: Path, form: str, how: str, operation: str) -> None:
    """The end of GLib's stream is EndOfStreamError, each time."""
    async with connected(tmp_path) as (conn, peer):
        await peer.ask(how)
        for _ in range(2):
            with pytest.raises(EndOfStreamError) as caught:
                await operate(form, conn, operation)
            assert caught.value.code == IOErrorEnum.FAILED
            assert passcred(conn) == 0
        assert await conn.receive_some() == b""
        if how == "shutdown":
            await ours_in_step(conn, peer)


async def test_end_of_our_stream(tmp_path: Path) -> None:
    """At the end of our stream, GLib has -1 for a descriptor and FAILED for credentials."""
    async with connected(tmp_path) as (conn, peer):
        await conn.send_eof()
        assert await peer.ask("receive_fd") == -1
        assert await peer.refusal("receive_credentials") == EndOfStreamError.code
        assert await peer.ask("read", size=1) == ""
        await peer.ask("send_fd", content="still")
        assert (await receive_described(conn))["content"] == b"still0".hex()


@ours
@pytest.mark.parametrize("operation", ["send_fd", "send_credentials"])
async def test_peer_is_gone(tmp_path: Path, form: str, operation: str) -> None:
    """Sending to an end that is closed is ConnectionBrokenError, BROKEN_PIPE in GLib."""
    async with connected(tmp_path) as (conn, peer):
        await peer.ask("close")
        with opened("pipe", b"") as fd, pytest.raises(ConnectionBrokenError) as caught:
            await operate(form, conn, operation, *([fd] if operation == "send_fd" else []))
    async with connected(tmp_path) as (conn, peer):
        await conn.aclose()
        assert await peer.refusal(operation) == caught.value.code == IOErrorEnum.BROKEN_PIPE


@ours
@pytest.mark.parametrize("operation", ["send_fd", "receive_fd", "send_credentials"])
async def test_closed_by_ourselves(tmp_path: Path, form: str, operation: str) -> None:
    """What follows one's own close is ConnectionClosedError, CLOSED in GLib."""
    async with connected(tmp_path) as (conn, peer):
        await peer.ask("close")
        theirs = await peer.refusal(operation)
        await conn.aclose()
        with opened("pipe", b"") as fd, pytest.raises(ConnectionClosedError) as caught:
            await operate(form, conn, operation, *([fd] if operation == "send_fd" else []))
        assert caught.value.code == theirs == IOErrorEnum.CLOSED


@ours
@pytest.mark.parametrize(
    "operation", ["send_fd", "receive_fd", "send_credentials", "receive_credentials"]
)
async def test_cancelled_before(tmp_path: Path, form: str, operation: str) -> None:
    """A cancelled Cancellable keeps both from doing anything, with the same code."""
    cancelled = Cancellable()
    cancelled.cancel()
    async with connected(tmp_path) as (conn, peer):
        with opened("pipe", b"") as fd, pytest.raises(OperationCancelled) as caught:
            arguments: list[Any] = [fd] if operation == "send_fd" else []
            await operate(form, conn, operation, *arguments, cancellable=cancelled)
        assert passcred(conn) == 0
        assert await peer.refusal(operation, cancelled=True) == caught.value.code
        assert caught.value.code == IOErrorEnum.CANCELLED
        await in_step(conn, peer)


async def test_busy(tmp_path: Path) -> None:
    """Two readers at once are ConnectionBusyError, PENDING in GLib's streams."""
    async with connected(tmp_path) as (conn, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(conn.receive_some)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(ConnectionBusyError) as caught:
                await conn.receive_fd()
            nursery.cancel_scope.cancel()
        assert await peer.refusal("read_twice") == caught.value.code == IOErrorEnum.PENDING
        await in_step(conn, peer)


async def test_closed_descriptor(tmp_path: Path) -> None:
    """A descriptor that is closed is refused before anything is sent, by GLib too."""
    async with connected(tmp_path) as (conn, peer):
        with opened("pipe", b"") as closed:
            pass
        with pytest.raises(OSError, match="closed") as caught:
            await conn.send_fd(closed)
        assert caught.value.errno == errno.EBADF
        assert isinstance(caught.value, UnixConnectionError)
        assert await peer.refusal("send_closed_fd") == caught.value.code == IOErrorEnum.FAILED
        await in_step(conn, peer)


@ours
async def test_no_descriptors_wanted(tmp_path: Path, form: str) -> None:
    """An end without SO_PASSRIGHTS refuses descriptors: PERMISSION_DENIED in GLib."""
    async with connected(tmp_path) as (conn, peer):
        try:
            conn.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        except OSError as exc:  # pragma: no cover - kernels before 6.16
            pytest.skip(f"this kernel has no SO_PASSRIGHTS ({exc})")
        theirs = await peer.refusal("send_fd")
        await peer.ask("set_option", level=socket.SOL_SOCKET, option=SO_PASSRIGHTS, value=0)
        with opened("pipe", b"") as fd, pytest.raises(DescriptorsRefusedError) as caught:
            await operate(form, conn, "send_fd", fd)
        assert caught.value.code == theirs == IOErrorEnum.PERMISSION_DENIED
        conn.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 1)
        await peer.ask("set_option", level=socket.SOL_SOCKET, option=SO_PASSRIGHTS, value=1)
        await in_step(conn, peer)
