"""One table (pico.DIFFUSION), one battery: diffusion transformers and the UNet; their processors stay untouched."""

from __future__ import annotations

import copy

import pytest
import torch

import linearize
from linearize.seams import dit
from linearize.seams.dit_inputs import small_inputs
from linearize.surgery.port import CHILD
from linearize.testing.pico import DIFFUSION, pico_diffusion
from linearize.types import InputError, Unsupported

#: its forward unpatchifies to a square
SQUARE = {"dit"}
VIDEO = {"cogvideox", "wan", "ltx"}
#: text before or behind the image, in one sequence
FIRST = {"flux", "flux2", "chroma", "auraflow", "qwenimage", "cogvideox", "lumina2"}
LAST = {"sd3", "zimage"}
TEXT = 5

every = pytest.mark.parametrize("family", list(DIFFUSION))
joint = pytest.mark.parametrize("family", sorted(FIRST | LAST))


def grid_of(family, rows=3, columns=5):
    return (3, 3) if family in SQUARE else (rows, columns)


def run(model, inputs):
    with torch.no_grad():
        return output(model, inputs)


def output(model, inputs):
    out = model(**inputs, return_dict=False)[0]
    return out if isinstance(out, torch.Tensor) else torch.stack(out)


def identities(model):
    return {
        n: (type(m), id(getattr(m, "processor", None)), list(m._forward_pre_hooks), sorted(m.__dict__))
        for n, m in model.named_modules()
    }


def row(x, i):
    """Of inputs for two, those of one."""
    if isinstance(x, dict):
        return {k: row(v, i) for k, v in x.items()}
    if isinstance(x, list):
        return x[i : i + 1]
    return x[i : i + 1] if isinstance(x, torch.Tensor) and x.shape[0] == 2 else x


def watched(model, surgery, inputs):
    """(site, tokens, context) of every converted call of one forward."""
    seen = []
    with torch.no_grad(), surgery.watch(lambda site, mixer, q, k, v, ctx, out: seen.append((site, q.shape[2], ctx))):
        output(model, inputs)
    return seen


# ------------------------------------------------------------------------------------------------------------- surgery
@every
def test_identity_is_exact_and_detach_restores(family):
    model = pico_diffusion(family)
    inputs = small_inputs(model, grid_of(family), 2, TEXT)
    before, state = identities(model), {k: v.clone() for k, v in model.state_dict().items()}
    expected = run(model, inputs)
    surgery = linearize.attach(model, None, "softmax")
    assert torch.equal(run(model, inputs), expected)
    surgery.detach()
    surgery = linearize.attach(model, None, "none")
    assert run(model, inputs).isfinite().all() and not torch.equal(run(model, inputs), expected)
    with surgery.teacher():
        assert torch.equal(run(model, inputs), expected)
    surgery.detach()
    assert torch.equal(run(model, inputs), expected)
    assert identities(model) == before and list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@every
def test_every_self_attention_is_found(family):
    """All that see the image; what sees the caption only, or takes its keys from it, is left alone with a reason."""
    model = pico_diffusion(family)
    names = {site.name for site in linearize.find(model)}
    left = {
        name: dit.left_alone(dit.family(model.get_submodule(owner)), name, m)
        for name, m, owner in dit.attentions(model)
        if name not in names
    }
    assert len(names) == {"sd3": 3, "lumina2": 3, "zimage": 3, "unet": 4}.get(family, 2)
    assert all(left.values())
    assert {bool(m) for m in left.values()} == (
        {True} if family in {"pixart", "hunyuandit", "wan", "ltx", "lumina2", "zimage", "unet"} else set()
    )


@every
@pytest.mark.parametrize("rows, columns", [(3, 5), (4, 2)])
def test_the_grid_of_each_forward_arrives(family, rows, columns):
    """Two resolutions in one process, H != W; text before or behind the image."""
    model = pico_diffusion(family)
    surgery = linearize.attach(model, None, "none")
    for size in ((rows, columns), (columns, rows)):
        if family in SQUARE:
            size = (size[0], size[0])
        for site, tokens, ctx in watched(model, surgery, small_inputs(model, size, 2, TEXT)):
            scale = 2 if family == "unet" and "mid_block" not in site.name else 1
            assert ctx.grid == ((2,) if family in VIDEO else ()) + tuple(n * scale for n in size)
            image = torch.Size(ctx.grid).numel()
            assert tokens == ctx.prefix + image + ctx.suffix
            assert (ctx.prefix > 0) == (family in FIRST - {"lumina2"} and site.shape.joint)
            assert (ctx.suffix > 0) == (family in LAST | {"lumina2"} and site.shape.joint or family == "zimage")


@every
def test_a_batch_for_guidance_equals_each_alone(family):
    model = pico_diffusion(family)
    surgery = linearize.attach(model, None, "none")
    both = small_inputs(model, grid_of(family), 2, TEXT)
    together = run(model, both)
    for i in range(2):
        alone = {k: row(v, i) for k, v in both.items()}
        torch.testing.assert_close(together[i : i + 1], run(model, alone), atol=2e-5, rtol=0)
    assert len(surgery.sites) > 1


@every
def test_a_copy_is_a_model_of_its_own(family):
    model = pico_diffusion(family)
    small, large = (small_inputs(model, (2, 2) if family in SQUARE else size, 1, TEXT) for size in ((2, 3), (2, 2)))
    expected = run(model, large)
    surgery = linearize.attach(model, None, "none")
    converted = run(model, large)
    other = copy.deepcopy(model)
    run(model, small)
    assert torch.equal(run(other, large), converted)
    surgery.detach()
    assert torch.equal(run(other, large), converted) and torch.equal(run(model, large), expected)
    linearize.Surgery.of(other).detach()
    assert torch.equal(run(other, large), expected)
    assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in other.modules())


# ---------------------------------------------------------------------------------------------------- what is computed
@every
def test_hedgehog_converts_forward_and_backward(family):
    """Every parameter is reached; a batch equals each alone, captions of several lengths and padding included."""
    model = pico_diffusion(family)
    surgery = linearize.attach(model, None, "hedgehog")
    both = small_inputs(model, grid_of(family), 2, TEXT)
    out = output(model, both)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad((out * weight).sum(), surgery.parameters())
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)
    together = run(model, both)
    for i in range(2):
        alone = {k: row(v, i) for k, v in both.items()}
        torch.testing.assert_close(together[i : i + 1], run(model, alone), atol=2e-4, rtol=0)


@every
def test_clear_beyond_the_diagonal_is_the_teacher(family):
    model = pico_diffusion(family)
    inputs = small_inputs(model, grid_of(family), 2, TEXT)
    teacher = run(model, inputs)
    linearize.attach(model, None, "clear", {"radius": 30})
    torch.testing.assert_close(run(model, inputs), teacher, atol=1e-4, rtol=0)
    linearize.attach(model, None, "clear", {"radius": 2})
    near = run(model, inputs)
    assert (near - teacher).abs().max() > 1e-4
    for i in range(2):
        alone = {k: row(v, i) for k, v in inputs.items()}
        torch.testing.assert_close(near[i : i + 1], run(model, alone), atol=2e-4, rtol=0)


def calls_of(model, surgery, inputs):
    """(mixer, q, k, v, context) of every converted call, float64."""
    calls = []

    def look(site, mixer, q, k, v, ctx, out):
        calls.append((mixer.double(), *(x.double() for x in (q, k, v)), ctx))

    with torch.no_grad(), surgery.watch(look):
        output(model, inputs)
    return calls


@pytest.mark.parametrize("family", ["cogvideox", "wan"])
@pytest.mark.parametrize("frames", [None, 1, 2])
def test_clear_on_video_is_its_dense_twin(family, frames):
    model = pico_diffusion(family)
    surgery = linearize.attach(model, None, "clear", {"radius": 2, "frames": frames, "proportional": 20})
    inputs = small_inputs(model, (3, 3, 5), 2, TEXT)
    for mixer, q, k, v, ctx in calls_of(model, surgery, inputs):
        found, weights = mixer(q, k, v, ctx), mixer.dense(q, k, v, ctx)
        assert (found - weights @ v).abs().max() < 1e-9
        pairs = 2.0 * (weights[0, 0] > 0).sum() * 2 * 16 * 2
        assert mixer.cost_of(ctx.grid, ctx.prefix + ctx.suffix).flops == pairs
    near = run(model, inputs)
    model.float()
    torch.autograd.grad(output(model, inputs).sum(), [p for n, p in model.named_parameters() if "to_k.weight" in n][:2])
    assert near.isfinite().all()


@pytest.mark.parametrize("family", ["flux", "sd3", "pixart"])
def test_clear_reads_means_of_squares(family):
    """down: softmax over text, circle and, for patches alone, the mean of each square."""
    model = pico_diffusion(family)
    surgery = linearize.attach(model, None, "clear", {"radius": 2, "down": 2})
    for mixer, q, k, v, ctx in calls_of(model, surgery, small_inputs(model, (4, 6), 2, TEXT)):
        first, last, T = ctx.prefix, q.shape[2] - ctx.suffix, q.shape[2]
        seen = mixer._seen(ctx, q, slice(None))[0]
        patch = torch.zeros(T, dtype=torch.bool)
        patch[first:last] = True

        def means(x, first=first, last=last):
            return torch.nn.functional.avg_pool2d(x[:, :, first:last].mT.unflatten(3, (4, 6)).flatten(0, 1), 2)

        keys, values = (torch.cat([x, means(x).flatten(2).mT.unflatten(0, x.shape[:2])], 2) for x in (k, v))
        mask = torch.cat([seen, patch[:, None].expand(T, keys.shape[2] - T)], 1)
        expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values, mask, scale=ctx.scale)
        assert (mixer(q, k, v, ctx) - expected).abs().max() < 1e-9
    with pytest.raises(InputError, match="does not divide a grid of 3 x 6"):
        run(model.float(), small_inputs(model, (3, 6), 1, TEXT))


@joint
@pytest.mark.parametrize("settings", [{}, {"combine": "lolcats"}, {"radius": 2}], ids=str)
def test_text_stays_exact(family, settings):
    """Joint hedgehog is its dense twin; rows of text are the teacher's."""
    model = pico_diffusion(family)
    if family in VIDEO and "radius" in settings:
        pytest.skip("a circle beside the linear branch is for images")
    surgery = linearize.attach(model, None, "hedgehog", settings)
    calls = []

    def look(site, mixer, q, k, v, ctx, out):
        calls.append((mixer.double(), *(x.double() for x in (q, k, v)), ctx, out.double()))

    with torch.no_grad(), surgery.watch(look):
        output(model, small_inputs(model, grid_of(family), 2, TEXT))
        assert calls
        for mixer, q, k, v, ctx, out in calls:
            for parameter in mixer.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
            found = mixer(q, k, v, ctx)
            wrong = (found - mixer.dense(q, k, v, ctx) @ v).abs().amax((1, 3))  # rows of padding are nobody's business
            assert (wrong if ctx.valid_BT is None else wrong[ctx.valid_BT]).max() < 1e-9
            if mixer.shape.joint:
                text = [*range(ctx.prefix), *range(q.shape[2] - ctx.suffix, q.shape[2])]
                text = [t for t in text if ctx.valid_BT is None or ctx.valid_BT[:, t].all()]
                torch.testing.assert_close(found[:, :, text], out[:, :, text], atol=1e-5, rtol=0)
                with surgery.ablate("linear_off"):
                    assert not torch.allclose(mixer(q, k, v, ctx), found)


@every
@pytest.mark.parametrize("settings", [{}, {"heads": 1, "normaliser": "inline", "norm": "center"}], ids=str)
def test_lit_with_text_and_frames(family, settings):
    """Its dense twin and its convolution, frame by frame; rows of text are the teacher's."""
    if family == "unet":
        pytest.skip("a UNet has no text in its sequence and no frames: see the laws of images")
    model = pico_diffusion(family)
    surgery = linearize.attach(model, None, "lit", settings)
    calls = []

    def look(site, mixer, q, k, v, ctx, out):
        calls.append((mixer.double(), *(x.double() for x in (q, k, v)), ctx, out.double()))

    with torch.no_grad(), surgery.watch(look):
        output(model, small_inputs(model, grid_of(family), 2, TEXT))
        for mixer, q, k, v, ctx, out in calls:
            for parameter in mixer.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
            found = mixer(q, k, v, ctx)
            wrong = (found - mixer.dense(q, k, v, ctx) @ v - mixer.beside(v, ctx)).abs().amax((1, 3))
            assert (wrong if ctx.valid_BT is None else wrong[ctx.valid_BT]).max() < 1e-9
            if mixer.shape.joint:
                text = [*range(ctx.prefix), *range(q.shape[2] - ctx.suffix, q.shape[2])]
                text = [t for t in text if ctx.valid_BT is None or ctx.valid_BT[:, t].all()]
                torch.testing.assert_close(found[:, :, text], out[:, :, text], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------ refusals
def test_nothing_to_replace_is_said():
    import diffusers

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_cross_attention_heads": 2, "num_layers": 1}
    model = diffusers.SanaTransformer2DModel(
        **sizes, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=8, in_channels=4, sample_size=8
    )
    with pytest.raises(Unsupported, match="linear already"):
        linearize.find(model)
    blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    model = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, attention_head_dim=4, **blocks
    )
    with pytest.raises(Unsupported, match=r"UNet2DModel has no self-attention that linearize knows"):
        linearize.find(model)


def test_ids_that_are_no_image_are_refused():
    model = pico_diffusion("flux")
    linearize.attach(model, None, "none")
    inputs = small_inputs(model, (3, 5), 1, TEXT)
    inputs["img_ids"] = inputs["img_ids"].flip(0)
    with pytest.raises(Unsupported, match="row by row"):
        run(model, inputs)


def test_further_images_stand_behind_the_first():
    """What an editing model is shown: tokens of other images, which everybody reads as text."""
    for family, first in (("flux", TEXT), ("flux2", TEXT), ("qwenimage", TEXT)):
        model = pico_diffusion(family)
        surgery = linearize.attach(model, None, "none")
        own, more = small_inputs(model, (3, 5), 1, TEXT), small_inputs(model, (2, 2), 1, TEXT)
        inputs = {**own, "hidden_states": torch.cat([own["hidden_states"], more["hidden_states"]], 1)}
        if "img_ids" in own:
            further = more["img_ids"].clone()
            further[:, 0] = 1
            inputs["img_ids"] = torch.cat([own["img_ids"], further])
        else:
            inputs["img_shapes"] = [[(1, 3, 5), (1, 2, 2)]]
        for _, tokens, ctx in watched(model, surgery, inputs):
            assert (tokens, ctx.grid, ctx.prefix, ctx.suffix) == (first + 15 + 4, (3, 5), first, 4)


def test_masks_are_padding_or_refused():
    """Chroma and QwenImage hide text that is padding; a mask of another kind cannot be kept."""
    for family, hidden in (("chroma", TEXT - 1), ("qwenimage", TEXT - 1)):
        model = pico_diffusion(family)
        surgery = linearize.attach(model, None, "none")
        for _, tokens, ctx in watched(model, surgery, small_inputs(model, (3, 5), 2, TEXT)):
            expected = torch.ones(2, tokens, dtype=torch.bool)
            expected[0, hidden] = False
            assert torch.equal(ctx.valid_BT, expected)
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    with pytest.raises(InputError, match="more than what is padding"):
        dit.read_mask("here", causal, 1, 6)
    with pytest.raises(InputError, match="more than what is padding"):
        dit.read_mask("here", torch.zeros(1, 1, 1, 6) - 0.5, 1, 6)
    added = torch.tensor([0.0, -10000.0])[None, None, None]
    assert dit.read_mask("here", added, 2, 2).tolist() == [[True, False]] * 2


def test_other_backends_are_not_silently_left_alone():
    """A kernel that does not go by F.scaled_dot_product_attention would leave softmax where it was."""
    model = pico_diffusion("flux")
    linearize.attach(model, None, "none")
    inputs = small_inputs(model, (3, 5), 1, TEXT)
    for module in model.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = "_native_math"
    with pytest.raises(Unsupported, match="set_attention_backend"), torch.no_grad():
        from unittest.mock import patch

        import diffusers.models.transformers.transformer_flux as flux

        with patch.object(flux, "dispatch_attention_fn", lambda q, k, v, **more: v):
            run(model, inputs)


def test_fused_projections_are_refused_before_and_after():
    for family in ("flux", "sd3", "pixart"):
        model = pico_diffusion(family)
        surgery = linearize.attach(model, None, "none")
        state = list(model.state_dict())
        with pytest.raises(Unsupported, match="drops an active LoRA"):
            model.fuse_qkv_projections()
        assert list(model.state_dict()) == state
        surgery.detach()
        model.fuse_qkv_projections()
        with pytest.raises(Unsupported, match="unfuse_qkv_projections"):
            linearize.attach(model, None, "none")


def test_layers_that_see_two_kinds_of_tokens_are_named():
    kinds = {s.name: s.shape.joint for s in linearize.find(pico_diffusion("sd3"))}
    assert kinds == {
        "transformer_blocks.0.attn": True,
        "transformer_blocks.0.attn2": False,
        "transformer_blocks.1.attn": True,
    }
    with pytest.raises(Unsupported, match="does not fit joint DiT attention"):
        linearize.attach(pico_diffusion("sd3"), None, "window", {"sinks": 0})
    assert CHILD not in dict(pico_diffusion("sd3").named_modules())
