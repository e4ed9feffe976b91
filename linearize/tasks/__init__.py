"""What differs by what a model is for: its data, what a table is measured on, what a report shows. One file each."""

from __future__ import annotations

from typing import Any

from linearize.tasks.base import Exam, Task

__all__ = ["Exam", "Task", "of"]


def of(name: str) -> type[Task]:
    """The task called so: one of models.TASKS."""
    import importlib

    module: Any = importlib.import_module(f"linearize.tasks.{name}")
    return next(
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Task) and getattr(c, "name", "") == name
    )
