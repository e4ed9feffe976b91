"""Surgery: what it refuses, what it leaves alone, what it does under hooks, and the modes of its handle."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

import linearize
from linearize.seams import interface
from linearize.seams.cache import StateLayer
from linearize.surgery.port import CHILD, PORT
from linearize.surgery.select import break_even, parse_layers, worthwhile
from linearize.testing.pico import pico
from linearize.testing.tolerance import close
from linearize.types import InputError, Site, SiteShape, Unsupported

WINDOW = {"window": 4, "sinks": 2}


def ids(tokens=12, batch=2):
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(1))


def logits(model, **inputs):
    with torch.no_grad():
        return model(**{"input_ids": ids(), "use_cache": False, **inputs}).logits


@pytest.fixture(scope="module")
def expected():
    """(the teacher's logits, the converted model's) of the pico llama"""
    model = pico("llama")
    teacher = logits(model)
    linearize.attach(model, None, "hedgehog")
    return teacher, logits(model)


# --------------------------------------------------------------------------------------------------- under hooks
def _offload(model, folder):
    cpu_offload(model, execution_device="cpu")


def _dispatch(model, folder):
    dispatch_model(model, {"": "cpu"}, force_hooks=True)


def _to_disk(model, folder):
    places = {name: "cpu" for name, _ in model.named_children()} | {
        f"model.{name}": "cpu" for name, _ in model.model.named_children()
    }
    del places["model"], places["model.layers"]
    places |= {f"model.layers.{i}": "disk" if i == 3 else "cpu" for i in range(4)}
    dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def _on_attention(model, folder):
    for layer in model.model.layers:
        add_hook_to_module(layer.self_attn, ModelHook())


@pytest.mark.parametrize("hook", [_offload, _dispatch, _to_disk, _on_attention])
@pytest.mark.parametrize("first", ["hooks", "surgery"])
def test_accelerate_hooks_in_both_orders(hook, first, expected, tmp_path):
    """Same results, every site fires once, and detach works with the hooks still there."""
    teacher, converted = expected
    model = pico("llama")
    if first == "hooks":
        hook(model, tmp_path)
        surgery = linearize.attach(model, None, "hedgehog")
    else:
        surgery = linearize.attach(model, None, "hedgehog")
        hook(model, tmp_path)
    before = [port.fired for port in surgery._ports()]
    assert torch.equal(logits(model), converted)
    assert [port.fired for port in surgery._ports()] == [n + 1 for n in before]
    with surgery.teacher():
        assert torch.equal(logits(model), teacher)
    surgery.detach()
    assert torch.equal(logits(model), teacher)
    linearize.attach(model, None, "hedgehog")
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model), converted), "hooks taken off a converted model"
    linearize.attach(model, None, "softmax").detach()
    assert torch.equal(logits(model), teacher), "what a removed hook leaves behind was in the way"


def test_a_forward_replaced_by_unknown_code_is_refused(expected):
    model = pico("llama")
    attention = model.model.layers[1].self_attn
    original = attention.forward
    attention.forward = lambda *args, **kwargs: original(*args, **kwargs)
    with pytest.raises(Unsupported, match=rf"model\.layers\.1\.self_attn.*replaced.*{__name__}.*remove that hook"):
        linearize.attach(model, None, "hedgehog")
    assert not any(PORT in m.__dict__ or hasattr(m, CHILD) for m in model.modules()), "left half converted"
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), expected[0])
    del attention.forward
    linearize.attach(model, None, "hedgehog")
    assert torch.equal(logits(model), expected[1])


def test_unknown_code_inside_an_accelerate_hook_is_refused():
    model = pico("llama")
    attention = model.model.layers[0].self_attn
    original = attention.forward
    attention.forward = lambda *args, **kwargs: original(*args, **kwargs)
    add_hook_to_module(attention, ModelHook())
    with pytest.raises(Unsupported, match=r"model\.layers\.0\.self_attn: its forward was replaced"):
        linearize.attach(model, None, "hedgehog")


def test_attention_without_context_raises():
    """Someone put the old forward back: never softmax in silence."""
    model = pico("llama")
    linearize.attach(model, None, "hedgehog")
    attention = model.model.layers[1].self_attn
    attention.forward = type(attention).linearize_original.forward.__get__(attention)
    with pytest.raises(RuntimeError, match="LinearizedLlamaAttention.*without its context"):
        logits(model)
    with pytest.raises(RuntimeError, match="without its context"):
        interface.attention(nn.Identity(), *[torch.zeros(1, 1, 1, 1)] * 3)


def test_the_context_is_cleared_even_after_an_error():
    model = pico("llama")
    surgery = linearize.attach(model, None, "hedgehog")

    def fail(*args):
        raise KeyError("in the watcher")

    with pytest.raises(KeyError), surgery.watch(fail):
        logits(model)
    assert all(port.call is None and port.watcher is None for port in surgery._ports())


# ------------------------------------------------------------------------------------------------ attach, detach
def test_attach_twice_is_once(expected):
    model = pico("llama")
    first = linearize.attach(model, None, "window", {"window": 3})
    second = linearize.attach(model, None, "hedgehog")
    assert torch.equal(logits(model), expected[1])
    assert sum(name.endswith(CHILD) for name, _ in model.named_modules()) == 4
    second.detach()
    first.detach()
    second.detach()
    assert torch.equal(logits(model), expected[0])
    assert not any(CHILD in name for name in model.state_dict())


def test_a_hybrid_can_become_fully_linear(expected):
    model = pico("llama")
    linearize.attach(model, linearize.find(model)[:1], "hedgehog")
    linearize.attach(model, None, "hedgehog")
    assert torch.equal(logits(model), expected[1])


def test_head_level_hybrids_are_refused_for_now():
    from dataclasses import replace

    model = pico("llama")
    sites = [replace(linearize.find(model)[0], heads=(0,))]
    with pytest.raises(Unsupported, match="head-level"):
        linearize.attach(model, sites, "hedgehog")


def test_a_site_that_does_not_fire_is_named():
    model = pico("llama")
    spare = nn.Module()
    spare.self_attn = type(model.model.layers[0].self_attn)(model.config, 0)
    model.model.spare = spare
    with pytest.raises(Unsupported, match=r"model\.spare\.self_attn was reached 0 times"):
        linearize.attach(model, None, "hedgehog")
    assert linearize.Surgery.of(model) is None


def test_layers_without_a_site_are_named(caplog):
    """By the configuration, whatever is in them; not those that it says are something else, or whose softmax is told of
    anyway."""
    assert linearize.find(pico("llama")) and not caplog.messages
    model = pico("llama")
    model.model.layers[1].self_attn = model.model.layers[3].self_attn = torch.nn.Identity()
    assert len(linearize.find(model)) == 2
    [said] = caplog.messages
    assert "model.layers.1, model.layers.3: surgery reaches no attention" in said
    caplog.clear()
    model.config.layer_types = ["full_attention", "conv", "full_attention", "linear_attention"]
    assert len(linearize.find(model)) == 2 and not caplog.messages
    del model.config.layer_types
    model.model.layers[1].self_attn = model.model.layers[3].self_attn = _ByHandAttention()
    assert len(linearize.find(model)) == 2
    [said] = caplog.messages
    assert "write softmax by hand" in said
    caplog.clear()
    model.model.layers[1].self_attn = model.model.layers[3].self_attn = model.model.layers[2].self_attn
    assert len(linearize.find(model)) == 2 and not caplog.messages  # shared: one site for three layers


class _ByHandAttention(torch.nn.Module):
    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


def test_a_site_that_is_gone_past_later_is_named():
    surgery = linearize.attach(pico("llama"), None, "hedgehog")
    surgery.reach()
    assert surgery.calls == 4
    module = surgery.model.model.layers[2].self_attn
    module.config = surgery.model.config  # as if somebody had put the teacher's own attention back
    with pytest.raises(Unsupported, match=r"layers\.2\.self_attn was reached 0 times .*called it 1 times \(1 of 4"):
        surgery.reach()


def test_private_names_of_transformers_are_in_one_file():
    """Those of models and configurations, and modules below the first level."""
    plain = {*dir(torch.nn.Module()), *dir(object)}
    theirs = {*dir(PreTrainedModel), *dir(PreTrainedConfig()), "_hf_peft_config_loaded"} - plain
    theirs = {name for name in theirs if name.startswith("_") and not name.startswith("__")}
    allowed = {"hooks.py": {"_hf_peft_config_loaded"}, "plugin.py": {"_name_or_path"}}  # of peft, of diffusers
    folder = Path(linearize.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        if file == folder / "seams" / "hf.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            said = {getattr(node, key, None) for key in ("attr", "id", "name", "value")}
            found = {x for x in said if isinstance(x, str)} & theirs - allowed.get(file.name, set())
            assert not found, f"{file}:{getattr(node, 'lineno', 0)}: {found} belongs into seams/hf.py"
            deep = isinstance(node, ast.ImportFrom) and re.match(r"transformers\.(?!utils$)", node.module or "")
            assert not deep, f"{file}:{node.lineno}: {node.module} belongs into seams/hf.py"


def test_flex_attention_is_refused():
    model = pico("llama", attn_implementation="flex_attention")
    with pytest.raises(Unsupported, match="attn_implementation='sdpa'"):
        linearize.attach(model, None, "hedgehog")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixers_stay_float32(dtype):
    """In a model cast before or after surgery; activations keep the model's type."""
    for before in (True, False):
        model = pico("llama")
        model = model.to(dtype) if before else model
        surgery = linearize.attach(model, None, "hedgehog", WINDOW)
        model.to(dtype)
        assert {p.dtype for p in surgery.parameters()} == {torch.float32}
        cache = DynamicCache(config=model.config)
        out = logits(model, past_key_values=cache, use_cache=True)
        assert out.dtype == dtype and out.isfinite().all()
        assert cache.layers[0].slot.state[0].dtype == torch.float32
        surgery.detach()
        assert {p.dtype for p in model.parameters()} == {dtype}


# ------------------------------------------------------------------------------------------------------- choosing
def _sites(count=8):
    shape = SiteShape(4, 2, 8, 8, 32, 8**-0.5)
    return [Site(f"layers.{i}", i, shape) for i in range(count)]


@pytest.mark.parametrize(
    "spec, layers",
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7]),
        (" 0-2 ", [0, 1, 2]),
        ("0,2,5-7", [0, 2, 5, 6, 7]),
        ("5-7, 0", [0, 5, 6, 7]),
        ("every:4", [0, 4]),
        ("every:1", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("keep:3,7", [0, 1, 2, 4, 5, 6]),
        ("keep:0-6", [7]),
    ],
)
def test_layer_specs(spec, layers):
    assert [site.layer for site in parse_layers(spec, _sites())] == layers


@pytest.mark.parametrize(
    "spec, says",
    [
        ("0-11", "no layer 8; it has 0-7"),
        ("keep:9", "no layer 9"),
        ("keep:0-7", "selects no layer"),
        ("every:0", "number above 0"),
        ("every:x", "number above 0"),
        ("first", "write all, 0-11"),
        ("", "write all, 0-11"),
        ("3-1", "selects no layer"),
        ("-1", "write all, 0-11"),
    ],
)
def test_bad_layer_specs(spec, says):
    with pytest.raises(InputError, match=says):
        parse_layers(spec, _sites())


def test_layers_without_numbers_are_counted():
    sites = [Site(name, None, SiteShape(4, 2, 8, 8, 32, 1.0)) for name in ("a", "b", "c")]
    assert [site.name for site in parse_layers("0,2", sites)] == ["a", "c"]


def _meta(family, **sizes):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))


def test_break_even_of_published_sizes():
    """float32 states against bf16 caches: the figures of the papers' own models, from configs on meta."""
    llama = _meta(
        "llama",
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=1,
        intermediate_size=64,
        vocab_size=64,
    )
    [site] = linearize.find(llama)
    assert break_even(site, "hedgehog", {}) == 1032
    assert break_even(site, "hedgehog", {"share": "kv"}) == 258
    deepseek = _meta("deepseek_v3", num_hidden_layers=1, intermediate_size=64, vocab_size=64, first_k_dense_replace=1)
    [site] = linearize.find(deepseek)
    assert (site.shape.heads, site.shape.key_dim, site.shape.value_dim, site.cache_dims) == (128, 192, 128, 576)
    assert break_even(site, "hedgehog", {}) == 22016


def test_sites_whose_state_would_be_larger_are_left_alone():
    """With the figures; sliding windows for ever, full attention up to the break-even length."""
    sizes = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = _meta("gemma2", num_hidden_layers=4, sliding_window=128, intermediate_size=64, vocab_size=64, **sizes)
    sites = linearize.find(model)
    full = next(site for site in sites if site.shape.window is None)
    limit = break_even(full, "hedgehog", {})
    assert limit == 4 * 128 * 65 * 4 / (2 * 128 * 2)
    chosen, left = worthwhile(sites, "hedgehog", {}, limit)
    assert [site.layer for site in chosen] == [1, 3]
    assert set(left) == {"model.layers.0.self_attn", "model.layers.2.self_attn"}
    assert "133,120 bytes" in left["model.layers.0.self_attn"] and "65,536 bytes" in left["model.layers.0.self_attn"]
    assert worthwhile(sites, "hedgehog", {}, limit - 1)[0] == []
    assert break_even(sites[0], "hedgehog", {}) is None
    assert worthwhile(sites, "none", {}, 1)[0] == sites


@pytest.mark.parametrize(
    "family, drops",
    [
        ("llama", [()] * 4),
        (
            "gemma2",
            [("soft-cap 50 on the logits", "the teacher's own window of 6 tokens"), ("soft-cap 50 on the logits",)],
        ),
        ("gpt_oss", [("learned sink logits", "the teacher's own window of 6 tokens"), ("learned sink logits",)]),
        ("olmo3", [("the teacher's own window of 6 tokens",), ()]),
    ],
)
def test_what_a_mixer_drops_is_named(family, drops):
    sites = linearize.find(pico(family))
    assert [site.drops for site in sites] == (drops * 4)[:4]


# ---------------------------------------------------------------------------------------------------------- caches
def test_a_cache_filled_by_the_teacher_is_refused():
    model = pico("llama")
    surgery = linearize.attach(model, None, "hedgehog")
    cache = DynamicCache(config=model.config)
    with surgery.teacher():
        logits(model, past_key_values=cache, use_cache=True)
    with pytest.raises(Unsupported, match="layer 0 of this cache was filled by the softmax model.*new cache"):
        logits(model, past_key_values=cache, use_cache=True)


def test_a_cache_filled_by_the_student_is_refused_by_the_teacher():
    model = pico("llama")
    surgery = linearize.attach(model, None, "hedgehog")
    cache = DynamicCache(config=model.config)
    logits(model, past_key_values=cache, use_cache=True)
    with pytest.raises(InputError, match="holds the student's state"), surgery.teacher():
        logits(model, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("every", [1, 2], ids=["linear", "hybrid"])
def test_assisted_decoding_is_refused(every):
    model = pico("llama")
    linearize.attach(model, linearize.find(model)[::every], "hedgehog")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for assisted in ({"assistant_model": pico("llama", seed=3)}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(Unsupported, match="cannot be rolled back.*without assistant_model"):
            model.generate(ids(batch=1), **assisted, **settings)
    with pytest.raises(Unsupported, match="cannot be rolled back"):
        pico("llama").generate(ids(batch=1), assistant_model=model, **settings)
    cache = DynamicCache(config=model.config)
    logits(model, past_key_values=cache, use_cache=True)
    with pytest.raises(Unsupported, match="cannot be rolled back"):
        cache.crop(5)


def test_the_cache_holds_a_state_and_no_keys():
    """Constant size, one counter, and it follows reset, reordering, repetition and selection."""
    model = pico("llama")
    linearize.attach(model, linearize.find(model)[::2], "hedgehog", WINDOW)
    cache = DynamicCache(config=model.config)
    sizes = []
    for tokens in (5, 7):
        logits(model, input_ids=ids(tokens), past_key_values=cache, use_cache=True)
        sizes.append([sum(t.nbytes for t in layer.slot.state) for layer in cache.layers[::2]])
    assert sizes[0] == sizes[1]
    assert [isinstance(layer, StateLayer) for layer in cache.layers] == [True, False, True, False]
    assert cache.get_seq_length() == 12 and all(layer.get_seq_length() == 12 for layer in cache.layers)
    layer = cache.layers[0]
    before = layer.slot.state[0].clone()
    cache.batch_repeat_interleave(2)
    assert torch.equal(layer.slot.state[0], before.repeat_interleave(2, 0))
    cache.reorder_cache(torch.tensor([3, 0, 0, 1]))
    assert torch.equal(layer.slot.state[0], before[[1, 0, 0, 0]])
    cache.batch_select_indices(torch.tensor([0]))
    assert torch.equal(layer.slot.state[0], before[[1]])
    cache.reset()
    assert layer.slot.state is None and layer.get_seq_length() == 0


def test_cross_attention_is_never_converted_by_mistake():
    model = pico("llama")
    surgery = linearize.attach(model, None, "hedgehog")
    port = surgery._ports()[0]
    module = model.model.layers[0].self_attn
    with pytest.raises(Unsupported, match="called as cross-attention"):
        port.enter(module, (torch.zeros(1, 2, 32),), {"key_value_states": torch.zeros(1, 3, 32)})


# --------------------------------------------------------------------------------------------------------- packing
@pytest.mark.parametrize("settings", [{}, WINDOW], ids=["linear", "window"])
@pytest.mark.parametrize("every", [1, 2], ids=["all", "half"])
def test_packed_documents_never_see_each_other(settings, every):
    """position_ids that start again make documents: logits and every gradient are those of each alone."""
    model = pico("llama", head_dim=8).double()
    surgery = linearize.attach(model, linearize.find(model)[::every], "hedgehog", settings)
    tokens, borders = ids(23, batch=2), (0, 9, 10, 23)
    spans = list(zip(borders, borders[1:]))
    positions = torch.cat([torch.arange(b - a) for a, b in spans]).expand(2, -1)
    weights = [*surgery.parameters(), model.model.layers[0].self_attn.q_proj.weight, model.model.embed_tokens.weight]
    cotangent = torch.randn(2, 23, 97, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def gradients(out):
        return torch.autograd.grad((out * cotangent).sum(), weights)

    packed = model(tokens, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(tokens[:, a:b], use_cache=False).logits for a, b in spans], 1)
    close(packed, alone, 1e-7, "logits")  # rotary embeddings are float32
    for g, e in zip(gradients(packed), gradients(alone)):
        close(g, e, 1e-6, "gradient")


# ---------------------------------------------------------------------------------------------------------- modes
@pytest.mark.parametrize("every", [1, 2], ids=["all", "half"])
def test_teacher_is_the_model_before_surgery(every, expected):
    model = pico("llama")
    surgery = linearize.attach(model, linearize.find(model)[::every], "hedgehog", WINDOW)
    student = logits(model)
    assert not torch.equal(student, expected[0])
    with surgery.teacher():
        assert torch.equal(logits(model), expected[0])
        text = model.generate(ids(), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(logits(model), student)
    plain = pico("llama").generate(ids(), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(text, plain)


def test_teacher_has_lora_off(expected):
    model = pico("llama")
    surgery = linearize.attach(model, None, "hedgehog")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False), model)
    tuned = logits(model)
    assert not torch.allclose(tuned, expected[1])
    wanting = [p.requires_grad for p in model.parameters()]
    with surgery.teacher():
        assert torch.equal(logits(model), expected[0])
    assert torch.equal(logits(model), tuned)
    assert [p.requires_grad for p in model.parameters()] == wanting


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "gpt2", "falcon"])
@pytest.mark.parametrize("every", [1, 2], ids=["all", "half"])
def test_watch_keeps_the_stream_of_the_teacher(family, every):
    """Bit-exactly, with one call per site, and with what the mixer would have been given."""
    model = pico(family)
    batch = {"attention_mask": torch.tensor([[0] * 3 + [1] * 9, [1] * 12])}
    teacher = logits(model, **batch)
    surgery = linearize.attach(model, linearize.find(model)[::every], "hedgehog", WINDOW)
    student = logits(model, **batch)
    seen = []

    def watcher(site, mixer, q_BHTK, k_BGTK, v_BGTV, ctx, o_BHTV):
        shape = site.shape
        assert q_BHTK.shape == (2, shape.heads, 12, shape.key_dim) and k_BGTK.shape[1] == shape.kv_heads
        assert o_BHTV.shape == (2, shape.heads, 12, shape.value_dim)
        assert torch.equal(ctx.codes(q_BHTK) > 0, batch["attention_mask"].bool())
        assert mixer(q_BHTK, k_BGTK, v_BGTV, ctx).shape == o_BHTV.shape
        seen.append(site.name)

    with surgery.watch(watcher):
        assert torch.equal(logits(model, **batch), teacher)
    assert seen == [site.name for site in surgery.sites]
    assert torch.equal(logits(model, **batch), student)


def test_ablations_run_without_a_branch(expected):
    model = pico("llama")
    surgery = linearize.attach(model, None, "hedgehog", WINDOW)
    full = logits(model)
    with surgery.ablate("linear_off"):
        without_linear = logits(model)
    with surgery.ablate("window_off"):
        without_window = logits(model)
    assert torch.equal(logits(model), full)
    linearize.attach(model, None, "window", WINDOW)
    torch.testing.assert_close(without_linear, logits(model), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(without_window, expected[1], atol=1e-5, rtol=1e-4)
    pure = linearize.attach(model, None, "hedgehog")
    with pytest.raises(InputError, match="no branch to ablate"), pure.ablate("window_off"):
        pass


def test_a_handle_can_be_found_again():
    model = pico("llama")
    surgery = linearize.attach(model, linearize.find(model)[1:3], "hedgehog", WINDOW)
    again = linearize.Surgery.of(model)
    assert again is not None
    assert again.method == "hedgehog" and again.config == surgery.config and again.sites == surgery.sites
    assert list(again.mixers) == ["model.layers.1.self_attn", "model.layers.2.self_attn"]


# ------------------------------------------------------------------------------------------------ reading masks
def test_reading_a_four_dimensional_mask():
    """A token is real if it may see itself: never a row, never the last columns."""
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]]).bool()
    seen = (real[:, None, :] & real[:, :, None]).tril()
    sliding = seen & (torch.arange(6)[:, None] - torch.arange(6) < 2)
    for mask in (seen[:, None], sliding[:, None], sliding[:, None].expand(-1, 3, -1, -1)):
        for kind in (mask, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)):
            valid, segments = interface.read_mask(kind, 6, 0, packed=False)
            assert torch.equal(valid, real) and segments is None
    static = torch.nn.functional.pad(seen[:, None, 4:], (0, 10))  # two new tokens, a cache of 16 columns
    assert torch.equal(interface.read_mask(static, 2, 4, packed=False)[0], real[:, 4:])
    documents = torch.tensor([[0, 0, 1, 1, 1, 2]])
    packed = (documents[:, :, None] == documents[:, None]).tril()[:, None]
    assert torch.equal(interface.read_mask(packed, 6, 0, packed=True)[1], documents + 1)
    assert interface.read_mask(None, 6, 0, packed=True) == (None, None)
    with pytest.raises(RuntimeError, match="attn_implementation='sdpa'"):
        interface.read_mask("a block mask", 6, 0, packed=False)
