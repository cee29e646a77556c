"""nginx and HAProxy in front of the HTTP example, while its workers are replaced."""

from __future__ import annotations

import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests._helpers.http_clients import clients_of, http_server, wait_for_answers
from tests._helpers.real_programs import free_port, require_program, wait_for_port

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.slow]

# Neither may hide a failure: no request is sent twice.
NGINX = """\
daemon off;
master_process off;
pid {directory}/pid;
error_log {directory}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    upstream app {{ server 127.0.0.1:{app} max_fails=0; keepalive 16; }}
    server {{
        listen 127.0.0.1:{port};
        keepalive_requests 1000000;
        location / {{
            proxy_pass http://app;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_next_upstream off;
        }}
    }}
}}
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
    default_backend back
backend back
    http-reuse always
    server app 127.0.0.1:{app}
"""
COMMANDS = {"nginx": ["-c"], "haproxy": ["-db", "-q", "-f"]}


@contextmanager
def proxy(name: str, directory: Path, app: int) -> Generator[int, None, None]:
    """Run a proxy in front of a port, and return its own."""
    program, port = require_program(name), free_port()
    config = directory / "config"
    text = NGINX if name == "nginx" else HAPROXY
    config.write_text(text.format(directory=directory, app=app, port=port))

    with subprocess.Popen([program, *COMMANDS[name], str(config)]) as process:
        try:
            wait_for_port(process, port)
            yield port
        finally:
            process.terminate()


@pytest.mark.parametrize("name", COMMANDS)
def test_proxy_with_keep_alive_under_restarts(tmp_path: Path, name: str) -> None:
    """Through a proxy that keeps its connections to the workers, no restart costs a request."""
    with http_server() as (served, app):
        with proxy(name, tmp_path, app) as port, clients_of(port, 8) as clients:
            wait_for_answers(clients, 10)
            for _ in range(5):
                served.send(signal.SIGHUP)
                served.line("restarted: ")
                wait_for_answers(clients, 20)
        text = served.drained()
    assert ", 0 failed, 0 abandoned, 0 rejected" in text
    assert [each.failures for each in clients] == [[]] * len(clients)
    assert all(each.answered >= 110 for each in clients)
