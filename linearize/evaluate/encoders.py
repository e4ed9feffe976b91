"""How good a converted encoder or vision tower is: every variant on the same examples, in one pass.

Variants and the teacher are as in evaluate/quality.py. Each figure comes from one number per example, so that
intervals resample examples, the same ones for all variants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from linearize.data.examples import Examples
from linearize.data.sentences import Pairs, Sentences
from linearize.evaluate.quality import TEACHER, Variant, against, chosen, evaluating, precise
from linearize.progress import bar
from linearize.types import GateError, InputError

Pool = Callable[[Tensor, Tensor], Tensor]
Teacher = Callable[[], AbstractContextManager[Any]]
#: figures of which the share of the teacher's is told
SHARED = ("top1", "spearman", "mrr")


# -------------------------------------------------------------------------------------------------- measuring
@dataclass(frozen=True)
class Sample:
    """One number per example, float64 [N]. The figure is their mean or, with `wanted_N`, their rank correlation with
    it."""

    values_N: Tensor
    wanted_N: Tensor | None = None

    def figure(self, picks_RN: Tensor | None = None) -> Tensor:
        """float64 [], or [R] of the examples that each row of picks draws."""
        values = self.values_N if picks_RN is None else self.values_N[picks_RN]
        if self.wanted_N is None:
            return values.mean(-1)
        return spearman(values, self.wanted_N if picks_RN is None else self.wanted_N[picks_RN])


@dataclass(frozen=True)
class Score:
    """One variant: its samples by figure."""

    name: str
    samples: Mapping[str, Sample]


@dataclass(frozen=True)
class Outputs:
    """What a model says of a batch. logits [B, classes] where it has a classifier; features [B, E], one vector each;
    hidden [B, T, D] after its last layer, real_BT True where they count (real tokens; patches)."""

    logits: Tensor | None
    features: Tensor
    hidden: Tensor
    real_BT: Tensor


def outputs(model: Any, batch: Mapping[str, Tensor], pool: Pool | None = None, prefix: int = 0) -> Outputs:
    """One forward. pool: makes the features of texts (see pooling.py); None: the model's own pooled output, else the
    first token where `prefix` tokens stand before the patches, else the mean."""
    place = next(model.parameters())
    batch = {
        name: value.to(place.device, place.dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
        if name != "labels"
    }
    kept: list[Any] = []
    body = getattr(model, "base_model", model)
    handle = body.register_forward_hook(lambda module, args, out: kept.append(out))
    try:
        out = model(**batch)
    finally:
        handle.remove()
    hidden, pooled = kept[-1].last_hidden_state, getattr(kept[-1], "pooler_output", None)
    mask = batch.get("attention_mask")
    real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if mask is None else mask.bool()
    if pool is not None:
        features = pool(hidden, real)
    elif pooled is not None:
        features = pooled
    else:
        features = hidden[:, 0] if prefix else hidden.mean(1)
    if mask is None:
        real[:, :prefix] = False
    logits = getattr(out, "logits", None)  # of tokens or pixels (masked models): no classes of the example
    return Outputs(logits if logits is not None and logits.ndim == 2 else None, features, hidden, real)


def measure(
    model: nn.Module,
    data: Examples,
    variants: Sequence[Variant],
    *,
    teacher: Teacher = nullcontext,
    pool: Pool | None = None,
    batch: int = 32,
    progress: bool | None = None,
) -> list[Score]:
    """Scores of the teacher, first, and of each variant, on images or texts.

    cosine: of the features with the teacher's. token_cosine: of each real token or patch with the teacher's, mean over
    them. Where the model has a classifier: kl (of the teacher's classes from the variant's, nats), agreement (both
    choose one class), and top1 where `data` has labels. Raises GateError where an output is not finite.
    """
    names = _names(variants)
    prefix = getattr(data, "prefix", 0)
    found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    with evaluating(model), bar("evaluation", len(data) * len(names), progress) as advance:
        for rows, inputs in _batches(data, batch):
            labels = inputs.get("labels")
            with teacher() as other:
                known = outputs(chosen(model, other), inputs, pool, prefix)
            for name, enter in [(TEACHER, None), *variants]:
                own = known
                if enter is not None:
                    with enter() as other:
                        own = outputs(chosen(model, other), inputs, pool, prefix)
                for key, values in _compared(known, own, labels).items():
                    if not values.isfinite().all():
                        raise GateError(f"row {name!r}: outputs are not finite; look for NaN or inf in the weights")
                    column = found[name].setdefault(key, torch.empty(len(data), dtype=torch.float64))
                    column[rows] = values.double().cpu()
                advance(len(rows))
    return [Score(name, {key: Sample(values) for key, values in found[name].items()}) for name in names]


def similarity(
    model: nn.Module,
    data: Sentences,
    pairs: Pairs,
    variants: Sequence[Variant],
    *,
    pool: Pool,
    teacher: Teacher = nullcontext,
    batch: int = 64,
    progress: bool | None = None,
) -> list[Score]:
    """spearman: rank correlation of the cosine of each pair's vectors with its score. data: `pairs.texts`, encoded."""
    if len(data) != 2 * len(pairs):
        raise InputError(f"{len(data)} texts for {len(pairs)} pairs: data must be pairs.texts")
    vectors = embed(model, data, variants, pool=pool, teacher=teacher, batch=batch, progress=progress)
    scores = []
    for name, vector_NE in vectors.items():
        cosine_P = torch.nn.functional.cosine_similarity(*vector_NE.double().chunk(2), dim=-1)
        scores.append(Score(name, {"spearman": Sample(cosine_P, pairs.scores)}))
    return scores


def retrieval(
    model: nn.Module,
    data: Sentences,
    variants: Sequence[Variant],
    *,
    pool: Pool,
    teacher: Teacher = nullcontext,
    batch: int = 32,
    progress: bool | None = None,
) -> list[Score]:
    """mrr: do the halves of a passage find each other among all? Reciprocal rank by cosine, mean of both directions;
    what is as near as the right one is ranked before it."""
    if len(data) < 2:
        raise InputError("retrieval needs at least two passages")
    ways = [
        embed(model, half, variants, pool=pool, teacher=teacher, batch=batch, progress=progress)
        for half in data.halves()
    ]
    scores = []
    for name in ways[0]:
        first, second = (torch.nn.functional.normalize(way[name].double(), dim=-1) for way in ways)
        cosine_MM = first @ second.T
        right_M = cosine_MM.diagonal()
        ranks = [(cosine_MM >= right_M[:, None]).sum(1), (cosine_MM >= right_M).sum(0)]
        scores.append(Score(name, {"mrr": Sample(sum(1 / rank.double() for rank in ranks) / 2)}))
    return scores


def embed(
    model: nn.Module,
    data: Examples,
    variants: Sequence[Variant],
    *,
    pool: Pool | None = None,
    teacher: Teacher = nullcontext,
    batch: int = 32,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """The features of every example by variant, the teacher first: float32 [N, E] on the CPU. Raises GateError."""
    names = _names(variants)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    order: list[Tensor] = []
    with evaluating(model), bar("evaluation", len(data) * len(names), progress) as advance:
        for rows, inputs in _batches(data, batch):
            order.append(rows)
            for name, enter in [(TEACHER, teacher), *variants]:
                with enter() as other:
                    features = outputs(chosen(model, other), inputs, pool, getattr(data, "prefix", 0)).features
                if not features.isfinite().all():
                    raise GateError(f"row {name!r}: outputs are not finite; look for NaN or inf in the weights")
                found[name].append(features.float().cpu())
                advance(len(rows))
    back = torch.cat(order).argsort()
    return {name: torch.cat(parts)[back] for name, parts in found.items()}


def joined(*measured: Sequence[Score]) -> list[Score]:
    """The scores of several measurements of the same variants as one each."""
    return [Score(same[0].name, {k: v for score in same for k, v in score.samples.items()}) for same in zip(*measured)]


def spearman(x_N: Tensor, y_N: Tensor) -> Tensor:
    """Rank correlation along the last axis, ties by their mean rank; 0 where one side is constant."""
    x, y = (r - r.mean(-1, keepdim=True) for r in (_ranks(x_N), _ranks(y_N)))
    norm = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    return torch.where(norm > 0, (x * y).sum(-1) / norm.clamp(min=1e-12), 0.0)


def _ranks(values: Tensor) -> Tensor:
    values = values.double().contiguous()
    line = values.sort(-1).values
    return (torch.searchsorted(line, values) + torch.searchsorted(line, values, right=True)).double() / 2


def _names(variants: Sequence[Variant]) -> list[str]:
    names = [TEACHER, *(name for name, _ in variants)]
    if len(set(names)) < len(names):
        raise InputError(f"two rows of one name: {', '.join(names)}")
    return names


def _batches(data: Examples, size: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """(which examples, their batch), those of similar length together."""
    order = torch.arange(len(data)) if data.sizes is None else data.sizes.argsort(stable=True)
    for rows in order.split(size):
        yield rows, data.collate([data[int(i)] for i in rows])


def _compared(known: Outputs, own: Outputs, labels_B: Tensor | None) -> dict[str, Tensor]:
    """[B] each."""
    cosine = torch.nn.functional.cosine_similarity
    found = {"cosine": cosine(own.features.float(), known.features.float(), dim=-1)}
    real = known.real_BT
    alike_BT = cosine(own.hidden.float(), known.hidden.float(), dim=-1).masked_fill(~real, 0)
    found["token_cosine"] = alike_BT.sum(1) / real.sum(1)
    if known.logits is not None and own.logits is not None:
        log_p = known.logits.to(precise(known.logits)).log_softmax(-1)
        choice = own.logits.argmax(-1).cpu()
        _, found["kl"], found["agreement"] = against(log_p, own.logits, choice)
        if labels_B is not None:
            found["top1"] = (choice == labels_B.cpu()).float()
    return found


# -------------------------------------------------------------------------------------------------- reporting
@dataclass(frozen=True)
class Row:
    """One line of the table: figures by name ("top1", "spearman", ..., and "top1_ratio", ...: the share of the
    teacher's), how many examples each is from, 95 % bootstrap intervals over them."""

    name: str
    figures: dict[str, float]
    examples: dict[str, int]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


def table(scores: Sequence[Score], *, resamples: int = 1000, seed: int = 0) -> list[Row]:
    """Rows from scores on the same examples; the first is the teacher's. Shares are paired: both sides of one are of
    the same drawn examples."""
    return [
        Row(
            score.name,
            {key: float(value) for key, value in _figures(score, scores[0], None).items()},
            {key: len(sample.values_N) for key, sample in score.samples.items()},
            _intervals(score, scores[0], resamples, seed),
        )
        for score in scores
    ]


def _figures(score: Score, teacher: Score, picks: Mapping[int, Tensor] | None) -> dict[str, Tensor]:
    """picks: by number of examples."""
    found = {}
    for key, sample in score.samples.items():
        drawn = None if picks is None else picks[len(sample.values_N)]
        found[key] = sample.figure(drawn)
        if key in SHARED:
            whole = teacher.samples[key].figure(drawn)
            if bool((whole != 0).all()):
                found[f"{key}_ratio"] = found[key] / whole
    return found


def _intervals(score: Score, teacher: Score, resamples: int, seed: int) -> dict[str, tuple[float, float]]:
    """Drawn in parts, so that memory does not grow with their number."""
    sizes = sorted({len(sample.values_N) for sample in score.samples.values()})
    if not resamples or min(sizes, default=0) < 2:
        return {}
    drawn: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)
    for part in torch.arange(resamples).split(50):
        picks = {size: torch.randint(size, (len(part), size), generator=generator) for size in sizes}
        for key, values in _figures(score, teacher, picks).items():
            drawn.setdefault(key, []).append(values)
    edges = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {key: tuple(torch.cat(parts).quantile(edges).tolist()) for key, parts in drawn.items()}
