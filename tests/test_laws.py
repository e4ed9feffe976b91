"""The whole table: every mixer, several settings each, every law that applies."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from linearize.mixers import base as mixers
from linearize.ops._maps import MAPS
from linearize.testing.laws import BIDIRECTIONAL, IMAGE, SHAPE, Case, call, draw, laws
from linearize.testing.tolerance import check_rounded, close
from linearize.types import InputError, SiteShape, Unsupported

pytestmark = pytest.mark.usefixtures("poison")

CAUSAL = [name for name in mixers.names() if mixers.refusal(name, "LLM") is None]
#: settings beyond the defaults, by method; a method without a row is tried with its defaults
SETTINGS = {
    "hedgehog": [
        *({"feature_map": name} for name in MAPS),
        {"features": 5},
        {"share": "kv"},
        {"tie": True},
        {"rope": "undo"},
        {"window": 4},
        {"sinks": 3},
        {"window": 4, "sinks": 2},
        {"window": 4, "sinks": 2, "combine": "lolcats"},
        {"window": 9, "combine": "lolcats", "feature_map": "exp"},
        {"window": 4, "sinks": 2, "rope": "undo", "share": "kv"},
        {"window": 1, "feature_map": "t2r"},
        {"decay": "learned"},
        {"decay": "gated", "share": "kv"},
        {"decay": "gated", "window": 4, "sinks": 2, "rope": "undo"},
    ],
    "lawcat": [
        {"half_life": 3},
        {"half_life": 3, "per": "head", "share": "kv", "tie": False},
        {"half_life": 3, "gate": "constant", "rope": "keep", "conv": 2, "features": 5},
        {"gate": "open", "conv": 1},
        {"half_life": 3, "window": 4},
        {"half_life": 3, "sinks": 2, "rank": 3},
        {"half_life": 3, "window": 4, "sinks": 2, "share": "kv", "tie": False},
        {"half_life": 3, "window": 9, "combine": "lolcats", "conv": 1, "feature_map": "exp"},
    ],
    "window": [{"window": 5, "sinks": 0}, {"window": 1, "sinks": 3}],
    "sea": [{"k": 5, "width": 8}, {"k": 6, "block": 4, "width": 16}, {"k": 9, "width": 64, "feature_map": "t2r"}],
}
#: settings on bidirectional layers
BIDIRECTIONAL_SETTINGS = {
    "hedgehog": [
        {},
        {"share": "kv", "feature_map": "t2r"},
        {"tie": True, "features": 5, "rope": "undo"},
        {"window": 4},
        {"window": 4, "combine": "lolcats", "share": "kv"},
        {"window": 1, "rope": "undo", "feature_map": "exp"},
        {"window": 50},
        {"decay": "learned", "half_lives": [1, 20]},
        {"decay": "gated", "half_lives": [1, 20], "share": "kv", "window": 4},
    ],
    "lawcat": [
        {},
        {"half_life": 3, "share": "kv", "tie": False},
        {"half_life": 3, "per": "head", "rope": "keep", "conv": 1},
        {"half_life": 3, "window": 4, "features": 5},
    ],
    "window": [{"window": 5, "sinks": 0}, {"window": 1, "sinks": 0}],
    "none": [{}],
    "softmax": [{}],
    "sea": [{"k": 5, "width": 8}, {"k": 6, "block": 4, "width": 16}],
}
#: settings on images
IMAGE_SETTINGS = {
    "clear": [{"radius": 3}, {"radius": 1}, {"radius": 2}],
    "lit": [
        {},
        {"heads": 2, "kernel": 3, "norm": "center"},
        {"heads": 4, "feature_map": "t2r", "norm": "instance"},
        {"heads": 2, "normaliser": "inline", "kernel": 1},
        {"heads": 1, "normaliser": "inline", "norm": "instance", "feature_map": "elu", "kernel": 7},
    ],
    "hedgehog": [
        {},
        {"radius": 3},
        {"radius": 2, "combine": "lolcats", "share": "kv"},
        {"radius": 1, "rope": "undo", "feature_map": "exp"},
        {"radius": 50},
    ],
    "sea": [{"k": 5, "width": 8}],
}
CASES = [Case(name, settings) for name in CAUSAL for settings in [{}, *SETTINGS.get(name, [])]]
CASES += [Case(name, settings, BIDIRECTIONAL) for name, rows in BIDIRECTIONAL_SETTINGS.items() for settings in rows]
CASES += [Case(name, settings, IMAGE) for name, rows in IMAGE_SETTINGS.items() for settings in rows]


def kind(case):
    return "causal" if case.shape.causal else "bidirectional"


@pytest.mark.parametrize(
    "case, law", [pytest.param(c, law, id=f"{c}-{law.__name__}") for c in CASES for law in laws(c.method, kind(c))]
)
def test_law(case, law):
    law(case)


def test_fresh_memory_is_poisoned():
    assert torch.empty(3).isnan().all()


def test_settings_name_only_methods():
    assert set(SETTINGS) <= set(CAUSAL)
    assert set(BIDIRECTIONAL_SETTINGS) == {n for n in mixers.names() if mixers.refusal(n, "encoder") is None}
    assert set(IMAGE_SETTINGS) >= {n for n in mixers.names() if "grid" in mixers.get(n).needs}


# ------------------------------------------------------------------------------------- published limits, identities
@pytest.mark.parametrize(
    "method, settings, shape",
    [
        ("window", {"window": 40, "sinks": 0}, SHAPE),
        ("window", {"window": 8, "sinks": 40}, SHAPE),
        ("hedgehog", {"window": 40}, SHAPE),
        ("hedgehog", {"window": 40, "combine": "lolcats"}, SHAPE),
        ("hedgehog", {"window": 8, "sinks": 40}, SHAPE),
        ("window", {"window": 40, "sinks": 0}, BIDIRECTIONAL),
        ("hedgehog", {"window": 40}, BIDIRECTIONAL),
        ("hedgehog", {"window": 40, "combine": "lolcats"}, BIDIRECTIONAL),
        ("hedgehog", {"radius": 9}, IMAGE),
        ("hedgehog", {"radius": 9, "combine": "lolcats"}, IMAGE),
    ],
)
def test_a_window_that_sees_everything_is_softmax(method, settings, shape):
    case, inputs = Case(method, settings, shape), draw(shape, 40)
    close(call(case.mixer(), inputs), call(Case("softmax", shape=shape).mixer(), inputs), 1e-9)


def test_a_circle_that_sees_everything_is_softmax():
    """And one that sees nothing but the patch itself still sees all that is no patch."""
    inputs = draw(IMAGE, 40)
    softmax = call(Case("softmax", shape=IMAGE).mixer(), inputs)
    close(call(Case("clear", {"radius": 9}, IMAGE).mixer(), inputs), softmax, 1e-9)
    grid, prefix = inputs.ctx.grid, inputs.ctx.prefix
    assert (grid, prefix, inputs.ctx.suffix) == ((5, 7), 4, 1)
    weights = Case("clear", {"radius": 1}, IMAGE).mixer().dense(inputs.q, inputs.k, inputs.v, inputs.ctx)
    assert ((weights > 0).sum(-1) == torch.tensor([40] * 4 + [6] * 35 + [40])).all()


def test_lit_starts_as_linear_attention_of_few_heads():
    """Heads regrouped by their columns; the convolution silent; with all heads kept it is plain linear attention."""
    inputs = draw(IMAGE, 30)
    mixer = mixers.build("lit", IMAGE, {"heads": 2, "eps": 1e-12}).double()
    q, k, v = (x.relu() if i < 2 else x for i, x in enumerate((inputs.q, inputs.k, inputs.v)))
    q, k, v = q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    wide = [torch.stack([torch.cat([x[:, 2 * h], x[:, 2 * h + 1]], -1) for h in range(2)], 1) for x in (q, k, v)]
    weights = wide[0] @ wide[1].mT
    expected = (weights / weights.sum(-1, keepdim=True)) @ wide[2]
    expected = torch.cat([expected[..., :6], expected[..., 6:]], 1)[:, [0, 2, 1, 3]]
    close(call(mixer, inputs), expected, 1e-9)


def test_lit_convolves_patches_alone():
    """A filter that is one at its middle adds v, at the patches and nowhere else."""
    inputs = draw(IMAGE, 30)
    mixer = mixers.build("lit", IMAGE).double()
    before = call(mixer, inputs)
    with torch.no_grad():
        mixer.filter_HVYX[:, :, 2, 2] = 1.0
    patches = slice(inputs.ctx.prefix, 30 - 1)
    added = torch.zeros_like(before)
    added[:, :, patches] = inputs.v.repeat_interleave(2, 1)[:, :, patches]
    close(call(mixer, inputs) - before, added, 1e-12)


@pytest.mark.parametrize("heads, found", [(6, 2), (12, 3), (16, 4), (3, 1), (1, 1)])
def test_lit_regroups_as_the_paper_does(heads, found):
    """S 2, B 3, L and XL 4 heads (2501.12976)."""
    shape = SiteShape(heads=heads, kv_heads=heads, key_dim=4, value_dim=4, width=4 * heads, scale=0.5, causal=False)
    assert mixers.build("lit", replace(shape, image=True)).heads == found


@pytest.mark.parametrize("method", mixers.names())
def test_what_the_table_says_is_what_build_does(method):
    shapes = {"LLM": SHAPE, "encoder": BIDIRECTIONAL, "ViT": IMAGE, "joint DiT": replace(IMAGE, joint=True)}
    for where, shape in shapes.items():
        assert mixers.home(shape) == where
        settings = {"window": 3, "sinks": 0} if method == "window" else {}
        if (why := mixers.refusal(method, where)) is None:
            mixers.build(method, shape, settings)
            continue
        with pytest.raises(Unsupported) as caught:
            mixers.build(method, shape, settings)
        assert str(caught.value).endswith(why)


def test_methods_of_images_refuse_what_is_none():
    inputs = draw(IMAGE, 30)
    for method in ("lit", "clear"):
        with pytest.raises(Unsupported, match=f"method '{method}' does not fit encoder attention"):
            mixers.build(method, BIDIRECTIONAL)
        with pytest.raises(Unsupported, match=f"method '{method}' does not fit LLM attention"):
            mixers.build(method, SHAPE)
        mixer = Case(method, shape=IMAGE).mixer()
        with pytest.raises(InputError, match="no grid of rows and columns"):
            call(mixer, replace(inputs, ctx=replace(inputs.ctx, grid=None)))
        with pytest.raises(InputError, match="one image per row"):
            call(mixer, replace(inputs, ctx=replace(inputs.ctx, segments_BT=torch.zeros(2, 30, dtype=torch.long))))
    with pytest.raises(InputError, match="heads: one of 1, 2, 4"):
        mixers.build("lit", IMAGE, {"heads": 3})
    with pytest.raises(InputError, match="kernel: 4 has no middle; use 5"):
        mixers.build("lit", IMAGE, {"kernel": 4})


def test_hedgehog_that_hardly_fades_is_hedgehog():
    inputs = draw(SHAPE, 40)
    faded = Case("hedgehog", {"decay": "gated", "half_lives": [1e12, 1e13]}).mixer()
    plain = Case("hedgehog").mixer()
    faded.load_state_dict(plain.state_dict(), strict=False)
    faded.gate_HKF.data.zero_()
    close(call(faded, inputs), call(plain, inputs), 1e-9)


def test_none_is_a_window_of_one():
    inputs = draw(SHAPE, 20)
    close(call(Case("none").mixer(), inputs), call(Case("window", {"window": 1, "sinks": 0}).mixer(), inputs), 1e-12)


def test_tied_maps_are_one_map():
    mixer = mixers.build("hedgehog", SHAPE, {"tie": True})
    assert len(list(mixer.parameters())) == 1


def test_sinks_are_kept_out_of_the_state():
    """With the sinks' values moved, only softmax over them may change: the sums do not hold them."""
    case, inputs = Case("hedgehog", {"window": 4, "sinks": 3}), draw(SHAPE, 30)
    mixer = case.recurrent()
    empty = mixer.empty_state(2, inputs.q.device, inputs.k.dtype)
    _, state = mixer.chunked(inputs.q, inputs.k, inputs.v, inputs.ctx, empty)
    inputs.v[:, :, :3] += 1.0
    _, moved = mixer.chunked(inputs.q, inputs.k, inputs.v, inputs.ctx, empty)
    assert torch.equal(state[0], moved[0])


def test_hedgehog_starts_at_the_papers_map():
    """Identity W, no bias: phi(x) = [softmax(x), softmax(-x)]."""
    mixer = mixers.build("hedgehog", SHAPE)
    x = torch.randn(2, 4, 5, 8)
    close(mixer.map_q(x), torch.cat([x.softmax(-1), (-x).softmax(-1)], -1), 1e-6)


# ----------------------------------------------------------------------------------------------- a long decode
@pytest.mark.parametrize("settings, alone", [({}, 20_000), ({"window": 16, "sinks": 2}, 500)], ids=["pure", "window"])
def test_twenty_thousand_tokens_from_one_state(settings, alone):
    """Size and type of the state never change, and its value is that of one float64 pass over everything. The last
    `alone` tokens come one by one, those before in calls of 50."""
    tokens = 20_000
    shape = SiteShape(heads=2, kv_heads=1, key_dim=8, value_dim=8, width=16, scale=8**-0.5)
    case = Case("hedgehog", settings, shape)
    mixer, exact = case.recurrent(torch.float32), case.recurrent()
    inputs = draw(shape, tokens, batch=1).to(torch.float32)
    state = mixer.empty_state(1, torch.device("cpu"), torch.float32)
    described = [(s.shape, s.dtype) for s in state]
    borders = [*range(0, tokens - alone, 50), *range(tokens - alone, tokens + 1)]
    outs = []
    with torch.inference_mode():
        for start, stop in itertools.pairwise(borders):
            q, k, v = (x[:, :, start:stop] for x in (inputs.q, inputs.k, inputs.v))
            out, state = (mixer.step if stop - start == 1 else mixer.chunked)(q, k, v, inputs.ctx, state)
            outs.append(out)
            if start % 1000 == 0:
                assert [(s.shape, s.dtype) for s in state] == described
        wide = inputs.to(torch.float64)
        first = exact.empty_state(1, torch.device("cpu"), torch.float64)
        expected, final = exact.chunked(wide.q, wide.k, wide.v, wide.ctx, first)
    assert [(s.shape, s.dtype) for s in state] == described
    assert all(s.dtype == torch.float32 for s in state if s.is_floating_point())
    assert sum(s.numel() * s.itemsize for s in state) == sum(
        s.nbytes() * (2 if s.name.startswith("kept_") else 1) for s in mixer.state_spec()
    )  # the specification counts kept keys and values in bfloat16
    # n roundings of a running sum are a random walk: sqrt(n) half units in the last place of the sum.
    walk = 2 * math.sqrt(tokens) * torch.finfo(torch.float32).eps / 2
    for found, value in zip(state, final):
        size = value.abs().max().clamp(min=1)
        close(found / size, value / size, walk, "final state")
    close(torch.cat(outs, 2), expected, 10 * walk, "outputs")


def test_the_tolerance_notices_a_normaliser_in_half_precision():
    """What the rounding law is for: the same sums kept in bfloat16 fail it."""
    shape = SiteShape(heads=1, kv_heads=1, key_dim=8, value_dim=6, width=8, scale=8**-0.5)
    inputs = draw(shape, 8192, batch=1)

    def run(q, k, v):
        phi_k = k.exp()
        numerator, mass = (phi_k * v[..., :1]).cumsum(2), phi_k.cumsum(2)
        if q.dtype == torch.bfloat16:  # cumsum keeps a wide accumulator inside: take bfloat16 steps
            mass = torch.stack(list(_running(phi_k)), 2)
        return numerator / mass

    with pytest.raises(AssertionError, match="rounding alone"):
        check_rounded(run, (inputs.q, inputs.k, inputs.v), torch.bfloat16)


def _running(x):
    total = torch.zeros_like(x[:, :, 0])
    for t in range(x.shape[2]):
        total = total + x[:, :, t]
        yield total


# -------------------------------------------------------------------------------------------------------- refusals
def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'hedgehog'"):
        mixers.get("hedghog")
    with pytest.raises(InputError, match="did you mean 'window'"):
        mixers.configure("hedgehog", {"windov": 3})
    with pytest.raises(InputError, match="feature_map"):
        mixers.configure("hedgehog", {"feature_map": "cosine"})
    with pytest.raises(InputError, match="half_lives"):
        mixers.configure("hedgehog", {"decay": "learned", "half_lives": [0, 10]})


def test_a_causal_method_refuses_an_encoder(monkeypatch):
    monkeypatch.setattr(mixers.get("hedgehog"), "kinds", frozenset({"causal"}))
    with pytest.raises(Unsupported, match="does not fit encoder attention: it replaces causal attention"):
        mixers.build("hedgehog", BIDIRECTIONAL)


@pytest.mark.parametrize("method", ["hedgehog", "window"])
def test_what_a_local_branch_refuses(method):
    with pytest.raises(Unsupported, match="sinks: 0"):
        mixers.build(method, BIDIRECTIONAL, {"window": 4, "sinks": 2})
    with pytest.raises(Unsupported, match="window: 0" if method == "hedgehog" else "its like is the method clear"):
        mixers.build(method, IMAGE, {"window": 4, "sinks": 0})


def test_a_circle_is_of_patches():
    for shape in (SHAPE, BIDIRECTIONAL):
        with pytest.raises(Unsupported, match="radius: 0"):
            mixers.build("hedgehog", shape, {"radius": 3})
    with pytest.raises((InputError, Unsupported), match="window: 0"):
        mixers.build("hedgehog", IMAGE, {"radius": 3, "window": 2})


def test_a_tied_map_cannot_be_shared_by_groups():
    with pytest.raises((InputError, Unsupported), match="share: query"):
        mixers.build("hedgehog", SHAPE, {"tie": True, "share": "kv"})
