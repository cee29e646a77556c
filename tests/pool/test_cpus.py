"""available_cpus: the affinity of this process, and the CPU quota of its cgroups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from trio_unixconn.pool import _cpus
from trio_unixconn.pool._cpus import available_cpus, cpu_quota

if TYPE_CHECKING:
    from collections.abc import Iterator

ASK = "from trio_unixconn.pool._cpus import cpu_quota; print(cpu_quota())"


def write(root: Path, files: dict[str, str]) -> str:
    """Write files of /proc and /sys, in which {root} is their directory; return that of /proc."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("{root}", str(root)))
    return str(root / "proc")


V2_MOUNT = "30 24 0:26 / {root}/cg rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "32 31 0:29 {outer} {root}/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"


@pytest.mark.parametrize(
    ("own", "parent", "expected"),
    [
        ("150000 100000", None, 1.5),
        ("max 100000", None, None),
        ("max 100000", "50000 100000", 0.5),
        ("300000 100000", "200000 100000", 2.0),
        ("100000 100000", "200000 100000", 1.0),
        ("nonsense", None, None),
        ("1 0", None, None),
        (None, None, None),
    ],
)
def test_cpu_quota_of_cgroup_v2(
    own: str | None, parent: str | None, expected: float | None, tmp_path: Path
) -> None:
    """The smallest quota of a cgroup and its parents counts; "max" is none."""
    files = {
        "proc/cgroup": "0::/outer/inner\n",
        "proc/mountinfo": "24 1 8:1 / / rw - ext4 /dev/sda rw\n" + V2_MOUNT,
    }
    if own is not None:
        files["cg/outer/inner/cpu.max"] = own + "\n"
    if parent is not None:
        files["cg/outer/cpu.max"] = parent + "\n"
    assert cpu_quota(write(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("quota", "outer", "expected"),
    [
        ("250000", "/", 2.5),
        ("-1", "/", None),
        # In a container, where what is mounted is its own cgroup.
        ("250000", "/docker/1", 2.5),
        # Another one is mounted.
        ("250000", "/docker/2", None),
    ],
)
def test_cpu_quota_of_cgroup_v1(
    quota: str, outer: str, expected: float | None, tmp_path: Path
) -> None:
    """The quota of the hierarchy with the cpu controller counts, at the place where it is."""
    below = "" if outer.startswith("/docker") else "docker/1/"
    proc = write(
        tmp_path,
        {
            "proc/cgroup": "3:cpuset:/other\n2:cpuacct,cpu:/docker/1\n0::/\n",
            "proc/mountinfo": V1_MOUNT.replace("{outer}", outer),
            f"cpu/{below}cpu.cfs_quota_us": quota,
            f"cpu/{below}cpu.cfs_period_us": "100000",
        },
    )
    assert cpu_quota(proc) == expected


def test_cpu_quota_without_proc(tmp_path: Path) -> None:
    """Where there is no /proc there is no quota."""
    assert cpu_quota(str(tmp_path)) is None


@pytest.fixture
def limited_cgroup() -> Iterator[Path]:
    """A cgroup that is limited to 1.5 CPUs."""
    for parent, name, limit in (
        ("/sys/fs/cgroup", "cpu.max", b"150000 100000"),
        ("/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", b"150000"),
    ):
        directory = Path(parent, f"trio_unixconn-{os.getpid()}")
        try:
            directory.mkdir()
        except OSError:
            continue
        try:
            # Only a cgroup has this file already.
            file = os.open(directory / name, os.O_WRONLY)
        except OSError:
            directory.rmdir()
            continue
        os.write(file, limit)
        os.close(file)
        yield directory
        directory.rmdir()
        return
    pytest.skip("needs the right to create a cgroup with the cpu controller")


def test_cpu_quota_of_real_cgroup(limited_cgroup: Path) -> None:
    """The quota of the cgroup that a process is really in is found."""
    join = f"echo $$ > {limited_cgroup}/cgroup.procs && exec {sys.executable} -c '{ASK}'"
    done = subprocess.run(["sh", "-c", join], capture_output=True, text=True, check=True)
    assert done.stdout == "1.5\n"


@pytest.mark.parametrize(
    ("quota", "expected"), [(None, 4), (0.1, 1), (1.0, 1), (1.5, 2), (4.0, 4), (64.0, 4)]
)
def test_available_cpus_rounds_quota_up(
    quota: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of a CPU in the quota counts as one, and the affinity is the upper bound."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(_cpus, "cpu_quota", lambda: quota)
    assert available_cpus() == expected


def test_available_cpus_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sched_getaffinity(2), all CPUs of the machine count; at least one."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cpus() == 1
