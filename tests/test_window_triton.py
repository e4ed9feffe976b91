"""The GPU kernels of `window` without a GPU: interpreted against float64. With one, the same tests run on it."""

from __future__ import annotations

import pytest
import torch

GPU = torch.cuda.is_available()  # without one the kernels are interpreted: conftest.py
pytest.importorskip("triton", reason="triton is not installed: pip install 'linearize[triton]'")

from linearize.ops.window import window  # noqa: E402
from linearize.testing.laws import implementations_agree  # noqa: E402
from linearize.types import InputError  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if GPU else "cpu"
K, V = 6, 5


def _inputs(tokens, before=0, heads=(2, 1), batch=1):
    noise = torch.Generator().manual_seed(0)
    sizes = ((heads[0], tokens, K), (heads[1], tokens + before, K), (heads[1], tokens + before, V))
    return [torch.randn(batch, *size, generator=noise, dtype=torch.float64) for size in sizes]


def _codes(batch, tokens, before, hide):
    """Codes of queries and keys. hide: padding, two documents and keys nobody sees; of a second row the first half."""
    codes = torch.ones(batch, tokens, dtype=torch.long)
    keys = torch.ones(batch, before, dtype=torch.long)
    if hide:
        codes[0, tokens // 2 :] = 2
        codes[:, -2:] = 0
        codes[-1, : tokens // 2] = 0
        keys[:, ::3] = 0
    keys = torch.cat([keys, codes], 1)
    if hide:  # a sink, say: a query that is no key
        keys[0, before + 1] = 0
    return {"codes_BT": codes.to(DEVICE), "codes_BS": keys.to(DEVICE)}


def _agree(tokens, width, ahead=0, before=0, dtype=torch.float32, hide=False, heads=(2, 1)):
    """Output, log-sum-exp, maximum and every gradient against the definition in float64."""
    batch = 2 if hide else 1
    tensors = [x.to(dtype).double().to(DEVICE) for x in _inputs(tokens, before, heads, batch)]
    where = {"width": width, "ahead": ahead, "scale": 0.7, **_codes(batch, tokens, before, hide)}
    allowed = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 5e-2}[dtype]
    implementations_agree(
        lambda *x: window(*(t.to(dtype) for t in x), **where, impl="triton"),
        lambda *x: window(*x, **where, impl="reference"),
        tensors,
        allowed,
    )


def test_a_causal_window_over_carried_keys():
    _agree(45, 7, before=7)


def test_both_sides_hidden_keys_documents_and_tokens_that_see_nothing():
    _agree(37, 5, ahead=4, hide=True, heads=(1, 1))


def test_float16():
    _agree(33, 9, before=3, dtype=torch.float16, heads=(1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("width, ahead", [(1, 0), (16, 0), (100, 0), (3, 2), (70, 69)])
@pytest.mark.parametrize("tokens, before", [(1, 0), (1, 20), (50, 0), (65, 31)])
@pytest.mark.parametrize("hide", [False, True], ids=["all", "hidden"])
def test_widths_and_lengths(width, ahead, tokens, before, hide):
    if hide and tokens < 4:
        pytest.skip("too few tokens to hide any")
    _agree(tokens, width, ahead, before, hide=hide)


@pytest.mark.skipif(not GPU, reason="bfloat16 needs a GPU: the interpreter computes it wrongly")
@pytest.mark.parametrize("size", [48, 64, 128])
@pytest.mark.parametrize("hide", [False, True], ids=["all", "hidden"])
def test_bfloat16_on_a_gpu(hide, size, monkeypatch):
    for name in ("K", "V"):
        monkeypatch.setitem(globals(), name, size)
    _agree(1000, 64, before=64, dtype=torch.bfloat16, hide=hide, heads=(4, 2))


def test_only_the_window_is_read():
    """What stands outside the blocks that a query can reach is never loaded: NaN there reaches nobody else."""
    q, k, v = (x.float().to(DEVICE) for x in _inputs(200, heads=(1, 1)))
    where = {"width": 8, "scale": 0.7, **_codes(1, 200, 0, False)}
    expected = window(q, k, v, **where, impl="reference")
    k, v = k.clone(), v.clone()
    k[:, :, :64], v[:, :, :64] = torch.nan, torch.nan
    found = window(q, k, v, **where, impl="triton")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a[:, :, 128:], b[:, :, 128:])


def test_operator_passes_opcheck_and_compiles_whole():
    from linearize.ops.window import triton as launches  # noqa: F401

    tensors = [x.float().to(DEVICE).requires_grad_() for x in _inputs(9, 2, heads=(1, 1))]
    codes = _codes(1, 9, 2, False)
    torch.library.opcheck(torch.ops.linearize.window_triton.default, (*tensors, 3, 0, 0.7, *codes.values()))

    def loss(*x):
        found = window(*x, width=3, scale=0.7, **codes, impl="triton")
        return found.output.square().sum() + found.lse.sum() + found.max.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(loss(*tensors), tensors)):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(GPU, reason="about machines without a GPU")
def test_a_named_implementation_never_falls_back(monkeypatch):
    q, k, v = (x.float() for x in _inputs(5))
    where = {"width": 2, "scale": 0.7, **_codes(1, 5, 0, False)}
    with pytest.raises(InputError, match="interpreter computes bfloat16 wrongly"):
        window(q, k, v.bfloat16(), **where, impl="triton")
    wide = torch.zeros(1, 1, 5, 160)
    with pytest.raises(InputError, match="head sizes up to 128, not 160"):
        window(wide, wide, v[:, :1], **where, impl="triton")
    with pytest.raises(InputError, match="16 and 32-bit floats, not float64"):
        window(q.double(), k, v, **where, impl="triton")
    for found, expected in zip(*(window(q, k, v, **where, impl=impl) for impl in ("auto", "torch")), strict=True):
        assert torch.equal(found, expected)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InputError, match="the tensors are on cpu"):
        window(q, k, v, **where, impl="triton")
