"""The battery every mixer and op must pass. Shipped, so that a third party's method can be held to it:

    from linearize.testing.laws import Case, laws
    for law in laws("mine"):
        law(Case("mine", {"window": 4}))
    for law in laws("mine", "bidirectional"):
        law(Case("mine", shape=BIDIRECTIONAL))

A law takes a Case and raises AssertionError. Random parameters, float64 and sharp attention throughout: at its starting
point a mixer has symmetries that hide mistakes, and on flat attention every mixer looks right.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from linearize.mixers import base as mixers
from linearize.mixers.base import Mixer, RecurrentMixer
from linearize.ops._dispatch import compute_dtype
from linearize.testing.tolerance import check_rounded, close
from linearize.types import Context, Rotary, SiteShape, Slot, State

#: grouped heads, and a value dim of its own: nothing that is equal by accident
SHAPE = SiteShape(heads=4, kv_heads=2, key_dim=8, value_dim=6, width=32, scale=8**-0.5)
BIDIRECTIONAL = replace(SHAPE, causal=False)
IMAGE = replace(BIDIRECTIONAL, image=True)
#: ways to cut a sequence into calls; whatever is left over is the last call
SPLITS = ((1,), (7,), (64,), (3, 1, 40, 2, 17))


@dataclass(frozen=True)
class Case:
    """One configuration of one method."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    shape: SiteShape = SHAPE

    def __str__(self) -> str:
        kind = [] if self.shape.causal else ["image"] if self.shape.image else ["bidirectional"]
        return "-".join([self.method, *kind, *(f"{k}={v}" for k, v in self.settings.items())])

    def mixer(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Mixer:
        """A mixer with random parameters around its starting point."""
        mixer = mixers.build(self.method, self.shape, self.settings).to(dtype)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.3)
        return mixer.eval()

    def recurrent(self, dtype: torch.dtype = torch.float64) -> RecurrentMixer:
        mixer = self.mixer(dtype)
        assert isinstance(mixer, RecurrentMixer)
        return mixer


@dataclass(frozen=True)
class Inputs:
    """q_BHTK, k_BGTK, v_BGTV and the context of one attention call; hidden_BTD is always in it."""

    q: Tensor
    k: Tensor
    v: Tensor
    ctx: Context

    @property
    def tensors(self) -> list[Tensor]:
        """What an answer may depend on."""
        assert self.ctx.hidden_BTD is not None
        return [self.q, self.k, self.v, self.ctx.hidden_BTD]

    def having(self, tensors: Sequence[Tensor]) -> Inputs:
        """The same call with other `tensors`."""
        q, k, v, hidden = tensors
        return Inputs(q, k, v, replace(self.ctx, hidden_BTD=hidden))

    def take(self, columns: slice, rows: slice | Tensor = slice(None)) -> Inputs:
        """The call with only these tokens (and rows of the batch)."""
        return Inputs(
            self.q[rows, :, columns], self.k[rows, :, columns], self.v[rows, :, columns], self.ctx.take(columns, rows)
        )

    def leaves(self) -> Inputs:
        """The same numbers, collecting gradients of their own."""
        return self.having([x.detach().clone().requires_grad_() for x in self.tensors])

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), self.ctx)


def draw(shape: SiteShape, tokens: int, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float64) -> Inputs:
    """Random inputs, rotated by a rotary embedding whose cos and sin are scaled, as YaRN's are. On images most tokens
    stand on a grid wider than high, one is behind it and at least one before it."""
    noise = torch.Generator().manual_seed(seed)

    def normal(heads: int, dim: int, sharpness: float) -> Tensor:
        return torch.randn(batch, heads, tokens, dim, generator=noise, dtype=torch.float64).to(dtype) * sharpness

    rates = 10000 ** -(torch.arange(shape.key_dim // 2) / (shape.key_dim // 2))
    angle = (torch.arange(tokens)[:, None] * rates).repeat(1, 2).expand(batch, -1, -1)
    rotary = Rotary(1.2 * angle.cos(), 1.2 * angle.sin(), _rotate, shape.key_dim)
    q = normal(shape.heads, shape.key_dim, 1.7)
    k, v = normal(shape.kv_heads, shape.key_dim, 1.7), normal(shape.kv_heads, shape.value_dim, 1.0)
    hidden = normal(1, shape.width, 1.0)[:, 0]
    ctx = Context(causal=shape.causal, scale=shape.scale, rotary=rotary, hidden_BTD=hidden)
    return Inputs(q, k, v, replace(ctx, **(_patches(tokens) if shape.image else {})))


def _patches(tokens: int) -> dict[str, Any]:
    columns = math.isqrt(tokens) + 1
    rows = (tokens - 2) // columns
    return {"grid": (rows, columns), "prefix": tokens - rows * columns - 1, "suffix": 1}


def _rotate(q: Tensor, k: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos_BTK[:, None], sin_BTK[:, None]

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    return turn(q), turn(k)


def call(mixer: Mixer, inputs: Inputs, slot: Slot | None = None) -> Tensor:
    """o_BHTV; the teacher in the context is plain softmax."""

    def teacher() -> Tensor:
        q, k, ctx = inputs.q, inputs.k, inputs.ctx
        codes = ctx.codes(q)
        seen = (codes[:, :, None] == codes[:, None]) & (codes > 0)[:, None]
        seen = (seen.tril() if ctx.causal else seen)[:, None]
        group, wide = q.shape[1] // k.shape[1], compute_dtype(q)
        scores = q.to(wide) @ k.to(wide).repeat_interleave(group, 1).mT * ctx.scale
        weights = scores.masked_fill(~seen, torch.finfo(wide).min).softmax(-1)
        return (weights @ inputs.v.to(wide).repeat_interleave(group, 1)).to(q.dtype)

    return mixer(inputs.q, inputs.k, inputs.v, replace(inputs.ctx, teacher=teacher, slot=slot))


def from_dense(mixer: Mixer, inputs: Inputs) -> Tensor:
    """o_BHTV by the mixer's dense twin."""
    weights = mixer.dense(inputs.q, inputs.k, inputs.v, inputs.ctx)
    return weights @ inputs.v.repeat_interleave(mixer.shape.group, 1) + mixer.beside(inputs.v, inputs.ctx)


def contexts(inputs: Inputs) -> dict[str, Inputs]:
    """The structures a batch can have: nothing, left padding, padding inside, packed documents, and both at once. Rows
    of images are one grid each: nothing, or some of it hidden."""
    B, T = inputs.q.shape[0], inputs.q.shape[2]
    column = torch.arange(T).expand(B, T)
    left = column >= torch.tensor([[0], [5]])[:B]
    inside = (column % 7 != 3) & left
    documents = torch.stack([(column[0] >= T // 4).long() + (column[0] >= T - 6), (column[0] >= T // 2).long()])[:B]

    def with_(**changes: Tensor) -> Inputs:
        return replace(inputs, ctx=replace(inputs.ctx, **changes))

    if inputs.ctx.grid is not None:
        return {"plain": inputs, "padding inside": with_(valid_BT=inside)}
    return {
        "plain": inputs,
        "left padding": with_(valid_BT=left),
        "padding inside": with_(valid_BT=inside),
        "packed": with_(segments_BT=documents),
        "packed and padded": with_(segments_BT=documents, valid_BT=column < torch.tensor([[T], [T - 3]])[:B]),
    }


def at_real(out_BHTV: Tensor, inputs: Inputs) -> Tensor:
    """The rows that mean something: those of real tokens."""
    return out_BHTV.transpose(1, 2)[inputs.ctx.codes(inputs.q) > 0]


def gradients(out: Tensor, wrt: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a fixed random functional of `out`; zeros where it does not depend on a tensor."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    found = torch.autograd.grad((out * weight).sum(), wrt, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wrt, found)]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory (torch.empty and its kin) holds NaN: whatever reads it unwritten shows."""
    deterministic: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = before[2]


# ---------------------------------------------------------------------------------------------- laws of all mixers
def fast_equals_dense(case: Case) -> None:
    """Output and every gradient, to 1e-9 in float64, whatever the batch's structure and with each branch off."""
    mixer = case.mixer()
    for what, drawn in contexts(draw(case.shape, 37)).items():
        for off in (None, *mixer.branches):
            mixer.off = off
            inputs = drawn.leaves()
            wrt = [*inputs.tensors, *mixer.parameters()]
            fast, dense = call(mixer, inputs), from_dense(mixer, inputs)
            label = f"{what}, {off or 'all branches'}"
            assert bool(fast.isfinite().all()), f"{label}: padding makes NaN or inf"
            fast, dense = at_real(fast, inputs), at_real(dense, inputs)
            close(fast, dense, 1e-9, f"output ({label})")
            for i, (g, expected) in enumerate(zip(gradients(fast, wrt), gradients(dense, wrt))):
                close(g, expected, 1e-9, f"gradient {i} ({label})")


def dense_is_a_distribution(case: Case) -> None:
    """Weights are non-negative (unless the method says that it is signed), never on a hidden key, and add up to 1 (to 0
    where every feature is: relu has such; to less where the method says that it leaks)."""
    mixer = case.mixer()
    for what, inputs in contexts(draw(case.shape, 37)).items():
        weights = mixer.dense(inputs.q, inputs.k, inputs.v, inputs.ctx)
        codes = inputs.ctx.codes(inputs.q)
        seen = codes[:, :, None] == codes[:, None]
        seen = seen.tril() if case.shape.causal else seen
        real = (codes > 0)[:, None].expand(weights.shape[:3])
        assert bool((weights >= 0).all()) != mixer.signed, f"{what}: a negative weight (or signed, and none)"
        close((weights * ~seen[:, None])[real].abs().sum(), torch.zeros(()), 1e-12, f"weight on hidden keys ({what})")
        total = weights.sum(-1)[real]
        if mixer.leaks:
            assert bool((total < 1 - 1e-6).any()) and bool(((total > 0) & (total < 1 + 1e-9)).all()), what
            continue
        close(total, (total != 0).to(total.dtype), 1e-6, f"sum of weights ({what})")


def causal(case: Case) -> None:
    """A token changes no output before it."""
    mixer, inputs = case.mixer(), draw(case.shape, 70)
    before = call(mixer, inputs)
    for t in (1, 33, 69):
        other = inputs.having([x.clone() for x in inputs.tensors])
        for x in other.tensors:
            x.select(-2, t).add_(1.0)
        after = call(mixer, other)
        assert torch.equal(after[:, :, :t], before[:, :, :t]), f"token {t} changes the past"
        assert not torch.equal(after[:, :, t:], before[:, :, t:]), f"token {t} changes nothing"


def permutation_equivariant(case: Case) -> None:
    """A bidirectional method that needs no grid does not know the order of its tokens; with a window it knows distances
    alone, so that a sequence may be turned round."""
    mixer, inputs = case.mixer(), draw(case.shape, 20)
    if mixer.needs_grid or mixer.ordered:
        return
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    if getattr(mixer.config, "window", 0):
        order = torch.arange(20).flip(0)
    inputs = replace(inputs, ctx=replace(inputs.ctx, rotary=None))
    shuffled = inputs.having([x.index_select(-2, order) for x in inputs.tensors])
    close(call(mixer, shuffled), call(mixer, inputs)[:, :, order], 1e-9, "shuffled tokens")


def padding_is_invisible(case: Case) -> None:
    """Left padding == unpadded, and what stands at padding, wherever it is, changes no real token."""
    mixer, inputs = case.mixer(), draw(case.shape, 40)
    structures = contexts(inputs)
    if left := structures.get("left padding"):
        alone = inputs.take(slice(5, None), slice(1, 2))
        close(call(mixer, left)[1:2, :, 5:], call(mixer, alone), 1e-9, "left padding against unpadded")
        close(call(mixer, left)[:1], call(mixer, inputs.take(slice(None), slice(0, 1))), 1e-9, "the unpadded row")
    for what in ("left padding", "padding inside"):
        if (padded := structures.get(what)) is None:
            continue
        assert padded.ctx.valid_BT is not None
        hidden_BT1 = ~padded.ctx.valid_BT[..., None]
        other = padded.having(
            [x.masked_fill(hidden_BT1 if x.ndim == 3 else hidden_BT1[:, None], 50.0) for x in padded.tensors]
        )
        close(at_real(call(mixer, other), other), at_real(call(mixer, padded), padded), 1e-12, f"filled {what}")


def packed_equals_alone(case: Case) -> None:
    """Documents in one row never see each other: outputs and every gradient are those of each alone."""
    if case.shape.image:
        return  # one image per row
    mixer, tokens = case.mixer(), 53
    for borders in ((20, 41), (1, 52), (17,)):
        drawn = draw(case.shape, tokens, batch=1)
        column = torch.arange(tokens)[None]
        documents = torch.stack([(column >= b).long() for b in borders]).sum(0)
        packed = replace(drawn, ctx=replace(drawn.ctx, segments_BT=documents)).leaves()
        alone = drawn.leaves()
        spans = [slice(a, b) for a, b in itertools.pairwise((0, *borders, tokens))]
        together = call(mixer, packed)
        apart = torch.cat([call(mixer, alone.take(span)) for span in spans], 2)
        close(together, apart, 1e-9, f"packed at {borders}")
        parameters = list(mixer.parameters())
        found = gradients(together, [*packed.tensors, *parameters])
        expected = gradients(apart, [*alone.tensors, *parameters])
        for i, (g, e) in enumerate(zip(found, expected)):
            close(g, e, 1e-9, f"gradient {i}, packed at {borders}")


def grouped_equals_repeated(case: Case) -> None:
    """G key/value heads == the same heads repeated for every query head; head is axis 0 of every parameter (a head of
    the mixer's own, where it joins several)."""
    grouped, inputs = case.mixer(), draw(case.shape, 30)
    H, G, group = case.shape.heads, case.shape.kv_heads, case.shape.group
    for name, parameter in grouped.named_parameters():
        heads = (H, G, H // grouped.joined)
        assert parameter.shape[0] in heads, f"{name}: axis 0 of {tuple(parameter.shape)} is no head"
    repeated = replace(case, shape=replace(case.shape, kv_heads=H)).mixer()
    with torch.no_grad():
        for target, source in zip(repeated.parameters(), grouped.parameters()):
            target.copy_(source if source.shape[0] == target.shape[0] else source.repeat_interleave(group, 0))
    wide = replace(inputs, k=inputs.k.repeat_interleave(group, 1), v=inputs.v.repeat_interleave(group, 1))
    close(call(grouped, inputs), call(repeated, wide), 1e-9, "grouped against repeated heads")


def heads_are_apart(case: Case) -> None:
    """What one query head or its parameters do is no other group's business (tensor parallelism rests on it)."""
    mixer, inputs = case.mixer(), draw(case.shape, 30)
    before, group = call(mixer, inputs), max(case.shape.group, mixer.joined)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter[0].add_(0.5)  # head 0, or key/value head 0: in the first group either way
    q = inputs.q.clone()
    q[:, 0] += 1.0
    after = call(mixer, replace(inputs, q=q))
    close(after[:, group:], before[:, group:], 1e-12, "heads of other groups")


def saved_equals_loaded(case: Case) -> None:
    """The state dict, written as safetensors and read into a new mixer, gives the same bits; so does a deepcopy."""
    mixer = case.mixer(torch.float32)
    inputs = draw(case.shape, 30, dtype=torch.float32)
    data = safetensors.torch.save({k: v.contiguous() for k, v in mixer.state_dict().items()})
    other = mixers.build(case.method, case.shape, case.settings)
    other.load_state_dict(safetensors.torch.load(data))
    expected = call(mixer, inputs)
    assert torch.equal(call(other, inputs), expected), "a loaded mixer computes something else"
    assert torch.equal(call(copy.deepcopy(mixer), inputs), expected), "a copied mixer computes something else"


def stays_float32(case: Case) -> None:
    """`.to(bfloat16)`, `.half()` and `.bfloat16()` of a model leave its mixers float32, bit for bit."""
    holder = nn.ModuleDict({"mixer": case.mixer(torch.float32)})
    before = copy.deepcopy(holder.state_dict())
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()):
        cast(holder)
        for name, value in holder.state_dict().items():
            assert value.dtype == torch.float32, f"{name} became {value.dtype}"
            assert torch.equal(value, before[name]), f"{name} was rounded"


def rounds_like_its_inputs(case: Case) -> None:
    """bfloat16 inputs cost what rounding them costs, at every depth of a long sequence."""
    small = replace(case, shape=replace(case.shape, heads=2, kv_heads=1, width=16)) if case.shape.causal else case
    mixer = small.mixer(torch.float32)
    inputs = draw(small.shape, 8192 if mixer.recurrent else 1024, batch=1)
    exact = small.mixer()
    exact.load_state_dict(mixer.state_dict())

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            return call(exact if q.dtype == torch.float64 else mixer, Inputs(q, k, v, inputs.ctx))

    check_rounded(run, (inputs.q, inputs.k, inputs.v), torch.bfloat16)


def accounts_add_up(case: Case) -> None:
    """Costs grow with tokens; a recurrent mixer's state does not, and its cost grows linearly."""
    mixer = case.mixer()
    short, long = mixer.cost(1000), mixer.cost(2000)
    assert 0 <= short.flops <= long.flops and 0 < short.bytes < long.bytes
    if mixer.recurrent:
        assert mixer.state_bytes(1000) == mixer.state_bytes(10**6)
        assert long.flops == 2 * short.flops and long.bytes == 2 * short.bytes


# ---------------------------------------------------------------------------------------- laws of recurrent mixers
def chunked_equals_parallel(case: Case) -> None:
    """Any split of a (left-padded) batch into calls: the same outputs, final state and gradients as in one go."""
    mixer = case.recurrent()
    inputs = contexts(draw(case.shape, 130))["left padding"].leaves()
    wrt = [*inputs.tensors, *mixer.parameters()]
    whole = at_real(call(mixer, inputs), inputs)
    expected = gradients(whole, wrt)
    _, final = _advance(mixer, inputs, (130,))
    for split in SPLITS:
        out, state = _advance(mixer, inputs, split)
        out = at_real(out, inputs)
        close(out, whole, 1e-9, f"output, split {split}")
        _same_state(state, final, f"split {split}")
        for i, (g, e) in enumerate(zip(gradients(out, wrt), expected)):
            close(g, e, 1e-9, f"gradient {i}, split {split}")


def stepped_equals_parallel(case: Case) -> None:
    """A prompt, then token by token through a slot, as `generate` does it."""
    mixer = case.recurrent()
    inputs = contexts(draw(case.shape, 90))["left padding"]
    slot, outs = Slot(), []
    with torch.no_grad():
        for start, stop in itertools.pairwise((0, 11, *range(12, 91))):
            outs.append(call(mixer, inputs.take(slice(start, stop)), slot))
        expected = call(mixer, inputs)
        _, final = _advance(mixer, inputs, (90,))
    close(at_real(torch.cat(outs, 2), inputs), at_real(expected, inputs), 1e-9, "stepped output")
    assert slot.state is not None
    _same_state(slot.state, final, "stepped")


def state_is_as_specified(case: Case) -> None:
    """Names, shapes and types of `state_spec`, before and after tokens; float32 whatever the activations."""
    mixer, spec = case.recurrent(torch.float32), case.recurrent().state_spec()
    assert len({s.name for s in spec}) == len(spec), "two parts of the state share a name"
    assert mixer.state_bytes(1) == sum(s.nbytes() for s in spec)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = draw(case.shape, 20, batch=3).to(dtype)
        empty = mixer.empty_state(3, torch.device("cpu"), dtype)
        _, state = _advance(mixer, inputs, (9, 1, 10))
        for found in (empty, state):
            assert len(found) == len(spec)
            for tensor, s in zip(found, spec):
                assert tuple(tensor.shape) == tuple(3 if n == -1 else n for n in s.shape), s.name
                assert s.shape[0] == -1, f"{s.name}: the batch is not axis 0"
                assert tensor.dtype == (dtype if s.name.startswith("kept_") else s.dtype), (s.name, tensor.dtype)
                assert s.head_axis is None or tensor.shape[s.head_axis] in (case.shape.heads, case.shape.kv_heads)


def state_rows_are_apart(case: Case) -> None:
    """Rows of a state can be reordered, repeated and dropped (beams): decoding goes on as those rows would."""
    mixer, inputs = case.recurrent(), draw(case.shape, 24, batch=3)
    rows = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        expected = call(mixer, inputs)[rows, :, 20:]
        _, state = _advance(mixer, inputs.take(slice(0, 20)), (20,))
        rest = inputs.take(slice(20, None))
        rest = rest.take(slice(None), rows)
        picked = tuple(t.index_select(0, rows) for t in state)
        out, _ = mixer.chunked(rest.q, rest.k, rest.v, rest.ctx, picked)
    close(out, expected, 1e-9, "reordered rows")


def _advance(mixer: RecurrentMixer, inputs: Inputs, split: Sequence[int]) -> tuple[Tensor, State]:
    """Calls of these sizes in turn (the last size repeats): all outputs, and the state at the end."""
    state = mixer.empty_state(inputs.q.shape[0], inputs.q.device, inputs.k.dtype)
    outs, at, sizes = [], 0, iter(split)
    size = 0
    while at < inputs.q.shape[2]:
        size = next(sizes, size)
        part = inputs.take(slice(at, at + size))
        run = mixer.step if part.q.shape[2] == 1 else mixer.chunked
        out, state = run(part.q, part.k, part.v, part.ctx, state)
        outs.append(out)
        at += size
    return torch.cat(outs, 2), state


def _same_state(found: State, expected: State, what: str) -> None:
    assert len(found) == len(expected), f"{what}: {len(found)} state tensors, not {len(expected)}"
    for i, (a, b) in enumerate(zip(found, expected)):
        close(a, b, 1e-9, f"state tensor {i}, {what}")


#: what any mixer obeys
MIXER_LAWS: tuple[Callable[[Case], None], ...] = (
    fast_equals_dense,
    dense_is_a_distribution,
    padding_is_invisible,
    packed_equals_alone,
    grouped_equals_repeated,
    heads_are_apart,
    saved_equals_loaded,
    stays_float32,
    rounds_like_its_inputs,
    accounts_add_up,
)
#: and what a mixer with a state obeys on top
RECURRENT_LAWS: tuple[Callable[[Case], None], ...] = (
    chunked_equals_parallel,
    stepped_equals_parallel,
    state_is_as_specified,
    state_rows_are_apart,
)


def laws(method: str, kind: Literal["causal", "bidirectional"] = "causal") -> tuple[Callable[[Case], None], ...]:
    """The laws that apply to the method of this name on layers of this kind."""
    if kind == "bidirectional":
        return (*MIXER_LAWS, permutation_equivariant)
    return (*MIXER_LAWS, causal, *(RECURRENT_LAWS if mixers.get(method).recurrent else ()))


# ------------------------------------------------------------------------------------------------------ laws of ops
def implementations_agree(
    run: Callable[..., Sequence[Tensor]],
    reference: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor],
    tolerance: float = 1e-9,
) -> None:
    """Two implementations of an op: every output (the final state is one) and the gradient of each of them to each
    input. Places where the reference is not finite must be the same and carry no gradient."""
    mine = [t.detach().clone().requires_grad_() for t in tensors]
    theirs = [t.detach().clone().requires_grad_() for t in tensors]
    outs, expected = run(*mine), reference(*theirs)
    assert len(outs) == len(expected)
    for i, (out, e) in enumerate(zip(outs, expected)):
        finite = e.isfinite()
        assert torch.equal(out.isfinite(), finite) and torch.equal(out[~finite], e[~finite]), f"output {i}: inf"
        out, e = out.masked_fill(~finite, 0), e.masked_fill(~finite, 0)
        close(out, e, tolerance, f"output {i}")
        if e.requires_grad:
            for j, (g, h) in enumerate(zip(gradients(out, mine), gradients(e, theirs))):
                close(g, h, tolerance, f"gradient of output {i} to input {j}")
