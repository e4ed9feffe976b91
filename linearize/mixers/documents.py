"""A batch taken apart into documents, for methods that count the tokens of each: one row per document, padding last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """N documents of at most L tokens, from B rows of T. What is no token of a document is between no two of them.

    valid_NL: where a document has a token (None: everywhere, and the batch is as it was). count_N: its tokens. row_N:
    the row of the batch it stands in; a row without a token has one empty document. last_B: the last one of each row.
    """

    count_N: Tensor
    row_N: Tensor
    last_B: Tensor
    valid_NL: Tensor | None = None
    source_NL: Tensor | None = None
    place_BT: Tensor | None = None

    @classmethod
    def of(cls, codes_BT: Tensor, plain: bool) -> Documents:
        """From `Context.codes`: 0 at padding, else a number that never decreases. plain: nothing but one document."""
        B, T = codes_BT.shape
        device = codes_BT.device
        if plain:
            rows = torch.arange(B, device=device)
            return cls(torch.full((B,), T, device=device), rows, rows)
        real = codes_BT > 0
        before = torch.cat([torch.zeros_like(codes_BT[:, :1]), codes_BT.cummax(1).values[:, :-1]], 1)
        number_BT = (real & (codes_BT > before)).cumsum(1)
        many_B = number_BT[:, -1].clamp(min=1)
        last_B = many_B.cumsum(0) - 1
        document_BT = torch.where(real, number_BT - 1 + (last_B - many_B + 1)[:, None], int(many_B.sum()))
        N = int(many_B.sum())
        count_N = document_BT.flatten().bincount(minlength=N + 1)[:N]
        start_N = count_N.cumsum(0) - count_N
        order = document_BT.flatten().argsort(stable=True)  # padding comes last
        column_L = torch.arange(max(1, int(count_N.max())), device=device)
        valid_NL = column_L < count_N[:, None]
        source_NL = order[(start_N[:, None] + column_L).clamp(max=B * T - 1)]
        place_BT = torch.zeros(B * T, dtype=torch.long, device=device)
        slots = torch.arange(N * len(column_L), device=device).view(N, -1)
        place_BT[source_NL[valid_NL]] = slots[valid_NL]
        row_N = torch.arange(B, device=device).repeat_interleave(many_B)
        return cls(count_N, row_N, last_B, valid_NL, source_NL, torch.where(real, place_BT.view(B, T), -1))

    def apart(self, x_BHTK: Tensor) -> Tensor:
        """[N, H, L, K]; where a document has no token anything may stand."""
        if self.source_NL is None:
            return x_BHTK
        return x_BHTK.transpose(1, 2).flatten(0, 1)[self.source_NL].transpose(1, 2)

    def together(self, x_NHLV: Tensor) -> Tensor:
        """[B, H, T, V] as it was, 0 at padding."""
        if self.place_BT is None:
            return x_NHLV
        rows = x_NHLV.transpose(1, 2).flatten(0, 1)[self.place_BT.clamp(min=0)]
        hidden = (self.place_BT < 0)[..., None, None]
        return rows.masked_fill(hidden, 0).transpose(1, 2)
