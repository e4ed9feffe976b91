"""Working memory that is used again from call to call: fresh pages cost more than a short sequence's arithmetic."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

#: bytes that a thread keeps at most
KEPT = 64 * 2**20
_LINE = 64
_kept = threading.local()


class Arena:
    """Tensors for one call, none of which may outlive it, nor the making of the thread's next Arena."""

    def __init__(self, like: Tensor) -> None:
        self.device, self.taken = like.device, 0
        # Work on an accelerator may still be under way when the call returns.
        self.memory = getattr(_kept, "memory", None) if self.device.type == "cpu" else None

    def make(self, *sizes: int, dtype: torch.dtype) -> Tensor:
        """Like torch.empty."""
        count, start = math.prod(sizes), self.taken
        size = count * dtype.itemsize
        self.taken += -(-size // _LINE) * _LINE
        if self.memory is None or self.taken > len(self.memory):
            return torch.empty(sizes, dtype=dtype, device=self.device)
        return self.memory[start : start + size].view(dtype).view(sizes)

    def like(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.make(*t.shape, dtype=dtype or t.dtype)

    def done(self) -> None:
        """Room for as much next time."""
        held = 0 if self.memory is None else len(self.memory)
        if self.device.type == "cpu" and held < self.taken <= KEPT:
            _kept.memory = torch.empty(self.taken, dtype=torch.uint8)
