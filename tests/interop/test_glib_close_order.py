"""Operations that are begun at once: the order of the calls decides, as in GLib."""

from __future__ import annotations

import json
import subprocess
from typing import Any, Final

import pytest
import trio

from tests._helpers.fds import clog
from tests._helpers.glib import SYSTEM_PYTHON
from tests._helpers.processes import ROOT
from trio_unixconn import (
    AsyncResult,
    CallbackConnection,
    Cancellable,
    UnixConnectionError,
    connection_pair,
    open_callback_adapter,
)

pytestmark = [pytest.mark.interop, pytest.mark.slow]

PROGRAM: Final = ROOT / "tests" / "_helpers" / "programs" / "glib_close_order.py"
METHODS: Final = {"write": "send_all", "read": "receive_some", "close": "close"}
ARGUMENTS: Final[dict[str, Any]] = {"send_all": b"x", "receive_some": 1, "close": 0}

OPERATIONS: Final = [
    "write write",
    "read read close",
    "write close",
    "full write close",
    "read close",
    "close write",
    "close read",
    "close close",
    "cancelled close",
]


@pytest.fixture(scope="module")
def in_glib(real_glib: None) -> dict[str, Any]:
    """How they end in GLib."""
    command = [SYSTEM_PYTHON, "-E", "-s", str(PROGRAM), *OPERATIONS]
    process = subprocess.run(command, stdout=subprocess.PIPE, timeout=120, check=True)
    seen: dict[str, Any] = json.loads(process.stdout)
    return seen


@pytest.mark.parametrize("operations", OPERATIONS)
async def test_close_async_and_others_as_in_glib(operations: str, in_glib: dict[str, Any]) -> None:
    """Which of them fails, how, and what is called back before the last, is as in GLib."""
    names = [METHODS[name] for name in operations.split() if name in METHODS]
    codes: list[Any] = ["no callback"] * len(names)
    order: list[int] = []

    def callback(source: CallbackConnection, result: AsyncResult, position: int) -> None:
        order.append(position)
        try:
            getattr(source, f"{names[position]}_finish")(result)
            codes[position] = None
        except UnixConnectionError as error:
            codes[position] = error.code

    expected = in_glib[operations]
    one, two = connection_pair()
    cancellable = Cancellable()
    if operations.startswith("cancelled "):
        cancellable.cancel()
    async with one, two:
        if operations.startswith("full "):
            clog(one)
        with trio.fail_after(30):
            async with open_callback_adapter() as adapter:
                wrapped = adapter.wrap(one)
                for position, name in enumerate(names):
                    begin = getattr(wrapped, f"{name}_async")
                    begin(ARGUMENTS[name], cancellable, callback, position)
        assert codes == expected["codes"]
        assert one.is_closed() == expected["closed"]
        if names[-1] == "close":
            before = sorted(order[: order.index(len(names) - 1)])
            assert before == expected["before the last"]
