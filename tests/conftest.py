"""What every test runs under: a guard that counts descriptors."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings


def open_descriptors() -> dict[int, str]:
    """Return the open descriptors of this process and what each is."""
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            # The descriptor of the listing itself.
            continue
    return found


@pytest.fixture(autouse=True)
def fd_leak_guard() -> Iterator[None]:
    """Open descriptors after the test are those from before it."""
    before = open_descriptors()
    yield
    if open_descriptors() != before:
        # What a reference circle still holds (a traceback, say) is not leaked.
        gc.collect()
    assert open_descriptors() == before


# Whether a machine is slow is nothing that a test should say.
settings.register_profile("here", deadline=None)
settings.load_profile("here")
