"""The errors: what they inherit, what Gio calls them, what they say."""

from __future__ import annotations

import errno
import pickle

import pytest
import trio

import trio_unixconn
from trio_unixconn import IOErrorEnum, UnixConnectionError


@pytest.mark.parametrize(
    ("name", "also", "code"),
    [
        ("OperationCancelled", UnixConnectionError, IOErrorEnum.CANCELLED),
        ("ConnectionClosedError", trio.ClosedResourceError, IOErrorEnum.CLOSED),
        ("ConnectionBrokenError", trio.BrokenResourceError, IOErrorEnum.BROKEN_PIPE),
        ("ConnectionBusyError", trio.BusyResourceError, IOErrorEnum.PENDING),
        ("EndOfStreamError", trio.EndOfChannel, IOErrorEnum.FAILED),
        ("UnexpectedControlMessageError", ValueError, IOErrorEnum.FAILED),
        ("UnexpectedDescriptorsError", ValueError, IOErrorEnum.FAILED),
        ("DescriptorsTruncatedError", OSError, IOErrorEnum.TOO_MANY_OPEN_FILES),
        ("DescriptorsRefusedError", PermissionError, IOErrorEnum.PERMISSION_DENIED),
        ("PoolClosedError", trio.ClosedResourceError, IOErrorEnum.CLOSED),
        ("JobRefusedError", RuntimeError, IOErrorEnum.FAILED),
        ("WorkerDiedError", RuntimeError, IOErrorEnum.BROKEN_PIPE),
        ("WorkerStartError", RuntimeError, IOErrorEnum.FAILED),
        ("HandlerError", RuntimeError, IOErrorEnum.FAILED),
        ("NotSupportedError", NotImplementedError, IOErrorEnum.NOT_SUPPORTED),
    ],
)
def test_family_and_code(name: str, also: type[Exception], code: IOErrorEnum) -> None:
    """Each error is a UnixConnectionError, is what callers already catch, and has Gio's code."""
    error = getattr(trio_unixconn, name)
    assert issubclass(error, UnixConnectionError)
    assert issubclass(error, also)
    assert error.code is code


def test_gio_has_one_number_twice() -> None:
    """BROKEN_PIPE and CONNECTION_CLOSED are one number, as in Gio."""
    assert IOErrorEnum["BROKEN_PIPE"] is IOErrorEnum["CONNECTION_CLOSED"]


def test_data_is_kept_and_said_once() -> None:
    """The bytes are in .data, and the text is the message alone."""
    error = trio_unixconn.UnexpectedControlMessageError("the message", b"x")
    assert error.data == b"x"
    assert str(error) == "the message"


def test_truncation_names_the_limit() -> None:
    """A truncation reports how many arrived and which limit to raise; its errno is EMFILE."""
    error = trio_unixconn.DescriptorsTruncatedError(b"x", 5)
    assert (error.data, error.arrived, error.errno) == (b"x", 5, errno.EMFILE)
    assert "5 arrived" in str(error)
    assert "RLIMIT_NOFILE" in str(error)


@pytest.mark.parametrize(
    "error",
    [
        trio_unixconn.UnexpectedDescriptorsError("the message", b"x"),
        trio_unixconn.DescriptorsTruncatedError(b"x", 5),
        trio_unixconn.DescriptorsRefusedError(errno.EPERM, "no"),
        trio_unixconn.HandlerError("the handler failed", "Traceback"),
        trio_unixconn.WorkerStartError("the worker could not start"),
    ],
)
def test_errors_can_be_pickled(error: Exception) -> None:
    """An error goes to another process and back unchanged."""
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_remote_error_contains_the_traceback() -> None:
    """A worker's traceback is in .traceback and after the message, if there is one."""
    error = trio_unixconn.HandlerError("the handler failed", "Traceback\nZeroDivisionError\n")
    assert error.traceback == "Traceback\nZeroDivisionError\n"
    assert str(error) == "the handler failed; in the worker:\nTraceback\nZeroDivisionError"
    assert str(trio_unixconn.WorkerStartError("it died")) == "it died"
