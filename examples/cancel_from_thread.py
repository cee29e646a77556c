"""A thread ends a receive that waits; the connection stays usable.

Run it with ``python examples/cancel_from_thread.py``.
"""

import os

import trio
from trio.testing import wait_all_tasks_blocked

from trio_unixconn import Cancellable, OperationCancelled, connection_pair


async def cancel_in_thread(stop: Cancellable) -> None:
    await wait_all_tasks_blocked()  # the receive waits now
    await trio.to_thread.run_sync(stop.cancel)


async def main() -> None:
    here, there = connection_pair()
    stop = Cancellable()
    async with here, there, trio.open_nursery() as nursery:
        nursery.start_soon(cancel_in_thread, stop)
        try:
            await here.receive_fd(stop)
        except OperationCancelled as exc:
            print(f"the thread ended the receive: {exc} (code {exc.code.name})")
        assert stop.is_cancelled()

        stop.reset()
        reader, writer = os.pipe()
        await there.send_fd(writer)
        os.close(writer)
        received = await here.receive_fd(stop)
        print("the next receive returned a descriptor")
        os.write(received, b"still in step")
        os.close(received)
        assert os.read(reader, 100) == b"still in step"
        os.close(reader)


trio.run(main)
