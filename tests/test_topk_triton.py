"""The GPU kernels of `topk` without a GPU: interpreted against float64. With one, the same tests run on it."""

from __future__ import annotations

import pytest
import torch

GPU = torch.cuda.is_available()  # without one the kernels are interpreted: conftest.py
pytest.importorskip("triton", reason="triton is not installed: pip install 'linearize[triton]'")

from linearize.ops.topk import block_softmax  # noqa: E402
from linearize.testing.laws import implementations_agree  # noqa: E402
from linearize.types import InputError  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if GPU else "cpu"
K, V = 6, 5


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of 16 tokens, and masks 16 blocks at a time: short sequences then have several."""
    from linearize.ops.topk import triton as launches

    monkeypatch.setattr(launches, "INTERPRETED", launches.Tiles(16, 16, 1))
    monkeypatch.setattr(launches, "LISTED", 16)


def _inputs(tokens, heads=(2, 1), batch=1, size=None):
    noise = torch.Generator().manual_seed(0)
    sizes = ((heads[0], size or K), (heads[1], size or K), (heads[1], size or V))
    return [torch.randn(batch, n, tokens, d, generator=noise, dtype=torch.float64) for n, d in sizes]


def _kept(batch, heads, tokens, block, causal, share=0.4):
    """Each head its own blocks, by chance; some rows and columns are empty."""
    n = -(-tokens // block)
    kept = torch.rand(batch, heads, n, n, generator=torch.Generator().manual_seed(3)) < share
    kept[:, 0, n // 2], kept[:, -1, :, n // 3] = False, False
    return (kept.tril() if causal else kept).to(DEVICE)


def _agree(tokens, block, causal, dtype=torch.float32, hide=False, heads=(2, 1), size=None):
    """Output and every gradient against the definition in float64."""
    batch = 2 if hide else 1
    tensors = [x.to(dtype).double().to(DEVICE) for x in _inputs(tokens, heads, batch, size)]
    settings = {"block": block, "scale": 0.7, "causal": causal, "valid_BT": None}
    if hide:  # of the second row also the whole beginning
        valid = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(4)) > 0.3
        valid[1, : tokens // 2] = False
        settings["valid_BT"] = valid.to(DEVICE)
    kept = _kept(batch, heads[0], tokens, block, causal)
    assert tokens < 2 * block or 0 < int(kept.sum()) < kept.numel()
    allowed = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 5e-2}[dtype]
    implementations_agree(
        lambda *x: [block_softmax(*(t.to(dtype) for t in x), kept, **settings, impl="triton")],
        lambda *x: [block_softmax(*x, kept, **settings, impl="reference")],
        tensors,
        allowed,
    )


def test_causal_blocks_of_an_odd_length():
    _agree(45, 7, True, heads=(4, 2))


def test_hidden_keys_and_tokens_that_see_nothing():
    _agree(41, 20, False, hide=True)


def test_float16():
    _agree(37, 16, True, torch.float16, heads=(1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("tokens, block", [(1, 1), (1, 8), (19, 1), (50, 3), (64, 16), (70, 33), (90, 64)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("hide", [False, True], ids=["all", "hidden"])
def test_lengths_and_blocks(tokens, block, causal, hide):
    _agree(tokens, block, causal, hide=hide)


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 48, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_head_sizes(size, dtype):
    _agree(35, 8, True, dtype, size=size)


@pytest.mark.slow
def test_heads_that_only_bfloat16_may_have():
    """The operator itself, which takes them, in float32."""
    from linearize.ops.topk.triton import topk_triton

    kept = _kept(1, 2, 35, 8, True)
    implementations_agree(
        lambda *x: [topk_triton(*(t.float() for t in x), kept, None, 8, 0.7, True)[0]],
        lambda *x: [block_softmax(*x, kept, block=8, scale=0.7, causal=True, impl="reference")],
        [x.float().double().to(DEVICE) for x in _inputs(35, size=200)],
        1e-5,
    )


@pytest.mark.skipif(not GPU, reason="bfloat16 needs a GPU: the interpreter computes it wrongly")
@pytest.mark.parametrize("size", [48, 64, 128, 256])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("block", [16, 32, 64, 100])
def test_bfloat16_on_a_gpu(causal, size, block):
    _agree(1029, block, causal, torch.bfloat16, hide=not causal, heads=(4, 2), size=size)


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_lists_of_kept_blocks(columns):
    from linearize.ops.topk import triton as launches

    kept = _kept(2, 3, 41, 1, False)
    q = torch.zeros(2, 3, 41, 4, device=DEVICE)
    mask = kept.transpose(0, 1).contiguous().transpose(0, 1)  # as SEA's choice lies in memory
    index, counts = launches._Call(q, q, q, mask, None, 1, 1.0, False).lists(columns)
    rows = (kept.mT if columns else kept).flatten(0, 2)
    assert len(set(counts.flatten().tolist())) > 5
    for row, listed, count in zip(rows, index.flatten(0, 2), counts.flatten(), strict=True):
        assert listed[:count].tolist() == row.nonzero()[:, 0].tolist()


def test_blocks_that_are_not_kept_are_not_read():
    """NaN there reaches neither output nor gradients."""
    tokens, block = 40, 8
    kept = _kept(1, 2, tokens, block, True)
    kept[:, :, :, 1] = False
    q, k, v = (x.float().to(DEVICE) for x in _inputs(tokens))
    settings = {"block": block, "scale": 0.7, "causal": True, "impl": "triton"}
    expected = block_softmax(q, k, v, kept, **settings)
    assert bool(expected.any())
    bad = [x.clone() for x in (k, v)]
    for x in bad:
        x[:, :, block : 2 * block] = torch.nan
    leaves = [x.clone().requires_grad_() for x in (q, *bad)]
    found = block_softmax(*leaves, kept, **settings)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in leaves)


def test_work_is_in_proportion_to_the_kept_blocks():
    """Tiles of 16 tokens read blocks of 4 by fours: a row with c of them takes ceil(c / 4) products of scores."""
    from linearize.ops.topk import kernels

    seen = []
    plain = kernels._scores

    def counted(*args, **settings):
        seen.append(1)
        return plain(*args, **settings)

    kept = _kept(1, 2, 64, 4, False)
    kernels.forward.fn.__globals__["_scores"] = counted
    try:
        q, k, v = (x.float() for x in _inputs(64))
        block_softmax(q, k, v, kept, block=4, scale=1.0, causal=False, impl="triton")
    finally:
        kernels.forward.fn.__globals__["_scores"] = plain
    assert len(seen) == int((-(-kept.sum(-1) // 4)).sum())
    assert len(seen) < 2 * 16 * 4


def test_answers_are_the_same_every_time():
    tensors = [x.float().to(DEVICE).requires_grad_() for x in _inputs(45, (4, 2))]
    kept = _kept(1, 4, 45, 7, True)

    def run():
        out = block_softmax(*tensors, kept, block=7, scale=0.7, causal=True, impl="triton")
        return out, *torch.autograd.grad(out.square().sum(), tensors)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_operator_passes_opcheck_and_compiles_whole():
    from linearize.ops.topk import triton as launches  # noqa: F401

    tensors = [x.float().to(DEVICE).requires_grad_() for x in _inputs(21)]
    kept = _kept(1, 2, 21, 8, True)
    for valid in (None, torch.arange(21, device=DEVICE)[None] < 19):
        torch.library.opcheck(torch.ops.linearize.topk_triton.default, (*tensors, kept, valid, 8, 0.7, True))

    def loss(*x):
        return block_softmax(*x, kept, block=8, scale=0.7, causal=True, impl="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(loss(*tensors), tensors)):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(GPU, reason="about machines without a GPU")
def test_a_named_implementation_never_falls_back(monkeypatch):
    q, k, v = (x.float() for x in _inputs(9))
    settings = {"block": 4, "scale": 0.7, "causal": True}
    kept = _kept(1, 2, 9, 4, True)
    with pytest.raises(InputError, match="interpreter computes bfloat16 wrongly"):
        block_softmax(q, k, v.bfloat16(), kept, **settings, impl="triton")
    wide = torch.zeros(1, 2, 9, 160)
    with pytest.raises(InputError, match="head sizes up to 128, not 160"):
        block_softmax(wide, wide, v, kept, **settings, impl="triton")
    with pytest.raises(InputError, match="16 and 32-bit floats, not float64"):
        block_softmax(q.double(), k.double(), v.double(), kept, **settings, impl="triton")
    found, expected = (block_softmax(q, k, v, kept, **settings, impl=impl) for impl in ("auto", "torch"))
    assert torch.equal(found, expected)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InputError, match="the tensors are on cpu"):
        block_softmax(q, k, v, kept, **settings, impl="triton")
