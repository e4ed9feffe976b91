"""One attention operation against its peers, in turns in one process: time, share of what a matrix product could do,
memory, and first of all whether the answer is right.

Every contestant is checked against float64 on the first tokens (causal: they do not depend on the rest) and gets no
time where that fails. One that needs more than PATIENCE seconds for a run is not asked for longer sequences.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from linearize.evaluate import peers
from linearize.evaluate.speed import peak_bytes
from linearize.ops.linear import linear
from linearize.ops.mapped_linear import features, mapped_linear
from linearize.ops.mapped_linear.reference import mapped_linear_reference

PATIENCE = 30.0
#: seconds of a run from which two of them are enough, the first included
SLOW = 3.0
#: bytes that a contestant may need beside its inputs
ROOM = 4e9
#: root mean square of the error over that of the answer, at most
ALLOWED = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
UNITS = {
    "ms": "median",
    "low": "ms",
    "high": "ms",
    "times_sdpa": "SDPA over it, median of turns",
    "times_low": "",
    "times_high": "",
    "floor": "its time over the floor's",
    "flops_share": "of the rate of a matrix product",
    "bytes_share": "inputs and outputs once, of the rate of a copy",
    "peak_bytes": "at once",
    "error": "RMS, relative",
}
MAP, EPS = "split_softmax", 1e-12


@dataclass(frozen=True)
class Inputs:
    """q, k, v [1, H, T, D] and maps [H, D, D] that are no identity."""

    q: Tensor
    k: Tensor
    v: Tensor
    weights: tuple[Tensor, Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *self.weights]

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        q, k, v, *weights = (change(x) for x in self.tensors)
        return Inputs(q, k, v, (weights[0], weights[1]))

    def first(self, tokens: int) -> Inputs:
        q, k, v = (x[:, :, :tokens] for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v)


def make(tokens: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    g = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(1, heads, tokens, dim, generator=g).to(device, dtype) for _ in range(3))
    w_q, w_k = (torch.eye(dim) + 0.1 * torch.randn(heads, dim, dim, generator=g) for _ in range(2))
    return Inputs(q, k, v, (w_q.to(device), w_k.to(device)))


def _never(inputs: Inputs) -> None:
    return None


@dataclass(frozen=True)
class Contestant:
    """run: the output. truth: the same from the definition, of float64 inputs. refuses: why it cannot, or None.
    linear: whether the floor of linear attention is its floor. flops: of a forward, by tokens, heads and their size."""

    name: str
    run: Callable[[Inputs], Tensor]
    truth: Callable[[Inputs], Tensor]
    refuses: Callable[[Inputs], str | None] = _never
    backward: bool = True
    linear: bool = False
    flops: Callable[[int, int, int], float] | None = None


def _hedgehog(impl: str) -> Callable[[Inputs], Tensor]:
    return lambda x: mapped_linear(x.q, x.k, x.v, MAP, x.weights, impl=impl).output


def _by_definition(x: Inputs) -> Tensor:
    heads = x.q.shape[1]
    out = mapped_linear_reference(x.q, x.k, x.v, *x.weights, *(None,) * 5, name=MAP, key_heads=heads, eps=EPS)
    return out[0]


def _separate(x: Inputs) -> Tensor:
    """Maps first, for the whole sequence, then chunks by plain operations: what fusing is compared with."""
    high = torch.float64 if x.q.dtype == torch.float64 else torch.float32
    phi_q, phi_k = (features(t.to(high), MAP, w, None) for t, w in zip((x.q, x.k), x.weights, strict=True))
    out = linear(phi_q, phi_k, x.v, impl="torch")
    return (out.numerator / (out.normaliser + EPS)[..., None]).to(x.q.dtype)


def _cumsum(x: Inputs) -> Tensor:
    """A state for every token, by cumsum: the shortest way to write it."""
    high = torch.float64 if x.q.dtype == torch.float64 else torch.float32
    phi_q, phi_k = (features(t.to(high), MAP, w, None) for t, w in zip((x.q, x.k), x.weights, strict=True))
    states = (phi_k[..., None] * x.v.to(high)[..., None, :]).cumsum(2)
    mass = (phi_q * phi_k.cumsum(2)).sum(-1)
    return ((phi_q[..., None, :] @ states)[..., 0, :] / (mass + EPS)[..., None]).to(x.q.dtype)


def _sdpa(*backends: SDPBackend) -> Callable[[Inputs], Tensor]:
    def run(x: Inputs) -> Tensor:
        if not backends:
            return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True)
        with sdpa_kernel(list(backends)):
            return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True)

    return run


def _softmax(x: Inputs) -> Tensor:
    T = x.q.shape[2]
    seen = torch.ones(T, T, dtype=torch.bool, device=x.q.device).tril()
    scores = (x.q @ x.k.mT / math.sqrt(x.q.shape[-1])).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ x.v


def _room(bytes_of: Callable[[Inputs], float]) -> Callable[[Inputs], str | None]:
    def refuses(x: Inputs) -> str | None:
        needed = bytes_of(x)
        return None if needed <= ROOM else f"would hold {needed / 1e9:.0f} GB"

    return refuses


def _flex() -> Callable[[Inputs], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def run(x: Inputs) -> Tensor:
        T = x.q.shape[2]
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device=x.q.device)
        answer: Any = compiled(x.q, x.k, x.v, block_mask=mask)
        return answer

    return run


def contestants(device: torch.device, flex: bool = False) -> list[Contestant]:
    """Who runs on this device; the first one is SDPA, which others are compared with."""

    def squares(x: Inputs) -> float:
        return 2.0 * x.q.shape[1] * x.q.shape[2] ** 2 * x.q.element_size()

    def states(x: Inputs) -> float:
        return 8.0 * x.v.numel() * 2 * x.q.shape[-1]

    found = [
        Contestant("sdpa", _sdpa(), _softmax, flops=softmax_flops),
        Contestant("mapped_linear", _hedgehog("auto"), _by_definition, linear=True, flops=floor_flops),
        Contestant("separate maps", _separate, _by_definition, linear=True),
        Contestant("cumsum", _cumsum, _by_definition, _room(states), linear=True),
        Contestant("sdpa math", _sdpa(SDPBackend.MATH), _softmax, _room(squares)),
    ]
    if peers.missing() is None:
        found.append(Contestant("qwen3_next", peers.delta_rule, peers.delta_rule_definition))
        found.append(Contestant("minimax", peers.lightning, peers.lightning_definition))
    if device.type == "cuda":
        found.append(Contestant("sdpa flash", _sdpa(SDPBackend.FLASH_ATTENTION), _softmax))
        found.append(Contestant("sdpa cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION), _softmax))
        found.append(Contestant("sdpa efficient", _sdpa(SDPBackend.EFFICIENT_ATTENTION), _softmax))
        found.append(Contestant("mapped_linear torch", _hedgehog("torch"), _by_definition, linear=True))
    if flex:
        found.append(Contestant("flex_attention", _flex(), _softmax, backward=device.type == "cuda"))
    return found


# --------------------------------------------------------------------------------------------------------- counts
def floor_flops(tokens: int, heads: int, dim: int, chunk: int = 64) -> float:
    """Forward operations of causal Hedgehog, F = 2 dim: maps, state, and what is inside chunks."""
    maps, state, inside = 4 * dim * dim, 4 * 2 * dim * (dim + 1), 2 * chunk * (2 * dim + dim)
    return float(tokens * heads * (maps + state + inside))


def softmax_flops(tokens: int, heads: int, dim: int) -> float:
    """Forward operations of causal softmax: two products of half a square."""
    return 2.0 * tokens * tokens * heads * dim


GEMM = 1024
#: numbers that a copy moves, to and fro: more than caches hold
COPY = 1 << 25


def _gemm(dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    a, b = (torch.randn(GEMM, GEMM, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def _copy(device: torch.device) -> Callable[[], Tensor]:
    a = torch.zeros(COPY, device=device)
    b = a.clone()
    return lambda: b.copy_(a)


# --------------------------------------------------------------------------------------------------------- running
def _error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return ((found - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


def _run(contestant: Contestant, x: Inputs, backward: bool) -> Callable[[], Any]:
    if not backward:

        @torch.no_grad()
        def forward() -> Any:
            return contestant.run(x)

        return forward
    x = x.map(lambda t: t.detach().clone().requires_grad_())
    upstream = torch.ones_like(x.v[..., :1]).expand_as(x.v)

    def both() -> Any:
        return torch.autograd.grad(contestant.run(x), x.tensors, upstream, allow_unused=True)

    return both


def error_of(contestant: Contestant, x: Inputs, backward: bool, tokens: int = 512) -> float:
    """The worst of its answers (backward: the gradients of q, k, v and maps) on the first tokens, against float64."""
    x = x.first(min(tokens, x.q.shape[2]))
    if not backward:
        return _error(contestant.run(x), contestant.truth(x.map(lambda t: t.double())))
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(x.v.shape, generator=generator).to(x.v.device)

    def gradients(run: Callable[[Inputs], Tensor], y: Inputs) -> list[Tensor | None]:
        y = y.map(lambda t: t.detach().clone().requires_grad_())
        return list(torch.autograd.grad(run(y), y.tensors, upstream.to(y.v.dtype), allow_unused=True))

    found = gradients(contestant.run, x)
    exact = gradients(contestant.truth, x.map(lambda t: t.double()))
    return max(_error(f, e) for f, e in zip(found, exact, strict=True) if f is not None and e is not None)


def _timed(run: Callable[[], Any], device: torch.device, times: int = 1) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


@dataclass
class Table:
    """rows by name, metrics as in UNITS; notes in words."""

    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def compare(
    lengths: Sequence[int],
    *,
    backward: bool = False,
    heads: int = 8,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    repeats: int = 5,
    flex: bool = False,
    without: Sequence[str] = (),
) -> Table:
    """Rows "forward NAME T", or "both NAME T" for forward and backward. without: contestants that stay out."""
    device = torch.device(device)
    table, word = Table(), "both" if backward else "forward"
    if why := peers.missing():
        table.notes.append(f"{word} qwen3_next, minimax: left out, {why}")
    field_ = [c for c in contestants(device, flex) if (c.backward or not backward) and c.name not in without]
    gone: set[str] = set()
    ceilings = {"gemm": _gemm(dtype, device), "copy": _copy(device)}
    for length in lengths:
        x = make(length, heads, dim, dtype, device)
        runs: dict[str, Callable[[], Any]] = {}
        errors: dict[str, float] = {}
        for c in field_:
            if c.name in gone:
                continue
            if why := c.refuses(x):
                table.notes.append(f"{word} {c.name} {length}: left out, {why}")
                continue
            error = error_of(c, x, backward)
            if not error <= ALLOWED[dtype]:
                table.notes.append(f"{word} {c.name} {length}: WRONG by {error:.2g}, no time is given")
                continue
            runs[c.name], errors[c.name] = _run(c, x, backward), error
        times: dict[str, list[float]] = {name: [] for name in (*ceilings, *runs)}
        for turn in range(repeats + 1):  # the first is a warm-up
            for name, run in [*ceilings.items(), *runs.items()]:
                if name in gone or (name not in ceilings and len(times[name]) > 1 and times[name][0] > SLOW):
                    continue
                taken = _timed(run, device, 5 if name == "gemm" else 1)
                if turn or taken > SLOW:
                    times[name].append(taken)
                if taken > PATIENCE and name not in ceilings:
                    gone.add(name)
                    table.notes.append(f"{word} {name}: {taken:.0f} s at {length} tokens, not asked for more")
        passes = 3 if backward else 1
        floor = floor_flops(length, heads, dim) * passes / (2.0 * GEMM**3)
        moved = 4.0 * x.q.numel() * x.q.element_size() * (2 if backward else 1) / (8.0 * COPY)
        for c in field_:
            if c.name not in runs:
                continue
            row = _row(times[c.name], times["sdpa"] if "sdpa" in runs else [])
            if c.linear:
                row["floor"] = statistics.median(
                    t / (g * floor) for t, g in zip(times[c.name], times["gemm"], strict=False)
                )
            if c.flops is not None:
                done = c.flops(length, heads, dim) * passes / (2.0 * GEMM**3)
                turns = list(zip(times[c.name], times["gemm"], times["copy"], strict=False))
                row["flops_share"] = statistics.median(done * g / t for t, g, _ in turns)
                row["bytes_share"] = statistics.median(moved * w / t for t, _, w in turns)
            if times[c.name][0] < 5:
                row["peak_bytes"] = float(peak_bytes(runs[c.name], device))
            table.rows[f"{word} {c.name} {length}"] = {**row, "error": errors[c.name]}
        rate = 2.0 * GEMM**3 / statistics.median(times["gemm"]) / 1e9
        table.notes.append(f"{word} {length}: a matrix product of {GEMM} x {GEMM} ran at {rate:.0f} GFLOP/s")
    return table


def _row(mine: list[float], theirs: list[float]) -> dict[str, float]:
    row = {"ms": 1e3 * statistics.median(mine), "low": 1e3 * min(mine), "high": 1e3 * max(mine)}
    ratios = [t / m for t, m in zip(theirs, mine, strict=False)]
    if ratios:
        row.update(times_sdpa=statistics.median(ratios), times_low=min(ratios), times_high=max(ratios))
    return row


def decode(
    lengths: Sequence[int],
    *,
    batch: int = 1,
    heads: int = 8,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    repeats: int = 15,
) -> Table:
    """Rows "decode NAME T": one token behind T, from a state, and by SDPA over keys and values kept in one piece."""
    device = torch.device(device)
    table = Table()
    for length in lengths:
        x = make(length, heads, dim, dtype, device).map(lambda t: t.expand(batch, *t.shape[1:]) if t.ndim == 4 else t)
        k, v = x.k.contiguous(), x.v.contiguous()
        last = replace(x, q=x.q[:, :, -1:], k=x.k[:, :, -1:], v=x.v[:, :, -1:])
        with torch.no_grad():
            before = [t[:, :, :-1] for t in (x.q, x.k, x.v)]
            state = mapped_linear(*before, MAP, x.weights).state

        @torch.no_grad()
        def step(last=last, state=state) -> Any:
            return mapped_linear(last.q, last.k, last.v, MAP, last.weights, state=state)

        @torch.no_grad()
        def softmax(q=last.q, k=k, v=v) -> Any:
            return F.scaled_dot_product_attention(q, k, v)

        whole = mapped_linear(*(t.double() for t in (x.q[:1], x.k[:1], x.v[:1])), MAP, x.weights).output
        error = _error(step().output[:1], whole[:, :, -1:])
        if not error <= ALLOWED[dtype]:
            table.notes.append(f"decode mapped_linear {length}: WRONG by {error:.2g}, no time is given")
            continue
        for run in (step, softmax):
            run()
        mine, theirs = [], []
        for _ in range(repeats):
            theirs.append(_timed(softmax, device))
            mine.append(_timed(step, device, 20))
        table.rows[f"decode sdpa {length}"] = _row(theirs, [])
        table.rows[f"decode mapped_linear {length}"] = {**_row(mine, theirs), "error": error}
    return table


def crossing(table: Table, mine: str = "mapped_linear", word: str = "forward") -> float | None:
    """Tokens from which `mine` is as fast as SDPA, between two measured lengths (None: not between any)."""
    points = sorted(
        (int(name.split()[-1]), row["times_sdpa"])
        for name, row in table.rows.items()
        if name.rsplit(" ", 1)[0] == f"{word} {mine}" and "times_sdpa" in row
    )
    for (a, low), (b, high) in zip(points, points[1:]):
        if low < 1 <= high:
            part = -math.log(low) / (math.log(high) - math.log(low))
            return math.exp(math.log(a) + part * (math.log(b) - math.log(a)))
    return None
