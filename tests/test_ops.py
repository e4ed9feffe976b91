"""Each implementation of each op against its reference; the reference against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from linearize.ops import bidirectional as bidirectional_op
from linearize.ops import gated_linear as gated_op
from linearize.ops import linear as linear_op
from linearize.ops import local2d as local2d_op
from linearize.ops import window as window_op
from linearize.ops._dispatch import Implementation, calls, choose, used
from linearize.ops.bidirectional import Circle, bidirectional, in_pieces
from linearize.ops.gated_linear import gated_bidirectional, gated_linear, gated_weights
from linearize.ops.gated_linear.torch import MILD, mild
from linearize.ops.linear import linear
from linearize.ops.local2d import local2d, local2d_output, pairs
from linearize.ops.local2d.reference import circle
from linearize.ops.window import window
from linearize.testing.laws import implementations_agree
from linearize.testing.tolerance import close
from linearize.types import InputError

pytestmark = pytest.mark.usefixtures("poison")

LENGTHS = (1, 2, 63, 64, 65, 129)


def _names(op):
    """Those for any device; kernels have tests of their own."""
    return [i.name for i in op.IMPLEMENTATIONS if i.name != "reference" and i.device is None]


def _normal(*sizes, seed=0):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _documents(tokens):
    column = torch.arange(tokens)
    return torch.stack([(column >= 3).long() + (column >= tokens - 1), (column >= tokens // 2).long() * 2])


# ----------------------------------------------------------------------------------------------------------- linear
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("heads", [(4, 4, 4), (4, 4, 2), (4, 2, 2), (4, 2, 1)], ids=str)
@pytest.mark.parametrize("impl", _names(linear_op))
def test_linear_equals_reference(impl, heads, carried, packed, tokens):
    """Output, normaliser, final state and every gradient; H query, J key and G value heads."""
    H, J, G = heads
    tensors = [_normal(2, H, tokens, 5).exp(), _normal(2, J, tokens, 5, seed=1).exp(), _normal(2, G, tokens, 3, seed=2)]
    if carried:
        tensors.append(_normal(2, J, 5, 4, seed=3))
    segments = _documents(tokens) if packed else None

    def run(name):
        return lambda q, k, v, state=None: linear(q, k, v, state=state, segments_BT=segments, impl=name)

    implementations_agree(run(impl), run("reference"), tensors)


@pytest.mark.parametrize("chunk", [1, 5, 64, 1000])
def test_linear_does_not_depend_on_its_chunk(chunk):
    tensors = [_normal(1, 2, 70, 5).exp(), _normal(1, 2, 70, 5, seed=1).exp(), _normal(1, 2, 70, 3, seed=2)]
    implementations_agree(
        lambda *x: linear(*x, chunk=chunk, impl="torch"), lambda *x: linear(*x, impl="reference"), tensors
    )


def test_linear_reference_gradcheck():
    tensors = [_normal(1, 2, 6, 3), _normal(1, 2, 6, 3, seed=1), _normal(1, 1, 6, 2, seed=2), _normal(1, 2, 3, 3)]
    segments = torch.tensor([[0, 0, 1, 1, 1, 2]])
    for documents in (None, segments):
        assert torch.autograd.gradcheck(
            lambda q, k, v, s, documents=documents: tuple(
                linear(q, k, v, state=s, segments_BT=documents, impl="reference")
            ),
            [t.requires_grad_() for t in tensors],
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_accumulates_in_float32(dtype):
    q, k, v = (_normal(1, 2, 9, 4, seed=s).exp().to(dtype) for s in range(3))
    assert {x.dtype for x in linear(q, k, v)} == {torch.float32}
    state = linear(q, k, v).state
    assert linear(q[:, :, :1], k[:, :, :1], v[:, :, :1], state=state).state.dtype == torch.float32


def test_linear_padding_is_a_key_of_zeros():
    q, k, v = (_normal(1, 2, 9, 4, seed=s).exp() for s in range(3))
    real = torch.tensor([0, 2, 3, 6, 8])
    mask = torch.zeros(9, dtype=torch.float64)
    mask[real] = 1
    found = linear(q, k * mask[:, None], v)
    expected = linear(q[:, :, real], k[:, :, real], v[:, :, real])
    for a, b in ((found.numerator[:, :, real], expected.numerator), (found.state, expected.state)):
        close(a, b)


def _slices(tensor):
    """Nodes of the backward graph that fill a tensor as long as what was sliced."""
    seen, todo, count = set(), [tensor.grad_fn], 0
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            count += "Slice" in node.name()
            todo += [following for following, _ in node.next_functions]
    return count


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_backward_does_not_slice_for_each_chunk(gated):
    """That would make it quadratic in the length."""

    def count(tokens):
        q, k, v, g = (_normal(1, 1, tokens, 3, seed=s).exp().requires_grad_() for s in range(4))
        out = gated_linear(q, k, v, -g, impl="torch") if gated else linear(q, k, v, impl="torch")
        return _slices(out.numerator)

    assert count(64 * 12) == count(64 * 3)


# ---------------------------------------------------------------------------------------------------- bidirectional
@pytest.mark.parametrize("tokens", [1, 2, 64, 70])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("gap", [0, 1, 5, 100])
@pytest.mark.parametrize("heads", [(4, 4, 4), (4, 4, 2), (4, 2, 2), (4, 2, 1)], ids=str)
@pytest.mark.parametrize("impl", _names(bidirectional_op))
def test_bidirectional_equals_reference(impl, heads, gap, packed, tokens):
    """Numerator, normaliser and every gradient; H query, J key and G value heads."""
    H, J, G = heads
    tensors = [_normal(2, H, tokens, 5).exp(), _normal(2, J, tokens, 5, seed=1).exp(), _normal(2, G, tokens, 3, seed=2)]
    segments = _documents(tokens) if packed else None

    def run(name):
        return lambda q, k, v: bidirectional(q, k, v, gap=gap, segments_BT=segments, impl=name)

    implementations_agree(run(impl), run("reference"), tensors)


def test_bidirectional_reference_gradcheck():
    tensors = [_normal(1, 2, 6, 3), _normal(1, 2, 6, 3, seed=1), _normal(1, 1, 6, 2, seed=2)]
    for gap, documents in ((0, None), (2, torch.tensor([[0, 0, 1, 1, 1, 1]]))):
        assert torch.autograd.gradcheck(
            lambda q, k, v, g=gap, d=documents: tuple(bidirectional(q, k, v, gap=g, segments_BT=d, impl="reference")),
            [t.requires_grad_() for t in tensors],
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bidirectional_accumulates_in_float32(dtype):
    q, k, v = (_normal(1, 2, 9, 4, seed=s).exp().to(dtype) for s in range(3))
    for gap in (0, 2):
        assert {x.dtype for x in bidirectional(q, k, v, gap=gap)} == {torch.float32}


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_bidirectional_far_sums_survive_large_near_ones(impl):
    """Far keys a hundred million times smaller than the near ones: subtracting the near ones would leave noise."""
    q, k = torch.ones(1, 1, 8, 2), torch.ones(1, 1, 8, 2)
    k[:, :, 3:6] *= 1e8
    found = bidirectional(q, k, _normal(1, 1, 8, 3).float(), gap=2, impl=impl).normaliser
    assert found[0, 0, 4].item() == 10.0  # columns 0, 1, 2, 6 and 7, two features of one each


# ----------------------------------------------------------------------------------------------------- gated linear
#: shapes of log gates (J key heads, T tokens): per feature and token, per head, constant, for everybody
GATES = {
    "feature": lambda J, T: (2, J, T, 5),
    "head": lambda J, T: (2, J, T, 1),
    "constant": lambda J, T: (J, 1, 5),
    "scalar": lambda J, T: (J, 1, 1),
    "everybody": lambda J, T: (1, 1, T, 5),
}


def _gated(H, J, G, tokens, gate="feature"):
    """q, k, v and log gates from none to strong."""
    return [
        _normal(2, H, tokens, 5).exp(),
        _normal(2, J, tokens, 5, seed=1).exp(),
        _normal(2, G, tokens, 3, seed=2),
        -_normal(*GATES[gate](J, tokens), seed=4).exp(),
    ]


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize(
    "heads, gate", [((4, 4, 4), "feature"), ((4, 2, 1), "feature"), ((4, 4, 2), "head"), ((4, 2, 2), "head")], ids=str
)
@pytest.mark.parametrize("impl", _names(gated_op))
def test_gated_linear_equals_reference(impl, heads, gate, carried, packed, tokens):
    """Output, normaliser, final state and every gradient; H query, J key and G value heads."""
    tensors = _gated(*heads, tokens, gate)
    if carried:
        tensors.append(_normal(2, heads[1], 5, 4, seed=3))
    segments = _documents(tokens) if packed else None

    def run(name):
        return lambda q, k, v, g, state=None: gated_linear(q, k, v, g, state=state, segments_BT=segments, impl=name)

    implementations_agree(run(impl), run("reference"), tensors)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 6, 7, 64, 1000])
def test_gated_linear_does_not_depend_on_its_chunk(chunk, gate):
    implementations_agree(
        lambda *x: gated_linear(*x, chunk=chunk, impl="torch"),
        lambda *x: gated_linear(*x, impl="reference"),
        _gated(4, 2, 2, 70, gate),
    )


@pytest.mark.parametrize("tokens", [1, 63, 64, 200])
@pytest.mark.parametrize("heads, gate", [((4, 4, 2), "feature"), ((4, 2, 1), "head"), ((4, 2, 2), "constant")], ids=str)
def test_gated_linear_without_a_loop(heads, gate, tokens, monkeypatch):
    """The form that torch.export traces."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    tensors = [*_gated(*heads, tokens, gate), _normal(2, heads[1], 5, 4, seed=3)]
    for segments in (None, _documents(tokens)):

        def run(q, k, v, g, state, impl, segments=segments):
            return gated_linear(q, k, v, g, state=state, segments_BT=segments, impl=impl)

        implementations_agree(lambda *x, run=run: run(*x, "torch"), lambda *x, run=run: run(*x, "reference"), tensors)


@pytest.mark.parametrize("gate", ["feature", "head", "constant"])
def test_gated_linear_reference_gradcheck(gate):
    tensors = [_normal(1, 2, 6, 5), _normal(1, 2, 6, 5, seed=1), _normal(1, 1, 6, 2, seed=2)]
    tensors += [-_normal(*GATES[gate](2, 6), seed=4)[:1].exp(), _normal(1, 2, 5, 3)]
    for documents in (None, torch.tensor([[0, 0, 1, 1, 1, 2]])):
        assert torch.autograd.gradcheck(
            lambda q, k, v, g, s, documents=documents: tuple(
                gated_linear(q, k, v, g, state=s, segments_BT=documents, impl="reference")
            ),
            [t.requires_grad_() for t in tensors],
        )


@pytest.mark.parametrize("impl", [*_names(gated_op), "reference"])
def test_gated_linear_is_its_recurrence(impl):
    q, k, v, g = _gated(2, 2, 2, 20)
    state, outs = torch.zeros(2, 2, 5, 4, dtype=torch.float64), []
    for t in range(20):
        state = g[:, :, t, :, None].exp() * state + k[:, :, t, :, None] * F.pad(v, (0, 1), value=1)[:, :, t, None]
        outs.append((q[:, :, t, None] @ state)[:, :, 0])
    found = gated_linear(q, k, v, g, impl=impl)
    close(torch.cat([found.numerator, found.normaliser[..., None]], -1), torch.stack(outs, 2))
    close(found.state, state)


@pytest.mark.parametrize("per_head", [False, True], ids=["feature", "head"])
def test_gated_linear_with_open_gates_is_linear(per_head):
    q, k, v, g = _gated(4, 4, 2, 130, "head" if per_head else "feature")
    implementations_agree(lambda q, k, v: gated_linear(q, k, v, 0 * g), lambda q, k, v: linear(q, k, v), [q, k, v])


@pytest.mark.parametrize("per_head", [False, True], ids=["feature", "head"])
def test_strong_gates_over_ten_thousand_tokens(per_head):
    """exp(-5) per token in every second feature (float32 ends at exp(-88)), next to gates that hardly close: output,
    state and gradients of every feature keep digits of float32, whatever the others do."""
    tokens = 10_000
    q, k, v = (_normal(1, 1, tokens, 4, seed=s).exp() for s in range(3))
    g = torch.tensor([-5.0, -1e-4, -5.0, -1.0], dtype=torch.float64).expand(1, 1, tokens, 4)
    g = g[..., :1] if per_head else g

    def run(dtype):
        tensors = [x.to(dtype).detach().requires_grad_() for x in (q, k, v, g)]
        out = gated_linear(*tensors)
        value = out.numerator / out.normaliser[..., None]
        return [value, out.state, *torch.autograd.grad(out.numerator.sum() / tokens, tensors)]

    for found, exact in zip(run(torch.float32), run(torch.float64)):
        size = exact.abs().amax(2, keepdim=True)
        assert (size > 1e-30).all() and ((found - exact).abs() <= 2e-5 * size).all()


@pytest.mark.parametrize("nats", [0.1, 15.9, 16.1, 40.0, 200.0])
def test_mild_and_strong_chunks_agree_in_float32(nats):
    """A chunk is one product, several, or pairs of blocks, by how much it fades: right on either side of a border."""
    q, k, v, g = (x.float() for x in _gated(2, 2, 2, 128))
    g = g * (nats / -g.unflatten(2, (2, 64)).sum(3).amin())
    halves = [part for part in g.split(64, 2) if -part.sum(2).amin() > nats - 0.05]
    assert all(mild(part) == (nats < MILD) for part in halves)
    found = gated_linear(q, k, v, g, impl="torch")
    wanted = gated_linear(*(x.double() for x in (q, k, v, g)), impl="reference")
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() < 2e-6 * b.norm()


def test_gates_closed_for_good():
    """A gate of exp(-1000) is 0: nothing before it is seen, nothing after it is touched, no gradient is NaN."""
    q, k, v, g = (x.float().requires_grad_() for x in _gated(2, 2, 2, 90))
    shut = torch.zeros(90, 1)
    shut[50] = -1000
    found, alone = gated_linear(q, k, v, g + shut), gated_linear(*(x[:, :, 50:] for x in (q, k, v, g)))
    close(found.numerator[:, :, 50:], alone.numerator, 1e-5)
    close(found.state, alone.state, 1e-5)
    assert all(x.isfinite().all() for x in torch.autograd.grad(found.numerator.sum(), (q, k, v, g)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gated_linear_accumulates_in_float32(dtype):
    q, k, v, g = (x.to(dtype) for x in _gated(2, 2, 2, 9))
    out = gated_linear(q, k, v, g)
    assert {x.dtype for x in out} == {torch.float32}
    step = [x[:, :, :1] for x in (q, k, v, g)]
    assert gated_linear(*step, state=out.state).state.dtype == torch.float32


def test_gated_linear_padding_is_a_key_of_zeros_and_an_open_gate():
    q, k, v, g = _gated(2, 2, 2, 9)
    real = torch.tensor([0, 2, 3, 6, 8])
    mask = torch.zeros(9, 1, dtype=torch.float64)
    mask[real] = 1
    found = gated_linear(q, k * mask, v, g * mask)
    expected = gated_linear(*(x[:, :, real] for x in (q, k, v, g)))
    for a, b in ((found.numerator[:, :, real], expected.numerator), (found.state, expected.state)):
        close(a, b)


@pytest.mark.parametrize("tokens", [1, 2, 64, 70])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("gap", [0, 1, 5, 100])
@pytest.mark.parametrize("gate", ["feature", "head", "constant"])
def test_gated_bidirectional_is_its_definition(gate, gap, packed, tokens):
    """Numerator, normaliser and every gradient against the weights of every pair."""
    segments = _documents(tokens) if packed else torch.zeros(2, tokens, dtype=torch.long)
    column = torch.arange(tokens)
    seen = (segments[:, :, None] == segments[:, None]) & ((column[:, None] - column).abs() >= gap)

    def definition(q, k, v, g):
        k, g = k.repeat_interleave(2, 1), (g if g.ndim == 4 else g[None]).repeat_interleave(2, 1)
        weights = gated_weights(q, k, g.expand(*g.shape[:2], tokens, -1), seen, gap=gap)
        return weights @ v.repeat_interleave(2, 1), weights.sum(-1)

    implementations_agree(
        lambda q, k, v, g: gated_bidirectional(q, k, v, g, gap=gap, segments_BT=segments if packed else None),
        definition,
        _gated(4, 2, 2, tokens, gate),
    )


@pytest.mark.parametrize("gap", [0, 3])
def test_the_right_may_fade_otherwise_than_the_left(gap):
    column = torch.arange(70)
    seen = ((column[:, None] - column).abs() >= gap).expand(2, -1, -1)

    def definition(q, k, v, g, right):
        k, g, right = (x.repeat_interleave(2, 1) for x in (k, g, right))
        weights = gated_weights(q, k, g, seen, right_BHTF=right, gap=gap)
        return weights @ v.repeat_interleave(2, 1), weights.sum(-1)

    q, k, v, g = _gated(4, 2, 2, 70)
    implementations_agree(
        lambda q, k, v, g, right: gated_bidirectional(q, k, v, g, log_gate_right=right, gap=gap),
        definition,
        [q, k, v, g, 3 * g.flip(-1)],
    )


def test_gated_bidirectional_with_open_gates_is_bidirectional():
    q, k, v, g = _gated(4, 2, 1, 70)
    for gap in (0, 3):
        implementations_agree(
            lambda q, k, v, gap=gap: gated_bidirectional(q, k, v, 0 * g, gap=gap),
            lambda q, k, v, gap=gap: bidirectional(q, k, v, gap=gap),
            [q, k, v],
        )


# ----------------------------------------------------------------------------------------------------------- window
@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 70])
@pytest.mark.parametrize("before", ["none", "some", "full", "more"])
@pytest.mark.parametrize("width, ahead", [(1, 0), (5, 0), (40, 0), (5, 4), (40, 39)])
@pytest.mark.parametrize("impl", _names(window_op))
def test_window_equals_reference(impl, width, ahead, before, tokens):
    """Output, log-sum-exp, maximum and every gradient; keys from before this call, padding and documents."""
    kept = {"none": 0, "some": width // 2, "full": width - 1, "more": width + 3}[before]
    S = tokens + kept
    codes_BS = torch.stack([torch.ones(S, dtype=torch.long), 1 + (torch.arange(S) >= S - tokens // 2).long()])
    codes_BS[0, : min(2, S)] = 0  # row 0: padding first, where a query may see nothing at all
    tensors = [_normal(2, 4, tokens, 6) * 2, _normal(2, 2, S, 6, seed=1) * 2, _normal(2, 2, S, 3, seed=2)]

    def run(name):
        return lambda q, k, v: window(
            q, k, v, width=width, scale=0.4, codes_BT=codes_BS[:, kept:], codes_BS=codes_BS, ahead=ahead, impl=name
        )

    implementations_agree(run(impl), run("reference"), tensors)


def test_window_reference_gradcheck():
    codes = torch.tensor([[0, 1, 1, 1, 2, 2, 2]])
    tensors = [_normal(1, 2, 6, 3), _normal(1, 1, 7, 3, seed=1), _normal(1, 1, 7, 2, seed=2)]

    for ahead in (0, 2):

        def run(q, k, v, ahead=ahead):
            codes_BT = codes[:, 1:]
            out = window(q, k, v, width=3, scale=0.5, codes_BT=codes_BT, codes_BS=codes, ahead=ahead, impl="reference")
            return out.output, out.lse

        assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_window_of_nothing(impl):
    """A query that sees nothing: output 0, log-sum-exp and maximum -inf, gradient 0; never NaN."""
    q, k, v = (_normal(1, 2, 4, 3, seed=s).requires_grad_() for s in range(3))
    codes = torch.zeros(1, 4, dtype=torch.long)
    out = window(q, k, v, width=2, scale=1.0, codes_BT=codes, codes_BS=codes, impl=impl)
    assert out.output.eq(0).all() and out.lse.eq(-torch.inf).all() and out.max.eq(-torch.inf).all()
    for gradient in torch.autograd.grad(out.output.sum(), (q, k, v)):
        assert gradient.eq(0).all()


def test_window_survives_large_scores():
    """Scores of a thousand: no overflow, and the answer is the nearest key's value."""
    q = torch.full((1, 1, 8, 4), 50.0)
    k, v = _normal(1, 1, 8, 4).float() * 5, _normal(1, 1, 8, 3, seed=1).float()
    codes = torch.ones(1, 8, dtype=torch.long)
    for impl in ("torch", "reference"):
        out = window(q, k, v, width=8, scale=1.0, codes_BT=codes, codes_BS=codes, impl=impl)
        assert all(x.isfinite().all() for x in out)


# --------------------------------------------------------------------------------------------------------- dispatch
def test_a_named_implementation_never_falls_back():
    picky = Implementation("picky", lambda: None, lambda *args: "it is Tuesday")
    plain = Implementation("plain", lambda: None)
    assert choose("op", [picky, plain], "auto") is plain
    with pytest.raises(InputError, match="op: impl='picky' refuses this call: it is Tuesday"):
        choose("op", [picky, plain], "picky")
    before = calls.copy()
    choose("op", [picky, plain], "plain")
    assert used(before) == {"op": ["plain"]}
    with pytest.raises(InputError, match="did you mean 'plain'"):
        choose("op", [picky, plain], "plane")
    with pytest.raises(InputError, match="no implementation takes this call"):
        choose("op", [picky], "auto")


def test_auto_says_once_what_it_chose(caplog):
    picky = Implementation("picky", lambda: None, lambda *args: "no device")
    with caplog.at_level("INFO", logger="linearize.ops"):
        for _ in range(3):
            choose("said_once", [picky, Implementation("plain", lambda: None)], "auto")
    assert [r.message for r in caplog.records] == ["said_once: picky refused: no device", "said_once: using plain"]


# ---------------------------------------------------------------------------------------------------------- local2d
#: (rows, columns), radius, prefix, suffix: one tile and several, ragged ones, one patch, circles that touch no border
CIRCLES = [
    ((5, 7), 3, 1, 0),
    ((5, 7), 20, 1, 2),
    ((1, 1), 1, 0, 0),
    ((1, 50), 4, 2, 0),
    ((40, 23), 4, 2, 3),
    ((33, 18), 5, 0, 0),
    ((17, 50), 1, 0, 1),
]


def _circle_inputs(grid, prefix, suffix, hide):
    tokens = grid[0] * grid[1] + prefix + suffix
    valid = None
    if hide:  # also all that some tokens could see
        valid = torch.rand(2, tokens, generator=torch.Generator().manual_seed(4)) > 0.5
        valid[1, : tokens // 2] = False
    return [_normal(2, 4, tokens, 5), _normal(2, 2, tokens, 5, seed=1), _normal(2, 2, tokens, 3, seed=2)], valid


@pytest.mark.parametrize("hide", [False, True], ids=["all", "hidden"])
@pytest.mark.parametrize("grid, radius, prefix, suffix", CIRCLES, ids=str)
@pytest.mark.parametrize("impl", _names(local2d_op))
def test_local2d_equals_reference(impl, grid, radius, prefix, suffix, hide):
    tensors, valid = _circle_inputs(grid, prefix, suffix, hide)
    more = {"grid": grid, "radius": radius, "scale": 1.3, "prefix": prefix, "suffix": suffix, "valid_BT": valid}
    implementations_agree(
        lambda *x: local2d(*x, **more, impl=impl), lambda *x: local2d(*x, **more, impl="reference"), tensors
    )
    seen = (circle(grid, radius, prefix, suffix) & (True if valid is None else valid[:, None])).any(-1)
    seen = seen.expand(2, -1)[:, None, :, None]  # what the others get means nothing, but is a number
    implementations_agree(
        lambda *x: [local2d_output(*x, **more).masked_fill(~seen, 0)],
        lambda *x: [local2d(*x, **more, impl="reference").output.masked_fill(~seen, 0)],
        tensors,
    )
    assert local2d_output(*tensors, **more).isfinite().all()


@pytest.mark.parametrize("grid, radius, prefix, suffix", [*CIRCLES, ((40, 51), 3, 1, 0), ((70, 20), 18, 0, 0)], ids=str)
@pytest.mark.parametrize("impl", _names(bidirectional_op))
def test_outside_a_circle_equals_reference(impl, grid, radius, prefix, suffix):
    (q, k, v), _ = _circle_inputs(grid, prefix, suffix, False)
    circle = Circle(grid, radius, prefix, suffix)
    implementations_agree(
        lambda *x: bidirectional(*x, circle=circle, impl=impl),
        lambda *x: bidirectional(*x, circle=circle, impl="reference"),
        [q.exp(), k.exp(), v],
    )


@pytest.mark.parametrize("piece", [1, 7, 20, 21, 100])
def test_in_pieces_is_in_one_go(piece):
    tensors = [_normal(2, 4, 21, 5).exp(), _normal(2, 4, 21, 5, seed=1).exp(), _normal(2, 2, 21, 3, seed=2)]
    implementations_agree(
        lambda q, k, v: in_pieces(lambda part: q[:, :, part], lambda part: k[:, :, part], v, piece),
        lambda *x: bidirectional(*x, impl="reference"),
        tensors,
    )


def test_local2d_reference_gradcheck():
    tensors = [_normal(1, 2, 8, 3).requires_grad_(), *(_normal(1, 1, 8, 3, seed=s).requires_grad_() for s in (1, 2))]
    assert torch.autograd.gradcheck(
        lambda *x: tuple(local2d(*x, grid=(2, 3), radius=2, scale=0.7, prefix=1, suffix=1, impl="reference")), tensors
    )


def test_circles_hold_what_the_paper_counts():
    """Keys of a circle that touches no border; GFLOPs of one FLUX layer (2412.16112): 512 text tokens, width 3072."""
    assert [int(circle((65, 66), r)[32 * 66 + 33].sum()) for r in (8, 16, 32)] == [193, 793, 3205]
    published = {64: (63.5, 86.6, 154.1), 128: (246.2, 352.6, 724.3), 256: (979.3, 1433.2, 3141.7)}
    for side, figures in published.items():
        assert tuple(round(4 * 3072 * pairs((side, side), r, 512) / 1e9, 1) for r in (8, 16, 32)) == figures
    for grid, radius, prefix, suffix in CIRCLES:
        assert pairs(grid, radius, prefix + suffix) == int(circle(grid, radius, prefix, suffix).sum())
