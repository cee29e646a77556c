"""The limits that keep one hanging test from hanging the suite."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests._helpers.processes import ROOT
from tests._helpers.time_limits import task_stacks

pytestmark = pytest.mark.slow

HANGS = """
import threading

import pytest
import trio


async def test_async_hangs():
    async def wait_in_a_child():
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_in_a_child)


def test_sync_hangs():
    threading.Event().wait()


def test_another():
    pass
"""

CONFTEST = """
import pytest
from tests._helpers.time_limits import limit_time, report_skip

def pytest_runtest_setup(item):
    limit_time(item, 0.5)

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    report_skip(item, report)
    return report
"""


# The limits are those of this suite, not of the package: one Python is enough.
@pytest.mark.once
def test_a_hanging_test_is_ended(pytester: pytest.Pytester) -> None:
    """A hanging test fails with the place where it hangs, and the other tests go on."""
    pytester.makepyfile(HANGS)
    pytester.makeconftest(CONFTEST)
    pytester.makeini(
        f"""
        [pytest]
        trio_mode = true
        pythonpath = {ROOT}
        faulthandler_timeout = 3
        faulthandler_exit_on_timeout = true
        """
    )
    # One process, and another when that has ended.
    result = pytester.runpytest_subprocess("-n", "1", "-p", "no:cacheprovider", timeout=60)
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["*crashed while running*::test_sync_hangs*", "*TooSlowError*"])
    result.stdout.fnmatch_lines("task *wait_in_a_child:")
    assert "in test_sync_hangs" in result.stderr.str()


SKIPS = """
import pytest
import trio


async def test_skips():
    async with trio.open_nursery():
        pytest.skip("the moon is full")
"""


@pytest.mark.once
def test_an_async_test_says_why_it_skips(pytester: pytest.Pytester) -> None:
    """The reason of a skip in an async test is reported, even from within a nursery."""
    pytester.makepyfile(SKIPS)
    pytester.makeconftest(CONFTEST)
    pytester.makeini(f"[pytest]\ntrio_mode = true\npythonpath = {ROOT}")
    result = pytester.runpytest_subprocess("-rs", "-p", "no:cacheprovider", timeout=60)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines("SKIPPED*the moon is full")


async def test_task_stacks() -> None:
    """Every task is listed with the function in which it waits."""

    async def waits() -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(waits)
        await trio.testing.wait_all_tasks_blocked()
        stacks = task_stacks()
        nursery.cancel_scope.cancel()
    assert ", in waits\n" in stacks
    assert ", in sleep_forever\n" in stacks
    assert "test_task_stacks" in stacks
