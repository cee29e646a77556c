"""The sessions of this project: ``nox -l`` lists them.

Invariant: a session installs all that it needs, and CI runs the sessions of a contributor.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path

import nox

PROJECT = nox.project.load_toml("pyproject.toml")

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "typing", "tests", "examples"]
nox.options.reuse_existing_virtualenvs = True
# Lets `nox -j 2` run sessions at the same time. An older nox has no -j.
if hasattr(nox.options, "allow_parallel"):
    nox.options.allow_parallel = True


def runs(command: str) -> bool:
    """Whether the command starts a Python (a shim of pyenv may not)."""
    try:
        return subprocess.run([command, "-c", ""], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def installed_pythons() -> list[str]:
    """Return the Pythons in the classifiers that are installed.

    Puts Pythons on the PATH that pyenv has installed but not activated.
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
    # If only another Python is installed, run the tests with that.
    return found or [f"{sys.version_info[0]}.{sys.version_info[1]}"]


def lower_bounds() -> list[str]:
    """Return the dependencies, those of the extras too, each at its lower bound."""
    project = PROJECT["project"]
    every = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    return [each.partition(",")[0].replace(">=", "==") for each in every]


# One process a processor; one that has nothing left to do takes tests of another.
PYTEST = ("pytest", "-n", "auto", "--dist", "worksteal", "--slow")
# What depends on the version of Python.
EVERY_PYTHON = "not once and not interop"


def every_python() -> str:
    """Return the marks of what depends on the version of Python; with QUICK=1, of fast tests."""
    return f"{EVERY_PYTHON} and not slow" if os.environ.get("QUICK") == "1" else EVERY_PYTHON


# Examples that need packages of the dependency group "examples".
WITH_PACKAGES = sorted(map(str, Path("examples/with_packages").glob("*.py")))


def install(session: nox.Session, *groups: str) -> None:
    """Install the package with its command line, and dependency groups.

    The tests start a thousand Pythons. Each would compile the package again if the environment
    told Python to keep no compiled files.
    """
    session.env["PYTHONDONTWRITEBYTECODE"] = ""
    session.install("-e", ".[asgi,cli]", *nox.project.dependency_groups(PROJECT, *groups))


PYTHONS = installed_pythons()


# The newest first: it takes longest, and others can run beside it.
@nox.session(python=PYTHONS[::-1])
def tests(session: nox.Session) -> None:
    """Run the test suite, one process per processor; arguments go to pytest.

    What does not depend on the version of Python runs on the newest one only. With COVERAGE=1
    in the environment, that one is run as by the session ``coverage``. With QUICK=1, only the
    newest runs slow tests.
    """
    if session.python == PYTHONS[-1] and os.environ.get("COVERAGE") == "1":
        coverage(session)
        return
    install(session, "tests", "asgi")
    which = [] if session.python == PYTHONS[-1] else ["-m", every_python()]
    session.run(*PYTEST, *which, *session.posargs)


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """Run the tests with the oldest trio, attrs and others that pyproject.toml allows.

    With QUICK=1 in the environment, without those that are slow.
    """
    install(session, "tests", "asgi")
    session.install(*lower_bounds())
    session.run(*PYTEST, "-m", every_python(), *session.posargs)


@nox.session(venv_backend="none")
def model(session: nox.Session) -> None:
    """Check the models of protocols with spin, which must be installed; ``--only``, ``--trace``."""
    session.run(sys.executable, "-m", "tests.model.check", *session.posargs, external=True)


@nox.session(name="model-soak")
def model_soak(session: nox.Session) -> None:
    """Compare a connection with the model of its stream for 20,000 programs: ten minutes."""
    install(session, "tests")
    session.run(
        "pytest",
        "tests/core/test_model.py",
        "-o",
        "faulthandler_timeout=0",
        *session.posargs,
        env={"HYPOTHESIS_PROFILE": "soak"},
    )


@nox.session(python=PYTHONS[-1])
def coverage(session: nox.Session) -> None:
    """Run the test suite with branch coverage, which must be 100 %.

    The tests that nox runs once stress the package. They run without coverage.
    """
    install(session, "tests", "asgi")
    session.run("coverage", "erase")
    session.run(*("coverage", "run", "-m", *PYTEST, "-m", "not once"), *session.posargs)
    session.run("coverage", "combine", "-q")
    session.run("coverage", "report")
    session.run(*PYTEST, "-m", "once", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the rules and the format of the code with ruff, and the words of all text."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("python", "-m", "tests.lint.words")


@nox.session
def typing(session: nox.Session) -> None:
    """Check types with mypy and pyright, and that the public types are complete."""
    install(session, "tests", "typing", "asgi", "examples")
    session.install("nox")
    session.run("mypy")
    # Not in pyproject.toml, because of the packages that they need. Some have no types for pyright.
    session.run("mypy", *WITH_PACKAGES)
    session.run("pyright")
    session.run("pyright", "--ignoreexternal", "--verifytypes", "trio_unixconn")


@nox.session
def examples(session: nox.Session) -> None:
    """Run the examples, and those in the README; the tests run those of the documentation."""
    install(session, "tests", "examples")
    for example in [*sorted(map(str, Path("examples").glob("*.py"))), *WITH_PACKAGES]:
        if "jeepney" in example and not shutil.which("dbus-daemon") and "CI" not in os.environ:
            session.warn(f"{example} needs dbus-daemon, which is not installed")
        else:
            session.run("python", "-W", "error", example)
    session.run("pytest", "-q", "tests/docs", "-k", "README")


@nox.session(python=PYTHONS[-1])
def notebooks(session: nox.Session) -> None:
    """Run the notebooks in a kernel, and compare their outputs; ``--write`` keeps the new ones."""
    install(session, "notebooks")
    session.run("python", "-m", "tests.notebooks", *session.posargs)


@nox.session(python=PYTHONS[-1])
def jupyterlab(session: nox.Session) -> None:
    """Press the interrupt button of JupyterLab in chromium; ``--picture FILE``."""
    install(session, "notebooks", "jupyterlab")
    session.run("python", "-m", "tests.jupyterlab", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Send a million descriptors; memory, descriptors and processor time must stay flat."""
    install(session)
    session.run("python", "-m", "tests.faults.soak", *session.posargs)


@nox.session
def faults(session: nox.Session) -> None:
    """Cause the same faults in this library and in others; ``--write`` keeps the table.

    Without arguments, the random test of the pool is next, for three minutes.
    """
    install(session, "faults")
    session.run("python", "-m", "tests.faults.connections", *session.posargs)
    session.run("python", "-m", "tests.faults.connections.backlog", *session.posargs)
    if not session.posargs:
        session.run("python", "-m", "tests.faults.pool", "--random", "180")


@nox.session(name="pool-faults")
def pool_faults(session: nox.Session) -> None:
    """Kill, stop, starve and replace workers under load; ``--quick``, ``--only``, ``--random``."""
    install(session)
    session.run("python", "-m", "tests.faults.pool", *session.posargs)


@nox.session(python=PYTHONS[-1])
def kernels(session: nox.Session) -> None:
    """Run the core, the hostile peers and a pool's life on Debian's kernels, in guests.

    Linux 5.10 to 7.2, in qemu; hours without KVM. ``--quick`` is what CI does; ``--help``.
    """
    install(session, "tests")
    session.install("pip")  # uv installs none
    session.run("python", "-m", "tests.guests.kernels", *session.posargs)


@nox.session(python=PYTHONS[-1])
def distributions(session: nox.Session) -> None:
    """Run the tests with the Python, GLib, HAProxy and nginx of Debian 13 and unstable; root."""
    install(session, "tests")
    session.install("pip")  # uv installs none
    session.run("python", "-m", "tests.guests.distributions", *session.posargs)


@nox.session(name="guest-systemd", python=PYTHONS[-1])
def guest_systemd(session: nox.Session) -> None:
    """Run services under the real systemd, 257 and 262, as the first process of a guest; root."""
    install(session, "tests")
    session.install("pip")  # uv installs none
    session.run("python", "-m", "tests.guests.systemd", *session.posargs)


@nox.session(name="handover-faults")
def handover_faults(session: nox.Session) -> None:
    """Kill either side of a handover at each frame, and more; ``--quick``, ``--only``."""
    install(session)
    session.run("python", "-m", "tests.faults.handover", *session.posargs)


@nox.session(name="handover-bench")
def handover_bench(session: nox.Session) -> None:
    """Replace servers under load, beside HAProxy, nginx and others; ``--quick``, ``--help``."""
    install(session, "handover-bench")
    session.run("python", "-m", "tests.bench.handover", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure beside other libraries; ``--quick``, ``--check FILE``, ``--write``, ``--help``."""
    install(session, "bench")
    session.run("python", "-m", "tests.bench.connections", *session.posargs)


@nox.session(name="pool-bench")
def pool_bench(session: nox.Session) -> None:
    """Measure the worker pool beside Node's cluster and others; ``--quick``, ``--help``."""
    install(session)
    session.run("python", "-m", "tests.bench.pool", *session.posargs)


@nox.session
def growth(session: nox.Session) -> None:
    """Measure how cost grows with connections, workers, bytes, jobs; ``--quick``, ``--write``."""
    install(session, "bench")
    session.run("python", "-m", "tests.bench.growth", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation, and draw its pictures; a warning is an error."""
    install(session, "docs")
    session.run("sphinx-build", "-W", "-n", "-q", "-b", "html", "docs", "docs/_build/html")


# What the session ``release`` runs against the installed wheel, unless arguments say otherwise.
RELEASE_TESTS = (
    "tests/core",
    "tests/test_public.py",
    "tests/pool/test_jobs.py",
    "tests/cli/test_peer.py",
)


@nox.session(python=PYTHONS[-1])
def release(session: nox.Session) -> None:
    """Build the sdist and the wheel into ``dist``, check both, and test the installed wheel.

    The wheel is built from the sdist and installed without the tree. The tests are those of the
    sdist, from which the package itself is removed; arguments are tests to run instead of some.
    """
    dist = Path("dist").resolve()
    shutil.rmtree(dist, ignore_errors=True)
    session.install("build", "twine", *nox.project.dependency_groups(PROJECT, "tests"))
    session.run("python", "-m", "build", "--outdir", str(dist))
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    session.run("twine", "check", "--strict", str(sdist), str(wheel))
    version = wheel.name.split("-")[1]
    if f"\n## [{version}] - " not in Path("CHANGELOG.md").read_text():
        session.error(f"CHANGELOG.md has no section for version {version}")
    session.install("--force-reinstall", "--no-deps", str(wheel))
    session.install(f"{wheel}[cli]")
    # Not session.create_tmp(), which also makes it the TMPDIR: sockets of tests need short paths.
    with tempfile.TemporaryDirectory() as unpacked:
        shutil.unpack_archive(sdist, unpacked, filter="data")
        (tree,) = Path(unpacked).iterdir()
        shutil.rmtree(tree / "trio_unixconn")
        with session.chdir(tree):
            session.run(
                "python", "-c", "import trio_unixconn as t; assert 'site-packages' in t.__file__"
            )
            session.run("trio-unixconn", "demo", silent=True)
            session.run(*PYTEST, *(session.posargs or RELEASE_TESTS))
