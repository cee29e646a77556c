"""How everything in this project is run: ``nox -l`` lists it.

The rule of this file: a session installs all that it needs, and what CI runs is what a
contributor runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nox

PROJECT = nox.project.load_toml("pyproject.toml")

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "typing", "tests", "examples"]
nox.options.reuse_existing_virtualenvs = True


def runs(command: str) -> bool:
    """Whether this is the name of a Python that starts (pyenv has shims that do not)."""
    try:
        return subprocess.run([command, "-c", ""], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def installed_pythons() -> list[str]:
    """Return those of the Pythons in the classifiers that this machine has.

    Pythons that pyenv has installed but not activated are put on the PATH.
    """
    found: list[str] = []
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for version in nox.project.python_versions(PROJECT):
        if not runs(f"python{version}"):
            for command in sorted(pyenv.glob(f"{version}.*/bin/python{version}")):
                os.environ["PATH"] = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
                break
            else:
                continue
        found.append(version)
    # A machine with another Python only tests with that.
    return found or [f"{sys.version_info[0]}.{sys.version_info[1]}"]


def install(session: nox.Session, *groups: str) -> None:
    """Install the package with its command line, and dependency groups."""
    session.install("-e", ".[cli]", *nox.project.dependency_groups(PROJECT, *groups))


@nox.session(python=installed_pythons())
def tests(session: nox.Session) -> None:
    """Run the test suite, a process for each processor; arguments go to pytest."""
    install(session, "tests")
    session.run("pytest", "-n", "auto", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the test suite with branch coverage, which must be 100 %."""
    install(session, "tests")
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", "-n", "auto", *session.posargs)
    session.run("coverage", "combine", "-q")
    session.run("coverage", "report")


@nox.session
def lint(session: nox.Session) -> None:
    """Check rules and format."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def typing(session: nox.Session) -> None:
    """Check types with mypy and pyright, and that the public types are complete."""
    install(session, "tests", "typing")
    session.install("nox")
    session.run("mypy")
    session.run("pyright")
    session.run("pyright", "--ignoreexternal", "--verifytypes", "trio_unixconn")


@nox.session
def examples(session: nox.Session) -> None:
    """Run every example, and those in the README."""
    install(session, "tests")
    for example in sorted(Path("examples").glob("*.py")):
        session.run("python", "-W", "error", str(example))
    session.run("pytest", "-q", "tests/test_readme.py")


@nox.session
def soak(session: nox.Session) -> None:
    """Send a million descriptors; memory, descriptors and processor time must stay flat."""
    install(session)
    session.run("python", "soak/soak.py", *session.posargs)


@nox.session
def faults(session: nox.Session) -> None:
    """Make the same faults happen to this library and to others; ``--write`` keeps the table."""
    install(session, "faults")
    session.run("python", "faults/faults.py", *session.posargs)
    session.run("python", "faults/backlog.py", *session.posargs)


@nox.session(name="pool-faults")
def pool_faults(session: nox.Session) -> None:
    """Kill, stop, starve and replace workers under load; ``--quick``, ``--only``, ``--json``."""
    install(session)
    session.run("python", "pool_faults/pool_faults.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure beside everybody else; ``--quick``, ``--check FILE``, ``--write``, ``--help``."""
    install(session, "bench")
    session.run("python", "benchmarks/bench.py", *session.posargs)


@nox.session(name="pool-bench")
def pool_bench(session: nox.Session) -> None:
    """Measure the worker pool beside Node's cluster and others; ``--quick``, ``--help``."""
    install(session)
    session.run("python", "pool_bench/contest.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    install(session, "docs")
    session.run("sphinx-build", "-W", "-n", "-q", "-b", "html", "docs", "docs/_build/html")
