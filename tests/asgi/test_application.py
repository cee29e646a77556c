"""What is checked of an application before it is served, and its lifespan."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests._helpers import asgi_apps
from trio_unixconn.asgi import _application
from trio_unixconn.asgi._application import (
    ApplicationError,
    Inbox,
    import_application,
    lifespan,
)

if TYPE_CHECKING:
    from pathlib import Path

APPS = "tests._helpers.asgi_apps"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module ``asgi_module`` that can be imported, to be written."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "asgi_module", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path / "asgi_module.py"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module' ({}, 1)"),
        ("\n1 / 0", "ZeroDivisionError: division by zero ({}, 2)"),
        ("raise SystemExit", "SystemExit ({}, 1)"),
        ("application = 1", "AttributeError: module 'asgi_module' has no attribute 'app'"),
        ("def (", "SyntaxError: invalid syntax (asgi_module.py, line 1)"),
    ],
)
def test_import_application_says_why_in_a_line(module: Path, text: str, said: str) -> None:
    """The error names the exception, and the line of the user's code."""
    module.write_text(text)
    expected = said.replace("({}, ", f"({module}, line ")
    with pytest.raises(ApplicationError) as caught:
        import_application("asgi_module:app")
    assert str(caught.value) == f"cannot import asgi_module:app: {expected}"


def test_import_application_rejects_what_cannot_be_called() -> None:
    """The error names the type."""
    with pytest.raises(ApplicationError, match=r"must be an ASGI application .*: got int$"):
        import_application(f"{APPS}:number")


async def start(app: Any) -> dict[str, Any]:
    with trio.fail_after(30):
        async with lifespan(app, "some:app") as state:
            await trio.lowlevel.checkpoint()
            return state


async def test_lifespan_starts_and_shuts_down(capsys: pytest.CaptureFixture[str]) -> None:
    """The state is what the application has made, and its end is waited for."""
    assert list(await start(asgi_apps.app)) == ["started_by"]
    assert capsys.readouterr().out == "application shut down\n"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("the database is away", "the database is away"),
        ("first\nsecond", "first"),
        ("Traceback (most recent call last):\n  File\nOSError: away\n", "OSError: away"),
        ("", "the application does not say why"),
    ],
)
@pytest.mark.parametrize("raises", [False, True])
async def test_lifespan_startup_failed(message: str, said: str, *, raises: bool) -> None:
    """The error has one line of the message, whether the application then raises or not."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": message})
        if raises:
            raise ValueError("again")

    with pytest.raises(ApplicationError) as caught:
        await start(app)
    assert str(caught.value) == f"some:app: the lifespan's startup failed: {said}"


async def test_lifespan_rejects_other_callables() -> None:
    """A WSGI application, a function of other arguments, and one that is not async, are refused."""

    def plain(scope: Any, receive: Any, send: Any) -> int:
        return 3

    for app, said in (
        (asgi_apps.wsgi, "takes 2 positional arguments but 3 were given"),
        (plain, "calling it returned int, not an awaitable"),
    ):
        with pytest.raises(ApplicationError, match="must be an ASGI application") as caught:
            await start(app)
        assert said in str(caught.value)


async def test_lifespan_exit_in_startup() -> None:
    """SystemExit keeps the worker from starting, and is logged later."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise SystemExit("no database")

    with pytest.raises(ApplicationError, match="exited during its startup: SystemExit: no data"):
        await start(app)

    async def later(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})
        raise SystemExit

    await start(later)


async def test_lifespan_is_optional(caplog: pytest.LogCaptureFixture) -> None:
    """An application that raises, or returns, is served without one; messages must be known."""

    async def returns(scope: Any, receive: Any, send: Any) -> None:
        pass

    async def unknown(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start"})

    assert await start(asgi_apps.without_lifespan) == {}
    assert await start(returns) == {}
    assert await start(unknown) == {}
    first, second = (each.getMessage() for each in caplog.records)
    assert first.startswith("some:app: no lifespan, the application raised AssertionError")
    assert "expected a message of the lifespan, got 'http.response.start'" in second


async def test_lifespan_errors_after_startup_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """What fails later does not end the worker."""

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await receive()
        await send({"type": "lifespan.shutdown.failed", "message": "still busy"})
        raise ValueError("late")

    await start(fails)
    said = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert said[0] == "some:app: the lifespan's shutdown failed: still busy"


async def test_lifespan_of_application_that_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    """An exception between startup and shutdown is logged at once."""
    raised = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})
        raised.set()
        raise ValueError("meanwhile")

    async with lifespan(app, "some:app"):
        await raised.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert [each.getMessage() for each in caplog.records] == [
            "some:app: the lifespan raised an exception"
        ]


async def test_lifespan_that_is_cancelled() -> None:
    """A worker that is cancelled does not wait for the application."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await receive()

    with trio.move_on_after(0.01) as scope:
        async with lifespan(app, "some:app"):
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_inbox_waits_while_too_much_is_in_it() -> None:
    """A put waits for a get; the last message waits for nothing, and stays."""
    inbox = Inbox(1)
    await inbox.put({"type": "http.request", "n": 1})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(inbox.put, {"type": "http.request", "n": 2})
        await trio.testing.wait_all_tasks_blocked()
        assert [(await inbox.get())["n"] for _ in range(2)] == [1, 2]
    await inbox.put({"type": "http.request", "n": 3})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(inbox.put, {"type": "http.request", "n": 4})
        await trio.testing.wait_all_tasks_blocked()
        await inbox.put({"type": "http.disconnect"})
    await inbox.put({"type": "http.disconnect", "again": True})
    assert [await inbox.get() for _ in range(3)] == [
        {"type": "http.request", "n": 3},
        *[{"type": "http.disconnect"}] * 2,
    ]


async def test_inbox_drop_wakes_put() -> None:
    """What an application that has returned did not receive is dropped."""
    inbox = Inbox(1)
    await inbox.put({"type": "http.request"})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(inbox.put, {"type": "http.request"})
        await trio.testing.wait_all_tasks_blocked()
        inbox.drop()
    await inbox.put({"type": "http.request"})
    with trio.move_on_after(0.01) as scope:
        await inbox.get()
    assert scope.cancelled_caught


def test_in_a_line_of_exception_without_text() -> None:
    """The name of the exception is all that is known."""
    assert _application.in_a_line(ValueError()) == "ValueError"
