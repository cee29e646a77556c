"""Check the Promela models in this directory exhaustively with spin.

``python -m tests.model.check [--only CHECK] [--trace CHECK] [MODEL ...]``; without arguments, all
checks of all models. ``--trace`` also prints the steps that lead to the fault which a check finds.

A model lists its checks, each in a comment of one line::

    /* check NAME: OPTIONS -> holds */
    /* check NAME: OPTIONS -> holds, no cycle */
    /* check NAME: OPTIONS -> fails: TEXT */

OPTIONS are macros for the model. "holds": no assertion fails and no execution ends too early.
"no cycle": all executions are finite, too. "fails": spin must find the fault, and say TEXT.

A check fails unless the search was complete. Each statement must be reached by a check that holds
and that chooses no other statements (with ``#ifdef``), unless its line has a comment that begins
with "never".

Source: https://spinroot.com/spin/Man/Pan.html
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
# For each of the two searches that run at the same time. On a quiet machine, none takes a minute.
MEMORY_LIMIT_MB = 1000
TIME_LIMIT = 600.0
MAX_DEPTH = 10_000
PACKAGES = {"spin": "spin", "gcc": "gcc libc6-dev"}

_CHECK = re.compile(
    r"^/\* check ([\w-]+):(.*)->\s*(holds|holds, no cycle|fails: .+?) \*/$", re.MULTILINE
)
_UNREACHED_IN = re.compile(r"^unreached in (?:proctype )?(\w+)$")
_INCOMPLETE = re.compile("Search not completed|max search depth too small|out of memory|MEMLIM")
_UNREACHED = re.compile(r"^\t(\S+):(\d+), state (\d+), ")


class Check(NamedTuple):
    """One run of spin."""

    model: Path
    name: str
    options: list[str]
    expected: str

    @property
    def searches_cycles(self) -> bool:
        return self.expected == "holds, no cycle"


class Statement(NamedTuple):
    """A statement of a model; ``#ifdef`` changes the numbers."""

    process: str
    state: int
    line: int


class Result(NamedTuple):
    """What a search has found."""

    states: int
    depth: int
    errors: int
    megabytes: float
    seconds: float
    complete: bool
    fault: str
    unreached: set[Statement]
    output: str


def read_checks(model: Path) -> list[Check]:
    """Return the checks that a model lists."""
    found = [
        Check(model, name, options.split(), expected)
        for name, options, expected in _CHECK.findall(model.read_text())
    ]
    listed = sum(line.startswith("/* check ") for line in model.read_text().splitlines())
    if not found or listed != len(found):
        raise ValueError(f"{model}: {listed - len(found)} of {listed} checks cannot be read")
    return found


def missing_packages() -> list[str]:
    """Return the Debian packages of the programs that are not installed."""
    return [package for program, package in PACKAGES.items() if shutil.which(program) is None]


def run(command: list[str], cwd: str, limit: float = TIME_LIMIT) -> str:
    """Run a command and return what it prints; a time limit ends it."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        printed = exc.stdout or b""
        return f"{printed.decode(errors='replace')}\n{command[0]}: more than {limit} seconds"
    return done.stdout


def parse(output: str, seconds: float) -> Result:
    """Return what pan, the checker that spin has made, has printed."""

    def number(pattern: str) -> float:
        match = re.search(pattern, output, re.MULTILINE)
        return float(match[1]) if match else 0.0

    process = ""
    unreached: set[Statement] = set()
    for line in output.splitlines():
        if begin := _UNREACHED_IN.match(line):
            process = begin[1]
        elif statement := _UNREACHED.match(line):
            unreached.add(Statement(process, int(statement[3]), int(statement[2])))
    fault = re.search(r"^pan:\d+: (.*?) \(at depth -?\d+\)$", output, re.MULTILINE)
    return Result(
        states=int(number(r"^ *([\d.e+]+) states, stored")),
        depth=int(number(r"depth reached (\d+)")),
        errors=int(number(r"errors: (\d+)")),
        megabytes=number(r"([\d.]+)\s+total actual memory usage"),
        seconds=seconds,
        complete="errors: 0" in output and not _INCOMPLETE.search(output),
        fault=" ".join(fault[1].split()) if fault else "",
        unreached=unreached,
        output=output,
    )


def search(check: Check, directory: str) -> Result:
    """Make the checker of a check, and run it."""
    begin = time.monotonic()
    shutil.copy(check.model, directory)
    printed = run(["spin", *check.options, "-a", check.model.name], directory)
    kind = "-DNP" if check.searches_cycles else "-DSAFETY"
    # -O2 takes a second longer for each check, and the search is not faster.
    options = ["-O1", "-w", kind, "-DCOLLAPSE", f"-DMEMLIM={MEMORY_LIMIT_MB}", "-DVECTORSZ=2048"]
    printed += run(["gcc", *options, "-o", "pan", "pan.c"], directory)
    if not Path(directory, "pan").exists():
        return parse(printed, time.monotonic() - begin)
    cycles = ["-l"] if check.searches_cycles else []
    printed += run(["./pan", f"-m{MAX_DEPTH}", "-w22", *cycles], directory)
    return parse(printed, time.monotonic() - begin)


def steps(check: Check, directory: str) -> str:
    """Return the steps that lead to the fault which a search has found."""
    trail = f"{check.model.name}.trail"
    printed = run(["spin", *check.options, "-k", trail, "-T", check.model.name], directory)
    return printed.partition("spin: ")[0]


def complaint(check: Check, result: Result) -> str:
    """Return why a result is not the expected one, or nothing."""
    if check.expected.startswith("fails: "):
        expected = check.expected.removeprefix("fails: ")
        if result.errors and expected in result.fault:
            return ""
        return f"expected {expected!r}, got {result.fault or 'no fault'!r}\n{result.output}"
    if result.complete and not result.errors:
        return ""
    return f"expected no fault and a complete search, got:\n{result.output}"


def never_reached(model: Path, results: list[tuple[Check, Result]]) -> list[str]:
    """Return complaints about statements that no search reaches, and about wrong comments."""
    texts = model.read_text().splitlines()
    plain = [
        result
        for check, result in results
        if check.expected == "holds" and all("=" in each for each in check.options)
    ]
    if not plain:
        return []
    unreached = set.intersection(*(result.unreached for result in plain))
    lines = {each.line for each in unreached if "-end-" not in texts[each.line - 1]}
    marked = {number for number, text in enumerate(texts, 1) if "/* never" in text}
    return [
        f"{model}:{line}: no check reaches {texts[line - 1].strip()!r}"
        for line in sorted(lines - marked)
        if texts[line - 1].strip() != "}"
    ] + [
        f"{model}:{line}: is reached, but {texts[line - 1].strip()!r}"
        for line in sorted(marked - lines)
    ]


def perform(check: Check, trace: str | None) -> tuple[Check, Result, str]:
    """Run one check, and return the steps of what it found if they are wanted."""
    with tempfile.TemporaryDirectory(prefix="model-") as directory:
        result = search(check, directory)
        found = steps(check, directory) if check.name == trace and result.errors else ""
    return check, result, found


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; return the exit status."""
    parser = argparse.ArgumentParser(description="Check Promela models with spin.")
    parser.add_argument("models", nargs="*", type=Path, help="default: all beside this program")
    parser.add_argument("--only", metavar="CHECK", help="run only this check")
    parser.add_argument("--trace", metavar="CHECK", help="run only this check, and print its steps")
    chosen = parser.parse_args(arguments)
    if missing := missing_packages():
        sys.stderr.write(f"not installed: run 'apt-get install {' '.join(missing)}'\n")
        return 2
    only = chosen.trace or chosen.only
    models: list[Path] = chosen.models or sorted(HERE.glob("*.pml"))
    checks = [each for model in models for each in read_checks(model)]
    checks = [each for each in checks if only in (None, each.name)]
    if not checks:
        sys.stderr.write(f"no check has the name {only}\n")
        return 2
    problems: list[str] = []
    results: list[tuple[Check, Result]] = []
    sys.stdout.write(f"{'check':<32}{'states':>10}{'depth':>7}{'MB':>6}{'s':>6}  result\n")
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as executor:
        for check, result, found in executor.map(lambda each: perform(each, chosen.trace), checks):
            results.append((check, result))
            why = complaint(check, result)
            problems += [f"{check.model}: {check.name}: {why}"] if why else []
            shown = result.fault or (check.expected if result.complete else "not complete")
            verdict = f"WRONG: {shown}" if why else shown
            sys.stdout.write(
                f"{check.model.stem + ' ' + check.name:<32}{result.states:>10,}{result.depth:>7}"
                f"{result.megabytes:>6.0f}{result.seconds:>6.1f}  {verdict}\n"
            )
            sys.stdout.write(found)
            sys.stdout.flush()
    if only is None:
        for model in models:
            problems += never_reached(model, [each for each in results if each[0].model == model])
    for each in problems:
        sys.stderr.write(f"{each}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
