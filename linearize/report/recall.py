"""What a recall run found: its file (recall.json), its table, its pictures, its page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator

from linearize.report import html, plots, tables
from linearize.report.looks import Number, Strict
from linearize.report.schema import Model, Provenance, without_paths
from linearize.report.tables import MISSING, Table
from linearize.storage import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENOUGH, QUESTIONS = 0.9, 50  # what the teacher must reach, of how many, for a length to count


class Cell(Strict):
    """Questions answered whole, of those asked (evaluate.recall.suite.Cell)."""

    task: str
    length: int
    depth: Number = None
    pairs: int | None = None
    asked: int
    right: int


class Row(Strict):
    """One variant. state_bytes: what it keeps for a sequence of any length (None: as much as there are tokens).
    buckets: perplexity of real text by range of positions; copy_nll: nats on tokens that stood beyond the window."""

    name: str
    cells: list[Cell]
    state_bytes: int | None = None
    buckets: dict[str, Number] = {}
    perplexity: Number = None
    copy_nll: Number = None

    def of(self, task: str, length: int, pairs: int | None) -> tuple[int, int]:
        """(right, asked) over all depths."""
        some = [c for c in self.cells if (c.task, c.length, c.pairs) == (task, length, pairs)]
        return sum(c.right for c in some), sum(c.asked for c in some)

    def share(self, task: str, length: int, pairs: int | None = None) -> float | None:
        right, asked = self.of(task, length, pairs)
        return right / asked if asked else None


class Recall(Provenance):
    """recall.json. name: of the run. trained: tokens that the student learned from, and at which length. settings: of
    the suite. The first row is the teacher's."""

    kind: Literal["recall"] = "recall"
    name: str
    model: Model
    method: str
    plan_digest: str
    seed: int
    trained: dict[str, int] = {}
    settings: Annotated[dict[str, Any], BeforeValidator(without_paths)]
    rows: list[Row]
    notes: list[str] = []

    def places(self) -> list[tuple[str, int, int | None]]:
        """(task, length, pairs) in the order asked."""
        return list(dict.fromkeys((c.task, c.length, c.pairs) for row in self.rows for c in row.cells))

    def counts(self, task: str, length: int, pairs: int | None) -> bool:
        """Whether the teacher finds there what a student is asked for: 90 % of at least 50 questions."""
        right, asked = self.rows[0].of(task, length, pairs)
        return asked >= QUESTIONS and right >= ENOUGH * asked

    def knee(self, name: str, length: int | None = None, share: float = ENOUGH) -> int | None:
        """The most MQAR pairs up to which this row is right on `share` of the questions, at every smaller number too;
        None where that is not so of the fewest asked."""
        row = next(row for row in self.rows if row.name == name)
        found = None
        for task, at, pairs in sorted(self.places(), key=lambda place: place[2] or 0):
            if task != "mqar" or pairs is None or (length is not None and at != length):
                continue
            value = row.share(task, at, pairs)
            if value is None or value < share:
                break
            found = pairs
        return found


# ------------------------------------------------------------------------------------------------------- tables
def called(task: str, length: int, pairs: int | None) -> str:
    return f"{task}{f' {pairs} pairs' if pairs else ''} {tables.length(length)}"


def table(found: Recall) -> Table:
    """A line for each row, a column for each task and length, over all depths."""
    places = found.places()
    cells = [
        [
            tables.LABELS.get(row.name, row.name),
            *(_cell(found, row, *place) for place in places),
            tables.size(row.state_bytes),
        ]
        for row in found.rows
    ]
    notes = ["Exact match of whole answers, over all depths."]
    if not all(found.counts(*place) for place in places):
        notes.append("In brackets: the teacher is below 90 % there, or was asked fewer than 50 questions; no claim.")
    return Table(
        "Recall",
        ["", *(called(*place) for place in places), "state"],
        cells,
        strong={i for i, row in enumerate(found.rows) if row.name == "student"},
        notes=notes,
    ).without_empty()


def _cell(found: Recall, row: Row, task: str, length: int, pairs: int | None) -> str:
    value = row.share(task, length, pairs)
    if value is None:
        return MISSING
    text = tables.percent(value, 0)
    return text if found.counts(task, length, pairs) else f"({text})"


def text_table(found: Recall) -> Table | None:
    """Perplexity of real text by range of positions; None where it was not measured."""
    names = list(dict.fromkeys(name for row in found.rows for name in row.buckets))
    if not names:
        return None
    cells = [
        [
            tables.LABELS.get(row.name, row.name),
            *(tables.number(row.buckets.get(name)) for name in names),
            tables.number(row.copy_nll, 3),
        ]
        for row in found.rows
    ]
    return Table("Perplexity of real text by position", ["", *names, "copy NLL"], cells)


# ------------------------------------------------------------------------------------------------------ pictures
def heat_map(found: Recall, task: str) -> bytes:
    """Depth against length for one task: a square map for each row, one scale."""
    lengths = list(dict.fromkeys(length for name, length, _ in found.places() if name == task))
    depths = sorted({c.depth for row in found.rows for c in row.cells if c.task == task and c.depth is not None})

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(found.rows), squeeze=False, sharey=True)[0]
        for ax, row in zip(axes, found.rows, strict=True):
            grid = np.full((len(depths), len(lengths)), np.nan)
            for c in row.cells:
                if c.task == task and c.depth is not None:
                    grid[depths.index(c.depth), lengths.index(c.length)] = c.right / c.asked
            ax.imshow(grid, cmap=plots.colormap(), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            for (y, x), value in np.ndenumerate(grid):
                if not np.isnan(value):
                    ax.text(
                        x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7,
                        color=plots.PAPER if value > 0.5 else plots.INK,
                    )  # fmt: skip
            ax.grid(False)
            ax.set_title(tables.LABELS.get(row.name, row.name), fontsize=8)
            ax.set_xticks(range(len(lengths)), [tables.length(n) for n in lengths])
            ax.set_xlabel("tokens")
        axes[0].set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        axes[0].set_ylabel("depth")

    return plots.paint(draw, 1.0 + 0.35 * len(depths))


def pairs_figure(runs: Sequence[tuple[str, Recall]], length: int | None = None) -> bytes:
    """Exact match against MQAR pairs, a line for each student and the first run's teacher, with the state in bytes."""

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        lines = [(runs[0][1], "teacher", "teacher")] if runs else []
        for run, name, title in [*lines, *((run, "student", title) for title, run in runs)]:
            row = next((row for row in run.rows if row.name == name), None)
            places = [p for p in run.places() if p[0] == "mqar" and (length is None or p[1] == length)]
            points = [(p[2], share) for p in places if row and (share := row.share(*p)) is not None]
            if row is None or not points:
                continue
            state = f", {tables.size(row.state_bytes)}" if row.state_bytes else ""
            colour = plots.TEACHER if name == "teacher" else None
            ax.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, label=f"{title}{state}", color=colour)
        ax.axhline(ENOUGH, color=plots.MUTED, linewidth=0.8, linestyle=":")
        ax.set_xscale("log", base=2)
        ax.set(xlabel="pairs of keys and values in the text", ylabel="answered", ylim=(-0.02, 1.02))
        ax.legend(loc="lower left")

    return plots.paint(draw, 4.0)


def page(found: Recall) -> str:
    """The page as text: table, heat maps, provenance."""
    title = f"{found.model.id}, {found.method}: recall"
    shown = [t for t in (table(found), text_table(found)) if t is not None]
    body = [f"<h1>{escape(title)}</h1>", "".join(tables.render(t, "html") for t in shown)]
    for task in dict.fromkeys(c.task for c in found.rows[0].cells if c.depth is not None):
        words = "Share of questions answered, by where the needle stands and how long the text is."
        body.append(html.picture(plots.Drawing(task, f"{task}: depth against length", words, heat_map(found, task))))
    if any(c.pairs for row in found.rows for c in row.cells):
        words = "Pairs that a state of fixed size still holds."
        body.append(html.picture(plots.Drawing("mqar", "MQAR", words, pairs_figure([(found.method, found)]))))
    body.append(html.section("Notes", html.bullets(found.notes)))
    body.append(
        html.section("Provenance", html.provenance(found, {"seed": str(found.seed), "plan": found.plan_digest}))
    )
    return html.document(title, body)


def write(found: Recall, folder: Path) -> list[Path]:
    """recall.json and recall.html in `folder`. Raises StorageError."""
    from linearize.report import schema

    schema.write(found, folder / "recall.json")
    write_atomic(folder / "recall.html", page(found))
    return [folder / "recall.json", folder / "recall.html"]
