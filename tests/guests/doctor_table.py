"""What ``trio-unixconn doctor`` says on several kernels, as a table for the documentation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

DOCTOR: Final = Path(__file__).with_name("doctor.md")


def version_of(report: dict[str, Any]) -> tuple[int, int]:
    """Return the first two numbers of the version of the kernel."""
    found = re.search(r"(\d+)\.(\d+)", report["versions"]["kernel"])
    assert found
    return int(found[1]), int(found[2])


_WORKS: Final = {True: "yes", False: "**no**"}


def unknown(report: dict[str, Any]) -> list[str]:
    """Return what the doctor could not try to the end, with what it observed."""
    return [
        f"{each['name']}: {each['seen']}" for each in report["features"] if each["works"] is None
    ]


def table(reports: Sequence[dict[str, Any]]) -> str:
    """Return the table: a line for each feature, a column for each kernel, oldest first."""
    ordered = sorted(reports, key=version_of)
    versions = [".".join(map(str, version_of(report))) for report in ordered]
    lines = [
        f"| feature | since | {' | '.join(versions)} | without it |",
        "| --- | --- |" + " --- |" * (len(versions) + 1),
    ]
    columns = [{each["name"]: each for each in report["features"]} for report in ordered]
    for name, feature in columns[-1].items():
        works = [_WORKS[column[name]["works"]] for column in columns]
        lines.append(
            f"| {name} | {feature['since']} | {' | '.join(works)} | {feature['otherwise']} |"
        )
    seen = "\n".join(
        f"- {version}: {name}: {feature['seen']}"
        for version, column in zip(versions, columns, strict=True)
        for name, feature in column.items()
        if feature["works"] is False
    )
    return "\n".join(lines) + f"\n\nWhat was seen where it says no:\n\n{seen}\n"


def write_table(reports: Sequence[dict[str, Any]]) -> None:
    """Keep the table for the documentation.

    Raises:
      ValueError: a report does not say of each feature whether it works.
    """
    for report in reports:
        if found := unknown(report):
            raise ValueError(f"{report['versions']['kernel']}: {'; '.join(found)}; run it again")
    DOCTOR.write_text(table(reports))
