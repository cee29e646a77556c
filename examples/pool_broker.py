"""A file broker: one process with rights opens files, workers without rights read them.

This process opens the file that a client names, if the policy allows it: a regular file below one
directory, by a path without symbolic links and "..". Parsing files of other users is the dangerous
part. Workers do it that can open no file: if the broker is root, they become the user "nobody" in
an empty root directory, and if the kernel has Landlock, it denies them every file. They receive an
open file with each job, and nothing else.

Run it with ``python examples/pool_broker.py``.
"""

import ctypes
import os
import resource
import stat
import sys
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from functools import partial
from io import BufferedReader
from pathlib import Path

import trio

from trio_unixconn import UnixConnection, UnixConnectionError, open_unix_connection, serve_unix
from trio_unixconn.pool import Job, WorkerPool, open_worker_pool

LONGEST_NAME = 4096
LONGEST_EXCHANGE = 10  # seconds
LARGEST = 2**20
NOBODY = 65534
IN_FLIGHT, DESCRIPTORS = 16, 64  # of a worker; it needs some for itself

################################################################
# In a worker
################################################################

# Python has no names for these: of linux/prctl.h, asm-generic/unistd.h, linux/landlock.h.
PR_SET_NO_NEW_PRIVS = 38
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446
EVERY_ACCESS = 2**13 - 1  # of its first version, in Linux 5.13


@asynccontextmanager
async def without_rights() -> AsyncGenerator[str, None]:
    """Give up the rights that a worker must not have, before it gets a job."""
    libc = ctypes.CDLL(None, use_errno=True)
    # The C library loads this when a thread of the interpreter ends, and aborts without it.
    with suppress(OSError):  # another C library does not need it
        ctypes.CDLL("libgcc_s.so.1")
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    given_up: list[str] = []
    if os.geteuid() == 0:
        os.chdir(directory := tempfile.mkdtemp())
        os.rmdir(directory)  # it still exists, empty, and no file can be created in it
        os.chroot(".")
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        given_up.append("root")
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    accesses = ctypes.c_uint64(EVERY_ACCESS)
    rules = libc.syscall(
        LANDLOCK_CREATE_RULESET, ctypes.byref(accesses), ctypes.c_size_t(ctypes.sizeof(accesses)), 0
    )
    if rules >= 0:
        # It has no rule, so everything is denied, to this thread and to those that it starts.
        if libc.syscall(LANDLOCK_RESTRICT_SELF, rules, 0) == 0:
            given_up.append("all files")
        os.close(rules)
    if not given_up:
        raise RuntimeError("a worker would have the broker's rights; be root, or have Landlock")
    yield " and ".join(given_up)


async def handler(file: BufferedReader, job: Job) -> bytes:
    text = await trio.wrap_file(file).read(LARGEST)
    try:
        os.close(os.open(job.data, os.O_RDONLY))
        itself = "can open it"
    except OSError as exc:
        itself = f"cannot open it ({exc.strerror})"
    found = f"{len(text.split())} words"
    return f"{found}, by a worker that has given up {job.state}, and itself {itself}".encode()


################################################################
# In the broker
################################################################


def open_inside(directory: int, name: str) -> int:
    """Open a regular file by its path below a directory, step by step, following no link.

    openat2(2) with RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS does it in one step; Python lacks it.
    """
    *steps, last = name.split("/")
    if not {"", ".", ".."}.isdisjoint([*steps, last]) or "\0" in name:
        raise PermissionError(0, "not a path below the directory")
    at = os.dup(directory)
    try:
        for step in steps:
            inner = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = inner
        # O_NONBLOCK: the open of a FIFO would wait.
        fd = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise PermissionError(0, "not a regular file")
    return fd


async def receive_name(conn: UnixConnection) -> str:
    line = b""
    while not line.endswith(b"\n") and len(line) < LONGEST_NAME:
        if not (chunk := await conn.receive_some(LONGEST_NAME - len(line))):
            break
        line += chunk
    return os.fsdecode(line.removesuffix(b"\n"))


async def broker(pool: WorkerPool, path: str, directory: int, conn: UnixConnection) -> None:
    try:
        with trio.fail_after(LONGEST_EXCHANGE):
            name = await receive_name(conn)
            try:
                fd = open_inside(directory, name)
            except OSError as exc:
                answer = f"refused: {exc.strerror}".encode()
            else:
                # The pool owns the file descriptor now. The path is for demonstration only.
                answer = await pool.call(fd, data=os.fsencode(os.path.join(path, name)))
            await conn.send_all(answer)
    except (UnixConnectionError, trio.TooSlowError) as exc:
        print("a request failed:", exc, file=sys.stderr)


async def ask(path: str, name: str) -> str:
    async with await open_unix_connection(path) as conn:
        await conn.send_all(os.fsencode(name) + b"\n")
        answer = b"".join([chunk async for chunk in conn]).decode()
    print(f"{name}: {answer}")
    return answer


def fill(home: Path) -> None:
    (home / "public/inner").mkdir(parents=True)
    for name in ("secret", "public/notes", "public/inner/more"):
        (home / name).touch(0o600)
        (home / name).write_text("some words of mine\n")
    (home / "public/link").symlink_to("../secret")
    (home / "public/up").symlink_to("..")
    os.mkfifo(home / "public/fifo")


async def demonstrate(home: Path) -> None:
    fill(home)
    address, public = str(home / "socket"), str(home / "public")
    directory = os.open(public, os.O_RDONLY | os.O_DIRECTORY)
    open_pool = partial(open_worker_pool, setup="pool_broker:without_rights", workers=2)
    async with (
        open_pool("pool_broker:handler", max_in_flight=IN_FLIGHT) as pool,
        trio.open_nursery() as nursery,
    ):
        serve = partial(serve_unix, partial(broker, pool, public, directory), address)
        server = await nursery.start(serve)
        for name in ("notes", "inner/more"):
            answer = await ask(address, name)
            assert answer.startswith("4 words, ")
            assert "itself cannot open it" in answer
        for name in ("../secret", "/etc/passwd", "link", "up/secret", "fifo", "inner", "none"):
            assert (await ask(address, name)).startswith("refused: ")
        server.drain()
    os.close(directory)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        trio.run(demonstrate, Path(home))
