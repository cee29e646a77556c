"""Twisted: descriptors by IUNIXTransport and IFileDescriptorReceiver, one for each byte.

The reactor runs from the first request to the last, because it cannot be started twice, and
reads the requests too. Between them the transport does not read, so that no protocol gets the
greeting.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

from twisted.internet import reactor, stdio
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.interfaces import IFileDescriptorReceiver, IPushProducer
from twisted.internet.protocol import Factory, Protocol
from twisted.protocols.basic import LineOnlyReceiver
from zope.interface import implementer

from .common import (
    Job,
    allow_descriptors,
    answer_of,
    await_greeting,
    clock,
    crowd,
    greet,
    is_same_user,
    offer,
    read_request,
    side_and_fd,
)

# What the left and the right side do before a run.
MEETINGS = (await_greeting, greet)


class Player(Protocol):
    """One side of a run; ``done`` fires at its end."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.left = job.count
        self.done: Deferred[None] = Deferred()

    def begin(self) -> None:
        """Take the first step."""

    def round_done(self) -> bool:
        """Count a round; return whether there is another."""
        self.left -= 1
        if not self.left:
            self.done.callback(None)
        return bool(self.left)


@implementer(IFileDescriptorReceiver)
class Descriptors(Player):
    """It closes each descriptor it gets; its bytes are counted in dataReceived."""

    def fileDescriptorReceived(self, fd: int) -> None:
        os.close(fd)


class FdLeft(Descriptors):
    def begin(self) -> None:
        self.transport.sendFileDescriptor(0)
        self.transport.write(b"\0")

    def dataReceived(self, data: bytes) -> None:
        if self.round_done():
            self.begin()


class FdRight(Descriptors):
    def dataReceived(self, data: bytes) -> None:
        self.transport.sendFileDescriptor(0)
        self.transport.write(b"\0")
        self.round_done()


@implementer(IPushProducer)
class OneWayLeft(Player):
    """It sends while the transport accepts more, and then waits for a byte."""

    paused = True

    def begin(self) -> None:
        self.total = self.amount()
        self.transport.registerProducer(self, True)
        self.resumeProducing()

    def amount(self) -> int:
        return self.job.count

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False
        while self.total and not self.paused:
            self.total -= 1
            self.transport.sendFileDescriptor(0)
            self.transport.write(b"\0")
        if not self.total:
            self.transport.unregisterProducer()

    def stopProducing(self) -> None:
        self.total = 0

    def dataReceived(self, data: bytes) -> None:
        self.done.callback(None)


class OneWayRight(Descriptors):
    def begin(self) -> None:
        self.total = self.amount()

    def amount(self) -> int:
        return self.job.count

    def dataReceived(self, data: bytes) -> None:
        self.total -= len(data)
        if not self.total:
            self.transport.write(b"x")
            self.done.callback(None)


class TenThousandLeft(OneWayLeft):
    def amount(self) -> int:
        return self.job.size


class TenThousandRight(OneWayRight):
    def amount(self) -> int:
        return self.job.size


class Bytes(Player):
    """It counts the bytes of a round."""

    def begin(self) -> None:
        self.data = self.job.payload()
        self.missing = self.job.size
        self.prepare()

    def prepare(self) -> None:
        """Take the first step."""

    def dataReceived(self, data: bytes) -> None:
        self.missing -= len(data)
        if not self.missing:
            self.missing = self.job.size
            self.received()

    def received(self) -> None:
        """Continue after a round."""
        raise NotImplementedError


class BytesLeft(Bytes):
    def prepare(self) -> None:
        self.send()

    def send(self) -> None:
        self.transport.write(self.data)

    def received(self) -> None:
        if self.round_done():
            self.send()


class BytesRight(Bytes):
    def send(self) -> None:
        self.transport.write(self.data)

    def received(self) -> None:
        self.send()
        self.round_done()


@implementer(IFileDescriptorReceiver)
class MessageLeft(BytesLeft):
    """Its descriptors are sent with the first two bytes, one message each."""

    def send(self) -> None:
        self.transport.sendFileDescriptor(0)
        self.transport.sendFileDescriptor(0)
        self.transport.write(self.data)

    def fileDescriptorReceived(self, fd: int) -> None:
        os.close(fd)


@implementer(IFileDescriptorReceiver)
class MessageRight(BytesRight):
    def send(self) -> None:
        self.transport.sendFileDescriptor(0)
        self.transport.sendFileDescriptor(0)
        self.transport.write(self.data)

    def fileDescriptorReceived(self, fd: int) -> None:
        os.close(fd)


class BufferLeft(Player):
    def begin(self) -> None:
        self.data = self.job.payload()
        self.transport.write(self.data)

    def dataReceived(self, data: bytes) -> None:
        if self.round_done():
            self.transport.write(self.data)


class BufferRight(Bytes):
    def received(self) -> None:
        self.transport.write(b"x")
        self.round_done()


async def play(kind: type[Player], transport: Any, job: Job) -> float:
    """Run one side of a case on the connection of the pair."""
    player = kind(job)
    transport.protocol = player
    player.transport = transport
    transport.resumeProducing()
    begin = clock()
    player.begin()
    await player.done
    seconds = clock() - begin
    transport.pauseProducing()
    return seconds


class Client(Protocol):
    def __init__(self) -> None:
        self.closed: Deferred[None] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.transport.loseConnection()

    def connectionLost(self, reason: Any = None) -> None:
        self.closed.callback(None)


class Served(Protocol):
    def connectionMade(self) -> None:
        if is_same_user(self.transport.socket):
            self.transport.write(b"x")
        self.transport.loseConnection()

    def connectionLost(self, reason: Any = None) -> None:
        self.factory.left -= 1
        if not self.factory.left:
            self.factory.done.callback(None)


async def accept(side: int, fd: int, job: Job) -> float:
    """Connect, or accept, repeatedly."""
    path = job.path + "/accept"
    if side == 0:
        await_greeting(fd)
        endpoint = UNIXClientEndpoint(reactor, path)
        factory = Factory.forProtocol(Client)
        begin = clock()
        for _ in range(job.count):
            client = await endpoint.connect(factory)
            await client.closed
        return clock() - begin
    served = Factory.forProtocol(Served)
    served.left = job.count
    served.done = Deferred()
    port = reactor.listenUNIX(path, served)
    greet(fd)
    await served.done
    await port.stopListening()
    return 0.0


async def with_idle(side: int, fd: int, transport: Any, job: Job) -> float:
    """Play ping-pong while other connections are read from."""
    idle = []

    class Idle(Protocol):
        def __init__(self) -> None:
            self.closed: Deferred[None] = Deferred()

        def connectionLost(self, reason: Any = None) -> None:
            self.closed.callback(None)

    factory = Factory.forProtocol(Idle)
    for sock in crowd(job):
        sock.setblocking(False)
        adopted = reactor.adoptStreamConnection(sock.fileno(), socket.AF_UNIX, factory)
        # Once it is lost the transport has no protocol.
        idle.append((adopted, adopted.protocol.closed))
        sock.close()
    MEETINGS[side](fd)
    kind = (BytesLeft, BytesRight)[side]
    await play(kind, transport, Job(100, 64))
    answer = await play(kind, transport, Job(job.count, 64))
    for each, _ in idle:
        each.abortConnection()
    for _, closed in idle:
        await closed
    return answer


CASES: dict[str, dict[str, Any]] = {
    "one descriptor, ping-pong": {"": (FdLeft, FdRight)},
    "one descriptor a message, one way": {"": (OneWayLeft, OneWayRight)},
    "ten thousand descriptors": {"": (TenThousandLeft, TenThousandRight)},
    "1 KiB and 2 descriptors, ping-pong": {"": (MessageLeft, MessageRight)},
    "bytes, ping-pong": {"": (BytesLeft, BytesRight)},
    "a large buffer": {"the bytes": (BufferLeft, BufferRight)},
    "accept and check credentials": {"": None},
    "bytes, others idle": {"": None},
}


class Orders(LineOnlyReceiver):
    """Reads requests, and answers them."""

    delimiter = b"\n"

    def connectionMade(self) -> None:
        self.side, self.fd = side_and_fd()
        os.set_blocking(self.fd, False)
        factory = Factory.forProtocol(Protocol)
        self.played = reactor.adoptStreamConnection(self.fd, socket.AF_UNIX, factory)
        self.played.pauseProducing()
        self.sendLine(offer(CASES).encode())

    def lineReceived(self, line: bytes) -> None:
        self.running = ensureDeferred(self.run(line))
        self.running.addErrback(self.failed)

    async def run(self, line: bytes) -> None:
        case, variant, job = read_request(line, self.side, self.fd)
        players = CASES[case][variant]
        if players:
            MEETINGS[self.side](self.fd)
            found = await play(players[self.side], self.played, job)
        elif case == "bytes, others idle":
            found = await with_idle(self.side, self.fd, self.played, job)
        else:
            found = await accept(self.side, self.fd, job)
        answer = answer_of(self.side, found if self.side == 0 else None)
        self.sendLine(answer.encode())

    def failed(self, failure: Any) -> None:
        failure.printTraceback(sys.stderr)
        reactor.stop()

    def connectionLost(self, reason: Any = None) -> None:
        if reactor.running:
            reactor.stop()


if __name__ == "__main__":
    allow_descriptors()
    # Factories would otherwise write to a log that is never read.
    Factory.noisy = False
    stdio.StandardIO(Orders())
    reactor.run()
