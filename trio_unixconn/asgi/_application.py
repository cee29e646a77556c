"""An ASGI application in a worker: its lifespan, its errors, and what a drain means to it.

A drain ends what would go on without an end. The next response on a connection of HTTP/1 says
``Connection: close``. A WebSocket is closed with 1012 (service restart), after which a client
connects again, and gets another worker.

Invariant: all that this file knows of a server is the interface of ASGI.

Sources: the ASGI specification (HTTP and WebSocket, version 2.3; Lifespan, version 2.0); RFC 6455,
section 7.4, and IANA's WebSocket Close Code Number Registry
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, Final, TypeAlias, cast

import attrs
import trio

from ..errors import ReportedError
from ..pool._import_string import import_from_string

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

logger: Final = logging.getLogger("trio_unixconn.asgi")

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApplication: TypeAlias = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

SERVICE_RESTART: Final = 1012
_DISCONNECTS: Final = {"http.disconnect", "websocket.disconnect"}
_HERE: Final = os.path.dirname(os.path.dirname(__file__))


class ApplicationError(ReportedError):
    """An application cannot be served."""


def import_application(reference: str) -> ASGIApplication:
    """Import an application.

    Raises:
      ApplicationError: it cannot be imported, or not be called.
    """
    try:
        found = import_from_string(reference)
    except BaseException as exc:
        raise ApplicationError(f"cannot import {reference}: {in_a_line(exc)}") from exc
    if not callable(found):
        raise ApplicationError(_no_application(reference, f"got {type(found).__name__}"))
    return cast("ASGIApplication", found)


def _no_application(reference: str, why: str) -> str:
    return f"{reference} must be an ASGI application (async def app(scope, receive, send)): {why}"


def in_a_line(exc: BaseException) -> str:
    """Say what was raised, and where in the user's code."""
    first = next(iter(str(exc).splitlines()), "")
    text = f"{type(exc).__name__}: {first}" if first else type(exc).__name__
    places = [
        frame
        for frame in traceback.extract_tb(exc.__traceback__)
        if not frame.filename.startswith(("<", _HERE)) and "importlib" not in frame.filename
    ]
    if not places or isinstance(exc, SyntaxError):
        return text
    return f"{text} ({places[-1].filename}, line {places[-1].lineno})"


def _is_cancellation(exc: BaseException) -> bool:
    if isinstance(exc, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", exc)
        return group.subgroup(trio.Cancelled) is not None
    return isinstance(exc, trio.Cancelled)


################################################################
# The lifespan
################################################################


@asynccontextmanager
async def lifespan(app: ASGIApplication, reference: str) -> AsyncGenerator[dict[str, Any], None]:
    """Start an application, and have it shut down at the end of the block.

    An application that raises an exception about its lifespan has none, as the specification says;
    what it has raised is logged.

    Yields:
      The state that the application has made, of which each request gets a shallow copy.

    Raises:
      ApplicationError: it is not an ASGI application, or says that it cannot start.
    """
    span = _Lifespan(app, reference)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(span.run, name=f"trio_unixconn.asgi lifespan of {reference}")
        await span.started.wait()
        if span.failure is None:
            yield span.state
            span.shutdown.set()
            await span.ended.wait()
        nursery.cancel_scope.cancel()
    if span.failure is not None:
        raise span.failure


class _Lifespan:
    def __init__(self, app: ASGIApplication, reference: str) -> None:
        self._app = app
        self._reference = reference
        self._is_told = False
        self.state: dict[str, Any] = {}
        self.failure: ApplicationError | None = None
        self.started = trio.Event()
        self.shutdown = trio.Event()
        self.ended = trio.Event()

    async def run(self) -> None:
        try:
            await self._run()
        finally:
            self.started.set()
            self.ended.set()

    async def _run(self) -> None:
        scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": self.state,
        }
        try:
            # With the wrong arguments, this itself raises.
            call = self._app(scope, self._receive, self._send)
        except Exception as exc:  # it is the application's
            self.failure = ApplicationError(_no_application(self._reference, in_a_line(exc)))
            return
        if not inspect.isawaitable(call):
            why = f"calling it returned {type(call).__name__}, not an awaitable"
            self.failure = ApplicationError(_no_application(self._reference, why))
            return
        try:
            await call
        except BaseException as exc:
            if _is_cancellation(exc):
                raise
            self._on_error(exc)

    def _on_error(self, exc: BaseException) -> None:
        if self.failure is not None:
            return
        if not isinstance(exc, Exception):
            # SystemExit, for example.
            if not self.started.is_set():
                self.failure = ApplicationError(
                    f"{self._reference} exited during its startup: {in_a_line(exc)}"
                )
            return
        if self.started.is_set():
            logger.error("%s: the lifespan raised an exception", self._reference, exc_info=exc)
        else:
            logger.warning(
                "%s: no lifespan, the application raised %s", self._reference, in_a_line(exc)
            )

    async def _receive(self) -> Message:
        if not self._is_told:
            self._is_told = True
            await trio.lowlevel.checkpoint()
            return {"type": "lifespan.startup"}
        await self.shutdown.wait()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        await trio.lowlevel.checkpoint()
        text = str(message.get("message", ""))
        match message["type"]:
            case "lifespan.startup.complete":
                self.started.set()
            case "lifespan.startup.failed":
                lines = text.strip().splitlines() or ["the application does not say why"]
                # Of a traceback, the last line says what it was.
                line = lines[-1 if lines[0].startswith("Traceback") else 0]
                self.failure = ApplicationError(
                    f"{self._reference}: the lifespan's startup failed: {line}"
                )
                self.started.set()
            case "lifespan.shutdown.complete":
                self.ended.set()
            case "lifespan.shutdown.failed":
                logger.error("%s: the lifespan's shutdown failed: %s", self._reference, text)
                self.ended.set()
            case other:
                raise ValueError(f"expected a message of the lifespan, got {other!r}")


################################################################
# Requests
################################################################


class Inbox:
    """The messages that an application receives in one call.

    A server waits while too many have not been received, so that a client cannot fill the memory.
    A message that says that the client has left never waits, and is received again and again.
    """

    def __init__(self, max_messages: int) -> None:
        self._max = max_messages
        self._messages: deque[Message] = deque()
        self._last: Message | None = None
        self._is_closed = False
        self._receivers = trio.lowlevel.ParkingLot()
        self._senders = trio.lowlevel.ParkingLot()

    async def put(self, message: Message) -> None:
        """Add a message, when there are few enough; drop it if the application has returned."""
        if message["type"] in _DISCONNECTS:
            self.end(message)
        while len(self._messages) >= self._max and self._last is None:
            await self._senders.park()
        if self._last is None and not self._is_closed:
            self._messages.append(message)
            self._receivers.unpark()

    def end(self, message: Message) -> None:
        """Add the last message; a second one is dropped."""
        if self._last is None:
            self._last = message
        self._receivers.unpark_all()
        self._senders.unpark_all()

    def drop(self) -> None:
        """Drop all messages, because the application has returned."""
        self._is_closed = True
        self._messages.clear()
        self._senders.unpark_all()

    async def get(self) -> Message:
        """Return the next message."""
        await trio.lowlevel.checkpoint()
        while True:
            if self._messages:
                self._senders.unpark()
                return self._messages.popleft()
            if self._last is not None:
                return self._last
            await self._receivers.park()


@attrs.frozen
class Application:
    """An application that has started.

    Attributes:
      app: what the user wrote.
      state: what its lifespan has made.
      draining: set when the worker is going to exit.
    """

    app: ASGIApplication
    state: dict[str, Any] = attrs.field(repr=False)
    draining: trio.Event = attrs.field(repr=False)

    async def run(self, scope: MutableMapping[str, Any], inbox: Inbox, send: Send) -> None:
        """Answer one request, or talk through one WebSocket, and log what is raised.

        If the response is not complete when this returns, the server ends it.
        """
        scope["state"] = self.state.copy()
        session = _Session(self, scope, inbox, send)
        if scope["type"] == "websocket":
            await session.talk()
        else:
            await session.answer()


class _Session:
    """One call of an application."""

    def __init__(
        self, application: Application, scope: MutableMapping[str, Any], inbox: Inbox, send: Send
    ) -> None:
        self._app = application.app
        self._draining = application.draining
        self._scope = scope
        self._inbox = inbox
        self._send = send
        # What was sent: the begin of a response, or that a WebSocket is accepted; the end.
        self._has_begun = False
        self._has_ended = False

    async def answer(self) -> None:
        if not await self._call(self._send_response):
            pass
        elif not self._has_begun:
            logger.error("%s: the application returned without a response", self._what())
        elif not self._has_ended:
            logger.error("%s: the application returned before its response ended", self._what())
        if not self._has_begun:
            text = b"Internal Server Error"
            headers = [
                (b"content-type", b"text/plain; charset=utf-8"),
                (b"content-length", b"%d" % len(text)),
            ]
            await self._send_response(
                {"type": "http.response.start", "status": 500, "headers": headers}
            )
            await self._send_response({"type": "http.response.body", "body": text})

    async def talk(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._close_before_restart)
            await self._call(self._send_to_websocket)
            nursery.cancel_scope.cancel()

    async def _call(self, send: Send) -> bool:
        """Call the application, and return whether it has raised nothing."""
        try:
            await self._app(self._scope, self._inbox.get, send)
        except BaseException as exc:
            if _is_cancellation(exc):
                raise
            logger.exception("%s: the application raised an exception", self._what())
            return False
        return True

    def _what(self) -> str:
        return f"{self._scope.get('method', 'WebSocket')} {self._scope['path']}"

    async def _send_response(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self._has_begun:
            if self._draining.is_set() and self._scope["http_version"].startswith("1"):
                headers: list[tuple[bytes, bytes]] = [
                    (name, value)
                    for name, value in message.get("headers", [])
                    if bytes(name).lower() != b"connection"
                ]
                message = {**message, "headers": [*headers, (b"connection", b"close")]}
            await self._send(message)
            self._has_begun = True
            return
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._has_ended = True

    async def _send_to_websocket(self, message: Message) -> None:
        if self._has_ended:
            # A drain has closed it, of which the application does not know yet.
            await trio.lowlevel.checkpoint()
            return
        self._has_ended = message["type"] == "websocket.close"
        await self._send(message)
        if message["type"] == "websocket.accept":
            self._has_begun = True
            if self._draining.is_set():
                await self._close_for_restart()

    async def _close_before_restart(self) -> None:
        await self._draining.wait()
        if self._has_begun and not self._has_ended:
            await self._close_for_restart()

    async def _close_for_restart(self) -> None:
        self._has_ended = True
        await self._send({"type": "websocket.close", "code": SERVICE_RESTART})
        # Not before: an application that returns then ends this task.
        self._inbox.end({"type": "websocket.disconnect", "code": SERVICE_RESTART})
