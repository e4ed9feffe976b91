"""Texts of the recall tasks to learn from, answers alone marked as what is to be predicted."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from linearize.data.text import Tokens, assemble
from linearize.evaluate.recall.tasks import KEYS, TASKS, trial
from linearize.types import InputError

MIX = {"passkey": 0.5, "mqar": 0.5}


def lessons(
    tokenizer: Any,
    tokens: int,
    length: int,
    *,
    mix: Mapping[str, float] = MIX,
    pairs: int | None = None,
    first: int | None = None,
    seed: int = 0,
) -> Tokens:
    """About `tokens` ids in texts of at most `length`, needles at random depths.

    mix: task -> its share. pairs: the most that MQAR holds (None: as many as fit beside as much haystack). Other texts
    than any suite's of a seed below 10^6. Raises InputError where a task does not fit.
    """
    rng, pieces, size = random.Random(f"lessons {seed}"), [], 0
    most = min(len(KEYS), length // 8) if pairs is None else pairs
    if most < 1:
        raise InputError(f"data.length {length} is too short for the recall tasks: give at least 64")
    while size < tokens:
        name = rng.choices(list(mix), list(mix.values()))[0]
        one = trial(
            TASKS[name], tokenizer, length, depth=rng.random(), pairs=rng.randint(1, most),
            seed=10**13 + rng.getrandbits(60), first=first,
        )  # fmt: skip
        learn = np.zeros(len(one.ids_T), dtype=bool)
        for start, stop in one.answers:
            learn[start:stop] = True
        pieces.append(((one.ids_T.numpy().astype(np.int32), learn), True))
        size += len(one.ids_T)
    found = assemble(pieces, {"recall": dict(mix), "length": length, "pairs": most, "seed": seed})
    assert found is not None
    return found
