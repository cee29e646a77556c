"""The options of a pool have one set of names and defaults, wherever they are described."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import attrs

from trio_unixconn._cli.serve.command import serve
from trio_unixconn.pool import WorkerPoolOptions
from trio_unixconn.pool._config import PoolConfig

DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in attrs.fields(PoolConfig) if field.name != "handler"
}


def test_worker_pool_options_are_those_of_the_config() -> None:
    """The keyword arguments of open_worker_pool are the fields of PoolConfig, in their order."""
    assert list(WorkerPoolOptions.__annotations__) == list(DEFAULTS)


def test_serve_options_have_the_defaults_of_the_pool() -> None:
    """An option of the command line that is one of the pool has the same default."""
    parameters = inspect.signature(serve).parameters
    shared = {name: parameters[name].default for name in DEFAULTS if name in parameters}
    assert len(shared) > 10
    # An option that may be repeated is None if it was not given.
    assert shared == {name: None if DEFAULTS[name] == () else DEFAULTS[name] for name in shared}


def test_documentation_has_every_option_of_serve() -> None:
    """The reference of the command line has each option of ``trio-unixconn serve``."""
    page = Path(__file__).parents[2] / "docs" / "reference" / "command-line.md"
    text = page.read_text().partition("\n## serve")[2].partition("\n## ")[0]
    said = set(re.findall(r"--[a-z][a-z-]*", text))
    options = {f"--{name.replace('_', '-')}" for name in inspect.signature(serve).parameters}
    assert options - {"--handler"} <= said


def test_documentation_has_the_defaults_of_the_pool() -> None:
    """The tables of the how-to have every option, and the defaults that are numbers."""
    page = Path(__file__).parents[2] / "docs" / "how-to" / "use-a-worker-pool.md"
    text = page.read_text().partition("## Options")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", text, re.MULTILINE)
    said = {name: default for names, default in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(said) == set(DEFAULTS) - {"on_abandoned"}
    for name, default in said.items():
        number = re.match(r"\d+", default)
        if number:
            assert DEFAULTS[name] == int(number[0]), name
        elif isinstance(DEFAULTS[name], bool):
            assert str(DEFAULTS[name]) == default, name
        else:
            assert DEFAULTS[name] in {None, b"", ()}, name
