"""What standard tasks said (lm-eval): the file (lm-eval.json) and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from linearize.report import schema, tables
from linearize.report.looks import Number, Strict
from linearize.report.schema import Model, Provenance, without_paths
from linearize.report.tables import Table

FILE = "lm-eval.json"


class Score(Strict):
    """One metric of one task (evaluate.harness.Score)."""

    task: str
    metric: str
    answers: str = "none"
    value: Number
    stderr: Number = None
    higher_is_better: bool | None = None
    asked: int
    shots: int = 0


class Row(Strict):
    """One variant. state_bytes: what it keeps for a sequence of any length (None: as much as there are tokens)."""

    name: str
    scores: list[Score]
    state_bytes: int | None = None

    def of(self, task: str, metric: str, answers: str = "none") -> Score | None:
        return next((s for s in self.scores if (s.task, s.metric, s.answers) == (task, metric, answers)), None)


class Standard(Provenance):
    """lm-eval.json. lm_eval: its version. requests: SHA-256 of what every row was asked. trained: tokens that the
    student learned from, and at which length. The first row is the teacher's."""

    kind: Literal["lm-eval"] = "lm-eval"
    name: str
    model: Model
    method: str
    plan_digest: str
    seed: int
    lm_eval: str
    requests: str
    trained: dict[str, int] = {}
    settings: Annotated[dict[str, Any], BeforeValidator(without_paths)]
    rows: list[Row]
    notes: list[str] = []


def table(found: Standard) -> Table:
    """A line for each row, a column for each metric of each task."""
    places = list(dict.fromkeys((s.task, s.metric, s.answers) for row in found.rows for s in row.scores))
    lower = {(s.task, s.metric) for row in found.rows for s in row.scores if s.higher_is_better is False}
    columns = [
        f"{task} {metric}{'' if answers == 'none' else f' ({answers})'}{' ↓' if (task, metric) in lower else ''}"
        for task, metric, answers in places
    ]
    cells: list[list[tables.Cell]] = []
    for row in found.rows:
        scores = [row.of(*place) for place in places]
        shown = [tables.MISSING if s is None else tables.number(s.value, 3, s.stderr) for s in scores]
        cells.append([tables.LABELS.get(row.name, row.name), *shown, tables.size(row.state_bytes)])
    notes = [f"lm-eval {found.lm_eval}; ± its standard error over the documents, of each row alone."]
    if lower:
        notes.append("↓: lower is better.")
    counts = dict.fromkeys(f"{s.task} {s.asked:,} at {s.shots} shots" for s in found.rows[0].scores)
    notes += [f"Documents: {', '.join(counts)}.", *found.notes]
    return Table(
        "Standard tasks",
        ["", *columns, "state"],
        cells,
        strong={i for i, row in enumerate(found.rows) if row.name == "student"},
        notes=notes,
    ).without_empty()


def write(found: Standard, folder: Path) -> Path:
    """lm-eval.json in `folder`. Raises StorageError."""
    schema.write(found, folder / FILE)
    return folder / FILE
