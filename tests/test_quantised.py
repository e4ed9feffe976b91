"""A plug-in over a quantised base: mixers stay float32, and come out without a trace. Needs torchao or bitsandbytes."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from test_pipelines import run as answers
from test_pipelines import traces

from linearize import pipelines
from linearize.seams.dit_inputs import small_inputs
from linearize.surgery.port import CHILD
from linearize.testing.pico import pico_diffusion


def int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def int4():
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))


def torchao(settings):
    def quantise(model):
        pytest.importorskip("torchao", reason="torchao is not installed")
        from torchao.quantization import quantize_

        quantize_(model, settings(), filter_fn=lambda m, name: type(m) is torch.nn.Linear and m.in_features % 16 == 0)
        return model

    return quantise


def nf4(model):
    """Layer by layer: diffusers' own quantiser of bitsandbytes wants a GPU."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and layer.in_features % 32 == layer.out_features % 32 == 0:
            small = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, torch.float32)
            small.weight, small.bias = (
                bnb.nn.Params4bit(layer.weight.data, requires_grad=False, blocksize=32),
                layer.bias,
            )
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, small.to("cpu"))
    return model.eval()


QUANTISERS = {
    "torchao int8": torchao(int8),
    "torchao int4": torchao(int4),
    "bitsandbytes 4 bit": nf4,
}


def weights(model):
    """The plain tensors of each parameter, whatever wraps them."""
    inner = {n: getattr(p, "__tensor_flatten__", None) for n, p in model.named_parameters()}
    return {
        n: [getattr(p, part).clone() for part in inner[n]()[0]] if inner[n] else [p.detach().clone()]
        for n, p in model.named_parameters()
    }


def same(before, after):
    return before.keys() == after.keys() and all(
        len(before[n]) == len(after[n]) and all(map(torch.equal, before[n], after[n])) for n in before
    )


@pytest.mark.parametrize("family", ["flux", "sd3", "dit"])
@pytest.mark.parametrize("kind", list(QUANTISERS))
def test_a_plug_in_over_a_quantised_base(family, kind, tmp_path):
    grid = (4, 4) if family == "dit" else (3, 5)  # DiT draws squares alone
    run = partial(answers, grid=grid)
    plain = run(pico_diffusion(family))
    model = QUANTISERS[kind](pico_diffusion(family))
    kinds = {type(m.weight).__name__ for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert kinds - {"Parameter"}, "nothing was quantised"
    before, left, kept = run(model), traces(model), weights(model)
    assert not torch.equal(before, plain)

    handle = pipelines.apply(model, "hedgehog")
    parameters = handle.parameters()
    assert parameters and all(p.dtype == torch.float32 for p in parameters)
    assert all(type(p) is torch.nn.Parameter for p in parameters)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.2)
    answer = run(model)
    assert answer.isfinite().all() and not torch.equal(answer, before)
    with handle.disabled():
        assert torch.equal(run(model), before)

    if kind.startswith("torchao"):  # what bitsandbytes computes with in eval mode on a CPU has no backward
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        model(**small_inputs(model, grid, 1), return_dict=False)[0].square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in parameters)

    handle.save(tmp_path / "plug")
    handle.remove()
    assert torch.equal(run(model), before) and traces(model) == left
    assert same(kept, weights(model))
    loaded = pipelines.load(model, tmp_path / "plug")
    assert torch.equal(run(model), answer)
    loaded.remove()


@pytest.mark.parametrize("kind", ["torchao int8", "bitsandbytes 4 bit"])
def test_one_made_for_the_base_itself_fits_its_copy(kind, tmp_path):
    """And quantising afterwards passes the mixers by."""
    model = pico_diffusion("flux")
    handle = pipelines.apply(model, "hedgehog")
    mixers = {n: p.clone() for n, p in model.named_parameters() if CHILD in n}
    report = handle.report((64, 64))
    handle.save(tmp_path / "plug")
    if kind.startswith("torchao"):
        small = QUANTISERS[kind](copy.deepcopy(model))
        assert all(torch.equal(small.get_parameter(n), p) for n, p in mixers.items())
    small = QUANTISERS[kind](pico_diffusion("flux"))
    loaded = pipelines.load(small, tmp_path / "plug")
    assert all(small.get_parameter(n).dtype == torch.float32 for n in mixers)
    assert all(torch.equal(small.get_parameter(n), p) for n, p in mixers.items())
    assert loaded.report((64, 64)).rest == report.rest  # of products, however their weights are packed


def test_lora_acts_on_a_quantised_base():
    from peft import LoraConfig

    model = QUANTISERS["bitsandbytes 4 bit"](pico_diffusion("flux"))
    handle = pipelines.apply(model, "hedgehog")
    without = answers(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not torch.allclose(answers(model), without, atol=1e-4)
    handle.remove()
    assert not any(CHILD in name for name, _ in model.named_parameters())
