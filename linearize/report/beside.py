"""Figures beside the table, one line each, the same words in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence

from linearize.report import tables
from linearize.report.schema import Generation, Row


def lines(rows: Sequence[Row], made: Generation | None) -> list[str]:
    """The lines of what was measured: the student's error by depth, and its own text."""
    found = (depth(rows), None if made is None else continuations(made))
    return [line for line in found if line is not None]


def depth(rows: Sequence[Row]) -> str | None:
    """The student's residual stream after the first, the middle and the last layer; None where it was not measured."""
    error = next((row.residual_error for row in rows if row.name == "student"), None)
    if not error:
        return None
    places = sorted({1, (len(error) + 1) // 2, len(error)})
    shown = ", ".join(tables.number(error[place - 1], 3) for place in places)
    return (
        f"The student's residual stream is off by {shown} of the teacher's after {', '.join(map(str, places))} "
        f"layer{'s' if len(error) > 1 else ''}."
    )


def continuations(made: Generation) -> str:
    """How likely the teacher finds what each wrote, and how often they repeat themselves."""
    own, other = tables.number(made.nll_teacher, 3), tables.number(made.nll_student, 3)
    repeats = f"{tables.percent(made.repetition_teacher)} against {tables.percent(made.repetition_student)}"
    return (
        f"The teacher's nats per token on its own continuations: {own}, on the student's: {other}. Repeated 4-grams: "
        f"{repeats}."
    )
