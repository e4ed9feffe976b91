"""The vocabulary head with its losses, a few rows at a time: logits of a whole batch are never in memory.

At 1,024 positions and 32,000 pieces every pass over float32 logits moves 131 MB, and KL with its gradient makes a dozen
of them: on a CPU that costs more than the products do. Here logits live for one block of rows, and what stays is the
gradient with respect to the hidden states.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 2**21  # logits held at once, per model


class Losses(NamedTuple):
    """Per row, nats: kl_N = KL(teacher || student), lm_N = -log p of the label (0 where it is -100)."""

    kl: Tensor
    lm: Tensor


def plain_head(model: nn.Module, hidden_BTD: Tensor, logits_BTV: Tensor) -> nn.Linear | None:
    """The model's output layer, if it is frozen and logits are just that layer of the last hidden state; None where
    something else happens on the way (soft-caps, scales, a hook that brings the weights): found by comparing."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear or any(p.requires_grad for p in head.parameters()):
        return None
    if any("forward" in vars(module) for module in (model, head)):
        return None
    with torch.no_grad():
        same = torch.equal(head(hidden_BTD), logits_BTV)
    return head if same else None


def head_losses(
    student_ND: Tensor, teacher_ND: Tensor | None, head: nn.Linear, label_N: Tensor, kl: bool = True, lm: bool = False
) -> Losses:
    """Losses of the rows of the last hidden state. The head gets no gradient: it has to be frozen.

    student_ND, teacher_ND: after the final norm. label_N: the next tokens. A loss that is not asked for is 0.
    """
    if kl and teacher_ND is None:
        raise ValueError("KL needs the teacher's hidden states")
    return Losses(*_HeadLosses.apply(student_ND, teacher_ND, head, label_N, kl, lm))


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_ND, teacher_ND, head, label_N, kl: bool, lm: bool):  # type: ignore[override]
        N = student_ND.shape[0]
        losses = student_ND.new_zeros(2, N, dtype=torch.float32)
        grads = [torch.empty_like(student_ND) if wanted else student_ND.new_empty(0) for wanted in (kl, lm)]
        rows = max(1, BLOCK // head.out_features)
        for start in range(0, N, rows):
            part = slice(start, min(start + rows, N))
            guess = head(student_ND[part]).float().log_softmax(-1)
            if lm:
                label = label_N[part]
                losses[1, part] = F.nll_loss(guess, label, ignore_index=-100, reduction="none")
                slope = guess.exp() * (label != -100)[:, None]
                slope[torch.arange(len(label)), label.clamp(min=0)] -= (label != -100).float()
                grads[1][part] = slope.to(head.weight.dtype) @ head.weight
            if kl:
                goal = head(teacher_ND[part]).float().log_softmax(-1)
                weight = goal.exp()
                losses[0, part] = (weight * goal.sub_(guess)).sum(-1)
                grads[0][part] = guess.exp_().sub_(weight).to(head.weight.dtype) @ head.weight
        ctx.save_for_backward(*grads)
        ctx.wanted = (kl, lm)
        return losses[0], losses[1]

    @staticmethod
    def backward(ctx: Any, kl_N: Tensor, lm_N: Tensor):  # type: ignore[override]
        parts = zip(ctx.wanted, ctx.saved_tensors, (kl_N, lm_N), strict=True)
        total = [slope * grad_N[:, None].to(slope.dtype) for wanted, slope, grad_N in parts if wanted]
        return sum(total[1:], total[0]), None, None, None, None, None


def logit_losses(
    student_BPV: Tensor, teacher_BPV: Tensor | None, label_BP: Tensor, kl: bool = True, lm: bool = False
) -> Losses:
    """The same from whole logits, where the head is more than one layer, or learns."""
    student_NV, label_N = student_BPV.flatten(0, 1), label_BP.flatten()
    zero_N = student_NV.new_zeros(len(label_N), dtype=torch.float32)
    if kl and teacher_BPV is None:
        raise ValueError("KL needs the teacher's logits")
    goal_NV = None if teacher_BPV is None else teacher_BPV.flatten(0, 1)
    return Losses(
        _LogitKL.apply(student_NV, goal_NV) if kl else zero_N,
        F.cross_entropy(student_NV.float(), label_N, ignore_index=-100, reduction="none") if lm else zero_N,
    )


class _LogitKL(torch.autograd.Function):
    """KL(teacher || student) per position with its gradient p_s - p_t kept in place of the log-probabilities."""

    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:  # type: ignore[override]
        goal = teacher_NV.float().log_softmax(-1)
        guess = student_NV.float().log_softmax(-1)
        weight = goal.exp()
        kl = (weight * (goal - guess)).sum(-1)
        ctx.save_for_backward(guess.exp_().sub_(weight))
        ctx.dtype = student_NV.dtype
        return kl

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (difference,) = ctx.saved_tensors
        return (difference * grad_N[:, None]).to(ctx.dtype), None
