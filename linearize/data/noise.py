"""How noise is mixed into clean latents, and what a model is to say of the mixture: read from a scheduler of diffusers.

epsilon        x_t = sqrt(a_t) x + sqrt(1 - a_t) e, answer e              (DDPM, 2006.11239)
v_prediction   the same x_t, answer sqrt(a_t) e - sqrt(1 - a_t) x         (2202.00512)
sample         the same x_t, answer x
flow           x_t = (1 - s) x + s e, answer e - x                        (2210.02747)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.types import InputError

ANSWERS = ("epsilon", "v_prediction", "sample", "flow")


@dataclass(frozen=True)
class Noising:
    """answer: of ANSWERS. alphas_T: a_t of each timestep (None: a flow). steps: timesteps of training. time: what a
    timestep is multiplied with before the model is told."""

    answer: str
    alphas_T: Tensor | None
    steps: int = 1000
    time: float = 1.0

    @classmethod
    def of(cls, scheduler: Any, time: float = 1.0) -> Noising:
        """Of a scheduler with alphas_cumprod or, for flows, sigmas. Raises InputError for another kind."""
        config = scheduler.config
        steps = int(config.num_train_timesteps)
        kind = config.get("prediction_type", "epsilon")
        if "Flow" in type(scheduler).__name__ or kind == "flow_prediction":
            return cls("flow", None, steps, time)
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if alphas is None or kind not in ANSWERS:
            raise InputError(f"{type(scheduler).__name__} ({kind}) says neither alphas_cumprod nor a flow: use DDIM's")
        return cls(kind, alphas.float(), steps, time)

    def draw(self, count: int) -> Tensor:
        """`count` timesteps at random, spread evenly: int64 [B], of flows float32 in (0, steps)."""
        share_B = (torch.randperm(count) + torch.rand(count)) / count
        if self.alphas_T is None:
            return (share_B * self.steps).clamp(min=1e-3 * self.steps)
        return (share_B * self.steps).long().clamp(max=self.steps - 1)

    def _shares(self, t_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(of the clean latents, of the noise) in the mixture, each [B, 1, ...]."""
        if self.alphas_T is None:
            noise = t_B.float() / self.steps
            clean = 1 - noise
        else:
            a = self.alphas_T.to(t_B.device)[t_B.long()]
            clean, noise = a.sqrt(), (1 - a).sqrt()
        shape = (-1, *[1] * (like.ndim - 1))
        return clean.view(shape).to(like), noise.view(shape).to(like)

    def mix(self, clean: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """x_t, of the shape of `clean` [B, ...]."""
        a, b = self._shares(t_B, clean)
        return a * clean + b * noise

    def goal(self, clean: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """What the model is to answer."""
        if self.answer == "epsilon":
            return noise
        if self.answer == "sample":
            return clean
        if self.answer == "flow":
            return noise - clean
        a, b = self._shares(t_B, clean)
        return a * noise - b * clean

    def told(self, t_B: Tensor) -> Tensor:
        """The timesteps as the model is told them."""
        return t_B if self.time == 1.0 else t_B * self.time

    def min_snr(self, t_B: Tensor, gamma: float = 5.0) -> Tensor:
        """Weights [B] of the squared error, by the signal-to-noise ratio (2303.09556, section 3.4)."""
        clean, noise = self._shares(t_B, torch.empty(1, dtype=torch.float32))
        snr = (clean / noise.clamp(min=1e-8)) ** 2
        most = snr.clamp(max=gamma)
        if self.answer == "epsilon":
            return most / snr.clamp(min=1e-8)
        return most if self.answer == "sample" else most / (snr + 1)

    def batch(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """(the model's inputs with noise mixed in, what it is to answer, timesteps [B]): from torch's own random
        state, which training seeds step by step."""
        clean = batch["hidden_states"]
        t = self.draw(len(clean)).to(clean.device)
        noise = torch.randn(clean.shape, dtype=torch.float32).to(clean)
        made = {**batch, "hidden_states": self.mix(clean, noise, t), "timestep": self.told(t)}
        return made, self.goal(clean, noise, t), t


def split(out_BC: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """(the answer, the learned variance or None): models that learn it have twice the channels, on axis 1."""
    if out_BC.ndim > 3 and out_BC.shape[1] == 2 * channels:
        answer, variance = out_BC.chunk(2, 1)
        return answer, variance
    return out_BC, None
