"""The board: what a worker has finished outlives it."""

from __future__ import annotations

import os

import pytest

from trio_unixconn.pool._completion_log import CompletionLog, create_log


@pytest.fixture
def without_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)


def check() -> None:
    fd = create_log(3)
    writes, reads = CompletionLog(fd), CompletionLog(fd)
    os.close(fd)
    assert reads.entries() == {0}
    for number in (7, 8, 9, 2**63):
        writes.add(number)
    assert reads.entries() == {8, 9, 2**63}
    writes.close()
    writes.close()
    assert reads.entries() == {8, 9, 2**63}
    reads.close()


def test_the_last_are_there() -> None:
    """Those that were noted last are read by another, also when who noted them is gone."""
    check()


@pytest.mark.usefixtures("without_memfd")
def test_without_memfds() -> None:
    """Where there are no memfds, a file without a name serves."""
    check()


@pytest.mark.usefixtures("without_memfd")
def test_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for a board, that is an OSError, and nothing is left open."""

    def full(_: int, __: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(OSError, match="No space"):
        create_log(3)
