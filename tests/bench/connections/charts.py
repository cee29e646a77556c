"""Draw the pictures of the kept result: ``python -m tests.bench.connections.charts``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

from tests._helpers.processes import ROOT

mpl.use("Agg")
from matplotlib import pyplot as plt

from tests.bench.report import is_ours

from .report import human
from .workloads import CASES, GROUPS

RESULT = Path(__file__).parent / "result.json"
PICTURES = ROOT / "docs" / "explanation" / "performance"
# Orange and grey differ in lightness too: visible in print, and to the colour-blind.
OURS_COLOUR, OTHER_COLOUR, WHISKERS = "#e69f00", "#9aa5b1", "#333333"
STYLE = {
    # Text stays text, drawn with the fonts of the viewer.
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(result: dict[str, Any], directory: Path = PICTURES) -> list[Path]:
    """Draw a picture for each group of cases; return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(STYLE):
        for group, title in GROUPS.items():
            cases = {
                case.title: result["cases"][case.title]
                for case in CASES
                if case.group == group and case.title in result["cases"]
            }
            if cases:
                path = directory / f"{group}.svg"
                draw_group(title, cases, path)
                written.append(path)
    return written


def draw_group(title: str, cases: dict[str, Any], path: Path) -> None:
    """Draw one picture: a field for each case, a bar for each implementation."""
    sizes = [len(case["implementations"]) for case in cases.values()]
    figure, fields = plt.subplots(
        len(cases),
        1,
        squeeze=False,
        figsize=(8, sum(0.24 * size + 0.75 for size in sizes) + 0.4),
        gridspec_kw={"height_ratios": sizes},
        layout="constrained",
    )
    figure.suptitle(f"{title}: less is better", x=0.01, ha="left", weight="bold")
    for field, (name, case) in zip(fields[:, 0], cases.items(), strict=True):
        draw_case(field, name, case)
    figure.savefig(path, format="svg")
    plt.close(figure)


def draw_case(field: Any, title: str, case: dict[str, Any]) -> None:
    """Draw the bars of a case, the least first, with whiskers from quartile to quartile."""
    rows = sorted(case["implementations"].items(), key=lambda item: -item[1]["median"])
    medians = [row["median"] for _, row in rows]
    whiskers = [
        [row["median"] - row["low"] for _, row in rows],
        [row["high"] - row["median"] for _, row in rows],
    ]
    field.barh(
        [name for name, _ in rows],
        medians,
        xerr=whiskers,
        color=[OURS_COLOUR if is_ours(name) else OTHER_COLOUR for name, _ in rows],
        error_kw={"ecolor": WHISKERS, "elinewidth": 0.8, "capsize": 2},
    )
    for y, (_, row) in enumerate(rows):
        label = human(row["median"], case["figure"])
        field.annotate(
            label, (row["high"], y), (5, 0), textcoords="offset points", va="center", size=8
        )
    for label, (name, _) in zip(field.get_yticklabels(), rows, strict=True):
        label.set_weight("bold" if is_ours(name) else "normal")
    # Space for the figure of the longest bar.
    field.set_xlim(0, max(row["high"] for _, row in rows) * 1.15)
    field.set_xticks([])
    field.spines["bottom"].set_visible(False)
    field.tick_params(axis="y", length=0)
    field.set_title(f"{title} (per {case['unit']})", loc="left", size=9)


if __name__ == "__main__":
    draw(json.loads(RESULT.read_text()))
