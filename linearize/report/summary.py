"""What convert, eval and report print: the table, lines beside it, two samples, the verdict, where things are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from linearize.report import beside, tables
from linearize.report.schema import Report, Sample

COLOURS = {"good": "green", "weak": "yellow", "dead": "bold red", "failed": "bold red", "unknown": "dim"}
#: Columns of text below which the bytes get a table of their own.
WIDE = 110


def summary(report: Report, folder: str | Path | None = None) -> RenderableType:
    """The report for a terminal of any width. folder: where the model was written."""
    return _Summary(report, folder)


@dataclass(frozen=True)
class _Summary:
    report: Report
    folder: str | Path | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        report, wide = self.report, options.max_width >= WIDE
        yield tables.render(tables.quality_table(report, tables.LENGTHS if wide else ()), "rich")
        for table in (tables.parts_table(report), None if wide else tables.state_table(report)):
            if table is not None and table.rows:
                yield tables.render(table, "rich")
        for line in beside.lines(report.rows, report.generation):
            yield Text(line, style="dim")
        for sample in report.sample[:1] if report.task == "text" else ():
            yield _pair(sample)
        yield Text(f"{report.verdict.headline}.", style=COLOURS[report.verdict.level])
        for line in report.verdict.lines:
            yield Text(f"  {line}")
        if self.folder is not None:
            # Not wrapped: paths are there to be copied.
            for word, path in (("model", Path(self.folder)), ("report", Path(self.folder) / "report.html")):
                yield Text.assemble((f"{word:8}", "dim"), str(path), overflow="ignore", no_wrap=True)


def _pair(sample: Sample) -> Table:
    pair = Table.grid(expand=True, padding=(0, 1))
    pair.add_column(ratio=1)
    pair.add_column(ratio=1)
    pair.add_row(*(
        Panel(Text.assemble((sample.prompt, "dim"), text), title=name, title_align="left", border_style="dim")
        for name, text in (("teacher", sample.teacher), ("student", sample.student))
    ))  # fmt: skip
    return pair
