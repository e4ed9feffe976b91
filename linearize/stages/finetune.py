"""Fine-tuning: recover end to end what transfer left, by LoRA or in full, against the teacher itself.

The teacher is the same model with the mixers and the LoRA switched off. LoRA is injected by name around the converted
layers, never inside a mixer; mixers are ordinary parameters, trained at `mixer_lr` or frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linearize.plan import FinetunePlan
from linearize.problems import LOSSES
from linearize.stages.base import Job
from linearize.stages.denoising import Denoising
from linearize.stages.loop import train
from linearize.stages.targets import Features, NextTokens
from linearize.surgery.port import CHILD, LINEAR
from linearize.types import InputError, StageReport


def lora_targets(model: nn.Module, sites: list[str], wanted: str | list[str]) -> list[str]:
    """Full names of the linear modules that get LoRA: all around the converted layers ("attention"), or those whose
    name ends with one of `wanted`. Raises InputError when nothing matches."""
    linear = [n for n, m in model.named_modules() if isinstance(m, LINEAR) and CHILD not in n]
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
    """The objective of the stage: a mix of the losses in targets.py, against the teacher or against labels."""

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
        kind = Denoising if job.noising is not None else NextTokens if job.pool is None else Features
        self.targets = kind(job, plan)
        if (
            plan.mode == "full"
            and plan.teacher is None
            and any(getattr(plan, key) for key in LOSSES["finetune"] if key not in ("lm", "task", "denoise"))
        ):
            self.frozen = _Frozen(weights)

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        parts = self.targets(batch, self._teacher)
        total = torch.stack([getattr(self.plan, name) * value for name, value in parts.items()]).sum()
        return {"loss": total, **parts}

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
