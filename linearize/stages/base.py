"""A job: what all stages of one conversion share. Nothing global."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from linearize.types import GateError

if TYPE_CHECKING:
    from linearize.data.examples import Examples
    from linearize.data.noise import Noising
    from linearize.surgery.attach import Surgery


@dataclass
class Job:
    """model: the converted model, surgery: its handle, data: what is trained on. noising: how noise gets into it, of
    diffusion models. teachers: other models that stages name, by name.

    work: folder for checkpoints (None: none are written). digest: of the plan and all inputs; checkpoints of another
    digest are refused. resume: continue from the newest complete checkpoint. checkpoint_seconds, checkpoint_steps: how
    often one is written. on_step(stage, step) is called after every optimiser step, before a checkpoint is written.
    """

    model: nn.Module
    surgery: Surgery
    data: Examples
    pool: Callable[[Tensor, Tensor], Tensor] | None = None
    noising: Noising | None = None
    teachers: Mapping[str, nn.Module] = field(default_factory=dict)
    seed: int = 0
    work: Path | None = None
    digest: str = ""
    resume: bool = False
    checkpoint_seconds: float = 60.0
    checkpoint_steps: int | None = None
    progress: bool = True
    on_step: Callable[[str, int], None] = lambda stage, step: None

    def prepared(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's inputs of a batch of the data: with noise in them, of diffusion models."""
        return batch if self.noising is None else self.noising.batch(batch)[0]


class Processes:
    """The processes of one run: one, or those that torchrun or accelerate started. The first writes, all compute."""

    def __init__(self, device: str = "auto") -> None:
        from accelerate import PartialState

        many = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available()) if many else None

    @property
    def first(self) -> bool:
        return self.state is None or self.state.is_main_process

    def wait(self) -> None:
        """Until all are here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process goes through the block before the others do, who find on disk what it made."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


def share_of(total: Tensor, weight: Tensor) -> Tensor:
    """total / weight, where the weight is the mean over all processes: averaged by DistributedDataParallel, the loss
    of two processes is then exactly that of one with the whole batch."""
    weight = weight.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(weight)
        weight = weight / dist.get_world_size()
    return total / weight.clamp(min=torch.finfo(weight.dtype).tiny)


@functools.cache
def _parameters(cls: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(cls.forward).parameters)


def inputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What the model is called with for a batch: on its device, pixels in its dtype, without labels, and without a
    cache where it keeps one."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    found: dict[str, Any] = {}
    for name, value in batch.items():
        if name != "labels":
            found[name] = value.to(weight.device, weight.dtype if value.is_floating_point() else None)
    if "use_cache" in _parameters(type(model)):
        found["use_cache"] = False
    return found


def body(model: nn.Module) -> nn.Module:
    """The model without its language-model head, where it has one."""
    return getattr(model, "base_model", model)


def not_finite(what: str, model: nn.Module) -> GateError:
    """The error for a loss that is not finite: names the first parameter at fault, else `what`."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return GateError(f"{name} holds NaN or infinity; the last good checkpoint is kept (lower lr or clip)")
    return GateError(f"{what} is NaN or infinite; the last good checkpoint is kept (lower lr or clip)")
