"""tests/model/check.py, which checks the models of protocols, finds what it must find."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests._helpers.environment import environment
from tests._helpers.processes import ROOT, python

MODEL = ROOT / "tests" / "model" / "pool.pml"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.once,
    pytest.mark.skipif(
        shutil.which("spin") is None and "CI" not in os.environ, reason="spin is not installed"
    ),
]


def check(model: Path | str, *arguments: str, path: str | None = None) -> tuple[int, str]:
    """Return the exit status of check.py, and what it prints."""
    done = subprocess.run(
        python("tests.model.check", *arguments, str(model)),
        env=environment() if path is None else environment(PATH=path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=200,
    )
    return done.returncode, done.stdout


def write(directory: Path, checks: str, body: str) -> Path:
    """Return the file of a model."""
    model = directory / "small.pml"
    model.write_text(f"{checks}\nbyte n;\nactive proctype one() {{\n{body}\n}}\n")
    return model


def test_check_accepts_model_that_holds(tmp_path: Path) -> None:
    """A model without faults, all of which is reached, ends with status 0."""
    status, printed = check(write(tmp_path, "/* check all: -DLIMIT=2 -> holds */", "n = LIMIT"))
    assert status == 0, printed
    assert "holds" in printed


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("n = 1; assert(n == 0)", "assertion violated"),
        ("n == 1", "invalid end state"),
        ("do :: n < 2 -> n++ :: n == 2 -> n = 0 od", "non-progress cycle"),
        ("do :: n < 200 -> n++ :: else -> break od; n == 0", "invalid end state"),
        ("this is not a statement", "an identifier"),
        ("if :: n == 0 -> skip\n :: n == 1 ->\n n = 7\n fi", "no check reaches 'n = 7'"),
        ("n = 7 /* never: it is */", "is reached"),
    ],
)
def test_check_rejects_model_with_fault(tmp_path: Path, body: str, said: str) -> None:
    """A fault of any kind ends with status 1, and is named."""
    kind = "holds, no cycle" if "cycle" in said else "holds"
    status, printed = check(write(tmp_path, f"/* check all: -DLIMIT=2 -> {kind} */", body))
    assert status == 1, printed
    assert said in printed


def test_check_rejects_search_that_is_not_complete(tmp_path: Path) -> None:
    """A search that reached its maximal depth is not accepted as one that found nothing."""
    body = "int m; do :: m < 20000 -> m++ :: else -> break od"
    status, printed = check(write(tmp_path, "/* check all: -DLIMIT=2 -> holds */", body))
    assert status == 1, printed
    assert "max search depth too small" in printed


def test_check_rejects_fault_that_is_not_found(tmp_path: Path) -> None:
    """If spin does not find the fault that a check expects, or another one, the check fails."""
    line = "/* check all: -DLIMIT=2 -> fails: invalid end state */"
    assert check(write(tmp_path, line, "n = LIMIT"))[0] == 1
    assert check(write(tmp_path, line, "assert(n == LIMIT)"))[0] == 1
    assert check(write(tmp_path, line, "n == LIMIT"))[0] == 0


def test_check_trace_prints_steps(tmp_path: Path) -> None:
    """--trace prints the steps that lead to the fault."""
    line = "/* check all: -DLIMIT=2 -> fails: assertion violated */"
    model = write(tmp_path, line, 'printf("one step\\n"); assert(n == LIMIT)')
    status, printed = check(model, "--trace", "all")
    assert status == 0, printed
    assert "one step" in printed


def test_check_rejects_line_that_it_cannot_read(tmp_path: Path) -> None:
    """A check with an error in its line is not skipped, and neither is a name that is not there."""
    model = write(tmp_path, "/* check all: -DLIMIT=2 => holds */", "skip")
    status, printed = check(model)
    assert status == 1
    assert "1 of 1 checks cannot be read" in printed
    assert check(MODEL, "--only", "nothing")[0] == 2


def test_check_names_missing_package() -> None:
    """Without spin, the program says which package to install."""
    status, printed = check("", path="/nonexistent")
    assert status == 2
    assert "apt-get install spin" in printed


def test_model_of_pool_has_fault_with_two_queues() -> None:
    """With separate queues for batches and other frames, DRAIN overtakes JOBS."""
    status, printed = check(MODEL, "--trace", "two-queues")
    assert status == 0, printed
    assert "crashed[w]" in printed
    drain = printed.rindex("send DRAIN")
    assert "takes" in printed[drain:]
