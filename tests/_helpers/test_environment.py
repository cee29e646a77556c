"""The environment of the tests does not depend on where they were started."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests._helpers.environment import environment, standardize_environment, standardized
from tests._helpers.processes import ROOT


def test_environment_of_this_process_is_standard() -> None:
    """conftest.py has standardized the environment that processes inherit."""
    assert standardized(os.environ) == dict(os.environ)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PYTHONUNBUFFERED": "1", "PYTHON_COLORS": "1", "PYTHONPATH": "x"}, {"PYTHONPATH": "x"}),
        ({"COLUMNS": "20", "NO_COLOR": "1", "TERM": "dumb", "HOME": "/x"}, {"HOME": "/x"}),
        ({"LANG": "de_DE", "LC_NUMERIC": "de_DE", "LC_ALL": "C"}, {}),
        ({"NOTIFY_SOCKET": "/run/x", "http_proxy": "http://x"}, {}),
        ({"TMPDIR": "/var/tmp", "TMP": "/x" * 9}, {"TMPDIR": "/var/tmp"}),
        ({"CI": "true", "COVERAGE_PROCESS_CONFIG": "x"}, None),
    ],
)
def test_standardized(variables: dict[str, str], expected: dict[str, str] | None) -> None:
    """What changes results is removed, and the rest is kept."""
    expected = variables if expected is None else expected
    assert standardized(variables) == {**expected, "LC_ALL": "C.UTF-8"}


def test_standardize_environment_finds_the_temporary_directory_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A directory whose path is too long for sockets in it is not used."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 100)))
    (tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert tempfile.gettempdir() == os.environ["TMPDIR"]
    standardize_environment()
    assert len(tempfile.gettempdir()) <= 16


def test_environment_sets_and_removes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories are first in PYTHONPATH, before this project; None removes a variable."""
    monkeypatch.setenv("PYTHONPATH", "theirs")
    found = environment(Path("/first"), HOME=None, TERM="xterm")
    assert found["PYTHONPATH"] == f"/first:{ROOT}:theirs"
    assert "HOME" not in found
    assert found["TERM"] == "xterm"
