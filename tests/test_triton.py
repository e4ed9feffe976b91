"""The GPU kernels without a GPU: interpreted against float64, and the committed table of what they compile to.

On a machine with a GPU the same tests run on it (make gpu), in bfloat16 too.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()  # without one the kernels are interpreted: conftest.py
pytest.importorskip("triton", reason="triton is not installed: pip install 'linearize[triton]'")

from linearize.ops._maps import MAPS  # noqa: E402
from linearize.ops.mapped_linear import mapped_linear  # noqa: E402
from linearize.testing.laws import implementations_agree, poisoned_memory  # noqa: E402
from linearize.types import InputError  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if GPU else "cpu"
K, C, V = 6, 5, 3


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks of 16 tokens: short sequences then have several."""
    from linearize.ops.mapped_linear import triton as launches

    monkeypatch.setattr(launches, "INTERPRETED", launches.Tiles(16, 16, 1))


def _normal(*sizes, seed=0):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inputs(heads, tokens, name, state):
    H, J, G = heads
    tensors = [_normal(2, n, tokens, size, seed=n) for n, size in ((H, K), (G, K), (G, V))]
    if name not in ("relu", "elu"):
        tensors += [_normal(n, K, C, seed=10 + n) for n in (H, J)]
    if MAPS[name].bias:
        tensors += [_normal(n, C, seed=20 + n) for n in (H, J)]
    columns = C if len(tensors) > 3 else K
    return [*tensors, _normal(2, J, columns * MAPS[name].factor, V + 1, seed=3).abs()] if state else tensors


def _call(impl, name, dtype=torch.float64, **settings):
    def run(q, k, v, *rest):
        state = rest[-1] if len(rest) % 2 else None
        pairs = [tuple(rest[i : i + 2]) for i in range(0, len(rest) - len(rest) % 2, 2)]
        weights, biases = (pairs + [(None, None)] * 2)[:2]
        q, k, v = (x.to(dtype) for x in (q, k, v))
        return mapped_linear(q, k, v, name, weights, biases, state=state, impl=impl, **settings)

    return run


def _agree(heads, tokens, name="split_softmax", dtype=torch.float32, packed=False, padded=True, state=True):
    """Output, mass, final state and every gradient against the definition in float64."""
    column = torch.arange(tokens, device=DEVICE)
    valid = torch.stack([column % 7 != 1, column % 5 != 4])
    documents = torch.stack([(column >= 3).long() + (column >= tokens - 1), (column >= tokens // 2).long() * 2])
    tensors = [x.to(dtype).double().to(DEVICE) for x in _inputs(heads, tokens, name, state)]
    settings = {
        "key_heads": heads[1],
        "valid_BT": valid if padded else None,
        "segments_BT": documents if packed else None,
    }
    allowed = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}[dtype]
    run, definition = _call("triton", name, dtype, **settings), _call("reference", name, **settings)
    implementations_agree(run, definition, tensors, allowed)


def test_packed_documents_padding_a_state_and_shared_heads():
    _agree((2, 1, 1), 33, packed=True)


def test_float16_from_nothing():
    _agree((1, 1, 1), 35, dtype=torch.float16, padded=False, state=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPS)
def test_every_map(name):
    _agree((2, 2, 1), 19, name)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 16, 50])
@pytest.mark.parametrize("heads", [(4, 4, 4), (4, 4, 2), (4, 2, 2)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_lengths_and_heads(packed, heads, tokens):
    _agree(heads, tokens, packed=packed)


@pytest.mark.skipif(not GPU, reason="bfloat16 needs a GPU: the interpreter computes it wrongly")
@pytest.mark.parametrize("size", [48, 64, 128])
def test_bfloat16_on_a_gpu(size, monkeypatch):
    for name in ("K", "C", "V"):
        monkeypatch.setitem(globals(), name, size)
    _agree((4, 2, 2), 700, dtype=torch.bfloat16, packed=True)


def test_one_token():
    inputs = [x.float().to(DEVICE) for x in _inputs((4, 2, 1), 1, "split_softmax", True)]
    valid = torch.tensor([[True], [False]], device=DEVICE)
    for run_state in (inputs, inputs[:-1]):
        with torch.no_grad():
            found, expected = (
                _call(impl, "split_softmax", torch.float32, key_heads=2, valid_BT=valid)(*run_state)
                for impl in ("triton", "reference")
            )
        for f, e in zip(found, expected):
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)


def test_operator_passes_opcheck():
    from linearize.ops.mapped_linear import triton as launches  # noqa: F401

    q, k, v, w_q, w_k = (x.float().to(DEVICE).requires_grad_() for x in _inputs((1, 1, 1), 17, "relu", False) + [
        _normal(1, K, C, seed=1), _normal(1, K, C, seed=2)])  # fmt: skip
    inputs = (q, k, v, w_q, w_k, None, None, None, None, None, "t2r", 1, 1e-12, True)
    torch.library.opcheck(torch.ops.linearize.mapped_linear_triton.default, inputs)


@pytest.mark.skipif(GPU, reason="about machines without a GPU")
def test_a_named_implementation_never_falls_back(monkeypatch):
    q, k, v, *weights = (x.float() for x in _inputs((1, 1, 1), 4, "split_softmax", False))
    run = _call("triton", "split_softmax", torch.bfloat16)
    with pytest.raises(InputError, match="interpreter computes bfloat16 wrongly"):
        run(q, k, v, *weights)
    wide = torch.zeros(1, 1, 4, 200)
    with pytest.raises(InputError, match="head sizes up to 128, not 200"):
        mapped_linear(wide, wide, wide, "relu", impl="triton")
    with pytest.raises(InputError, match="16 and 32-bit floats, not float64"):
        mapped_linear(q.double(), k.double(), v.double(), "relu", impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InputError, match="the tensors are on cpu"):
        mapped_linear(q, k, v, "relu", impl="triton")


def test_auto_goes_by_device(monkeypatch):
    q, k, v, *weights = (x.float() for x in _inputs((1, 1, 1), 20, "split_softmax", False))
    with poisoned_memory():
        found = _call("auto", "split_softmax", torch.float32)(q, k, v, *weights)
        expected = _call("torch", "split_softmax", torch.float32)(q, k, v, *weights)
    assert all(torch.equal(f, e) for f, e in zip(found, expected))


# ------------------------------------------------------------------------------------------- what they compile to
def _aot():
    place = Path(__file__).parent.parent / "benchmarks" / "aot.py"
    spec = importlib.util.spec_from_file_location("aot_benchmark", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_table_is_of_these_sources_and_nothing_spills():
    """Compiled by make kernels; here only what is committed is looked at."""
    aot = _aot()
    held = json.loads(aot.FILE.read_text())
    assert held["source"] == aot.source_hash(), "run python benchmarks/aot.py"
    assert len(aot.KERNELS) <= 40
    expected = {
        f"{target} {kernel.name}" for kernel in aot.KERNELS for target in aot.TARGETS if target not in kernel.without
    }
    assert set(held["kernels"]) == expected
    assert aot.problems(held["kernels"]) == []


def test_spills_and_too_much_memory_are_problems():
    rows = {"sm_90 a": {"registers": 255, "spilled": 8, "shared": 0}, "gfx942 b": {"spilled": 0, "shared": 65537}}
    assert len(_aot().problems(rows)) == 2
