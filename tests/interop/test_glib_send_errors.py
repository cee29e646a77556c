"""SendError.code against g_io_error_from_errno() of the real GLib."""

from __future__ import annotations

import errno
import json
import subprocess

import pytest

from tests._helpers.glib import SYSTEM_PYTHON
from trio_unixconn import SendError

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.usefixtures("real_glib")]

SCRIPT = """
import json, sys
from gi.repository import Gio
print(json.dumps([int(Gio.io_error_from_errno(number)) for number in json.load(sys.stdin)]))
"""

# Those of sendmsg(2) and dup(2) for a connected Unix socket. EPIPE and the like are other errors.
NUMBERS = [
    errno.EACCES,
    errno.EBADF,
    errno.EINVAL,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.EPERM,
    errno.ESRCH,
    errno.ETOOMANYREFS,
]


def test_send_error_code() -> None:
    """The code of a SendError is the one that GLib gives to its errno."""
    done = subprocess.run(
        [SYSTEM_PYTHON, "-c", SCRIPT],
        input=json.dumps(NUMBERS),
        text=True,
        capture_output=True,
        check=True,
    )
    ours = [int(SendError(number, "text").code) for number in NUMBERS]
    assert ours == json.loads(done.stdout)
