"""The road of diffusion models on tiny random ones: drawings, noise, losses, figures, files."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import pytest
import torch

import linearize
from linearize import api, denoisers, pipelines
from linearize.data import drawing
from linearize.data.latents import Latents
from linearize.data.noise import Noising
from linearize.data.selfgen import TIMES
from linearize.evaluate import judges
from linearize.plan import Plan
from linearize.seams.dit_inputs import small_inputs
from linearize.stages.base import Job
from linearize.stages.finetune import Finetune, finetune
from linearize.testing.pico import pico_diffusion
from linearize.types import InputError, Unsupported

FEW = ["data.self_tokens=640", "data.valid_tokens=192", "data.self_batch=4", "data.steps=2", "eval.steps=2"]
FEW += ["stages.finetune.tokens=256", "stages.finetune.batch=2"]


def scheduler(**more):
    return diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", **more)


def dit(**more):
    settings = {"in_channels": 1, "out_channels": 1, "num_layers": 2, "sample_size": 16, **more}
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_embeds_ada_norm=10, norm_num_groups=1, patch_size=2, **settings
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """The folder of a pipeline without an autoencoder."""
    folder = tmp_path_factory.mktemp("pipe")
    dit().save_pretrained(folder / "transformer")
    scheduler().save_pretrained(folder / "scheduler")
    parts = {"transformer": ["diffusers", "DiTTransformer2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **parts}))
    return folder


def contents(folder: Path):
    """All but what no data depend on."""
    kept = (path for path in folder.iterdir() if not path.name.startswith(".") and path.name != TIMES)
    return {path.name: path.read_bytes() for path in kept}


# ------------------------------------------------------------------------------------------------------------- drawings
def test_drawings_are_of_their_seed_alone(tmp_path):
    model, plan = dit(), {"steps": 2, "batch": 4}
    whole = drawing.draw_classes(model, scheduler(), 10, folder=tmp_path / "a", **plan)
    drawing.draw_classes(model, scheduler(), 4, folder=tmp_path / "b", **plan)
    again = drawing.draw_classes(model, scheduler(), 10, folder=tmp_path / "b", **plan)  # goes on
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and whole.digest == again.digest
    assert whole.conditions()["class_labels"].tolist() == list(range(10))
    found = drawing.read(tmp_path / "a")
    assert torch.equal(found.clean[:10], whole.clean[whole.order]) and found.positions == 64
    with pytest.raises(InputError, match=r"made otherwise \(steps\)"):
        drawing.draw_classes(model, scheduler(), 4, folder=tmp_path / "a", steps=3, batch=4)
    with pytest.raises(InputError, match="class 10 is none of the model's 10"):
        drawing.draw_classes(model, scheduler(), 4, classes=[10])
    (tmp_path / "a" / "shard-00001.safetensors").write_bytes(b"broken")
    mended = drawing.draw_classes(model, scheduler(), 10, folder=tmp_path / "a", **plan)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and mended.digest == whole.digest


def test_selfgen_survives_a_kill(pipe, tmp_path):
    """64 drawings, killed at whatever moment: the same bytes as without."""
    command = [sys.executable, "-m", "linearize.cli", "selfgen", "--model", str(pipe), "--num", "64", "--batch", "4"]
    command += ["--steps", "12", "-o", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "shard-00002.safetensors").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(contents(tmp_path / "killed")) < 17, "it was done before it was killed"
    for folder in ("killed", "whole"):
        answer = api.selfgen(tmp_path / folder, pipe, num=64, batch=4, steps=12)
        assert answer.drawings == 64 and answer.tokens == 64 * 64
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_guidance_takes_the_class_against_none():
    model, noise = dit(), drawing.noise_of(torch.arange(2), (1, 16, 16))
    labels = {"class_labels": torch.tensor([1, 2])}
    plain, same, more = (
        drawing.denoise(model, scheduler(), noise, labels, 2, guidance=g) for g in (1.0, 1.0 + 1e-9, 4.0)
    )
    assert torch.allclose(plain, same, atol=1e-5) and not torch.allclose(plain, more, atol=1e-3)


def test_a_pipeline_draws_from_prompts(tmp_path):
    """What the transformer was told is kept, so that it can be asked again."""
    from test_pipelines import pipeline

    pipe = pipeline("flux")
    told = {"prompt_embeds": torch.randn(2, 6, 12), "pooled_prompt_embeds": torch.randn(2, 8)}
    pipe.encode_prompt = lambda **more: (told["prompt_embeds"], told["pooled_prompt_embeds"], torch.zeros(6, 3))
    sizes = {"height": 64, "width": 96}
    made = drawing.draw_prompts(pipe, ["a", "b"], 2, steps=2, batch=2, folder=tmp_path / "d", **sizes)
    assert made.positions == 24 and made.clean.shape == (2, 24, 4)
    assert set(made.each) >= {"encoder_hidden_states", "pooled_projections"} and set(made.shared) >= {"img_ids"}
    batch = made.collate([made[0], made[1]])
    inputs, goal, t = Noising.of(pipe.scheduler, drawing.time_of(pipe.transformer)).batch(batch)
    with torch.no_grad():
        assert pipe.transformer(**inputs, return_dict=False)[0].shape == goal.shape
    assert float(inputs["timestep"].min()) > 0 and float(inputs["timestep"].max()) < 1
    assert drawing.read(tmp_path / "d").digest == made.digest


# ---------------------------------------------------------------------------------------------------------------- noise
@pytest.mark.parametrize("answer", ["epsilon", "v_prediction", "sample"])
def test_noise_is_mixed_as_the_scheduler_does(answer):
    own = scheduler(prediction_type=answer)
    noising, x, noise, t = (
        Noising.of(own),
        torch.randn(3, 1, 4, 4),
        torch.randn(3, 1, 4, 4),
        torch.tensor([3, 500, 990]),
    )
    mixed = noising.mix(x, noise, t)
    assert torch.allclose(mixed, own.add_noise(x, noise, t), atol=1e-6)
    goals = {"epsilon": noise, "sample": x, "v_prediction": own.get_velocity(x, noise, t)}
    assert torch.allclose(noising.goal(x, noise, t), goals[answer], atol=1e-6)
    snr = own.alphas_cumprod[t] / (1 - own.alphas_cumprod[t])
    wanted = {
        "epsilon": snr.clamp(max=5) / snr,
        "sample": snr.clamp(max=5),
        "v_prediction": snr.clamp(max=5) / (snr + 1),
    }
    assert torch.allclose(noising.min_snr(t), wanted[answer], rtol=1e-4)


def test_a_flow_goes_straight():
    own = diffusers.FlowMatchEulerDiscreteScheduler()
    noising, x, noise = Noising.of(own, 1e-3), torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    t = torch.tensor([250.0, 1000.0])
    mixed = noising.mix(x, noise, t)
    assert torch.allclose(mixed[0], 0.75 * x[0] + 0.25 * noise[0]) and torch.allclose(mixed[1], noise[1])
    assert torch.allclose(noising.goal(x, noise, t), noise - x)
    assert torch.allclose(noising.told(t), t / 1000)
    with pytest.raises(InputError, match="neither alphas_cumprod nor a flow"):
        Noising.of(diffusers.DPMSolverSinglestepScheduler(prediction_type="flow_prediction_"))


def test_timesteps_are_spread_evenly():
    t = Noising.of(scheduler()).draw(100)
    assert sorted((t // 10).tolist()) == list(range(100))


# --------------------------------------------------------------------------------------------------------------- losses
def job_of(model, method="clear", config=None, **more):
    surgery = linearize.attach(model, None, method, config or {"radius": 2})
    data = drawing.draw_classes(dit(), scheduler(), 8, steps=2, batch=4)
    return Job(model, surgery, data, noising=Noising.of(scheduler()), progress=False, **more)


def stage(**more):
    return Plan.read({"task": "diffusion", "stages": [{"kind": "finetune", "tokens": 640, "batch": 2, **more}]}).stages[
        0
    ]


def test_an_unchanged_model_has_no_loss_against_its_teacher():
    job = job_of(dit(), config={"radius": 99})
    found = Finetune(job, stage(denoise=1, prediction=1, attention=1))
    parts = found.loss(job.data.collate([job.data[0], job.data[1]]), 0)
    assert parts["prediction"] == 0 and parts["attention"] < 1e-10 and parts["denoise"] > 0.1
    changed = Finetune(job_of(dit()), stage(denoise=1, prediction=1, attention=1))
    parts = changed.loss(job.data.collate([job.data[0], job.data[1]]), 0)
    assert parts["prediction"] > 0 and parts["attention"] > 1e-4


def test_the_variance_is_learned_where_there_is_one():
    with pytest.raises(InputError, match="learns no variance"):
        Finetune(job_of(dit()), stage(variance=1))
    job = job_of(dit(out_channels=2))
    parts = Finetune(job, stage(prediction=0.5, variance=0.05)).loss(job.data.collate([job.data[0]]), 0)
    assert parts["variance"] > 0 and parts["denoise"] > 0


def test_training_lowers_the_loss_and_an_average_follows(tmp_path):
    torch.manual_seed(0)
    plan = stage(prediction=1, denoise=0, attention=0, mode="full", lr=3e-4, ema=0.9, precision="bfloat16")
    plan = plan.model_copy(update={"batch": 4, "tokens": 64 * 4 * 40})
    whole = job_of(dit(), work=tmp_path / "whole")

    teacher, batch = dit(), whole.data.collate([whole.data[i] for i in range(8)])

    def apart():
        torch.manual_seed(0)
        inputs = whole.prepared(batch)
        with torch.no_grad():
            return float((whole.model(**inputs).sample - teacher(**inputs).sample).square().mean())

    before = apart()
    finetune(whole, plan)
    assert apart() < 0.75 * before
    part = job_of(dit(), work=tmp_path / "part", checkpoint_steps=5)

    def stop(stage, step):
        if step == 12:
            raise KeyboardInterrupt

    part.on_step = stop
    with pytest.raises(KeyboardInterrupt):
        finetune(part, plan)
    again = job_of(dit(), work=tmp_path / "part", resume=True)
    finetune(again, plan)
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters()):
        assert torch.equal(a, b), name


# -------------------------------------------------------------------------------------------------------------- figures
def test_distances_of_sets():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4000, 3, generator=generator), torch.randn(4000, 3, generator=generator) * 2 + 1
    # Gaussians with diagonal covariances: |m|^2 + sum (s1 - s2)^2
    assert judges.frechet(a, b) == pytest.approx(3 + 3, rel=0.1) and judges.frechet(a, a) == pytest.approx(0, abs=1e-6)
    halves = judges.kernel_distance(a[:2000], a[2000:])
    assert abs(halves) < 0.05 < judges.kernel_distance(a, b)
    assert judges.recall_coverage(a[:200], a[:200]) == (1, 1)
    far = judges.recall_coverage(a[:200], a[:200] + 50)
    assert far == (0, 0)
    one = a[:1].expand(200, -1) + 1e-3 * a[:200]  # all drawings alike: what was real is not covered
    assert max(judges.recall_coverage(a[:200], one)) < 0.2


def test_figures_of_pairs():
    a = torch.rand(2, 1, 16, 16) * 2 - 1
    assert judges.ssim(a, a).tolist() == pytest.approx([1, 1]) and judges.psnr(a, a).tolist() == [100, 100]
    shifted = judges.psnr(torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.2))
    assert float(shifted) == pytest.approx(10 * math.log10(4 / 0.04))
    assert float(judges.ssim(a, -a)[0]) < 0


# ------------------------------------------------------------------------------------------------------------- the road
@pytest.mark.parametrize(
    "method, more",
    [
        ("clear", ["method.mixer.radius=2", "output.adapter_only=true"]),
        ("lit", ["stages.transfer.tokens=256", "stages.finetune.mode=full"]),
    ],
)
def test_convert_evaluate_load(pipe, tmp_path, method, more):
    recipe = tmp_path / "recipe.yaml"  # without one, a method of no parameters is a baseline and is not trained
    stages = [{"kind": kind} for kind in ("transfer", "finetune")]
    recipe.write_text(json.dumps({"version": 1, "task": "diffusion", "method": {"name": method}, "stages": stages}))
    done = api.convert(pipe, recipe=recipe, overrides=[*FEW, *more], output_dir=tmp_path / "out")
    rows = {row.name: row for row in done.report.rows}
    assert {"teacher", "teacher, other seeds", "swapped", "student", "zero-token window"} <= set(rows)
    assert rows["teacher, other seeds"].distance > rows["student"].distance > 0
    assert len(rows["student"].by_timestep) == 2 and set(rows["teacher"].image_seconds) == {4, 50}
    assert done.report.diagnostics.grid and "data:image/png" in (tmp_path / "out" / "report.html").read_text()
    inputs = small_inputs(done.model, (8, 8), 2)
    with torch.no_grad():
        expected = done.model(**inputs, return_dict=False)[0]
    if "output.adapter_only=true" in more:
        base = denoisers.load(str(pipe), denoisers.form_of(str(pipe)), torch.float32)
        before = {n: p.clone() for n, p in base.state_dict().items()}
        handle = pipelines.load(base, tmp_path / "out")
        assert handle.lora == "default"
    else:
        base = linearize.load(tmp_path / "out")
        with pytest.raises((OSError, ValueError)):
            diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "out")
        again = api.evaluate(tmp_path / "out")
        kept = next(row for row in again.rows if row.name == "student")
        assert kept.distance == pytest.approx(rows["student"].distance, rel=1e-3)
    with torch.no_grad():
        assert torch.allclose(base(**inputs, return_dict=False)[0], expected, atol=1e-5)
    if "output.adapter_only=true" in more:
        handle.save(tmp_path / "again")
        assert contents(tmp_path / "again") == {
            k: v for k, v in contents(tmp_path / "out").items() if k in ("linearize_config.json", "plugin.safetensors")
        }
        with handle.disabled():
            plain = base(**inputs, return_dict=False)[0]
        handle.remove()
        assert torch.equal(base(**inputs, return_dict=False)[0], plain)
        assert list(base.state_dict()) == list(before) and not hasattr(base, "peft_config")
        assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


def test_the_plugins_lora_stands_beside_the_users_own(tmp_path):
    from peft import LoraConfig

    def lora(model, name, seed):
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), adapter_name=name)
        for n, p in model.named_parameters():
            if f".{name}." in n:
                torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(seed))

    def run(model):
        with torch.no_grad():
            return model(**small_inputs(model, (3, 5)), return_dict=False)[0]

    model = pico_diffusion("flux")
    handle = pipelines.apply(model, "clear", radius=2)
    lora(model, "trained", 1)
    alone = run(model)
    handle.save(tmp_path / "plug", lora="trained")
    with pytest.raises(InputError, match="no LoRA is called 'other' here; there is trained"):
        handle.save(tmp_path / "other", lora="other")
    fresh = pico_diffusion("flux")
    lora(fresh, "own", 2)
    before, keys = run(fresh), list(fresh.state_dict())
    loaded = pipelines.load(fresh, tmp_path / "plug")
    both = run(fresh)
    assert not torch.allclose(both, alone, atol=1e-4) and not torch.allclose(both, before, atol=1e-4)
    loaded.disable()
    assert torch.allclose(run(fresh), before, atol=1e-6)
    loaded.enable()
    assert torch.equal(run(fresh), both)
    loaded.remove()
    assert torch.equal(run(fresh), before) and list(fresh.state_dict()) == keys
    plain = pico_diffusion("flux")
    pipelines.load(plain, tmp_path / "plug")
    assert torch.allclose(run(plain), alone, atol=1e-6)


@pytest.mark.parametrize(
    "override, said",
    [
        ("stages.finetune.kl=1", "stages.finetune.kl: no loss for drawings"),
        ("gate.mrr=1", "gate.mrr: is not measured on drawings"),
        ("data.chat=true", "data.chat: has no meaning for drawings"),
    ],
)
def test_problems(override, said):
    with pytest.raises(InputError, match=said):
        api.plan(dit(), "clear", task="diffusion", overrides=[override])


def test_what_cannot_be_drawn_says_so(tmp_path):
    with pytest.raises(InputError, match="draws no classes: give prompts"):
        drawing.draw_classes(pico_diffusion("flux"), scheduler(), 2)
    with pytest.raises(Unsupported, match="how it is told the time"):
        drawing.time_of(pico_diffusion("zimage"))
    with pytest.raises(InputError, match="no self-generated data"):
        drawing.read(tmp_path)
    data = Latents(torch.zeros(2, 3, 8, 8), {}, {}, torch.arange(2), 16, {})
    with pytest.raises(InputError, match="3 channels, the model takes 1"):
        data.check(dit().config)


def test_a_method_that_does_not_fit_is_refused_before_the_teacher_draws(monkeypatch, tmp_path):
    monkeypatch.setattr(drawing, "draw_classes", lambda *args, **more: pytest.fail("it drew"))
    with pytest.raises(Unsupported, match="rope"):
        api.convert(method="lawcat", task="diffusion", output_dir=tmp_path / "out")
    assert not any(tmp_path.iterdir())
