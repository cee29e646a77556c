"""Run the core, the hostile peers and a pool's life on other kernels than that of this machine.

``python -m tests.guests.kernels [--quick] [--suites A,B] [--jobs N] [--write] [TEST ...]``

Each kernel is Debian's of one suite, in a guest that sees the root of this machine read-only. It
runs the Python and the tests of this checkout, as root, with 1,024 file descriptors, and nothing
is writable there but /tmp and /run. Without KVM a test takes ten times as long as outside.

``--quick`` runs a selection on the oldest and the newest kernel, as CI does. ``--write`` keeps what
``trio-unixconn doctor`` says on each kernel, for the documentation.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import attrs

from tests.guests.boot import Guest, Kernel, kernel_of
from tests.guests.doctor_table import DOCTOR, write_table
from trio_unixconn._cli.doctor.examination import examine

ROOT: Final = Path(__file__).parents[2]
# Oldest first.
SUITES: Final = ("bullseye", "bookworm", "trixie", "sid")
QUICK_SUITES: Final = (SUITES[0], SUITES[-1])
FALLBACKS: Final = "tests/guests/test_fallbacks.py"
TESTS: Final = (FALLBACKS, "tests/core", "tests/hostile", "tests/pool/test_lifecycle.py")
# What differs between kernels. A test takes about ten times as long as outside of a guest.
QUICK_TESTS: Final = (FALLBACKS,)
# Seconds for one guest.
TIMEOUT: Final = 3 * 3600.0
QUICK_TIMEOUT: Final = 600.0
# Of the hostile peers, which send 100,000 messages outside.
HOSTILE_MESSAGES: Final = 4000
# pytest prints where a test hangs, and ends: later than outside.
PYTEST: Final = ("-q", "--color=no", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=1800")

# The first process: mounts the machine's root, and what a program expects to be writable.
FIRST: Final = """
set -e
alias run=/bin/busybox
run mount -t proc proc /proc
run mount -t sysfs sysfs /sys
run mount -t devtmpfs devtmpfs /dev
load_modules
nine="trans=virtio,version=9p2000.L,msize=512000"
run mount -t 9p -o $nine,ro,cache=loose machine /host
keep=
for path in @KEPT@; do
    run mkdir -p /kept$path
    run mount --bind /host$path /kept$path
done
run mount -t tmpfs -o mode=1777 tmpfs /host/tmp
run mount -t tmpfs tmpfs /host/run
for path in @KEPT@; do
    # Only if it is in /tmp it is not there any more.
    run mkdir -p /host$path
    run mount --bind /kept$path /host$path
done
run mkdir /host/run/results
run mount -t 9p -o $nine results /host/run/results
run mkdir -p /dev/pts /dev/shm
run mount -t devpts devpts /dev/pts
run mount -t tmpfs tmpfs /dev/shm
run ln -s /proc/self/fd /dev/fd
run ln -s /proc/self/fd/0 /dev/stdin
run ln -s /proc/self/fd/1 /dev/stdout
run ln -s /proc/self/fd/2 /dev/stderr
for name in proc sys dev; do
    run mount --move /$name /host/$name
done
run ip link set lo up
set +e
run setsid /bin/busybox chroot /host /bin/sh /run/results/job.sh
run sync
echo o > /host/proc/sysrq-trigger
run sleep 10
"""

JOB: Final = """
cd @ROOT@ || exit
ulimit -n 1024
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
export PYTHONDONTWRITEBYTECODE=1 GUEST_KERNEL=1 HOSTILE_MESSAGES=@MESSAGES@
export HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis
@PYTHON@ -m trio_unixconn doctor --json >/run/results/doctor.json
@PYTHON@ -m pytest @ARGUMENTS@ --junit-xml=/run/results/junit.xml
echo $? >/run/results/status
"""


@attrs.frozen
class Result:
    """What a guest has found.

    Attributes:
      status: of pytest; None: it did not end.
      counts: of tests, by outcome.
      doctor: the report of ``trio-unixconn doctor``, if there is one.
    """

    release: str
    seconds: float
    status: int | None
    counts: dict[str, int]
    doctor: dict[str, Any] | None
    problem: str = ""

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        return f"Linux {self.release}: {counts or self.problem} in {self.seconds:.0f} s"


def counts_of(report: Path) -> dict[str, int]:
    """Return how many tests passed, failed and were skipped, as pytest has written it."""
    try:
        suite = ET.parse(report).getroot().find("testsuite")
    except (FileNotFoundError, ET.ParseError):
        return {}
    assert suite is not None
    numbers = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = numbers["failures"] + numbers["errors"]
    passed = numbers["tests"] - failed - numbers["skipped"]
    return {"passed": passed, "failed": failed, "skipped": numbers["skipped"]}


def script() -> str:
    """Return the script of the first process."""
    kept = {str(ROOT), sys.prefix}
    return FIRST.replace("@KEPT@", shlex.join(sorted(kept)))


def job(arguments: Sequence[str]) -> str:
    """Return the script that runs pytest."""
    words = {
        "@ROOT@": shlex.quote(str(ROOT)),
        "@PYTHON@": shlex.quote(sys.executable),
        "@ARGUMENTS@": shlex.join([*PYTEST, *arguments]),
        "@MESSAGES@": str(HOSTILE_MESSAGES),
    }
    text = JOB
    for word, value in words.items():
        text = text.replace(word, value)
    return text


def run_tests(kernel: Kernel, arguments: Sequence[str], timeout: float, results: Path) -> Result:
    """Run tests on a kernel, and print what they print."""
    (results / "job.sh").write_text(job(arguments))
    guest = Guest(kernel, script(), results, timeout)
    seconds, problem = timeout, "the guest has ended before pytest did"
    try:
        seconds = guest.boot()
    except TimeoutError as exc:
        problem = str(exc)
    try:
        status: int | None = int((results / "status").read_text())
    except (FileNotFoundError, ValueError):
        status = None
    try:
        doctor = json.loads((results / "doctor.json").read_text())
    except (FileNotFoundError, ValueError):
        doctor = None
    counts = counts_of(results / "junit.xml")
    return Result(kernel.release, seconds, status, counts, doctor, problem)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="what CI runs, in three minutes")
    parser.add_argument("--suites", help=f"of Debian, with commas; default: {','.join(SUITES)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="guests at a time")
    parser.add_argument("--timeout", type=float, help="seconds for one guest")
    parser.add_argument("--write", action="store_true", help=f"keep the doctor's reports: {DOCTOR}")
    parser.add_argument("tests", nargs="*", help="for pytest, instead of the usual ones")
    options = parser.parse_args(arguments)
    suites = options.suites.split(",") if options.suites else SUITES
    if options.quick and not options.suites:
        suites = QUICK_SUITES
    tests = options.tests or (QUICK_TESTS if options.quick else TESTS)
    timeout = options.timeout or (QUICK_TIMEOUT if options.quick else TIMEOUT)
    kernels = [kernel_of(suite) for suite in suites]

    def run(kernel: Kernel) -> Result:
        with TemporaryDirectory(prefix="trio-unixconn-guest-") as results:
            return run_tests(kernel, tests, timeout, Path(results))

    with ThreadPoolExecutor(options.jobs) as executor:
        found = list(executor.map(run, kernels))
    for each in found:
        print(each)
    if options.write:
        own = attrs.asdict(examine())
        write_table([own, *(each.doctor for each in found if each.doctor is not None)])
    return 0 if all(each.status == 0 for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
