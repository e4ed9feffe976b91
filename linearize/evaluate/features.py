"""How good a converted encoder is: every variant of one model on the same examples, against the teacher's own outputs.

A variant is a name and a context manager factory, as in quality.py. For each batch the teacher's outputs are computed
once and the variants are compared with them. A score has one entry per example, so that intervals come from resampling
examples, the same ones for all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.data.examples import Examples
from linearize.evaluate.quality import TEACHER, Variant, chosen, evaluating
from linearize.progress import bar
from linearize.stages.targets import outputs
from linearize.types import GateError, InputError

Pool = Callable[[Tensor, dict[str, Tensor]], Tensor]

#: means over examples, by the name of what a score holds
MEANS = ("accuracy", "agreement", "kl", "cosine", "dense_cosine", "mrr")


@dataclass(frozen=True)
class Score:
    """One variant on all examples; what was not measured is missing. Float64, [examples].

    accuracy: its likeliest class is the label; agreement: is the teacher's; kl: KL(teacher || variant) of the classes,
    nats; cosine: of the pooled feature to the teacher's; dense_cosine: of the last hidden state, mean over the tokens.
    mrr: reciprocal rank of the other half of a passage. pairs: what it makes of scored pairs (cosine), for the rank
    correlation with the scores people gave.
    """

    name: str
    values: dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table: means, `spearman` (of pairs), `retained` (the share of the teacher's accuracy, else of its
    Spearman correlation); intervals: 95 %, over examples."""

    name: str
    documents: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


def compare(
    model: nn.Module,
    data: Examples,
    variants: Sequence[Variant],
    *,
    teacher: Callable[[], AbstractContextManager[Any]],
    pool: Pool,
    classify: bool,
    batch: int = 32,
    progress: bool | None = None,
) -> list[Score]:
    """Scores of the teacher, first, and of each variant on `data`. pool: the feature of an example. classify: whether
    the model ends in a classifier. Raises InputError for no examples, GateError where outputs are not finite."""
    if not len(data):
        raise InputError("evaluation needs at least one example")
    names = [TEACHER, *(name for name, _ in variants)]
    if len(set(names)) < len(names):
        raise InputError(f"two rows of one name: {', '.join(names)}")
    parts: dict[str, list[dict[str, Tensor]]] = {name: [] for name in names}
    with evaluating(model), bar("evaluation", len(data) * len(names), progress) as advance:
        for start in range(0, len(data), batch):
            items = [data[i] for i in range(start, min(start + batch, len(data)))]
            given = data.collate(items)
            with teacher() as other:
                known = _outputs(chosen(model, other), given, pool, classify)
            for name, enter in [(TEACHER, teacher), *variants]:
                if name == TEACHER:
                    own = known
                else:
                    with enter() as other:
                        own = _outputs(chosen(model, other), given, pool, classify)
                parts[name].append(found := _against(known, own, given))
                if not all(value.isfinite().all() for value in found.values()):
                    raise GateError(f"row {name!r}: outputs are not finite; look for NaN or inf in the model's weights")
                advance(len(items))
    return [Score(name, {k: torch.cat([p[k] for p in some]) for k in some[0]}) for name, some in parts.items()]


@dataclass(frozen=True)
class _Outputs:
    hidden_BTD: Tensor
    feature_BD: Tensor
    logits_BC: Tensor | None


def _outputs(model: nn.Module, batch: dict[str, Tensor], pool: Pool, classify: bool) -> _Outputs:
    out, logits = outputs(model, batch, classify=classify)
    hidden = out.last_hidden_state.float()
    return _Outputs(hidden, pool(hidden, batch).float(), None if logits is None else logits.float())


def _against(known: _Outputs, own: _Outputs, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """float64 [B] each, on the CPU."""
    near_BT = F.cosine_similarity(known.hidden_BTD, own.hidden_BTD, dim=-1)
    real_BT = torch.ones_like(near_BT)
    mask_BT = batch.get("attention_mask")
    if mask_BT is not None and mask_BT.shape == real_BT.shape:
        real_BT = mask_BT.to(near_BT)
    found = {
        "cosine": F.cosine_similarity(known.feature_BD, own.feature_BD, dim=-1),
        "dense_cosine": (near_BT * real_BT).sum(-1) / real_BT.sum(-1),
    }
    if own.logits_BC is not None and known.logits_BC is not None:
        log_p, log_q = known.logits_BC.log_softmax(-1), own.logits_BC.log_softmax(-1)
        found["kl"] = (log_p.exp() * (log_p - log_q)).sum(-1)
        first = own.logits_BC.argmax(-1)
        found["agreement"] = (first == known.logits_BC.argmax(-1)).float()
        if "labels" in batch:
            found["accuracy"] = (first.cpu() == batch["labels"].cpu()).float()
    return {name: value.double().cpu() for name, value in found.items()}


# -------------------------------------------------------------------------------------------------- reporting
def table(scores: Sequence[Score], gold_P: Tensor | None = None, *, resamples: int = 1000, seed: int = 0) -> list[Row]:
    """Rows from scores on the same examples; the first is the teacher's. gold_P: the scores that people gave to the
    pairs. Each kind of example is resampled by itself."""
    teacher = scores[0]
    draws = {size: _draws(size, resamples, seed) for size in {len(v) for s in scores for v in s.values.values()}}
    rows = []
    best: dict[str, Tensor] = {}
    for score in scores:
        metrics: dict[str, Tensor] = {}
        again: dict[str, Tensor] = {}
        for name, values in score.values.items():
            picks = draws[len(values)]
            if name == "pairs":
                assert gold_P is not None
                metrics["spearman"] = spearman(values, gold_P)
                if picks is not None:
                    again["spearman"] = torch.stack([spearman(values[p], gold_P[p]) for p in picks])
            else:
                metrics[name] = values.mean()
                if picks is not None:
                    again[name] = values[picks].mean(-1)
        main = "accuracy" if "accuracy" in metrics else "spearman"
        if score is teacher:
            best = {k: v[main] for k, v in (("value", metrics), ("again", again)) if main in v}
        elif main in metrics and "value" in best:
            metrics["retained"] = metrics[main] / best["value"]
            if main in again and "again" in best:
                again["retained"] = again[main] / best["again"]
        sizes = [len(v) for n, v in score.values.items() if n != "pairs"]
        rows.append(
            Row(
                name=score.name,
                documents=max(sizes, default=0),
                metrics={k: float(v) for k, v in metrics.items()},
                intervals={k: _interval(v) for k, v in again.items()},
            )
        )
    return rows


def _draws(size: int, resamples: int, seed: int) -> Tensor | None:
    """int64 [resamples, size]: which examples are drawn."""
    if size < 2 or not resamples:
        return None
    return torch.randint(size, (resamples, size), generator=torch.Generator().manual_seed(seed))


def _interval(values: Tensor) -> tuple[float, float]:
    sound = values[values.isfinite()]
    if not len(sound):
        return (float("nan"), float("nan"))
    low, high = sound.quantile(torch.tensor([0.025, 0.975], dtype=sound.dtype)).tolist()
    return (low, high)


def ranks(values_N: Tensor) -> Tensor:
    """Ranks from 0, ties by their mean: float64 [N]."""
    ordered = values_N.double().sort().values
    low = torch.searchsorted(ordered, values_N.double().contiguous(), right=False)
    high = torch.searchsorted(ordered, values_N.double().contiguous(), right=True)
    return (low + high - 1).double() / 2


def spearman(x_N: Tensor, y_N: Tensor) -> Tensor:
    """Rank correlation, ties by their mean rank; 0 where one of them is constant."""
    x, y = (r - r.mean() for r in (ranks(x_N), ranks(y_N)))
    norm = (x.square().sum() * y.square().sum()).sqrt()
    return (x * y).sum() / norm if norm > 0 else torch.zeros((), dtype=torch.float64)
