"""SEA: what is chosen, what follows when everything is, and decoding; the op of its blocks."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import linearize
from linearize.evaluate.diagnostics import dense_maps
from linearize.mixers import sea as sea_file
from linearize.ops import topk as topk_op
from linearize.ops.topk import block_softmax
from linearize.ops.topk.pixels import first_key, keep_best, keys_of, pixel_of, shares
from linearize.ops.topk.reference import weights_over
from linearize.plan import TransferPlan
from linearize.report.maps import write as write_maps
from linearize.seams.dit_inputs import small_inputs
from linearize.stages.transfer import relative_error, site_loss, teacher_map
from linearize.surgery.attach import Surgery, attach
from linearize.testing.laws import (
    BIDIRECTIONAL,
    IMAGE,
    SHAPE,
    Case,
    at_real,
    call,
    contexts,
    draw,
    gradients,
    implementations_agree,
)
from linearize.testing.pico import DIFFUSION, pico, pico_diffusion
from linearize.testing.tolerance import close
from linearize.types import InputError, Slot

pytestmark = pytest.mark.usefixtures("poison")

PIXELS, BLOCKS = {"k": 5, "width": 16}, {"k": 6, "block": 4, "width": 16}


def _normal(*sizes, seed=0):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _open(mixer):
    """The same mixer with both gates at 1."""
    with torch.no_grad():
        mixer.estimator.gate_HE2.zero_()
        mixer.estimator.gate_bias_H2.fill_(50.0)
    return mixer


def _chosen(mixer, inputs):
    """(what is kept, which keys each query and head reads, lengths) of a call without padding."""
    made, *_ = mixer._call(inputs.q, inputs.k, inputs.v, inputs.ctx, ())
    ranks, length = torch.arange(inputs.q.shape[2])[None, None], made.span.length[..., None]
    kept = made.kept if made.by_query else made.kept[:, :, torch.arange(inputs.q.shape[2]) // mixer.config.block]
    return made.kept, mixer._seen(kept, ranks, length) & inputs.ctx.visible(inputs.q)[:, None], made.span.length[0]


# ----------------------------------------------------------------------------------------------------------- pixels
@pytest.mark.parametrize("width", [4, 7, 16])
def test_pixels_cover_every_key_once(width):
    for length in (1, 2, 5, 7, 16, 40):
        keys, L = torch.arange(length), torch.tensor(length)
        found = pixel_of(keys, L, width)
        expected = ((keys + 0.5) / length * width - 1e-4).floor().long()
        assert torch.equal(found, expected)
        count = keys_of(L, width)
        assert torch.equal(found.bincount(minlength=width), count) and int((count > 0).sum()) == min(width, length)
        first = first_key(torch.arange(width), L, width)
        assert all(found[f] == p for p, (f, n) in enumerate(zip(first, count)) if n)


def test_the_best_are_kept_row_by_row():
    kept = keep_best(torch.tensor([[0.1, 0.4, 0.2], [0.5, 0.3, 0.9]]), torch.tensor([1, 2]))
    assert kept.tolist() == [[False, True, False], [True, False, True]]


def test_shares_of_a_smooth_estimate_are_its_integral():
    width, length = 64, torch.tensor([[128]])
    middle = (torch.arange(width, dtype=torch.float64) + 0.5) / width
    borders = torch.arange(0, 129, 8, dtype=torch.float64)
    found = shares((2 * middle / width)[None, None], length, borders)[0, 0]  # density 2 x on [0, 1]
    close(found, (borders / 128).square().diff(), 1e-12)


# --------------------------------------------------------------------------------------------------------------- op
@pytest.mark.parametrize("tokens", [1, 4, 5, 23])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_equal_reference(tokens, causal, padded):
    tensors = [_normal(2, 4, tokens, 5), _normal(2, 2, tokens, 5, seed=1), _normal(2, 2, tokens, 3, seed=2)]
    blocks = -(-tokens // 4)
    kept = _normal(2, 4, blocks, blocks, seed=3) > 0
    kept = kept.tril() if causal else kept
    valid = torch.arange(tokens) < torch.tensor([[tokens], [max(1, tokens - 3)]]) if padded else None

    def run(impl):
        settings = {"block": 4, "scale": 0.7, "causal": causal, "valid_BT": valid, "impl": impl}
        return lambda q, k, v: (block_softmax(q, k, v, kept, **settings),)

    assert [i.name for i in topk_op.IMPLEMENTATIONS if i.device is None] == ["torch", "reference"]
    implementations_agree(run("torch"), run("reference"), tensors)


def test_blocks_reference_gradcheck():
    tensors = [_normal(1, 2, 7, 3), _normal(1, 1, 7, 3, seed=1), _normal(1, 1, 7, 2, seed=2)]
    kept = torch.tensor([[[[1, 0, 0], [1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 0], [1, 0, 1]]]]).bool()
    assert torch.autograd.gradcheck(
        lambda q, k, v: block_softmax(q, k, v, kept, block=3, scale=0.5, causal=True, impl="reference"),
        [t.requires_grad_() for t in tensors],
    )


# ----------------------------------------------------------------------------------------------------------- choice
@pytest.mark.parametrize("shape", [SHAPE, BIDIRECTIONAL])
@pytest.mark.parametrize("settings", [{"k": 4, "width": 16}, {"k": 7, "width": 64}])
def test_each_query_keeps_its_pixels_jointly_over_heads(settings, shape):
    """Exactly z of them, and as many keys as they are wide."""
    mixer, inputs = Case("sea", settings, shape).mixer(), draw(shape, 40)
    kept, seen, length = _chosen(mixer, inputs)
    H, K, k = shape.heads, settings["width"], settings["k"]
    pixels = length.clamp(max=K)
    z = (H * k * pixels / length + 0.5).floor().long().clamp(min=1)
    z = torch.minimum(z, H * pixels)
    assert torch.equal(kept.sum((1, 3)), z.expand(2, -1))
    widths = keys_of(length, K)
    assert torch.equal(seen.sum(-1), (kept * widths).sum(-1))
    late = seen.sum((1, 3))[:, K:].double().mean() / H if K < 40 else None
    assert late is None or abs(float(late) / k - 1) < 0.3
    by_head = kept.sum(-1)
    assert bool((by_head.amax(1) > by_head.amin(1)).any()), "heads do not share their budget"


def test_blocks_hold_as_many_pairs_as_pixels():
    inputs = draw(SHAPE, 256)
    pairs = []
    for settings in ({"k": 64, "width": 64}, {"k": 64, "width": 64, "block": 8}, {"k": 64, "width": 64, "block": 16}):
        pairs.append(int(_chosen(Case("sea", settings).mixer(), inputs)[1].sum()))
    assert all(abs(n / pairs[0] - 1) < 0.03 for n in pairs[1:]), pairs


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("block", [0, 4])
@pytest.mark.parametrize("shape", [SHAPE, BIDIRECTIONAL, IMAGE, replace(IMAGE, joint=True)], ids=str)
def test_everything_kept_and_gates_open_is_softmax(shape, block, width):
    mixer = _open(Case("sea", {"k": 41, "width": width, "block": block}, shape).mixer())
    for what, inputs in contexts(draw(shape, 41)).items():
        expected = call(Case("softmax", shape=shape).mixer(), inputs)
        close(at_real(call(mixer, inputs), inputs), at_real(expected, inputs), 1e-9, what)


def test_joint_text_stays_softmax():
    shape = replace(IMAGE, joint=True)
    mixer, inputs = Case("sea", {"k": 5, "width": 8}, shape).mixer(), draw(shape, 41)
    out, exact = call(mixer, inputs), call(Case("softmax", shape=shape).mixer(), inputs)
    prefix, suffix = inputs.ctx.prefix, inputs.ctx.suffix
    close(out[:, :, :prefix], exact[:, :, :prefix], 1e-9)
    close(out[:, :, 41 - suffix :], exact[:, :, 41 - suffix :], 1e-9)
    weights = mixer.dense(inputs.q, inputs.k, inputs.v, inputs.ctx)
    close(weights @ inputs.v.repeat_interleave(2, 1), out, 1e-9)
    assert not torch.allclose(out[:, :, prefix:-suffix], exact[:, :, prefix:-suffix], atol=1e-2)


@pytest.mark.parametrize("settings", [PIXELS, BLOCKS])
def test_the_causal_estimate_never_reads_the_future(settings):
    mixer, inputs = Case("sea", settings).mixer(), draw(SHAPE, 30)

    def look(inputs):
        made, *_ = mixer._call(inputs.q, inputs.k, inputs.v, inputs.ctx, ())
        return made.estimate.log.exp(), made.estimate.gates, _chosen(mixer, inputs)[1]

    before = look(inputs)
    for t in (1, 8, 21):
        q, k, v = (x.clone() for x in (inputs.q, inputs.k, inputs.v))
        for x in (q, k, v):
            x[:, :, t] += 2.0
        after = look(replace(inputs, q=q, k=k, v=v))
        assert all(torch.equal(a[:, :, :t], b[:, :, :t]) for a, b in zip(after, before))
        assert not torch.equal(after[0][:, :, t], before[0][:, :, t])


def test_only_so_many_rows_are_held(monkeypatch):
    """In pieces of rows: the same, with gradients; and no larger piece is ever weighed."""
    mixer, inputs = Case("sea", PIXELS).mixer(), draw(SHAPE, 50).leaves()
    wrt = [*inputs.tensors, *mixer.parameters()]
    whole = call(mixer, inputs)
    expected = gradients(whole, wrt)
    sizes = []

    def weigh(q, k, scale, seen):
        sizes.append(q.shape[2])
        return weights_over(q, k, scale, seen)

    monkeypatch.setattr(sea_file, "ROWS", 16)
    monkeypatch.setattr(sea_file, "weights_over", weigh)
    out = call(mixer, inputs)
    close(out, whole, 1e-12)
    for g, e in zip(gradients(out, wrt), expected):
        close(g, e, 1e-9)
    assert max(sizes) == 16


# --------------------------------------------------------------------------------------------------------- decoding
@pytest.mark.parametrize("settings", [PIXELS, BLOCKS, {"k": 9, "block": 8, "width": 64}])
def test_decoding_equals_prefill(settings):
    """By running sums and a window of rows, whatever the calls are cut into, beside a left-padded row."""
    mixer = Case("sea", settings).mixer()
    inputs = contexts(draw(SHAPE, 60))["left padding"]
    with torch.no_grad():
        expected = call(mixer, inputs)
        for borders in (range(61), (0, 7, 8, 30, 31, 60), (0, 3, *range(30, 61)), (0, 59, 60)):
            slot = Slot()
            outs = [call(mixer, inputs.take(slice(a, b)), slot) for a, b in itertools.pairwise(borders)]
            close(at_real(torch.cat(outs, 2), inputs), at_real(expected, inputs), 1e-9, str(borders))
            assert slot.state is not None
            for tensor, spec in zip(slot.state, mixer.state_spec(), strict=True):
                assert all(n in (-1, m) for n, m in zip(spec.shape, tensor.shape, strict=True)), spec.name


def test_packed_documents_leave_the_last_ones_state():
    mixer, inputs = Case("sea", BLOCKS).mixer(), contexts(draw(SHAPE, 40))["packed"]
    slot, alone = Slot(), Slot()
    with torch.no_grad():
        call(mixer, inputs, slot)
        last = inputs.take(slice(34, 40), slice(0, 1))
        call(mixer, replace(last, ctx=replace(last.ctx, segments_BT=None)), alone)
    assert slot.state is not None and alone.state is not None
    assert slot.state[2][0] == 6
    for found, expected in zip(slot.state[2:], alone.state[2:]):
        close(found[:1], expected, 1e-9)
    with pytest.raises(InputError, match="cannot go on from one state"):
        call(mixer, inputs, slot)


def test_a_whole_model(poison):
    """With everything kept it is the teacher; and `generate` says what whole prompts say."""
    model = pico("llama").eval()
    ids = torch.randint(1, 90, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
        surgery = attach(model, None, "sea", {"k": 64, "width": 16})
        for mixer in surgery.mixers.values():
            _open(mixer)
        close(model(ids).logits, expected, 1e-5)
        surgery.adjust({"k": 3})
        assert surgery.config.k == 3 and Surgery.of(model).config.k == 3
        few = model(ids).logits
        assert not torch.allclose(few, expected, atol=1e-3)
        with pytest.raises(InputError, match="width cannot change after training: only block, k can"):
            surgery.adjust({"width": 8})
        with pytest.raises(InputError, match="must not exceed k"):
            surgery.adjust({"block": 8})
        assert surgery.config.block == 0
        out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        again = ids
        for _ in range(6):
            again = torch.cat([again, model(again, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(out, again)


@pytest.mark.parametrize("block", [0, 8])
@pytest.mark.parametrize("family", ["bert", "vit", "pixart", "flux"])
def test_everything_kept_is_the_teacher_wherever_attention_is(family, block):
    """Encoders (with padding), vision transformers, and the image rows of diffusion transformers."""
    noise = torch.Generator().manual_seed(0)
    if family in DIFFUSION:
        model = pico_diffusion(family)
        inputs = {**small_inputs(model, (3, 5), 2, 5), "return_dict": False}
    elif family == "vit":
        model = pico("vit")
        size = model.config.image_size
        inputs = {"pixel_values": torch.randn(2, model.config.num_channels, size, size, generator=noise)}
    else:
        model = pico("bert")
        mask = (torch.arange(20) < torch.tensor([[20], [13]])).long()
        inputs = {"input_ids": torch.randint(1, 90, (2, 20), generator=noise), "attention_mask": mask}

    def run():
        with torch.no_grad():
            out = model(**inputs)[0]
        return out[inputs["attention_mask"].bool()] if family == "bert" else out

    expected = run()
    surgery = attach(model, None, "sea", {"k": 200, "width": 16, "block": block})
    for mixer in surgery.mixers.values():
        _open(mixer)
    close(run(), expected, 1e-4)
    surgery.adjust({"k": 3, "block": 0})
    assert not torch.allclose(run(), expected, atol=1e-3)


def test_a_prompt_is_kept_and_continued(tmp_path):
    """A state that grows goes into the file like one that does not."""
    model = pico("llama").eval()
    attach(model, None, "sea", {"k": 6, "width": 16, "block": 4})
    ids = torch.randint(1, 90, (2, 14), generator=torch.Generator().manual_seed(1))
    linearize.prefix(model, ids[:, :9], file=tmp_path / "prompt")
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 9:]
        for _ in range(2):
            cache = linearize.restore(model, tmp_path / "prompt")
            close(model(ids[:, 9:], past_key_values=cache).logits, expected, 1e-5)
    surgery = Surgery.of(model)
    assert surgery is not None
    surgery.adjust({"block": 0})
    with pytest.raises(InputError, match="made by another model"):
        linearize.restore(model, tmp_path / "prompt")


# ----------------------------------------------------------------------------------------------------------- losses
def test_own_losses_are_those_on_pixels_and_on_the_whole_map():
    """KL + squared error on both, written out on T x T: the same gradients; any number of rows at once."""
    mixer, inputs = Case("sea", {"k": 5, "width": 8}).mixer(), draw(SHAPE, 30)
    q, k, v, ctx = inputs.q, inputs.k, inputs.v, inputs.ctx
    target = teacher_map(q, k, ctx, None)
    parameters = [p for n, p in mixer.named_parameters() if "gate" not in n]
    results = []
    for chunk in (30, 7):
        out, loss = mixer.taught(q, k, v, ctx, target, chunk, output=False)
        assert out is None
        results.append([loss, *torch.autograd.grad(loss, parameters)])
    for a, b in zip(*results):
        close(a, b, 1e-6)
    maps = mixer.maps(q, k, v, ctx)
    guess, spread = maps["estimate"], maps["interpolated"]
    full = target(slice(None)).double()
    pixel = pixel_of(torch.arange(30), torch.arange(1, 31)[:, None], 8).clamp(0, 7)
    aim = torch.zeros_like(guess).scatter_add(3, pixel.expand_as(full), full)
    literal = sum(
        (torch.xlogy(p, p) - torch.xlogy(p, e.clamp(min=1e-30)) + (p - e) ** 2).sum()
        for p, e in ((aim, guess), (full, spread))
    )
    halved = (torch.xlogy(full, full) - torch.xlogy(full, spread.clamp(min=1e-30))).sum()  # one KL of the two
    expected = torch.autograd.grad(literal - halved, parameters)
    for g, e in zip(results[0][1:], expected):
        close(g, e, 1e-6)


def test_transfer_weighs_what_a_method_brings():
    mixer, inputs = Case("sea", PIXELS).mixer(torch.float32), draw(SHAPE, 20, dtype=torch.float32)
    teacher = call(Case("softmax").mixer(torch.float32), inputs)

    def loss(**weights):
        plan = TransferPlan(kind="transfer", tokens=1, batch=1, lr=1, **weights)
        return site_loss(mixer, inputs.q, inputs.k, inputs.v, inputs.ctx, teacher, plan, 0)

    output, own = loss(own=0), loss(output=0)
    close(output, relative_error(call(mixer, inputs), teacher, inputs.ctx), 1e-6)
    close(loss(), output + own, 1e-6)
    close(loss(output=2, own=3), 2 * output + 3 * own, 1e-6)
    gates = [p for n, p in mixer.named_parameters() if "gate" in n]
    assert all(g is None for g in torch.autograd.grad(own, gates, allow_unused=True, retain_graph=True))
    rest = [p for n, p in mixer.named_parameters() if "gate" not in n]
    assert all(g is None for g in torch.autograd.grad(output, rest, allow_unused=True))


# ------------------------------------------------------------------------------------------------------------- maps
def test_maps_are_written_beside_softmax(tmp_path):
    """`inspect --attention`: the estimate, its interpolation, the student's and the teacher's weights of every head."""
    surgery = attach(pico("llama").eval(), None, "sea", {"k": 4, "width": 16})
    ids = torch.randint(1, 90, (1, 24), generator=torch.Generator().manual_seed(2))
    found = dense_maps(surgery, {"input_ids": ids}, {0: [0, 3]})
    assert set(found) == {(0, 0), (0, 3)}
    for sides in found.values():
        assert {name: tuple(x.shape) for name, x in sides.items()} == {
            **dict.fromkeys(("teacher", "student", "interpolated"), (24, 24)),
            "estimate": (24, 16),
        }
        for name in ("teacher", "estimate", "interpolated"):
            close(sides[name].sum(-1), torch.ones(24), 1e-5, name)
        assert float(sides["interpolated"].triu(1).abs().max()) == 0
    assert write_maps(found, tmp_path / "maps") == ["maps.safetensors", "layer-00.png"]
    stored = load_file(tmp_path / "maps" / "maps.safetensors")
    assert torch.equal(stored["layer.0.head.3.interpolated"], found[0, 3]["interpolated"])
    assert (tmp_path / "maps" / "layer-00.png").read_bytes()[:4] == b"\x89PNG"
