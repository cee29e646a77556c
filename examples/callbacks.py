"""Gio code with callbacks, ported: the same names and the same order of arguments.

Run it with ``python examples/callbacks.py``.
"""

import os

import trio

from trio_unixconn import (
    AsyncResult,
    CallbackConnection,
    OperationCancelled,
    connection_pair,
    open_callback_adapter,
)

happened: list[str] = []
credentials_received = trio.Event()


def on_credentials(source: CallbackConnection, result: AsyncResult) -> None:
    credentials = source.receive_credentials_finish(result)
    assert credentials.get_unix_pid() == os.getpid()
    happened.append(f"received {credentials.to_string()}")
    source.receive_fd_async(None, on_descriptor, "never sent")
    credentials_received.set()


def on_descriptor(source: CallbackConnection, result: AsyncResult, label: str) -> None:
    try:
        os.close(source.receive_fd_finish(result))
    except OperationCancelled:
        happened.append(f"cancelled: {label}")


async def main() -> None:
    here, there = connection_pair()
    async with here, there, open_callback_adapter() as adapter:
        gio = adapter.wrap(here)
        gio.receive_credentials_async(None, on_credentials)
        assert not happened  # a callback never runs before its *_async method has returned
        await there.send_credentials()
        await credentials_received.wait()
        adapter.cancel_pending()  # the block would wait for the descriptor otherwise
    print("\n".join(happened))
    assert happened[1:] == ["cancelled: never sent"]


trio.run(main)
