"""Every recipe reads, agrees with itself and survives a round trip; mistakes are told with path and remedy."""

import re

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from linearize import api
from linearize.plan import Plan
from linearize.recipe import defaults as task_defaults
from linearize.recipe import folder, parse_override, recipe_for, recipes
from linearize.resolve import choose
from linearize.types import InputError

PAPERS = [
    *("hedgehog/llama-2-7b", "hedgehog/gpt2", "hedgehog/lolcats-llama-3-8b", "hedgehog/lolcats-mistral-7b"),
    *("lawcat/mistral-7b", "lawcat/llama-3.2-1b"),
    *("sea/opt-125m", "sea/opt-1.3b", "sea/bert-base-mnli"),
    *("hedgehog/bert-base-sst2", "hedgehog/vit-b-16", "lit/deit-tiny"),
    *("clear/flux.1-dev", "lit/dit-xl-2", "lit/pixart-sigma", "hedgehog/sd3.5-medium"),
]
OURS = [f"hedgehog/{name}" for name in ("demo", "stories15m", "stories15m-window", "stories260k", "smollm2-135m")]
OURS += ["lawcat/stories15m", "hedgehog/minilm-l6-v2", "sea/demo", "sea/stories15m", "sea/minilm-l6-v2"]
OURS += [
    f"{method}/{name}"
    for method in ("hedgehog", "lit", "clear")
    for name in ("demo-image", "vit-fashion-mnist", "demo-diffusion", "dit-fashion-mnist")
]


def test_these_are_there():
    assert set(recipes()) >= {*PAPERS, *OURS}
    assert (folder() / "LOG.md").is_file()


def test_the_log_is_newest_first():
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d): ", (folder() / "LOG.md").read_text(), re.MULTILINE)
    assert len(dates) > 40 and dates == sorted(dates, reverse=True)


@pytest.mark.parametrize("name", recipes())
def test_recipe_reads_checks_and_round_trips(name, tmp_path):
    plan = Plan.read(name)
    assert plan.problems() == []
    again = tmp_path / "resolved.yaml"
    again.write_text(plan.dump())
    assert Plan.read(again) == plan and Plan.read(str(again)).digest() == plan.digest()
    text = plan.explain()
    assert plan.method.name in text and all(stage.kind in text for stage in plan.stages)


@pytest.mark.parametrize("name", recipes())
def test_recipe_holds_only_what_differs(name):
    recipe = yaml.safe_load((folder() / f"{name}.yaml").read_text())
    defaults = task_defaults(recipe.get("task", "text"))
    assert recipe["version"] == 1 and "measured" in recipe
    for section in ("data", "eval", "gate"):
        same = [k for k, v in (recipe.get(section) or {}).items() if defaults.get(section, {}).get(k, ...) == v]
        # A recipe may repeat the zero-token window beside its own, where the two belong together.
        assert set(same) <= {"window", "sinks", "length", "limit"}, f"{name}: {section}: {same} are the defaults"


@pytest.mark.parametrize("name", PAPERS)
def test_papers_recipes_quote_their_numbers(name):
    plan = Plan.read(name)
    assert plan.measured == "not here" and "arXiv" in plan.published["source"]
    keys = list(yaml.safe_load((folder() / f"{name}.yaml").read_text()))
    assert keys[-2:] == ["published", "measured"]
    assert plan.model.form and plan.model.id


@pytest.mark.parametrize("name", [name for name in PAPERS + OURS if Plan.read(name).task != "text"])
def test_encoders_and_images_are_planned_offline(name):
    planned = api.plan(recipe=name)
    form, found = planned.plan.model.form, sum(len(group.sites) for group in planned.forecast.groups)
    if "num_hidden_layers" in form:
        assert found == form["num_hidden_layers"]
        return
    attentions = form["num_layers"] + form.get("num_single_layers", 0) + len(form.get("dual_attention_layers", ()))
    assert found == len(range(0, attentions, 2 if planned.plan.method.layers == "every:2" else 1))


def test_sizes_of_dit_that_nobody_published():
    for name, width in (("dit-s-2", 384), ("dit-b-2", 768), ("dit-l-2", 1024)):
        planned = api.plan(recipe=f"lit/{name}")
        assert planned.forecast.groups[0].shape["width"] == width and planned.plan.measured == "not here"


def test_a_recipe_is_found_by_short_name_and_by_form():
    assert Plan.read("gpt2") == Plan.read("hedgehog/gpt2")
    form = Plan.read("stories15m").model.form
    assert recipe_for(form) == "hedgehog/stories15m-window"
    assert recipe_for(form, "lawcat") == "lawcat/stories15m"
    assert Plan.read("stories15m") == Plan.read("hedgehog/stories15m"), "a short name is the default method's first"
    assert Plan.read("mistral-7b") == Plan.read("lawcat/mistral-7b")
    assert recipe_for({**form, "hidden_size": 1}) is None
    assert recipe_for(form, "window") is None
    assert recipe_for(Plan.read("gpt2").model.form) is None  # a paper's experiment is never taken unasked


def test_defaults_are_beneath_everything():
    plan = Plan.read({"stages": [{"kind": "transfer", "lr": 0.5}]})
    assert [s.kind for s in plan.stages] == ["transfer"] and plan.stages[0].lr == 0.5
    assert plan.stages[0].tokens == Plan.read().stages[0].tokens
    assert Plan.read({"method": {"name": "window"}}).method.mixer == {}
    assert Plan.read({"method": {"mixer": {"window": 8}}}).method.mixer == {"window": 8, "sinks": 4}
    assert Plan.read({"method": {"layers": 3}}).method.layers == "3"


def test_overrides():
    plan = Plan.read(
        "demo",
        ["stages.transfer.lr=1e-3", "stages.1.lora.r=4", "data.text-column=x", "method.mixer.window=16", "seed=7"],
    )
    assert plan.stages[0].lr == 1e-3 and plan.stages[1].lora.r == 4
    assert plan.data.text_column == "x" and plan.method.mixer["window"] == 16 and plan.seed == 7
    assert [s.kind for s in Plan.read("demo", ["stages.finetune=null"]).stages] == ["transfer"]
    assert Plan.read("demo", {"method.name": "window"}).method.mixer == {}
    assert parse_override("a.b=[1, 2e3]") == ("a.b", [1, 2000.0])
    stage = Plan.read("demo").limited(3).stages[0]
    assert stage.tokens == 3 * stage.batch * 256


def test_digest_is_of_what_decides_the_weights():
    plan = Plan.read("demo")
    assert plan.digest() == Plan.read("demo", {"output.folder": "elsewhere", "measured": "x"}).digest()
    spelled_out = {"method.mixer.combine": "lse"}  # the method's own default
    assert plan.digest() == Plan.read("demo", spelled_out).digest()
    for other in ({"seed": 1}, {"stages.transfer.lr": 0.1}, {"method.mixer.window": 8}, {"data.length": 128}):
        assert plan.digest() != Plan.read("demo", other).digest()


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"metod": {}}, "metod: unknown key, did you mean 'method'?"),
        ({"data": {"lenght": 3}}, "data.lenght: unknown key, did you mean 'length'?"),
        ({"stages": [{"kind": "transfer", "lrr": 1}]}, "stages.transfer.lrr: unknown key, did you mean 'lr'?"),
        ({"stages": [{"kind": "finetune", "lora": {"rank": 1}}]}, "stages.finetune.lora.rank: unknown key"),
        ({"stages": [{"kind": "transfre"}]}, "stages.0.kind: 'transfre' is no stage, did you mean 'transfer'?"),
        ({"stages": [{"lr": 1}]}, "stages.0.kind: None is no stage, choose from: transfer, finetune"),
        ({"stages": [{"kind": "transfer", "lr": "fast"}]}, "stages.transfer.lr: input should be a valid number"),
        ({"stages": {"kind": "transfer"}}, "stages: input should be a valid list"),
        ({"version": 2}, "version: input should be 1, not 2"),
        ({"model": {"dtype": "int4"}}, "model.dtype: input should be 'auto'"),
        ({"data": {"length": 0}}, "data.length: input should be greater than 1, not 0"),
        ({"data": None}, "data: "),
    ],
)
def test_mistakes_are_told_with_path_and_remedy(recipe, said):
    with pytest.raises(InputError) as caught:
        Plan.read(recipe)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(InputError) as caught:
        Plan.read({"modle": 1, "data": {"lenght": 3}, "stages": [{"kind": "x"}]})
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("a.b", "write a.b=c"),
        ("stages.transfer.lrr=1", "--set: stages.transfer.lrr: unknown key, did you mean 'lr'?"),
        ("stages.lora.lr=1", "no such stage; stages are 0 (transfer), 1 (finetune)"),
        ("stages.5.lr=1", "no such stage"),
        ("seed.x=1", "seed is a value"),
        ("data.length=[", "not valid YAML"),
    ],
)
def test_wrong_overrides(override, said):
    with pytest.raises(InputError) as caught:
        Plan.read("demo", [override])
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.name=hedgehgo", "did you mean 'hedgehog'?"),
        ("method.mixer.windw=3", "did you mean 'window'?"),
        ("method.mixer.combine=sum", "setting 'combine'"),
        ("method.layers=every:0", "is no layer list"),
        ("method.layers=0-3,x", "is no layer list"),
        ("data.length=1024", "more than the model's 512 positions"),
        ("stages.transfer.tokens=3", "less than one sequence"),
        ("stages.transfer.output=0", "nothing to learn"),
        ("stages.finetune.kl=0", "nothing to learn"),
        ("data.completion_only=true", "needs data.chat"),
        ("data.chat=true", "data.prompts that the teacher answers"),
        ("eval.sinks=32", "must be fewer"),
        ("model.form={hidden_size: 1}", "needs model_type"),
    ],
)
def test_problems(override, said):
    (problem,) = Plan.read("demo", [override]).problems()
    assert said in problem
    with pytest.raises(InputError):
        Plan.read("demo", [override]).checked()


@pytest.mark.parametrize(
    ("mixer", "layers", "allowed"),
    [
        ("{rope: undo, window: 0, sinks: 0}", "all", True),
        ("{rope: undo, window: 0, sinks: 0}", "auto", True),
        ("{rope: undo, window: 0, sinks: 0}", "keep:0", False),
        ("{rope: undo, window: 0, sinks: 4}", "all", False),  # sinks are softmax over rotated keys
        ("{rope: undo, window: 8, sinks: 0}", "all", False),
        ("{rope: keep, window: 0, sinks: 0}", "all", False),
    ],
)
def test_what_may_be_longer_than_the_positions(mixer, layers, allowed):
    plan = Plan.read("demo", [f"method.mixer={mixer}", f"method.layers={layers}", "data.length=1024"])
    assert plan.longer() is allowed
    assert any("512 positions" in problem for problem in plan.problems()) is not allowed


def test_layers_left_alone_keep_their_positions():
    """Whether layers "auto" means every layer is known only once the model's own sizes are."""
    with torch.device("meta"):
        config = AutoConfig.for_model(
            "gemma2", num_hidden_layers=4, sliding_window=16, hidden_size=64, head_dim=16, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=64, vocab_size=64, max_position_embeddings=512,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
    wanted = ["method.mixer={rope: undo, window: 0, sinks: 0}", "data.length=1024"]
    for layers, more in (("auto", ["data.length=512"]), ("auto", ["data.allow_longer=true"]), ("all", [])):
        choose(Plan.read("demo", [*wanted, f"method.layers={layers}", *more]), model)
    with pytest.raises(InputError, match=r"512 positions, which 2 layers .*model\.layers\.0\.self_attn.*--layers all"):
        choose(Plan.read("demo", [*wanted, "method.layers=auto"]), model)


def test_window_losses_need_a_window():
    found = Plan.read("stories15m", ["stages.transfer.far=1", "stages.transfer.window_drop=0.5"]).problems()
    assert len(found) == 2 and "needs a window" in found[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- 1", "must be a mapping"),
        ("a: [", "not valid YAML"),
        ("seed: 1\nseed: 2", "line 2: not valid YAML: key 'seed' stands twice"),
        (b"seed: \xff", "not UTF-8"),
    ],
)
def test_bad_recipe_files(tmp_path, content, said):
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=said) as caught:
        Plan.read(path)
    assert "\n" not in str(caught.value)


def test_unknown_recipes(tmp_path):
    with pytest.raises(InputError, match="did you mean 'hedgehog/gpt2'"):
        Plan.read("hedgehog/gpt3")
    with pytest.raises(InputError, match="no recipe file"):
        Plan.read(tmp_path / "none.yaml")
