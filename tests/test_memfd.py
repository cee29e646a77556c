"""Sealed memory: checked before it is mapped, and nobody can change it any more."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers import free_descriptors, stdlib_peer

from trio_unixconn import (
    DescriptorKind,
    UnixConnection,
    UnsafeBufferError,
    connection_pair,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

KIND = DescriptorKind
SEALS = {"seal": 1, "shrink": 2, "grow": 4, "write": 8}
ADD_SEALS, GET_SEALS = 1033, 1034
ALL_SEALS = 15


async def pass_on(fd: int, receive: Callable[[UnixConnection], Awaitable[Any]]) -> Any:
    """Send a descriptor, which is closed, and receive it; the connection must stay in step."""
    one, two = connection_pair()
    async with one, two:
        await one.send_fd(fd)
        os.close(fd)
        await one.send_fd(0)
        try:
            return await receive(two)
        finally:
            got = await two.receive_fd()
            assert os.path.sameopenfile(got, 0)
            os.close(got)


def opened(path: Path | str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC)


def of_kind(kind: DescriptorKind) -> int:
    """Open something of that kind for reading."""
    if kind is KIND.REGULAR_FILE:
        return os.memfd_create("regular")
    if kind is KIND.DIRECTORY:
        return opened("/", os.O_RDONLY)
    if kind is KIND.PIPE:
        read, write = os.pipe()
        os.close(write)
        return read
    if kind is KIND.SOCKET:
        return socket.socket().detach()
    if kind is KIND.CHARACTER_DEVICE:
        return opened(os.devnull, os.O_RDONLY)
    return os.eventfd(0)


KINDS = [each for each in KIND if each not in (KIND.BLOCK_DEVICE, KIND.SYMBOLIC_LINK)]


################################################################
# Sealed memory
################################################################


def mappings() -> int:
    """Return how many of our memfds this process has mapped."""
    return Path("/proc/self/maps").read_text().count("/memfd:")


async def through(data: Any, most: int = 10_000_000) -> memoryview:
    """Send and receive a buffer."""
    one, two = connection_pair()
    async with one, two:
        await one.send_buffer(data)
        return await two.receive_buffer(most)


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 5_000_000])
async def test_sizes(size: int) -> None:
    """A buffer of any size arrives as it was, read-only, and its mapping ends with it."""
    data = os.urandom(size)
    before = mappings()
    view = await through(data)
    assert view == data
    assert view.readonly
    assert (view.format, view.ndim, view.nbytes) == ("B", 1, size)
    assert mappings() - before == (1 if size else 0)
    part = view[1:]
    view.release()
    assert bytes(part) == data[1:]
    assert mappings() - before == (1 if size else 0)
    del part, view
    gc.collect()
    assert mappings() == before


async def test_to_another_process() -> None:
    """Another process that knows nothing of seals reads it from its beginning, as any file."""
    async with stdlib_peer() as peer:
        await peer.conn.send_buffer(b"x" * 100_000)
        assert bytes.fromhex(await peer.ask("read_behind")) == b"x" * 100_000


async def test_unsealed_from_another_process() -> None:
    """What another process could still change is refused, with the seals that it lacks."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[["memfd"]])
        with pytest.raises(UnsafeBufferError, match="lacks the seals shrink, grow, write"):
            await peer.conn.receive_buffer(9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: b"\0\1\2\3" * 10,
        lambda: bytearray(b"\0\1\2\3" * 10),
        lambda: memoryview(bytearray(b"..\0\1\2\3.."))[2:6],
        lambda: memoryview(b"\0\1\2\3" * 4).cast("I"),
        lambda: memoryview(b"\0\1\2\3" * 4).cast("B", (4, 4)),
    ],
)
async def test_kinds_of_buffers(make: Callable[[], Any]) -> None:
    """Whatever is contiguous is sent as the bytes that it is made of."""
    view = await through(make())
    assert view == bytes(make())


async def test_changed_afterwards() -> None:
    """What the sender does to its bytearray afterwards changes nothing, also while it waits."""
    one, two = connection_pair()
    data = bytearray(b"right")
    async with one, two:
        await one.send_buffer(data)
        data[:] = b"wrong"
        data.clear()
        assert bytes(await two.receive_buffer(5)) == b"right"


@pytest.mark.parametrize("bad", ["x", None, 1.5, True, -1, [1], memoryview(b"abcd")[::2]])
async def test_bad_buffer(bad: Any) -> None:
    """What is neither a contiguous buffer nor a descriptor is refused, and nothing is sent."""
    one, two = connection_pair()
    async with one, two:
        with pytest.raises((TypeError, ValueError)):
            await one.send_buffer(bad)
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


def memfd(data: bytes, flags: int = os.MFD_ALLOW_SEALING, seals: int = 0) -> int:
    """Make a memfd, which the caller owns."""
    fd = os.memfd_create("mine", flags)
    os.write(fd, data)
    if seals:
        fcntl.fcntl(fd, ADD_SEALS, seals)
    return fd


@pytest.mark.parametrize("seals", [0, SEALS["grow"], ALL_SEALS - SEALS["seal"], ALL_SEALS])
async def test_own_memfd(seals: int) -> None:
    """A memfd of the caller's is sealed where it is, also if it is already, and not copied."""
    fd = memfd(b"content", seals=seals)
    one, two = connection_pair()
    async with one, two:
        for _ in range(2):
            await one.send_buffer(fd)
            assert fcntl.fcntl(fd, GET_SEALS) == ALL_SEALS
            view = await two.receive_buffer(7)
            assert bytes(view) == b"content"
            del view
        with open(fd, "rb", closefd=False) as file:
            await one.send_buffer(file)
            got = await two.receive_fd()
            assert os.path.sameopenfile(got, fd)
            os.close(got)
    os.close(fd)


@pytest.mark.parametrize("more", [0x10, 0x20])
async def test_own_memfd_with_more_seals(more: int) -> None:
    """One that has seals beyond the four (F_SEAL_FUTURE_WRITE, F_SEAL_EXEC) is sealed as well."""
    try:
        fd = memfd(b"content", seals=more)
    except OSError:
        pytest.skip("this kernel has no such seal")
    one, two = connection_pair()
    async with one, two:
        try:
            for _ in range(2):
                await one.send_buffer(fd)
                assert fcntl.fcntl(fd, GET_SEALS) & ALL_SEALS == ALL_SEALS
                assert bytes(await two.receive_buffer(7)) == b"content"
        finally:
            os.close(fd)


@pytest.mark.parametrize("kind", ["unsealable", "mapped", "file", "pipe", "directory", "socket"])
async def test_what_cannot_be_sealed(kind: str, tmp_path: Path) -> None:
    """What is no memfd, or cannot be sealed, is UnsafeBufferError; nothing is sent."""
    mapping: mmap.mmap | None = None
    if kind == "unsealable":
        fd = memfd(b"content", 0)
    elif kind == "mapped":
        fd = memfd(b"content")
        mapping = mmap.mmap(fd, 7)
    elif kind == "file":
        fd = opened(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    else:
        fd = of_kind(DescriptorKind(kind))
    one, two = connection_pair()
    async with one, two:
        with pytest.raises(UnsafeBufferError, match="memfd that can be sealed is due") as caught:
            await one.send_buffer(fd)
        assert isinstance(caught.value.kind, DescriptorKind)
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"
    if mapping is not None:
        mapping.close()
    os.close(fd)


@pytest.mark.parametrize("missing", SEALS)
async def test_partially_sealed(missing: str) -> None:
    """A memfd that lacks one seal is refused, by the name of that seal, and not mapped."""
    before = mappings()
    fd = memfd(b"content", seals=ALL_SEALS - SEALS[missing])
    with pytest.raises(UnsafeBufferError, match=f"lacks the seals {missing}$") as caught:
        await pass_on(fd, lambda conn: conn.receive_buffer(100))
    assert caught.value.kind is KIND.REGULAR_FILE
    assert mappings() == before


async def test_not_sealed_at_all(tmp_path: Path) -> None:
    """An unsealed memfd, one without seals, and a plain file are refused."""
    for fd in (memfd(b"content"), memfd(b"content", 0)):
        with pytest.raises(UnsafeBufferError, match="it lacks"):
            await pass_on(fd, lambda conn: conn.receive_buffer(100))
    fd = opened(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with suppress(OSError):
        fcntl.fcntl(fd, GET_SEALS)
    with pytest.raises(UnsafeBufferError, match="sealed memfd was due"):
        await pass_on(fd, lambda conn: conn.receive_buffer(100))


@pytest.mark.parametrize("kind", [each for each in KINDS if each is not KIND.REGULAR_FILE])
async def test_no_memfd(kind: DescriptorKind) -> None:
    """Another kind than a memfd is refused, and the error has what came."""
    with pytest.raises(UnsafeBufferError, match=f"but a {kind.value} came") as caught:
        await pass_on(of_kind(kind), lambda conn: conn.receive_buffer(100))
    assert caught.value.kind is kind


@pytest.mark.parametrize(("size", "most"), [(8, 7), (1, 0), (4097, 4096)])
async def test_too_large(size: int, most: int) -> None:
    """More than max_bytes is refused before it is mapped; exactly that many are received."""
    before = mappings()
    text = f"at most {most} bytes was due, but one of {size} came"
    with pytest.raises(UnsafeBufferError, match=text):
        await pass_on(memfd(b"x" * size, seals=ALL_SEALS), lambda conn: conn.receive_buffer(most))
    assert mappings() == before
    assert await through(b"x" * most, most) == b"x" * most


@pytest.mark.parametrize("bad", [-1, 1.0, "1", None])
async def test_bad_max_bytes(bad: Any) -> None:
    """A limit that makes no sense is refused before anything is received."""
    one, two = connection_pair()
    async with one, two:
        await one.send_buffer(b"x")
        with pytest.raises((TypeError, ValueError)):
            await two.receive_buffer(bad)
        assert bytes(await two.receive_buffer(1)) == b"x"


async def test_numpy() -> None:
    """An array arrives without a copy, cannot be written, and holds the mapping."""
    numpy = pytest.importorskip("numpy")
    before = mappings()
    sent = numpy.arange(100_000, dtype="<u4")
    view = await through(sent)
    array = numpy.frombuffer(view, dtype="<u4")
    assert (array == sent).all()
    assert not array.flags.owndata
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True
    del view
    gc.collect()
    assert mappings() == before + 1
    assert array[99_999] == 99_999
    del array
    gc.collect()
    assert mappings() == before


async def test_numpy_without_elements() -> None:
    """An array of two dimensions without elements is sent as no bytes."""
    numpy = pytest.importorskip("numpy")
    assert bytes(await through(numpy.zeros((0, 3)))) == b""


async def test_sealed_memory_that_cannot_be_read() -> None:
    """A sealed memfd whose descriptor is open for writing only is refused."""
    one, two = connection_pair()
    fd = os.memfd_create("m", os.MFD_ALLOW_SEALING)
    os.write(fd, b"x")
    writing = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    async with one, two:
        await one.send_buffer(fd)
        assert bytes(await two.receive_buffer(1)) == b"x"
        await one.send_fd(writing)
        with pytest.raises(UnsafeBufferError, match="cannot be mapped"):
            await two.receive_buffer(1)
    os.close(fd)
    os.close(writing)


async def test_no_descriptor_free_to_map_with() -> None:
    """A mapping that needs a descriptor, before Python 3.13, and finds none is EMFILE; no leak."""
    one, two = connection_pair()
    async with one, two:
        await one.send_buffer(b"x")
        with free_descriptors(1):
            if sys.version_info >= (3, 13):
                assert bytes(await two.receive_buffer(1)) == b"x"
            else:
                with pytest.raises(OSError, match="Too many open files"):
                    await two.receive_buffer(1)
