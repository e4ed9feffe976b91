"""Attention transfer: teach each mixer what softmax did, in one forward of the teacher.

Hedgehog (2402.04347) section 4.2 and LoLCATs (2410.10254) section 3.1, with ours beside them: the layer's error is
measured relative to the teacher's own output, a window is exact from the start, and the far branch can be taught the
far keys alone. The stream is the teacher's throughout, so all layers learn in parallel and no second model is held;
what transfer does not need (everything after the last attention, the LM head) is not computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linearize.mixers.base import Mixer
from linearize.mixers.parts import Branches, Local
from linearize.plan import TransferPlan
from linearize.stages.base import Job, body, inputs, share_of
from linearize.stages.loop import train
from linearize.surgery.attach import Surgery
from linearize.types import Context, InputError, Site, StageReport

Prepare = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class _LastSite(Exception):
    """Every site has been seen: the rest of the teacher's forward is not needed."""


class Transfer:
    """The objective of the stage. Losses of each call of a mixer, in their order, are logged as `layer.<i>`."""

    def __init__(
        self, surgery: Surgery, plan: TransferPlan, name: str = "transfer", prepare: Prepare = lambda batch: batch
    ) -> None:
        """prepare: makes the model's inputs of a batch."""
        self.surgery, self.plan, self.name, self.prepare = surgery, plan, name, prepare
        parameters = {f"{site}.{n}": p for site, mixer in surgery.mixers.items() for n, p in mixer.named_parameters()}
        self.groups = [(parameters, plan.lr)]
        if not parameters:
            raise InputError(f"method {surgery.method!r} has no parameters to transfer; drop the transfer stage")
        self.calls = surgery.calls
        surgery.model.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        losses: list[Tensor] = []

        def watcher(site: Site, mixer: Mixer, q: Tensor, k: Tensor, v: Tensor, ctx: Context, o: Tensor) -> None:
            with torch.enable_grad():
                losses.append(site_loss(mixer, q, k, v, ctx, o, self.plan, step))
            if len(losses) == self.calls:
                raise _LastSite

        model = body(self.surgery.model)
        with torch.no_grad(), self.surgery.watch(watcher), contextlib.suppress(_LastSite):
            model(**inputs(model, self.prepare(batch)))
        total = torch.stack(losses).mean()
        return {"loss": total, **{f"layer.{i}": value for i, value in enumerate(losses)}}


def site_loss(
    mixer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: Context, o: Tensor, plan: TransferPlan, step: int
) -> Tensor:
    """The loss of one layer, a scalar without units: errors are relative to the teacher's own output."""
    out = o.float()
    total = out.new_zeros(())
    parts = mixer.both(q, k, v, ctx.without_slot())[0] if plan.far or plan.mass or plan.far_weight else None
    field = None if parts is None else _far_field(parts.local, q, k, ctx, out, mixer.shape.window)
    own = 1.0 if plan.own is None else plan.own
    guess = None
    if mixer.teaches and own:
        weights = teacher_map(q, k, ctx, mixer.shape.window)
        guess, loss = mixer.taught(q, k, v, ctx.without_slot(), weights, plan.map_chunk, output=plan.output > 0)
        total = total + own * share_of(loss, (ctx.codes(q) > 0).sum().float() * q.shape[1])
    if plan.output:
        alone = plan.target == "linear" or (plan.window_drop and torch.rand(()) < plan.window_drop)
        if alone and mixer.branches:
            guess = mixer.linear_alone(q, k, v, ctx)
        elif guess is None:
            guess = mixer(q, k, v, ctx.without_slot())
        weight = field.share if field is not None and plan.far_weight else None
        total = total + plan.output * relative_error(guess.float(), out, ctx, weight)
    if plan.map:
        total = total + plan.map * map_divergence(mixer, q, k, v, ctx, plan.map_chunk)
    if field is not None and (plan.far or plan.mass):
        far, mass = far_loss(mixer, q, parts, ctx, out, field)
        total = total + plan.far * far + plan.mass * mass
    return total


def relative_error(guess_BHTV: Tensor, out_BHTV: Tensor, ctx: Context, weight_BHT: Tensor | None = None) -> Tensor:
    """Squared errors over squares of the teacher's output, summed over real tokens; weight_BHT: of the queries."""
    weight = torch.ones_like(out_BHTV[..., :1]) if weight_BHT is None else weight_BHT[..., None]
    if ctx.valid_BT is not None:
        weight = weight * ctx.valid_BT[:, None, :, None]
    return share_of((weight * (guess_BHTV - out_BHTV) ** 2).sum(), (weight * out_BHTV**2).sum())


def teacher_scores(
    q_BHTK: Tensor, k_BGTK: Tensor, ctx: Context, window: int | None, rows: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """(scores_BHTT, visible_B1TT) of the teacher's softmax for the queries `rows`, float32; -inf where invisible.

    window: the teacher's own. What is not in the scores (soft-cap, learned sinks) is left out; `site.drops` names it.
    """
    visible = ctx.visible(q_BHTK, rows, window)
    k = k_BGTK.float().repeat_interleave(q_BHTK.shape[1] // k_BGTK.shape[1], 1)
    scores = q_BHTK[:, :, rows].float() @ k.mT * ctx.scale
    return scores.masked_fill(~visible[:, None], -torch.inf), visible[:, None]


def teacher_map(q: Tensor, k: Tensor, ctx: Context, window: int | None) -> Callable[[slice], Tensor]:
    """The teacher's weights [B, H, rows, T] by rows, float32, 0 where invisible."""

    @torch.no_grad()
    def weights(rows: slice) -> Tensor:
        scores, visible = teacher_scores(q, k, ctx, window, rows)
        return scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1) * visible

    return weights


def map_divergence(mixer: Mixer, q: Tensor, k: Tensor, v: Tensor, ctx: Context, chunk: int) -> Tensor:
    """KL of the mixer's attention map from the teacher's, mean over real queries and heads: Hedgehog's own loss less
    its constant. No more than `chunk` rows of a map are held at once, forward or backward."""
    T, weights = q.shape[2], teacher_map(q, k, ctx, mixer.shape.window)

    def part(start: int) -> Tensor:
        rows = slice(start, min(start + chunk, T))
        target = weights(rows)
        guess = mixer.dense(q, k, v, ctx, rows).float().clamp(min=1e-12).log()
        return (target * (target.clamp(min=1e-12).log() - guess)).sum()

    if chunk >= T:
        total = part(0)
    else:
        total = sum(checkpoint(part, start, use_reentrant=False) for start in range(0, T, chunk))
    return share_of(total, (ctx.codes(q) > 0).sum().float() * q.shape[1])


class _Field(NamedTuple):
    """The teacher's attention outside window and sinks: its share_BHT of each query's mass, and sum_BHTV, that share
    times the mean value there. real_BHT: queries that see anything."""

    share: Tensor
    sum: Tensor
    real: Tensor


@torch.no_grad()
def _far_field(
    local: Local, q: Tensor, k: Tensor, ctx: Context, out: Tensor, window: int | None, chunk: int = 512
) -> _Field:
    pieces = [slice(start, start + chunk) for start in range(0, q.shape[2], chunk)]
    full = torch.cat([teacher_scores(q, k, ctx, window, rows)[0].logsumexp(-1) for rows in pieces], -1)
    near = (local.lse.float() - full).exp().clamp(max=1.0).nan_to_num()
    return _Field(1 - near, out - near[..., None] * local.output.float(), torch.isfinite(full))


def far_loss(mixer: Any, q: Tensor, parts: Branches, ctx: Context, out: Tensor, field: _Field) -> tuple[Tensor, Tensor]:
    """(far, mass): the far branch against softmax over the keys outside window and sinks.

    far: squared error of the far branch's own output, weighted by the teacher's far share, relative to the teacher's
    output. mass: KL of the shares (local, far) from the teacher's. With both at 0 the layer is the teacher's.
    """
    assert parts.local is not None
    error = ((field.share[..., None] * parts.far.float() - field.sum) ** 2).sum(-1) * field.real
    near, far = mixer.combine(parts.local.lse, parts.local.max, parts.mass, q, ctx.scale)
    guess = (far / (near + far).clamp(min=1e-12)).clamp(1e-6, 1 - 1e-6).float()
    both, guessed = torch.stack([field.share, 1 - field.share]), torch.stack([guess, 1 - guess])
    mass = (both * (both.clamp(min=1e-12).log() - guessed.log())).sum(0)
    has_far = field.real & (parts.mass > 0)
    return (
        share_of(error.sum(), (out**2).sum()),
        share_of((mass * has_far).sum(), has_far.sum().float()),
    )


def transfer(job: Job, plan: TransferPlan, name: str = "transfer") -> StageReport:
    """Run the stage: only the mixers change. name: of its checkpoints, where a plan has several of them."""
    return train(job, Transfer(job.surgery, plan, name, job.prepared), plan)
