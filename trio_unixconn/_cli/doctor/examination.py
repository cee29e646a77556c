"""The examination: every feature tried, every limit looked up.

Invariant: nothing is raised; a feature that is missing or forbidden is in the report, and one that
could not be tried to the end is reported as unknown, never as missing.
"""

from __future__ import annotations

import platform
import subprocess
import sys

import attrs
import trio

from ..._version import __version__
from .lab import Lab
from .limits import limits
from .probes import PROBES, Probe
from .report import Examination, Feature


def examine() -> Examination:
    """Try everything, one after another; nothing remains afterwards.

    It blocks, for a fraction of a second if nothing hangs. If it takes too long to try a feature,
    as can happen on a busy machine, it is unknown whether that works. While one feature is tried
    the soft limit RLIMIT_NOFILE is lowered, so that other threads must not need a descriptor
    meanwhile.
    """
    return Examination(_versions(), [_tried(probe) for probe in PROBES], limits())


def _versions() -> dict[str, str]:
    return {
        "trio_unixconn": __version__,
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "trio": trio.__version__,
        "attrs": attrs.__version__,
        "executable": sys.executable,
    }


def _tried(probe: Probe) -> Feature:
    works: bool | None
    try:
        with Lab() as lab:
            works, seen = True, probe.attempt(lab)
    except (TimeoutError, subprocess.TimeoutExpired) as exc:
        works, seen = None, f"no answer in time ({_reason(exc)})"
    except Exception as exc:  # a system that forbids something chooses the error
        works, seen = False, _reason(exc)
    return Feature(probe.name, probe.since, works, seen, probe.otherwise, probe.is_core)


def _reason(exc: Exception) -> str:
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return str(exc) or type(exc).__name__
