"""One table (pico.TEXT_ENCODERS, pico.IMAGE_ENCODERS), one battery: bidirectional families, all layers or every second.

As in test_families.py no family has a line of its own: what a family cannot do is a row of data, with the reason.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, CLIPConfig, CLIPModel

import linearize
from linearize.surgery import files
from linearize.surgery.port import CHILD, PORT
from linearize.surgery.select import BIAS
from linearize.testing.pico import IMAGE_ENCODERS, TEXT_ENCODERS, pico, pico_config
from linearize.types import InputError, Unsupported

#: the method, its settings, and which sites are converted
CONVERSIONS = {
    "linear-all": ("hedgehog", {}, 1),
    "linear-half": ("hedgehog", {}, 2),
    "window-all": ("hedgehog", {"window": 3}, 1),
    "window-half": ("hedgehog", {"window": 3, "combine": "lolcats"}, 2),
    "lawcat-linear-half": ("lawcat", {"half_life": 4}, 2),
    "lawcat-window-all": ("lawcat", {"half_life": 4, "window": 3}, 1),
}
#: other methods than hedgehog are tried with these alone: a method sees no family
FEW = {"bert", "modernbert", "vit"}
ENCODER_DECODERS = {"t5", "bart"}
#: what softmax added to its scores there
BIASED = {"t5", "beit", "data2vec-vision"}
#: one module for all layers
SHARED = {"albert"}
CAUSAL = {"clip_text_model"}
ROTARY = {"modernbert", "nomic_bert", "eurobert", "dinov3_vit"}
#: their position embeddings are interpolated for other sizes than the configured one
ANY_SIZE = {
    *("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "clip_vision_model", "siglip_vision_model"),
    "ijepa",
}
#: those that are compiled in the fast suite; the others are when slow tests run
HEAVY = {"bert", "modernbert", "t5", "vit", "data2vec-vision"}
LENGTHS = (12, 9, 4)

every = pytest.mark.parametrize("family", [*TEXT_ENCODERS, *IMAGE_ENCODERS])
text = pytest.mark.parametrize("family", list(TEXT_ENCODERS))
#: a window along a line of tokens has no meaning on images
converted = pytest.mark.parametrize(
    "family, conversion",
    [
        (f, c)
        for f in [*TEXT_ENCODERS, *IMAGE_ENCODERS]
        for c in CONVERSIONS
        if (f in TEXT_ENCODERS or "linear" in c) and (f in FEW or "lawcat" not in c)
    ],
)
converted_text = pytest.mark.parametrize(
    "family, conversion", [(f, c) for f in TEXT_ENCODERS for c in CONVERSIONS if f in FEW or "lawcat" not in c]
)


def convert(family, conversion):
    """(model in float64, its surgery)"""
    method, settings, step = CONVERSIONS[conversion]
    model = pico(family)
    surgery = linearize.attach(model, linearize.find(model)[::step], method, settings)
    return model.double(), surgery


def tokens(rows=3, columns=12):
    return torch.randint(5, 97, (rows, columns), generator=torch.Generator().manual_seed(1))


def pixels(rows=16, columns=16):
    return torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(2))


def inputs(family):
    """A ragged batch padded on the right, or two images."""
    if family in IMAGE_ENCODERS:
        noise = {"noise": torch.linspace(0, 1, 32).view(2, 16)} if family == "vit_mae" else {}
        return {"pixel_values": pixels(), **noise}
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    batch = {"input_ids": tokens() * mask, "attention_mask": mask}
    if family in ENCODER_DECODERS:
        batch |= {"decoder_input_ids": tokens(columns=7), "use_cache": False}
    return batch


def run(model, batch):
    """Every hidden state that comes out at the end: of the decoder, too."""
    dtype = next(model.parameters()).dtype
    batch = {k: v.to(dtype) if k == "pixel_values" else v for k, v in batch.items()}
    out = model(**batch)
    return [out[key] for key in ("last_hidden_state", "encoder_last_hidden_state") if key in out]


def identities(model):
    return {n: (type(m), id(getattr(m, "config", None))) for n, m in model.named_modules()}


# ------------------------------------------------------------------------------------------------------- surgery
@every
def test_identity_is_exact_and_detach_restores(family):
    model = pico(family)
    before, implementation = identities(model), model.config._attn_implementation
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = run(model, inputs(family))
        surgery = linearize.attach(model, None, "softmax")
        assert all(torch.equal(a, b) for a, b in zip(run(model, inputs(family)), expected, strict=True))
        surgery.detach()
        linearize.attach(model, None, "hedgehog")
        assert not any(torch.equal(a, b) for a, b in zip(run(model, inputs(family)), expected, strict=True))
        with linearize.Surgery.of(model).teacher():
            assert all(torch.equal(a, b) for a, b in zip(run(model, inputs(family)), expected, strict=True))
        linearize.Surgery.of(model).detach()
        assert all(torch.equal(a, b) for a, b in zip(run(model, inputs(family)), expected, strict=True))
    assert identities(model) == before and model.config._attn_implementation == implementation
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@every
def test_every_self_attention_is_found(family):
    sites = linearize.find(pico(family))
    layers = [1] if family in SHARED else [4, 4] if family in ENCODER_DECODERS else [4]
    assert len(sites) == sum(layers)
    causal = [family in CAUSAL] * layers[0] + [True] * sum(layers[1:])
    assert [s.shape.causal for s in sites] == causal
    assert {s.shape.image for s in sites} == {family in IMAGE_ENCODERS}
    assert {BIAS in s.drops for s in sites} == {family in BIASED}


@text
def test_the_teachers_own_window_is_named(family):
    drops = [drop for site in linearize.find(pico(family)) for drop in site.drops if drop != BIAS]
    assert drops == (["the teacher's own window of 3 tokens on either side"] * 2 if family == "modernbert" else [])


@every
def test_methods_without_parameters(family):
    """The floor, and the exact window, which is softmax where it sees everything."""
    model = pico(family)
    linearize.attach(model, None, "none")
    with torch.no_grad():
        assert all(x.isfinite().all() for x in run(model, inputs(family)))
    settings = {"window": 20, "sinks": 0}
    if family in IMAGE_ENCODERS:
        with pytest.raises(Unsupported, match="its like is the method clear"):
            linearize.attach(model, None, "window", settings)
        return
    linearize.attach(model, None, "window", settings)
    with torch.no_grad():
        found = run(model, inputs(family))
        linearize.Surgery.of(model).detach()
        expected = run(model, inputs(family))
    masks = [inputs(family)["attention_mask"].bool()] if family not in ENCODER_DECODERS else [...]
    same = all((a - b)[m].abs().max() < 1e-4 for a, b, m in zip(found, expected, masks))
    assert same == (family not in BIASED | {"modernbert"}), "what softmax had beside: a bias, a window"


# ------------------------------------------------------------------------------------------------------- forward
@converted_text
def test_padded_equals_alone(family, conversion):
    """Keys and normaliser: what stands at padding is nobody's business."""
    model, _ = convert(family, conversion)
    batch = inputs(family)
    with torch.no_grad():
        together = run(model, batch)
        other = {**batch, "input_ids": torch.where(batch["attention_mask"] > 0, batch["input_ids"], 7)}
        others = (
            together if family in {"roberta", "xlm-roberta"} else run(model, other)
        )  # these count positions by pads
        for i, length in enumerate(LENGTHS):
            row = {k: v if k == "use_cache" else v[i : i + 1] for k, v in batch.items()}
            row |= {"input_ids": row["input_ids"][:, :length], "attention_mask": row["attention_mask"][:, :length]}
            no_mask = {k: v for k, v in row.items() if k != "attention_mask"}
            for alone in (run(model, row), run(model, no_mask)):
                for found, filled, expected in zip(together, others, alone, strict=True):
                    n = expected.shape[1]
                    torch.testing.assert_close(found[i : i + 1, :n], expected, atol=1e-9, rtol=0)
                    torch.testing.assert_close(filled[i : i + 1, :n], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", ["bert", "modernbert", "eurobert"])
@pytest.mark.parametrize("settings", [{}, {"window": 3}], ids=str)
def test_packed_documents_equal_each_alone(family, settings):
    """A 4-D mask of two documents; one that hides the future is refused."""
    model = pico(family)
    surgery = linearize.attach(model, None, "hedgehog", settings)
    model.double()
    ids = tokens(1)
    document = torch.tensor([0] * 5 + [1] * 7)
    mask = (document[:, None] == document)[None, None]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    masks = dict.fromkeys(("full_attention", "sliding_attention"), mask) if family == "modernbert" else mask
    with torch.no_grad():
        together = model(ids, attention_mask=masks, position_ids=positions)[0]
        alone = torch.cat([model(ids[:, :5])[0], model(ids[:, 5:])[0]], 1)
        torch.testing.assert_close(together, alone, atol=1e-9, rtol=0)
        with pytest.raises(InputError, match="one direction only"):
            model(ids, attention_mask=torch.ones(12, 12).tril().bool()[None, None], position_ids=positions)
    assert len(surgery.sites) == 4


@pytest.mark.parametrize("family", ["bert", "modernbert", "t5"])
@pytest.mark.parametrize("conversion", ["linear-all", "linear-half"])
def test_one_document_is_two_products(family, conversion):
    """Masks without borders number no documents, so that nothing is scanned."""
    model, surgery = convert(family, conversion)
    seen = []
    for name, mixer in surgery.mixers.items():
        if name.startswith("decoder"):
            continue
        mixer.register_forward_hook(lambda module, args, out: seen.append(args[3].segments_BT))
    with torch.no_grad():
        for batch in (inputs(family), {k: v for k, v in inputs(family).items() if k != "attention_mask"}):
            run(model, batch)
    assert seen and seen == [None] * len(seen)


@converted
def test_backward_reaches_every_mixer_parameter(family, conversion):
    model, surgery = convert(family, conversion)
    out = run(model, inputs(family))[0]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    gradients = torch.autograd.grad((out * weight).sum(), surgery.parameters())
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("family", sorted(ANY_SIZE))
@pytest.mark.parametrize("size", [(8, 24), (20, 12)], ids=str)
def test_images_of_other_sizes(family, size):
    """H != W, other than configured: linear attention reads any number of patches, CLS and registers among them."""
    model, surgery = convert(family, "linear-all")
    rows = {"pixel_values": pixels(*size).double()}
    more = {} if "dino" in family else {"interpolate_pos_encoding": True}  # those do it unasked
    seen = []
    with torch.no_grad(), surgery.watch(lambda site, mixer, q, *rest: seen.append(q.shape[2])):
        model(**rows, **more)
    patches = size[0] * size[1] // 16
    prefix = seen[0] - patches
    assert seen == [seen[0]] * 4 and 0 <= prefix <= 3
    with torch.no_grad():
        together, alone = model(**rows, **more)[0], model(pixel_values=rows["pixel_values"][:1], **more)[0]
    torch.testing.assert_close(together[:1], alone, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in HEAVY else pytest.mark.slow) for f in [*TEXT_ENCODERS, *IMAGE_ENCODERS]]
)
@pytest.mark.parametrize("conversion", ["linear-all", "linear-half"])
def test_compiles_to_one_graph(family, conversion):
    model, _ = convert(family, conversion)
    batch = inputs(family)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = run(model, batch)
        found = run(torch.compile(model, fullgraph=True, backend="eager"), batch)
    torch._dynamo.reset()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


# --------------------------------------------------------------------------------------------------- copies, files
@every
def test_a_copy_is_a_model_of_its_own(family):
    model, surgery = convert(family, "linear-half")
    with torch.no_grad():
        expected = run(model, inputs(family))
        other = copy.deepcopy(model)
        surgery.detach()
        assert all(torch.equal(a, b) for a, b in zip(run(other, inputs(family)), expected, strict=True))


@every
def test_saved_equals_loaded(family, tmp_path):
    """By its class, and by the auto class that made the base."""
    model = pico(family)
    surgery = linearize.attach(model, linearize.find(model)[::2], "hedgehog")
    with torch.no_grad():
        for parameter in surgery.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.1)
        expected = run(model, inputs(family))
    files.save(model, tmp_path / "model")
    for load in (files.load, lambda folder: AutoModel.from_pretrained(folder, trust_remote_code=True)):
        again = load(tmp_path / "model").eval()
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(run(again, inputs(family)), expected, strict=True))


# ------------------------------------------------------------------------------------------- methods of images alone
def patches_in_order(family):
    return pico(family, **({"mask_ratio": 0.0} if family == "vit_mae" else {}))


@pytest.mark.parametrize("family", list(IMAGE_ENCODERS))
def test_a_circle_beyond_the_diagonal_is_softmax(family):
    """Whatever stands before the patches; a bias is what it drops."""
    model = patches_in_order(family).double()
    with torch.no_grad():
        expected = run(model, inputs(family))[0]
        linearize.attach(model, None, "clear", {"radius": 5})
        found = run(model, inputs(family))[0]
        assert ((found - expected).abs().max() < 1e-9) == (family not in BIASED)
        linearize.attach(model, None, "clear", {"radius": 2})
        assert (run(model, inputs(family))[0] - expected).abs().max() > 1e-3
        linearize.Surgery.of(model).detach()
        assert torch.equal(run(model, inputs(family))[0], expected)


@pytest.mark.parametrize("method, settings", [("lit", {"heads": 2}), ("clear", {"radius": 2})], ids=["lit", "clear"])
@pytest.mark.parametrize("family", list(IMAGE_ENCODERS))
def test_methods_of_images(family, method, settings, tmp_path):
    """Forward, backward to every parameter, a copy, a file; each image as if it were alone."""
    model = patches_in_order(family)
    surgery = linearize.attach(model, linearize.find(model)[::2], method, settings)
    with torch.no_grad():
        for parameter in surgery.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.1)
    out = run(model, inputs(family))[0]
    if parameters := surgery.parameters():
        gradients = torch.autograd.grad((out * torch.randn_like(out)).sum(), parameters)
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)
    with torch.no_grad():
        out = run(model, inputs(family))[0]  # some biases take another kernel where nothing is trained
        alone = run(model, {k: v[1:] for k, v in inputs(family).items()})[0]
        torch.testing.assert_close(out[1:], alone, atol=3e-5, rtol=0)
        assert torch.equal(run(copy.deepcopy(model), inputs(family))[0], out)
        files.save(model, tmp_path / "model")
        assert torch.equal(run(files.load(tmp_path / "model").eval(), inputs(family))[0], out)
        if family in ANY_SIZE:
            more = {} if "dino" in family else {"interpolate_pos_encoding": True}
            assert model(pixel_values=pixels(8, 24), **more)[0].isfinite().all()


@pytest.mark.parametrize("family", ["vit", "dinov3_vit", "data2vec-vision"])
def test_projections_that_start_afresh(family, tmp_path):
    """As in LiT: new q, k, v, o, trained with the mixers; the teacher's are kept aside, and put back bit for bit."""
    model = pico(family)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = run(model, inputs(family))[0]
    inherited = len(linearize.attach(model, None, "lit").parameters())
    torch.manual_seed(5)
    surgery = linearize.attach(model, None, "lit", {"start": "afresh"})
    new = surgery.parameters()[inherited:]
    changed = {name for name, p in model.named_parameters() if name in before and id(p) != before[name][0]}
    assert len(new) == len(changed) >= 4 * 3 and all(".attention." in n or ".self_attn." in n for n in changed)
    out = run(model, inputs(family))[0]
    gradients = torch.autograd.grad(out.square().sum(), surgery.parameters(), allow_unused=True)
    assert sum(g is not None and bool(g.abs().max() > 0) for g in gradients[inherited:]) >= len(new) // 2
    with torch.no_grad():
        found = run(model, inputs(family))[0]
        copied = copy.deepcopy(model)
        with surgery.teacher():
            assert torch.equal(run(model, inputs(family))[0], expected)
            assert [id(p) for p in surgery.parameters()[inherited:]] == [id(p) for p in new]
        assert torch.equal(run(model, inputs(family))[0], found)
        with pytest.raises(InputError, match="start: inherit"), surgery.watch(lambda *args: None):
            pass
        with pytest.raises(InputError, match="save the whole model"):
            files.save_adapter(model, tmp_path / "adapter", base=None)
        files.save(model, tmp_path / "model")
        assert torch.equal(run(files.load(tmp_path / "model").eval(), inputs(family))[0], found)
        surgery.detach()
        assert torch.equal(run(copied, inputs(family))[0], found)
        with linearize.Surgery.of(copied).teacher():
            assert torch.equal(run(copied, inputs(family))[0], expected)
        with linearize.Surgery.of(copied.double()).teacher():  # kept aside, it goes where the model goes
            torch.testing.assert_close(run(copied, inputs(family))[0], expected.double(), atol=1e-4, rtol=0)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: b[0] for name, b in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())


@text
def test_text_has_no_rows_and_columns(family):
    for method in ("lit", "clear"):
        with pytest.raises(Unsupported, match=f"{method}.* does not fit .* attention: .*text|past"):
            linearize.attach(pico(family), None, method)


# ----------------------------------------------------------------------------------------- what some of them have
@pytest.mark.parametrize("family", sorted(SHARED))
def test_a_shared_module_fires_once_for_each_of_its_layers(family):
    model = pico(family)
    surgery = linearize.attach(model, None, "hedgehog")
    before = surgery._ports()[0].fired
    run(model, inputs(family))
    assert surgery._ports()[0].fired - before == model.config.num_hidden_layers


@pytest.mark.parametrize("family", sorted(ENCODER_DECODERS))
@pytest.mark.parametrize("conversion", list(CONVERSIONS))
def test_an_encoder_decoder_generates_from_its_state(family, conversion):
    method, settings, step = CONVERSIONS[conversion]
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(pico_config(family)).eval()
    linearize.attach(model, linearize.find(model)[::step], method, settings)
    batch = {k: v for k, v in inputs(family).items() if k in ("input_ids", "attention_mask")}
    more = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "forced_eos_token_id": None}
    with_cache = model.generate(**batch, **more)
    assert torch.equal(with_cache, model.generate(**batch, **more, use_cache=False))
    assert with_cache.shape[1] == 9


def test_both_towers_of_clip_are_found():
    """One of them is causal, which only the call says; attach works on each."""
    parts = {kind: pico_config(f"clip_{kind}_model").to_dict() for kind in ("text", "vision")}
    model = CLIPModel(CLIPConfig(text_config=parts["text"], vision_config=parts["vision"], projection_dim=16)).eval()
    sites = linearize.find(model)
    assert {(s.name.split(".")[0], s.shape.causal, s.shape.image) for s in sites} == {
        ("text_model", True, False),
        ("vision_model", False, True),
    }
    surgeries = [linearize.attach(tower, None, "hedgehog") for tower in (model.text_model, model.vision_model)]
    with torch.no_grad():
        out = model(input_ids=tokens(2), pixel_values=pixels()).logits_per_image
    assert out.isfinite().all() and len(surgeries[0].sites) == len(surgeries[1].sites) == 4


@every
def test_without_rope(family):
    model = pico(family)
    if family not in ROTARY:
        with pytest.raises(Unsupported, match="nothing to undo|cannot be undone"):
            linearize.attach(model, None, "hedgehog", {"rope": "undo"})
        assert not any(PORT in m.__dict__ or hasattr(m, CHILD) for m in model.modules()), "left half converted"
        return
    linearize.attach(model, None, "hedgehog", {"rope": "undo"})
    if family in IMAGE_ENCODERS:  # patches of 4 x 4: the rows of patches turned upside down
        with torch.no_grad():
            here = model(pixels())[0][:, -16:]
            there = model(pixels().unflatten(2, (4, 4)).flip(2).flatten(2, 3))[0][:, -16:]
        torch.testing.assert_close(here.unflatten(1, (4, 4)).flip(1).flatten(1, 2), there, atol=1e-4, rtol=0)
        return
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():  # without rotation nothing is left that knows the order of the tokens
        here, there = model(tokens())[0], model(tokens()[:, order])[0]
    torch.testing.assert_close(here[:, order], there, atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "family, sizes, says",
    [
        (
            "mpnet",
            {"hidden_size": 32, "num_attention_heads": 4},
            r"attention\.attn \(MPNetSelfAttention\) writes its softmax",
        ),
        ("deberta", {"hidden_size": 32, "num_attention_heads": 4}, r"\(DisentangledSelfAttention\) writes its softmax"),
        (
            "deberta-v2",
            {"hidden_size": 32, "num_attention_heads": 4},
            r"\(DisentangledSelfAttention\) writes its softmax",
        ),
        ("hiera", {"embed_dim": 8}, r"\(HieraMaskUnitAttention\) writes its softmax"),
        (
            "cvt",
            {"embed_dim": [8, 8, 8], "num_heads": [1, 1, 1]},
            r"\(CvtSelfAttention\) writes its softmax",
        ),
        ("swinv2", {"embed_dim": 8, "num_heads": [1, 1, 1, 1]}, r"\(Swinv2SelfAttention\) writes its softmax"),
    ],
)
def test_refused_by_name(family, sizes, says):
    if "hidden_size" in sizes:
        sizes = {**sizes, "vocab_size": 97, "num_hidden_layers": 2, "intermediate_size": 48}
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(family, **sizes))
    with pytest.raises(Unsupported, match=says):
        linearize.find(model)


def test_swin_is_converted_window_by_window(caplog, tmp_path):
    """Linear attention inside each window; its bias and the mask of shifted ones are dropped, and that is said."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
    model = AutoModel.from_config(AutoConfig.for_model("swin", **sizes)).eval()
    image = {"pixel_values": pixels(32, 32)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_position_bias" in name or "q_proj.w" in name:
                parameter.normal_()
        expected = run(model, image)[0]
        linearize.attach(model, None, "softmax")
        assert torch.equal(run(model, image)[0], expected)
        with pytest.raises(Unsupported, match=r"attention attends inside windows .*use hedgehog with radius: 0"):
            linearize.attach(model, None, "lit")
        for method, settings in (("clear", {}), ("hedgehog", {"radius": 2})):
            with pytest.raises(Unsupported, match="use hedgehog with radius: 0"):
                linearize.attach(model, None, method, settings)
        assert torch.equal(run(model, image)[0], expected)
        caplog.clear()
        surgery = linearize.attach(model, None, "hedgehog")
    assert "the mask of shifted windows and the relative position bias is dropped" in caplog.text
    assert len(surgery.sites) == 4 and {s.shape.heads for s in surgery.sites} == {1, 2}
    out = run(model, image)[0]
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(out.square().sum(), surgery.parameters()))
    files.save(model, tmp_path / "model")
    with torch.no_grad():
        found = run(model, image)[0]
        assert not torch.equal(found, expected)
        assert torch.equal(run(files.load(tmp_path / "model").eval(), image)[0], found)
        surgery.detach()
        assert torch.equal(run(model, image)[0], expected)


def test_sinks_are_refused_where_nothing_is_first():
    with pytest.raises(Unsupported, match="sinks: 0"):
        linearize.attach(pico("bert"), None, "hedgehog", {"window": 3, "sinks": 2})


def test_a_bias_that_nobody_names_is_refused():
    """A model that adds to its scores what discovery did not see."""

    class Biased(type(pico("bert").encoder.layer[0].attention.self)):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            n = hidden_states.shape[1]
            bias = -(torch.arange(n)[:, None] - torch.arange(n)).abs()[None, None].float()
            return super().forward(hidden_states, attention_mask=bias, **kwargs)

    model = pico("bert")
    attention = model.encoder.layer[0].attention.self
    attention.__class__ = Biased
    sites = linearize.find(pico("bert"))
    with pytest.raises(Unsupported, match=r"layer\.0\.attention\.self: the model adds a bias of its own"):
        linearize.attach(model, sites, "hedgehog")
    assert isinstance(model.encoder.layer[0].attention.self, nn.Module) and linearize.Surgery.of(model) is None
