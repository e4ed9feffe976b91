"""Attention transfer: teach each mixer what softmax did, in one forward of the teacher.

Hedgehog (2402.04347) section 4.2 and LoLCATs (2410.10254) section 3.1, with ours beside them: the layer's error is
measured relative to the teacher's own output, a window is exact from the start, and the far branch can be taught the
far keys alone. The stream is the teacher's throughout, so all layers learn in parallel and no second model is held;
what transfer does not need (everything after the last attention, the LM head) is not computed.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from linearize.mixers.base import Mixer
from linearize.plan import TransferPlan
from linearize.stages.base import Job, body, share_of
from linearize.stages.loop import train
from linearize.surgery.attach import Surgery
from linearize.types import Context, InputError, Site, StageReport


class _LastSite(Exception):
    """Every site has been seen: the rest of the teacher's forward is not needed."""


class Transfer:
    """The objective of the stage. Losses per site, in the order of the sites, are logged as `layer.<i>`."""

    name = "transfer"

    def __init__(self, surgery: Surgery, plan: TransferPlan) -> None:
        self.surgery, self.plan = surgery, plan
        parameters = {f"{site}.{n}": p for site, mixer in surgery.mixers.items() for n, p in mixer.named_parameters()}
        self.groups = [(parameters, plan.lr)]
        if not parameters:
            raise InputError(f"method {surgery.method!r} has no parameters to transfer; drop the transfer stage")
        surgery.model.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        losses: list[Tensor] = []

        def watcher(site: Site, mixer: Mixer, q: Tensor, k: Tensor, v: Tensor, ctx: Context, o: Tensor) -> None:
            with torch.enable_grad():
                losses.append(site_loss(mixer, q, k, v, ctx, o, self.plan, step))
            if len(losses) == len(self.surgery.mixers):
                raise _LastSite

        inputs = {k: v for k, v in batch.items() if k != "labels"}
        with torch.no_grad(), self.surgery.watch(watcher), contextlib.suppress(_LastSite):
            body(self.surgery.model)(**inputs, use_cache=False)
        total = torch.stack(losses).mean()
        return {"loss": total, **{f"layer.{i}": value for i, value in enumerate(losses)}}


def site_loss(
    mixer: Mixer, q: Tensor, k: Tensor, v: Tensor, ctx: Context, o: Tensor, plan: TransferPlan, step: int
) -> Tensor:
    """The loss of one layer, a scalar without units: errors are relative to the teacher's own output."""
    out = o.float()
    total = out.new_zeros(())
    if plan.output:
        alone = plan.target == "linear" or (plan.window_drop and torch.rand(()) < plan.window_drop)
        guess = mixer.linear_alone(q, k, v, ctx) if alone and mixer.branches else mixer(q, k, v, ctx.without_slot())
        total = total + plan.output * relative_error(guess.float(), out, ctx)
    if plan.map:
        total = total + plan.map * map_cross_entropy(mixer, q, k, v, ctx)
    if plan.far or plan.mass:
        far, mass = far_field(mixer, q, k, v, ctx, out)
        total = total + plan.far * far + plan.mass * mass
    return total


def relative_error(guess_BHTV: Tensor, out_BHTV: Tensor, ctx: Context) -> Tensor:
    """Sum of squared errors over the sum of squares of the teacher's output, at real tokens."""
    error, size = (guess_BHTV - out_BHTV) ** 2, out_BHTV**2
    if ctx.valid_BT is not None:
        real = ctx.valid_BT[:, None, :, None]
        error, size = error * real, size * real
    return share_of(error.sum(), size.sum())


def teacher_scores(q_BHTK: Tensor, k_BGTK: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
    """(scores_BHTT, visible_B1TT) of plain softmax attention, in float32; -inf where nothing is visible."""
    codes = ctx.codes(q_BHTK)
    visible = ((codes[:, :, None] == codes[:, None]) & (codes > 0)[:, None]).tril()[:, None]
    k = k_BGTK.float().repeat_interleave(q_BHTK.shape[1] // k_BGTK.shape[1], 1)
    return (q_BHTK.float() @ k.mT * ctx.scale).masked_fill(~visible, -torch.inf), visible


def map_cross_entropy(mixer: Mixer, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
    """-sum_i a_ti log a^_ti, mean over real queries and heads: Hedgehog's own loss, T x T."""
    with torch.no_grad():
        scores, visible = teacher_scores(q, k, ctx)
        target = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1) * visible
    rows = target.sum(-1) > 0
    guess = mixer.dense(q, k, v, ctx).float().clamp(min=1e-12).log()
    entropy = -(target * target.clamp(min=1e-12).log()).sum(-1)
    return share_of(((-(target * guess).sum(-1) - entropy) * rows).sum(), rows.sum().float())


def far_field(mixer: Mixer, q: Tensor, k: Tensor, v: Tensor, ctx: Context, out: Tensor) -> tuple[Tensor, Tensor]:
    """(far, mass): the far branch against softmax over the keys outside window and sinks.

    far: squared error of the far branch's own output, weighted by the teacher's far share, relative to the teacher's
    output. mass: two-way cross-entropy of the shares (local, far). With both at 0 the layer is the teacher's.
    """
    parts, _ = mixer.both(q, k, v, ctx.without_slot())
    local = parts.local
    with torch.no_grad():
        scores, _ = teacher_scores(q, k, ctx)
        full = scores.logsumexp(-1)
        near_share = (local.lse.float() - full).exp().clamp(max=1.0).nan_to_num()
        far_share = 1 - near_share
        far_sum = out - near_share[..., None] * local.output.float()  # far share x far output
        real = torch.isfinite(full)
    error = ((far_share[..., None] * parts.far.float() - far_sum) ** 2).sum(-1) * real
    near, far = mixer.combine.shares(local.lse, local.max, parts.mass, q, ctx.scale)
    guess = (far / (near + far).clamp(min=1e-12)).clamp(1e-6, 1 - 1e-6).float()
    cross = -(far_share * guess.log() + (1 - far_share) * (1 - guess).log())
    floor = -(far_share * far_share.clamp(min=1e-12).log() + near_share * near_share.clamp(min=1e-12).log())
    has_far = real & (parts.mass > 0)
    mass = share_of(((cross - floor) * has_far).sum(), has_far.sum().float())
    return share_of(error.sum(), (out**2).sum()), mass


def transfer(job: Job, plan: TransferPlan) -> StageReport:
    """Run the stage: only the mixers change."""
    return train(job, Transfer(job.surgery, plan), plan)
