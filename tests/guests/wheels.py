"""Packages from PyPI for the Python of another system, installed into a directory.

pip runs here, so that the other system needs no network.

Source: pip install --help (``--target``, ``--python-version``)
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tests.guests.debian import cache_directory, run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it

PYPROJECT: Final = Path(__file__).parents[2] / "pyproject.toml"
# What the C libraries of Debian 13 and later can load.
PLATFORMS: Final = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def requirements(*groups: str) -> list[str]:
    """Return the dependencies of the package with all extras, and dependency groups."""
    project: dict[str, Any] = tomllib.loads(PYPROJECT.read_text())
    found = [*project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        found += extra
    for group in groups:
        found += project["dependency-groups"][group]
    return found


def site_packages(version: str, wanted: Sequence[str]) -> Path:
    """Return a directory with packages for a version of Python, which is filled if it is new."""
    key = hashlib.sha256("\n".join([version, *wanted]).encode()).hexdigest()[:12]
    directory = cache_directory() / f"python{version}-{key}"
    if not directory.exists():
        unfinished = directory.with_name(f"{directory.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        platforms = [word for each in PLATFORMS for word in ("--platform", each)]
        run(
            *(sys.executable, "-m", "pip", "install", "-q", "--target", unfinished),
            *("--python-version", version, "--only-binary", ":all:", *platforms, *wanted),
        )
        unfinished.rename(directory)
    return directory


def python_version(root: Path) -> str:
    """Return the version of the Python of a system, such as "3.13"."""
    program = (root / "usr/bin/python3").readlink().name
    found = re.fullmatch(r"python(3\.\d+)", program)
    assert found, program
    return found[1]
