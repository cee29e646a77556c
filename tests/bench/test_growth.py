"""The benchmark of growth works: each subject is measured, and slopes are those of the curves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import nullcontext

import pytest

from tests.bench.growth.connections import LEAST_FOR_MEMORY
from tests.bench.growth.measure import MEASURES
from tests.bench.growth.report import judge, markdown, model_of, slope_of, summary
from tests.bench.growth.runner import RESULT, TABLES, limits, measured, run, sizes_of
from tests.bench.growth.workloads import SUBJECTS, Subject
from tests.bench.implementations import FailedError

# One Python is enough.
pytestmark = [pytest.mark.slow, pytest.mark.once]

BY_KEY = {each.key: each for each in SUBJECTS}


@pytest.mark.parametrize("subject", [pytest.param(each, id=each.key) for each in SUBJECTS])
def test_measured_has_each_figure(subject: Subject) -> None:
    """A process measures all figures of a subject that are declared, but no memory of few."""
    size = min(subject.quick[0], 10)
    assert size < LEAST_FOR_MEMORY
    found = measured(subject, [size])[size]
    expected = {
        name
        for name, (_, chart) in subject.figures.items()
        if chart.unit == "seconds" or subject.key == "workers"
    }
    assert set(found) - {"rate"} == expected
    assert ("rate" in found) == (subject.key == "workers")
    assert all(value >= 0 for value in found.values())


def test_measured_raises_what_a_process_said() -> None:
    """A process that dies is a failure, with its last line of errors."""
    with pytest.raises(FailedError, match=r"descriptors died: .*254"):
        measured(BY_KEY["descriptors"], [254])


def test_run_says_how_many_rounds_there_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is the number asked for, or from the smallest to the largest of the subjects."""

    def each_one(subject: Subject, sizes: Iterable[int]) -> dict[int, dict[str, float]]:
        return {size: dict.fromkeys(subject.figures, float(size)) for size in sizes}

    monkeypatch.setattr("tests.bench.growth.runner.measured", each_one)
    monkeypatch.setattr("tests.bench.growth.runner.no_autogroup", nullcontext)
    subjects = [BY_KEY["data"], BY_KEY["descriptors"]]
    assert run(subjects, None, quick=False)["rounds"] == "3 to 5"
    assert run(subjects[:1], None, quick=False)["rounds"] == "3"
    result = run(subjects, 1, quick=False)
    assert result["rounds"] == "1"
    assert "a full run of 1 round." in markdown(result)


def test_slope_of_a_power_law() -> None:
    """The slope is the exponent at the top, without what is constant below it, and without 0."""
    curve = {0: 1.0, 1: 500.0, 10: 500.0} | {size: 2e-6 * size**1.5 for size in (100, 300, 1000)}
    assert slope_of(curve) == pytest.approx(1.5)
    assert slope_of({1: 2.0, 1000: 3.0}) is None
    assert slope_of({1000: -1.0, 2000: 3.0}) is None


def test_judge_expects_linear_and_flat() -> None:
    """What is linear is met with a slope of 1, what must not grow with 0; one size has no slope."""
    subject = BY_KEY["serve_unix"]
    rounds = [
        {
            size: {name: value for name, (figure, _) in subject.figures.items()}
            | {"round trip": value * grows}
            for size, value, grows in ((1000, 1.0 * bad, 1.0), (2000, 2.0, 0.5))
        }
        for bad in (1.0, 0.5)
    ]
    words = [
        {verdict.goal: verdict.word for verdict in judge({"subjects": {"serve_unix": found}})}
        for found in (summary(subject, [each]) for each in rounds)
    ]
    assert words[0]["serve_unix: accept"] == words[0]["serve_unix: round trip"] == "met"
    assert words[1]["serve_unix: accept"] == words[1]["serve_unix: round trip"] == "missed"
    assert not [goal for goal in words[0] if "collector" in goal]
    one = summary(subject, [{1000: rounds[0][1000]}])
    assert {each.word for each in judge({"subjects": {"serve_unix": one}})} == {"not measured"}


def test_limits_names_sizes_that_are_left_out() -> None:
    """What a process may have too few file descriptors for is left out, and named."""
    subject = BY_KEY["serve_unix"]
    chosen = {"serve_unix": sizes_of(subject, quick=False, most=20_000)}
    assert max(chosen["serve_unix"]) == 19_000
    (note,) = limits([subject], chosen, 20_000, quick=False)
    assert "50,000 connections were not measured" in note
    assert sizes_of(subject, quick=False, most=60_000)[-1] == 50_000


def test_model_of_one_process_that_accepts() -> None:
    """The rate grows with the processors until one process fills one."""
    figures = {"pool's process": 1e-5, "workers": 3e-5}
    subject = summary(BY_KEY["workers"], [dict.fromkeys((1, 2, 4, 8), figures)])
    model = model_of({"processors": 2, "subjects": {"workers": subject}})
    assert model is not None
    assert (model["workers"], model["from"]) == (2, pytest.approx(4))
    assert model["best"]["2"] == pytest.approx(50_000)
    assert model["best"]["64"] == model["worst"]["8"] == pytest.approx(100_000)
    assert model_of({"subjects": {}}) is None


def test_kept_result_is_whole() -> None:
    """The kept result has each subject, and its tables are those of the documentation."""
    assert set(MEASURES) == set(BY_KEY)
    result = json.loads(RESULT.read_text())
    assert set(result["subjects"]) == set(BY_KEY)
    assert result["failed"] == {}
    assert markdown(result) == TABLES.read_text()
