"""Projections that start afresh, with the teacher's own kept aside: for methods that inherit nothing of attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from linearize.types import Unsupported


@dataclass
class Renewed:
    """One parameter of an attention module of which there are two: the teacher's and a new one. aside: the one that is
    not in its place now."""

    module: nn.Module
    name: str
    aside: nn.Parameter

    @property
    def present(self) -> nn.Parameter:
        return getattr(self.module, self.name)

    def swap(self) -> None:
        """The other one takes its place, where and in the type that the model is by now."""
        here, other = self.present, self.aside
        if other.device != here.device or other.dtype != here.dtype:
            other.data = other.data.to(here.device, here.dtype)
        setattr(self.module, self.name, other)
        self.aside = here


def renew(name: str, attention: nn.Module) -> list[Renewed]:
    """New weights (Xavier) and biases (zero) for every linear projection inside `attention`, in place. Raises
    Unsupported where it has none."""
    found = [m for m in attention.modules() if isinstance(m, nn.Linear)]
    if not found:
        raise Unsupported(f"{name} has no linear projections of its own to start afresh: set start: inherit")
    renewed = []
    for module in found:
        for key, old in list(module.named_parameters(recurse=False)):
            new = nn.Parameter(torch.zeros_like(old))
            if key == "weight":
                nn.init.xavier_uniform_(new)
            setattr(module, key, new)
            renewed.append(Renewed(module, key, old))
    return renewed
