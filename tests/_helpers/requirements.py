"""What a test needs of the machine, and how it is skipped without it."""

from __future__ import annotations

import os
import socket
import subprocess
from typing import NoReturn

import pytest


def skip_unless_ci(reason: str) -> NoReturn:
    """Skip a test that this machine cannot run; on CI as root, where it must run, fail."""
    if os.environ.get("CI") and os.geteuid() == 0:
        pytest.fail(f"on CI this must not be missing: {reason}")
    pytest.skip(reason)


def required(there: object, what: str) -> pytest.MarkDecorator:
    """Skip a test if something is missing; on CI the test runs anyway, and fails."""
    return pytest.mark.skipif(not there and "CI" not in os.environ, reason=what)


def kernel_has(option: int) -> bool:
    """Whether sockets of this kernel have the option."""
    one, two = socket.socketpair()
    with one, two:
        try:
            value = one.getsockopt(socket.SOL_SOCKET, option)
        except OSError:
            return False
    if option == SO_PEERPIDFD:
        os.close(value)
    return True


def can_unshare(*options: str) -> bool:
    """Whether unshare(1) works with these options."""
    try:
        done = subprocess.run(["unshare", *options, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


SO_PASSPIDFD = 76
SO_PEERPIDFD = 77
SO_PASSRIGHTS = 83
ROOT_OR_USER = [] if os.geteuid() == 0 else ["-Ur"]
peer_pidfds = required(kernel_has(SO_PEERPIDFD), "this kernel has no SO_PEERPIDFD (Linux 6.5)")
message_pidfds = required(kernel_has(SO_PASSPIDFD), "this kernel has no SO_PASSPIDFD (Linux 6.5)")
passrights = required(kernel_has(SO_PASSRIGHTS), "this kernel has no SO_PASSRIGHTS (Linux 6.16)")
user_namespaces = required(can_unshare("-Ur"), "no user namespaces can be made here")
pid_namespaces = required(
    can_unshare(*ROOT_OR_USER, "-pf", "--kill-child", "--mount-proc"),
    "no pid namespaces can be made here",
)
mount_namespaces = required(can_unshare("-m"), "no mount namespaces can be made here")


def unshared(*options: str, then: str = "") -> list[str]:
    """Return the command that starts another one in namespaces of its own.

    Args:
      then: the shell commands to run in them first.
    """
    command = ["unshare", *options]
    return [*command, "sh", "-c", f'{then}exec "$@"', "sh"] if then else command


def in_pid_namespace(*options: str) -> list[str]:
    """Return the command that starts another one as the first process of a pid namespace."""
    return unshared(*ROOT_OR_USER, "-pf", "--kill-child", *options)
