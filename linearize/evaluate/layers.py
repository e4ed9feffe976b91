"""Layer by layer: how the student's attention differs from the teacher's, what each layer gets wrong on the teacher's
own stream, and what it costs to have that layer, or one key/value group of it, converted alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize.evaluate import diagnostics, quality
from linearize.types import Context, InputError, Site

if TYPE_CHECKING:
    from linearize.mixers.base import Mixer
    from linearize.surgery.attach import Surgery


@dataclass(frozen=True)
class Layer:
    """One converted layer. Pairs are (teacher, student), means over heads: entropy in nats, monotonicity (Spearman of
    weights and logits), reach (effective sequence length, tokens), rank (effective rank of the weights).

    error: of the mixer's output on the teacher's inputs, squared, over the teacher's output squared. kl: KL(teacher ||
    model with this layer alone converted), nats per token; groups: the same with one key/value group of it alone.
    """

    layer: int
    name: str
    error: float
    kl: float
    groups: list[float]
    entropy: tuple[float, float] | None = None
    monotonicity: tuple[float, float] | None = None
    reach: tuple[float, float] | None = None
    rank: tuple[float, float] | None = None


def layers(surgery: Surgery, documents: Sequence[Tensor], *, groups: bool = True) -> list[Layer]:
    """On a few documents of a few hundred tokens, of int64 ids. groups: whether groups are swapped alone as well.

    The teacher here is softmax on the weights as they are now, LoRA off. Raises InputError where nothing is given, or
    projections started afresh.
    """
    if not documents:
        raise InputError("layers are compared on documents: give at least one")
    errors: dict[str, Tensor] = {}
    ranks: dict[str, Tensor] = {}

    def look(site: Site, mixer: Mixer, q: Tensor, k: Tensor, v: Tensor, ctx: Context, out: Tensor) -> None:
        wanted = out.double()
        wrong = mixer(q, k, v, ctx.without_slot()).double() - wanted
        sums = torch.stack([wrong.square().sum(), wanted.square().sum()])
        errors[site.name] = errors.get(site.name, 0) + sums.cpu()
        weights = diagnostics.both_weights(site, mixer, q, k, v, ctx)
        if weights is not None:
            found = torch.stack([effective_rank(w).mean() for w in weights]).cpu()
            ranks[site.name] = ranks.get(site.name, 0) + found / len(documents)

    diagnostics.watched(surgery, documents, look)
    try:
        found = diagnostics.diagnose(surgery, documents)
    except InputError:  # a method without weights
        found = None
    sites = surgery.sites
    variants: list[Any] = [(s.name, partial(surgery.alone, s.name)) for s in sites]
    if groups:
        variants += [
            (f"{s.name} {g}", partial(surgery.alone, s.name, (g,))) for s in sites for g in range(s.shape.kv_heads)
        ]
    scores = quality.measure(
        surgery.model, documents, variants, teacher=surgery.teacher, residual=0, progress=False, batch=1
    )
    kl = {score.name: float(score.kl_N.mean()) for score in scores}

    def pair(metric: str, name: str) -> tuple[float, float] | None:
        if found is None or name not in found.names:
            return None
        both = getattr(found, metric)
        row = found.names.index(name)
        teacher, student = (sum(both[side][row]) / len(both[side][row]) for side in ("teacher", "student"))
        return teacher, student

    out = []
    for place, site in enumerate(sites):
        wrong, size = errors[site.name].tolist()
        rank = ranks.get(site.name)
        out.append(
            Layer(
                layer=place if site.layer is None else site.layer,
                name=site.name,
                error=wrong / size,
                kl=kl[site.name],
                groups=[kl[f"{site.name} {g}"] for g in range(site.shape.kv_heads)] if groups else [],
                rank=None if rank is None else (float(rank[0]), float(rank[1])),
                **{metric: pair(metric, site.name) for metric in ("entropy", "monotonicity", "reach")},
            )
        )
    return out


def effective_rank(weights_BHTT: Tensor) -> Tensor:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007), [B, H]: 1 to T."""
    values = torch.linalg.svdvals(weights_BHTT.double())
    share = values / values.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.special.entr(share).sum(-1).exp()
