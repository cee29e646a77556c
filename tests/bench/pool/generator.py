"""The generator of load, a program in C: compiling it, running it.

Invariant: one run is one process, and what it printed is returned as it is.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Generator as Yields
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs

from tests.bench.implementations import TIMEOUT, FailedError, compiled, failed, lines_of

from .workloads import AT_ONCE, BURN_ONE_IN

SOURCE = Path(__file__).parent / "load.c"
# Where latency is measured, the generator has a higher priority than the servers. Otherwise the
# time that it waits for a processor would be counted as theirs. Where the rate is measured, that
# would cost: it would be woken for each connection, instead of for many at once.
PRIORITY = -15

Measured = dict[str, Any]


@attrs.frozen
class Generator:
    """The program.

    Attributes:
      command: how it is started.
      version: what it was compiled by.
      directory: where its errors are kept.
    """

    command: list[str]
    version: str
    directory: str

    def run(
        self,
        port: int,
        *,
        burns: bool,
        seconds: float,
        seed: int,
        rate: float = 0,
        at_once: int = AT_ONCE,
    ) -> Measured:
        """Load a port: so many connections at a time, or with a rate so many a second."""
        words = _words(seconds, seed, rate, at_once, burns=burns)
        with self._running(port, words) as (process, answer):
            if rate:
                # Not permitted: then it is raised for no implementation.
                with suppress(PermissionError):
                    os.setpriority(os.PRIO_PROCESS, process.pid, PRIORITY)
            return answer()

    @contextmanager
    def crowd(
        self, port: int, idle: int, *, seconds: float = 0.1, seed: int = 1
    ) -> Yields[Callable[[], Measured]]:
        """Hold idle connections; yields what runs a closed loop beside them, at most once."""
        words = [*_words(seconds, seed), "--idle", str(idle)]
        with self._running(port, words) as (process, answer):
            answer()

            def run() -> Measured:
                assert process.stdin is not None
                process.stdin.write(b"\n")
                process.stdin.flush()
                return answer()

            yield run

    @contextmanager
    def _running(
        self, port: int, words: list[str]
    ) -> Yields[tuple[subprocess.Popen[bytes], Callable[[], Measured]]]:
        with ExitStack() as stack:
            errors = stack.enter_context(open(os.path.join(self.directory, "load.stderr"), "w+"))
            process = stack.enter_context(
                subprocess.Popen(
                    [*self.command, "--port", str(port), *words],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                )
            )

            def answer() -> Measured:
                printed: Measured = lines_of([process], errors)[0]
                return printed

            try:
                yield process, answer
                try:
                    process.communicate(timeout=TIMEOUT)
                except subprocess.TimeoutExpired:
                    raise failed("the load hung", [process], errors) from None
            finally:
                process.kill()


def _words(
    seconds: float, seed: int, rate: float = 0, at_once: int = AT_ONCE, *, burns: bool = False
) -> list[str]:
    words = ["--seconds", str(seconds), "--seed", str(seed)]
    if burns:
        words += ["--burn-one-in", str(BURN_ONE_IN)]
    return words + (["--rate", str(rate), "--poisson"] if rate else ["--at-once", str(at_once)])


def built(directory: str) -> Generator:
    """Compile the generator into a directory; raise MissingError without a compiler."""
    program = compiled(directory, SOURCE)
    return Generator(program.command, program.version, directory)


def check(measured: Measured) -> None:
    """Raise FailedError if a connection was not served: then there is nothing to compare."""
    errors = {kind: count for kind, count in measured["errors"].items() if count}
    if errors or not measured["answered"]:
        kinds = ", ".join(f"{kind} {count}" for kind, count in errors.items()) or "none was begun"
        raise FailedError(f"of {measured['begun']} connections were not answered: {kinds}")
