"""How far a low-precision run may be from the truth: derived from float64 runs, never chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9, what: str = "values") -> None:
    """Raises AssertionError unless |found - expected| <= tolerance * max(1, max |expected|), with the place and size
    of the largest difference. NaN is never close."""
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    if found.numel() == 0:
        return
    error = (found.double() - expected.double()).abs()
    allowed = tolerance * max(1.0, expected.double().abs().max().item())
    if not bool((error <= allowed).all()):
        worst = error.nan_to_num(nan=torch.inf).argmax()
        place = tuple(int(i) for i in torch.unravel_index(worst, error.shape))
        raise AssertionError(
            f"{what}: difference {error.flatten()[worst].item():.3g} at {place}, allowed {allowed:.3g}"
        )


def blocks(error_like: Tensor, count: int = 8) -> Tensor:
    """Root mean square of [B, H, T, V] over `count` equal stretches of T: a bad tail is not averaged away."""
    return torch.stack([part.double().pow(2).mean().sqrt() for part in error_like.chunk(count, 2)])


def check_rounded(run: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """`run` on inputs rounded to `dtype` loses no more than the rounding itself costs.

    The unit of error is what exact arithmetic (float64) makes of the rounded inputs against the exact ones, plus half
    a unit in the last place for writing the answer in `dtype`. Compared by stretches of T. Raises AssertionError.
    """
    exact = [x.double() for x in inputs]
    rounded = [x.to(dtype) for x in inputs]
    truth = run(*[x.double() for x in rounded])
    unavoidable = blocks(truth - run(*exact)) + torch.finfo(dtype).eps / 2 * blocks(truth)
    found = run(*rounded)
    assert found.dtype == dtype, f"the answer to {dtype} inputs is {found.dtype}"
    error = blocks(found.double() - truth)
    assert bool((error <= unavoidable).all()), (
        f"{dtype} run errs by {error.tolist()}, rounding alone by {unavoidable.tolist()}"
    )
