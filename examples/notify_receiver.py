"""A service manager in a few lines: it starts a service, and prints what that reports.

Run it with ``python examples/notify_receiver.py``. The service is the same file in a second
process. Any program that speaks the protocol of sd_notify(3) could be in its place.
"""

import os
import subprocess
import sys
import tempfile

import trio

from trio_unixconn import Datagram, UnixConnectionError, UnixDatagramSocket, open_unix_datagram
from trio_unixconn.systemd import ServiceManager


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
    """Print what one process reports, until it stops."""
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
            if sender is None or sender.pid != pid:
                print("ignored: a message of another process")
                continue
            said = assignments(message)
            print(f"{said} with {len(message.fds)} file descriptors", flush=True)
            if said.get("STOPPING") == "1":
                return


async def manage() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "notify")
        # With credentials, the kernel says which process has sent a message.
        async with await open_unix_datagram(path, credentials=True) as receiver:
            process = await trio.lowlevel.open_process(
                [sys.executable, __file__, "service"],
                env={**os.environ, "NOTIFY_SOCKET": path},
                stdin=subprocess.DEVNULL,
            )
            with trio.fail_after(60):
                await follow(receiver, process.pid)
                assert await process.wait() == 0


trio.run(service if sys.argv[1:] == ["service"] else manage)
