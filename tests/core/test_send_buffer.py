"""send_buffer and receive_buffer: sealed memory, checked before it is mapped."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests._helpers.descriptor_kinds import KIND, KINDS, of_kind, opened, pass_on
from tests._helpers.fds import free_descriptors
from tests._helpers.peers import stdlib_peer
from trio_unixconn import (
    DescriptorKind,
    Seals,
    UnsafeBufferError,
    connection_pair,
)
from trio_unixconn.testing import clog, unclog

if TYPE_CHECKING:
    from collections.abc import Callable

SEALS = {"seal": 1, "shrink": 2, "grow": 4, "write": 8}
ADD_SEALS, GET_SEALS = 1033, 1034
ALL_SEALS = 15


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
async def test_receive_buffer_of_any_size(size: int) -> None:
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


async def test_send_buffer_to_another_process() -> None:
    """Another process that knows nothing of seals reads it from its beginning, as any file."""
    async with stdlib_peer() as peer:
        await peer.conn.send_buffer(b"x" * 100_000)
        assert bytes.fromhex(await peer.ask("read_behind")) == b"x" * 100_000


async def test_receive_buffer_rejects_unsealed_memory_of_another_process() -> None:
    """Memory that its sender can still change is rejected, with the missing seals."""
    async with stdlib_peer() as peer:
        await peer.ask("send", kinds=[["memfd"]])
        with pytest.raises(UnsafeBufferError, match="missing seals: shrink, grow, write"):
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
async def test_send_buffer_of_contiguous_buffers(make: Callable[[], Any]) -> None:
    """Any contiguous buffer is sent as its bytes."""
    view = await through(make())
    assert view == bytes(make())


async def test_send_buffer_copies() -> None:
    """Changes of the bytearray after send_buffer change nothing for the receiver."""
    one, two = connection_pair()
    data = bytearray(b"right")
    async with one, two:
        await one.send_buffer(data)
        data[:] = b"wrong"
        data.clear()
        assert bytes(await two.receive_buffer(5)) == b"right"


@pytest.mark.parametrize("bad", ["x", None, 1.5, True, -1, [1], memoryview(b"abcd")[::2]])
async def test_send_buffer_rejects_other_arguments(bad: Any) -> None:
    """Neither a contiguous buffer nor a file descriptor: rejected, and nothing is sent."""
    one, two = connection_pair()
    async with one, two:
        with pytest.raises((TypeError, ValueError)):
            await one.send_buffer(bad)
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"


async def test_send_buffer_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOMEM leaves no descriptor, and nothing is sent."""

    def fail(*_: object) -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "pwrite", fail)
    one, two = connection_pair()
    async with one, two:
        with pytest.raises(OSError, match="Cannot allocate memory"):
            await one.send_buffer(b"x")
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
async def test_send_buffer_of_a_memfd(seals: int) -> None:
    """A memfd of the caller's is sealed, even if it has seals already, and not copied."""
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


async def test_send_buffer_of_a_memfd_that_is_closed_while_the_send_waits() -> None:
    """The memfd arrives even if the caller closes it, and reuses its number, meanwhile."""
    fd = memfd(b"content")
    one, two = connection_pair()
    async with one, two:
        count = clog(one)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.send_buffer, fd)
                await wait_all_tasks_blocked()
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, 0)
                os.dup2(0, fd)
                await unclog(two, count)
            os.close(fd)
            received = await two.receive_buffer(7)
        assert bytes(received) == b"content"


@pytest.mark.parametrize("more", [0x10, 0x20])
async def test_send_buffer_of_a_memfd_with_other_seals(more: int) -> None:
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
async def test_send_buffer_rejects_what_cannot_be_sealed(kind: str, tmp_path: Path) -> None:
    """Any other file, or a memfd that cannot be sealed: UnsafeBufferError; nothing is sent."""
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
        with pytest.raises(UnsafeBufferError, match="cannot seal this ") as caught:
            await one.send_buffer(fd)
        assert isinstance(caught.value.kind, DescriptorKind)
        await one.send_all(b"next")
        assert await two.receive_some() == b"next"
    if mapping is not None:
        mapping.close()
    os.close(fd)


@pytest.mark.parametrize("missing", SEALS)
async def test_receive_buffer_rejects_a_missing_seal(missing: str) -> None:
    """A memfd without one of the seals is rejected, with the name of that seal, and not mapped."""
    before = mappings()
    fd = memfd(b"content", seals=ALL_SEALS - SEALS[missing])
    with pytest.raises(UnsafeBufferError, match=rf"\(missing seals: {missing}\)$") as caught:
        await pass_on(fd, lambda conn: conn.receive_buffer(100))
    assert caught.value.kind is KIND.REGULAR_FILE
    assert mappings() == before


async def test_receive_buffer_rejects_unsealed_files(tmp_path: Path) -> None:
    """An unsealed memfd, one that cannot be sealed, and a plain file are rejected."""
    for fd in (memfd(b"content"), memfd(b"content", 0)):
        with pytest.raises(UnsafeBufferError, match="missing seals: "):
            await pass_on(fd, lambda conn: conn.receive_buffer(100))
    fd = opened(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    # A file of tmpfs has seals as a memfd has them.
    with pytest.raises(UnsafeBufferError, match="expected a sealed memfd, got "):
        await pass_on(fd, lambda conn: conn.receive_buffer(100))


@pytest.mark.parametrize("kind", [each for each in KINDS if each is not KIND.REGULAR_FILE])
async def test_receive_buffer_rejects_other_kinds(kind: DescriptorKind) -> None:
    """Any other file is rejected, and the error says which kind it is."""
    with pytest.raises(UnsafeBufferError, match=f"got an? {kind.value}$") as caught:
        await pass_on(of_kind(kind), lambda conn: conn.receive_buffer(100))
    assert caught.value.kind is kind


@pytest.mark.parametrize(("size", "most"), [(8, 7), (1, 0), (4097, 4096)])
async def test_receive_buffer_max_bytes(size: int, most: int) -> None:
    """More than max_bytes are rejected before they are mapped; exactly that many are received."""
    before = mappings()
    text = f"expected a buffer of at most {most} bytes, got {size}$"
    with pytest.raises(UnsafeBufferError, match=text):
        await pass_on(memfd(b"x" * size, seals=ALL_SEALS), lambda conn: conn.receive_buffer(most))
    assert mappings() == before
    assert await through(b"x" * most, most) == b"x" * most


@pytest.mark.parametrize("bad", [-1, 1.0, "1", None])
async def test_receive_buffer_rejects_other_max_bytes(bad: Any) -> None:
    """A wrong limit is rejected before anything is received."""
    one, two = connection_pair()
    async with one, two:
        await one.send_buffer(b"x")
        with pytest.raises((TypeError, ValueError)):
            await two.receive_buffer(bad)
        assert bytes(await two.receive_buffer(1)) == b"x"


async def test_receive_buffer_with_numpy() -> None:
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


async def test_send_buffer_of_an_array_without_elements() -> None:
    """An array of two dimensions without elements is sent as no bytes."""
    numpy = pytest.importorskip("numpy")
    assert bytes(await through(numpy.zeros((0, 3)))) == b""


async def test_receive_buffer_rejects_write_only_memory() -> None:
    """A sealed memfd whose descriptor is open only for writing is rejected."""
    one, two = connection_pair()
    fd = os.memfd_create("m", os.MFD_ALLOW_SEALING)
    os.write(fd, b"x")
    writing = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    async with one, two:
        await one.send_buffer(fd)
        assert bytes(await two.receive_buffer(1)) == b"x"
        await one.send_fd(writing)
        with pytest.raises(UnsafeBufferError, match="cannot map this memfd"):
            await two.receive_buffer(1)
    os.close(fd)
    os.close(writing)


async def test_receive_buffer_without_a_free_descriptor() -> None:
    """EMFILE, and no leak, if no descriptor is free for the mapping (before Python 3.13)."""
    one, two = connection_pair()
    async with one, two:
        await one.send_buffer(b"x")
        with free_descriptors(1):
            if sys.version_info >= (3, 13):
                assert bytes(await two.receive_buffer(1)) == b"x"
            else:
                with pytest.raises(OSError, match="Too many open files"):
                    await two.receive_buffer(1)


async def test_receive_buffer_whose_mapping_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """EMFILE of mmap(2) is raised as it is, on every Python; the memfd is closed."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    one, two = connection_pair()
    async with one, two:
        await one.send_buffer(b"x")
        with monkeypatch.context() as patch:
            patch.setattr("mmap.mmap", fail)
            with pytest.raises(OSError, match="Too many open files"):
                await two.receive_buffer(1)


################################################################
# Memory that its sender can still change
################################################################

SHRINK_ONLY = SEALS["shrink"]


async def test_receive_buffer_with_seals_accepts_memory_that_changes() -> None:
    """With seals=Seals.SHRINK, memory that may only not shrink is mapped, and seen to change."""
    one, two = connection_pair()
    fd = memfd(b"before", seals=SHRINK_ONLY)
    async with one, two:
        await one.send_fd(fd)
        with pytest.raises(UnsafeBufferError, match="missing seals: seal, grow, write"):
            await two.receive_buffer(6)
        await one.send_fd(fd)
        view = await two.receive_buffer(6, seals=Seals.SHRINK)
        assert view.readonly
        assert bytes(view) == b"before"
        os.pwrite(fd, b"after.", 0)
        assert bytes(view) == b"after."
        # It cannot shrink, which would end this process at the next look; growing is harmless.
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        os.ftruncate(fd, 100_000)
        assert bytes(view) == b"after."
        view.release()
    os.close(fd)


@pytest.mark.parametrize("present", range(16))
@pytest.mark.parametrize("wanted", [Seals.SHRINK, Seals.SHRINK | Seals.WRITE, Seals.ALL])
async def test_receive_buffer_with_seals_accepts_more_seals(present: int, wanted: Seals) -> None:
    """Memory is accepted if it has the seals that are asked for, and more."""
    one, two = connection_pair()
    fd = memfd(b"content", seals=present)
    async with one, two:
        await one.send_fd(fd)
        os.close(fd)
        if wanted in Seals(present):
            assert bytes(await two.receive_buffer(7, seals=wanted)) == b"content"
        else:
            with pytest.raises(UnsafeBufferError, match="missing seals: "):
                await two.receive_buffer(7, seals=wanted)


async def test_receive_buffer_with_seals_of_a_read_only_descriptor() -> None:
    """A sender that keeps the right to write to itself sends a read-only descriptor."""
    one, two = connection_pair()
    fd = memfd(b"before", seals=SHRINK_ONLY)
    async with one, two:
        with open(f"/proc/self/fd/{fd}", "rb") as reading:
            await one.send_fd(reading)
        view = await two.receive_buffer(6, seals=Seals.SHRINK)
        os.pwrite(fd, b"after.", 0)
        assert bytes(view) == b"after."
    os.close(fd)


async def test_receive_buffer_with_seals_of_memory_with_holes() -> None:
    """A hole that the sender makes reads as zeros."""
    one, two = connection_pair()
    fd = memfd(b"x" * 8192, seals=SHRINK_ONLY)
    async with one, two:
        await one.send_fd(fd)
        view = await two.receive_buffer(8192, seals=Seals.SHRINK)
        libc = ctypes.CDLL(None, use_errno=True)
        keep_size, punch_hole = 1, 2
        done = libc.fallocate(
            fd, keep_size | punch_hole, ctypes.c_longlong(0), ctypes.c_longlong(8192)
        )
        assert done == 0
        assert bytes(view) == bytes(8192)
    os.close(fd)


async def test_receive_buffer_with_seals_rejects_huge_pages() -> None:
    """Huge pages that the sender can take away are rejected: a read could be SIGBUS."""
    try:
        fd = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_ALLOW_SEALING)
    except OSError:
        pytest.skip("this kernel has no huge pages")
    one, two = connection_pair()
    async with one, two:
        os.ftruncate(fd, os.fstatvfs(fd).f_bsize)
        fcntl.fcntl(fd, ADD_SEALS, SHRINK_ONLY)
        await one.send_fd(fd)
        os.close(fd)
        with pytest.raises(UnsafeBufferError, match="got one of huge pages"):
            await two.receive_buffer(2**30, seals=Seals.SHRINK)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (Seals.WRITE, ValueError),
        (Seals.ALL & ~Seals.SHRINK, ValueError),
        (Seals(0), ValueError),
        (2, TypeError),
        ("shrink", TypeError),
        (None, TypeError),
    ],
)
async def test_receive_buffer_rejects_other_seals(bad: Any, error: type[Exception]) -> None:
    """Wrong seals, or none against shrinking, are rejected before anything is received."""
    one, two = connection_pair()
    async with one, two:
        await one.send_buffer(b"x")
        with pytest.raises(error, match=r"^seals must"):
            await two.receive_buffer(1, seals=bad)
        assert bytes(await two.receive_buffer(1)) == b"x"
