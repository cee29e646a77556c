"""Run the core and the tests with other programs in other versions of Debian.

``python -m tests.guests.distributions [--suites A,B] [TEST ...]``; it needs root, and Debian's
debootstrap.

Each is a directory on this machine, with this machine's kernel, entered with chroot(1) in a mount
and a pid namespace of its own. So the Python, GLib, HAProxy, nginx and the other programs are those
of that suite. No service manager runs there, and nothing of the machine's /run can be seen.

What only one of the two can show: that the library runs on a newer Python, and that peers of newer
versions still do what the tests say of them.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.guests.debian import ALONE, root_directory
from tests.guests.wheels import python_version, requirements, site_packages

ROOT: Final = Path(__file__).parents[2]
SUITES: Final = ("trixie", "sid")
TESTS: Final = tuple(
    f"tests/{each}" for each in ("core", "interop", "pool", "cli", "handover", "asgi")
)
# The peers of the tests; as .ci/run has them, without those that only measure.
PACKAGES: Final = (
    *("python3", "python3-gi", "gir1.2-glib-2.0"),
    *("curl", "socat", "dbus-daemon", "haproxy", "nginx-light", "qemu-system-x86", "tmux"),
    *("gpg-agent", "gcc", "libc6-dev", "bsdutils", "util-linux", "systemd", "procps", "openssl"),
    # Hosts of the tests are network namespaces.
    "iproute2",
)
# What was tested, in one line each.
VERSIONS: Final = """
python3 -c 'import platform; print("Python", platform.python_version())'
python3 -c 'from gi.repository import GLib as g
print("GLib", g.MAJOR_VERSION, g.MINOR_VERSION, g.MICRO_VERSION, sep=" ")'
haproxy -v | head -n 1
nginx -v
"""
INSIDE: Final = """
# ip-netns(8) mounts below /, which must be the root of a mount.
mount --bind @ROOT@ @ROOT@
root=@ROOT@ checkout=@CHECKOUT@ site=@SITE@
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/run"
mkdir -p "$root/dev/pts" "$root/dev/shm" "$root$checkout" "$root/srv/site"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
ln -sfn pts/ptmx "$root/dev/ptmx"
mount --bind "$site" "$root/srv/site"
mount --bind "$checkout" "$root$checkout"
mount -o remount,bind,ro "$root$checkout"
cd /
exec chroot "$root" sh -c "$1"
"""
JOB: Final = """
@VERSIONS@
cd @CHECKOUT@
# Not as process 1, which tests of process ids would notice.
python3 -m pytest @ARGUMENTS@
exit $?
"""


def run_tests(suite: str, tests: Sequence[str]) -> int:
    """Run tests in a suite, and return pytest's exit status."""
    root = root_directory(suite, PACKAGES)
    site = site_packages(python_version(root), requirements("tests", "asgi"))
    words = {
        "@ROOT@": shlex.quote(str(root)),
        "@CHECKOUT@": shlex.quote(str(ROOT)),
        "@SITE@": shlex.quote(str(site)),
        "@VERSIONS@": VERSIONS,
        "@ARGUMENTS@": shlex.join(["-q", "-p", "no:cacheprovider", *tests]),
    }
    outside, inside = INSIDE, JOB
    for word, value in words.items():
        outside, inside = outside.replace(word, value), inside.replace(word, value)
    env = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "TERM": os.environ.get("TERM", "dumb"),
        "PYTHONPATH": f"/srv/site:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        # The checkout is read-only there.
        "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
    }
    command = [*ALONE, "sh", "-ec", outside, "sh", inside]
    return subprocess.run(command, env=env, stdin=subprocess.DEVNULL, check=False).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suites", default=",".join(SUITES), help="of Debian, with commas")
    parser.add_argument("tests", nargs="*", default=TESTS, help="arguments of pytest")
    options = parser.parse_args(arguments)
    status = 0
    for suite in options.suites.split(","):
        print(f"Debian {suite}", flush=True)
        status = run_tests(suite, options.tests) or status
    return status


if __name__ == "__main__":
    sys.exit(main())
