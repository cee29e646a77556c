"""HAProxy and curl send PROXY protocol headers to ``trio-unixconn serve``."""

from __future__ import annotations

import json
import re
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests._helpers.cli import run_in_this_process
from tests._helpers.real_programs import free_port, require_program, wait_for_port
from tests._helpers.serve_cli import starting

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.slow]

APP = """
import json

async def handler(stream, job):
    request = b""
    while b"\\r\\n\\r\\n" not in request:
        request += await stream.receive_some()
    told = {
        "peer": job.peer,
        "proxied_by": job.proxied_by[0] if isinstance(job.proxied_by, tuple) else "credentials",
        "version": job.proxy.version,
        "is_local": job.proxy.is_local,
        "unique_id": job.proxy.unique_id and job.proxy.unique_id.decode(),
        "request": request.decode().partition(" HTTP")[0],
    }
    body = json.dumps(told).encode()
    head = b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n"
    await stream.send_all(head % len(body) + body)
"""
HAPROXY = """\
defaults
    mode http
    retries 0
    timeout connect 30s
    timeout client 60s
    timeout server 60s
frontend front
    bind 127.0.0.1:{port}
    unique-id-format id-%[src_port]
    default_backend back
backend back
    server app {app} {options}
"""


@contextmanager
def serving(directory: Path, bind: str, *arguments: str) -> Generator[str, None, None]:
    """Run a server whose connections begin with a header, and return its address."""
    (directory / "app.py").write_text(APP)
    with starting(directory, "app:handler", *arguments, bind=bind) as served:
        found = re.search(r"listening at (\S+)", served.line("listening at"))
        assert found
        served.line("ready: ")
        yield found[1].removeprefix("tcp:").removeprefix("unix:")
        assert ", 0 failed, " in served.drained()


@contextmanager
def balancer(directory: Path, app: str, options: str) -> Generator[int, None, None]:
    """Run HAProxy in front of a server, and return its port."""
    program, port = require_program("haproxy"), free_port()
    config = directory / "haproxy.cfg"
    config.write_text(HAPROXY.format(port=port, app=app, options=options))
    with subprocess.Popen([program, "-db", "-q", "-f", str(config)]) as process:
        try:
            wait_for_port(process, port)
            yield port
        finally:
            process.terminate()


def curl(port: int, *arguments: str) -> Any:
    done = subprocess.run(
        [require_program("curl"), "-sS", *arguments, f"http://127.0.0.1:{port}/where"],
        capture_output=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("options", "version", "unique_id"),
    [
        ("send-proxy", 1, False),
        ("send-proxy-v2", 2, False),
        ("send-proxy-v2 proxy-v2-options unique-id,crc32c", 2, True),
    ],
)
@pytest.mark.parametrize("bind", ["tcp", "unix"])
def test_serve_behind_haproxy_with_proxy_protocol(
    tmp_path: Path, bind: str, options: str, version: int, *, unique_id: bool
) -> None:
    """The handler knows the client of the balancer, through TCP and through a Unix socket."""
    where = "tcp:127.0.0.1:0" if bind == "tcp" else f"unix:{tmp_path}/socket"
    arguments = ["--proxy-protocol", f"v{version}"]
    if bind == "tcp":
        arguments += ["--proxy-from", "10.0.0.0/8", "--proxy-from", "127.0.0.1/32"]
    with serving(tmp_path, where, *arguments) as app, balancer(tmp_path, app, options) as port:
        told = curl(port, "--interface", "127.0.0.9")
    assert told["peer"][0] == "127.0.0.9"
    assert (told["version"], told["request"]) == (version, "GET /where")
    assert told["proxied_by"] == ("127.0.0.1" if bind == "tcp" else "credentials")
    assert told["unique_id"] == (f"id-{told['peer'][1]}" if unique_id else None)


def test_serve_with_haproxy_protocol_of_curl(tmp_path: Path) -> None:
    """What curl sends is a header of version 1."""
    arguments = ["--proxy-protocol", "any", "--proxy-from", "127.0.0.0/8"]
    with serving(tmp_path, "tcp:127.0.0.1:0", *arguments) as app:
        told = curl(int(app.rpartition(":")[2]), "--haproxy-protocol")
    assert (told["version"], told["peer"][0]) == (1, "127.0.0.1")


def test_serve_rejects_proxy_options() -> None:
    """What does not fit together is one line, and exit status 2."""
    serve = ["serve", "app:handler", "--bind", "tcp:127.0.0.1:0"]
    for arguments, said in (
        (["--proxy-protocol", "v2"], "--proxy-protocol requires --proxy-from"),
        (["--proxy-from", "::1/128"], "--proxy-from can only be used with --proxy-protocol"),
        (["--proxy-protocol", "v1", "--proxy-from", "::1/12"], "has host bits set"),
    ):
        done = run_in_this_process(*serve, *arguments)
        assert done.returncode == 2
        assert said in done.stderr
