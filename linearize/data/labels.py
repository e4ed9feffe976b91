"""Class labels of images and texts as the numbers of a model's head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linearize.types import InputError

#: as a column's name: the labels are not read
NO_LABELS = "none"


def has_head(config: Any) -> bool:
    """Whether a model of `config` ends in a classifier, whose labels are the configuration's."""
    return any("Classification" in name for name in getattr(config, "architectures", None) or [])


def check_labels(labels_N: Tensor | None, config: Any) -> None:
    """Raises InputError where a label is not among the model's classes."""
    if labels_N is None or not has_head(config):
        return
    wrong = labels_N[(labels_N < 0) | (labels_N >= config.num_labels)]
    if len(wrong):
        raise InputError(
            f"label {int(wrong[0])} is outside the model's head, whose {config.num_labels} classes are 0 to "
            f"{config.num_labels - 1}: take the data that belong to this head, or leave the labels out with "
            f"data.label_column: {NO_LABELS}"
        )


def label_numbers(
    labels: Sequence[Any], names: Sequence[str] | None, config: Any, source: Any
) -> tuple[Tensor, list[str]]:
    """(int64 [N], notes): what the head of `config` calls these labels.

    Names are matched with the head's, letters and digits alone; where the head's say nothing (LABEL_0, ...) or there is
    no head, they are numbered in their order. names: what the numbers in `labels` stand for in the data, if known.
    Raises InputError for a name that the head lacks.
    """
    if odd := [label for label in labels if not isinstance(label, str | int)]:
        raise InputError(
            f"{source}: {len(odd)} of {len(labels)} examples have no number or name as label ({odd[0]!r}): give "
            f"them one, or leave labels out with data.label_column: {NO_LABELS}"
        )
    head = {_folded(name): number for name, number in (config.label2id or {}).items()} if has_head(config) else {}
    if all(re.fullmatch(r"label\d+", name) for name in head):
        head = {}
    if names is not None and not isinstance(labels[0], str):
        if head and all(_folded(name) in head for name in names):
            labels = [names[int(label)] for label in labels]
        elif head:
            note = f"the classes have other names than the model's ({names[0]!r}, ...): they are taken by number"
            return torch.tensor([int(label) for label in labels]), [note]
    if not isinstance(labels[0], str):
        return torch.tensor([int(label) for label in labels]), []
    if head:
        for label in labels:
            if _folded(str(label)) not in head:
                raise InputError(
                    f"{source}: class {label!r} is none of the model's {len(config.label2id)} "
                    f"({', '.join(list(config.label2id)[:3])}, ...): name the classes as the model does, or leave them "
                    f"out with data.label_column: {NO_LABELS}"
                )
        return torch.tensor([head[_folded(str(label))] for label in labels]), []
    if all(str(label).isdecimal() for label in labels):
        return torch.tensor([int(label) for label in labels]), []
    order = {name: number for number, name in enumerate(sorted({str(label) for label in labels}))}
    some = ", ".join(f"{name} = {number}" for name, number in list(order.items())[:3])
    numbers = torch.tensor([order[str(label)] for label in labels])
    return numbers, [f"classes are numbered in the order of their names ({some}, ...)"] if has_head(config) else []


def _folded(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()
