"""The board: what a worker has finished outlives it."""

from __future__ import annotations

import os

import pytest

from trio_unixconn.pool._board import Board, new_board


@pytest.fixture
def without_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)


def check() -> None:
    fd = new_board(3)
    writes, reads = Board(fd), Board(fd)
    os.close(fd)
    assert reads.noted() == {0}
    for number in (7, 8, 9, 2**63):
        writes.note(number)
    assert reads.noted() == {8, 9, 2**63}
    writes.close()
    writes.close()
    assert reads.noted() == {8, 9, 2**63}
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
        new_board(3)
