"""Other users, which only root can become."""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests._helpers.requirements import required

if TYPE_CHECKING:
    from collections.abc import Generator

NOBODY = 65534
# No user has this id, on any system.
OTHER_UID = 12345


@contextmanager
def as_nobody(directory: Path) -> Generator[None, None, None]:
    """Run the block as another user, with search permission on the path to ``directory``."""
    if os.geteuid() != 0:
        if os.environ.get("CI"):
            pytest.fail("on CI the tests must run as root, to become another user")
        pytest.skip("only root can become another user")
    changed = []
    for each in (directory, *directory.parents):
        mode = stat.S_IMODE(each.stat().st_mode)
        if not mode & 0o001:
            each.chmod(mode | 0o001)
            changed.append((each, mode))
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
        for each, mode in reversed(changed):
            each.chmod(mode)


as_root = required(os.geteuid() == 0, "only root can become another user")
