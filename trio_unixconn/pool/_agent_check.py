"""serve_agent_check: tells HAProxy how much a pool can take.

Source: the configuration manual of HAProxy, "agent-check"
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import trio

from ._exchanges import Exchanges, open_listeners, serve_exchanges
from ._health import STATES, check_source, free_percentage, statistics_of

if TYPE_CHECKING:
    from ._exchanges import ExchangeListener, ListenersOrAddress, Stream
    from ._health import StatisticsSource
    from ._statistics import PoolStatistics


async def serve_agent_check(
    source: StatisticsSource,
    listeners: ListenersOrAddress,
    *,
    task_status: trio.TaskStatus[Sequence[ExchangeListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer HAProxy's agent checks, so that it sends as many clients as the pool can take.

    ::

        nursery.start_soon(serve_agent_check, server, ("127.0.0.1", 9101))

    and in the configuration of HAProxy, where the weight is what 100 % are percent of::

        server app1 127.0.0.1:8000 weight 100 agent-check agent-addr 127.0.0.1 agent-port 9101

    The answer to each connection is one line, whatever the client sends:

    - ``up ready 75% maxconn:4000``: at least one worker accepts jobs. The weight is the part of the
      capacity that is free, at least 1 %. The whole capacity is that of the pool with all its
      workers alive. ``maxconn`` is the number of jobs that all workers which accept jobs can have
      at a time; HAProxy keeps further connections in its own queue.
    - ``drain``: from the first moment of a drain until the pool has ended.
    - ``down`` and a reason: the workers are starting, none is alive, or the pool has ended.

    Run it for as long as the program: only an answer makes HAProxy change its mind.

    Args:
      source: as for :func:`serve_statistics`.
      listeners: a host and a port, a listener, or a sequence of listeners, which this owns
        afterwards.

    Returns:
      Never; ``nursery.start`` returns the listeners. Cancel it.

    Raises:
      TypeError: not an address, nor listeners; the caller still owns what was passed.
      ValueError: as ``trio.open_tcp_listeners``; the caller still owns what was passed.
      OSError: as ``trio.open_tcp_listeners``.
    """
    check_source(source)
    opened = await open_listeners(listeners)
    exchanges = Exchanges(partial(_answer, source))
    await serve_exchanges(exchanges, opened, task_status=task_status)


async def _answer(source: StatisticsSource, stream: Stream) -> None:
    await stream.send_all(f"{agent_answer(statistics_of(source)[0])}\n".encode())


def agent_answer(statistics: PoolStatistics) -> str:
    """Return the answer to an agent check."""
    if statistics.state == "ready":
        # Words that are needed to take back an earlier "down" or "drain".
        return f"up ready {free_percentage(statistics)}% maxconn:{statistics.capacity}"
    if statistics.state == "draining":
        return "drain"
    return f"down #{STATES[statistics.state]}"
