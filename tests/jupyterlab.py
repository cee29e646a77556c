"""Press the interrupt button of JupyterLab in a browser, while a cell waits for a file descriptor.

The cell must raise KeyboardInterrupt, and the next one must receive with the same connection. It
also shows a pool, and a table that changes. ``nox -s jupyterlab`` installs what it needs; the
browser is the ``chromium`` or ``google-chrome`` on the PATH. ``--picture FILE`` keeps what
the page looks like.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from playwright.sync_api import TimeoutError as BrowserTimeoutError, sync_playwright

if TYPE_CHECKING:
    from collections.abc import Generator

# How long a step may take, in seconds; JupyterLab starts slowly on a busy machine.
LIMIT = 120
INTERRUPT = "[data-command='notebook:interrupt-kernel']"
NOTEBOOK = "check.ipynb"
CONNECT = """
import os
from trio_unixconn import connection_pair
here, there = connection_pair()
here
"""
RECEIVE = """
await here.send_fd(0)
fd = await there.receive_fd()
print('received:', os.path.sameopenfile(fd, 0))
os.close(fd)
"""
OPEN_POOL = """
from trio_unixconn.pool import open_worker_pool
from trio_unixconn.jupyter import watch
pool = await nursery.enter_async_context(open_worker_pool('handlers:total', workers=2))
nursery.start_soon(watch, pool)
"""
WRITE = "%%writefile handlers.py\nasync def total(stream, job):\n    return b'%d' % sum(job.data)"
# Each cell, and what it must show.
CELLS = [
    ("%load_ext trio_unixconn\nprint('loaded')", "loaded"),
    (CONNECT, "UnixConnection"),
    ("print('waiting')\nawait there.receive_fd()", "waiting"),
    (RECEIVE, "received: True"),
    (WRITE, "Writing handlers.py"),
    (OPEN_POOL, "WorkerPool ready: 0 jobs handled"),
    ("print(await pool.call(data=b'abc'))\npool", "WorkerPool ready: 1 jobs handled"),
]
# The cell to interrupt.
WAITS = 2


@contextmanager
def jupyterlab() -> Generator[str, None, None]:
    """Start JupyterLab with a notebook of the cells; yield its URL."""
    with tempfile.TemporaryDirectory() as directory:
        root, runtime = Path(directory, "root"), Path(directory, "runtime")
        root.mkdir()
        new = nbformat.v4
        notebook = new.new_notebook(
            cells=[new.new_code_cell(code.strip()) for code, _ in CELLS],
            metadata={"kernelspec": {"display_name": "Python 3", "name": "python3"}},
        )
        nbformat.write(notebook, root / NOTEBOOK)
        environment = {
            "JUPYTER_CONFIG_DIR": str(Path(directory, "config")),
            "JUPYTER_DATA_DIR": str(Path(directory, "data")),
        }
        # The page keeps all cells, not only those in view.
        settings = Path(directory, "settings", "@jupyterlab", "notebook-extension")
        settings.mkdir(parents=True)
        (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
        environment["JUPYTERLAB_SETTINGS_DIR"] = str(Path(directory, "settings"))
        environment |= {"JUPYTER_RUNTIME_DIR": str(runtime), "HOME": directory}
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
        command += ["--LabApp.expose_app_in_browser=True"]
        command += ["--ServerApp.port=0", f"--ServerApp.root_dir={root}"]
        # Asks nothing, neither the user nor the network.
        command += ["--LabApp.news_url=None", "--LabApp.check_for_updates_class="]
        command[-1] += "jupyterlab.handlers.announcements.NeverCheckForUpdate"
        log = Path(directory, "log")
        with log.open("wb") as file:
            server = subprocess.Popen(
                command, env={**os.environ, **environment}, stdout=file, stderr=file
            )
        try:
            end = time.monotonic() + LIMIT
            while not (found := list(runtime.glob("jpserver-*.json"))):
                if server.poll() is not None or time.monotonic() > end:
                    sys.exit(f"JupyterLab did not start:\n{log.read_text()}")
                time.sleep(0.1)
            # The server renames the complete file to this name, so it can be read now.
            info = json.loads(found[0].read_text())
            yield f"{info['url']}lab/tree/{NOTEBOOK}?token={info['token']}"
        finally:
            server.terminate()
            server.wait(LIMIT)


def wait_for_text(page: Any, text: str, times: int = 1) -> None:
    """Wait until the outputs of cells contain a text so many times."""
    try:
        page.wait_for_function(
            "([text, times]) => [...document.querySelectorAll('.jp-OutputArea')]"
            ".map(area => area.innerText).join().split(text).length > times",
            arg=[text, times],
        )
    except BrowserTimeoutError as exc:
        shown = page.locator(".jp-Notebook").inner_text()
        raise SystemExit(f"expected {text!r} {times} times, got:\n{shown}") from exc


def check(page: Any) -> None:
    """Run the cells, one by one, and press the button while one of them waits."""
    for number, (_, text) in enumerate(CELLS):
        # After an error, a kernel that is not idle yet drops what it is asked to run.
        page.wait_for_function(
            "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status"
            " == 'idle'"
        )
        # Not by the keyboard: which part of the page has the focus depends on the time.
        page.evaluate("() => {jupyterapp.commands.execute('notebook:run-cell-and-select-next')}")
        wait_for_text(page, text)
        if number == WAITS:
            page.locator(INTERRUPT).first.click()
            # At the top and at the end of the traceback.
            wait_for_text(page, "KeyboardInterrupt", 2)
        sys.stdout.write(f"cell {number}: {text}\n")
        sys.stdout.flush()
    # The pool, and the table that changes.
    wait_for_text(page, CELLS[-1][1], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("chromium or google-chrome is not installed")
    with jupyterlab() as url, sync_playwright() as playwright:
        # Root cannot use the sandbox, and only a page of this machine is opened.
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1200, "height": 1400})
        page.set_default_timeout(1000 * LIMIT)
        page.goto(url)
        check(page)
        if arguments.picture is not None:
            page.screenshot(path=arguments.picture)
        chromium.close()
    sys.stdout.write(
        "the interrupt button has raised KeyboardInterrupt, and the connection works on\n"
    )


if __name__ == "__main__":
    main()
