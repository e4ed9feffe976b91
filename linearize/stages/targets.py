"""What fine-tuning compares, by what the model is for: next tokens of a language model, features of an encoder."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.data.examples import Examples
from linearize.plan import FinetunePlan
from linearize.stages.base import Job, body, inputs, share_of
from linearize.stages.head import head_losses, logit_losses, plain_head
from linearize.types import InputError

log = logging.getLogger(__name__)

Teacher = Callable[[], AbstractContextManager[Any]]


def hidden_error(student: Any, teacher: Any, weight_BT: Tensor | None = None) -> Tensor:
    """Squared error of the hidden states over the teacher's squares, mean over the layers; weight_BT: of tokens."""
    pairs = zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True)
    return torch.stack([relative(a, b, weight_BT) for a, b in pairs]).mean()


def relative(guess_BTD: Tensor, goal_BTD: Tensor, weight_BT: Tensor | None = None) -> Tensor:
    """Squared error over the goal's squares; weight_BT: of tokens (None: all alike)."""
    error, size = (guess_BTD - goal_BTD).float() ** 2, goal_BTD.float() ** 2
    if weight_BT is None:
        return share_of(error.sum(), size.sum())
    return share_of((error * weight_BT[..., None]).sum(), (size * weight_BT[..., None]).sum())


class NextTokens:
    """kl: logits against the teacher's on a share of the positions; lm: next tokens; hidden: hidden states."""

    def __init__(self, job: Job, plan: FinetunePlan) -> None:
        self.job, self.plan = job, plan
        self.head, self.looked = None, False  # found at the first batch: it takes one to compare
        self.picks = "logits_to_keep" in inspect.signature(job.model.forward).parameters

    def __call__(self, batch: dict[str, Tensor], teacher_of: Teacher) -> dict[str, Tensor]:
        plan, model = self.plan, self.job.model
        labels = batch["labels"]
        given = inputs(model, batch)
        if plan.hidden:
            given["output_hidden_states"] = True
        if not self.looked:
            self.head, self.looked = self._plain_head(given), True
        places_P = self._places(labels)
        target_BP = labels[:, (places_P + 1).clamp(max=labels.shape[1] - 1)]
        learn_BP = (target_BP != -100) & (places_P + 1 < labels.shape[1])
        keep = {"logits_to_keep": places_P} if self.picks and len(places_P) < labels.shape[1] else {}
        run = body(model) if self.head else partial(model, **keep)
        student = run(**given)
        teacher = None
        if plan.kl or plan.hidden:
            with torch.no_grad(), teacher_of():
                teacher = run(**given)
        if self.head:
            rows = (output and output.last_hidden_state[:, places_P].flatten(0, 1) for output in (student, teacher))
            wanted_N = target_BP.masked_fill(~learn_BP, -100).flatten()
            losses = head_losses(*rows, self.head, wanted_N, kl=plan.kl > 0, lm=plan.lm > 0)
        else:
            rows = (output and (output.logits if keep else output.logits[:, places_P]) for output in (student, teacher))
            losses = logit_losses(*rows, target_BP.masked_fill(~learn_BP, -100), kl=plan.kl > 0, lm=plan.lm > 0)
        weight_N = learn_BP.flatten().float()
        parts: dict[str, Tensor] = {}
        for name, loss_N in losses._asdict().items():
            if getattr(plan, name):
                parts[name] = share_of((loss_N * weight_N).sum(), weight_N.sum())
        if plan.hidden and teacher is not None:
            parts["hidden"] = hidden_error(student, teacher)
        return parts

    def _plain_head(self, given: dict[str, Any]) -> nn.Linear | None:
        """The head whose losses are computed a block at a time, None where logits are more than that."""
        one = {k: v[:1] if isinstance(v, Tensor) else v for k, v in given.items()}
        with torch.no_grad(), self.job.surgery.teacher():
            head = plain_head(
                self.job.model, body(self.job.model)(**one).last_hidden_state, self.job.model(**one).logits
            )
        if head is None:
            log.info("finetune: logits are not one frozen linear layer here; they are held whole")
        return head

    def _places(self, labels_BT: Tensor) -> Tensor:
        """The positions whose logits are computed: all, or a random share (the same for every row of the batch)."""
        T = labels_BT.shape[1]
        if self.plan.share == 1.0:
            return torch.arange(T, device=labels_BT.device)
        count = max(1, round(self.plan.share * T))
        return torch.randperm(T, device="cpu")[:count].sort().values.to(labels_BT.device)


def check(model: nn.Module, data: Examples, plan: FinetunePlan) -> None:
    """Raises InputError for losses of an encoder that its head or the data have nothing for."""
    for key in ("kl", "task"):
        if getattr(plan, key) and "Classification" not in type(model).__name__:
            raise InputError(
                f"stages.finetune.{key}: {type(model).__name__} has no classifier: set {key} to 0, and feature or "
                "dense above it"
            )
    if plan.task and "labels" not in data[0]:
        raise InputError("stages.finetune.task: the data has no labels: name data.label_column, or set task to 0")


class Features:
    """kl: logits of a classifier; feature: cosine of the pooled feature; dense: the last hidden state, token by token;
    hidden: all hidden states; task: cross-entropy of labels. The first four need no labels."""

    def __init__(self, job: Job, plan: FinetunePlan) -> None:
        self.job, self.plan = job, plan
        check(job.model, job.data, plan)

    def __call__(self, batch: dict[str, Tensor], teacher_of: Teacher) -> dict[str, Tensor]:
        plan, model = self.plan, self.job.model
        run = partial(outputs, model, batch, classify=plan.kl > 0 or plan.task > 0, hidden=plan.hidden > 0)
        student, logits = run()
        parts: dict[str, Tensor] = {}
        if plan.kl or plan.feature or plan.dense or plan.hidden:
            with torch.no_grad(), teacher_of():
                teacher, goal = run()
            hidden_BTD = student.last_hidden_state
            real_BT = batch.get("attention_mask", torch.ones(hidden_BTD.shape[:2])).to(hidden_BTD.device).bool()
            if plan.kl:
                assert logits is not None and goal is not None
                log_p, log_q = goal.float().log_softmax(-1), logits.float().log_softmax(-1)
                parts["kl"] = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            if plan.feature:
                assert self.job.pool is not None
                guess, aim = (self.job.pool(o.last_hidden_state, real_BT) for o in (student, teacher))
                parts["feature"] = (1 - F.cosine_similarity(guess.float(), aim.float(), dim=-1)).mean()
            if plan.dense:
                parts["dense"] = relative(hidden_BTD, teacher.last_hidden_state, real_BT)
            if plan.hidden:
                parts["hidden"] = hidden_error(student, teacher, real_BT)
        if plan.task:
            assert logits is not None
            parts["task"] = F.cross_entropy(logits.float(), batch["labels"])
        return parts


def outputs(
    model: nn.Module, batch: dict[str, Tensor], *, classify: bool, hidden: bool = False
) -> tuple[Any, Tensor | None]:
    """(the body's output, the classifier's logits [B, C] or None), from one forward. classify: whether to compute them.

    The body is looked at on its way: only some heads hand its last hidden state through.
    """
    inner, seen = body(model), []
    more = {"output_hidden_states": True} if hidden else {}
    if inner is model or not classify:
        return inner(**inputs(inner, batch), **more), None
    hook = inner.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        out = model(**inputs(model, batch), **more)
    finally:
        hook.remove()
    return seen[0], out.logits
