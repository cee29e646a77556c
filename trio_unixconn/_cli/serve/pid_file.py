"""``--pid-file``: the process id of a server, for scripts.

Invariant: a file is complete when it appears, it is removed by the process that wrote it, and it
is held with a lock as long as that process lives. So a file without a lock is stale, whichever
number it has.

Sources: flock(2), rename(2), link(2)
"""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

# A file that is longer is not one of a process id.
MAX_SIZE: Final = 32


class PidFile:
    """A file with the process id.

    Attributes:
      is_owned: whether to remove it at the end of the block; False: another process replaces it.
    """

    def __init__(self) -> None:
        self.is_owned: bool = True


@contextmanager
def pid_file(path: str | None, *, replace: bool = False) -> Generator[PidFile, None, None]:
    """Have a file with the process id in this block.

    Args:
      path: None for no file.
      replace: whether to take the path from a process that holds a file there.

    Raises:
      OSError: another process holds it; it is a file of another kind; or it cannot be written.
    """
    found = PidFile()
    if path is None:
        yield found
        return
    path = os.path.abspath(path)
    with ExitStack() as stack:
        fd = _write(path, stack, replace=replace)
        try:
            yield found
        finally:
            # Another program may have put another file there.
            with suppress(OSError):
                same = os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
                if found.is_owned and same:
                    os.unlink(path)


def _write(path: str, stack: ExitStack, *, replace: bool) -> int:
    temporary = f"{path}.{os.getpid()}.new"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    except FileExistsError:
        # Of a process with this pid, which is gone.
        os.unlink(temporary)
        return _write(path, stack, replace=replace)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, path) from exc
    stack.callback(os.close, fd)
    try:
        os.write(fd, b"%d\n" % os.getpid())
        _lock(fd, path)
        while True:
            with suppress(FileExistsError):
                os.link(temporary, path)
                return fd
            if _rename_over(temporary, path, even_if_held=replace):
                return fd
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, path) from exc
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _rename_over(temporary: str, path: str, *, even_if_held: bool) -> bool:
    """Rename over a file of another process; False if it has gone, or is another one."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        content = os.read(fd, MAX_SIZE + 1)
        if not even_if_held:
            _lock(fd, path, content)
        if content and not content.strip().isdigit():
            raise OSError(errno.EEXIST, "expected a file with a process id, got another file", path)
        if not os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd)):
            return False
        os.rename(temporary, path)
    except FileNotFoundError:
        return False
    finally:
        os.close(fd)
    return True


def _lock(fd: int, path: str, content: bytes = b"") -> None:
    import fcntl  # not on Windows

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = content.decode(errors="replace").strip()
        raise OSError(errno.EEXIST, f"another server holds it (pid {holder})", path) from None
