"""The limits in force.

Invariant: a limit that cannot be measured or read is None, with the reason.

Sources: getrlimit(2), unix(7), proc_sys_net_core(5), proc_sys_fs(5); of Linux,
Documentation/networking/ip-sysctl.rst (``max_dgram_qlen``)
"""

from __future__ import annotations

import os
from typing import Final

from ... import _ancillary, _kernel
from ..._paths import LONGEST
from .lab import Lab
from .report import Limit

SETTINGS: Final = {
    "net.core.somaxconn": "maximum of a listener's queue, whatever backlog it requests",
    "net.unix.max_dgram_qlen": "maximum of messages in the queue of a datagram socket",
    "net.core.wmem_default": "maximum of bytes in flight in one direction of a connection",
    "net.core.rmem_default": "size of a receive buffer; Unix sockets do not use it",
    "fs.nr_open": "the highest value of RLIMIT_NOFILE",
    "fs.file-max": "open files of the whole system",
}
# More than any kernel has taken.
_TOO_MANY: Final = 1024


def limits() -> list[Limit]:
    """Return every limit that this library runs into."""
    return [
        *_descriptors(),
        _most_in_a_message(),
        Limit("sun_path", LONGEST, "bytes of a path that fit into a socket's address"),
        *(_setting(name, meaning) for name, meaning in SETTINGS.items()),
    ]


def _descriptors() -> list[Limit]:
    names = ("RLIMIT_NOFILE, soft", "RLIMIT_NOFILE, hard", "descriptors free")
    try:
        import resource  # not on Windows
    except ImportError as exc:
        return [Limit(name, None, str(exc)) for name in names]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    meanings = (
        "descriptors of this process; to receive more is DescriptorsTruncatedError",
        "the highest value of the soft limit",
        "descriptors that are not in use",
    )
    values = (soft, hard, _kernel.free_descriptors())
    return [
        Limit(name, value, meaning)
        for name, value, meaning in zip(names, values, meanings, strict=True)
    ]


def _most_in_a_message() -> Limit:
    """Measure how many descriptors the kernel takes in one message."""
    taken, refused = 0, _TOO_MANY
    error: Exception | None = None
    with Lab() as lab:
        while refused - taken > 1:
            count = (taken + refused) // 2
            try:
                # Each to a socket of its own, which is closed with what waits there.
                with Lab() as attempt:
                    attempt.send(attempt.pair()[0], _ancillary.pack_rights([lab.file()] * count))
                taken = count
            except Exception as exc:  # whatever it is, it is reported
                error, refused = exc, count
    if not taken:
        return Limit("SCM_MAX_FD", None, str(error))
    return Limit("SCM_MAX_FD", taken, f"descriptors in one message; with {refused}: {error}")


def _setting(name: str, meaning: str) -> Limit:
    try:
        with open(f"/proc/sys/{name.replace('.', os.sep)}", encoding="ascii") as file:
            return Limit(name, int(file.read()), meaning)
    except (OSError, ValueError) as exc:
        return Limit(name, None, getattr(exc, "strerror", None) or str(exc))
