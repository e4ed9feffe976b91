"""The GPU kernels of `gated_linear` without a GPU: interpreted against float64. With one, the same tests run on it."""

from __future__ import annotations

import math

import pytest
import torch

GPU = torch.cuda.is_available()  # without one the kernels are interpreted: conftest.py
pytest.importorskip("triton", reason="triton is not installed: pip install 'linearize[triton]'")

from linearize.ops.gated_linear import gated_linear  # noqa: E402
from linearize.testing.laws import implementations_agree  # noqa: E402
from linearize.types import InputError  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if GPU else "cpu"
#: features of two tiles, the second of them ragged, and columns of v
F, V = 18, 5


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks of 16 tokens: short sequences then have several."""
    from linearize.ops.gated_linear import triton as launches

    monkeypatch.setattr(launches, "INTERPRETED", launches.Tiles(16, 16, 16, 1))


def _normal(*sizes, seed=0):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


#: log gates: of each feature and token, from none to exp(-1000); so mild that a chunk is one product; of each head;
#: the same for all tokens
GATES = {
    "feature": lambda B, J, T: -((_normal(B, J, T, F, seed=4) * 2).exp().clamp(max=50) ** 1.77),
    "mild": lambda B, J, T: -0.1 * _normal(B, J, T, F, seed=4).exp(),
    "head": lambda B, J, T: -_normal(B, J, T, 1, seed=4).exp(),
    "constant": lambda B, J, T: -_normal(J, 1, F, seed=4).exp(),
}


def _inputs(heads, tokens, gate="feature", state=True, batch=1):
    H, J, G = heads
    tensors = [_normal(batch, n, tokens, size, seed=s) for n, size, s in ((H, F, 0), (J, F, 1), (G, V, 2))]
    tensors.append(GATES[gate](batch, J, tokens))
    return [*tensors, _normal(batch, J, F, V + 1, seed=3)] if state else tensors


def _call(impl, dtype=torch.float64, **settings):
    def run(q, k, v, g, state=None):
        q, k, v = (x.to(dtype) for x in (q, k, v))
        return gated_linear(q, k, v, g, state=state, impl=impl, **settings)

    return run


def _documents(tokens):
    """Of two sequences, cut early, late and in the middle."""
    column = torch.arange(tokens, device=DEVICE)
    return torch.stack([(column >= 3).long() + (column >= tokens - 1), (column >= tokens // 2).long() * 2])


def _agree(heads, tokens, gate="feature", dtype=torch.float32, packed=False, state=True):
    """Numerator, normaliser, final state and every gradient against the definition in float64."""
    drawn = _inputs(heads, tokens, gate, state, batch=2 if packed else 1)
    tensors = [x.to(dtype).double().to(DEVICE) for x in drawn]
    settings = {"segments_BT": _documents(tokens) if packed else None}
    allowed = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 5e-2}[dtype]
    implementations_agree(_call("triton", dtype, **settings), _call("reference", **settings), tensors, allowed)


def test_packed_documents_a_state_and_shared_heads(monkeypatch):
    monkeypatch.setitem(globals(), "F", 6)
    _agree((2, 1, 1), 33, packed=True)


@pytest.mark.parametrize("gate", ["mild", "head"])
def test_float16_from_nothing(gate):
    _agree((1, 1, 1), 20, gate, dtype=torch.float16, state=False)


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_and_several_tiles_of_values(gate, monkeypatch):
    monkeypatch.setitem(globals(), "V", 17)
    _agree((2, 2, 1), 19, gate)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 16, 50])
@pytest.mark.parametrize("heads, gate", [((4, 4, 4), "head"), ((4, 4, 2), "mild"), ((4, 2, 2), "feature")], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_lengths_and_heads(packed, heads, gate, tokens):
    _agree(heads, tokens, gate, packed=packed)


@pytest.mark.skipif(not GPU, reason="bfloat16 needs a GPU: the interpreter computes it wrongly")
@pytest.mark.parametrize("size", [48, 64, 128, 256])
@pytest.mark.parametrize("gate", GATES)
def test_bfloat16_on_a_gpu(gate, size, monkeypatch):
    for name in ("F", "V"):
        monkeypatch.setitem(globals(), name, size)
    _agree((4, 2, 2), 700, gate, dtype=torch.bfloat16, packed=True)


def _strong(dtype, impl, nats=5.0):
    """Features that fade by exp(-nats) at each token beside some that hardly do; and one token that shuts them all."""
    q, k, v = (x.exp() for x in _inputs((1, 1, 1), 70, state=False)[:3])
    g = torch.where(torch.arange(F) % 2 == 0, -nats, -1e-4).double().repeat(1, 1, 70, 1)
    g[:, :, 40] = -1000
    tensors = [x.to(DEVICE, dtype).requires_grad_() for x in (q, k, v, g)]
    out = gated_linear(*tensors, impl=impl)
    return [*out, *torch.autograd.grad(out.numerator.sum() + out.normaliser.sum(), tensors)]


def test_strong_gates_cost_no_digits():
    """What stands behind gates of exp(-5) and of exp(-1000) in the same chunk keeps float32's digits."""
    for found, exact in zip(_strong(torch.float32, "triton"), _strong(torch.float64, "reference")):
        size = exact.abs().amax(2, keepdim=True)
        assert found.isfinite().all() and bool(((found - exact).abs() <= 3e-6 * size).all())


@pytest.mark.parametrize("gate", ["feature", "head"])
def test_one_token(gate):
    inputs = [x.float().to(DEVICE) for x in _inputs((4, 2, 1), 1, gate, batch=2)]
    for given in (inputs, inputs[:-1]):
        with torch.no_grad():
            found, expected = (_call(impl, torch.float32)(*given) for impl in ("triton", "reference"))
        for f, e in zip(found, expected):
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)


def test_a_gate_near_one_is_not_rounded_as_one_is():
    """As a float32, exp(-1e-5) takes 0.14 % more than it should, at every token."""
    from linearize.ops.gated_linear import triton as launches

    key, value = torch.zeros(1, 1, 1, 16, device=DEVICE), torch.zeros(1, 1, 1, 16, device=DEVICE)
    first = 0.5 + 0.5 * torch.rand(1, 1, 16, 17, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    state, gate, steps = first, torch.full((1, 1, 1, 1), -1e-5, device=DEVICE), 100
    for _ in range(steps):
        state = launches.step_triton(key, key, value, gate, state)[2]
    taken = (first.double() - state).sum() / first.double().sum()
    assert abs(float(taken) / -math.expm1(-1e-5 * steps) - 1) < 4e-4


def test_operator_passes_opcheck_and_compiles_whole():
    from linearize.ops.gated_linear import triton as launches  # noqa: F401

    q, k, v, g, state = (x.float().to(DEVICE).requires_grad_() for x in _inputs((1, 1, 1), 17, "head"))
    operator = torch.ops.linearize.gated_linear_triton.default
    torch.library.opcheck(operator, (q, k, v, g, state, None))

    def loss(*x):
        return sum(out.square().sum() for out in gated_linear(*x[:4], state=x[4], impl="triton"))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    tensors = (q, k, v, g, state)
    for a, b in zip(torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(loss(*tensors), tensors)):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(GPU, reason="about machines without a GPU")
def test_a_named_implementation_never_falls_back(monkeypatch):
    q, k, v, g = (x.float() for x in _inputs((1, 1, 1), 4, state=False))
    with pytest.raises(InputError, match="interpreter computes bfloat16 wrongly"):
        gated_linear(q, k, v.bfloat16(), g, impl="triton")
    wide = torch.zeros(1, 1, 4, 300)
    with pytest.raises(InputError, match="head sizes up to 256, not 300"):
        gated_linear(wide, wide, v, g[..., :1], impl="triton")
    with pytest.raises(InputError, match="16 and 32-bit floats, not float64"):
        gated_linear(q.double(), k.double(), v.double(), g, impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InputError, match="the tensors are on cpu"):
        gated_linear(q, k, v, g, impl="triton")
    found, expected = (gated_linear(q, k, v, g, impl=impl) for impl in ("auto", "torch"))
    assert all(torch.equal(f, e) for f, e in zip(found, expected))
