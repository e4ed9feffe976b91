"""The three files of a report: report.json, report.html, README.md."""

from __future__ import annotations

from pathlib import Path

from linearize.report import schema
from linearize.report.card import write_card
from linearize.report.html import write_html
from linearize.report.schema import Report


def write_all(report: Report, folder: str | Path) -> None:
    """Writes them into a folder that exists; also how `linearize report` draws them again. Raises StorageError."""
    folder = Path(folder)
    schema.write(report, folder / "report.json")
    write_html(report, folder / "report.html")
    write_card(report, folder)
