"""A client that knows nothing of worker pools, on the HTTP server of the examples."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests._helpers.processes import ROOT
from tests._helpers.real_programs import first_line, output_of, running

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

pytestmark = [pytest.mark.interop, pytest.mark.slow]

EXAMPLE: Final = ROOT / "examples" / "pool_http.py"


@pytest.fixture
async def address() -> AsyncGenerator[str, None]:
    """Where the example serves, which must end without having had anything to complain about."""
    command = [sys.executable, "-W", "error", str(EXAMPLE), "0"]
    with trio.fail_after(60):
        async with running(command, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            said = re.fullmatch(r"ready: curl (.*)", await first_line(process))
            assert said is not None
            yield said[1]
            process.send_signal(signal.SIGTERM)
            assert [chunk async for chunk in process.stdout] == []
            assert await process.wait() == 0


async def test_curl_keeps_its_connection_to_a_worker(address: str, curl: str) -> None:
    """Three requests of curl's go over one connection, to one worker, as one job."""
    command = [curl, "-s", "-S", "-w", "%{num_connects} %{http_code}\n"]
    lines = (await output_of(*command, *[address] * 3)).decode().splitlines()
    assert re.fullmatch(r"Hello from process \d+, for job 1!", lines[0])
    assert lines == [lines[0], "1 200", lines[0], "0 200", lines[0], "0 200"]


async def test_curl_is_refused_by_a_worker(address: str, curl: str) -> None:
    """Curl sees the status of each refusal, and the worker goes on."""
    command = [curl, "-s", "-S", "-o", "/dev/null", "-w", "%{http_code} "]
    got = await output_of(
        *command, f"{address}elsewhere", "--next", *command[1:], "-d", "x=1", address
    )
    assert got == b"404 405 "
    assert await output_of(curl, "-s", "-S", "-f", "-I", address)
