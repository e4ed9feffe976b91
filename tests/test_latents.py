"""Latent models: pictures through the autoencoder, and a larger teacher of the same latents."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from test_diffusion import dit, job_of, scheduler, stage

from linearize import api
from linearize.data import drawing
from linearize.data.autoencoder import Decoder, unpack
from linearize.data.noise import Noising
from linearize.plan import Plan
from linearize.stages.denoising import check_teacher
from linearize.stages.finetune import Finetune, finetune
from linearize.types import InputError, Unsupported

FAST = ["data.self_tokens=256", "data.valid_tokens=64", "data.self_batch=4", "data.steps=2", "eval.steps=2"]
FAST += ["stages.finetune.batch=2", "stages.finetune.tokens=64"]
ONE_STAGE = {"version": 1, "task": "diffusion", "method": {"name": "clear", "mixer": {"radius": 2}}}
ONE_STAGE["stages"] = [{"kind": "finetune", "attention": 0}]


def vae(seed=0, **more):
    torch.manual_seed(seed)
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4, **more}
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **sizes
    ).eval()


def latent_dit(**more):
    return dit(**{"in_channels": 4, "out_channels": 8, "sample_size": 8, **more})


def keep(folder, model, autoencoder=None, told=None):
    """A pipeline's folder."""
    model.save_pretrained(folder / "transformer")
    scheduler().save_pretrained(folder / "scheduler")
    parts = {"transformer": ["diffusers", type(model).__name__], "scheduler": ["diffusers", "DDIMScheduler"]}
    if autoencoder is not None:
        autoencoder.save_pretrained(folder / "vae")
        parts["vae"] = ["diffusers", "AutoencoderKL"]
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **parts, **(told or {})}))
    return folder


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return keep(tmp_path_factory.mktemp("latent"), latent_dit(), vae())


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A file: without one, a method of no parameters is a baseline and is not trained."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(json.dumps(ONE_STAGE))
    return path


# ------------------------------------------------------------------------------------------------------------- decoding
def test_pictures_are_the_pipelines_own():
    """Flux packs its latents, and its autoencoder has a shift as well."""
    from test_pipelines import pipeline

    pipe = pipeline("flux")
    pipe.vae = vae(latent_channels=1, scaling_factor=0.36, shift_factor=0.12)
    pipe.vae_scale_factor = 2
    pipe.image_processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=4)
    words = {"prompt_embeds": torch.randn(1, 6, 12), "pooled_prompt_embeds": torch.randn(1, 8)}
    call = {**words, "height": 16, "width": 24, "num_inference_steps": 2}

    def run(kind):
        return pipe(**call, output_type=kind, generator=torch.Generator().manual_seed(0)).images

    packed, pictures = run("latent"), run("pt")
    ids = pipe._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
    decoder = Decoder(pipe.vae)
    assert decoder.takes(pipe.transformer, packed, {"img_ids": ids})
    assert not decoder.takes(pipe.transformer, packed, {})
    made = decoder(packed, {"img_ids": ids})
    assert made.shape == pictures.shape == (1, 3, 16, 24)
    torch.testing.assert_close((made / 2 + 0.5).clamp(0, 1), pictures, atol=1e-5, rtol=0)


def test_unpacked_is_what_was_packed():
    latents = torch.randn(2, 3, 4, 10)
    packed = diffusers.FluxPipeline._pack_latents(latents, 2, 3, 4, 10)
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(2, 2, 5, "cpu", torch.float32)
    assert torch.equal(unpack(packed, ids), latents)


def test_batches_of_latents_and_what_has_no_scale():
    decoder, latents = Decoder(vae()), torch.randn(3, 4, 4, 6)
    own = decoder.vae.decode(latents / decoder.vae.config.scaling_factor).sample
    torch.testing.assert_close(decoder(latents, batch=2), own, atol=1e-5, rtol=0)
    with pytest.raises(Unsupported, match="names no scaling_factor"):
        other = vae()
        other.register_to_config(scaling_factor=None)
        Decoder(other)


def test_an_autoencoder_is_known_by_its_pictures():
    own, other = Decoder(vae()), Decoder(vae(seed=1))
    half = Decoder(vae().to(torch.bfloat16))
    assert own.apart(own) == 0 and own.apart(half) < 0.05 < own.apart(other)
    assert own.apart(Decoder(vae(scaling_factor=0.5))) > 0.05
    assert own.apart(Decoder(vae(latent_channels=8))) == float("inf")


def test_where_there_is_none(pipe, tmp_path):
    assert Decoder.of(None) is None and Decoder.of(str(keep(tmp_path / "pixels", dit()))) is None
    assert isinstance(Decoder.of(str(pipe)), Decoder)
    lost = keep(tmp_path / "lost", latent_dit(), told={"vae": ["diffusers", "AutoencoderKL"]})
    with pytest.raises(InputError, match="the autoencoder of .*lost cannot be read"):
        Decoder.of(str(lost))


def test_a_latent_model_is_measured_on_pictures(pipe, recipe, tmp_path):
    import base64
    import io

    from PIL import Image

    done = api.convert(pipe, recipe=recipe, overrides=FAST, output_dir=tmp_path / "out")
    rows = {row.name: row for row in done.report.rows}
    student = rows["student"]
    assert 0 < student.ssim < 1 and student.psnr > 0 and student.frechet_random is not None
    assert student.frechet is None and student.accuracy is None  # no judge was named for them
    assert "decoded; seen by a fixed random network" in done.report.evaluation
    assert not any("latents" in note for note in done.report.notes) and set(student.image_seconds) == {4, 50}
    sheet = Image.open(io.BytesIO(base64.b64decode(done.report.diagnostics.grid)))
    assert sheet.mode == "RGB" and sheet.size == (4 * 16, 3 * 16)  # four drawings: teacher, swapped, student
    again = next(row for row in api.evaluate(tmp_path / "out").rows if row.name == "student")
    assert again.ssim == pytest.approx(student.ssim, abs=1e-3)


def test_without_its_autoencoder_latents_are_measured_and_it_is_said(recipe, tmp_path):
    lost = keep(tmp_path / "lost", latent_dit(), told={"vae": ["diffusers", "AutoencoderKL"]})
    done = api.convert(lost, recipe=recipe, overrides=FAST, output_dir=tmp_path / "out")
    student = next(row for row in done.report.rows if row.name == "student")
    assert student.distance > 0 and student.ssim is None and done.report.diagnostics.grid is None
    assert any("are left out (the autoencoder of" in note for note in done.report.notes)


# ------------------------------------------------------------------------------------------------------ another teacher
def of_teacher(model, teacher, **losses):
    job = job_of(model, teachers={"XL": teacher})
    job.data = drawing.draw_classes(latent_dit(), scheduler(), 8, steps=2, batch=4)
    return job, stage(**{"teacher": "XL", "denoise": 0, "attention": 0, "prediction": 0.5, "variance": 0.05, **losses})


def test_its_answers_and_its_variance_are_the_targets():
    """From a copy of itself a model learns what it learns from itself; from another one, that one's."""
    big = latent_dit(num_layers=3)
    job, plan = of_teacher(latent_dit(), latent_dit())
    batch, found = job.data.collate([job.data[0], job.data[1]]), []
    for more in ({}, {"teacher": None}):
        tuned = Finetune(job, plan.model_copy(update=more))
        torch.manual_seed(0)
        found.append(tuned.loss(batch, 0))
    assert found[0].keys() == {"loss", "prediction", "variance"}
    assert all(torch.allclose(found[0][key], found[1][key], rtol=1e-5) for key in found[0])
    job.teachers = {"XL": big}
    tuned = Finetune(job, plan)
    torch.manual_seed(0)
    parts = tuned.loss(batch, 0)
    torch.manual_seed(0)
    inputs, _, _ = job.noising.batch(batch)
    with torch.no_grad():
        own, aim = (m(**inputs, return_dict=False)[0] for m in (job.model, big))
    errors = [(a - b).square().mean() for a, b in zip(own.chunk(2, 1), aim.chunk(2, 1))]
    assert torch.allclose(torch.stack([parts["prediction"], parts["variance"]]), torch.stack(errors), rtol=1e-4)
    assert torch.allclose(parts["loss"], 0.5 * errors[0] + 0.05 * errors[1], rtol=1e-4)


def test_training_comes_nearer_to_it():
    big = latent_dit(num_layers=3)
    job, plan = of_teacher(latent_dit(), big, mode="full", lr=1e-3, variance=0)
    weights = {n: p.clone() for n, p in big.named_parameters()}
    batch = job.data.collate([job.data[i] for i in range(8)])

    def apart():
        torch.manual_seed(0)
        inputs = job.prepared(batch)
        with torch.no_grad():
            pair = [m(**inputs, return_dict=False)[0][:, :4] for m in (job.model, big)]
        return float((pair[0] - pair[1]).square().mean())

    before = apart()
    finetune(job, plan.model_copy(update={"batch": 4, "tokens": 16 * 4 * 30}))
    assert apart() < 0.8 * before
    assert all(torch.equal(p, weights[n]) for n, p in big.named_parameters())


@pytest.mark.parametrize(
    "teacher, noise, decoder, said",
    [
        ({"sample_size": 16}, {}, None, "latents of side 16, not 8"),
        ({"num_embeds_ada_norm": 7}, {}, None, "num_embeds_ada_norm 7, not 10"),
        ({"in_channels": 8, "out_channels": 16}, {}, None, "channels 8, not 4"),
        ({}, {"prediction_type": "v_prediction"}, None, "it answers v_prediction of 1000 steps, not epsilon of 1000"),
        ({}, {"beta_schedule": "linear"}, None, "its noise follows another schedule"),
        ({}, {}, "none", "one of them draws pixels"),
        ({}, {}, "other", "their autoencoders make other pictures of the same latents"),
    ],
)
def test_who_cannot_teach(teacher, noise, decoder, said):
    other = latent_dit(**teacher) if "num_embeds_ada_norm" not in teacher else _classes(7)
    own = Noising.of(scheduler())
    its = Noising.of(diffusers.DDIMScheduler(**{"beta_schedule": "squaredcos_cap_v2", **noise}))
    mine = Decoder(vae())
    theirs = {"none": None, "other": Decoder(vae(seed=1))}.get(decoder, mine)
    with pytest.raises(InputError, match=f"teacher: XL cannot teach this DiTTransformer2DModel: {said}"):
        check_teacher("XL", latent_dit(), other, (own, its), (mine, theirs))
    check_teacher("XL", latent_dit(), latent_dit(num_layers=3), (own, own), (mine, Decoder(vae())))


def _classes(count):
    return diffusers.DiTTransformer2DModel.from_config({**latent_dit().config, "num_embeds_ada_norm": count})


@pytest.mark.parametrize(
    "task, losses, said",
    [
        ("diffusion", {"attention": 1}, "attention: another teacher has attention of other sizes"),
        ("diffusion", {"attention": 0, "prediction": 0, "denoise": 1}, "teacher: nothing is learned from it"),
        ("image", {}, "teacher: another teacher is for denoisers, this model is for images"),
    ],
)
def test_a_teacher_in_a_plan(task, losses, said):
    stages = [{"kind": "finetune", "teacher": "XL", **losses}]
    assert any(said in line for line in Plan.read({"task": task, "stages": stages}).problems())


def test_a_teacher_without_variance():
    with pytest.raises(InputError, match="variance: XL learns no variance"):
        Finetune(*of_teacher(latent_dit(), latent_dit(out_channels=4)))


def test_a_larger_teacher_on_the_road(pipe, recipe, tmp_path):
    large = keep(tmp_path / "large", latent_dit(num_layers=3), vae())
    more = [*FAST, f"stages.finetune.teacher={large}", "stages.finetune.variance=0.05", "stages.finetune.mode=full"]
    done = api.convert(pipe, recipe=recipe, overrides=more, output_dir=tmp_path / "out")
    assert "fine-tuned on the answers of large" in done.report.notes
    assert [stage.name for stage in done.report.stages] == ["selfgen", "finetune"]
    assert done.report.stages[1].series.keys() >= {"prediction", "variance", "denoise"}
    assert str(tmp_path) not in (tmp_path / "out" / "report.json").read_text()
    other = keep(tmp_path / "other", latent_dit(num_layers=3), vae(seed=1))
    with pytest.raises(InputError, match="teacher: other cannot teach .* autoencoders make other pictures"):
        api.convert(pipe, recipe=recipe, overrides=[*FAST, f"stages.finetune.teacher={other}"])
