"""A page in Chromium, with a WebSocket and requests, while the workers are replaced."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("hypercorn")

import trustme

from tests._helpers.cli import started
from tests._helpers.environment import environment
from tests._helpers.real_programs import require_program
from tests._helpers.serve_cli import Served, hear_signals

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.slow]

# The page reports what it has seen when it has been connected to as many workers as it wants to.
APP = '''
import json, os

PAGE = b"""<!doctype html><title>workers</title>
<script>
const seen = {workers: [], codes: [], requests: 0, failed: [], protocol: ""}
const wanted = 4
function connect() {
  const socket = new WebSocket(location.href.replace("http", "ws") + "ws")
  socket.onmessage = (event) => { seen.workers.push(event.data) }
  socket.onclose = (event) => { seen.codes.push(event.code); setTimeout(connect, 0) }
}
async function ask() {
  while (new Set(seen.workers).size < wanted) {
    try {
      const response = await fetch("/pid", {method: "POST", body: "x"})
      if (response.status != 200) seen.failed.push(response.status)
      await response.text()
      seen.requests += 1
    } catch (error) { seen.failed.push(String(error)) }
  }
  seen.protocol = performance.getEntriesByType("resource")[0].nextHopProtocol
  await fetch("/report", {method: "POST", body: JSON.stringify(seen)})
}
connect(); ask(); ask()
</script>"""

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        raise NotImplementedError
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": str(os.getpid())})
        print("connected", flush=True)
        while (await receive())["type"] != "websocket.disconnect":
            pass
        return
    body = b""
    while True:
        message = await receive()
        body += message["body"]
        if not message["more_body"]:
            break
    if scope["path"] == "/report":
        print("report", body.decode(), flush=True)
    answer = PAGE if scope["path"] == "/" else str(os.getpid()).encode()
    headers = [(b"content-type", b"text/html"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})
'''


def report_after_restarts(served: Served) -> Any:
    """Replace the workers each time the page is connected, until it reports what it has seen."""
    is_connected, is_restarted = False, True
    while True:
        line = served.line("")
        if line.startswith("report "):
            return json.loads(line.removeprefix("report "))
        is_connected |= line == "connected\n"
        is_restarted |= "restarted: " in line
        if is_connected and is_restarted:
            is_connected = is_restarted = False
            served.send(signal.SIGHUP)


@pytest.mark.parametrize("protocol", ["http/1.1", "h2"])
def test_browser_across_restarts(tmp_path: Path, protocol: str) -> None:
    """The page connects again after each 1012, and none of its requests fails."""
    chromium = require_program("chromium")
    (tmp_path / "app.py").write_text(APP)
    arguments: list[str] = []
    if protocol == "h2":
        certificate = trustme.CA().issue_cert("localhost")
        certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "cert.pem"))
        arguments = ["--certfile", "cert.pem"]
    with started(
        *("serve", "--asgi", "app:app", "--bind", "tcp:127.0.0.1:0", "--workers", "2", *arguments),
        cwd=tmp_path,
        env=environment(),
        preexec_fn=hear_signals,
    ) as process:
        served = Served(process, tmp_path)
        found = re.search(r":(\d+)\n", served.line("listening at"))
        assert found
        served.line("ready: ")
        url = f"http{'s' if arguments else ''}://localhost:{found[1]}/"
        command = [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-background-networking", "--ignore-certificate-errors"),
            *(f"--user-data-dir={tmp_path}/profile", "--remote-debugging-port=0", url),
        ]
        with subprocess.Popen(
            command, env=environment(HOME=str(tmp_path)), stderr=subprocess.DEVNULL
        ) as browser:
            try:
                report = report_after_restarts(served)
            finally:
                browser.terminate()
                browser.wait(30)
        text = served.drained_output()
    assert report["failed"] == []
    # Over HTTP/2, the page can connect to a worker once more before it has read GOAWAY.
    assert set(report["codes"]) == {1012}
    assert len(set(report["workers"])) == 4
    assert report["requests"] > 0
    assert report["protocol"] == protocol
    assert ", 0 abandoned, 0 rejected" in text
