"""The GPU kernels of `local2d` without a GPU: interpreted against float64. With one, the same tests run on it."""

from __future__ import annotations

import pytest
import torch

GPU = torch.cuda.is_available()  # without one the kernels are interpreted: conftest.py
pytest.importorskip("triton", reason="triton is not installed: pip install 'linearize[triton]'")

from linearize.ops.local2d import local2d, local2d_output  # noqa: E402
from linearize.testing.laws import implementations_agree  # noqa: E402
from linearize.types import InputError  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
DEVICE = "cuda" if GPU else "cpu"
K, V = 6, 5


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of 4 x 8 patches that read tiles of 2 x 8: small grids then have several."""
    from linearize.ops.local2d import triton as launches

    monkeypatch.setattr(launches, "INTERPRETED", launches.Tiles((4, 8), (2, 8), 1))


def _inputs(grid, others, heads=(2, 1), batch=1):
    tokens, noise = grid[0] * grid[1] + others, torch.Generator().manual_seed(0)
    sizes = ((heads[0], K), (heads[1], K), (heads[1], V))
    return [torch.randn(batch, n, tokens, size, generator=noise, dtype=torch.float64) for n, size in sizes]


def _hidden(tokens):
    """Keys that nobody sees; of the second image also all that its first tokens could see."""
    valid = torch.rand(2, tokens, generator=torch.Generator().manual_seed(4)) > 0.3
    valid[1, : tokens // 2] = False
    return valid.to(DEVICE)


def _agree(grid, radius, prefix, suffix, dtype=torch.float32, hide=False, heads=(2, 1)):
    """Output, log-sum-exp, maximum and every gradient against the definition in float64."""
    drawn = _inputs(grid, prefix + suffix, heads, batch=2 if hide else 1)
    tensors = [x.to(dtype).double().to(DEVICE) for x in drawn]
    where = {"grid": grid, "radius": radius, "scale": 0.7, "prefix": prefix, "suffix": suffix}
    where["valid_BT"] = _hidden(tensors[0].shape[2]) if hide else None
    allowed = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 5e-2}[dtype]
    implementations_agree(
        lambda *x: local2d(*(t.to(dtype) for t in x), **where, impl="triton"),
        lambda *x: local2d(*x, **where, impl="reference"),
        tensors,
        allowed,
    )


def test_a_ragged_grid_with_text_on_both_sides():
    _agree((7, 11), 3, 2, 3)


def test_hidden_keys_and_tokens_that_see_nothing():
    _agree((5, 9), 2, 0, 0, hide=True, heads=(1, 1))


def test_float16():
    _agree((5, 9), 3, 1, 0, torch.float16, heads=(1, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "grid, radius, prefix, suffix",
    [((5, 7), 20, 1, 2), ((1, 1), 1, 0, 0), ((1, 50), 4, 2, 0), ((20, 13), 4, 20, 15), ((9, 17), 1, 0, 1)],
    ids=str,
)
@pytest.mark.parametrize("hide", [False, True], ids=["all", "hidden"])
def test_grids_and_radii(grid, radius, prefix, suffix, hide):
    _agree(grid, radius, prefix, suffix, hide=hide)


@pytest.mark.skipif(not GPU, reason="bfloat16 needs a GPU: the interpreter computes it wrongly")
@pytest.mark.parametrize("size", [48, 64, 128])
@pytest.mark.parametrize("hide", [False, True], ids=["all", "hidden"])
def test_bfloat16_on_a_gpu(hide, size, monkeypatch):
    for name in ("K", "V"):
        monkeypatch.setitem(globals(), name, size)
    _agree((40, 51), 8, 3, 77, torch.bfloat16, hide=hide, heads=(4, 2))


@pytest.mark.parametrize("radius, far", [(3, [(2, 3), (3, 2), (3, 0)]), (9, [(0, 9), (7, 6)])])
def test_only_the_circle_is_read(radius, far):
    """NaN outside the circle of a patch reaches neither its output nor its gradient."""
    q, k, v = (x.float().to(DEVICE) for x in _inputs((16, 16), 0, heads=(1, 1)))
    k, v, at = k.clone(), v.clone(), 5 * 16 + 4
    place = torch.arange(256, device=DEVICE)
    apart = (place // 16 - 5) ** 2 + (place % 16 - 4) ** 2
    assert all(bool((apart == dy * dy + dx * dx).any()) for dy, dx in far)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, at, None], k, v, (apart < radius**2)[None], scale=0.7
    )
    k[:, :, apart >= radius**2] = 1e4
    found = local2d_output(q, k, v, grid=(16, 16), radius=radius, scale=0.7, impl="triton")
    torch.testing.assert_close(found[:, :, at, None], expected)


def test_tiles_out_of_reach_are_skipped():
    """A tile of patches touches no more blocks than blocks.key_blocks counts, and those of text."""
    from linearize.ops.local2d import kernels

    seen = []
    plain = kernels._scores

    def counted(*args, **settings):
        seen.append(1)
        return plain(*args, **settings)

    kernels.forward.fn.__globals__["_scores"] = counted
    try:
        q, k, v = (x.float() for x in _inputs((16, 16), 0, heads=(1, 1)))
        local2d_output(q, k, v, grid=(16, 16), radius=2, scale=1.0, impl="triton")
    finally:
        kernels.forward.fn.__globals__["_scores"] = plain
    # 4 x 2 tiles of 4 x 8 patches read tiles of 2 x 8: their own two rows of them, one above, one below, both columns
    assert len(seen) == (3 + 4 + 4 + 3) * 2 * 2


def test_output_alone_in_the_inputs_type_and_its_gradients():
    tensors = [x.to(DEVICE) for x in _inputs((5, 9), 2)]
    where = {"grid": (5, 9), "radius": 3, "scale": 0.7, "suffix": 2}
    assert local2d_output(*(x.half() for x in tensors), **where, impl="triton").dtype == torch.float16
    implementations_agree(
        lambda *x: [local2d_output(*(t.float() for t in x), **where, impl="triton")],
        lambda *x: [local2d(*x, **where, impl="reference").output],
        tensors,
        1e-5,
    )


def test_operator_passes_opcheck_and_compiles_whole():
    from linearize.ops.local2d import triton as launches  # noqa: F401

    tensors = [x.float().to(DEVICE).requires_grad_() for x in _inputs((3, 5), 1, heads=(1, 1))]
    for whole in (True, False):
        inputs = (*tensors, None, 3, 5, 2, 0.7, 1, 0, whole)
        torch.library.opcheck(torch.ops.linearize.local2d_triton.default, inputs)

    def loss(*x):
        found = local2d(*x, grid=(3, 5), radius=2, scale=0.7, prefix=1, impl="triton")
        return found.output.square().sum() + found.lse.sum() + found.max.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(loss(*tensors), tensors)):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(GPU, reason="about machines without a GPU")
def test_a_named_implementation_never_falls_back(monkeypatch):
    q, k, v = (x.float() for x in _inputs((2, 3), 0))
    where = {"grid": (2, 3), "radius": 2, "scale": 0.7}
    for run in (local2d, local2d_output):
        with pytest.raises(InputError, match="interpreter computes bfloat16 wrongly"):
            run(q, k, v.bfloat16(), **where, impl="triton")
        wide = torch.zeros(1, 1, 6, 160)
        with pytest.raises(InputError, match="head sizes up to 128, not 160"):
            run(wide, wide, v[:, :1], **where, impl="triton")
        with pytest.raises(InputError, match="16 and 32-bit floats, not float64"):
            run(q.double(), k.double(), v.double(), **where, impl="triton")
    found, expected = (local2d_output(q, k, v, **where, impl=impl) for impl in ("auto", "torch"))
    assert torch.equal(found, expected)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InputError, match="the tensors are on cpu"):
        local2d(q, k, v, **where, impl="triton")
