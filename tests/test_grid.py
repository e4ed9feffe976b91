"""Where patches stand: the grid, prefix and suffix that a mixer is told, in every vision tower."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    YolosConfig,
)

import linearize
from linearize.mixers.none import NoMixing
from linearize.seams.grid import Grid
from linearize.surgery import files
from linearize.testing.pico import IMAGE_ENCODERS, pico, pico_config
from linearize.types import InputError, Unsupported

#: tokens before the patches
PREFIX = {
    "vit": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 3,
    "dinov3_vit": 3,
    "beit": 1,
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "vit_mae": 1,
    "ijepa": 0,
    "data2vec-vision": 1,
}
#: their position embeddings are those of one size
ONE_SIZE = {"beit", "data2vec-vision"}

every = pytest.mark.parametrize("family", list(IMAGE_ENCODERS))


class Told(NoMixing):
    """Mixes nothing, and cannot do it without a grid."""

    needs = frozenset({"grid"})


def build(family):
    return pico(family, **({"mask_ratio": 0.0} if family == "vit_mae" else {}))


def settings(family):
    return {k: v for k, v in pico_config(family).to_dict().items() if k != "model_type"}


def run(model, family, rows, columns):
    more = {} if "dino" in family or family in ONE_SIZE else {"interpolate_pos_encoding": True}
    if family == "vit_mae":
        more["noise"] = torch.arange(rows * columns // 16)[None].float()
    with torch.no_grad():
        return model(pixel_values=torch.randn(1, 3, rows, columns), **more)


def told(surgery, forward, *args):
    """What every mixer was told in one forward: one (grid, prefix, suffix) for all layers."""
    seen = []
    with surgery.watch(lambda site, mixer, q, k, v, ctx, out: seen.append((ctx.grid, ctx.prefix, ctx.suffix))):
        forward(*args)
    assert len(seen) == len(surgery.sites) and len(set(seen)) == 1
    return seen[0]


def hooks(model):
    """Ours; transformers has some of its own."""
    found = [getattr(hook, "__self__", hook) for m in model.modules() for hook in m._forward_hooks.values()]
    return [hook for hook in found if isinstance(hook, Grid)]


@every
def test_every_tower_has_its_grid(family):
    """Several sizes in one process, none of them square; a copy has a grid of its own; detach takes the hooks away."""
    model = build(family)
    surgery = linearize.attach(model, None, Told)
    sizes = [(16, 16)] if family in ONE_SIZE else [(8, 24), (20, 12), (16, 16)]
    for rows, columns in sizes:
        expected = ((rows // 4, columns // 4), PREFIX[family], 0)
        assert told(surgery, run, model, family, rows, columns) == expected
    copied = copy.deepcopy(model)
    surgery.detach()
    assert not hooks(model)
    assert told(linearize.Surgery.of(copied), run, copied, family, 16, 16)[0] == (4, 4)
    linearize.Surgery.of(copied).detach()
    assert not hooks(copied)


def test_an_attach_that_fails_leaves_no_hook():
    model = pico("vit")
    with pytest.raises(Unsupported, match="reached 0 times"):
        linearize.attach(model, None, Told, probe=lambda m: None)
    assert not hooks(model)


def test_two_conversions_of_one_model_leave_each_other_alone():
    model = pico("vit")
    first, second = linearize.find(model)[:2], linearize.find(model)[2:]
    linearize.attach(model, first, Told)
    surgery = linearize.attach(model, second, Told)  # an earlier conversion is dropped
    assert told(surgery, run, model, "vit", 8, 24) == ((2, 6), 1, 0)
    assert len(hooks(model)) == 1


def test_a_saved_model_has_its_grid_again(tmp_path):
    model = pico("dinov3_vit")
    linearize.attach(model, None, "hedgehog")
    files.save(model, tmp_path / "model")
    for again in (
        files.load(tmp_path / "model"),
        AutoModel.from_pretrained(tmp_path / "model", trust_remote_code=True),
    ):
        surgery = linearize.Surgery.of(again)
        assert told(surgery, run, again, "dinov3_vit", 8, 24) == ((2, 6), 3, 0)


def test_offloading_hooks_are_no_obstacle():
    """accelerate's hooks, put on before or after."""
    for before in (True, False):
        model = pico("vit")
        if before:
            cpu_offload(model, torch.device("cpu"))
        surgery = linearize.attach(model, None, Told)
        if not before:
            cpu_offload(model, torch.device("cpu"))
        assert told(surgery, run, model, "vit", 8, 24) == ((2, 6), 1, 0)


def test_tokens_behind_the_patches():
    """YOLOS ends with detection tokens."""
    config = pico_config("vit").to_dict() | {"image_size": [16, 16], "num_detection_tokens": 5}
    model = AutoModel.from_config(YolosConfig(**{k: v for k, v in config.items() if k != "model_type"})).eval()
    surgery = linearize.attach(model, None, Told)
    with torch.no_grad():
        assert told(surgery, lambda: model(pixel_values=torch.randn(1, 3, 8, 24))) == ((2, 6), 1, 5)


# -------------------------------------------------------------------------------------------------- where there is none
def test_text_has_no_grid():
    for family in ("bert", "llama"):
        with pytest.raises(Unsupported, match=r"(self|self_attn) reads no image, and .* needs the grid"):
            linearize.attach(pico(family), None, Told)


def test_a_tower_without_its_embeddings_has_no_grid():
    model = pico("vit")
    del model.embeddings
    with pytest.raises(Unsupported, match=r"layers\.0\.attention has no patch convolution around it"):
        linearize.attach(model, None, Told, probe=False)


def test_masked_patches_are_refused():
    """Left out at random, or all there but shuffled: told in one line that names the layer."""
    model = pico("vit_mae")
    with pytest.raises(Unsupported, match=r"layers\.0.*5 tokens for 4 x 4 patches.*mask_ratio: 0"):
        linearize.attach(model, None, Told)
    model = build("vit_mae")
    linearize.attach(model, None, Told)
    with torch.no_grad(), pytest.raises(InputError, match=r"layers\.0.*shuffles its patches"):
        model(pixel_values=torch.randn(1, 3, 16, 16), noise=torch.linspace(1, 0, 16)[None])
    model.config.mask_ratio = 1 / 16  # as many tokens as patches, CLS among them
    with torch.no_grad(), pytest.raises(InputError, match="16 tokens for 4 x 4 patches"):
        model(pixel_values=torch.randn(1, 3, 16, 16), noise=torch.arange(16.0)[None])


# ---------------------------------------------------------------------------------------------- towers of other models
def test_both_sides_of_llava():
    torch.manual_seed(0)
    text, vision = LlamaConfig(**settings("llama")), CLIPVisionConfig(**settings("clip_vision_model"))
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=90, image_seq_length=16)
    model = LlavaModel(config).eval()
    ids = torch.cat([torch.full((1, 16), 90), torch.arange(5, 12)[None]], 1)
    image = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}
    with torch.no_grad():
        expected = model(**image)[0]
        tower = linearize.attach(model.vision_tower, None, Told)
        assert told(tower, lambda: model(**image)) == ((4, 4), 1, 0)
        language = linearize.attach(model.language_model, None, "hedgehog", {"window": 40})
        tower.detach()
        torch.testing.assert_close(model(**image)[0], expected, atol=1e-4, rtol=0)  # the window sees everything
        language.detach()
        assert torch.equal(model(**image)[0], expected) and not hooks(model)


def qwen2_5_vl(**vision):
    torch.manual_seed(0)
    text = settings("qwen2") | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    tower = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
    tower |= {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [0], **vision}
    special = {"image_token_id": 90, "vision_start_token_id": 91, "vision_end_token_id": 92, "video_token_id": 93}
    return Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=text, vision_config=tower, **special)).eval()


def test_the_vision_tower_of_qwen2_5_vl():
    """Images of several sizes end to end, windows and whole images in turn: each by itself, as softmax had them."""
    tower = qwen2_5_vl(depth=2, fullatt_block_indexes=[1]).visual
    sizes = torch.tensor([[1, 8, 12], [1, 4, 4]])
    patches = torch.randn(8 * 12 + 4 * 4, 3 * 2 * 4 * 4)
    with torch.no_grad():
        for block in tower.blocks:
            block.attn.qkv.weight *= 6
        expected = tower(patches, grid_thw=sizes).last_hidden_state
        surgery = linearize.attach(tower, None, "hedgehog")
        assert len(surgery.sites) == 2 and surgery.calls is None  # a call for each window, however many an image has
        both = tower(patches, grid_thw=sizes).last_hidden_state
        alone = [tower(x, grid_thw=n[None]).last_hidden_state for x, n in zip(patches.split([96, 16]), sizes)]
        torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=0)
        assert (both - expected).abs().max() > 1e-2
        with surgery.teacher():
            assert torch.equal(tower(patches, grid_thw=sizes).last_hidden_state, expected)
    tower(patches, grid_thw=sizes).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in surgery.parameters())
    surgery.detach()
    with torch.no_grad():
        assert torch.equal(tower(patches, grid_thw=sizes).last_hidden_state, expected)
        with pytest.raises(Unsupported, match="reads no image, and .* needs the grid"):
            linearize.attach(tower, None, Told)


def test_the_language_model_of_qwen2_5_vl():
    """Image tokens and rotary positions of three kinds: a window that sees everything is softmax; padded, as alone."""
    model = qwen2_5_vl()
    ids = torch.tensor([[5, 91, *[90] * 6, 92, 7, 8, 9]])
    image = {"pixel_values": torch.randn(24, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 6]])}
    kinds = {"mm_token_type_ids": (ids == 90).int()}
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, **image, **kinds)[0]
        surgery = linearize.attach(model.language_model, None, "hedgehog", {"window": 40})
        found = model(input_ids=ids, attention_mask=mask, **image, **kinds)[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        surgery = linearize.attach(model.language_model, None, "hedgehog")
        alone = model(input_ids=ids, attention_mask=mask, **image, **kinds)[0]
        assert (alone - expected).abs().max() > 1e-3
        padded, kinds = (
            torch.nn.functional.pad(ids, (3, 0)),
            {"mm_token_type_ids": torch.nn.functional.pad(ids == 90, (3, 0)).int()},
        )
        together = model(input_ids=padded, attention_mask=torch.nn.functional.pad(mask, (3, 0)), **image, **kinds)[0]
        torch.testing.assert_close(together[:, 3:], alone, atol=1e-5, rtol=0)
        surgery.detach()
        assert torch.equal(
            model(input_ids=ids, attention_mask=mask, **image, mm_token_type_ids=(ids == 90).int())[0], expected
        )
