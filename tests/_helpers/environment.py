"""The environment of the tests, and of the processes that they start.

Invariant: no result depends on the shell, the terminal or the service that started the tests. A
test about a variable sets it.
"""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Final

from tests._helpers.processes import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# Where Python is, and where it finds modules. Its other variables change what it does.
KEPT_OF_PYTHON: Final = frozenset(
    [
        *("PYTHONBREAKPOINT", "PYTHONHOME", "PYTHONNOUSERSITE", "PYTHONPATH"),
        *("PYTHONPYCACHEPREFIX", "PYTHONUSERBASE"),
    ]
)
# Of terminals; of a service manager, which the server would notify; of proxies, which curl asks.
REMOVED: Final = frozenset(
    [
        *("CLICOLOR", "CLICOLOR_FORCE", "COLORTERM", "COLUMNS", "FORCE_COLOR", "LINES"),
        *("GITHUB_ACTIONS", "NO_COLOR", "PY_COLORS", "TERM", "TERMINAL_WIDTH"),
        *("TTY_COMPATIBLE", "TTY_INTERACTIVE"),
        *("FDSTORE", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"),
        *("LISTEN_FDNAMES", "LISTEN_FDS", "LISTEN_PID", "LISTEN_PIDFDID"),
        *("ALL_PROXY", "HTTP_PROXY", "all_proxy", "http_proxy"),
        *("LANG", "LANGUAGE"),
    ]
)
# A socket's path has 107 bytes. The directories that pytest makes for a test have up to 80.
LONGEST_TEMPORARY_DIRECTORY: Final = 16


def standardized(variables: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what would change results."""
    found = {
        name: value
        for name, value in variables.items()
        if (name in KEPT_OF_PYTHON or not name.startswith("PYTHON"))
        and name not in REMOVED
        and not name.startswith("LC_")
    }
    for name in ("TMPDIR", "TEMP", "TMP"):
        if len(found.get(name, "")) > LONGEST_TEMPORARY_DIRECTORY:
            del found[name]
    return {**found, "LC_ALL": "C.UTF-8"}


def standardize_environment() -> None:
    """Change the environment of this process, which others inherit."""
    found = standardized(os.environ)
    for name in os.environ.keys() - found.keys():
        del os.environ[name]
    os.environ.update(found)
    # The directory that was found before.
    tempfile.tempdir = None


def environment(*directories: Path, **variables: str | None) -> dict[str, str]:
    """Return the environment in which a Python finds this project, installed or not.

    Args:
      directories: from which modules are imported before all others.
      variables: to set or, with None, to remove.
    """
    found = standardized(os.environ)
    path = [*map(str, directories), str(ROOT), *filter(None, [found.get("PYTHONPATH")])]
    changed = {**found, "PYTHONPATH": os.pathsep.join(path), **variables}
    return {name: value for name, value in changed.items() if value is not None}


def without_coverage() -> dict[str, str]:
    """Return the environment of a process that could not write the data of coverage."""
    return {name: value for name, value in environment().items() if "COVERAGE" not in name}
