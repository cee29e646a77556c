"""Cause faults, and describe in one word how an implementation handles each.

Nothing is asserted here. All descriptors that are sent refer to one memfd: those that are open
afterwards but were not returned to the caller are leaked, and those that are not open are lost.
"""

from __future__ import annotations

import array
import errno
import gc
import os
import resource
import socket
import time
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from .implementations import Context, Implementation

BEHAVIOUR_OF_NONE = "n/a"


def push(sock: socket.socket, fds: list[int], data: bytes | None = None) -> None:
    """Send descriptors with sendmsg; the byte is their number, which multiprocessing expects."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    sock.sendmsg([data or bytes([len(fds)])], [rights])


def identity(fd: int) -> tuple[int, int]:
    """Return the identity of the file that a descriptor refers to."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def holders(file: int) -> list[int]:
    """Return the other descriptors of this process that are open on the same file."""
    found: list[int] = []
    for name in os.listdir("/proc/self/fd"):
        # The descriptor of the listing itself is gone.
        with suppress(OSError):
            if int(name) != file and identity(int(name)) == identity(file):
                found.append(int(name))
    return found


def leaks(file: int, got: list[int]) -> set[int]:
    """Return the descriptors that were not returned to the caller and stay open."""
    gc.collect()
    # A library may leave the closing to a thread.
    deadline = time.monotonic() + 1
    while (found := set(holders(file)) - set(got)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


@contextmanager
def free_descriptors(count: int) -> Generator[None, None, None]:
    """Let this process have only ``count`` more descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    top = max(int(name) for name in os.listdir("/proc/self/fd")) + count + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


@attrs.define
class Scene:
    """A socketpair with one end for the implementation, and a file to send."""

    implementation: Implementation
    sock: socket.socket
    peer: socket.socket
    file: int

    def tried(self, operate: Callable[[], Any]) -> tuple[Any, Exception | None]:
        """Return what ``operate`` returned, and what it raised."""
        try:
            return operate(), None
        except NotImplementedError as exc:
            if type(exc) is not NotImplementedError:
                return None, exc
            raise
        except Exception as exc:
            # Its traceback would keep things open.
            return None, exc.with_traceback(None)

    def receive(self, sent: int, expected: int, context: Context | None = None) -> str:
        """Have the implementation receive, and describe what happened to ``sent`` descriptors."""
        implementation = self.implementation
        got, raised = self.tried(
            lambda: implementation.receive(self.sock, expected, context or nullcontext())
        )
        if expected < len(got or ()):
            return f"{len(got)} received"
        return self.account(sent, list(got or ()), raised)

    def account(self, sent: int, got: list[int], raised: Exception | None) -> str:
        """Describe what happened to the descriptors."""
        leaked = len(leaks(self.file, got))
        lost = sent - len(got) - leaked
        words: list[str] = []
        if raised is not None:
            words.append("error")
        elif lost > 0:
            words.append(f"silent loss {lost}")
        elif not got and not leaked:
            words.append("empty list")
        if leaked:
            words.append(f"leak {leaked}")
        return ", ".join(words) or "all received"

    def arrived(self) -> list[int]:
        """Return the descriptors that have arrived at the peer, after reading all bytes."""
        self.peer.setblocking(False)
        fds: list[int] = []
        with suppress(BlockingIOError, ConnectionResetError):
            while True:
                data, more, _, _ = socket.recv_fds(self.peer, 65536, 253)
                fds += more
                if not data:
                    break
        return fds

    def sent(self, raised: Exception | None, expected: int) -> str:
        """Describe what happened to descriptors that were to be sent."""
        arrived = len(self.arrived())
        if raised is not None:
            return "error" if not arrived else f"error after {arrived}"
        return "sent" if arrived == expected else f"silent loss {expected - arrived}"


def emfile(scene: Scene) -> str:
    """20 descriptors arrive, 5 slots are free."""
    push(scene.peer, [scene.file] * 20)
    return scene.receive(20, 20, free_descriptors(5))


def full_table(scene: Scene) -> str:
    """A descriptor arrives, no slot is free."""
    push(scene.peer, [scene.file])
    return scene.receive(1, 1, free_descriptors(0))


def too_many(scene: Scene) -> str:
    """3 descriptors arrive, 1 is expected."""
    push(scene.peer, [scene.file] * 3)
    return scene.receive(3, 1)


def one_too_many(scene: Scene) -> str:
    """2 descriptors arrive, 1 is expected."""
    push(scene.peer, [scene.file] * 2)
    return scene.receive(2, 1)


def too_few(scene: Scene) -> str:
    """A byte arrives without the expected descriptor."""
    scene.peer.send(b"\1")
    return scene.receive(0, 1)


def with_credentials(scene: Scene) -> str:
    """3 descriptors arrive with credentials (SO_PASSCRED)."""
    scene.sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    push(scene.peer, [scene.file] * 3)
    return scene.receive(3, 3)


def space_for_credentials(scene: Scene) -> str:
    """3 descriptors arrive with credentials (SO_PASSCRED), up to 20 are expected."""
    scene.sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    push(scene.peer, [scene.file] * 3)
    return scene.receive(3, 20)


def inheritable(scene: Scene) -> str:
    """A received descriptor, when this process starts another program."""
    push(scene.peer, [scene.file])
    got, raised = scene.tried(lambda: scene.implementation.receive(scene.sock, 1, nullcontext()))
    if raised is not None:
        return "error"
    return "inheritable" if os.get_inheritable(next(iter(got))) else "close-on-exec"


def plain_read(scene: Scene) -> str:
    """A descriptor arrives while plain bytes are read."""
    # Connections of multiprocessing expect a length before the bytes.
    push(scene.peer, [scene.file], b"\0\0\0\1.")
    _, raised = scene.tried(lambda: scene.implementation.read(scene.sock))
    return scene.account(1, [], raised)


def end_of_stream(scene: Scene) -> str:
    """The stream ends, a descriptor is expected."""
    scene.peer.shutdown(socket.SHUT_WR)
    return scene.receive(0, 1)


def end_with_credentials(scene: Scene) -> str:
    """The stream ends, a descriptor is expected (SO_PASSCRED)."""
    scene.sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    scene.peer.shutdown(socket.SHUT_WR)
    return scene.receive(0, 1)


def dropped(scene: Scene) -> str:
    """2 descriptors are received, and the result is dropped."""
    push(scene.peer, [scene.file] * 2)
    _, raised = scene.tried(
        lambda: len(scene.implementation.receive(scene.sock, 2, nullcontext())) and None
    )
    if raised is not None:
        return "error"
    left = len(leaks(scene.file, []))
    return f"leak {left}" if left else "closed, warned"


def wrong_kind(scene: Scene) -> str:
    """A pipe arrives, a regular file is expected."""
    one, two = os.pipe()
    push(scene.peer, [one])
    # The other end refers to the same pipe, and would count as another holder.
    os.close(two)
    os.dup2(one, scene.file)
    os.close(one)
    got, raised = scene.tried(lambda: scene.implementation.receive_file(scene.sock, nullcontext()))
    word = scene.account(1, list(got or ()), raised)
    return "unchecked" if word == "all received" else word


def socket_object(scene: Scene) -> str:
    """A socket.socket is sent."""
    one, two = socket.socketpair()
    with one, two:
        _, raised = scene.tried(lambda: scene.implementation.send(scene.sock, [one]))
        return scene.sent(raised, 1)


def socket_among_numbers(scene: Scene) -> str:
    """A number and a socket.socket are sent."""
    one, two = socket.socketpair()
    with one, two:
        _, raised = scene.tried(lambda: scene.implementation.send(scene.sock, [scene.file, one]))
        return scene.sent(raised, 2)


def closed_descriptor(scene: Scene) -> str:
    """A closed descriptor is sent."""
    closed = os.dup(scene.file)
    os.close(closed)
    # A number that the implementation does not get for a descriptor that it opens.
    high = 500 + closed
    _, raised = scene.tried(lambda: scene.implementation.send(scene.sock, [high]))
    return scene.sent(raised, 1)


def three_hundred(scene: Scene) -> str:
    """300 descriptors are sent."""
    _, raised = scene.tried(lambda: scene.implementation.send(scene.sock, [scene.file] * 300))
    return scene.sent(raised, 300)


def short_write(scene: Scene) -> str:
    """A megabyte is sent with a descriptor, more than the socket accepts at once."""
    size, read, fds = 1 << 20, 0, list[int]()
    scene.peer.setblocking(False)

    def drain() -> bool:
        nonlocal read
        try:
            data, more, _, _ = socket.recv_fds(scene.peer, 65536, 253)
        except BlockingIOError:
            return True
        read += len(data)
        fds.extend(more)
        return False

    _, raised = scene.tried(
        lambda: scene.implementation.send_data(scene.sock, bytes(size), [scene.file], drain)
    )
    while not drain():
        if scene.peer.recv(1, socket.MSG_PEEK) == b"":
            break
    if raised is not None:
        return "error"
    if read < size:
        return f"silent loss of {size - read} bytes"
    return {0: "silent loss 1", 1: "sent"}.get(len(fds), f"sent {len(fds)} times")


def closed_while_waiting(scene: Scene) -> str:
    """The descriptor is closed, and its number reused, while the send waits for space."""
    if not scene.implementation.waits_in_tasks:
        raise NotImplementedError
    scene.sock.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            scene.sock.send(b"." * 4096)
    given, other = os.dup(scene.file), os.memfd_create("another")
    fds: list[int] = []

    def replace_and_drain() -> bool:
        os.dup2(other, given)
        fds.extend(scene.arrived())
        return True

    _, raised = scene.tried(
        lambda: scene.implementation.send_data(scene.sock, b"\0", [given], replace_and_drain)
    )
    fds.extend(scene.arrived())
    if raised is not None:
        return "error"
    if not fds:
        return "silent loss 1"
    return "right file" if identity(fds[0]) == identity(scene.file) else "wrong file"


def cancelled(scene: Scene) -> str:
    """A receive is cancelled when a descriptor arrives, and repeated."""
    got, raised = scene.tried(
        lambda: scene.implementation.receive_cancelled(
            scene.sock, lambda: push(scene.peer, [scene.file])
        )
    )
    return scene.account(1, list(got or ()), raised)


FAULTS: list[Callable[[Scene], str]] = [
    emfile,
    full_table,
    one_too_many,
    too_many,
    too_few,
    with_credentials,
    space_for_credentials,
    inheritable,
    plain_read,
    end_of_stream,
    end_with_credentials,
    dropped,
    wrong_kind,
    cancelled,
    socket_object,
    socket_among_numbers,
    closed_descriptor,
    closed_while_waiting,
    three_hundred,
    short_write,
]


def measure(implementation: Implementation, fault: Callable[[Scene], str]) -> str:
    """Cause a fault in an implementation, and describe its behaviour."""
    sock, peer = socket.socketpair()
    with sock, peer:
        try:
            return fault(Scene(implementation, sock, peer, os.memfd_create("fault")))
        except NotImplementedError:
            return BEHAVIOUR_OF_NONE
        except OSError as exc:
            # Another error than the one to measure.
            return f"failed: {errno.errorcode.get(exc.errno or 0, exc)}"
