"""``trio-unixconn serve``: accept here, and have workers handle.

Invariant: invalid arguments are rejected before anything is opened or started.
"""

from __future__ import annotations

import enum
import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final

import typer

from .._console import address_of, fail, run

if TYPE_CHECKING:
    from ...pool import WorkerPoolOptions

_SUFFIXES: Final = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


class LogFormat(enum.Enum):
    """A form of ``--log-format``."""

    TEXT = "text"
    JSON = "json"


class Notify(enum.Enum):
    """A value of ``--notify``."""

    AUTO = "auto"
    OFF = "off"


class ProxyChoice(enum.Enum):
    """A version of ``--proxy-protocol``."""

    V1 = "v1"
    V2 = "v2"
    ANY = "any"


class AcceptChoice(enum.Enum):
    """A value of ``--accept``."""

    PARENT = "parent"
    WORKERS = "workers"


class LogLevel(enum.Enum):
    """A level of ``--log-level``."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def serve(
    handler: Annotated[
        str,
        typer.Argument(
            metavar="PACKAGE.MODULE:HANDLER",
            help="An async function of a stream and a job; with --asgi an ASGI application.",
        ),
    ],
    *,
    asgi: Annotated[
        bool,
        typer.Option(
            "--asgi",
            help="Serve an ASGI application with HTTP and WebSockets; requires hypercorn.",
        ),
    ] = False,
    certfile: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="With --asgi: speak TLS, with this certificate and chain (PEM)."
        ),
    ] = None,
    keyfile: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="The certificate's key; default: in --certfile."),
    ] = None,
    root_path: Annotated[
        str,
        typer.Option(
            metavar="PREFIX", help="With --asgi: the part of paths that a proxy has removed."
        ),
    ] = "",
    keep_alive_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="With --asgi: close a connection so long after its last request (default: 5).",
        ),
    ] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="With --asgi: print a line for each request.")
    ] = False,
    bind: Annotated[
        list[str],
        typer.Option(
            "--bind",
            "-b",
            metavar="WHERE",
            help="tcp:HOST:PORT, unix:PATH, unix:@NAME, fd:N, or systemd[:NAME] for the sockets "
            "that it has passed; repeatable.",
        ),
    ],
    mode: Annotated[
        str | None,
        typer.Option(
            metavar="OCTAL",
            help="The permission bits of the paths; default: 600, with --group 660, with "
            "--allow-user or --allow-group 666.",
        ),
    ] = None,
    owner: Annotated[
        str | None, typer.Option(metavar="USER", help="The owner of the paths, a name or number.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(metavar="GROUP", help="The group of the paths, a name or number.")
    ] = None,
    allow_user: Annotated[
        list[str] | None,
        typer.Option(
            metavar="USER", help="Deny other users the Unix sockets; a name or number; repeatable."
        ),
    ] = None,
    allow_group: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GROUP",
            help="Admit members of this group to the Unix sockets, as --allow-user; repeatable.",
        ),
    ] = None,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Take the paths from a server that is alive, when the workers are ready.",
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option("--workers", "-w", help="How many; default: one for each processor."),
    ] = None,
    accept: Annotated[
        AcceptChoice,
        typer.Option(
            help="Which process accepts: this one, for the least busy worker, or each worker that "
            "has time, which takes less with few connections at a time."
        ),
    ] = AcceptChoice.PARENT,
    chdir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Run the workers there; a symbolic link is looked up again by each restart.",
        ),
    ] = None,
    setup: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:NAME",
            help="An async context manager in which each worker lives.",
        ),
    ] = None,
    max_in_flight: Annotated[
        int, typer.Option(help="How many connections each worker handles at a time.")
    ] = 1000,
    max_queue: Annotated[
        int, typer.Option(help="How many accepted connections may wait for a worker.")
    ] = 1000,
    max_attempts: Annotated[
        int, typer.Option(help="How many workers may fail to take a connection.")
    ] = 3,
    max_jobs: Annotated[
        int | None,
        typer.Option(
            help="Replace a worker after so many connections, varied by 10 % (default: never)."
        ),
    ] = None,
    max_age: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Replace a worker that is so old, varied likewise (default: never).",
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Replace a worker whose resident memory is larger, varied likewise; with a suffix "
            "K, M or G for powers of 1024 (default: never).",
        ),
    ] = None,
    start_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="A worker is to be ready by then.")
    ] = 60,
    handler_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Cancel a handler that takes longer; its connection is closed (default: never).",
        ),
    ] = None,
    hang_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="A worker that says nothing for so long is killed; inf."
        ),
    ] = 10,
    drain_timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Handlers are cancelled so long after a drain began."),
    ] = 30,
    crash_limit: Annotated[
        int,
        typer.Option(help="End after so many consecutive workers crashed without a job."),
    ] = 5,
    max_draining: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="A restart waits while so many old workers would be draining; default: twice as "
            "many as there are workers.",
        ),
    ] = None,
    executable: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="The Python interpreter of the workers; default: that of this command.",
        ),
    ] = None,
    nice: Annotated[
        int,
        typer.Option(
            metavar="N", help="Add this to the nice value of the workers; negative only for root."
        ),
    ] = 0,
    kill_process_group: Annotated[
        bool,
        typer.Option(
            "--kill-process-group",
            help="When a worker has ended, kill the processes that its handlers have started.",
        ),
    ] = False,
    preload: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE",
            help="Fork the workers from a process that has imported trio and this module; "
            "repeatable.",
        ),
    ] = None,
    proxy_protocol: Annotated[
        ProxyChoice | None,
        typer.Option(
            help="Connections begin with a PROXY protocol header of this version, from a balancer."
        ),
    ] = None,
    proxy_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NETWORK",
            help="The hosts that may send such headers, for example 10.1.0.0/16; repeatable.",
        ),
    ] = None,
    drain_delay: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="Say not ready for so long, and still accept, before a drain begins.",
        ),
    ] = 0,
    stats: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHERE",
            help="Answer with statistics there, JSON, Prometheus, /ready and /live; WHERE is as of "
            "--bind; repeatable.",
        ),
    ] = None,
    stats_socket: Annotated[
        str | None, typer.Option(metavar="PATH", help="The same at a path: --stats unix:PATH.")
    ] = None,
    agent_check: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHERE",
            help="Answer agent checks of HAProxy there; WHERE is as of --bind; repeatable.",
        ),
    ] = None,
    upgrade_socket: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Be replaced without a lost connection by SIGUSR2 or trio-unixconn upgrade PATH.",
        ),
    ] = None,
    take_over: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="As --upgrade-socket, and replace the server that has this path, if there is one.",
        ),
    ] = None,
    upgrade_timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="A successor must serve by then."),
    ] = 60,
    probation: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="Serve again if a successor ends so soon after it has begun to serve.",
        ),
    ] = 0,
    reload: Annotated[
        bool, typer.Option("--reload", help="Restart the workers when Python files change.")
    ] = False,
    reload_include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB", help="Watch files of these names, too; repeatable (default: *.py)."
        ),
    ] = None,
    reload_exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Do not watch these files or directories; repeatable."),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Lines instead of a table, even on a terminal.")
    ] = False,
    pid_file: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Keep the process id in this file while serving."),
    ] = None,
    notify: Annotated[
        Notify,
        typer.Option(
            help="Tell systemd what happens, and send the heartbeats of its watchdog, if it has "
            "started this command (NOTIFY_SOCKET)."
        ),
    ] = Notify.AUTO,
    log_file: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Append the log to this file, which SIGUSR1 opens again (default: standard "
            "output).",
        ),
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option(help="Lines of text, or a JSON object in each line.")
    ] = LogFormat.TEXT,
    log_level: Annotated[
        LogLevel, typer.Option(help="Log nothing that is less important.")
    ] = LogLevel.INFO,
) -> None:
    """Accept connections, and have worker processes handle them.

    SIGHUP replaces the workers with new ones, which import the handler again.
    The old ones exit when all new ones are ready. SIGUSR2 replaces the whole
    server, with --upgrade-socket. SIGTERM and SIGINT drain: what was accepted
    is finished. A second one ends at once. Exit status 0 after a drain.
    """
    # --help needs none of it.
    from ...pool._worker_config import LINES_VARIABLE
    from .asgi import read_handler
    from .binds import (
        UnixBind,
        check_different,
        check_proxy_options,
        read_bind,
        read_unix_options,
    )
    from .directory import WorkingDirectory, put_current_directory_on_path
    from .output import open_missing_streams, print_error
    from .service import (
        ServeConfig,
        catch_signals,
        ignore_signals,
        is_terminal,
        serve_until_told,
    )
    from .upgrades import read_upgrade_options

    open_missing_streams()
    catch_signals()
    options: WorkerPoolOptions = {
        "workers": workers,
        "setup": setup,
        "max_in_flight": max_in_flight,
        "max_queue": max_queue,
        "max_attempts": max_attempts,
        "max_jobs": max_jobs,
        "max_age": max_age,
        "max_memory": None if max_memory is None else _size(max_memory),
        "start_timeout": start_timeout,
        "handler_timeout": handler_timeout,
        "hang_timeout": hang_timeout,
        "drain_timeout": drain_timeout,
        "crash_limit": crash_limit,
        "executable": executable,
        "nice": nice,
        "kill_process_group": kill_process_group,
        "preload": preload or (),
        # A handler's print is forwarded when it is made, and not lost if the worker is killed.
        "environment": {LINES_VARIABLE: "1"},
        "proxy_protocol": None if proxy_protocol is None else proxy_protocol.value,
        "proxy_from": None if proxy_protocol is None else proxy_from or [],
    }
    worker_handler, options, pool = read_handler(
        handler,
        options,
        asgi=asgi,
        certfile=certfile,
        keyfile=keyfile,
        root_path=root_path,
        keep_alive_timeout=keep_alive_timeout,
        access_log=access_log,
    )
    for name, patterns in (
        ("--reload-include", reload_include),
        ("--reload-exclude", reload_exclude),
    ):
        if patterns and not reload:
            fail(f"{name} can only be used with --reload", status=2)
    if not drain_delay >= 0:
        fail(f"--drain-delay must be non-negative, got {drain_delay}", status=2)
    upgrades = read_upgrade_options(
        upgrade_socket,
        take_over,
        timeout=upgrade_timeout,
        probation=probation,
        replace=replace,
        accept=accept.value,
    )
    # What systemd has passed to the server before was not passed to this process.
    read = partial(read_bind, may_inherit=upgrades is not None and upgrades.may_inherit)
    binds = [read(each) for each in bind]
    stats_binds = [
        *(read(each, "--stats") for each in stats or []),
        *([] if stats_socket is None else [UnixBind(address_of(stats_socket))]),
    ]
    agent_binds = [read(each, "--agent-check") for each in agent_check or []]
    check_different(bind=binds, stats=stats_binds, agent_check=agent_binds)
    check_proxy_options(binds, proxy_protocol, proxy_from)
    unix_options = read_unix_options(
        binds,
        mode=mode,
        owner=owner,
        group=group,
        replace=replace,
        allow_user=allow_user or [],
        allow_group=allow_group or [],
        # HTTP has no place for file descriptors.
        receive_descriptors=not asgi,
    )
    directory = None
    if chdir is not None:
        # Relative paths are those of the directory that the command was started in.
        binds = [each.made_absolute() for each in binds]
        stats_binds = [each.made_absolute() for each in stats_binds]
        agent_binds = [each.made_absolute() for each in agent_binds]
        directory = WorkingDirectory(_absolute(chdir))
    log_file = None if log_file is None else _absolute(log_file)
    pid_file = None if pid_file is None else _absolute(pid_file)
    if directory is None:
        put_current_directory_on_path()
    else:
        try:
            directory.enter()
        except OSError as exc:
            fail(f"--chdir {chdir}: {exc.strerror}")
    if reload:
        # Python takes a compiled file for current if its source has the same size and second.
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    config = ServeConfig(
        handler=handler,
        worker_handler=worker_handler,
        binds=binds,
        unix_options=unix_options,
        options=options,
        accept=accept.value,
        stats=stats_binds,
        agent_check=agent_binds,
        drain_delay=drain_delay,
        directory=directory,
        upgrades=upgrades,
        reload=reload,
        reload_include=reload_include or [],
        reload_exclude=reload_exclude or [],
        table=is_terminal() and not plain,
        max_draining=2 * pool.workers if max_draining is None else max_draining,
        pid_file=pid_file,
        notify=notify is Notify.AUTO,
        log_file=log_file,
        log_format=log_format.value,
        log_level=getattr(logging, log_level.name),
    )
    try:
        run(partial(serve_until_told, config), heeds_signals=True, write_error=print_error)
    finally:
        ignore_signals()


def _absolute(path: str) -> str:
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        return fail(f"{path}: the current directory was deleted; use an absolute path")


def _size(text: str) -> int:
    """Return a number of bytes; as in systemd's MemoryMax=, a suffix stands for a power of 1024."""
    number, suffix = text[:-1], text[-1:].upper()
    if suffix not in _SUFFIXES:
        number, suffix = text, ""
    if not (number.isascii() and number.isdigit()):
        fail(f"--max-memory: expected bytes, such as 500000000 or 500M, got {text}", status=2)
    return int(number) * _SUFFIXES[suffix]
