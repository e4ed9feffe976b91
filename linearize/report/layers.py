"""The table of a model looked at layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from linearize.report import tables


def table(layers: Sequence[Any]) -> tables.Table:
    """evaluate.layers.Layer, a line for each; where two numbers stand, the teacher's is the first."""

    def pair(both: tuple[float, float] | None) -> str:
        return tables.MISSING if both is None else " / ".join(tables.number(value) for value in both)

    def worst(groups: list[float]) -> str:
        return f"{max(groups):.4f} (group {groups.index(max(groups))})" if groups else tables.MISSING

    cells: list[list[tables.Cell]] = [
        [
            str(layer.layer), tables.number(layer.error, 3), tables.number(layer.kl, 4),
            worst(layer.groups),
            *(pair(both) for both in (layer.entropy, layer.monotonicity, layer.reach, layer.rank)),
        ]
        for layer in layers
    ]  # fmt: skip
    columns = ["layer", "error", "alone, KL", "worst group alone", "entropy", "monotonicity", "reach", "rank"]
    notes = [
        "Error: squared, of the mixer's output on the teacher's inputs, over the teacher's. Alone: KL to the teacher,"
        " in nats per token, with that layer, or one key/value group of it, converted and nothing else.",
        "Teacher / student: entropy in nats, rank correlation of weights and logits, mean distance looked back in "
        "tokens, effective rank of the weights.",
    ]
    dearest = {layers.index(max(layers, key=lambda layer: layer.kl))} if layers else set()
    return tables.Table("Layer by layer", columns, cells, strong=dearest, notes=notes).without_empty()
