"""The command line: ``trio-unixconn``, also as ``python -m trio_unixconn``.

The commands are in ``_cli``. Only they need typer and rich, the extra ``cli``.
"""

from __future__ import annotations

try:
    import typer

    from ._cli import demo, doctor, passing, peer
    from ._cli.serve.command import serve
except ImportError as _exc:
    raise SystemExit(
        f"trio-unixconn: the command line needs the extra 'cli' ({_exc}); "
        "install it with: pip install 'trio_unixconn[cli]'"
    ) from _exc

app: typer.Typer = typer.Typer(
    name="trio-unixconn",
    help="Pass open files, sockets and proof of identity between processes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo.demo)
app.command()(doctor.doctor)
app.command()(peer.peer)
app.command()(passing.send_fd)
app.command()(passing.receive_fd)
app.command()(serve)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
