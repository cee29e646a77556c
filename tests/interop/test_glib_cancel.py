"""Cancellation of a wait for GLib, and of GLib's own waits: nothing is lost."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests._helpers.glib import (
    GLIBS,
    OURS,
    connected,
    in_step,
    operate,
    ours_in_step,
    passcred,
    receive_described,
    set_passcred,
)
from tests._helpers.programs.open_files import described, opened
from trio_unixconn import (
    AsyncResult,
    Cancellable,
    IOErrorEnum,
    OperationCancelled,
    UnixConnection,
    open_callback_adapter,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.usefixtures("real_glib")]

ours = pytest.mark.parametrize("form", OURS)
glibs = pytest.mark.parametrize("glib", GLIBS)
operations = pytest.mark.parametrize("operation", ["receive_fd", "receive_credentials"])
befores = pytest.mark.parametrize("before", [0, 1])


def while_waiting(operation: str, before: int) -> int:
    """Return what SO_PASSCRED is while an operation waits: on for credentials."""
    return 1 if operation == "receive_credentials" else before


@ours
@operations
@befores
async def test_cancel_in_a_thread(tmp_path: Path, form: str, operation: str, before: int) -> None:
    """A Cancellable that another thread cancels ends our wait for a silent GLib."""
    cancellable = Cancellable()
    async with connected(tmp_path) as (conn, peer):
        set_passcred(conn, before)
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(OperationCancelled) as caught:
                    await operate(form, conn, operation, cancellable=cancellable)
                assert caught.value.code == IOErrorEnum.CANCELLED

            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            assert passcred(conn) == while_waiting(operation, before)
            await trio.to_thread.run_sync(cancellable.cancel)
        assert passcred(conn) == before
        await in_step(conn, peer)


@ours
@operations
@befores
async def test_trio_scope(tmp_path: Path, form: str, operation: str, before: int) -> None:
    """A trio scope ends our wait for a silent GLib, and the cancellation stays trio's."""
    async with connected(tmp_path) as (conn, peer):
        set_passcred(conn, before)
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def receive() -> None:
                with scope:
                    await operate(form, conn, operation)

            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            assert passcred(conn) == while_waiting(operation, before)
            scope.cancel()
        assert scope.cancelled_caught
        assert passcred(conn) == before
        await in_step(conn, peer)


@operations
@befores
async def test_cancel_pending(tmp_path: Path, operation: str, before: int) -> None:
    """cancel_pending() of the callback form, in a thread, ends our wait for a silent GLib."""
    async with connected(tmp_path) as (conn, peer):
        set_passcred(conn, before)
        results: list[AsyncResult] = []
        async with open_callback_adapter() as adapter:
            wrapped = adapter.wrap(conn)
            begin = getattr(wrapped, f"{operation}_async")
            begin(None, lambda _source, result: results.append(result))
            await trio.testing.wait_all_tasks_blocked()
            assert passcred(conn) == while_waiting(operation, before)
            await trio.to_thread.run_sync(adapter.cancel_pending)
        (result,) = results
        with pytest.raises(OperationCancelled):
            getattr(wrapped, f"{operation}_finish")(result)
        assert passcred(conn) == before
        await in_step(conn, peer)


@glibs
@operations
async def test_gio_cancellable_ends_a_wait_for_us(
    tmp_path: Path, glib: str, operation: str
) -> None:
    """A Gio.Cancellable ends GLib's wait with the code that our error has; nothing is lost."""
    async with connected(tmp_path) as (conn, peer):
        # In this form a main loop waits for the descriptor, and receive_fd is called afterwards.
        watched = glib == "async" and operation == "receive_fd"
        await peer.begin(operation, form=glib, announce=not watched)
        await peer.cancel()
        assert await peer.error_code() == OperationCancelled.code
        await in_step(conn, peer)


@ours
@pytest.mark.parametrize("operation", ["send_fd", "send_credentials"])
async def test_send_cancelled_while_glib_does_not_read(
    tmp_path: Path, form: str, operation: str
) -> None:
    """A send to a GLib that does not read, once cancelled, never arrives."""
    cancellable = Cancellable()
    async with connected(tmp_path) as (conn, peer):
        filled = fill(conn)
        with opened("pipe", b"") as fd:
            arguments: list[Any] = [fd] if operation == "send_fd" else []

            async def send() -> None:
                with pytest.raises(OperationCancelled):
                    await operate(form, conn, operation, *arguments, cancellable=cancellable)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await trio.testing.wait_all_tasks_blocked()
                await trio.to_thread.run_sync(cancellable.cancel)
        there = bytes.fromhex(await peer.ask("read", size=filled))
        assert (len(there), set(there)) == (filled, {ord(".")})
        await in_step(conn, peer)


async def test_send_fd_waits_until_glib_reads(tmp_path: Path) -> None:
    """A send that waits until GLib reads arrives after the bytes that filled the socket."""
    async with connected(tmp_path) as (conn, peer):
        filled = fill(conn)
        async with trio.open_nursery() as nursery:
            with opened("pipe", b"hello") as fd:
                nursery.start_soon(conn.send_fd, fd)
                await trio.testing.wait_all_tasks_blocked()
            # The descriptor is closed meanwhile: a duplicate is sent.
            assert len(await peer.ask("read", size=filled)) == 2 * filled
            assert (await peer.ask("receive_fd"))["content"] == b"hello".hex()
        await ours_in_step(conn, peer)


@ours
async def test_receive_fd_cancelled_as_a_descriptor_arrives(tmp_path: Path, form: str) -> None:
    """However a Cancellable and a descriptor of GLib's race, the descriptor is received."""
    received: list[str] = []
    async with connected(tmp_path) as (conn, peer):

        async def receive(cancellable: Cancellable) -> None:
            try:
                fd = await operate(form, conn, "receive_fd", cancellable=cancellable)
            except OperationCancelled:
                return
            try:
                received.append(described(fd)["content"])
            finally:
                os.close(fd)

        for number in range(50):
            cancellable = Cancellable()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive, cancellable)
                await trio.testing.wait_all_tasks_blocked()
                await peer.begin("send_fd", content=f"{number} ")
                # Every other time it has arrived before the cancellation.
                if number % 2:
                    await peer.result()
                await trio.to_thread.run_sync(cancellable.cancel)
            if not number % 2:
                await peer.result()
            if len(received) == number:
                received.append((await receive_described(conn))["content"])
        assert received == [f"{number} 0".encode().hex() for number in range(50)]
        await in_step(conn, peer)


def fill(conn: UnixConnection) -> int:
    """Send until the socket takes no more; return how many bytes that took."""
    filled = 0
    while True:
        try:
            filled += conn._receiver.raw.send(b"." * 4096)
        except BlockingIOError:
            return filled
