"""The benchmark: installed implementations run, and missing ones are reported."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.bench.connections.pairs import IMPLEMENTATIONS, Pair
from tests.bench.connections.report import as_json, compare, condensed, confirmed, judge, summary
from tests.bench.connections.workloads import CASES, FLOOR, GOALS, MEMORY, STDLIB, STREAM, Case

from .implementations import OURS, FailedError, Implementation, MissingError, installed, python

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

# One Python is enough.
pytestmark = [pytest.mark.slow, pytest.mark.once]

# Gigabytes, and thousands of connections, are left to the benchmark.
SIZES = {"bytes, others idle": 2, "memory of an idle connection": 10, "a large buffer": 4096}

# Implementations that must be installed wherever the tests run, and those for CI.
ALWAYS = {"ours", "floor", "stdlib", "reduction", "anyio-trio", "anyio-asyncio"}
ON_CI = {"c", "gio"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Generator[dict[str, Pair | str], None, None]:
    """Start all implementations at the same time; a missing one is replaced by the reason."""
    found: dict[str, Pair | str] = {}
    directory = str(tmp_path_factory.mktemp("benchmark"))
    try:
        for implementation in IMPLEMENTATIONS:
            try:
                found[implementation.key] = Pair(implementation, directory)
            except MissingError as exc:
                found[implementation.key] = str(exc)
        yield found
    finally:
        for pair in found.values():
            if isinstance(pair, Pair):
                pair.close()


def tiny(case: Case) -> int:
    """Return a size that is fast."""
    return SIZES.get(case.name, min(case.size, 300))


@pytest.mark.parametrize(
    "implementation", [pytest.param(each, id=each.key) for each in IMPLEMENTATIONS]
)
def test_pair_run_every_case_of_an_implementation(
    implementation: Implementation, pairs: dict[str, Pair | str]
) -> None:
    """Each implementation runs each of its cases repeatedly on one pair."""
    pair = pairs[implementation.key]
    if isinstance(pair, str):
        # A package that only the benchmark needs may be missing, with a message.
        assert "install" in pair or "compiler" in pair
        assert implementation.key not in (ALWAYS | ON_CI if os.environ.get("CI") else ALWAYS)
        return
    assert set(pair.cases) <= {case.name for case in CASES}
    assert pair.cases
    for case in CASES:
        for variant in pair.cases.get(case.name, ()):
            answer = pair.run(case.name, variant, 2, tiny(case))
            assert case.figure in answer, (case, variant)


def test_goals_name_measured_cases(pairs: dict[str, Pair | str]) -> None:
    """Both sides of each goal name a case, and an implementation that has that variant of it."""
    by_name = {each.name: pairs[each.key] for each in IMPLEMENTATIONS}
    titles = {case.title: case.name for case in CASES}
    assert len(titles) == len(CASES)
    for goal in GOALS:
        for title, entry in (goal.over, goal.under):
            name, _, variant = entry.partition(": ")
            pair = by_name[name]
            if isinstance(pair, Pair):
                assert variant in pair.cases[titles[title]], goal
    floor = by_name[STREAM.partition(": ")[0]]
    assert isinstance(floor, Pair)
    assert floor.cases[MEMORY] == [STREAM.partition(": ")[2]]


def test_installed_names_the_missing_package() -> None:
    """installed() raises MissingError with the name of the package, and so does Pair()."""
    with pytest.raises(MissingError, match="no-such-package is not installed"):
        installed("no-such-package")
    absent = Implementation("absent", "absent", python("any.module", packages=["no-such-package"]))
    with pytest.raises(MissingError, match="no-such-package"):
        Pair(absent, "unused")


def test_pair_run_reports_a_failed_process(tmp_path: Path) -> None:
    """If one side dies, run() raises FailedError with its last line and kills the other side."""
    (stdlib,) = (each for each in IMPLEMENTATIONS if each.key == "stdlib")
    pair = Pair(stdlib, str(tmp_path))
    try:
        with pytest.raises(FailedError, match=r"died: .*no such case"):
            pair.run("no such case", "", 1, 1)
    finally:
        pair.close()


def result_of(**times: float) -> dict[str, Any]:
    """Make a result of one case, in which each implementation took the same time in each turn."""
    names = {"ours": OURS, "fds": f"{OURS}: fds()"}
    values = {names.get(key, key): [time] * 3 for key, time in times.items()}
    case = CASES[0]
    cases = {case.title: summary(case, values)}
    # The same types as after reading a file.
    result: dict[str, Any] = json.loads(json.dumps({"cases": cases, "missing": {}, "failed": {}}))
    return result


def test_condensed_keeps_goals_and_ratios() -> None:
    """The kept result has no single values, and gives the same verdicts and comparisons."""
    result = result_of(**{"ours": 2.0, "fds": 1.0, FLOOR: 1.9, STDLIB: 1.0})
    kept = json.loads(as_json(condensed(result)))
    assert "values" not in json.dumps(kept)
    assert judge(kept) == judge(result)
    assert judge(kept)[0].word == "met"
    assert condensed(kept) == kept
    slower = result_of(**{"ours": 3.0, "fds": 1.0, FLOOR: 1.9, STDLIB: 1.0})
    assert compare(kept, slower, 1.1) == compare(result, slower, 1.1)
    factors = [change.worse for change in compare(kept, slower, 1.1).regressions]
    assert factors == pytest.approx([1.5, 1.5], rel=1e-3)


def test_as_json_breaks_long_objects_only() -> None:
    """as_json() writes a short object on one line, and each item of a long one on its own."""
    short = {"a": 1, "b": [2, None]}
    value = {"short": short, "long": {str(number): short for number in range(20)}}
    text = as_json(value)
    assert json.loads(text) == value
    assert text.splitlines()[:3] == [
        "{",
        ' "short": {"a": 1, "b": [2, null]},',
        ' "long": {',
    ]
    assert len(text.splitlines()) == 25


def test_compare_finds_a_regression() -> None:
    """trio_unixconn being slower relative to the others is a regression, on any machine."""
    kept = result_of(ours=2.0, other=1.0, another=4.0)
    slower = result_of(ours=24.0, other=10.0, another=40.0)
    (found,) = compare(kept, slower, 1.1).regressions
    assert found.worse == pytest.approx(1.2)
    assert OURS in found.what
    assert not compare(kept, slower, 1.3).regressions
    assert not compare(kept, result_of(ours=20.0, other=10.0, another=40.0), 1.1).regressions


def test_confirmed_drops_a_slowdown_that_is_not_seen_again() -> None:
    """A slowdown that is not measured again is not a regression."""
    kept = result_of(ours=2.0, other=1.0, another=4.0)
    slower = compare(kept, result_of(ours=24.0, other=10.0, another=40.0), 1.1)
    same = compare(kept, result_of(ours=20.0, other=10.0, another=40.0), 1.1)
    assert confirmed(slower, slower) == slower
    assert confirmed(slower, same).regressions == []
    assert confirmed(slower, same).compared == slower.compared


def test_compare_ignores_one_faster_implementation() -> None:
    """A single other implementation getting faster is not a regression."""
    kept = result_of(ours=2.0, other=1.0, another=4.0, third=3.0)
    assert not compare(
        kept, result_of(ours=2.0, other=0.5, another=4.0, third=3.0), 1.1
    ).regressions


def test_compare_notes_what_was_not_compared() -> None:
    """Implementations in one result only are listed; without a common one, compared is 0."""
    kept, now = result_of(ours=2.0, other=1.0), result_of(ours=2.0, fds=1.0, another=1.0)
    found = compare(kept, now, 1.1)
    assert found.compared == 0
    assert found.notes == [
        "implementation only in the kept result: other",
        f"implementation only in this run: {OURS}: fds()",
        "implementation only in this run: another",
    ]


def test_judge_goals() -> None:
    """A goal is met or missed by the ratio of the two, or not measured."""
    goal = GOALS[0]
    floor = goal.under[1]
    for time, word in ((1.05, "met"), (1.2, "missed")):
        verdict = judge(_renamed(result_of(ours=time, floor=1.0), "floor", floor))[0]
        assert (verdict.goal, verdict.word) == (goal.text, word)
    assert judge(result_of(ours=1.0))[0].word == "not measured"


def _renamed(result: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    for case in result["cases"].values():
        case["implementations"][new] = case["implementations"].pop(old)
    return result
