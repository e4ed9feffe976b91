"""The transformers seam: modules that call `ALL_ATTENTION_FUNCTIONS` after projection, norms, RoPE and cache update.

One registered attention function and one registered mask function reach every such family; a family needs no code.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

import torch
from torch import Tensor, nn

from linearize.seams.hf import (
    AttentionInterface,
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
)
from linearize.types import InputError

#: the implementation name that routes a module's attention to its port
NAME = "linearize"


def reaches(cls: type[nn.Module]) -> bool:
    """Whether modules of this class hand over q, k, v through the attention interface."""
    forward: Any = cls.forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    code = getattr(forward, "__code__", None)
    return code is not None and "attention_interface" in (*code.co_varnames, *code.co_cellvars)


@functools.cache
def given_keys(cls: type[nn.Module]) -> frozenset[str]:
    """The children that this class's own forward calls with `key_value_states`, the keys of another sequence."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, TypeError, SyntaxError):  # no source: such a call is caught when it comes
        return frozenset()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return frozenset(
        call.func.attr
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) == "self"
        and any(k.arg == "key_value_states" and ast.unparse(k.value) != "None" for k in call.keywords)
    )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What families call instead of softmax: the module's port answers. Returns (o_BTHV, None)."""
    port = module.__dict__.get("linearize_port")
    if port is None or port.call is None:
        raise RuntimeError(
            f"attention of {type(module).__name__} was routed to linearize without its context: something replaced the "
            "module's forward after the surgery; detach, then attach again as the last step"
        )
    o_BHTV = port.answer(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    return o_BHTV.transpose(1, 2).contiguous(), None


def token_codes(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a model whose every layer is linear: what is needed of it, without a T x T tensor.

    None (nothing padded, one document), bool [B, S] (True at real tokens), or int64 [B, S] (document number from 1,
    0 at padding). Document borders are where a token does not see the one before it.
    """
    real_BS = None
    if attention_mask is not None:
        real_BS = attention_mask.bool()
        missing = kv_length + kv_offset - real_BS.shape[-1]
        if missing > 0:  # a static cache: slots not yet written
            real_BS = torch.nn.functional.pad(real_BS, (0, missing))
        real_BS = real_BS[:, kv_offset : kv_offset + kv_length]
    plain = mask_function in (causal_mask_function, bidirectional_mask_function)
    if plain or q_length == 1 or attention_mask is not None or q_length != kv_length:
        return real_BS
    batch = torch.arange(batch_size, device=device)[:, None]
    column = torch.arange(kv_length, device=device)[None]
    sees_previous = mask_function(batch, torch.zeros_like(batch), column, (column - 1).clamp(min=0))
    border = (~sees_previous).expand(batch_size, kv_length).long()
    sees_next = mask_function(batch, torch.zeros_like(batch), (column - 1).clamp(min=0), column)
    if not torch.compiler.is_compiling() and bool((sees_next & sees_previous).all()):
        return None  # one document, in both directions
    return 1 + border.cumsum(1)


def read_mask(
    mask: Tensor | None, tokens: int, column: int, packed: bool, causal: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """(valid_BT, segments_BT) of this call's `tokens`, whose first one stands at `column` of the mask. B is the mask's:
    1 where it is the same for every row.

    A model with softmax layers left hands its 4-D mask to all of them. There a token is real exactly if it may see
    itself: the diagonal, never a row (rows of a sliding mask lie, columns of a static cache run ahead). Documents
    (`packed`: no cache, so they are possible) start where the sub-diagonal is closed. A mask [B, 1, 1, S] says the
    same to all queries. Raises InputError where a bidirectional layer is given a mask that hides what comes after.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor):
        raise RuntimeError(f"linearize cannot read a {type(mask).__name__}: load with attn_implementation='sdpa'")
    if mask.ndim == 2:
        codes = mask[:, column : column + tokens]
        if codes.dtype == torch.int64:
            return codes > 0, codes.cummax(1).values
        return codes.bool(), None
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if seen.shape[2] == 1:
        return seen.any(1)[:, 0, column : column + tokens], None
    seen_BTT = seen.any(1)[:, -tokens:, column : column + tokens]
    valid_BT = seen_BTT.diagonal(dim1=1, dim2=2)
    if not packed or tokens == 1:
        return valid_BT, None
    pairs = valid_BT[:, 1:] & valid_BT[:, :-1]
    border = pairs & ~seen_BTT.diagonal(-1, 1, 2)
    if not causal and not torch.compiler.is_compiling():
        if bool((border != pairs & ~seen_BTT.diagonal(1, 1, 2)).any()):
            raise InputError("this mask hides tokens in one direction only, but the converted layer is bidirectional")
        if not bool(border.any()):  # one document: nothing to keep apart
            return valid_BT, None
    first = torch.ones_like(valid_BT[:, :1], dtype=torch.long)
    return valid_BT, torch.cat([first, 1 + border.long().cumsum(1)], 1)


def register() -> None:
    """Make the implementation name known to transformers (idempotent)."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, token_codes)
