"""Draw the pictures of the documentation as SVG, from descriptions in ``docs/pictures``.

The SVG becomes a part of the page, so that it has the fonts and the colours of the page, in the
light and in the dark theme: ``_static/custom.css`` has a colour for each class. A description is
lines of commands, with coordinates in pixels of a picture that is 520 wide:

    title TEXT                          what the picture shows, for screen readers
    box CLASS X Y WIDTH HEIGHT | TEXT | TEXT...
    text CLASS X Y start|middle|end | TEXT
    arrow CLASS X,Y X,Y... | TEXT       with a head at the end, and the text at its middle
    line CLASS X,Y X,Y...

Pictures of what processes say to each other have lanes, and commands that go down step by step:

    lane NAME X | TEXT
    message CLASS FROM TO | TEXT        an arrow from a lane to another
    note CLASS LANE WIDTH | TEXT | TEXT...
    end LANE | TEXT                     the process of this lane ends here
    gap PIXELS

Directives of Sphinx: ``{picture} NAME``, with a caption as its content; ``{chart} GROUP``, charts
of the kept result of the benchmark; ``{handover-chart}``, those of servers that are replaced under
load; ``{growth-chart} KEY``, how cost grows; ``{rows} FILE``, some rows and columns of a table in
Markdown.
"""

from __future__ import annotations

import html
import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sphinx.application import Sphinx
    from sphinx.util.typing import OptionSpec

PICTURES = Path(__file__).parent / "pictures"
BENCH = Path(__file__).parents[1] / "tests" / "bench"
RESULT = BENCH / "connections" / "result.json"
HANDOVER_RESULT = BENCH / "handover" / "result.json"
GROWTH_RESULT = BENCH / "growth" / "result.json"
WIDTH = 520
LINE = 18
HEAD = 8

Point = tuple[float, float]


class Drawing:
    """Shapes, and the height that they need."""

    def __init__(self) -> None:
        self.shapes: list[str] = []
        self.height = 0.0

    def _add(self, shape: str, bottom: float) -> None:
        self.shapes.append(shape)
        self.height = max(self.height, bottom)

    def box(self, kind: str, x: float, y: float, width: float, height: float) -> None:
        """Draw a rectangle with round corners."""
        self._add(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
            ' rx="5"/>',
            y + height,
        )

    def text(self, kind: str, x: float, y: float, anchor: str, text: str) -> None:
        """Write one line; y is its base line."""
        if text:
            self._add(
                f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">'
                f"{html.escape(text)}</text>",
                y + 5,
            )

    def lines(self, kind: str, x: float, y: float, texts: Sequence[str]) -> None:
        """Write lines in the middle of a point."""
        top = y - LINE * (len(texts) - 1) / 2 + 5
        for i, text in enumerate(texts):
            self.text(kind, x, top + LINE * i, "middle", text)

    def path(self, kind: str, points: Sequence[Point]) -> None:
        """Draw a line through points."""
        where = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._add(f'<polyline class="{kind}" points="{where}"/>', max(y for _, y in points))

    def dot(self, kind: str, x: float, y: float) -> None:
        """Draw a point."""
        self._add(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>', y + 3)

    def arrow(self, kind: str, points: Sequence[Point]) -> None:
        """Draw a line through points, with a head at its end."""
        (x1, y1), (x2, y2) = points[-2:]
        length = math.hypot(x2 - x1, y2 - y1)
        dx, dy = (x2 - x1) / length, (y2 - y1) / length
        bx, by = x2 - HEAD * dx, y2 - HEAD * dy
        self.path(kind, [*points[:-1], (bx, by)])
        side = HEAD / 2
        head = [(x2, y2), (bx - side * dy, by + side * dx), (bx + side * dy, by - side * dx)]
        where = " ".join(f"{x:.1f},{y:.1f}" for x, y in head)
        self.shapes.append(f'<polygon class="head {kind}" points="{where}"/>')

    def svg(self, title: str, kind: str) -> str:
        """Return the picture."""
        return (
            f'<svg class="drawing {kind}" viewBox="0 0 {WIDTH} {self.height + 6:g}" role="img"'
            f' xmlns="http://www.w3.org/2000/svg"><title>{html.escape(title)}</title>'
            + "".join(self.shapes)
            + "</svg>"
        )


################################################################
# Descriptions
################################################################


def points_of(words: Sequence[str]) -> list[Point]:
    """Return points written as X,Y."""
    pairs = [word.split(",") for word in words]
    return [(float(x), float(y)) for x, y in pairs]


class Description:
    """Draws the commands of a description."""

    def __init__(self) -> None:
        self.title = ""
        self.drawing = Drawing()
        self.lanes: dict[str, tuple[float, float]] = {}
        self.y = 0.0

    def do(self, line: str) -> None:
        """Draw one command."""
        command, *texts = (each.strip() for each in line.split("|"))
        name, *words = command.split()
        if name == "title":
            self.title = command.removeprefix("title ")
        else:
            getattr(self, f"do_{name}")(words, texts)

    def do_box(self, words: list[str], texts: list[str]) -> None:
        kind, x, y, width, height = words[0], *map(float, words[1:])
        self.drawing.box(kind, x, y, width, height)
        self.drawing.lines(f"in-{kind}", x + width / 2, y + height / 2, texts)

    def do_text(self, words: list[str], texts: list[str]) -> None:
        kind, x, y, anchor = words
        for i, text in enumerate(texts):
            self.drawing.text(kind, float(x), float(y) + LINE * i, anchor, text)

    def do_line(self, words: list[str], _texts: list[str]) -> None:
        self.drawing.path(words[0], points_of(words[1:]))

    def do_arrow(self, words: list[str], texts: list[str]) -> None:
        points = points_of(words[1:])
        self.drawing.arrow(words[0], points)
        parts = itertools.pairwise(points)
        (x1, y1), (x2, y2) = max(parts, key=lambda part: math.dist(*part))
        for i, text in enumerate(reversed(texts)):
            y = (y1 + y2) / 2 - 7 - LINE * i
            self.drawing.text("label", (x1 + x2) / 2, y, "middle", text)

    def do_lane(self, words: list[str], texts: list[str]) -> None:
        name, x = words[0], float(words[1])
        width = max(map(len, texts)) * 8 + 20
        height = LINE * len(texts) + 12
        self.drawing.box("lane", x - width / 2, 1, width, height)
        self.drawing.lines("in-lane", x, 1 + height / 2, texts)
        self.lanes[name] = (x, 1 + height)
        self.y = max(self.y, height + 8)

    def do_gap(self, words: list[str], _texts: list[str]) -> None:
        self.y += float(words[0])

    def do_message(self, words: list[str], texts: list[str]) -> None:
        kind, sender, receiver = words
        one, two = self.lanes[sender][0], self.lanes[receiver][0]
        self.y += 14 + LINE * len(texts)
        for i, text in enumerate(reversed(texts)):
            self.drawing.text("label", (one + two) / 2, self.y - 7 - LINE * i, "middle", text)
        shift = 2 if one < two else -2
        self.drawing.arrow(kind, [(one + shift, self.y), (two - shift, self.y)])

    def do_note(self, words: list[str], texts: list[str]) -> None:
        kind, lane, width = words[0], words[1], float(words[2])
        height = LINE * len(texts) + 10
        self.y += 12
        x = self.lanes[lane][0]
        x = min(max(x, width / 2 + 1), WIDTH - width / 2 - 1)
        self.drawing.box(f"{kind} over", x - width / 2, self.y, width, height)
        self.drawing.lines(f"in-{kind}", x, self.y + height / 2, texts)
        self.y += height

    def do_end(self, words: list[str], texts: list[str]) -> None:
        x, top = self.lanes.pop(words[0])
        self.y += 22
        self._lane_line(x, top, self.y)
        for sign in (1, -1):
            self.drawing.path("dead", [(x - 7, self.y - 7 * sign), (x + 7, self.y + 7 * sign)])
        anchor, shift = ("end", -14) if x > WIDTH / 2 else ("start", 14)
        for i, text in enumerate(texts):
            self.drawing.text("label", x + shift, self.y + 5 + LINE * i, anchor, text)
        self.y += 4

    def _lane_line(self, x: float, top: float, bottom: float) -> None:
        self.drawing.path("lane", [(x, top), (x, bottom)])
        # Under the notes.
        self.drawing.shapes.insert(0, self.drawing.shapes.pop())

    def svg(self) -> str:
        """Return the picture."""
        for x, top in self.lanes.values():
            self._lane_line(x, top, self.y + 16)
        return self.drawing.svg(self.title, "picture")


def draw(text: str) -> str:
    """Return the picture of a description."""
    description = Description()
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            try:
                description.do(line)
            except (AttributeError, KeyError, TypeError, ValueError) as exc:
                raise ValueError(f"line {number}: {line!r}: {exc!r}") from exc
    return description.svg()


################################################################
# Charts
################################################################


def draw_case(title: str, case: dict[str, Any]) -> str:
    """Return a chart of one case: a bar for each implementation, the shortest time first."""
    from tests.bench.connections.report import human
    from tests.bench.report import is_ours

    drawing = Drawing()
    rows = sorted(case["implementations"].items(), key=lambda item: item[1]["median"])
    longest = max(row["high"] for _, row in rows)
    # A single slow one would leave nothing to see of the others.
    median = sorted(row["high"] for _, row in rows)[len(rows) // 2]
    longest = min(longest, 6 * median)
    scale = (WIDTH - 90) / longest
    drawing.text("heading", 0, 16, "start", f"{title}, per {case['unit']}")
    y = 26.0
    for name, row in rows:
        kind = "ours" if is_ours(name) else "other"
        drawing.text(f"name {kind}", 0, y + 14, "start", name)
        length = min(row["median"], longest) * scale
        drawing.box(f"bar {kind}", 0, y + 21, max(length, 1), 9)
        end = length
        if row["high"] <= longest:
            low, end = row["low"] * scale, row["high"] * scale
            drawing.path("whisker", [(low, y + 25.5), (end, y + 25.5)])
        else:
            drawing.path("cut", [(length - 14, y + 33), (length - 8, y + 18)])
        drawing.text("figure", end + 8, y + 31, "start", human(row["median"], case["figure"]))
        y += 40
    return drawing.svg(f"{title}: {len(rows)} implementations, less is better", "chart")


def draw_servers(title: str, values: dict[str, float], form: str) -> str:
    """Return a chart of one figure: a bar for each server, in the order of the result."""
    from tests.bench.report import is_ours

    drawing = Drawing()
    scale = (WIDTH - 90) / max(*values.values(), 1e-9)
    drawing.text("heading", 0, 16, "start", title)
    y = 26.0
    for name, value in values.items():
        kind = "ours" if is_ours(name) else "other"
        drawing.text(f"name {kind}", 0, y + 14, "start", name)
        drawing.box(f"bar {kind}", 0, y + 21, max(value * scale, 1), 9)
        drawing.text("figure", value * scale + 8, y + 31, "start", format(value, form))
        y += 40
    return drawing.svg(f"{title}: {len(values)} servers, less is better", "chart")


# Of charts of growth: what is left of the plot, right of it, and above it; and its height.
LEFT, RIGHT, ABOVE, PLOT = 62, 182, 30, 190
# The least distance of two names.
APART = 36
# An axis of bytes has a mark at each of these powers of two, all others at powers of ten.
BYTES_BASE = 64


class LogAxis:
    """A logarithmic axis, from one mark to another."""

    def __init__(self, low: float, high: float, base: float, begin: float, end: float) -> None:
        self.base = base
        # Not math.log(value, base), which is 2.9999999999999996 for 1000.
        first = math.floor(round(self._power(low), 6))
        last = max(first + 1, math.ceil(round(self._power(high), 6)))
        self.powers = range(first, last + 1)
        self.begin, self.scale = begin, (end - begin) / (last - first)

    def _power(self, value: float) -> float:
        return math.log10(value) / math.log10(self.base)

    def at(self, value: float) -> float:
        """Return where a value is."""
        return self.begin + (self._power(value) - self.powers[0]) * self.scale

    def marks(self, most: int) -> list[float]:
        """Return the values of the marks, at most so many."""
        step = -(-len(self.powers) // most)
        return [float(self.base) ** power for power in self.powers[::step]]


def mark_of(value: float, unit: str) -> str:
    """Write a value of an axis."""
    if unit == "seconds":
        scales = [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")]
    elif unit == "bytes":
        scales = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")]
    else:
        return f"{value:,.0f}"
    scale, name = next(each for each in scales if value >= each[0] * 0.999)
    return f"{value / scale:,.0f} {name}"


# Of one curve: its name, a line under the name, and by size the median and the quartiles.
Series = tuple[str, str, dict[int, dict[str, float]]]


def draw_growth(title: str, unit: str, noun: str, series: Sequence[Series], guide: str) -> str:
    """Return a chart of curves, on logarithmic axes, with a dotted line of slope 1.

    Args:
      guide: the name of the curve through whose last point that line is; "" for none.
    """
    from tests.bench.growth.report import size_of

    drawing = Drawing()
    drawing.text("heading", 0, 16, "start", title)
    sizes = [size for *_, curve in series for size in curve]
    values = [each[key] for *_, curve in series for each in curve.values() for key in each]
    bottom, right = ABOVE + PLOT, WIDTH - RIGHT
    base = BYTES_BASE if noun.startswith("bytes") else 10
    across = LogAxis(min(sizes), max(sizes), base, LEFT, right)
    up = LogAxis(min(each for each in values if each > 0), max(values), 10, bottom, ABOVE)
    for mark in up.marks(7):
        drawing.path("grid", [(LEFT, up.at(mark)), (right, up.at(mark))])
        drawing.text("figure", LEFT - 6, up.at(mark) + 4, "end", mark_of(mark, unit))
    for mark in across.marks(6):
        drawing.path("grid", [(across.at(mark), ABOVE), (across.at(mark), bottom)])
        drawing.text("figure", across.at(mark), bottom + 17, "middle", size_of(round(mark), noun))
    drawing.text("label", (LEFT + right) / 2, bottom + 36, "middle", noun)
    names = []
    for number, (name, below, curve) in enumerate(series):
        kind = f"series{number % 4}"
        points = [
            (across.at(size), up.at(each["median"]))
            for size, each in sorted(curve.items())
            if each["median"] > 0
        ]
        if name == guide:
            size = max(curve)
            value = curve[size]["median"]
            least = max(min(sizes), size * float(10) ** up.powers[0] / value)
            drawing.path(
                "dashed",
                [(across.at(least), up.at(value * least / size)), (across.at(size), up.at(value))],
            )
        for size, each in curve.items():
            if 0 < each["low"] < each["high"]:
                x = across.at(size)
                drawing.path("whisker", [(x, up.at(each["low"])), (x, up.at(each["high"]))])
        drawing.path(kind, points)
        for point in points:
            drawing.dot(kind, *point)
        names.append((points[-1][1], number, name, below))
    y = -math.inf
    # The lowest name is at the bottom, if there are as many as fit.
    tops = []
    for wanted, *_ in sorted(names):
        y = max(wanted, y + APART)
        tops.append(y)
    shift = max(0.0, tops[-1] + LINE - bottom)
    for top, (_, number, name, below) in zip(tops, sorted(names), strict=True):
        drawing.dot(f"series{number % 4}", right + 12, top - shift)
        drawing.text(f"name series{number % 4}", right + 20, top - shift + 4, "start", name)
        drawing.text("figure", right + 20, top - shift + 4 + LINE - 2, "start", below)
    curves = ", ".join(f"{name} ({below})" for name, below, _ in series)
    return drawing.svg(f"{title}, by the number of {noun}: {curves}", "chart")


def growth_series(figure: dict[str, Any]) -> dict[int, dict[str, float]]:
    """Return what is drawn of a figure: sizes that a logarithmic axis has."""
    return {int(size): each for size, each in figure["values"].items() if int(size)}


def draw_subject(subject: dict[str, Any]) -> list[str]:
    """Return the charts of a subject of the benchmark of growth."""
    from tests.bench.growth.report import slope_cells

    charts: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, figure in subject["figures"].items():
        charts.setdefault(figure["chart"], []).append((name, figure))
    drawn = []
    for title, figures in charts.items():
        series: list[Series] = []
        for name, figure in figures:
            median, quartiles = slope_cells(figure)
            below = f"slope {median} ({quartiles})" if median else "of one size"
            series.append((name, below, growth_series(figure)))
        grows = [name for name, figure in figures if not figure["is_of_one"]]
        unit = figures[0][1]["unit"]
        drawn.append(draw_growth(title, unit, subject["noun"], series, [*grows, ""][0]))
    return drawn


def draw_model(result: dict[str, Any]) -> str:
    """Return a chart of what the model of more processors says, beside what was measured."""
    curves = [
        {
            int(count): dict.fromkeys(("median", "low", "high"), rate)
            for count, rate in result["model"][key].items()
        }
        for key in ("best", "worst")
    ]
    count = result["processors"]
    rates = result["subjects"]["workers"]["rate"].values()
    measured = {count: max(rates, key=lambda each: each["median"])}
    series: list[Series] = [
        ("measured", "with the clients", measured),
        ("model, at best", "workers to themselves", curves[0]),
        ("model, at worst", "as on this machine", curves[1]),
    ]
    return draw_growth("Connections a second", "rate", "processors", series, "")


class Picture(SphinxDirective):
    """``{picture} NAME``: the picture of a description, with the content as its caption."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        path = PICTURES / f"{self.arguments[0]}.txt"
        self.env.note_dependency(str(path))
        figure = nodes.figure("", nodes.raw("", draw(path.read_text()), format="html"))
        figure["classes"].append("drawing")
        if self.content:
            caption = nodes.caption()
            parsed, _ = self.state.inline_text(" ".join(self.content), self.lineno)
            caption += parsed
            figure += caption
        return [figure]


class Chart(SphinxDirective):
    """``{chart} GROUP``: the kept result of a group of cases, or with ``:case:`` of one of them."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        from tests.bench.connections.workloads import CASES

        self.env.note_dependency(str(RESULT))
        cases = json.loads(RESULT.read_text())["cases"]
        name = self.arguments[0]
        titles = [case.title for case in CASES if name in {case.group, case.title}]
        drawn = [draw_case(title, cases[title]) for title in titles if title in cases]
        if not drawn:
            raise self.error(f"no case of this name has a kept result: {name}")
        return [nodes.raw("", f'<div class="charts">{"".join(drawn)}</div>', format="html")]


class HandoverChart(SphinxDirective):
    """``{handover-chart}``: what clients have noticed of servers that were replaced."""

    def run(self) -> list[nodes.Node]:
        from tests.bench.handover.report import MILLI, lost

        self.env.note_dependency(str(HANDOVER_RESULT))
        servers = json.loads(HANDOVER_RESULT.read_text())["compared"]["servers"]
        gaps = {name: MILLI * row["during"]["gap"] for name, row in servers.items()}
        losses = {
            name: 1000 * lost(row["during"]) / row["during"]["begun"]
            for name, row in servers.items()
        }
        drawn = [
            draw_servers("Longest time without an answer, in milliseconds", gaps, ".1f"),
            draw_servers("Requests lost or late, of 1,000", losses, ".3g"),
        ]
        return [nodes.raw("", f'<div class="charts">{"".join(drawn)}</div>', format="html")]


class GrowthChart(SphinxDirective):
    """``{growth-chart} KEY``: how the cost of a subject grows; ``model``, with more processors."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(GROWTH_RESULT))
        result = json.loads(GROWTH_RESULT.read_text())
        key = self.arguments[0]
        if key == "model":
            drawn = [draw_model(result)]
        elif key in result["subjects"]:
            drawn = draw_subject(result["subjects"][key])
        else:
            raise self.error(f"no subject of this name has a kept result: {key}")
        return [nodes.raw("", f'<div class="charts">{"".join(drawn)}</div>', format="html")]


class Rows(SphinxDirective):
    """``{rows} FILE``: the rows of its first table that begin with the lines of the content.

    ``:columns:`` names the columns after the first one, by their headings.
    """

    required_arguments = 1
    has_content = True
    option_spec: ClassVar[OptionSpec] = {"columns": str}

    def run(self) -> list[nodes.Node]:
        path = Path(self.env.doc2path(self.env.docname)).parent / self.arguments[0]
        self.env.note_dependency(str(path))
        lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
        table = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
        heads = [head.strip("`") for head in table[0]]
        wanted = [name.strip() for name in self.options["columns"].split(",")]
        if unknown := set(wanted) - set(heads):
            raise self.error(f"no such columns: {unknown}")
        columns = [0, *map(heads.index, wanted)]
        rows = {row[0]: row for row in table[2:]}
        if unknown := set(self.content) - set(rows) - {""}:
            raise self.error(f"no such rows: {unknown}")
        chosen = [table[0], table[1], *(rows[line] for line in self.content if line)]
        text = "\n".join(f"| {' | '.join(row[i] for i in columns)} |" for row in chosen)
        container = nodes.container(classes=["faults"])
        self.state.nested_parse(StringList(text.splitlines()), self.content_offset, container)
        return [container]


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directives."""
    app.add_directive("picture", Picture)
    app.add_directive("chart", Chart)
    app.add_directive("handover-chart", HandoverChart)
    app.add_directive("growth-chart", GrowthChart)
    app.add_directive("rows", Rows)
    return {"parallel_read_safe": True}
