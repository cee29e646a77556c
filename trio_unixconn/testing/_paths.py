"""Paths for sockets that fit into an address.

Invariant: a directory is new, private (mode 0o700), and short enough for a longer name in it.

Sources: unix(7) (``sun_path``), mkdtemp(3)
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

# The shortest sun_path there is: 104 bytes on macOS and the BSDs, with the final NUL. Linux
# has 108.
LONGEST: Final = 103
# How many bytes a test may append: ".lock", a suffix of its own, a counter.
APPENDABLE: Final = 40
NAME: Final = "socket"


def fits(directory: str | os.PathLike[str]) -> bool:
    """Whether an address can hold the path of a socket in this directory, and a longer one."""
    return len(os.fsencode(os.path.join(directory, NAME))) + APPENDABLE <= LONGEST


@contextmanager
def short_directory(parents: Iterable[str] | None = None) -> Generator[Path, None, None]:
    """Make a directory in the first of ``parents`` whose path is short enough.

    Raises:
      OSError: ENAMETOOLONG: all paths are too long.
    """
    tried = (tempfile.gettempdir(), "/tmp", "/var/tmp") if parents is None else tuple(parents)  # noqa: S108
    for parent in tried:
        # mkdtemp appends eight characters.
        if os.path.isdir(parent) and fits(os.path.join(parent, "u" + "x" * 8)):
            break
    else:
        raise OSError(
            errno.ENAMETOOLONG,
            f"found no directory whose path leaves {APPENDABLE} of {LONGEST} bytes for a socket; "
            "set TMPDIR to a shorter one",
            os.pathsep.join(tried),
        )
    directory = tempfile.mkdtemp(prefix="u", dir=parent)
    try:
        yield Path(directory)
    finally:
        # The test may have removed it.
        with suppress(FileNotFoundError):
            shutil.rmtree(directory)
