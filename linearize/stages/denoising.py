"""What fine-tuning compares in diffusion models.

denoise: the noise (or v, or flow) itself. prediction: the teacher's. attention: outputs of the attention modules, the
teacher's. variance: the learned variance, the teacher's. CLEAR (2412.16112): denoise 1, prediction 0.5, attention 0.5;
LiT (2501.12976): denoise 1, prediction 0.5, variance 0.05. All but attention are mean squared errors as in the papers;
attention is relative to the teacher's squares, so that layers of large outputs do not drown the others.

The teacher is the model itself before it was converted, or another one of the same latents and noise: LiT's smaller
models learn from DiT-XL/2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from linearize.data.autoencoder import Decoder
from linearize.data.drawing import time_of
from linearize.data.noise import Noising, split
from linearize.plan import FinetunePlan
from linearize.stages.base import Job, inputs, share_of
from linearize.types import InputError

Teacher = Callable[[], AbstractContextManager[Any]]


class Denoising:
    """The losses of one batch, by name."""

    def __init__(self, job: Job, plan: FinetunePlan) -> None:
        assert job.noising is not None
        self.job, self.plan, self.noising = job, plan, job.noising
        if plan.variance and not _learns_variance(job.model):
            raise InputError(
                f"stages.finetune.variance: {type(job.model).__name__} learns no variance (out_channels): set it to 0"
            )
        self.other = job.teachers[plan.teacher] if plan.teacher is not None else None
        if plan.variance and self.other is not None and not _learns_variance(self.other):
            raise InputError(f"stages.finetune.variance: {plan.teacher} learns no variance (out_channels): set it to 0")
        names = [site.name for site in job.surgery.sites]
        self.watched = {name: job.model.get_submodule(name) for name in names[:: plan.every]}

    def __call__(self, batch: dict[str, Tensor], teacher_of: Teacher) -> dict[str, Tensor]:
        plan, model = self.plan, self.job.model
        noisy, goal, t = self.noising.batch(batch)
        given = inputs(model, noisy)
        channels = goal.shape[1]
        with self._outputs() as own:
            guess, spread = split(model(**given, return_dict=False)[0], channels)
        weight = self.noising.min_snr(t) if plan.weighting == "min_snr" else torch.ones(len(goal))
        weight = weight.to(goal.device)
        parts: dict[str, Tensor] = {}
        if plan.denoise:
            parts["denoise"] = squared(guess, goal, weight)
        if plan.prediction or plan.attention or plan.variance:
            with torch.no_grad():
                if self.other is not None:
                    asked, known = inputs(self.other, noisy), own
                    aim, width = split(self.other(**asked, return_dict=False)[0].to(guess.device), channels)
                else:
                    with teacher_of(), self._outputs() as known:
                        aim, width = split(model(**given, return_dict=False)[0], channels)
            if plan.prediction:
                parts["prediction"] = squared(guess, aim, weight)
            if plan.variance:
                assert spread is not None and width is not None
                parts["variance"] = squared(spread, width.to(spread.device), weight)
            if plan.attention:
                parts["attention"] = torch.stack([_relative(own[n], known[n]) for n in self.watched]).mean()
        return parts

    @contextlib.contextmanager
    def _outputs(self) -> Iterator[dict[str, list[Tensor]]]:
        """What the watched attention modules answer meanwhile: of joint attention image and text."""
        seen: dict[str, list[Tensor]] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda module, args, out: seen.update({name: [out] if isinstance(out, Tensor) else list(out)})

        hooks = [m.register_forward_hook(keep(n)) for n, m in self.watched.items() if self.plan.attention]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


def squared(guess: Tensor, goal: Tensor, weight_B: Tensor) -> Tensor:
    """Mean squared error, each example times its weight."""
    return (weight_B * (guess.float() - goal.float()).square().flatten(1).mean(1)).mean()


def _relative(own: list[Tensor], known: list[Tensor]) -> Tensor:
    pairs = [(a.float(), b.float()) for a, b in zip(own, known) if isinstance(b, Tensor)]
    error, size = sum(((a - b) ** 2).sum() for a, b in pairs), sum((b**2).sum() for _, b in pairs)
    return share_of(torch.as_tensor(error), torch.as_tensor(size))


def _learns_variance(model: nn.Module) -> bool:
    config: Any = model.config
    return (getattr(config, "out_channels", None) or config.in_channels) == 2 * config.in_channels


#: settings that say what a denoiser is told beside the time
_TOLD = (
    "num_embeds_ada_norm", "cross_attention_dim", "joint_attention_dim", "caption_channels", "pooled_projection_dim",
)  # fmt: skip
#: how far pictures of the same latents may be apart, relative, to be of one autoencoder in two precisions
_SAME = 0.05


def check_teacher(
    name: str,
    model: nn.Module,
    teacher: nn.Module,
    noisings: tuple[Noising, Noising],
    decoders: tuple[Decoder | None, Decoder | None],
) -> None:
    """Raises InputError where `teacher` cannot be asked what `model` is asked: of other latents, sizes, conditions or
    noise. noisings, decoders: the model's, the teacher's; a decoder None: it draws pixels."""
    refused = f"stages.finetune.teacher: {name} cannot teach this {type(model).__name__}"
    own, other = (dict(m.config) for m in (model, teacher))  # type: ignore[call-overload]
    for key, words in {"in_channels": "channels", "sample_size": "latents of side", **dict.fromkeys(_TOLD, "")}.items():
        if own.get(key) != other.get(key):
            raise InputError(f"{refused}: {words or key} {other.get(key)}, not {own.get(key)}")
    mine, its = noisings
    if (mine.answer, mine.steps) != (its.answer, its.steps):
        raise InputError(f"{refused}: it answers {its.answer} of {its.steps} steps, not {mine.answer} of {mine.steps}")
    if mine.alphas_T is not None and its.alphas_T is not None and not torch.allclose(mine.alphas_T, its.alphas_T):
        raise InputError(f"{refused}: its noise follows another schedule (alphas_cumprod)")
    if time_of(model) != time_of(teacher):
        raise InputError(f"{refused}: it is told the time in other units")
    a, b = decoders
    if (a is None) != (b is None):
        raise InputError(
            f"{refused}: one of them draws pixels, the other latents of an autoencoder (of a model in hand none is "
            "known: convert it by its pipeline's name)"
        )
    if a is not None and b is not None and (apart := a.apart(b)) > _SAME:
        raise InputError(
            f"{refused}: their autoencoders make other pictures of the same latents ({apart:.0%} apart, at most "
            f"{_SAME:.0%} in two precisions of one)"
        )
