"""`mapped_linear`: each implementation against the definition; the operators; precision."""

from __future__ import annotations

import threading

import pytest
import torch

from linearize.ops import _arena
from linearize.ops._maps import MAPS
from linearize.ops.mapped_linear import mapped_linear
from linearize.ops.mapped_linear import torch as in_chunks
from linearize.testing.laws import implementations_agree
from linearize.testing.tolerance import check_rounded

pytestmark = pytest.mark.usefixtures("poison")
K, C, V = 6, 5, 3


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No memory from an earlier call: what is not written is NaN."""
    monkeypatch.setattr(_arena, "KEPT", 0)
    monkeypatch.setattr(_arena, "_kept", threading.local())


def _normal(*sizes, seed=0):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _documents(tokens):
    column = torch.arange(tokens)
    return torch.stack([(column >= 3).long() + (column >= tokens - 1), (column >= tokens // 2).long() * 2])


def _inputs(heads, tokens, name="split_softmax", batch=2):
    """q, k, v, the maps' weights and biases (where Phi has them)."""
    H, J, G = heads
    plain = name in ("relu", "elu")
    tensors = [_normal(batch, n, tokens, size, seed=n) for n, size in ((H, K), (G, K), (G, V))]
    if not plain:
        tensors += [_normal(n, K, C, seed=10 + n) for n in (H, J)]
    if MAPS[name].bias:
        tensors += [_normal(n, C, seed=20 + n) for n in (H, J)]
    return tensors


def _call(impl, name="split_softmax", **settings):
    def run(q, k, v, *rest):
        state = rest[-1] if len(rest) % 2 else None
        pairs = [tuple(rest[i : i + 2]) for i in range(0, len(rest) - len(rest) % 2, 2)]
        weights, biases = (pairs + [(None, None)] * 2)[:2]
        return mapped_linear(q, k, v, name, weights, biases, state=state, impl=impl, **settings)

    return run


def _both(tensors, **settings):
    implementations_agree(_call("torch", **settings), _call("reference", **settings), tensors)


@pytest.mark.parametrize("tokens", [1, 2, 64, 65, 130])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("heads", [(4, 4, 4), (4, 4, 2), (4, 2, 2), (4, 2, 1)], ids=str)
def test_equals_the_definition(heads, packed, tokens):
    """Output, mass, final state and every gradient, from a state, with padding; H query, J key and G value heads."""
    valid = torch.arange(tokens) % 7 != 1
    state = _normal(2, heads[1], 2 * C, V + 1, seed=3).abs()
    _both(
        [*_inputs(heads, tokens), state],
        key_heads=heads[1],
        valid_BT=torch.stack([valid, ~valid]) if tokens > 1 else None,
        segments_BT=_documents(tokens) if packed else None,
    )


@pytest.mark.parametrize("name", MAPS)
def test_every_map(name):
    _both(_inputs((4, 2, 1), 66, name), name=name, key_heads=2)


def test_long_ones_keep_few_states_and_small_blocks_change_nothing(monkeypatch):
    """More chunks than lie between two kept states; fewer rows at once than there are heads."""
    monkeypatch.setattr(in_chunks, "ROWS", 2)
    _both(_inputs((4, 4, 2), 64 * in_chunks.SPAN + 70, batch=1))


def test_memory_that_is_used_again_changes_nothing(monkeypatch):
    monkeypatch.setattr(_arena, "KEPT", 2**26)
    small, large = _inputs((4, 4, 2), 70), _inputs((4, 4, 2), 200)
    for tensors in (small, large, small, large):
        _both(tensors)
    assert len(_arena._kept.memory) > 2**16


def test_continues_where_it_stopped():
    q, k, v, w_q, w_k = _inputs((2, 2, 2), 70)
    whole = mapped_linear(q, k, v, "split_softmax", (w_q, w_k))
    state, outs = None, []
    for part in (slice(0, 1), slice(1, 68), slice(68, 69), slice(69, 70)):
        out = mapped_linear(*(x[:, :, part] for x in (q, k, v)), "split_softmax", (w_q, w_k), state=state)
        outs.append(out.output)
        state = out.state
    torch.testing.assert_close(torch.cat(outs, 2), whole.output)
    torch.testing.assert_close(state, whole.state)


def test_operators_pass_opcheck():
    q, k, v, w_q, w_k = (x.requires_grad_() for x in _inputs((4, 2, 2), 70))
    valid, segments = torch.ones(2, 70, dtype=torch.bool), _documents(70)
    for masks in ((None, None), (valid, segments)):
        inputs = (q, k, v, w_q, w_k, None, None, *masks, None, "split_softmax", 2, 1e-12, True)
        torch.library.opcheck(torch.ops.linearize.mapped_linear_torch.default, inputs)


def test_compiles_whole():
    tensors = [x.float().requires_grad_() for x in _inputs((2, 2, 2), 70)]
    run = _call("torch")
    compiled = torch.compile(lambda *x: run(*x).output.square().sum(), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*tensors), tensors)
    expected = torch.autograd.grad(run(*tensors).output.square().sum(), tensors)
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e)


def test_low_precision_costs_no_more_than_its_rounding():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 8192, 32, generator=generator) for _ in range(3))
    weights = tuple(torch.eye(32).repeat(2, 1, 1) for _ in range(2))

    def run(*x):
        return mapped_linear(*x, "split_softmax", weights).output

    for dtype in (torch.bfloat16, torch.float16):
        check_rounded(run, (q, k, v), dtype)
        out = mapped_linear(*(x[:, :, :100].to(dtype) for x in (q, k, v)), "split_softmax", weights)
        assert (out.output.dtype, out.mass.dtype, out.state.dtype) == (dtype, torch.float32, torch.float32)
