"""CompletionLog: the jobs that a worker has finished outlive it, and it cannot harm the reader."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from typing import TYPE_CHECKING, Any

import pytest
import trio

from trio_unixconn import WorkerDiedError
from trio_unixconn._memfd import F_ADD_SEALS, Seals
from trio_unixconn.pool import open_worker_pool
from trio_unixconn.pool._completion_log import (
    CompletionLog,
    CompletionLogWriter,
    create_memory_file,
)

if TYPE_CHECKING:
    from pathlib import Path

    from trio_unixconn.pool import Job

F_GET_SEALS = 1034


@pytest.fixture(params=["memfd", "temporary file"])
def maybe_without_memfd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system with memfds, and one without."""
    if request.param == "temporary file":
        monkeypatch.delattr(os, "memfd_create")


async def truncate_log(stream: object, job: Job) -> bytes:
    """Do to the log what a hostile worker would do; a worker runs this."""
    outcomes: list[str] = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if "trio_unixconn.pool" not in os.readlink(f"/proc/self/fd/{name}"):
                continue
        except OSError:
            continue
        for call, arguments in (
            (os.ftruncate, (int(name), 0)),
            (os.ftruncate, (int(name), 2**20)),
            (fcntl.fcntl, (int(name), F_ADD_SEALS, Seals.WRITE.value)),
        ):
            try:
                call(*arguments)
            except OSError as exc:
                outcomes.append(errno.errorcode[exc.errno or 0])
            else:
                outcomes.append("done")
    if job.data == b"die":
        os._exit(1)
    return " ".join(sorted(set(outcomes))).encode()


@pytest.mark.usefixtures("maybe_without_memfd")
def test_entries_after_writer_closed() -> None:
    """The ids that were added last are read by another process, even if the writer has closed."""
    log = CompletionLog(3)
    writer = CompletionLogWriter(os.dup(log.fd))
    assert log.entries() == {0}
    for job_id in (7, 8, 9, 2**63):
        writer.add(job_id)
    assert log.entries() == {8, 9, 2**63}
    writer.close()
    writer.close()
    assert log.entries() == {8, 9, 2**63}
    log.close()
    log.close()


def test_entries_after_truncation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without seals, which a writer has truncated or extended, does not kill the reader."""
    monkeypatch.delattr(os, "memfd_create")
    log = CompletionLog(3)
    os.pwrite(log.fd, b"\1" * 24, 0)
    os.ftruncate(log.fd, 13)
    assert log.entries() == {0x0101010101010101}
    os.ftruncate(log.fd, 0)
    assert log.entries() == set()
    os.ftruncate(log.fd, 2**40)
    assert log.entries() == {0}
    log.close()


def test_log_size_is_sealed() -> None:
    """No process can change the size of a log, nor add seals to it."""
    log = CompletionLog(3)
    assert fcntl.fcntl(log.fd, F_GET_SEALS) == (Seals.SHRINK | Seals.GROW | Seals.SEAL).value
    for size in (0, 2**20):
        with pytest.raises(PermissionError):
            os.ftruncate(log.fd, size)
    log.close()


async def test_worker_cannot_truncate_log(no_child_left: None) -> None:
    """A worker that truncates its log and dies does no harm to its pool."""
    with trio.fail_after(60):
        async with open_worker_pool(
            "tests.pool.test_completion_log:truncate_log", workers=1
        ) as pool:
            # Before Python 3.13 a mapping has a file descriptor.
            assert await pool.call() in {b"EPERM", b""}
            with pytest.raises(WorkerDiedError):
                await pool.call(data=b"die")
            assert await pool.call() in {b"EPERM", b""}


@pytest.mark.usefixtures("maybe_without_memfd")
def test_create_memory_file_of_any_size() -> None:
    """The bytes are read from the beginning, when the file descriptor is opened as a file."""
    data = os.urandom(300_000)
    with open(create_memory_file(data, Seals.ALL), "rb") as file:
        assert file.read() == data


@pytest.mark.usefixtures("maybe_without_memfd")
def test_create_memory_file_closes_on_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is no space, that is an OSError, and nothing stays open."""

    def ftruncate(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", ftruncate)
    with pytest.raises(OSError, match="No space left"):
        CompletionLog(3)


def test_writer_closes_fd_on_error() -> None:
    """A file descriptor that cannot be mapped is closed."""
    read, write = os.pipe()
    os.close(write)
    with pytest.raises(OSError):
        CompletionLogWriter(read)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read)


def test_create_memory_file_without_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without memfds, the file is deleted as soon as it is open."""
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    os.close(create_memory_file(b"x", Seals.ALL))
    assert list(tmp_path.iterdir()) == []
