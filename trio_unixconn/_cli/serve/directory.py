"""``--chdir``: the directory of the workers, which a symbolic link may name.

Invariant: all workers run in the same directory, that of the last restart that has succeeded. A
release that cannot start changes nothing, and neither does a worker that is replaced later.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress


class WorkingDirectory:
    """The current directory of this process, and the first entry of its import path.

    Workers inherit both.

    Args:
      path: a directory, or a symbolic link to one; looked up again by each :meth:`enter`.
    """

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._entry: str | None = None

    def enter(self) -> str:
        """Change to the directory that the path names now, and return it.

        Raises:
          OSError: there is none.
        """
        resolved = os.path.realpath(self._path)
        try:
            os.chdir(resolved)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, self._path) from exc
        self._put_on_path(resolved)
        return resolved

    @contextmanager
    def entered(self) -> Generator[str, None, None]:
        """Enter the directory again, and go back if the block raises."""
        entry = self._entry
        assert entry is not None  # enter() comes first
        before = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                yield self.enter()
            except BaseException:
                os.fchdir(before)
                self._put_on_path(entry)
                raise
        finally:
            os.close(before)

    def _put_on_path(self, entry: str) -> None:
        if self._entry is not None:
            with suppress(ValueError):
                sys.path.remove(self._entry)
        self._entry = entry
        sys.path.insert(0, entry)


def put_current_directory_on_path() -> None:
    """Have modules in the current directory found, as ``python -m`` does."""
    try:
        here = os.getcwd()
    except FileNotFoundError:
        # It was deleted, so there is nothing to be found.
        return
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
