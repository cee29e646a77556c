"""The benchmark works: every contestant that is installed runs, and who is not is named."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from cases import CASES, GOALS, MEMORY, OURS, STREAM, Case
from pairs import CONTESTANTS, Contestant, FailedError, MissingError, Pair, installed, python
from report import compare, confirmed, judge, summary

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

# One Python is enough.
pytestmark = pytest.mark.once

# Gigabytes, and thousands of connections, are left to the benchmark.
SIZES = {"bytes, others idle": 2, "memory of an idle connection": 10, "a large buffer": 4096}

# Who is there wherever the tests run, and who must be on CI.
ALWAYS = {"ours", "floor", "stdlib", "reduction", "anyio-trio", "anyio-asyncio"}
ON_CI = {"c", "gio"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Generator[dict[str, Pair | str], None, None]:
    """All contestants, started at once; instead of one that is missing, the reason."""
    found: dict[str, Pair | str] = {}
    folder = str(tmp_path_factory.mktemp("benchmark"))
    try:
        for contestant in CONTESTANTS:
            try:
                found[contestant.key] = Pair(contestant, folder)
            except MissingError as exc:
                found[contestant.key] = str(exc)
        yield found
    finally:
        for pair in found.values():
            if isinstance(pair, Pair):
                pair.close()


def tiny(case: Case) -> int:
    """Return a size that takes no time."""
    return SIZES.get(case.name, min(case.size, 300))


@pytest.mark.parametrize("contestant", [pytest.param(each, id=each.key) for each in CONTESTANTS])
def test_every_case_of_a_contestant_runs(
    contestant: Contestant, pairs: dict[str, Pair | str]
) -> None:
    """Each contestant that is there does each of its cases, again and again, on one pair."""
    pair = pairs[contestant.key]
    if isinstance(pair, str):
        # What the benchmark needs beyond the tests may be missing here, but is named.
        assert "install" in pair or "compiler" in pair
        assert contestant.key not in (ALWAYS | ON_CI if os.environ.get("CI") else ALWAYS)
        return
    assert set(pair.cases) <= {case.name for case in CASES}
    assert pair.cases
    for case in CASES:
        for variant in pair.cases.get(case.name, ()):
            answer = pair.run(case.name, variant, 2, tiny(case))
            assert case.figure in answer, (case, variant)


def test_goals_are_about_what_is_measured(pairs: dict[str, Pair | str]) -> None:
    """Both sides of each goal name a case, and a contestant that does it in that way."""
    by_name = {each.name: pairs[each.key] for each in CONTESTANTS}
    titles = {case.title: case.name for case in CASES}
    assert len(titles) == len(CASES)
    for goal in GOALS:
        for title, who in (goal.over, goal.under):
            name, _, variant = who.partition(": ")
            pair = by_name[name]
            if isinstance(pair, Pair):
                assert variant in pair.cases[titles[title]], goal
    floor = by_name[STREAM.partition(": ")[0]]
    assert isinstance(floor, Pair)
    assert floor.cases[MEMORY] == [STREAM.partition(": ")[2]]


def test_who_is_missing_is_named() -> None:
    """What is not installed raises with its name, and so would its contestant."""
    with pytest.raises(MissingError, match="no-such-package is not installed"):
        installed("no-such-package")
    absent = Contestant("absent", "absent", python("stdlib.py", packages=["no-such-package"]))
    with pytest.raises(MissingError, match="no-such-package"):
        Pair(absent, "unused")


def test_who_fails_is_named(tmp_path: Path) -> None:
    """A contestant that dies is a failure with its last words, and its other side does not stay."""
    (stdlib,) = (each for each in CONTESTANTS if each.key == "stdlib")
    pair = Pair(stdlib, str(tmp_path))
    try:
        with pytest.raises(FailedError, match=r"died: .*no such case"):
            pair.run("no such case", "", 1, 1)
    finally:
        pair.close()


def result_of(**times: float) -> dict[str, Any]:
    """Make a result of one case, in which each contestant always took the same time."""
    names = {"ours": OURS, "fds": f"{OURS}: fds()"}
    values = {names.get(key, key): [time] * 3 for key, time in times.items()}
    case = CASES[0]
    cases = {case.title: summary(case, values)}
    # As it is read from a file.
    result: dict[str, Any] = json.loads(json.dumps({"cases": cases, "missing": {}, "failed": {}}))
    return result


def test_a_regression_is_seen() -> None:
    """Ours being slower beside the others is a regression, on whatever machine."""
    kept = result_of(ours=2.0, other=1.0, another=4.0)
    slower = result_of(ours=24.0, other=10.0, another=40.0)
    (found,) = compare(kept, slower, 1.1).regressions
    assert found.worse == pytest.approx(1.2)
    assert OURS in found.what
    assert not compare(kept, slower, 1.3).regressions
    assert not compare(kept, result_of(ours=20.0, other=10.0, another=40.0), 1.1).regressions


def test_only_what_is_seen_again_is_a_regression() -> None:
    """What was slower once, and not when it was measured again, was the machine."""
    kept = result_of(ours=2.0, other=1.0, another=4.0)
    slower = compare(kept, result_of(ours=24.0, other=10.0, another=40.0), 1.1)
    same = compare(kept, result_of(ours=20.0, other=10.0, another=40.0), 1.1)
    assert confirmed(slower, slower) == slower
    assert confirmed(slower, same).regressions == []
    assert confirmed(slower, same).compared == slower.compared


def test_another_getting_faster_is_none() -> None:
    """What one of the others does alone is not ours."""
    kept = result_of(ours=2.0, other=1.0, another=4.0, third=3.0)
    assert not compare(
        kept, result_of(ours=2.0, other=0.5, another=4.0, third=3.0), 1.1
    ).regressions


def test_what_was_not_compared_is_named() -> None:
    """Who is on one side only is named, and nothing in common is nothing compared."""
    kept, now = result_of(ours=2.0, other=1.0), result_of(ours=2.0, fds=1.0, another=1.0)
    found = compare(kept, now, 1.1)
    assert found.compared == 0
    assert found.notes == [
        "contestant only in the kept result: other",
        f"contestant only in this run: {OURS}: fds()",
        "contestant only in this run: another",
    ]


def test_goals_are_judged() -> None:
    """A goal is met or missed by the ratio of the two, and is not met if nobody measured it."""
    goal = GOALS[0]
    floor = goal.under[1]
    for time, word in ((1.05, "met"), (1.2, "missed")):
        verdict = judge(_renamed(result_of(ours=time, floor=1.0), "floor", floor))[0]
        assert (verdict.goal, verdict.word) == (goal.text, word)
    assert judge(result_of(ours=1.0))[0].word == "not measured"


def _renamed(result: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    for case in result["cases"].values():
        case["contestants"][new] = case["contestants"].pop(old)
    return result
