"""Cells for a notebook: two connected ends in one process.

An editor that knows ``# %%`` runs them one by one.

Run it with ``python examples/notebook.py``.
"""

# %%
import os

import trio

from trio_unixconn import Credentials, connection_pair


# %% Send a pipe's writing end through a connection, and write to it at the other side.
async def pass_a_pipe() -> bytes:
    here, there = connection_pair()
    async with here, there:
        reader, writer = os.pipe()
        await here.send_fd(writer)
        os.close(writer)
        received = await there.receive_fd()
        os.write(received, b"through the pipe")
        os.close(received)
        text = os.read(reader, 100)
        os.close(reader)
        return text


# %%
text = trio.run(pass_a_pipe)
print(text)
assert text == b"through the pipe"


# %% The credentials of the peer. In a notebook, it is the kernel process itself.
async def peer_credentials() -> Credentials:
    here, there = connection_pair()
    async with here, there:
        await here.send_credentials()
        return await there.receive_credentials()


# %%
peer = trio.run(peer_credentials)
print(peer)
assert peer.pid == os.getpid()
