"""A service manager in a few lines: it starts a service, and prints what that reports.

The service is the same file in a second process. Any program that speaks the protocol of
sd_notify(3) could be in its place.

Run it with ``python examples/notify_receiver.py``.
"""

import os
import subprocess
import sys
import tempfile
from functools import partial

import trio

from trio_unixconn import Datagram, UnixConnectionError, UnixDatagramSocket, open_unix_datagram
from trio_unixconn.systemd import ServiceManager

LONGEST_RUN = 60  # seconds


async def service() -> None:
    manager = ServiceManager.from_environ()  # does nothing where there is no NOTIFY_SOCKET
    await manager.status("loading")
    with tempfile.TemporaryFile() as state:
        await manager.store([state], "state")  # for the next start
    await manager.ready("serving")
    await manager.barrier()  # the manager has processed everything until here
    await manager.stopping()


def assignments(message: Datagram) -> dict[str, str]:
    lines = message.data.decode(errors="replace").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


async def follow(receiver: UnixDatagramSocket, pid: int) -> None:
    """Print what one process reports, until this process says that it has ended."""
    while True:
        try:
            message = await receiver.receive_message()
        except UnixConnectionError as exc:
            # Too large, or too many file descriptors: only this datagram is lost.
            print("ignored:", exc)
            continue
        # Leaving the block closes the file descriptors; so the sender knows that a barrier
        # was reached.
        async with message:
            sender = message.credentials
            if sender is not None and sender.pid == os.getpid():
                return
            if sender is None or sender.pid != pid:
                print("ignored: a message of another process")
                continue
            print(f"{assignments(message)} with {len(message.fds)} file descriptors", flush=True)


async def run_service(path: str, *, task_status: trio.TaskStatus[trio.Process]) -> None:
    """Run the service. A cancellation ends it, and so does an error of this process."""
    command = [sys.executable, __file__, "service"]
    run = partial(
        trio.run_process,
        command,
        env={**os.environ, "NOTIFY_SOCKET": path},
        stdin=subprocess.DEVNULL,
    )
    await run(task_status=task_status)
    # All that the service has sent is in the queue by now, and this is the last.
    async with await open_unix_datagram() as sender:
        await sender.send_message(b"", path)


async def manage() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "notify")
        # With credentials, the kernel says which process has sent a message.
        async with (
            await open_unix_datagram(path, credentials=True) as receiver,
            trio.open_nursery() as nursery,
        ):
            with trio.fail_after(LONGEST_RUN):
                process: trio.Process = await nursery.start(run_service, path)
                await follow(receiver, process.pid)


trio.run(service if sys.argv[1:] == ["service"] else manage)
