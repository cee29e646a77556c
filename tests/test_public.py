"""The public names."""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil
import re
import traceback
from types import FunctionType, GenericAlias

import pytest

import trio_unixconn
from tests._helpers.processes import ROOT
from trio_unixconn import errors


def public_modules() -> list[str]:
    """Return the modules without an underscore that say what they export."""
    names = [
        each.name
        for each in pkgutil.walk_packages(trio_unixconn.__path__, "trio_unixconn.")
        if "._" not in each.name and not each.name.endswith(".__main__")
    ]
    found = ["trio_unixconn", *names]
    return [each for each in found if hasattr(importlib.import_module(each), "__all__")]


def public_objects() -> list[tuple[str, str]]:
    """Return the name of every public class and function, with the module that exports it."""
    return [
        (module, name)
        for module in public_modules()
        for name in importlib.import_module(module).__all__
        if is_class(value := getattr(importlib.import_module(module), name))
        or isinstance(value, FunctionType)
    ]


def is_class(value: object) -> bool:
    """Whether this is a class. Python 3.10 takes an alias such as list[int] for one, too."""
    return isinstance(value, type) and not isinstance(value, GenericAlias)


def test_all_is_what_there_is() -> None:
    """__all__ names exactly the public names of the package, without what IPython calls."""
    public = {
        name
        for name, value in vars(trio_unixconn).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    public -= {"load_ipython_extension", "unload_ipython_extension"}
    assert set(trio_unixconn.__all__) == public | {"__version__"}


def test_every_error_is_at_the_root() -> None:
    """Every exception of the errors module can be imported from the package."""
    assert set(errors.__all__) <= set(trio_unixconn.__all__)


def test_every_public_class_and_function_is_in_the_reference() -> None:
    """A page of the reference has each of them, by its name or with its module."""
    pages = "".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    listed = set(re.findall(r"^\.\. auto\w+:: (?:\w+\.)*(\w+)(?:\(|$)", pages, re.MULTILINE))
    listed |= set(re.findall(r"`(?:\w+\.)*(\w+)`", pages))
    assert [each for each in public_objects() if each[1] not in listed] == []


def test_everything_public_is_described() -> None:
    """Every public class, function and method has a docstring."""
    missing: list[str] = []
    for name in trio_unixconn.__all__:
        value = getattr(trio_unixconn, name)
        if not (is_class(value) or inspect.isfunction(value)):
            continue
        members = [(name, value)]
        if is_class(value):
            members += [
                (f"{name}.{key}", member)
                for key, member in vars(value).items()
                if inspect.isfunction(member) and not key.startswith("_")
            ]
        missing += [key for key, member in members if not inspect.getdoc(member)]
    assert missing == []


def test_public_modules_are_found() -> None:
    """The tests below see the package, its errors, the pool and the tools for tests."""
    expected = {
        "trio_unixconn",
        *(f"trio_unixconn.{name}" for name in ("errors", "pool", "testing")),
    }
    assert expected <= set(public_modules())


@pytest.mark.parametrize(("module", "name"), public_objects())
def test_public_name_says_where_it_is_imported_from(module: str, name: str) -> None:
    """A public class or function names a module that exports it; so does its pickle."""
    value = getattr(importlib.import_module(module), name)
    assert value.__module__ in public_modules()
    exporter = importlib.import_module(value.__module__)
    assert name in exporter.__all__
    assert getattr(exporter, value.__qualname__) is value
    assert pickle.loads(pickle.dumps(value)) is value


def test_repr_and_traceback_say_the_public_name() -> None:
    """The repr of a class, and a traceback, have the name that a program imports."""
    assert repr(trio_unixconn.UnixConnection) == "<class 'trio_unixconn.UnixConnection'>"
    error = trio_unixconn.EndOfStreamError("end of stream")
    assert traceback.format_exception_only(error) == [
        "trio_unixconn.EndOfStreamError: end of stream\n"
    ]
