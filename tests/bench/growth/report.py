"""What was measured says: slopes, costs of one, a model of more processors; as Markdown and tables.

A slope is the exponent of a power law: the slope of a straight line through the figures of the
largest sizes, where both axes are logarithmic. 1 is linear: twice as many cost twice as much. Each
round has a slope of its own; the median and the quartiles of these are shown.

Invariant: it measures nothing. A result is what ``result.json`` holds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tests._helpers.tables import row_of, table_of
from tests.bench.connections.report import human
from tests.bench.report import Result, Verdict, goal_lines, machine_lines, show_absent, spread

from .workloads import SUBJECTS, TOP, Figure, Subject

if TYPE_CHECKING:
    from rich.console import Console

# By size, what was measured in one round.
Curve = Mapping[int, float]
Spread = dict[str, float]
# Of so many processors the model says what a pool could serve.
PROCESSORS = (1, 2, 4, 8, 16, 32, 64)


def top_of(curve: Curve) -> dict[int, float]:
    """Return the sizes that the slope is of, and what was measured there."""
    largest = max(curve)
    return {
        size: value for size, value in curve.items() if size and size * TOP >= largest and value > 0
    }


def slope_of(curve: Curve) -> float | None:
    """Return the exponent of a curve at its top; None if there are fewer than two sizes."""
    points = [(math.log(size), math.log(value)) for size, value in top_of(curve).items()]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def summary(subject: Subject, rounds: Sequence[Mapping[int, Mapping[str, float]]]) -> Result:
    """Return the figures of a subject: by size, their slope, and the cost of one at the top.

    Args:
      rounds: of each, the figures of each size by name.
    """
    figures = {}
    for name, (figure, chart) in subject.figures.items():
        curves: list[dict[int, float]] = [
            {size: found[name] for size, found in each.items() if name in found} for each in rounds
        ]
        curves = [curve for curve in curves if curve]
        if curves:
            kind = {"unit": chart.unit, "chart": chart.title, "is_of_one": figure.is_of_one}
            figures[name] = {**kind, "most": figure.most, **summary_of(figure, curves)}
    rates = [
        {size: found["rate"] for size, found in each.items() if "rate" in found} for each in rounds
    ]
    more = {"rate": by_size(rates)} if any(rates) else {}
    return {"noun": subject.noun, "one": subject.one, "figures": figures, **more}


def summary_of(figure: Figure, curves: Sequence[Curve]) -> dict[str, Any]:
    """Return medians and quartiles of one figure."""
    slopes = [slope for curve in curves if (slope := slope_of(curve)) is not None]
    largest = max(max(curve) for curve in curves)
    tops = [curve[largest] for curve in curves if largest in curve]
    each = [value if figure.is_of_one else value / largest for value in tops]
    found: dict[str, Any] = {"from": min(top_of(curves[0]), default=largest), "to": largest}
    if slopes:
        found["slope"] = rounded(spread(slopes))
    return {**found, "each": rounded(spread(each)), "values": by_size(curves)}


def by_size(curves: Iterable[Curve]) -> dict[str, Spread]:
    """Return medians and quartiles by size; the sizes are text, as in a file of JSON."""
    values: dict[int, list[float]] = {}
    for curve in curves:
        for size, value in curve.items():
            values.setdefault(size, []).append(value)
    return {str(size): rounded(spread(values[size])) for size in sorted(values)}


def rounded(found: Spread) -> Spread:
    """Return a spread with four digits."""
    return {name: float(f"{value:.4g}") for name, value in found.items()}


################################################################
# A model of more processors
################################################################


def model_of(result: Result) -> Result | None:
    """Return how many connections a second a pool could serve, by the number of processors.

    There are as many workers as processors. The pool's process has one thread, so that it passes on
    as many as fill one processor. A connection costs what it did here with that many workers, or,
    at best, with as many as there are processors here: then a worker has the processor, and its
    caches, to itself.
    """
    subject = result["subjects"].get("workers")
    if subject is None:
        return None
    own, theirs = (subject["figures"][name]["values"] for name in ("pool's process", "workers"))
    costs = {
        int(size): (own[size]["median"], theirs[size]["median"]) for size in own if size in theirs
    }
    here = max(size for size in costs if size <= max(result["processors"], min(costs)))
    dispatcher, worker = costs[here]
    return {
        "workers": here,
        "dispatcher": dispatcher,
        "worker": worker,
        "bound": 1 / dispatcher,
        "from": 1 + worker / dispatcher,
        "best": {str(count): _rate(count, *costs[here]) for count in PROCESSORS},
        "worst": {
            str(count): _rate(count, *costs[count]) for count in PROCESSORS if count in costs
        },
    }


def _rate(processors: int, dispatcher: float, worker: float) -> float:
    return float(f"{min(1 / dispatcher, processors / (dispatcher + worker)):.4g}")


def model_lines(result: Result) -> list[str]:
    """Return the model in Markdown."""
    model = model_of(result)
    if model is None:
        return []
    text = (
        f"With {model['workers']} workers, the pool's process takes "
        f"{human(model['dispatcher'], 'seconds')} of a processor for each connection, and the "
        f"workers take {human(model['worker'], 'seconds')}. So the pool's process is the bound "
        f"from {math.ceil(model['from'])} processors on: it can pass on "
        f"{model['bound']:,.0f} connections a second."
    )
    return [text, ""]


################################################################
# Goals
################################################################


def judge(result: Result) -> list[Verdict]:
    """Hold the slopes against what is linear, or flat."""
    verdicts = []
    for key, subject in result["subjects"].items():
        for name, figure in subject["figures"].items():
            slope, most = figure.get("slope"), figure["most"]
            if most is None:
                continue
            met = None if slope is None else slope["median"] <= most
            verdicts.append(Verdict(f"{key}: {name}", f"at most {most}", slope, met))
    return verdicts


################################################################
# Tables
################################################################


def written(value: float, unit: str) -> str:
    """Write a time, or an amount of memory."""
    if unit == "seconds":
        return f"{value * 1e9:.2f} ns" if value < 1e-7 else human(value, "seconds")
    if value < 10_000:
        return f"{value:,.0f} B"
    return f"{value / 1e3:,.0f} kB" if value < 1e7 else f"{value / 1e6:,.0f} MB"


def size_of(size: int, noun: str) -> str:
    """Write a size; of bytes, as powers of two."""
    if noun.startswith("bytes") and size >= 1024:
        return f"{size // 2**20:,} MiB" if size >= 2**20 else f"{size // 2**10:,} KiB"
    return f"{size:,}"


def slope_cells(figure: Mapping[str, Any]) -> tuple[str, str]:
    """Return the median of a slope, and its quartiles."""
    if "slope" not in figure:
        return "", ""
    # Plus 0, because a slope is not -0.00.
    found = {name: round(value, 2) + 0.0 for name, value in figure["slope"].items()}
    return f"{found['median']:.2f}", f"{found['low']:.2f} to {found['high']:.2f}"


def of_one(figure: Mapping[str, Any]) -> str:
    """Return the cost of one at the top; of what takes no time, how many there are a second."""
    text = written(figure["each"]["median"], figure["unit"])
    if figure["unit"] == "seconds" and figure["each"]["median"]:
        rate = 1 / figure["each"]["median"]
        text += f" ({rate:,.0f} a second)" if rate < 1e7 else f" ({rate / 1e6:,.0f} M a second)"
    return text


def slope_rows(subject: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the slopes of a subject."""
    rows: list[tuple[str, ...]] = []
    for name, figure in subject["figures"].items():
        span = (size_of(figure[each], subject["noun"]) for each in ("from", "to"))
        rows.append((name, *slope_cells(figure), " to ".join(span), of_one(figure)))
    return rows


def slope_headings(subject: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the headings of the table of slopes."""
    return "", "slope", "quartiles", subject["noun"], f"for each {subject['one']}"


def value_rows(subject: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the medians of a subject, a row for each size."""
    figures = subject["figures"]
    sizes = sorted({int(size) for each in figures.values() for size in each["values"]})
    rates = subject.get("rate", {})
    rows = []
    for size in sizes:
        cells = [size_of(size, subject["noun"])]
        for each in figures.values():
            found = each["values"].get(str(size))
            cells.append("" if found is None else written(found["median"], each["unit"]))
        if rates:
            cells.append(f"{rates[str(size)]['median']:,.0f}")
        rows.append(tuple(cells))
    return rows


def value_headings(subject: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the headings of the table of medians."""
    more = ("connections a second",) if "rate" in subject else ()
    return (subject["noun"], *subject["figures"], *more)


def show(result: Result, console: Console) -> None:
    """Print what was measured, and what could not be."""
    for key, subject in result["subjects"].items():
        for headings, rows in (
            (value_headings(subject), value_rows(subject)),
            (slope_headings(subject), slope_rows(subject)),
        ):
            table = table_of(key, headings, range(1, len(headings)))
            for row in rows:
                table.add_row(*row)
            console.print(table)
    for line in [*result["notes"], *model_lines(result)]:
        console.print(line, markup=False)
    show_absent(result, console)


def markdown(result: Result) -> str:
    """Return the tables for the documentation, between the markers that it includes them by."""
    lines = ["<!-- Written by nox -s growth -- --write. -->", "", *machine_lines(result)]
    known = [each.key for each in SUBJECTS]
    for key, subject in sorted(result["subjects"].items(), key=lambda item: known.index(item[0])):
        for what, headings, rows in (
            ("slopes", slope_headings(subject), slope_rows(subject)),
            ("values", value_headings(subject), value_rows(subject)),
        ):
            lines += [f"<!-- begin {what} of {key} -->", "", *row_of(*headings)]
            lines += row_of(*["---"] * len(headings))
            for row in rows:
                lines += row_of(*row)
            lines += ["", f"<!-- end {what} of {key} -->", ""]
    lines += ["<!-- begin model -->", "", *model_lines(result), "<!-- end model -->", ""]
    lines += ["<!-- begin notes -->", "", *(f"- {note}" for note in result["notes"]), ""]
    lines += ["<!-- end notes -->", ""]
    return "\n".join([*lines, *goal_lines(judge(result))]) + "\n"
