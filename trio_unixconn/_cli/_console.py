"""What all commands share: names of sockets, output, and how a command runs and ends.

Invariant: results go to standard output and errors to standard error; neither contains control
characters for a terminal. A command cleans up before it exits, with a line and an exit status; only
a bug in this library is a traceback.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NoReturn, TextIO, TypeVar

import trio
import typer

from .._address import UnixSocketAddress
from ..errors import UnixConnectionError, WorkerStartError

T = TypeVar("T")

# What prints helps and mistakes in arguments. Some versions of typer contain click.
_PRINTERS: Final = frozenset({"typer", "click", "rich"})
_OF_TRIO: Final = "Exceptions from Trio nursery"


################################################################
# Names of sockets
################################################################


def address_of(text: str) -> UnixSocketAddress:
    """Read a path, ``@name`` for an abstract name, or a URI that begins with ``unix:``.

    A file whose own name begins like that is ``./@name``.
    """
    try:
        if text.startswith("@"):
            address = UnixSocketAddress.abstract(text[1:])
        elif text.lower().startswith("unix:"):
            address = UnixSocketAddress.from_uri(text)
        else:
            address = UnixSocketAddress.path(text)
        if not address.get_path_len():
            raise ValueError(f"{text!r} is an abstract name without a character")
    except ValueError as exc:
        fail(str(exc), status=2)
    return address


################################################################
# Output
################################################################


def say(line: str) -> None:
    """Print a line, unfolded, so that grep and cut work on it."""
    with writing() as output:
        print(printable(line), file=output)


def say_json(value: Any) -> None:
    """Print for machines."""
    with writing() as output:
        print(json.dumps(value, indent=1), file=output)


@contextmanager
def writing() -> Generator[TextIO, None, None]:
    """Write to standard output, or end with a line that says why that is not possible."""
    try:
        yield sys.stdout
    except OSError as exc:
        _discard_output()
        fail(f"standard output: {exc.strerror}")


def _discard_output(fd: int = 1) -> None:
    """Discard what is still buffered for standard output or error: writing it failed."""
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), fd)


class _ClosedOutput(io.TextIOBase):
    """Standard output that the parent process has closed."""

    def write(self, _: str, /) -> int:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


class _ClosedError(io.TextIOBase):
    """Standard error that the parent process has closed: there is nowhere to report that."""

    def write(self, text: str, /) -> int:
        return len(text)


def replace_closed_streams() -> None:
    """Have something at sys.stdout and sys.stderr, which are None if their descriptor is closed.

    Otherwise print() to the second one would print to the first one. Neither has a file descriptor.
    """
    if sys.stdout is None:
        sys.stdout = _ClosedOutput()
    if sys.stderr is None:
        sys.stderr = _ClosedError()


def end_printing(exc: OSError) -> None:
    """End in place of an error of typer or its libraries while they printed a help or a mistake."""
    names = [
        str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(exc.__traceback__)
    ]
    # The last step is in this module if the stream is one of those above.
    called = [name.partition(".")[0] for name in names if name != __name__]
    if called[-1] not in _PRINTERS:
        return
    status = getattr(exc.__context__, "exit_code", None)
    if status is not None:
        # A mistake in the arguments, which goes to standard error.
        raise SystemExit(status) from None
    _discard_output()
    with suppress(OSError):
        sys.stderr.write(f"trio-unixconn: standard output: {exc.strerror}\n")
    raise SystemExit(1) from None


def end_output() -> None:
    """Write what is still buffered for standard output, or end as :func:`writing` does.

    Python does so itself, but with a traceback, and exit status 120.
    """
    try:
        # What could not be written would end this process with exit status 120.
        sys.stderr.flush()
    except OSError:
        _discard_output(2)
    try:
        sys.stdout.flush()
    except OSError as exc:
        _discard_output()
        with suppress(OSError):
            sys.stderr.write(f"trio-unixconn: standard output: {exc.strerror}\n")
        raise SystemExit(1) from None


def complain(text: str) -> None:
    """Print what another process says went wrong, in its own lines."""
    with suppress(OSError):
        for line in text.splitlines():
            sys.stderr.write(f"{printable(line)}\n")


def fail(*lines: str, status: int = 1) -> NoReturn:
    """Say what went wrong, and end."""
    with suppress(OSError):
        for line in lines:
            sys.stderr.write(f"trio-unixconn: {printable(line)}\n")
    raise typer.Exit(status)


def argument_of(address: UnixSocketAddress) -> str:
    """Return an address as the commands take it: a path, or ``@name``.

    It is not escaped: JSON keeps every character, and all else is printed with :func:`printable`.
    """
    return f"@{address.get_path()}" if address.get_is_abstract() else address.get_path()


def printable(text: str, *, keep: str = "") -> str:
    """Show what a terminal would act on, and what is not text, as escapes.

    Args:
      keep: characters that are left as they are.
    """
    return "".join(
        each if each.isprintable() or each in keep else each.encode("unicode_escape").decode()
        for each in text
    )


################################################################
# Running and ending
################################################################


class Signalled(BaseException):
    """A signal arrived."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run(
    function: Callable[[], Awaitable[T]],
    *,
    heeds_signals: bool = False,
    write_error: Callable[[str], None] | None = None,
) -> T:
    """Run an async function and return its result, or end with an exit status.

    1 for what a user can do something about, 128 and its number for a signal, as in a shell.

    Args:
      heeds_signals: whether the function does so itself; it raises :class:`Signalled` then.
      write_error: prints lines to standard error. Default: print.
    """
    try:
        if heeds_signals:
            return trio.run(function)
        return trio.run(_until_signalled, function)
    except BaseException as exc:  # raised again if it is a bug
        lines, status = explain(exc)
        if write_error is None:
            complain("\n".join(lines))
        else:
            write_error("\n".join(map(printable, lines)))
        raise typer.Exit(status) from None


def explain(exc: BaseException) -> tuple[list[str], int]:
    """Return what to print about an exception, and the exit status.

    Raises:
      BaseException: ``exc`` without groups, if it is a bug.
    """
    causes = list(_causes(exc))
    for cause in causes:
        if isinstance(cause, KeyboardInterrupt):
            # It arrived before anything was running.
            cause = Signalled(signal.SIGINT)  # noqa: PLW2901 - the same thing
        if isinstance(cause, Signalled):
            number = signal.Signals(cause.number)
            said = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
            return [f"trio-unixconn: {said}"], 128 + number
    expected = (OSError, EOFError, trio.TooSlowError, UnixConnectionError)
    if not all(isinstance(cause, expected) for cause in causes):
        if len(causes) > 1:
            raise exc
        # Without the groups around it, and with what it says of its own origin.
        raise causes[0] from causes[0].__cause__
    # Workers mostly fail for the same reason.
    tracebacks = [each.traceback for each in causes if isinstance(each, WorkerStartError)]
    texts = [text.rstrip().splitlines() for text in dict.fromkeys(tracebacks)]
    # A single line is a part of the error's own.
    lines = [line for text in texts if len(text) > 1 for line in text]
    errors = [*_headings(exc), *map(described, causes)]
    return [*lines, *(f"trio-unixconn: {printable(line)}" for line in errors)], 1


def described(exc: BaseException) -> str:
    """Say in a line what went wrong."""
    if isinstance(exc, WorkerStartError):
        # Without the traceback, whose last line says what it was.
        return ": ".join([str(exc.args[0]), *exc.traceback.rstrip().splitlines()[-1:]])
    if isinstance(exc, OSError) and exc.filename is not None:
        return f"{exc.filename}: {exc.strerror}"
    if isinstance(exc, UnixConnectionError):
        return str(exc)
    return f"{type(exc).__name__}: {exc}"


def seconds(timeout: float | None) -> float:
    """Return what was said to ``--timeout``, infinity if nothing was."""
    if timeout is None:
        return math.inf
    # Which no number is that is none (nan).
    if not timeout >= 0:
        fail("--timeout is a number of seconds, 0 or more", status=2)
    return timeout


def too_slow(timeout: float, address: UnixSocketAddress) -> OSError:
    """Return the error for what took longer than ``timeout``."""
    return TimeoutError(
        errno.ETIMEDOUT, f"not done within {timeout:g} seconds", argument_of(address)
    )


def heard_signals(names: Iterable[str] = ("SIGINT", "SIGTERM", "SIGHUP")) -> list[signal.Signals]:
    """Return the signals that are to be heeded, of those that this platform has.

    Signals that the parent process has ignored (nohup, or a shell for what it runs in the
    background) stay ignored.
    """
    # Windows has no SIGHUP.
    found: list[signal.Signals] = [getattr(signal, n) for n in names if hasattr(signal, n)]
    return [each for each in found if signal.getsignal(each) is not signal.SIG_IGN]


async def _until_signalled(function: Callable[[], Awaitable[T]]) -> T:
    async with trio.open_nursery() as nursery:
        await nursery.start(_raise_when_signalled)
        result = await function()
        nursery.cancel_scope.cancel()
    return result


async def _raise_when_signalled(
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Turn a signal into an exception of this task, and not of whatever runs just then."""
    heard = heard_signals()
    if not heard:
        task_status.started()
        return
    with trio.open_signal_receiver(*heard) as signals:
        task_status.started()
        raise Signalled(await signals.__anext__())


def _headings(exc: BaseException) -> Iterator[str]:
    """Return the messages of exception groups; those of trio's own groups say nothing."""
    inner: tuple[BaseException, ...] = getattr(exc, "exceptions", ())
    if inner and (message := getattr(exc, "message", "")) != _OF_TRIO:
        yield message
    for each in inner:
        yield from _headings(each)


def _causes(exc: BaseException) -> Iterator[BaseException]:
    inner: tuple[BaseException, ...] = getattr(exc, "exceptions", ())
    for each in inner:
        yield from _causes(each)
    if not inner:
        yield exc
