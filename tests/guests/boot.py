"""Boot a guest: a kernel of Debian in qemu, and wait for its end.

qemu emulates the processor, so that it runs on any machine. ``GUESTS_ACCEL=kvm`` makes it use KVM.

Invariant: a guest ends within its time, writes only to a directory that was made for it, and has
no network but its own loopback.

Sources: qemu(1), bootparam(7); of Linux, Documentation/filesystems/9p.rst
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import attrs

from tests.guests import initrd
from tests.guests.debian import Suite, cache_directory, unpack

PROGRAM: Final = "qemu-system-x86_64"
# Seconds until qemu, which was asked to end, must have done so.
_GRACE: Final = 20


@attrs.frozen
class Kernel:
    """A kernel that a guest can run.

    Attributes:
      image: the file that qemu loads.
      directory: has its modules.
      busybox: the program that prepares the guest.
    """

    release: str
    image: Path
    directory: Path
    busybox: Path

    @property
    def version(self) -> tuple[int, ...]:
        """The first two numbers of the release."""
        return tuple(int(number) for number in self.release.split(".")[:2])


_VERSIONED: Final = re.compile(r"linux-(?:image|modules|binary)-\d")
# The drivers that a guest may need: a hundred times less than all.
_WANTED: Final = re.compile(
    r"/(?:virtio|virtio_ring|virtio_pci(?:_\w+)?|netfs|fscache|9p|9pnet|9pnet_virtio|overlay)\.ko|"
    r"(?:^|/)vmlinuz"
)


def kernel_of(suite: str) -> Kernel:
    """Return the kernel of a suite, which is downloaded if it is not there."""
    packages = Suite(suite)
    names = [name for name in packages.dependencies("linux-image-amd64") if _VERSIONED.match(name)]
    for name in names:
        # Newer suites have the modules and the image in packages of their own.
        more = packages.dependencies(name)
        names += [each for each in more if _VERSIONED.match(each) and each not in names]
    (named,) = (name for name in names if name.startswith("linux-image-"))
    release = named.removeprefix("linux-image-")
    directory = cache_directory() / suite / "kernels" / release
    if not directory.exists():
        unfinished = directory.with_name(f"{directory.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        for name in names:
            unpack(packages.download(name), unfinished, lambda path: bool(_WANTED.search(path)))
        unfinished.rename(directory)
    image = next(directory.rglob("vmlinuz*"))
    return Kernel(release, image, directory, _busybox_of(suite))


def _busybox_of(suite: str) -> Path:
    """Return a suite's busybox, which needs no libraries; it is downloaded if it is not there."""
    path = cache_directory() / suite / "busybox"
    if not path.exists():
        package = Suite(suite).download("busybox-static")
        with tempfile.TemporaryDirectory(dir=cache_directory()) as directory:
            (found,) = unpack(package, Path(directory), lambda name: name.endswith("bin/busybox"))
            found.rename(path)
    return path


@attrs.frozen
class Guest:
    """What a guest runs.

    Attributes:
      script: of the first process, for busybox; see :func:`tests.guests.initrd.write`.
      results: the directory that the guest may write to, as the 9p share "results".
      modules: the kernel's modules that it loads.
      shows: whether a line of its console is printed.
      parameters: of the kernel, beside those that it always gets.
    """

    kernel: Kernel
    script: str
    results: Path
    timeout: float
    modules: Sequence[str] = initrd.SHARED_DIRECTORY
    shows: Callable[[str], bool] = lambda _: True
    parameters: str = ""
    memory_mb: int = 2048
    processors: int = 1

    def boot(self) -> float:
        """Run the guest to its end; return after how many seconds it ended.

        Its console is in ``console.txt`` of the results.

        Raises:
          TimeoutError: it was ended because its time was over.
        """
        ramdisk = self.results / "initrd.gz"
        loaded = initrd.modules(self.kernel.directory, self.modules)
        initrd.write(ramdisk, self.kernel.busybox, loaded, self.script)
        begin = time.monotonic()
        with (
            open(self.results / "console.txt", "w", encoding="utf-8") as console,
            subprocess.Popen(
                self._command(ramdisk),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                console.write(line)
                console.flush()
                if self.shows(line):
                    sys.stdout.write(line)
                    sys.stdout.flush()
        seconds = time.monotonic() - begin
        if process.returncode:
            raise TimeoutError(
                f"Linux {self.kernel.release}: the guest was ended after {seconds:.0f} s (exit "
                f"status {process.returncode}); its console is {self.results}/console.txt"
            )
        return seconds

    def _command(self, ramdisk: Path) -> list[str]:
        if shutil.which(PROGRAM) is None:
            raise FileNotFoundError(f"{PROGRAM} is missing (Debian: qemu-system-x86)")
        # qemu is a child of timeout(1), which ends it even if this program is killed. With
        # -no-reboot, a kernel that panics ends it, too.
        return [
            *("timeout", f"--kill-after={_GRACE}", str(self.timeout), PROGRAM),
            # Not KVM by itself: in a virtual machine it may be there, and qemu aborts with it.
            *("-accel", os.environ.get("GUESTS_ACCEL", "tcg"), "-cpu", "max"),
            *("-smp", str(self.processors), "-m", str(self.memory_mb)),
            *("-nographic", "-no-reboot", "-net", "none"),
            *("-kernel", str(self.kernel.image), "-initrd", str(ramdisk)),
            *("-append", f"console=ttyS0 quiet panic=-1 no_timer_check {self.parameters}"),
            *_share("/", "machine", readonly=True),
            *_share(os.fspath(self.results), "results", readonly=False),
        ]


def _share(path: str, tag: str, *, readonly: bool) -> list[str]:
    # qemu reads two commas as one that is part of the path.
    options = (
        f"local,path={path.replace(',', ',,')},mount_tag={tag},security_model=none,multidevs=remap"
    )
    return ["-virtfs", options + (",readonly=on" if readonly else "")]
