"""The options that say how the processes of workers run: checked before any is started."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest

from trio_unixconn import NotSupportedError
from trio_unixconn.pool._config import PoolConfig
from trio_unixconn.pool._worker_config import WORKER_VARIABLE, import_path

HANDLER = "tests._helpers.pool_handlers:do"


def test_worker_config_of_each_slot() -> None:
    """Each worker gets its index and its CPU; the other options are the same for all."""
    config = PoolConfig(
        HANDLER,
        workers=3,
        max_in_flight=2**30,
        hang_timeout=20,
        handler_timeout=3,
        setup="tests._helpers.pool_handlers:noted",
        setup_data=bytearray(b"data"),
        environment={"A": "1", "B": None},
        cpu_affinity=[4, 7],
        nice=5,
        resource_limits={"RLIMIT_NOFILE": (100, 200), resource.RLIMIT_AS: (-1, -1)},
        kill_process_group=True,
        preload=["trio"],
    )
    first, second, third = map(config.worker_config, range(3))
    assert (first.index, first.cpu) == (0, 4)
    assert (second.index, second.cpu) == (1, 7)
    assert (third.index, third.cpu) == (2, 4)
    assert (first.handler, first.executable) == (HANDLER, sys.executable)
    assert (first.heartbeat_interval, first.handler_timeout) == (4, 3)
    assert (first.setup, first.setup_data) == ("tests._helpers.pool_handlers:noted", b"data")
    assert first.environment == {"A": "1", "B": None}
    assert first.nice == 5
    assert first.resource_limits == (
        (resource.RLIMIT_NOFILE, 100, 200),
        (resource.RLIMIT_AS, -1, -1),
    )
    assert first.kill_process_group
    assert first.preload == ("trio",)
    assert first.log_size == 2**20
    assert PoolConfig(HANDLER, hang_timeout=float("inf")).worker_config(0).heartbeat_interval == 1


class FalseIndex:
    """Claims to be an integer."""

    def __index__(self) -> int:
        raise TypeError("not an integer")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"setup_data": "text"}, TypeError, "setup_data must be a bytes-like object, got str"),
        ({"environment": [("A", "1")]}, TypeError, "environment must be a mapping, got list"),
        ({"environment": {"A": 1}}, TypeError, "must map str to str or None, got str to int"),
        ({"environment": {1: "A"}}, TypeError, "must map str to str or None, got int to str"),
        ({"environment": {"": "1"}}, ValueError, "invalid variable: ''"),
        ({"environment": {"A=B": "1"}}, ValueError, "invalid variable: 'A=B'"),
        ({"environment": {"A": "1\0"}}, ValueError, "invalid variable: 'A'"),
        ({"cpu_affinity": 3}, TypeError, "cpu_affinity must be a sequence of CPU numbers"),
        ({"cpu_affinity": [True]}, TypeError, "cpu_affinity must be an int, got bool"),
        ({"cpu_affinity": ["0"]}, TypeError, "cpu_affinity must be an int, got str"),
        ({"cpu_affinity": []}, ValueError, "cpu_affinity must contain CPU numbers"),
        ({"cpu_affinity": [-1]}, ValueError, "cpu_affinity must contain CPU numbers"),
        ({"nice": 1.0}, TypeError, "nice must be an int, got float"),
        ({"resource_limits": [1]}, TypeError, "resource_limits must be a mapping, got list"),
        ({"resource_limits": {"NOFILE": (1, 1)}}, ValueError, "'RLIMIT_NOFILE', got 'NOFILE'"),
        ({"resource_limits": {"RLIMIT_X": (1, 1)}}, ValueError, "got 'RLIMIT_X'"),
        ({"resource_limits": {None: (1, 1)}}, TypeError, "must be an int, got NoneType"),
        ({"resource_limits": {7: 1}}, TypeError, r"pair of ints \(soft, hard\) for 7, got 1"),
        ({"resource_limits": {7: (1,)}}, TypeError, r"pair of ints \(soft, hard\)"),
        ({"resource_limits": {7: (1, "2")}}, TypeError, r"pair of ints \(soft, hard\)"),
        ({"resource_limits": {7: (1, FalseIndex())}}, TypeError, r"pair of ints \(soft, hard\)"),
        ({"resource_limits": {7: (2, 1)}}, ValueError, "must not exceed the hard limit"),
        ({"resource_limits": {7: (-1, 1)}}, ValueError, "must not exceed the hard limit"),
        ({"resource_limits": {7: (-2, -1)}}, ValueError, "must not exceed the hard limit"),
        ({"kill_process_group": 1}, TypeError, "kill_process_group must be a bool, got int"),
        ({"handler_timeout": 0}, ValueError, "handler_timeout must be more than 0 seconds"),
        ({"handler_timeout": "5"}, TypeError, "handler_timeout must be a number of seconds"),
        ({"preload": "trio"}, TypeError, "preload must be a sequence of names of modules"),
        ({"preload": 3}, TypeError, "preload must be a sequence of names of modules, got 3"),
        ({"preload": [3]}, TypeError, "preload must contain names of modules, got int"),
        ({"preload": ["trio", "a b"]}, ValueError, "expected the name of a module, got 'a b'"),
        ({"executable": 3}, TypeError, "executable must be a path, got int"),
        ({"executable": "/no/such/python"}, ValueError, "executable must be a Python interpreter"),
        ({"executable": os.devnull}, ValueError, "executable must be a Python interpreter"),
    ],
)
def test_option_is_checked(options: Any, error: type[Exception], text: str) -> None:
    """An option that cannot be is rejected with its name, and what it must be."""
    with pytest.raises(error, match=text):
        PoolConfig(HANDLER, **options)


def test_cpu_affinity_where_it_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sched_setaffinity(2), the option is rejected; omitted, nothing is needed."""
    monkeypatch.delattr(os, "sched_setaffinity")
    assert PoolConfig(HANDLER).worker_config(0).cpu is None
    with pytest.raises(NotSupportedError, match="sched_setaffinity"):
        PoolConfig(HANDLER, cpu_affinity=[0])


def test_executable_as_path() -> None:
    """A path in any form, or a name that is on PATH, is an executable."""
    assert PoolConfig(HANDLER, executable=Path(sys.executable)).executable == sys.executable
    assert PoolConfig(HANDLER, executable="sh").executable.endswith("/sh")


def test_executable_is_required_in_frozen_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is not a Python interpreter, or does not know its own, must name one."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(ValueError, match="executable is required in a frozen program"):
        PoolConfig(HANDLER)
    assert PoolConfig(HANDLER, executable=sys.executable).executable == sys.executable
    monkeypatch.setattr(sys, "frozen", False)
    python = sys.executable
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(ValueError, match=r"executable is required, because sys\.executable"):
        PoolConfig(HANDLER)
    assert PoolConfig(HANDLER, executable=python).executable == python


def test_executable_in_process_started_as_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is started in place of a Python interpreter starts no worker itself."""
    monkeypatch.setenv(WORKER_VARIABLE, "17")
    with pytest.raises(RuntimeError, match=r"as a worker by process 17, .* set executable= to one"):
        PoolConfig(HANDLER)


def test_import_path_of_all_types() -> None:
    """Paths are converted to strings; what an import skips is left out."""
    assert import_path(["", "/a", Path("/b"), b"/c\xff", None, 3]) == ["", "/a", "/b", "/c\udcff"]
