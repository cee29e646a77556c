"""Fixtures and settings for every test: the guard for leaked fds, limits on time, signals."""

from __future__ import annotations

import gc
import os
import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests._helpers.environment import standardize_environment
from tests._helpers.processes import children_of
from tests._helpers.time_limits import limit_time, report_skip
from trio_unixconn.testing import plugin

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from xdist.workermanage import WorkerController

pytest_plugins = ["pytester"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --slow."""
    parser.addoption(
        "--slow",
        action="store_true",
        help="run tests marked slow, too; a path, -k or -m does so as well",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Decide whether slow tests run."""
    # The package need not be installed with its entry point.
    if not config.pluginmanager.has_plugin("trio_unixconn"):
        config.pluginmanager.register(plugin, "trio_unixconn")
    if hasattr(config, "workerinput"):
        config.option.slow = config.workerinput["slow"]
    else:
        selects_tests = config.args_source == pytest.Config.ArgsSource.ARGS
        option = config.option
        option.slow = bool(option.slow or selects_tests or option.keyword or option.markexpr)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: WorkerController) -> None:
    """Tell a worker of pytest-xdist, which gets the arguments alone, whether slow tests run."""
    node.workerinput["slow"] = node.config.option.slow


def pytest_sessionstart() -> None:
    """Standardize the environment, which the workers of pytest-xdist inherit after this.

    pytest has read before what the terminal is, and whether to use colors.
    """
    standardize_environment()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect slow tests unless they were asked for.

    Reject ids with an address in memory, which pytest-xdist reports as different tests.
    """
    if wrong := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"expected ids that are the same in each process, got {wrong}")
    if not config.option.slow:
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking at 4,000 tests again and again.

    Many tests call gc.collect(). It takes 50 times as long with the objects of pytest.
    """
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Limit the time of an async test."""
    limit_time(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Report why an async test skipped itself."""
    report = yield
    report_skip(item, report)
    return report


@pytest.fixture(autouse=True)
def no_test_leaks(fd_leak_guard: None) -> None:
    """The open file descriptors after the test are those from before it."""


@pytest.fixture(autouse=True, scope="session")
def default_signals() -> Iterator[None]:
    """No signal is ignored that Python does not ignore by itself.

    nohup ignores SIGHUP, and shells ignore SIGINT and SIGQUIT in what they start with ``&``. The
    commands that the tests start would inherit that.
    """
    ignored = {
        number: signal.signal(number, signal.SIG_DFL)
        for number in signal.valid_signals() - {signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ}
        if signal.getsignal(number) is signal.SIG_IGN
    }
    yield
    for number, before in ignored.items():
        signal.signal(number, before)


@pytest.fixture
def default_sigint() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, even if the tests were started with SIGINT ignored.

    Shells ignore it in what they start with ``&``, and so does nohup. Child processes inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def unmeasured_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coverage does not measure the processes that the test starts, unless it is marked so.

    Other tests run the same lines, and a process that is measured takes 0.15 seconds longer.
    """
    if request.node.get_closest_marker("measured"):
        return
    for name in [name for name in os.environ if name.startswith("COVERAGE_PROCESS_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def no_child_left() -> Iterator[None]:
    """Child processes after the test, zombies included, are those from before it."""
    before = children_of(os.getpid())
    yield
    assert children_of(os.getpid()) == before


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_child_left: None) -> Path:
    """The directory in which workers write what tests read."""
    monkeypatch.setenv("POOL_FOLDER", str(tmp_path))
    return tmp_path


# A slow machine is not a failure. The suite draws the same examples in each run, so that no run
# fails by chance; "soak" draws new ones (nox -s model).
settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("soak", deadline=None, max_examples=20_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
