"""The HTTP example as a server, and clients that keep their connections alive."""

from __future__ import annotations

import http.client
import re
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs

from tests._helpers.processes import ROOT
from tests._helpers.serve_cli import Served, starting
from tests._helpers.waiting import until_sync

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

EXAMPLES = ROOT / "examples"


@contextmanager
def http_server(*arguments: str) -> Generator[tuple[Served, int], None, None]:
    """Run the example with two workers, and return it with its port."""
    tcp = "tcp:127.0.0.1:0"
    with starting(EXAMPLES, "pool_http:handler", *arguments, bind=tcp, workers=2) as served:
        found = re.search(r":(\d+)\n", served.line("listening at"))
        assert found
        served.line("ready: ")
        yield served, int(found[1])


@attrs.define
class KeepAliveClient:
    """A client that sends one request after the other on a connection, until it is told to end.

    It opens another connection only after an answer with ``Connection: close``. Everything else
    that ends a connection is a failure. It ends if another connection is refused.
    """

    port: int
    answered: int = 0
    connections: int = 0
    worker: str = ""
    is_refused: bool = False
    failures: list[str] = attrs.field(factory=list[str])
    pause: float = 0

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            try:
                connection.connect()
                self.connections += 1
                self._use(connection, stop)
            except ConnectionRefusedError:
                self.is_refused = True
                return
            except (OSError, http.client.HTTPException) as exc:
                self.failures.append(repr(exc))
            finally:
                connection.close()

    def _use(self, connection: http.client.HTTPConnection, stop: threading.Event) -> None:
        while not stop.is_set():
            connection.request("GET", "/")
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200 or b"Hello" not in body:
                self.failures.append(f"{answer.status} {body!r}")
            found = re.search(rb"process (\d+)", body)
            self.worker = found[1].decode() if found else ""
            self.answered += 1
            if answer.will_close:
                return
            time.sleep(self.pause)


@contextmanager
def clients_of(port: int, count: int) -> Generator[Sequence[KeepAliveClient], None, None]:
    """Run clients in threads, and wait for their last answers at the end of the block."""
    stop = threading.Event()
    clients = [KeepAliveClient(port, pause=(1 + index) * 0.002) for index in range(count)]
    threads = [threading.Thread(target=each.run, args=(stop,)) for each in clients]
    for thread in threads:
        thread.start()
    try:
        yield clients
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def wait_for_answers(clients: Sequence[KeepAliveClient], count: int) -> None:
    """Wait until each client has got so many more answers."""
    before = [each.answered for each in clients]
    until_sync(
        lambda: all(
            each.answered >= answered + count or each.failures or each.is_refused
            for each, answered in zip(clients, before, strict=True)
        )
    )
