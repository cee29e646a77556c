"""Import strings of handlers and setups: what is rejected before, or when, a worker starts."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests._helpers.pool_handlers import an_object
from trio_unixconn import WorkerStartError
from trio_unixconn.pool import open_worker_pool
from trio_unixconn.pool._import_string import import_handler, import_setup

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

HERE = "tests.pool.test_import_string"


@pytest.mark.parametrize(
    ("reference", "error", "text"),
    [
        ("__main__:handler", ValueError, r'"program:handler" for program\.py'),
        ("no_colon", ValueError, "must have the form"),
        ("a.:b", ValueError, "must have the form"),
        ("a:", ValueError, "must have the form"),
        ("a:b-c", ValueError, "must have the form"),
        (print, TypeError, "got builtin_function_or_method; each worker is a new interpreter"),
    ],
)
@pytest.mark.parametrize("option", ["handler", "setup"])
async def test_open_worker_pool_rejects_import_string(
    option: str, reference: Any, error: type[Exception], text: str
) -> None:
    """An import string of another form is rejected, before any worker is started."""
    options: dict[str, Any] = {"handler": "tests._helpers.pool_handlers:do", option: reference}
    with pytest.raises(error, match=text) as caught:
        async with open_worker_pool(**options, workers=1):
            pass
    assert str(caught.value).startswith(option)


class Setups:
    """Setups of all kinds."""

    @staticmethod
    @asynccontextmanager
    async def without() -> AsyncGenerator[int, None]:
        yield 1

    @staticmethod
    @asynccontextmanager
    async def with_default(worker: int = 2) -> AsyncGenerator[int, None]:
        yield worker

    @staticmethod
    @asynccontextmanager
    async def with_worker(worker: Any, *_: Any, name: str = "") -> AsyncGenerator[Any, None]:
        yield worker, name

    @staticmethod
    @asynccontextmanager
    async def positional(worker: Any, /) -> AsyncGenerator[Any, None]:
        yield worker

    @staticmethod
    def two(worker: Any, more: Any) -> None: ...

    @staticmethod
    def keyword(*, worker: Any) -> None: ...

    bound = partial(two, "one")
    none = 5
    # It has no signature.
    in_c = dict


@pytest.mark.parametrize(
    ("name", "takes_info"),
    [
        ("without", False),
        ("with_default", False),
        ("with_worker", True),
        ("positional", True),
        ("in_c", False),
    ],
)
def test_import_setup_that_takes_info(name: str, *, takes_info: bool) -> None:
    """A setup gets a WorkerInfo if it requires one positional argument."""
    assert import_setup(f"{HERE}:Setups.{name}")[1] == takes_info


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("two", "one that requires worker, more"),
        ("keyword", "one that requires worker"),
        ("none", "int"),
    ],
)
def test_import_setup_rejects(name: str, text: str) -> None:
    """An object that cannot be called with at most one argument is not a setup."""
    with pytest.raises(TypeError, match=rf"takes no argument or a WorkerInfo, got {text}$"):
        import_setup(f"{HERE}:Setups.{name}")


def test_import_handler_of_each_kind() -> None:
    """An async function, an object with an async __call__, a method, and a partial of them."""
    assert import_handler("tests._helpers.pool_handlers:an_object") is not None
    assert (
        import_handler("tests._helpers.pool_handlers:an_object.method").__func__
        is type(an_object).method
    )
    assert import_handler("tests._helpers.pool_handlers:a_partial") is not None
    with pytest.raises(TypeError, match=r"must be an async function .*got function"):
        import_handler("tests._helpers.pool_handlers:not_async")


@pytest.mark.parametrize("fault", ["SystemExit(3)", "KeyboardInterrupt()", "GeneratorExit()"])
async def test_open_worker_pool_with_module_that_raises(
    fault: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, no_child_left: None
) -> None:
    """Whatever the handler's module, or the setup, raises, the pool gets its traceback."""
    (tmp_path / "raising_module.py").write_text(f"raise {fault}\n")
    (tmp_path / "raising_setup.py").write_text(f"def setup():\n    raise {fault}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for options in (
        {"handler": "raising_module:handler"},
        {"handler": "tests._helpers.pool_handlers:do", "setup": "raising_setup:setup"},
    ):
        with trio.fail_after(60), pytest.raises(WorkerStartError) as caught:
            async with open_worker_pool(**options, workers=1):  # type: ignore[arg-type]
                pass
        assert f"raise {fault}" in caught.value.traceback
