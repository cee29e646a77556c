"""The jobs that wait, and which worker gets which.

The rule of this file: a job is in the queue or with one worker, never both; the least busy
worker is next, and among those the one that has had the fewest lately.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heapreplace
from typing import TYPE_CHECKING, Final

import trio

from .._owner import DescriptorOwner
from ..errors import JobRefusedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ._handle import WorkerHandle
    from ._pending import PendingJob
    from ._statistics import Counters


_LARGE: Final = 16 * 1024
# How many jobs a worker is handed until what it was handed before counts half.
_RECENT: Final = 256


class JobQueue(DescriptorOwner):
    """The queue of a pool.

    Attributes:
      links: the workers that are to get jobs, by their place.
      queue: the jobs that any of them may have.
      bound: those that only one may have, by its place.
      waiting: who waits until another job may wait.
    """

    def __init__(
        self, max_in_flight: int, max_queue: int, max_attempts: int, counters: Counters
    ) -> None:
        self.max_in_flight: int = max_in_flight
        self.max_queue: int = max_queue
        self.max_attempts: int = max_attempts
        self.counters: Counters = counters
        self.links: dict[int, WorkerHandle] = {}
        self.queue: deque[PendingJob] = deque()
        self.bound: dict[int, deque[PendingJob]] = {}
        self.waiting: trio.lowlevel.ParkingLot = trio.lowlevel.ParkingLot()

    def count(self) -> int:
        """Return how many jobs wait."""
        return len(self.queue) + sum(map(len, self.bound.values()))

    def free(self) -> int:
        """Return how many more jobs may wait."""
        return self.max_queue - self.count()

    def put(self, delivery: PendingJob) -> None:
        """Let a job wait for a worker."""
        self._queue_of(delivery).append(delivery)

    def _queue_of(self, delivery: PendingJob) -> deque[PendingJob]:
        if delivery.worker is None:
            return self.queue
        return self.bound.setdefault(delivery.worker, deque())

    def withdraw(self, delivery: PendingJob) -> None:
        """Take a job out of the queue, and close its descriptor."""
        self._queue_of(delivery).remove(delivery)
        delivery.close()
        self.counters.cancelled += 1
        self._room()

    def pump(self) -> None:
        """Hand over what can be handed over."""
        waiting = len(self.queue)
        if not waiting and not self.bound:
            return
        ready = [link for link in self.links.values() if link.has_room(self.max_in_flight)]
        if not ready:
            return
        if self.bound:
            ready = [link for link in ready if not self._hand_over_bound(link)]
        ranked = sorted((len(link.in_flight), link.recent, link.index, link) for link in ready)
        if waiting == 1 and ranked:
            self._hand_over(ranked[0][-1], [self.queue.popleft()])
        elif waiting and ranked:
            self._share_out([(link, load) for load, _, _, link in ranked])
        self._room()

    def _hand_over_bound(self, link: WorkerHandle) -> bool:
        mine = self.bound.get(link.index)
        if not mine:
            return False
        share: list[PendingJob] = []
        room = min(link.limit, self.max_in_flight - len(link.in_flight))
        while mine and len(share) < room:
            share.append(mine.popleft())
            if len(share[-1].data) > _LARGE:
                break
        self._hand_over(link, share)
        if not mine:
            del self.bound[link.index]
        return True

    def _share_out(self, ready: list[tuple[WorkerHandle, int]]) -> None:
        """Hand over many jobs, an equal share to each at the most; the least busy one is first."""
        queue = self.queue
        most = -(-len(queue) // len(ready))
        # By load and place, so this is a heap.
        turns: list[tuple[int, int, int, WorkerHandle, list[PendingJob]]] = [
            (load, place, min(most, link.limit, self.max_in_flight - load), link, [])
            for place, (link, load) in enumerate(ready)
        ]
        while queue and turns:
            load, place, room, link, share = turns[0]
            share.append(queue.popleft())
            # Many bytes are sent alone: who waits for the next should not wait for them.
            if len(share) == room or len(share[-1].data) > _LARGE:
                heappop(turns)
                self._hand_over(link, share)
            else:
                heapreplace(turns, (load + 1, place, room, link, share))
        for _, _, _, link, share in turns:
            if share:
                self._hand_over(link, share)

    def _hand_over(self, link: WorkerHandle, share: list[PendingJob]) -> None:
        link.hand_over(share)
        link.recent += len(share)
        if link.recent > _RECENT:
            # Older ones count less and less: who is new need not catch up with all of them.
            for each in self.links.values():
                each.recent //= 2

    def _room(self) -> None:
        if self.waiting and self.free() > 0:
            self.waiting.unpark(count=self.free())

    def take_back(self, deliveries: list[PendingJob], why: Exception, *, counts: bool) -> None:
        """Put jobs in front again, or give up those that were tried too often."""
        for delivery in reversed(deliveries):
            delivery.sent = False
            delivery.tries += counts
            delivery.cause = why
            if delivery.raise_cancel is not None:
                # Its submitter was cancelled meanwhile, and can have it cancelled now.
                self.counters.cancelled += 1
                delivery.close()
                delivery.wake()
            elif delivery.tries >= self.max_attempts:
                self.give_up(delivery, f"{delivery.tries} workers in turn did not take it")
            else:
                self.counters.retried += 1
                self._queue_of(delivery).appendleft(delivery)

    def give_up(self, delivery: PendingJob, why: str) -> None:
        """Close a job's descriptor, and tell who waits for it."""
        self.counters.refused += 1
        delivery.close()
        error = JobRefusedError(f"job {delivery.id} was given up: {why}")
        error.__cause__ = delivery.cause
        delivery.settle(error)

    def give_up_all(self, deliveries: Iterable[PendingJob], why: str) -> None:
        """Give up many."""
        for delivery in list(deliveries):
            self.give_up(delivery, why)
        self._room()

    def clear(self, why: str) -> None:
        """Give up all jobs that wait."""
        queues = [self.queue, *self.bound.values()]
        for queue in queues:
            self.give_up_all(queue, why)
            queue.clear()
        self.bound.clear()
