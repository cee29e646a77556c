"""Trio as a guest of GLib's main loop, with the real Gio at the other end; and its user data."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests._helpers.environment import environment
from tests._helpers.glib import SYSTEM_PYTHON, missing_peer
from tests._helpers.processes import ROOT
from trio_unixconn import AsyncResult, CallbackConnection, connection_pair, open_callback_adapter

if TYPE_CHECKING:
    from trio_unixconn import CallbackAdapter

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.usefixtures("real_glib")]

EXAMPLES = ROOT / "examples" / "glib"
EXAMPLE = EXAMPLES / "guest.py"
# PyGObject uses what Python 3.14 deprecates.
IGNORED = ("ignore::ImportWarning", "ignore::DeprecationWarning:gi.events")
WARNINGS = [word for each in ("error", *IGNORED) for word in ("-W", each)]


@pytest.fixture(scope="session")
def python_with_trio() -> dict[str, str]:
    """The environment in which the Python that has PyGObject has trio and this package, too.

    Both are Python code without compiled parts, so those of this environment can be used.
    """
    packages = Path(trio.__file__).parents[1]
    variables = environment(packages)
    probe = "import trio, attrs, gi"
    done = subprocess.run(
        [SYSTEM_PYTHON, "-c", probe], env=variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        missing_peer(f"{SYSTEM_PYTHON} cannot import trio or attrs: {done.stderr}")
    return variables


def said_in_glib(example: Path, environment: dict[str, str]) -> list[str]:
    """Run an example, and return the lines that it prints."""
    done = subprocess.run(
        [SYSTEM_PYTHON, *WARNINGS, str(example)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout.splitlines()


@pytest.mark.once
def test_example_runs_in_glib(python_with_trio: dict[str, str]) -> None:
    """GLib's callbacks and trio's tasks use one connection with Gio at its other end."""
    said = said_in_glib(EXAMPLE, python_with_trio)
    # Gio sends in a thread, so its callback may be called after what it sent has arrived.
    assert sorted(said[:-2]) == ["Gio has sent its credentials", "credentials from Gio"]
    assert said[-2:] == [
        "the pipe has: written by a callback",
        "Gio has received a file of the same size",
    ]


@pytest.mark.once
def test_example_of_an_application(python_with_trio: dict[str, str]) -> None:
    """A Gio.Application starts trio; Ctrl-C ends trio first, and then the application."""
    assert said_in_glib(EXAMPLES / "application.py", python_with_trio) == [
        "the window would be shown now",
        "the task has counted 3 files",
        "trio ends",
    ]


# What is passed after the callback, by position and by keyword.
USER_DATA: list[tuple[list[Any], dict[str, Any]]] = [
    ([], {}),
    ([1], {}),
    ([1, "two"], {}),
    ([], {"user_data": 5}),
    ([], {"user_data": None}),
    ([], {"user_data": [1, 2]}),
    ([1], {"user_data": 5}),
]
ASK_GIO = """
import json, socket, sys
from gi.repository import Gio, GLib

one, two = socket.socketpair()
conn = Gio.Socket.new_from_fd(one.detach()).connection_factory_create_connection()
loop, told = GLib.MainLoop(), []

def on_sent(source, result, *user_data):
    source.send_credentials_finish(result)
    told.append(user_data)
    loop.quit()

for args, keywords in json.loads(sys.argv[1]):
    try:
        conn.send_credentials_async(None, on_sent, *args, **keywords)
    except TypeError:
        told.append("TypeError")
    else:
        loop.run()
print(json.dumps(told))
"""


async def told_by_us(
    adapter: CallbackAdapter, args: list[Any], keywords: dict[str, Any]
) -> list[Any] | str:
    told: list[list[Any]] = []
    called = trio.Event()

    def on_sent(source: CallbackConnection, result: AsyncResult, *user_data: Any) -> None:
        source.send_credentials_finish(result)
        told.append(list(user_data))
        called.set()

    one, two = connection_pair()
    async with one, two:
        try:
            adapter.wrap(one).send_credentials_async(None, on_sent, *args, **keywords)
        except TypeError:
            return "TypeError"
        await called.wait()
    return told[0]


async def test_user_data_as_in_pygobject() -> None:
    """The callback gets what it gets from PyGObject, whether it was passed by keyword or not."""
    asked = await trio.run_process(
        [SYSTEM_PYTHON, "-c", ASK_GIO, json.dumps(USER_DATA)], capture_stdout=True
    )
    async with open_callback_adapter() as adapter:
        ours = [await told_by_us(adapter, args, keywords) for args, keywords in USER_DATA]
    assert ours == json.loads(asked.stdout)
    assert ours[3:] == [[5], [None], [[1, 2]], "TypeError"]
