"""Paths for sockets that fit into an address.

The rule of this file: a folder is fresh, private (mode 0o700), and so short that a name in it
fits with room to spare; who made it removes it.

Sources: unix(7) (``sun_path``), mkdtemp(3)
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

# The shortest sun_path there is: 104 bytes on macOS and the BSDs, with the final NUL. Linux
# has 108.
LONGEST: Final = 103
# For what a test may append: ".lock", a suffix of its own, a counter.
ROOM_TO_APPEND: Final = 40
NAME: Final = "socket"


def fits(folder: str | os.PathLike[str]) -> bool:
    """Whether a socket in this folder has a path that an address can hold, with room to spare."""
    return len(os.fsencode(os.path.join(folder, NAME))) + ROOM_TO_APPEND <= LONGEST


@contextmanager
def short_folder(parents: Iterable[str] | None = None) -> Generator[Path, None, None]:
    """Make a folder below the first of ``parents`` whose path is short enough.

    Raises:
      OSError: ENAMETOOLONG: none is.
    """
    tried = (tempfile.gettempdir(), "/tmp", "/var/tmp") if parents is None else tuple(parents)  # noqa: S108
    for parent in tried:
        # mkdtemp appends eight characters.
        if os.path.isdir(parent) and fits(os.path.join(parent, "u" + "x" * 8)):
            break
    else:
        raise OSError(
            errno.ENAMETOOLONG,
            f"no folder whose path leaves {ROOM_TO_APPEND} of {LONGEST} bytes for a socket; "
            "set TMPDIR to a shorter one",
            os.pathsep.join(tried),
        )
    folder = tempfile.mkdtemp(prefix="u", dir=parent)
    try:
        yield Path(folder)
    finally:
        # The test may have removed it.
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
