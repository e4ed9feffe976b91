"""Fine-tuning: recover end to end what transfer left, by LoRA or in full, against the teacher's own logits.

The teacher is the same model with the mixers and the LoRA switched off. LoRA is injected by name around the converted
layers, never inside a mixer; mixers are ordinary parameters, trained at `mixer_lr` or frozen.
"""

from __future__ import annotations

import inspect
import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from linearize.plan import FinetunePlan
from linearize.stages.base import Job, body, share_of
from linearize.stages.head import head_losses, logit_losses, plain_head
from linearize.stages.loop import train
from linearize.surgery.port import CHILD
from linearize.types import InputError, StageReport

log = logging.getLogger(__name__)


def lora_targets(model: nn.Module, sites: list[str], wanted: str | list[str]) -> list[str]:
    """Full names of the linear modules that get LoRA: all around the converted layers ("attention"), or those whose
    name ends with one of `wanted`. Raises InputError when nothing matches."""
    from transformers.pytorch_utils import Conv1D

    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and CHILD not in n]
    if wanted == "attention":
        found = [n for n in linear if any(n.startswith(f"{site}.") for site in sites)]
    else:
        found = [n for n in linear if any(n == w or n.endswith(f".{w}") for w in wanted)]
    if not found:
        raise InputError(f"lora.targets: no linear module is called {wanted}; the model has {linear[:4]} ...")
    return found


def inject_lora(model: nn.Module, plan: FinetunePlan, sites: list[str]) -> dict[str, nn.Parameter]:
    """Put LoRA into the model (once) and return its parameters, float32, by name."""
    if not any("lora_" in n for n, _ in model.named_parameters()):
        from peft import LoraConfig, inject_adapter_in_model

        targets = lora_targets(model, sites, plan.lora.targets)
        config = LoraConfig(
            r=plan.lora.r, lora_alpha=plan.lora.alpha, lora_dropout=plan.lora.dropout, target_modules=targets
        )
        training = model.training
        inject_adapter_in_model(config, model)
        model.train(training)
    for name, module in model.named_modules():
        if name.endswith("lora_dropout"):
            module.train()  # the rest of the model stays in eval mode: its own dropout would blur the targets
    found = {n: p for n, p in model.named_parameters() if "lora_" in n}
    for parameter in found.values():
        parameter.data = parameter.data.float()
    return found


class Finetune:
    """The objective of the stage: a mix of logit KL, next-token loss and hidden-state matching."""

    def __init__(self, job: Job, plan: FinetunePlan, name: str = "finetune") -> None:
        self.job, self.plan, self.name = job, plan, name
        model = job.model
        torch.manual_seed(job.seed)  # LoRA's random half
        model.requires_grad_(False)
        if plan.mode == "lora":
            weights = inject_lora(model, plan, [s.name for s in job.surgery.sites])
        else:
            model.float()  # half-precision weights would round small updates away
            weights = {n: p for n, p in model.named_parameters() if CHILD not in n}
        self.groups = [(weights, plan.lr)]
        mixers = {n: p for n, p in model.named_parameters() if CHILD in n}
        if plan.mixer_lr and mixers:
            self.groups.append((mixers, plan.mixer_lr))
        for parameters, _ in self.groups:
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        self.head, self.looked = None, False  # found at the first batch: it takes one to compare
        self.picks = "logits_to_keep" in inspect.signature(model.forward).parameters
        if plan.mode == "full" and (plan.kl or plan.hidden):
            self.frozen = _Frozen(weights)

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        plan = self.plan
        labels = batch["labels"]
        inputs: dict[str, Any] = {k: v for k, v in batch.items() if k != "labels"}
        inputs["use_cache"] = False
        if plan.hidden:
            inputs["output_hidden_states"] = True
        if not self.looked:
            self.head, self.looked = self._plain_head(inputs), True
        places_P = self._places(labels)
        target_BP = labels[:, (places_P + 1).clamp(max=labels.shape[1] - 1)]
        learn_BP = (target_BP != -100) & (places_P + 1 < labels.shape[1])
        keep = {"logits_to_keep": places_P} if self.picks and len(places_P) < labels.shape[1] else {}
        run = body(self.job.model) if self.head else partial(self.job.model, **keep)
        student = run(**inputs)
        teacher = None
        if plan.kl or plan.hidden:
            with torch.no_grad(), self._teacher():
                teacher = run(**inputs)
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
            pairs = zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True)
            errors = [share_of(((a - b).float() ** 2).sum(), (b.float() ** 2).sum()) for a, b in pairs]
            parts["hidden"] = torch.stack(errors).mean()
        total = torch.stack([getattr(plan, name) * value for name, value in parts.items()]).sum()
        return {"loss": total, **parts}

    def _plain_head(self, inputs: dict[str, Any]) -> nn.Linear | None:
        """The head whose losses are computed a block at a time, None where logits are more than that."""
        one = {k: v[:1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
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

    def _teacher(self) -> Any:
        if self.plan.mode == "full":
            return self.frozen.swapped(self.job.surgery)
        return self.job.surgery.teacher()


class _Frozen:
    """The weights as they were before full fine-tuning, put in for the teacher's forward."""

    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        self.weights = weights
        self.original = {n: p.detach().clone() for n, p in weights.items()}

    def swapped(self, surgery: Any) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def swap():
            self._exchange()
            try:
                with surgery.teacher():
                    yield
            finally:
                self._exchange()

        return swap()

    def _exchange(self) -> None:
        for name, parameter in self.weights.items():
            parameter.data, self.original[name] = self.original[name], parameter.data


def finetune(job: Job, plan: FinetunePlan, name: str = "finetune") -> StageReport:
    """Run the stage: LoRA (or all weights) and, with `mixer_lr`, the mixers change. name: as in `transfer`."""
    training = job.model.training
    try:
        return train(job, Finetune(job, plan, name), plan)
    finally:
        job.model.train(training)
