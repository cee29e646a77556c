"""How cost grows: with connections, workers, file descriptors, bytes, jobs, listeners and tasks.

Each subject is measured in sizes up to a thousand or a million times the smallest, in processes of
its own. What is measured is processor time, which other programs disturb little, and memory. A
slope of 1 is linear: twice as many cost twice as much.

The exit status is 1 if a measurement failed, and with --strict if a slope is larger than expected.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tests._helpers.environment import environment
from tests._helpers.processes import python
from tests._helpers.tables import machine
from tests.bench.autogroup import no_autogroup
from tests.bench.connections.report import as_json
from tests.bench.implementations import OURS, FailedError, installed
from tests.bench.report import show_goals
from tests.bench.runner import exit_on_sigterm, finish, progress_bar

from .report import judge, markdown, model_of, show, summary
from .workloads import OWN_DESCRIPTORS, SUBJECTS, Subject

if TYPE_CHECKING:
    from tests.bench.report import Result

RESULT = Path(__file__).with_name("result.json")
TABLES = Path(__file__).with_name("result.md")
# In seconds. Only a process that hangs takes so long.
TIMEOUT = 180

Found = dict[int, dict[str, float]]


def sizes_of(subject: Subject, *, quick: bool, most: int) -> list[int]:
    """Return the sizes that one process may have file descriptors for."""
    return [
        size
        for size in (subject.quick if quick else subject.sizes)
        if size * subject.descriptors <= most - OWN_DESCRIPTORS
    ]


def measured(subject: Subject, sizes: Iterable[int]) -> Found:
    """Measure a subject once in these sizes, in a process of its own."""
    command = python(f"{__package__}.measure", subject.key, *map(str, sizes))
    try:
        # What it has started ends with its standard input, even if it is killed here.
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment(),
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FailedError(f"{subject.key} hung") from None
    if ended.returncode:
        words = ended.stderr.strip().splitlines() or ["no output"]
        raise FailedError(f"{subject.key} died: {words[-1].strip()}")
    found: dict[str, dict[str, float]] = json.loads(ended.stdout.splitlines()[-1])
    return {int(size): figures for size, figures in found.items()}


def run(subjects: list[Subject], rounds: int | None, *, quick: bool) -> Result:
    """Measure everything; return the results."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    times = {each.key: rounds or (1 if quick else each.rounds) for each in subjects}
    result: Result = {
        "machine": machine(),
        "processors": os.cpu_count(),
        "rounds": " to ".join(map(str, sorted({min(times.values()), max(times.values())}))),
        "quick": quick,
        "versions": {name: installed(name) for name in (OURS, "trio")},
        "missing": {},
        "failed": {},
        "subjects": {},
        "notes": [],
    }
    chosen = {each.key: sizes_of(each, quick=quick, most=most) for each in subjects}
    with no_autogroup() as note, progress_bar() as progress:
        task = progress.add_task("", total=sum(times[key] * len(chosen[key]) for key in times))
        for subject in subjects:
            sizes, found = chosen[subject.key], []
            progress.update(task, description=subject.key)
            try:
                for _ in range(times[subject.key]):
                    once: Found = {}
                    for some in [[size] for size in sizes] if subject.is_fresh else [sizes]:
                        once |= measured(subject, some)
                        progress.advance(task, len(some))
                    found.append(once)
            except FailedError as exc:
                result["failed"][subject.key] = str(exc)
            if found and sizes:
                result["subjects"][subject.key] = summary(subject, found)
    if note is not None:
        result["notes"].append(note)
    result["notes"] += limits(subjects, chosen, most, quick=quick)
    if model := model_of(result):
        result["model"] = model
    return result


def limits(
    subjects: Iterable[Subject], chosen: dict[str, list[int]], most: int, *, quick: bool
) -> list[str]:
    """Say which sizes this machine does not allow."""
    left_out = {
        each: set(each.quick if quick else each.sizes) - set(chosen[each.key]) for each in subjects
    }
    return [
        f"{each.key}: {max(sizes):,} {each.noun} were not measured, because a process may have "
        f"{most:,} file descriptors on this machine (RLIMIT_NOFILE, hard limit)"
        for each, sizes in left_out.items()
        if sizes
    ]


def main() -> int:
    """Measure, show, and judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, once: 20 seconds instead of 6 minutes"
    )
    parser.add_argument("--rounds", type=int, help="how often each is measured")
    parser.add_argument(
        "--only",
        default="",
        metavar="A,B",
        help=f"only these: {', '.join(each.key for each in SUBJECTS)}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to FILE")
    parser.add_argument(
        "--write", action="store_true", help="replace the figures of the documentation"
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail if a slope is larger than expected"
    )
    given = parser.parse_args()
    keys = set(filter(None, given.only.split(",")))
    if unknown := keys - {each.key for each in SUBJECTS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if given.write and keys:
        parser.error("--write cannot be combined with --only")
    exit_on_sigterm()
    subjects = [
        each
        for each in SUBJECTS
        if (not keys or each.key in keys) and (each.quick or not given.quick)
    ]
    result = run(subjects, given.rounds, quick=given.quick)
    console = Console(width=None if sys.stdout.isatty() else 160)
    show(result, console)
    verdicts = judge(result)
    show_goals(verdicts, console)
    return int(
        finish(
            given,
            result,
            verdicts,
            lambda: {RESULT: as_json(result) + "\n", TABLES: markdown(result)},
        )
    )
