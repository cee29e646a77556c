"""Packages of Debian's suites, downloaded and unpacked beside those of this machine.

apt is told to keep its lists and packages in a directory of ours, so that the machine's own stay
as they are. It checks signatures as usual, with the keys of the package debian-archive-keyring.

Sources: apt.conf(5), sources.list(5), apt-get(8), dpkg-deb(1), debootstrap(8)
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DEFAULT_MIRROR: Final = "http://deb.debian.org/debian/"
# Seconds for one command. A slow mirror is not a failure.
TIMEOUT: Final = 1200
# Lists older than this are fetched again, in seconds.
MAX_AGE: Final = 12 * 3600
# A mount and a pid namespace: when the program ends, so do its mounts and all that it has started.
ALONE: Final = ("unshare", "--mount", "--pid", "--fork", "--kill-child")


def cache_directory() -> Path:
    """Return the directory for what is downloaded, which is some gigabytes if all of it runs.

    That is ``GUESTS_CACHE``, or one in /var/tmp. It is not in the checkout, so that several of
    them share it.

    Raises:
      PermissionError: another user owns it.
    """
    default = f"/var/tmp/trio-unixconn-guests-{os.getuid()}"
    path = Path(os.environ.get("GUESTS_CACHE", default))
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{path}: expected a directory of user {os.getuid()}")
    return path


def run(*command: str | Path, **options: object) -> str:
    """Run a program, and return its output; an error contains what it printed.

    Raises:
      RuntimeError: it failed.
    """
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=TIMEOUT,
        **options,  # type: ignore[call-overload]
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout}")
    return str(done.stdout)


def mirror() -> str:
    """Return the mirror that the machine's own sources name; it has the other suites, too."""
    listing = run("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages")
    found = [uri for uri in listing.split() if uri.rstrip("/").endswith("/debian")]
    return found[0] if found else DEFAULT_MIRROR


class Suite:
    """The packages of one suite, as apt finds them with lists of its own."""

    def __init__(self, name: str, cache: Path | None = None) -> None:
        self.name: Final = name
        self._directory = (cache or cache_directory()) / name
        self._is_current = False

    def _apt(self, program: str, *arguments: str, cwd: Path | None = None) -> str:
        lists, cache = self._directory / "lists", self._directory / "apt"
        for each in (lists / "partial", cache / "archives" / "partial"):
            each.mkdir(parents=True, exist_ok=True)
        sources, status = self._directory / "sources.list", self._directory / "status"
        status.touch()
        signed = f"[signed-by={KEYRING}]" if KEYRING.exists() else ""
        sources.write_text(f"deb {signed} {mirror()} {self.name} main\n")
        settings = {
            "Dir::Etc::sourcelist": sources,
            "Dir::Etc::sourceparts": "-",
            "Dir::State::status": status,
            "Dir::State::Lists": lists,
            "Dir::Cache": cache,
            "APT::Architecture": "amd64",
            "APT::Architectures::": "amd64",
            # The user _apt could not write to these directories.
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            # Seconds; and how often a mirror that does not answer is asked again.
            "Acquire::http::Timeout": "30",
            "Acquire::Retries": "3",
            # Old suites are never signed again.
            "Acquire::Check-Valid-Until": "false",
        }
        options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
        return run(program, "-q", *options, *arguments, cwd=cwd)

    def _update(self) -> None:
        stamp = self._directory / "updated"
        if not self._is_current and not _is_younger(stamp, MAX_AGE):
            self._apt("apt-get", "update")
            stamp.touch()
        self._is_current = True

    def dependencies(self, package: str) -> list[str]:
        """Return the names of the packages on which a package depends."""
        self._update()
        listing = self._apt("apt-cache", "depends", "--no-recommends", "--no-suggests", package)
        return re.findall(r"^ +\|?(?:Pre)?Depends: ([^<\s]+)$", listing, re.MULTILINE)

    def download(self, package: str) -> Path:
        """Download a package, unless it is there; return the file."""
        self._update()
        uris = self._apt("apt-get", "download", "--print-uris", package)
        found = re.search(r"^'\S+' (\S+)", uris, re.MULTILINE)
        assert found, uris
        packages = self._directory / "packages"
        packages.mkdir(exist_ok=True)
        path = packages / found[1]
        if not path.exists():
            # apt writes to another name first, and checks the sum.
            self._apt("apt-get", "download", package, cwd=packages)
        return path


def _is_younger(path: Path, seconds: float) -> bool:
    try:
        return time.time() - path.stat().st_mtime < seconds
    except FileNotFoundError:
        return False


def unpack(package: Path, into: Path, wanted: Callable[[str], bool]) -> list[Path]:
    """Unpack the files of a package for which ``wanted`` is true; the names have no first slash."""
    found: list[Path] = []
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isfile() and wanted(name):
                    source = archive.extractfile(member)
                    assert source is not None
                    path = into / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(source.read())
                    path.chmod(member.mode)
                    found.append(path)
        process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}")
    return found


# Run in a root by its own shell. Packages of a suite that changes every day depend on each other in
# ways that debootstrap does not resolve, and apt does.
_INSTALL: Final = """
mount -t proc proc /proc && mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /tmp
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
# A mirror may be older than the time for which a suite is valid.
apt-get -q -o Acquire::Check-Valid-Until=false update
apt-get -q -y --no-install-recommends install "$@"
apt-get -q clean
"""


def root_directory(suite: str, packages: Iterable[str], name: str = "root") -> Path:
    """Return the root of a minimal system of a suite, with ``packages``; it may be made first.

    There can be several of a suite, each with another ``name``.

    Packages are told not to start their services, and run in a mount and a pid namespace of their
    own, without the machine's /run: no service manager can be reached from there.

    Raises:
      RuntimeError: debootstrap is missing or has failed. It needs root.
    """
    root = cache_directory() / f"{suite}-{name}"
    wanted = sorted(set(packages))
    stamp = root.with_suffix(".packages")
    if stamp.exists() and stamp.read_text().split() == wanted:
        return root
    run("rm", "-rf", "--one-file-system", root, stamp)
    command = ["debootstrap", "--variant=minbase"]
    if KEYRING.exists():
        command.append(f"--keyring={KEYRING}")
    run(*ALONE, *command, suite, root, mirror())
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    # apt in there asks the same servers for addresses.
    shutil.copyfile("/etc/resolv.conf", root / "etc/resolv.conf")
    run(*ALONE, "chroot", root, "sh", "-ec", _INSTALL, "sh", *wanted)
    stamp.write_text("\n".join(wanted))
    return root
