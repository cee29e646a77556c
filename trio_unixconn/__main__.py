"""The command line: ``trio-unixconn``, also as ``python -m trio_unixconn``.

The commands are in ``_cli``. Only they need typer and rich, the extra ``cli``.
"""

from __future__ import annotations

from typing import Annotated

from ._version import __version__

try:
    import typer

    from ._cli import passing, peer
    from ._cli._console import end_output, end_printing, replace_closed_streams, say
    from ._cli.demo.command import demo
    from ._cli.doctor.command import doctor
    from ._cli.serve.command import serve
    from ._cli.upgrade import upgrade
except ImportError as _exc:
    raise SystemExit(
        f"trio-unixconn: the command line needs the extra 'cli' ({_exc}); "
        "install it with: pip install 'trio_unixconn[cli]'"
    ) from _exc

app: typer.Typer = typer.Typer(
    name="trio-unixconn",
    help="Pass open files, sockets and proof of identity between processes.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it
    if wanted:
        say(f"trio-unixconn {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Pass open files, sockets and proof of identity between processes."""


app.command()(demo)
app.command()(doctor)
app.command()(peer.peer)
app.command()(passing.send_fd)
app.command()(passing.receive_fd)
app.command()(serve)
app.command()(upgrade)


def main() -> None:
    """Run the command line."""
    replace_closed_streams()
    try:
        app()
    except OSError as exc:
        end_printing(exc)
        raise
    finally:
        end_output()


if __name__ == "__main__":
    main()
