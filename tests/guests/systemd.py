"""Run tests with the real systemd, as the first process of a guest.

``python -m tests.guests.systemd [--suites A,B] [TEST ...]``; it needs root, and Debian's
debootstrap and qemu-system-x86.

The guest's root is a minimal Debian of that suite, in a directory of this machine; what is written
there is lost with the guest. systemd starts the tests as a service when the guest is up, and powers
it off when that has ended. systemd never runs on the machine itself.

Sources: systemd.service(5), systemd.exec(5) (``TTYPath=``), bootup(7)
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from tests.guests import initrd
from tests.guests.boot import Guest, kernel_of
from tests.guests.debian import root_directory
from tests.guests.kernels import counts_of
from tests.guests.wheels import python_version, requirements, site_packages

ROOT: Final = Path(__file__).parents[2]
# With systemd 257 and 262.
SUITES: Final = ("trixie", "sid")
PACKAGES: Final = ("dbus", "python3", "systemd", "systemd-sysv")
TESTS: Final = ("tests/guests/with_systemd.py",)
# Seconds for one guest.
TIMEOUT: Final = 1800.0

FIRST: Final = """
set -e
alias run=/bin/busybox
run mount -t proc proc /proc
run mount -t sysfs sysfs /sys
run mount -t devtmpfs devtmpfs /dev
load_modules
nine="trans=virtio,version=9p2000.L,msize=512000"
run mount -t 9p -o $nine,ro,cache=loose machine /host
run mkdir /changes /system
run mount -t tmpfs tmpfs /changes
run mkdir /changes/upper /changes/work
run mount -t overlay -o lowerdir=/host@ROOT@,upperdir=/changes/upper,workdir=/changes/work \
    overlay /system
cd /system
run mkdir -p srv/checkout srv/site srv/results etc/systemd/system/multi-user.target.wants
# Python can keep what it has compiled, which would take most of the time at each start.
writable() {
    run mkdir -p /changes/$2/upper /changes/$2/work
    run mount -t overlay -o lowerdir=/host$1,upperdir=/changes/$2/upper,workdir=/changes/$2/work \
        overlay srv/$2
}
writable @CHECKOUT@ checkout
writable @SITE@ site
run mount -t 9p -o $nine results srv/results
run cp srv/results/tests.service etc/systemd/system/tests.service
run ln -s ../tests.service etc/systemd/system/multi-user.target.wants/tests.service
for name in proc sys dev; do
    run mount --move /$name $name
done
exec /bin/busybox switch_root /system /usr/lib/systemd/systemd
"""
UNIT: Final = """
[Unit]
SuccessAction=poweroff-force
FailureAction=poweroff-force

[Service]
Type=oneshot
ExecStart=/bin/sh /srv/results/job.sh
WorkingDirectory=/srv/checkout
Environment=PYTHONPATH=/srv/site HOME=/root LANG=C.UTF-8
StandardInput=null
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
TimeoutStartSec=infinity
"""
# The tests need no plugins, and to import them takes half a minute.
JOB: Final = """
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
systemctl --version | head -n 1
python3 -m pytest -v --color=no -p no:cacheprovider -c /dev/null --rootdir=. --noconftest \
    -o faulthandler_timeout=600 --junit-xml=/srv/results/junit.xml @TESTS@
echo $? >/srv/results/status
sync
"""
# Nothing of it is needed, and each takes time.
PARAMETERS: Final = (
    "systemd.unit=multi-user.target systemd.show_status=0 systemd.mask=getty.target "
    "systemd.mask=serial-getty@ttyS0.service systemd.mask=systemd-timesyncd.service"
)


def run_tests(suite: str, tests: Sequence[str], timeout: float) -> bool:
    """Run tests in a guest with a suite's systemd and kernel; return whether they passed."""
    root = root_directory(suite, PACKAGES, "systemd")
    site = site_packages(python_version(root), requirements("tests"))
    words = {
        "@ROOT@": shlex.quote(str(root)),
        "@CHECKOUT@": shlex.quote(str(ROOT)),
        "@SITE@": shlex.quote(str(site)),
        "@TESTS@": shlex.join(tests),
    }
    first, job = FIRST, JOB
    for word, value in words.items():
        first, job = first.replace(word, value), job.replace(word, value)
    with TemporaryDirectory(prefix="trio-unixconn-guest-") as directory:
        results = Path(directory)
        (results / "job.sh").write_text(job)
        (results / "tests.service").write_text(UNIT)
        guest = Guest(
            kernel_of(suite),
            first,
            results,
            timeout,
            modules=(*initrd.SHARED_DIRECTORY, "overlay"),
            parameters=PARAMETERS,
            processors=2,
        )
        seconds = guest.boot()
        counts = counts_of(results / "junit.xml")
        status = results / "status"
        passed = status.exists() and int(status.read_text()) == 0
    found = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"systemd of Debian {suite}: {found or 'no result'} in {seconds:.0f} s", flush=True)
    return passed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suites", default=",".join(SUITES), help="of Debian, with commas")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for one guest")
    parser.add_argument("tests", nargs="*", default=TESTS, help="arguments of pytest")
    options = parser.parse_args(arguments)
    passed = [
        run_tests(suite, options.tests, options.timeout) for suite in options.suites.split(",")
    ]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
