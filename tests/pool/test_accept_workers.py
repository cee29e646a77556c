"""serve_with_workers(accept="workers"): workers accept from listening sockets that they share."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests._helpers.environment import environment
from tests._helpers.pool import at_rest, check_sums, ended, pids, watched
from tests._helpers.serving import answer, connected, received, serving, tcp
from tests._helpers.waiting import until
from trio_unixconn import (
    ConnectionClosedError,
    PeerPolicy,
    open_unix_connection,
    open_unix_listener,
)
from trio_unixconn._accept import Acceptor
from trio_unixconn._connection import close_now
from trio_unixconn.pool import AbandonedJob, _accepting, _server, serve_with_workers
from trio_unixconn.pool._accepted import AcceptedJobs
from trio_unixconn.pool._accepting import Accepting
from trio_unixconn.pool._pool import supervisor_of
from trio_unixconn.pool._statistics import Counters

if TYPE_CHECKING:
    from pathlib import Path

    from tests._helpers.serving import Listener
    from trio_unixconn.pool import WorkerServer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_child_left")]

PASS_ON = "tests._helpers.pool_handlers:pass_on"
# For a worker that has no free file descriptor for listening sockets before SIGUSR1.
STARVED: dict[str, Any] = {
    "setup": "tests._helpers.server_handlers:without_free_descriptors",
    "resource_limits": {"RLIMIT_NOFILE": (64, 64)},
}


def accepting(handler: str, *listeners: Listener, **options: Any) -> Any:
    """Serve with workers that accept."""
    return serving(handler, *listeners, accept="workers", **options)


async def line(client: socket.socket) -> bytes:
    """Receive a line."""
    found = b""
    while not found.endswith(b"\n"):
        more = await received(client, 1)
        if not more:
            break
        found += more
    return found


async def answered(clients: list[socket.socket]) -> None:
    """Have all clients talk to handlers that echo."""
    async with trio.open_nursery() as nursery:

        async def check(client: socket.socket, text: bytes) -> None:
            assert await answer(client, text) == text

        for number, client in enumerate(clients):
            nursery.start_soon(check, client, b"%d" % number)


################################################################
# Serving
################################################################


async def test_accept_workers_of_tcp_and_unix(tmp_path: Path) -> None:
    """Handlers get streams of the kinds of the listeners, and everything is counted."""
    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(str(tmp_path / "plain"))
    sock.listen()
    listeners: list[Listener] = [
        await tcp(),
        await tcp("::1"),
        await open_unix_listener(tmp_path / "s"),
        trio.SocketListener(sock),
    ]
    listeners[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\1\0\0\0")
    async with accepting("tell", *listeners) as server:
        told = [json.loads(await answer(connected(each))) for each in listeners]
        assert [each["type"] for each in told] == [
            *("SocketStream", "SocketStream", "UnixConnection", "UnixConnection")
        ]
        assert {each["pid"] for each in told} == set(pids(server.pool))
        assert (server.accepted, server.denied) == (4, 0)
        found = await at_rest(server.pool)
        assert (found.submitted, found.acknowledged, found.handled) == (4, 4, 4)
        assert found.wait.count == found.handling.count == 4
        assert found.handling.sum > 0
        assert found.workers[0].handled == 4
    assert server.statistics().handled == 4
    assert not (tmp_path / "s").exists()


async def test_accept_workers_job_id() -> None:
    """Ids are unique among the jobs of all workers, and those that the pool numbers."""
    listener = await tcp()
    async with accepting("tell_job", listener, workers=2) as server:
        clients = [connected(listener) for _ in range(10)]
        told = [json.loads(await line(each)) for each in clients]
        await server.pool.restart()
        clients.append(connected(listener))
        told.append(json.loads(await line(clients[-1])))
        assert len({each["id"] for each in told}) == 11
        assert min(each["id"] for each in told) > 2**32
        assert all((each["passed"], each["data"]) == (0, "") for each in told)
        for client in clients:
            client.close()


async def test_accept_workers_max_in_flight() -> None:
    """A worker at its limit accepts nothing, and goes on when a handler has ended."""
    listener = await tcp()
    async with accepting("hold", listener, workers=2, max_in_flight=2) as server:
        clients = [connected(listener) for _ in range(4)]
        for client in clients:
            assert await received(client) == b"held"
        waiting = connected(listener)
        found = server.statistics()
        assert (found.in_flight, found.submitted, found.queued) == (4, 4, 0)
        assert [each.in_flight for each in found.workers] == [2, 2]
        # The handlers of `hold` never end: the fifth one is handled when a worker is replaced.
        assert server.accepted == 4
        await server.pool.scale(3)
        assert await received(waiting) == b"held"
        assert server.accepted == 5
        server.drain(timeout=0)
        for client in [*clients, waiting]:
            client.close()
    found = server.statistics()
    assert (found.failed, found.abandoned) == (5, 0)
    check_sums(found)


async def test_accept_workers_max_in_flight_counts_submitted_jobs() -> None:
    """Jobs that the pool has sent count, too; when one has ended, the worker accepts."""
    listener = await tcp()
    async with accepting("echo", listener, max_in_flight=1) as server:
        mine, theirs = socket.socketpair()
        await server.pool.submit(theirs)
        client = connected(listener)
        await wait_all_tasks_blocked()
        assert server.accepted == 0
        mine.close()
        assert await answer(client, b"at last") == b"at last"
        first = connected(listener)
        await until(lambda: server.accepted == 2)
        mine, theirs = socket.socketpair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.pool.submit, theirs)
            await until(lambda: server.statistics().queued == 1)
            first.close()
        mine.close()
        await at_rest(server.pool)


async def test_accept_workers_policy(tmp_path: Path) -> None:
    """Workers apply a policy of ids: a denied connection is counted, and never a job."""
    policy = PeerPolicy(uids=[12345]) | (PeerPolicy(gids=[12345]) & PeerPolicy.root())
    denying = await open_unix_listener(tmp_path / "a", policy=policy)
    admitting = await open_unix_listener(
        tmp_path / "b", policy=policy | PeerPolicy.same_user(), receive_descriptors=False
    )
    async with accepting("echo", denying, admitting) as server:
        async with await open_unix_connection(tmp_path / "a") as conn:
            assert await conn.receive_some() == b""
        assert await answer(connected(admitting), b"hello") == b"hello"
        assert (server.accepted, server.denied) == (2, 1)
        assert (await at_rest(server.pool)).submitted == 1


async def test_accept_workers_rejects_policy_with_check(tmp_path: Path) -> None:
    """Code of this process cannot decide in a worker: an error before anything is started."""

    async def check(_: object) -> bool:
        raise AssertionError

    class Deciding(PeerPolicy):
        async def admits(self, peer: object) -> bool:
            raise AssertionError

    for policy in (PeerPolicy(check=check), Deciding(uids=[0])):
        async with await open_unix_listener(
            tmp_path / "s", policy=PeerPolicy.root() & policy
        ) as listener:
            with pytest.raises(ValueError, match=r"requires policies without a check.*got"):
                await serve_with_workers("a:b", [listener], accept="workers")
            assert listener.socket.fileno() != -1


async def test_accept_rejects_unknown_mode() -> None:
    """Another value of accept is an error, and the caller still owns the listeners."""
    wrong: Any = "both"
    async with await tcp() as listener:
        with pytest.raises(ValueError, match="accept must be"):
            await serve_with_workers("a:b", [listener], accept=wrong)
        assert listener.socket.fileno() != -1


async def test_accept_workers_rejects_generation() -> None:
    """A generation decides when its process accepts: both together are an error."""
    generation: Any = object()
    async with await tcp() as listener:
        with pytest.raises(ValueError, match="cannot be used with a generation"):
            await serve_with_workers("a:b", [listener], accept="workers", generation=generation)
        assert listener.socket.fileno() != -1


async def test_accept_workers_with_proxy_protocol() -> None:
    """A header is read by the worker, and a connection without one fails."""
    listener = await tcp()
    async with accepting(
        "tests._helpers.pool_handlers:tell_proxy",
        listener,
        proxy_protocol="v1",
        proxy_from=["127.0.0.1"],
    ) as server:
        told = await answer(connected(listener), b"PROXY TCP4 10.9.8.7 1.1.1.1 5 6\r\nrest")
        assert b"10.9.8.7" in told
        with connected(listener) as client:
            client.sendall(b"no header")
            assert await received(client) == b""
        found = await at_rest(server.pool)
        assert (found.handled, found.failed) == (1, 1)


async def test_accept_workers_of_more_listeners_than_one_message_carries() -> None:
    """A worker gets listening sockets in as many messages as it takes, in their order."""
    listeners: list[Listener] = []
    for number in range(520):
        sock = trio.socket.socket(socket.AF_UNIX)
        await sock.bind(f"\0trio_unixconn-{os.getpid()}-{number}")
        sock.listen()
        listeners.append(trio.SocketListener(sock))
    last = await tcp()
    async with accepting("tell", *listeners, last, workers=1) as server:
        told = [json.loads(await answer(connected(listeners[i]))) for i in (0, 252, 253, 268, 519)]
        told.append(json.loads(await answer(connected(last))))
        assert [each["type"] for each in told] == [*["UnixConnection"] * 5, "SocketStream"]
        assert server.accepted == 6


################################################################
# Failures
################################################################


async def test_accept_workers_handler_fails(caplog: pytest.LogCaptureFixture) -> None:
    """An exception out of a handler is logged with the job, and counted."""
    listener = await tcp()
    async with accepting("fail", listener) as server:
        with connected(listener) as client:
            assert await received(client) == b""
        await until(lambda: "a handler that fails" in caplog.text)
        found = server.statistics()
        assert (found.handled, found.failed, found.workers[0].failed) == (0, 1, 1)


async def test_accept_workers_handler_timeout(caplog: pytest.LogCaptureFixture) -> None:
    """handler_timeout ends a handler; one that is faster is not affected."""
    listener = await tcp()
    async with accepting("echo", listener, handler_timeout=0.2) as server:
        assert await answer(connected(listener), b"fast") == b"fast"
        with connected(listener) as client:
            assert await received(client) == b""
        await until(lambda: "handler_timeout" in caplog.text)
        found = server.statistics()
        assert (found.handled, found.failed) == (1, 1)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_accept_workers_abandoned_job(tmp_path: Path, kind: str) -> None:
    """A worker that dies loses what it handles, which is reported; the others go on."""
    reported: list[AbandonedJob] = []
    listener: Listener = await tcp() if kind == "tcp" else await open_unix_listener(tmp_path / "s")
    async with accepting(
        "tell_job", listener, workers=2, crash_limit=1, on_abandoned=reported.append
    ) as server:
        clients = [connected(listener) for _ in range(20)]
        told = [json.loads(await line(each)) for each in clients]
        os.kill(victim := told[0]["pid"], signal.SIGKILL)
        lost = {each["id"] for each in told if each["pid"] == victim}
        await until(lambda: len(reported) == len(lost))
        assert {each.id for each in reported} == lost
        assert {each.pid for each in reported} == {victim}
        names = {"" if kind == "unix" else each.getsockname() for each in clients}
        assert {each.peer for each in reported} <= names
        assert all(0 <= each.seconds < 60 for each in reported)
        for client, each in zip(clients, told, strict=True):
            if each["pid"] == victim:
                assert await received(client) == b""
            client.close()
        found = await at_rest(server.pool)
        assert (found.abandoned, found.handled) == (len(lost), 20 - len(lost))
        # It had jobs, so it does not count towards crash_limit.
        await until(lambda: server.statistics().restarts == 1)
        client = connected(listener)
        assert json.loads(await line(client))["pid"] in pids(server.pool)
        client.close()


async def test_accept_workers_without_free_descriptors(caplog: pytest.LogCaptureFixture) -> None:
    """A worker without a free file descriptor says so, and accepts when it has one again."""
    listener = await tcp()
    options = {"resource_limits": {"RLIMIT_NOFILE": (32, 32)}}
    async with accepting("tell_job", listener, **options) as server:
        clients = [connected(listener) for _ in range(40)]
        await until(lambda: server.statistics().workers[0].refusals >= 2)
        assert server.statistics().in_flight < 32
        assert caplog.text.count("for want of a free file descriptor") == 1
        for client in clients:
            assert json.loads(await line(client))["pid"]
            client.close()
        assert (await at_rest(server.pool)).handled == 40
        # It has jobs, so it is not replaced.
        assert server.statistics().restarts == 0


async def test_accept_workers_that_cannot_receive_the_listeners() -> None:
    """A worker that has no free file descriptor for the sockets is sent them again."""
    listener = await tcp()
    async with accepting("echo", listener, **STARVED) as server:
        client = connected(listener)
        await until(lambda: server.statistics().workers[0].refusals > 0)
        os.kill(pids(server.pool)[0], signal.SIGUSR1)
        assert await answer(client, b"at last") == b"at last"


async def test_accept_workers_drain_before_they_have_the_listeners() -> None:
    """A worker that could not receive the sockets, and is to stop, says that it has none."""
    listener = await tcp()
    async with accepting("echo", listener, **STARVED) as server:
        await until(lambda: server.statistics().workers[0].refusals > 0)
        client = connected(listener)
        server.drain()
        os.kill(pids(server.pool)[0], signal.SIGUSR1)
        assert await answer(client, b"at last") == b"at last"


@pytest.mark.parametrize("what", ["policy", "accept"])
async def test_accept_from_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """An error about one connection closes it, and the next one is accepted."""
    listener = await open_unix_listener(tmp_path / "s", policy=PeerPolicy.same_user())
    plan = _server.make_plan([listener], 1)
    jobs = AcceptedJobs(plan, math.inf, Counters())
    started: list[int] = []

    def start(slot: int, _: object, __: int, stream: Any) -> None:
        started.append(slot)
        close_now(stream)
        worker.finish(slot)

    worker = Accepting(
        jobs.pack()[6:],
        [os.dup(jobs.log.fd), os.dup(listener.socket.fileno())],
        other_jobs=lambda: 0,
        start=start,
        report=lambda _: None,
    )
    name = "admit_or_close" if what == "policy" else "accept_pending"
    owner: Any = _accepting if what == "policy" else Acceptor
    real = getattr(owner, name)
    errors: list[Any] = [OSError(errno.ECONNABORTED, "Software caused connection abort")]

    async def fail(conn: Any, policy: Any) -> bool:
        if errors:
            await conn.aclose()
            raise errors.pop()
        return bool(await real(conn, policy))

    def fail_to_accept(self: Acceptor, limit: int) -> Any:
        return ([], errors.pop()) if errors else real(self, limit)

    monkeypatch.setattr(owner, name, fail if what == "policy" else fail_to_accept)
    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        with connected(listener), connected(listener):
            await until(lambda: len(started) == (1 if what == "policy" else 2))
            jobs.sync()
            assert (jobs.accepted, jobs.denied) == ((1, 1) if what == "policy" else (2, 0))
        worker.stop()
    worker.close(is_last=True)
    # Before Python 3.13 the mapping has a file descriptor. The log record references the worker.
    worker._log.close()
    jobs.close()
    assert ("cannot ask the policy" in caplog.text) == (what == "policy")


async def test_accept_from_without_memory_for_the_log() -> None:
    """A worker that cannot map the log closes the listening sockets before it exits."""
    listener = await tcp()
    jobs = AcceptedJobs(_server.make_plan([listener], 1), math.inf, Counters())
    copy = os.dup(listener.socket.fileno())
    with pytest.raises(ValueError, match="empty file"):
        Accepting(
            jobs.pack()[6:],
            [os.memfd_create("empty"), copy],
            other_jobs=lambda: 0,
            start=lambda *_: None,
            report=lambda _: None,
        )
    await until(lambda: not os.path.exists(f"/proc/self/fd/{copy}"))
    await listener.aclose()
    jobs.close()


async def test_accept_workers_listener_that_other_code_closes() -> None:
    """The server ends with an error about it, and its workers accept no more."""
    listener = await tcp()
    address = listener.socket.getsockname()
    with pytest.RaisesGroup(
        pytest.RaisesExc(ConnectionClosedError, match="other code"), flatten_subgroups=True
    ):
        async with accepting("echo", listener):
            await wait_all_tasks_blocked()
            await listener.aclose()
            await trio.sleep_forever()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_accept_workers_listener_that_is_shut_down(tmp_path: Path, kind: str) -> None:
    """shutdown(2) by any process ends the server, as it does if this process accepts."""
    listener: Listener = await tcp() if kind == "tcp" else await open_unix_listener(tmp_path / "s")
    with pytest.RaisesGroup(
        pytest.RaisesExc(OSError, match="Invalid argument"), flatten_subgroups=True
    ):
        async with accepting("echo", listener) as server:
            assert await answer(connected(listener)) == b"x"
            with socket.socket(fileno=os.dup(listener.socket.fileno())) as sock:
                sock.shutdown(socket.SHUT_RDWR)
            await trio.sleep_forever()
    assert server.accepted == 1


async def test_accept_workers_end_with_the_process_of_the_pool() -> None:
    """After the death of the pool's process no worker accepts any more."""
    program = (
        "import sys, trio\n"
        "from functools import partial\n"
        "from trio_unixconn.pool import serve_with_workers\n"
        "async def main():\n"
        "    listeners = await trio.open_tcp_listeners(0, host='127.0.0.1')\n"
        "    async with trio.open_nursery() as nursery:\n"
        "        server = await nursery.start(partial(serve_with_workers,\n"
        "            'tests._helpers.server_handlers:tell_job', listeners, workers=2,\n"
        "            accept='workers'))\n"
        "        pids = [each.pid for each in server.statistics().workers]\n"
        "        print(listeners[0].socket.getsockname()[1], *pids, flush=True)\n"
        "trio.run(main)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment(), text=True
    ) as process:
        assert process.stdout is not None
        port, *numbers = map(int, process.stdout.readline().split())
        with watched(numbers) as pidfds, socket.create_connection(("127.0.0.1", port)) as client:
            client.settimeout(30)
            assert json.loads(await line(client))["pid"] in numbers
            process.kill()
            await ended(pidfds)
            assert await received(client) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


################################################################
# Draining
################################################################


async def test_accept_workers_drain_handles_queues_of_listeners(tmp_path: Path) -> None:
    """Connections in the queues of the listeners are handled; none is reset."""
    listeners: list[Listener] = [await tcp(), await open_unix_listener(tmp_path / "s")]
    async with accepting("echo", *listeners, workers=2, max_in_flight=2, max_queue=3) as server:
        clients = [connected(each) for each in listeners for _ in range(30)]
        server.drain()
        await answered(clients)
    found = server.statistics()
    assert (server.accepted, found.handled, found.abandoned) == (60, 60, 0)
    assert not (tmp_path / "s").exists()


async def test_accept_workers_drain_beside_a_worker_that_does_not_run() -> None:
    """While a worker does not stop accepting, clients are served by the others."""
    listener = await tcp()
    async with accepting("echo", listener, workers=2, hang_timeout=1000) as server:
        stopped = pids(server.pool)[0]
        os.kill(stopped, signal.SIGSTOP)
        try:
            server.drain()
            assert await answer(connected(listener), b"one") == b"one"
            assert await answer(connected(listener), b"two") == b"two"
            assert listener.socket.fileno() != -1
        finally:
            os.kill(stopped, signal.SIGCONT)
    assert server.statistics().handled == 2


async def test_accept_workers_drain_timeout() -> None:
    """The deadline ends handlers, even those of a worker that does not stop accepting."""
    listener = await tcp()
    async with accepting("hold", listener, workers=2, hang_timeout=1000) as server:
        client = connected(listener)
        assert await received(client) == b"held"
        (busy,) = [each.pid for each in server.statistics().workers if each.in_flight]
        (idle,) = [each for each in pids(server.pool) if each != busy]
        os.kill(idle, signal.SIGSTOP)
        server.drain(timeout=0.1)
        assert await received(client) == b""
        client.close()
        os.kill(idle, signal.SIGCONT)
    found = server.statistics()
    assert (found.failed, found.abandoned) == (1, 0)
    assert listener.socket.fileno() == -1


async def test_accept_workers_drain_delay() -> None:
    """During the delay workers accept, and those that die are replaced."""
    listener = await tcp()
    async with accepting("echo", listener) as server:
        server.drain(delay=math.inf)
        assert server.statistics().state == "draining"
        assert await answer(connected(listener), b"one") == b"one"
        await until(lambda: server.statistics().handled == 1)
        os.kill(pids(server.pool)[0], signal.SIGKILL)
        assert await answer(connected(listener), b"two") == b"two"
    assert server.statistics().handled == 2


async def test_accept_workers_drain_of_the_pool_ends_the_server() -> None:
    """WorkerPool.drain ends the server at once, even if no client connects."""
    listener = await tcp()
    async with accepting("echo", listener) as server:
        with connected(listener) as client:
            client.sendall(b"x")
            assert await received(client) == b"x"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.pool.drain)
                await until(lambda: listener.socket.fileno() == -1)
                client.shutdown(socket.SHUT_WR)
    assert server.statistics().handled == 1
    assert server.statistics().state == "ended"


async def test_accept_workers_cancelled(tmp_path: Path) -> None:
    """A cancellation ends handlers, workers and listeners; nothing is left."""
    listener = await open_unix_listener(tmp_path / "s")
    async with accepting("hold", listener) as server:
        client = connected(listener)
        assert await received(client) == b"held"
        with trio.CancelScope() as scope:
            async with accepting("hold", await tcp()):
                scope.cancel()
        server.drain(timeout=0)
        assert await received(client) == b""
        client.close()
    assert not (tmp_path / "s").exists()


################################################################
# Replacing workers
################################################################


async def test_accept_workers_restart_and_scale_while_clients_connect() -> None:
    """Workers are replaced, killed by SIGTERM, added and removed, and no connection fails."""
    listener = await tcp()
    done = False
    count = 0

    async def connect_always(server: WorkerServer) -> None:
        nonlocal count
        while not done:
            client = await trio.to_thread.run_sync(connected, listener)
            assert await answer(client, b"x") == b"x"
            count += 1

    async with accepting("echo", listener, workers=2) as server:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(connect_always, server)
            await server.pool.restart()
            await server.pool.scale(3)
            os.kill(pids(server.pool)[0], signal.SIGTERM)
            await until(lambda: server.statistics().restarts == 3)
            await server.pool.scale(1)
            done = True
        found = await at_rest(server.pool)
        assert found.handled == count
        assert (found.failed, found.abandoned, found.deaths) == (0, 0, 0)


async def test_accept_workers_max_jobs() -> None:
    """A worker is replaced after it has accepted its share of connections."""
    listener = await tcp()
    async with accepting("echo", listener, max_jobs=5) as server:
        (old,) = pids(server.pool)
        for _ in range(7):
            assert await answer(connected(listener)) == b"x"
        await until(lambda: server.statistics().restarts == 1)
        await until(lambda: old not in pids(server.pool))
        assert await answer(connected(listener)) == b"x"
        assert server.statistics().deaths == 0


async def test_accept_workers_leave_after_their_last_job(tmp_path: Path) -> None:
    """Old workers finish what they have accepted, and accept no more."""
    listener = await tcp()
    async with accepting("tell_job", listener) as server:
        first = connected(listener)
        old = json.loads(await line(first))["pid"]
        with watched([old]) as pidfds:
            await server.pool.restart()
            (draining,) = [each for each in server.statistics().workers if each.pid == old]
            assert (draining.state, draining.in_flight) == ("draining", 1)
            # Until it has read that it is to leave, it accepts.
            (leaving,) = supervisor_of(server.pool)._leaving
            await until(lambda: not leaving.is_accepting)
            second = connected(listener)
            assert json.loads(await line(second))["pid"] != old
            first.close()
            await ended(pidfds)
        second.close()


async def test_accept_workers_pass_on() -> None:
    """Handlers pass on connections that their workers have accepted; clients notice nothing."""
    listener = await tcp()
    async with accepting(PASS_ON, listener, workers=2) as server:
        clients = [connected(listener) for _ in range(10)]
        old = {int((await line(each)).split()[0]) for each in clients}
        clients[0].sendall(b"pass by hand\n")
        assert (await line(clients[0])).split()[1:] == [b"1", b"by", b"hand"]
        found = await at_passed(server, 1)
        assert (found.submitted, found.handled) == (11, 1)
        for count in (1, 2):
            await server.pool.restart()
            for client in clients:
                pid, passed, data = (await line(client)).split()
                assert int(pid) in set(pids(server.pool)) - old
                assert (int(passed), data) == (count + (client is clients[0]), b"drained")
            old |= set(pids(server.pool))
        for client in clients:
            client.close()
        found = await at_rest(server.pool)
        assert (found.submitted, found.handled, found.passed) == (31, 31, 21)
        assert (found.failed, found.abandoned, found.rejected) == (0, 0, 0)


async def at_passed(server: WorkerServer, count: int) -> Any:
    """Wait until the worker knows that its connections were passed on."""
    await until(lambda: server.statistics().handled == count)
    found = server.statistics()
    check_sums(found)
    return found


async def test_accept_workers_pass_on_unix(tmp_path: Path) -> None:
    """A connection that rejects file descriptors is passed on as one that does."""
    listener = await open_unix_listener(tmp_path / "s", receive_descriptors=False)
    async with accepting(PASS_ON, listener) as server:
        with connected(listener) as client:
            await line(client)
            client.sendall(b"pass on\n")
            assert (await line(client)).split()[1:] == [b"1", b"on"]
            found = await at_passed(server, 1)
            assert found.passed == 1


async def test_serve_when_ready_accept_workers() -> None:
    """The listeners that are opened when the workers are ready are the workers' to accept from."""
    listener = await tcp()

    async def open_listeners() -> list[Listener]:
        await trio.lowlevel.checkpoint()
        return [listener]

    async with trio.open_nursery() as nursery:

        async def serve(task_status: Any) -> None:
            await _server.serve_when_ready(
                "tests._helpers.server_handlers:echo",
                open_listeners,
                accept="workers",
                task_status=task_status,
                workers=1,
            )

        server = await nursery.start(serve)
        assert await answer(connected(listener), b"x") == b"x"
        server.drain()
    with suppress(OSError):
        assert server.accepted == 1
