"""The first file system of a guest: busybox, some modules of a kernel, and a script.

Invariant: nothing is installed for it. An archive is written here, byte by byte, and the modules
are loaded in the order that they ask for.

Sources: of Linux, Documentation/driver-api/early-userspace/buffer-format.rst (the archive) and
Documentation/admin-guide/initrd.rst; modinfo(8), busybox(1)
"""

from __future__ import annotations

import gzip
import lzma
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

# What a guest needs to see a directory of the machine.
SHARED_DIRECTORY: Final = ("virtio_pci", "9pnet_virtio", "9p")
_DEPENDS: Final = re.compile(rb"\0?depends=([^\0]*)\0")
# One of each is enough, and a root of all.
_DIRECTORIES: Final = ("bin", "dev", "host", "modules", "proc", "sys")


def archive(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    """Return a cpio archive ("newc") of files, each with its mode and its contents."""
    parts = list[bytes]()
    entries = [*files.items(), ("TRAILER!!!", (0, b""))]
    for inode, (name, (mode, content)) in enumerate(entries, start=1):
        encoded = name.encode() + b"\0"
        # ino, mode, uid, gid, nlink, mtime, size, the device and its file's, length of the name.
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        parts += [_padded(header + encoded), _padded(content)]
    return b"".join(parts)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def modules(directory: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """Return modules and what they depend on, in the order in which they can be loaded.

    Args:
      directory: with the files of a kernel, at any depth. Those that are not there are built in.
    """
    paths = {
        each.name.partition(".ko")[0].replace("-", "_"): each for each in directory.rglob("*.ko*")
    }
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        path = paths.get(name)
        if name in found or path is None:
            return
        content = path.read_bytes()
        if path.suffix == ".xz":
            content = lzma.decompress(content)
        depends = _DEPENDS.search(content)
        if depends is None:
            raise ValueError(f"{path}: expected a module, compressed with xz or not at all")
        for each in filter(None, depends[1].decode().split(",")):
            add(each.replace("-", "_"))
        found[name] = content

    for name in wanted:
        add(name.replace("-", "_"))
    return found


def write(path: Path, busybox: Path, loaded: Mapping[str, bytes], script: str) -> None:
    """Write the file system, of which ``script`` is the first process, a script for busybox.

    ``load_modules`` is a function in it.
    """
    first = "#!/bin/busybox sh\nload_modules() {\n"
    first += "".join(f"    /bin/busybox insmod /modules/{name}.ko\n" for name in loaded)
    first += f"    :\n}}\n{script}"
    files = dict.fromkeys(_DIRECTORIES, (stat.S_IFDIR | 0o755, b""))
    files["bin/busybox"] = (stat.S_IFREG | 0o755, busybox.read_bytes())
    files["init"] = (stat.S_IFREG | 0o755, first.encode())
    files |= {
        f"modules/{name}.ko": (stat.S_IFREG | 0o644, content) for name, content in loaded.items()
    }
    path.write_bytes(gzip.compress(archive(files), compresslevel=1))
