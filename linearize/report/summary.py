"""What convert, eval and report print: verdict, table, sample side by side, where things are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from linearize.report import tables
from linearize.report.schema import Report

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = {"good": "green", "weak": "yellow", "dead": "bold red", "failed": "bold red", "unknown": "dim"}
#: Columns of text below which the quality table leaves the bytes to a table of their own.
WIDE = 110


def show(report: Report, console: Console, folder: str | Path | None = None) -> None:
    """Prints the report. folder: where the model was written."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    wide = console.width >= WIDE
    console.print(tables.render(tables.quality_table(report, tables.LENGTHS if wide else ()), "rich"))
    parts = tables.parts_table(report)
    for table in (parts, None if wide else tables.state_table(report)):
        if table is not None:
            console.print(tables.render(table, "rich"))
    for sample in report.sample[:1]:
        pair = Table.grid(expand=True, padding=(0, 1))
        pair.add_column(ratio=1)
        pair.add_column(ratio=1)
        pair.add_row(*(
            Panel(Text.assemble((sample.prompt, "dim"), text), title=name, title_align="left", border_style="dim")
            for name, text in (("teacher", sample.teacher), ("student", sample.student))
        ))  # fmt: skip
        console.print(pair)
    verdict = report.verdict
    console.print(Text(f"{verdict.headline}.", style=COLOURS[verdict.level]))
    for line in verdict.lines:
        console.print(Text(f"  {line}"))
    if folder is not None:
        console.print(Text.assemble(("model   ", "dim"), str(folder)), soft_wrap=True)
        console.print(Text.assemble(("report  ", "dim"), str(Path(folder) / "report.html")), soft_wrap=True)
