"""What LAWCAT is, beyond the laws of every mixer: its limits and identities, its start, its state."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import linearize
from linearize.mixers import base as mixers
from linearize.stages.export import export
from linearize.surgery.port import CHILD
from linearize.testing.laws import BIDIRECTIONAL, SHAPE, Case, _advance, _same_state, call, draw
from linearize.testing.pico import pico
from linearize.testing.tolerance import close
from linearize.types import Unsupported

pytestmark = pytest.mark.usefixtures("poison")

OPEN = {"gate": "open"}
#: hedgehog as LAWCAT without convolutions and gates is
PLAIN = {"tie": True, "rope": "undo"}


def built(shape=SHAPE, method="lawcat", **settings):
    """At its start, in float64."""
    return mixers.build(method, shape, settings).double()


# ------------------------------------------------------------------------------------------------------- identities
@pytest.mark.parametrize("shape", [SHAPE, BIDIRECTIONAL], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("beside", [{}, {"window": 5}], ids=["linear", "window"])
@pytest.mark.parametrize("gates", [OPEN, {"half_life": 1e12}, {"conv": 1, **OPEN}], ids=str)
def test_open_gates_and_delta_convolutions_are_plain_linear_attention(gates, beside, shape):
    inputs = draw(shape, 40)
    expected = call(built(shape, "hedgehog", **PLAIN, **beside), inputs)
    close(call(built(shape, **gates, **beside), inputs), expected, 1e-9)


@pytest.mark.parametrize("shape", [SHAPE, BIDIRECTIONAL], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("per", ["feature", "head"])
def test_with_one_constant_gate_the_numerator_is_retention(per, shape):
    """sum over s of 2^(-|t - s| / half-life) (phi_q . phi_k) v (RetNet, 2307.08621, equation 5), and the normaliser
    the same with ones for values."""
    inputs = draw(shape, 30)
    mixer = built(shape, gate="constant", per=per, half_life=7, conv=1)
    parts, _ = mixer.both(inputs.q, inputs.k, inputs.v, inputs.ctx)
    column = torch.arange(30)
    fade = 2.0 ** (-(column[:, None] - column).abs().double() / 7)
    fade = fade.tril() if shape.causal else fade
    rotary = inputs.ctx.rotary
    q, k = rotary.undo(inputs.q), rotary.undo(inputs.k).repeat_interleave(2, 1)
    weights = (mixer.map_q(q) @ mixer.map_q(k).mT) * fade
    close(parts.mass, weights.sum(-1), 1e-6)  # the gate's start is a float32
    close(parts.far * parts.mass[..., None], weights @ inputs.v.repeat_interleave(2, 1), 1e-6)


def test_a_long_text_is_read_in_pieces_where_no_gradients_are_wanted(monkeypatch):
    inputs, mixer = draw(SHAPE, 50), built()
    whole, state = mixer.chunked(
        inputs.q, inputs.k, inputs.v, inputs.ctx, mixer.empty_state(2, torch.device("cpu"), torch.float64)
    )
    monkeypatch.setattr("linearize.mixers.lawcat._PIECE", 16)
    with torch.no_grad():
        pieces, after = mixer.chunked(
            inputs.q, inputs.k, inputs.v, inputs.ctx, mixer.empty_state(2, torch.device("cpu"), torch.float64)
        )
    close(pieces, whole, 1e-9)
    _same_state(after, state, "in pieces")


def test_a_convolution_reads_the_tokens_before():
    """Taps of 1 at the oldest place are a shift by three tokens."""
    inputs = draw(SHAPE, 20)
    mixer, plain = built(**OPEN), built(**OPEN, conv=1)
    with torch.no_grad():
        for conv in (mixer.conv_q_HKC, mixer.conv_k_JKC):
            conv.copy_(torch.tensor([1.0, 0, 0, 0]).expand_as(conv))
    q, k = inputs.ctx.rotary.undo(inputs.q), inputs.ctx.rotary.undo(inputs.k)
    late = [torch.nn.functional.pad(x, (0, 0, 3, 0))[:, :, :20] for x in (q, k)]
    unrotated = replace(inputs.ctx, rotary=None)
    expected = plain(*late, inputs.v, unrotated)
    close(call(mixer, inputs), expected)


@pytest.mark.parametrize("settings", [{}, {"window": 4, "sinks": 2}, {"window": 1, "conv": 7}], ids=str)
@pytest.mark.parametrize("size", range(1, 8))
def test_calls_of_every_small_size(size, settings):
    """Borders of calls within the convolution's reach and beyond: outputs and every tensor of the state."""
    mixer = Case("lawcat", {"half_life": 3, **settings}).recurrent()
    inputs = draw(SHAPE, 23)
    whole, final = _advance(mixer, inputs, (23,))
    out, state = _advance(mixer, inputs, (size,))
    close(out, whole)
    _same_state(state, final, f"calls of {size}")


def test_without_convolutions_both_directions_are_alike():
    inputs = draw(BIDIRECTIONAL, 20)
    mixer = Case("lawcat", {"half_life": 3, "conv": 1}, BIDIRECTIONAL).mixer()
    inputs = replace(inputs, ctx=replace(inputs.ctx, rotary=None))
    turned = inputs.having([x.flip(-2) for x in inputs.tensors])
    close(call(mixer, turned), call(mixer, inputs).flip(2))


# ------------------------------------------------------------------------------------------------ start and state
@pytest.mark.parametrize("half_life", [1, 16, 2048, 1e6])
@pytest.mark.parametrize("settings", [{}, {"per": "head", "share": "kv", "tie": False}], ids=str)
def test_gates_start_at_their_half_life(settings, half_life):
    """To the digit where the layer's input is 0, about so where it is not."""
    mixer = built(half_life=half_life, **settings)
    inputs = draw(SHAPE, 5)
    for scale, tolerance in ((0, 1e-6), (1, 0.05)):
        ctx = replace(inputs.ctx, hidden_BTD=inputs.ctx.hidden_BTD * scale)
        gates = mixer.log_gates(ctx, inputs.q)
        close((gates * half_life).exp(), torch.full_like(gates, 0.5), tolerance)
    if half_life == 16:  # the paper's start: a bias of 0
        close(mixer.gate_bias_JF, torch.zeros_like(mixer.gate_bias_JF))


@pytest.mark.parametrize("per", ["feature", "head"])
def test_gates_can_start_at_a_span_of_half_lives(per):
    mixer = built(half_life=(4, 256), per=per, gate="constant", conv=1)
    gates = mixer.log_gates(draw(SHAPE, 5).ctx, torch.zeros(1, 4, 5, 8, dtype=torch.float64))[0, :, 0]
    lives = -math.log(2) / (gates[0, :8] if per == "feature" else gates[:, 0])
    close(lives, 2.0 ** torch.linspace(2, 8, len(lives)), 1e-5)
    if per == "feature":  # both halves of a split map, in each head
        close(gates, gates[0, :8].repeat(4, 2))


def test_what_the_convolutions_keep_is_not_rotated():
    inputs = draw(SHAPE, 9)
    mixer = Case("lawcat").recurrent()
    _, state = _advance(mixer, inputs, (9,))
    named = dict(zip([s.name for s in mixer.state_spec()], state))
    close(named["kept_raw_keys"], inputs.ctx.rotary.undo(inputs.k)[:, :, -3:])
    close(named["kept_raw_queries"], inputs.ctx.rotary.undo(inputs.q)[:, :, -3:])


def test_gates_depend_on_the_hidden_states():
    inputs = draw(SHAPE, 20)
    mixer = Case("lawcat", {"half_life": 3}).mixer()
    other = replace(inputs, ctx=replace(inputs.ctx, hidden_BTD=inputs.ctx.hidden_BTD + 1))
    assert not torch.allclose(call(mixer, other), call(mixer, inputs))
    constant = Case("lawcat", {"half_life": 3, "gate": "constant"}).mixer()
    assert torch.equal(call(constant, other), call(constant, inputs))


def test_an_unknown_input_is_refused():
    inputs = draw(SHAPE, 5)
    blind = replace(inputs, ctx=replace(inputs.ctx, hidden_BTD=None))
    with pytest.raises(Unsupported, match="gate: constant"):
        call(built(), blind)
    call(built(gate="constant"), blind)


def test_the_teachers_weights_are_never_touched():
    model = pico("llama")
    before = {name: w.clone() for name, w in model.state_dict().items()}
    linearize.attach(model, None, "lawcat")
    after = {name: w for name, w in model.state_dict().items() if CHILD not in name}
    assert after.keys() == before.keys() and all(torch.equal(w, before[name]) for name, w in after.items())


def test_two_conversions_start_alike():
    first, second = (pico("llama") for _ in range(2))
    linearize.attach(first, None, "lawcat")
    torch.manual_seed(123)
    linearize.attach(second, None, "lawcat")
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


@pytest.mark.slow
@pytest.mark.parametrize("settings, every", [({}, 1), ({"window": 8, "sinks": 2, "per": "head"}, 2)], ids=str)
def test_torch_export(settings, every, tmp_path):
    model = pico("llama", num_hidden_layers=2, max_position_embeddings=256)
    linearize.attach(model, linearize.find(model)[::every], "lawcat", {"half_life": 8, **settings})
    export(model, tmp_path / "x", "torch.export")
    program = torch.export.load(tmp_path / "x" / "model.pt2").module()
    ids = torch.randint(3, 97, (3, 100))
    torch.testing.assert_close(program(ids, torch.ones_like(ids)), model(ids).logits, rtol=0, atol=1e-5)
