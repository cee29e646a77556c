"""The pytest plugin: fixtures that a test requests by name.

Invariant: nothing is on unless a test requests it, and only this module imports pytest.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import pytest
from _pytest.runner import runtestprotocol

from . import _paths
from ._descriptors import assert_no_fd_leak
from ._pairs import closing_pair

if TYPE_CHECKING:
    from _pytest._code.code import ExceptionRepr

    from .._connection import UnixConnection


# How a leak fails the test
# -------------------------
#
# What we want: a leak is a failure of the test that leaks. An error of the teardown would say that
# the test has passed, and count it twice.
#
# The descriptors can be compared only when the fixtures of the test have ended, because these close
# what they have opened. That is in the teardown, and pytest has reported the call by then. So the
# reports of a guarded test are held back until its teardown has ended. If the guard has found a
# leak, the report of the call becomes a failure, and that of the teardown does not mention it. This
# is what pytest-rerunfailures does to report a test once. It takes one function of pytest that is
# not documented, runtestprotocol, which that plugin and others have used for ten years.
#
# If another plugin runs the test in pytest's place, the reports are its own, and a leak is an error
# of the teardown.

_GUARD: Final = "fd_leak_guard"
_held: Final = pytest.StashKey[list[pytest.TestReport]]()
_leak: Final = pytest.StashKey[BaseException]()


@pytest.fixture
def fd_leak_guard(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail unless the open descriptors after the test are those from before it.

    For a whole module, ``pytestmark = pytest.mark.usefixtures("fd_leak_guard")``.
    """
    try:
        with assert_no_fd_leak():
            yield
    except AssertionError as exc:
        leak = pytest.fail.Exception(str(exc), pytrace=False)
        item: pytest.Item = request.node
        item.stash[_leak] = leak
        raise leak from None


@pytest.hookimpl
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a guarded test, and report its call when its teardown has ended."""
    if _GUARD not in getattr(item, "fixturenames", ()) or _is_run_by_another_plugin(item):
        return None
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    held = item.stash[_held] = []
    try:
        runtestprotocol(item, log=False, nextitem=nextitem)
    finally:
        # Even if a KeyboardInterrupt ends the teardown.
        for report in held:
            hook.pytest_runtest_logreport(report=report)
        del item.stash[_held]
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _is_run_by_another_plugin(item: pytest.Item) -> bool:
    return any(
        not (each.wrapper or each.hookwrapper)
        and each.plugin_name != "runner"
        and each.plugin is not sys.modules[__name__]
        for each in item.config.hook.pytest_runtest_protocol.get_hookimpls()
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hold back the reports; move a leak from the teardown's to the call's."""
    report = yield
    held = item.stash.get(_held, None)
    if held is None:
        return report
    held.append(report)
    if call.when == "teardown":
        leak = item.stash.get(_leak, None)
        if leak is not None:
            # The call's; if the setup has failed, there is none, and it is the setup's.
            _fail(held[-2], str(leak), getattr(report, "wasxfail", None))
            # With an error of another fixture it stays in a group of both.
            if call.excinfo is not None and call.excinfo.value is leak:
                report.outcome, report.longrepr = "passed", None
                vars(report).pop("wasxfail", None)
    elif report.failed:
        _stop_at_maxfail(item.session)
    return report


def _fail(report: pytest.TestReport, leak: str, xfail: str | None) -> None:
    """Make a leak the failure that a report is of, or an expected one; or add it to a failure."""
    longrepr = report.longrepr
    was_expected = xfail is not None and str(longrepr).startswith("[XPASS(strict)]")
    if report.failed and not was_expected:
        if isinstance(longrepr, str):
            report.longrepr = f"{longrepr}\n\n{leak}"
        else:
            cast("ExceptionRepr", longrepr).addsection("file descriptors", leak)
        return
    report.longrepr = leak
    if xfail is None:
        report.outcome = "failed"
        vars(report).pop("wasxfail", None)
    else:
        report.outcome = "skipped"
        vars(report)["wasxfail"] = xfail


def _stop_at_maxfail(session: pytest.Session) -> None:
    """Have the teardown end all fixtures if this failure is the last one of ``--maxfail``.

    As pytest does when it logs the report, which here is later.
    """
    most = session.config.getoption("maxfail")
    if most and session.testsfailed + 1 >= most:
        session.shouldfail = f"stopping after {session.testsfailed + 1} failures"


@pytest.fixture
def unix_connection_pair(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[UnixConnection, UnixConnection]]:
    """Two connections that are connected to each other; closed after the test.

    The test may close them too. It may be one of trio's, or call ``trio.run`` itself.
    """
    if "fd_leak_guard" in request.fixturenames:
        # In any order of the two names, the guard begins first and ends last.
        request.getfixturevalue("fd_leak_guard")
    with closing_pair() as pair:
        yield pair


@pytest.fixture
def unix_socket_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A path for a socket, in a directory of its own, that fits into an address.

    40 bytes may be appended. The directory is one of pytest's. If its path is too long, it is
    another one, which is removed after the test.
    """
    directory = tmp_path_factory.mktemp("unix")
    if _paths.fits(directory):
        yield directory / _paths.NAME
    else:
        with _paths.short_directory() as short:
            yield short / _paths.NAME
