"""One table (pico.FAMILIES), one battery: every family, fully linear and with every second layer kept softmax.

No family has a line of its own here: what a family cannot do is a row of data below, with the reason.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import linearize
from linearize.surgery.port import CHILD
from linearize.testing.pico import FAMILIES, pico
from linearize.types import InputError, Unsupported

PURE, WINDOW = {}, {"window": 4, "sinks": 2}
#: the method, its settings, and which layers are converted
CONVERSIONS = {
    "linear-all": ("hedgehog", PURE, 1),
    "linear-half": ("hedgehog", PURE, 2),
    "window-all": ("hedgehog", WINDOW, 1),
    "window-half": ("hedgehog", WINDOW, 2),
    "lawcat-all": ("lawcat", {"half_life": 4}, 1),
    "lawcat-half": ("lawcat", {"half_life": 4, **WINDOW}, 2),
}
#: other methods than hedgehog are tried with these alone: a method sees no family
FEW = {"llama", "gemma2", "gpt2", "falcon"}
#: families whose positions come from the attention mask and are not to be given
COUNTS_ITS_OWN = {"opt"}
#: the third that also runs the heavier checks in the fast suite; the others do when slow tests run
HEAVY = {"llama", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "deepseek_v3", "falcon", "smollm3"}
LENGTHS = (12, 9, 4)  # of a ragged batch, padded on the left to WIDTH: more padding than the pico window of 6
WIDTH = 14

families = pytest.mark.parametrize("family", list(FAMILIES))
conversions = pytest.mark.parametrize(
    "family, conversion",
    [(f, c) for c, (method, *_) in CONVERSIONS.items() for f in FAMILIES if method == "hedgehog" or f in FEW],
)
some_families = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in HEAVY else pytest.mark.slow) for f in FAMILIES]
)


def convert(family, conversion, **overrides):
    """(model, its surgery)"""
    method, settings, every = CONVERSIONS[conversion]
    model = pico(family, **overrides)
    return model, linearize.attach(model, linearize.find(model)[::every], method, settings)


def prompts():
    return torch.randint(3, 97, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))


def ragged(family):
    """(a left-padded batch as keyword arguments, the rows alone)"""
    rows = [row[:n] for row, n in zip(prompts(), LENGTHS)]
    ids = torch.stack([nn.functional.pad(row, (WIDTH - len(row), 0)) for row in rows])
    mask = (torch.arange(WIDTH) >= WIDTH - torch.tensor(LENGTHS)[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    if family not in COUNTS_ITS_OWN:
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return batch, [row[None] for row in rows]


def real(logits, batch):
    return logits[batch["attention_mask"].bool()]


def tokens(model, ids, **settings):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **settings}
    torch.manual_seed(5)
    return model.generate(ids, **settings)


# ------------------------------------------------------------------------------------------------------- identity
@families
def test_identity_is_exact_and_detach_restores(family):
    """The softmax mixer changes nothing, not one bit; detach leaves no trace of any conversion."""
    model = pico(family)
    before = {n: (type(m), id(getattr(m, "config", None))) for n, m in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    implementation = model.config._attn_implementation
    batch, _ = ragged(family)
    with torch.no_grad():
        expected, text = (
            model(**batch).logits,
            tokens(model, batch["input_ids"], attention_mask=batch["attention_mask"]),
        )
    surgery = linearize.attach(model, None, "softmax")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(tokens(model, batch["input_ids"], attention_mask=batch["attention_mask"]), text)
    surgery.detach()
    for settings in (PURE, WINDOW):
        linearize.attach(model, None, "hedgehog", settings).detach()
    assert {n: (type(m), id(getattr(m, "config", None))) for n, m in model.named_modules()} == before
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)


@families
def test_every_layer_is_found(family):
    model = pico(family)
    sites = linearize.find(model)
    assert [s.layer for s in sites] == list(range(model.config.num_hidden_layers))
    linearize.attach(model, None, "none")
    assert sum(CHILD in name.split(".") for name, _ in model.named_modules()) == len(sites)


# -------------------------------------------------------------------------------------------------------- forward
@conversions
def test_padding_chunks_and_rows(family, conversion):
    """Ragged, left-padded batch == each row alone == prefill in chunks through a cache."""
    model, _ = convert(family, conversion)
    batch, rows = ragged(family)
    with torch.no_grad():
        together = real(model(**batch, use_cache=False).logits, batch)
        alone = torch.cat([model(row, use_cache=False).logits[0] for row in rows])
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)
        cache, outs, at = DynamicCache(config=model.config), [], 0
        for size in (6, 5, 1, 1, 1):
            part = {k: v[:, at : at + size] for k, v in batch.items()}
            part["attention_mask"] = batch["attention_mask"][:, : at + size]
            outs.append(model(**part, past_key_values=cache, use_cache=True).logits)
            at += size
        torch.testing.assert_close(real(torch.cat(outs, 1), batch), together, atol=2e-5, rtol=1e-4)
    assert cache.get_seq_length() == WIDTH


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")  # its new name is not in 5.17
@conversions
def test_backward_reaches_every_mixer_parameter(family, conversion):
    """And gradient checkpointing gives the same gradients."""
    model, surgery = convert(family, conversion)
    model.requires_grad_(False).train()
    parameters = surgery.parameters()
    for parameter in parameters:
        parameter.requires_grad_()
    # Checkpointed blocks want an input that asks for gradients, as LoRA's own hook gives it.
    model.enable_input_require_grads()

    def gradients():
        loss = model(prompts(), use_cache=False, labels=prompts()).loss
        return torch.autograd.grad(loss, parameters)

    plain = gradients()
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in plain)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for g, expected in zip(gradients(), plain):
        torch.testing.assert_close(g, expected, atol=1e-7, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------- generation
@conversions
def test_generation_with_state_equals_without(family, conversion):
    """Greedy, beams, sampling and a ragged batch; a static cache; a conversation continued from the returned cache."""
    model, _ = convert(family, conversion)
    ids = prompts()[:2]
    greedy = tokens(model, ids)
    assert torch.equal(greedy, tokens(model, ids, use_cache=False)), "greedy"
    for name, settings in {"beam": {"num_beams": 3}, "sampling": {"do_sample": True, "top_k": 20}}.items():
        assert torch.equal(tokens(model, ids, **settings), tokens(model, ids, use_cache=False, **settings)), name
    static = tokens(model, ids, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, greedy), "static cache"
    turn = tokens(model, ids, return_dict_in_generate=True)
    longer = torch.cat([turn.sequences, prompts()[:2, :3]], 1)
    assert torch.equal(tokens(model, longer, past_key_values=turn.past_key_values), tokens(model, longer)), "next turn"
    batch, rows = ragged(family)
    together = tokens(model, batch["input_ids"], attention_mask=batch["attention_mask"])[:, WIDTH:]
    alone = torch.cat([tokens(model, row)[:, row.shape[1] :] for row in rows])
    assert torch.equal(together, alone), "ragged batch"


# ------------------------------------------------------------------------------------------------ copies, adapters
@conversions
def test_a_copy_is_a_model_of_its_own(family, conversion):
    model, surgery = convert(family, conversion)
    ids = prompts()
    with torch.no_grad():
        expected = model(ids).logits
        other = copy.deepcopy(model)
        assert torch.equal(other(ids).logits, expected)
        surgery.detach()
        assert torch.equal(other(ids).logits, expected), "detaching the model changed its copy"
        again = linearize.Surgery.of(other)
        assert again is not None
        again.detach()
        assert torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@some_families
@pytest.mark.parametrize("conversion", ["linear-half", "window-all"])
def test_lora_beside_the_mixer(family, conversion):
    """Injected by name, off under teacher(), and merged without a difference."""
    model, surgery = convert(family, conversion)
    ids = prompts()
    linears = [
        name
        for site in linearize.find(model)
        for name, module in model.named_modules()
        if name.startswith(f"{site.name}.")
        and CHILD not in name
        and hasattr(module, "weight")
        and module.weight.ndim == 2
    ]
    with torch.no_grad(), surgery.teacher():
        teacher = model(ids).logits
    inject_adapter_in_model(LoraConfig(r=4, target_modules=linears, init_lora_weights=False), model)
    adapters = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    assert len(adapters) == len(linears)
    with torch.no_grad():
        with surgery.teacher():
            assert torch.equal(model(ids).logits, teacher)
        tuned = model(ids).logits
        for adapter in adapters:
            adapter.merge()
        torch.testing.assert_close(model(ids).logits, tuned, atol=1e-5, rtol=1e-4)
    loss = model(ids, labels=ids).loss
    assert loss.isfinite()


# -------------------------------------------------------------------------------------------------------- compile
@families
@pytest.mark.parametrize("conversion", ["linear-all", "linear-half"])
def test_compiles_to_one_graph(family, conversion):
    _compiles(family, conversion, "eager", 0.0)


# Eager code skips the merge with sinks of later documents where it sees that there are none: a tolerance of rounding.
@some_families
def test_a_windowed_hybrid_compiles_to_one_graph(family):
    _compiles(family, "window-half", "eager", 1e-6)


@pytest.mark.slow
@families
def test_a_windowed_model_compiles_to_one_graph(family):
    _compiles(family, "window-all", "eager", 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("conversion", ["linear-all", "window-half"])
def test_compiles_with_inductor(family, conversion):
    _compiles(family, conversion, "inductor", 1e-5)


def _compiles(family, conversion, backend, tolerance):
    model, _ = convert(
        family, conversion, num_hidden_layers=2, **({"n_layer": 2} if "n_layer" in FAMILIES[family] else {})
    )
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(prompts(), use_cache=False).logits
        found = torch.compile(model, fullgraph=True, backend=backend)(prompts(), use_cache=False).logits
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


# --------------------------------------------------------------------------------------------------- masks, rotary
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo3", "gpt2"])
def test_eager_masks_say_the_same(family):
    """The float 4-D masks of attn_implementation="eager", where sdpa has boolean ones or none."""
    batch, _ = ragged(family)
    logits = []
    for implementation in ("eager", "sdpa"):
        model = pico(family, attn_implementation=implementation)
        linearize.attach(model, linearize.find(model)[::2], "hedgehog", WINDOW)
        assert model.config._attn_implementation == implementation
        with torch.no_grad():
            logits.append(real(model(**batch, use_cache=False).logits, batch))
    torch.testing.assert_close(logits[0], logits[1], atol=2e-5, rtol=1e-4)


@families
def test_without_rope(family):
    """rope: undo works from the module's own rotary function, or is refused with the reason: never silently wrong."""
    model = pico(family)
    rotary = {
        "gpt2": "nothing to undo",
        "opt": "nothing to undo",
        "gpt_bigcode": "nothing to undo",
        "deepseek_v3": "cannot be undone",
    }
    if family in rotary:
        with pytest.raises(Unsupported, match=rotary[family]):
            linearize.attach(model, None, "hedgehog", {"rope": "undo"})
        assert linearize.Surgery.of(model) is None, "a refused attach must leave the model as it was"
        if family != "deepseek_v3":  # there is no rotation, so that all is as asked
            linearize.attach(model, None, "hedgehog", {"rope": "auto"})
        return
    # Feature maps look at single channels, so rotated ones know where they stand; un-rotated ones cannot.
    positions = torch.arange(prompts().shape[1])[None].expand_as(prompts())
    moved = {}
    for rope in ("keep", "undo", "auto"):
        linearize.attach(model, None, "hedgehog", {"rope": rope})
        with torch.no_grad():
            here, there = (model(prompts(), position_ids=positions + n, use_cache=False).logits for n in (0, 9))
        moved[rope] = (here - there).abs().max().item()
    assert moved["undo"] < 1e-4 and moved["keep"] > 100 * moved["undo"] and moved["auto"] == moved["undo"], moved


# -------------------------------------------------------------------------------------------------------- refusals
def test_alibi_is_refused_by_name():
    with pytest.raises(Unsupported, match="ALiBi"):
        linearize.find(pico("falcon", alibi=True))


@pytest.mark.parametrize(
    "family, sizes, named",
    [
        (
            "gptj",
            {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4},
            r"transformer\.h\.0\.attn \(GPTJAttention\)",
        ),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, r"transformer\.blocks\.0\.attn \(MptAttention\)"),
        ("bloom", {"hidden_size": 32, "n_head": 4, "n_layer": 2}, r"self_attention \(BloomAttention\)"),
        (
            "gpt_neo",
            {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "attention_types": [[["global"], 2]]},
            r"\(GPTNeoSelfAttention\)",
        ),
    ],
)
def test_softmax_by_hand_is_refused_by_name(family, sizes, named):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=97, **sizes))
    with pytest.raises(Unsupported, match=named):
        linearize.find(model)


def test_a_model_without_attention_is_refused():
    with pytest.raises(Unsupported, match="no softmax attention found in Linear"):
        linearize.find(nn.Linear(3, 3))


def test_a_model_without_a_vocabulary_needs_a_probe():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pico("llama")

        def forward(self, x):
            return self.inner(inputs_embeds=x).logits

    model = Odd().eval()
    with pytest.raises(InputError, match="pass probe="):
        linearize.attach(model, None, "hedgehog")
    x = torch.randn(1, 5, 32)
    before = model(x)
    surgery = linearize.attach(model, None, "hedgehog", probe=lambda m: m(x))
    assert not torch.equal(model(x), before)
    surgery.detach()
    assert torch.equal(model(x), before)
