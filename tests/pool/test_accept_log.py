"""AcceptLog and AcceptedJobs: what a worker has accepted is counted once, whatever it claims."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import trio

from trio_unixconn.pool import _accept_log
from trio_unixconn.pool._accept_log import AcceptLog, AcceptLogWriter
from trio_unixconn.pool._accepted import AcceptedJobs, AcceptPlan, SharedListener
from trio_unixconn.pool._endpoints import EndpointKind
from trio_unixconn.pool._protocol import ProtocolError
from trio_unixconn.pool._statistics import Counters

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

TCP = EndpointKind.TCP


class Account:
    """A log, both of its sides, and the counters of a pool."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.plan = AcceptPlan([], 3)
        self.jobs = AcceptedJobs(self.plan, float("inf"), self.counters)
        self.worker = AcceptLogWriter(os.dup(self.jobs.log.fd))

    def write(self, offset: int, data: bytes) -> None:
        """Write into the memory, as any process that has it can."""
        os.pwrite(self.jobs.log.fd, data, offset)

    def sums(self) -> tuple[int, int, int, int, int]:
        of = self.counters
        assert of.submitted == of.handled + of.failed + of.abandoned + self.jobs.in_flight
        return of.submitted, of.handled, of.failed, of.abandoned, self.jobs.in_flight


@pytest.fixture
def account() -> Generator[Account, None, None]:
    account = Account()
    yield account
    account.worker.close()
    account.jobs.close()


def test_sync_counts_each_connection_once(account: Account) -> None:
    """Accepted, handled, failed and denied connections are counted, with their times."""
    worker, jobs = account.worker, account.jobs
    slots = [worker.add(TCP, ("127.0.0.1", port)) for port in range(3)]
    assert [number for _, number in slots] == [1, 2, 3]
    worker.deny()
    jobs.sync()
    assert account.sums() == (3, 0, 0, 0, 3)
    assert (account.plan.accepted, account.plan.denied) == (4, 1)
    worker.finish(slots[0][0], failed=False)
    worker.finish(slots[2][0], failed=True)
    assert worker.add(TCP, "")[0] in {slots[0][0], slots[2][0]}
    for _ in range(2):
        jobs.sync()
        assert account.sums() == (4, 1, 1, 0, 2)
    assert account.counters.handling.snapshot().count == 2
    assert account.counters.wait.snapshot().count == 4
    assert account.counters.acknowledged == 4
    assert jobs.progress() == (4, 1)
    assert jobs.progress() == (0, 0)


def test_kind_of_does_not_trust_the_worker(account: Account, tmp_path: Path) -> None:
    """A connection must not receive file descriptors if its listener says so."""
    without = EndpointKind.UNIX_WITHOUT_DESCRIPTORS
    kinds = {"with": EndpointKind.UNIX, "without": without}
    with ExitStack() as stack:
        listeners: list[SharedListener] = []
        ends: list[socket.socket] = []
        for name, kind in kinds.items():
            listener, client = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in "12")
            listener.bind(str(tmp_path / name))
            listener.listen()
            client.connect(str(tmp_path / name))
            ends.append(stack.enter_context(listener.accept()[0]))
            listeners.append(SharedListener(listener, kind, name))
        jobs = AcceptedJobs(AcceptPlan(listeners, 3), float("inf"), account.counters)
        stack.callback(jobs.close)
        numbers = [end.fileno() for end in ends]
        found = [[jobs.kind_of(claimed, fd) for fd in numbers] for claimed in kinds.values()]
        assert found == [[EndpointKind.UNIX, without], [without, without]]
        assert jobs.kind_of(EndpointKind.UNIX, account.jobs.log.fd) is EndpointKind.UNIX
        with pytest.raises(ProtocolError, match="that of no listener"):
            jobs.kind_of(TCP, numbers[0])


def test_plan_with_a_closed_listener() -> None:
    """Its name is not known, and not needed."""
    with socket.socket(socket.AF_UNIX) as listener:
        pass
    refusing = SharedListener(listener, EndpointKind.UNIX_WITHOUT_DESCRIPTORS, "closed")
    assert AcceptPlan([refusing], 3).without_descriptors == {None}


def test_sync_while_the_worker_writes(account: Account) -> None:
    """Half of a change is not counted; the next look counts it."""
    account.worker.add(TCP, "")
    account.write(0, struct.pack("=Q", 1))
    account.jobs.sync()
    assert account.sums() == (0, 0, 0, 0, 0)
    account.write(0, struct.pack("=Q", 2))
    account.jobs.sync()
    assert account.sums() == (1, 0, 0, 0, 1)


@pytest.mark.parametrize(
    ("word", "value"),
    [(1, 0), (2, 2), (2, 2**63), (3, 0), (4, 2), (4, 1000), (6, 0), (8, 0)],
    ids=["accepted", "failed", "failures", "denied", "in use", "slots", "times", "histogram"],
)
def test_sync_rejects_contradictions(account: Account, word: int, value: int) -> None:
    """A log that contradicts itself, or what it said before, is a violation of the protocol."""
    worker = account.worker
    for failed in (False, True):
        worker.finish(worker.add(TCP, "")[0], failed=failed)
    worker.deny()
    account.jobs.sync()
    before = account.sums()
    account.write(8 * word, struct.pack("=Q", value))
    if word == 8:
        # All buckets of the histogram.
        account.write(56, bytes(17 * 8))
    with pytest.raises(ProtocolError, match="contradicts itself"):
        account.jobs.sync()
    assert account.sums() == before


async def test_settle_reports_what_was_being_handled(account: Account) -> None:
    """After the death of a worker each connection that it handled is abandoned, with its peer."""
    worker, jobs = account.worker, account.jobs
    peers: list[Any] = [("127.0.0.1", 80), ("::1", 80, 0, 0), "/run/client", b"\0name", ""]
    account.plan.limit = 10
    jobs = AcceptedJobs(account.plan, float("inf"), account.counters)
    worker = AcceptLogWriter(os.dup(jobs.log.fd))
    for peer in [*peers, "x" * 200]:
        worker.add(TCP, peer)
    worker.finish(worker.add(TCP, "")[0], failed=False)
    progress, lost = jobs.settle()
    assert [job.peer for job in lost] == [*peers, None]
    assert [job.id - jobs.base for job in lost] == [1, 2, 3, 4, 5, 6]
    assert all(0 <= trio.current_time() - job.acknowledged_at < 60 for job in lost)
    assert (progress.accepted, progress.handled, progress.failed) == (7, 1, 0)
    assert account.counters.abandoned == 6
    assert account.counters.submitted == 7
    worker.close()
    jobs.close()
    jobs.close()


@pytest.mark.parametrize("step", range(16))
async def test_settle_after_a_death_between_two_writes(
    account: Account, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Whichever write was the last one, each connection is counted exactly once."""
    worker, jobs = account.worker, account.jobs
    slot, _ = worker.add(TCP, "")
    jobs.sync()

    class Killed(BaseException):
        pass

    class Words:
        """The words of the log, until the worker is killed."""

        def __init__(self, words: Any) -> None:
            self.words, self.left = words, step

        def __getitem__(self, index: int) -> int:
            return int(self.words[index])

        def __setitem__(self, index: int, value: int) -> None:
            if not self.left:
                raise Killed
            self.left -= 1
            self.words[index] = value

    words = worker._words
    monkeypatch.setattr(worker, "_words", Words(words))
    with pytest.raises(Killed):
        worker.add(TCP, ("127.0.0.1", 80))
        worker.finish(slot, failed=True)
        worker.add(TCP, "")
    monkeypatch.setattr(worker, "_words", words)
    _, lost = jobs.settle()
    submitted, handled, failed, abandoned, in_flight = account.sums()
    assert (abandoned, in_flight) == (len(lost), 0)
    assert submitted in {1, 2, 3}
    # The first one has ended, or was abandoned; none of the others has ended.
    assert handled + failed == (1 not in {each.id - jobs.base for each in lost})


async def test_settle_of_claims_that_contradict_each_other(account: Account) -> None:
    """Whatever a worker has written, settling it counts, and raises nothing."""
    account.worker.add(TCP, "")
    account.jobs.sync()
    account.write(0, os.urandom(256 + 3 * 128))
    _, lost = account.jobs.settle()
    assert len(lost) <= 3
    account.sums()


async def test_settle_counts_nothing_back(account: Account) -> None:
    """What was counted stays counted, even if the worker has cleared its log."""
    for failed in (False, True):
        account.worker.finish(account.worker.add(TCP, "")[0], failed=failed)
    account.worker.deny()
    account.jobs.sync()
    before = account.sums(), account.counters.handling.snapshot(), account.plan.denied
    account.write(0, bytes(256))
    assert account.jobs.settle()[1] == []
    after = account.sums(), account.counters.handling.snapshot(), account.plan.denied
    assert after == before


@pytest.mark.parametrize("text", [b"(", b"1 +", b"[1]", b"\xff\xfe", b"x" * 110, b"{[]: 0}"])
def test_connections_with_a_peer_that_is_none(account: Account, text: bytes) -> None:
    """What cannot be the address of a peer is None."""
    account.worker.add(TCP, "0" * 110)
    account.write(256 + 17, bytes([len(text)]) + text)
    (found,) = account.jobs.log.connections(3)
    assert found.peer is None


async def test_cancelled_and_passed_jobs_are_not_abandoned(account: Account) -> None:
    """Jobs whose end the pool knows count as failed or handled, even while they have slots."""
    worker, jobs = account.worker, account.jobs
    slots = [worker.add(TCP, "")[0] for _ in range(3)]
    jobs.sync()
    jobs.note_cancelled(jobs.base + 1)
    jobs.note_passed(jobs.base + 2)
    for number in (1, 2, 4):
        with pytest.raises(ProtocolError, match="is not in flight"):
            jobs.find(jobs.base + number)
    jobs.sync()
    assert account.sums() == (3, 0, 1, 0, 2)
    _, lost = jobs.settle()
    assert [job.id - jobs.base for job in lost] == [3]
    assert account.sums() == (3, 1, 1, 1, 0)
    assert slots


def test_passed_jobs_are_forgotten_when_their_slots_are_free(account: Account) -> None:
    """The pool remembers a job that was passed on only as long as it has a slot."""
    worker, jobs = account.worker, account.jobs
    slot, _ = worker.add(TCP, "")
    jobs.note_passed(jobs.base + 1)
    worker.finish(slot, failed=False)
    jobs.sync()
    assert not jobs._passed
    assert account.sums() == (1, 1, 0, 0, 0)


def test_find_parses_one_peer(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a connection that is passed on costs does not grow with those that a worker handles."""
    parsed: list[bytes] = []
    monkeypatch.setattr(_accept_log, "_peer_of", parsed.append)
    for port in range(3):
        account.worker.add(TCP, ("127.0.0.1", port))
    assert account.jobs.find(account.jobs.base + 2).number == 2
    account.jobs.note_passed(account.jobs.base + 2)
    account.jobs.sync()
    assert parsed == [b"('127.0.0.1', 1)"]


def test_owns_and_check(account: Account) -> None:
    """An id is a worker's own if it has accepted, or will accept, a connection with it."""
    jobs = account.jobs
    account.worker.add(TCP, "")
    assert jobs.owns(jobs.base + 1)
    assert not jobs.owns(jobs.base)
    assert not jobs.owns(1)
    assert not jobs.owns(2 * jobs.base + 1)
    jobs.check(jobs.base + 1)
    with pytest.raises(ProtocolError, match="was not accepted"):
        jobs.check(jobs.base + 2)


def test_log_takes_no_memory_before_it_is_used() -> None:
    """A log for many connections is a sparse file."""
    log = AcceptLog(_accept_log.MAX_SLOTS)
    try:
        assert os.fstat(log.fd).st_blocks == 0
        assert log.totals() is not None
        assert log.connections(2**63) == []
    finally:
        log.close()
