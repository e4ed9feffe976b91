"""Encoders and vision transformers on the same road: convert, reload, measure again, resume, refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors
from tokenizers import models as token_models
from tokenizers import pre_tokenizers as splitters
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTForImageClassification,
)

import linearize
from linearize import api, conversion, models
from linearize.conversion import work_folder
from linearize.data.images import read_images
from linearize.data.painter import Painter
from linearize.data.text import Tokens
from linearize.plan import Plan
from linearize.report import readme, schema, verdict
from linearize.resolve import resolve
from linearize.testing.pico import pico, pico_config
from linearize.types import GateError, InputError, StorageError, Unsupported

WORDS = [
    "the",
    "a",
    "dog",
    "cat",
    "ball",
    "park",
    "sun",
    "runs",
    "sees",
    "likes",
    "red",
    "big",
    "small",
    "and",
    ".",
    "in",
]
SMALL = {
    "data.valid_tokens": 300,
    "stages.transfer.tokens": 1000,
    "stages.transfer.batch": 8,
    "stages.finetune.tokens": 1000,
    "stages.finetune.batch": 8,
    "stages.finetune.lora.r": 2,
    "eval.limit": 12,
    "eval.batch": 6,
}


# ---------------------------------------------------------------------------------------------------------- models
@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def vit(home) -> Path:
    """A classifier of 12 x 20 pixels: 3 x 5 patches."""
    torch.manual_seed(0)
    config = pico_config("vit", image_size=(12, 20), num_hidden_layers=2, num_channels=1, num_labels=3)
    ViTForImageClassification(config).save_pretrained(home / "vit")
    return home / "vit"


@pytest.fixture(scope="module")
def images(home) -> Path:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (80, 12, 20), dtype=np.uint8)
    np.savez(home / "images.npz", images=pixels, labels=np.arange(80) % 3)
    return home / "images.npz"


@pytest.fixture(scope="module")
def bert(home) -> Path:
    """An encoder as sentence-transformers keeps it, pooled by its first token."""
    folder = home / "bert"
    pico("bert", num_hidden_layers=2).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    marks = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    inner = Tokenizer(token_models.WordLevel({w: i for i, w in enumerate([*marks, *WORDS])}, unk_token="[UNK]"))
    inner.pre_tokenizer = splitters.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def prose(count: int, seed: int = 0) -> list[str]:
    draw = torch.Generator().manual_seed(seed)
    picks = [torch.randint(len(WORDS), (5 + i % 9,), generator=draw).tolist() for i in range(count)]
    return [" ".join(WORDS[j] for j in pick) for pick in picks]


@pytest.fixture(scope="module")
def texts(home) -> Path:
    (home / "texts.txt").write_text("\n".join(prose(120)))
    return home / "texts.txt"


@pytest.fixture(scope="module")
def pairs(home) -> Path:
    both = prose(24, seed=1)
    rows = [f"x\ty\tz\t{i}\t{i % 6}.5\t{both[2 * i]}\t{both[2 * i + 1]}" for i in range(12)]
    (home / "pairs.tsv").write_text("\n".join(rows))
    return home / "pairs.tsv"


@pytest.fixture(scope="module")
def seen(vit, images, home) -> Path:
    """The converted classifier."""
    api.convert(vit, data=str(images), overrides={**SMALL, "eval.curve": 600}, output_dir=home / "seen")
    return home / "seen"


@pytest.fixture(scope="module")
def read(bert, texts, pairs, home) -> Path:
    """The converted encoder."""
    api.convert(bert, data=str(texts), overrides={**SMALL, "eval.pairs": str(pairs)}, output_dir=home / "read")
    return home / "read"


# ----------------------------------------------------------------------------------------------------------- images
def test_images_are_measured_by_classes_and_features(seen):
    report = schema.read(seen, schema.Report)
    rows = {row.name: row for row in report.rows}
    assert {"teacher", "swapped", "after transfer", "student", "zero-token window", "none"} <= set(rows)
    teacher, student = rows["teacher"], rows["student"]
    assert (teacher.agreement, teacher.cosine, teacher.kl) == (1, 1, 0) and teacher.perplexity is None
    assert teacher.accuracy is not None and student.dense_cosine is not None and "cosine" in student.intervals
    assert report.task == "image" and report.state == {} and report.evaluation.startswith("held-out part of")
    assert [stage.steps for stage in report.stages] == [-(-1000 // (8 * 16))] * 2  # 15 patches and CLS
    assert report.curves["ratio"].y and {gaze.grid for gaze in report.diagnostics.gazes} == {(3, 5)}
    assert report.diagnostics.image and report.sample[0].image
    page = (seen / "report.html").read_text()
    assert "Attention over the image" in page and "<th>patches</th>" in page
    assert "image-classification" in (seen / "README.md").read_text()


def test_a_converted_classifier_reloads_the_same_three_ways(seen):
    pixels = torch.rand(2, 1, 12, 20, generator=torch.Generator().manual_seed(1))
    ours = linearize.load(seen)
    theirs = AutoModelForImageClassification.from_pretrained(seen, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(ours(pixel_values=pixels).logits, theirs(pixel_values=pixels).logits)
    assert [site["mixer"] for site in api.inspect(seen).sites] == ["hedgehog"] * 2
    with pytest.raises(InputError, match="generate continues text"):
        api.generate(seen)


def test_images_are_measured_again(seen, images):
    before = {row.name: row for row in schema.read(seen, schema.Report).rows}
    again = {row.name: row for row in api.evaluate(seen).rows}
    assert again["student"].agreement == before["student"].agreement
    assert again["student"].cosine == pytest.approx(before["student"].cosine, abs=1e-5)
    other = api.evaluate(seen, data=str(images), split="[:20]", limit=20)
    assert other.rows[0].documents == 20 and "top-1" in str(vars(other.render().renderables[0].columns[1])["header"])


def test_the_readme_has_a_table_for_encoders(seen, tmp_path):
    kept = schema.read(seen, schema.Report).result()
    schema.write(kept, tmp_path / "recipes" / "results" / "hedgehog" / "small-vit.json")
    (tmp_path / "README.md").write_text(
        "<!-- results:begin --><!-- results:end --><!-- encoders:begin --><!-- encoders:end -->"
    )
    assert readme.update(tmp_path) == ["README.md"]
    text = (tmp_path / "README.md").read_text()
    assert "hedgehog/small-vit" in text and "top-1" in text and "perplexity" not in text.lower()


def test_the_embedded_teacher_needs_no_images(tmp_path):
    """It is taught by images that are drawn, and says so."""
    settings = {**SMALL, "data.self_tokens": 197 * 40, "data.valid_tokens": 197 * 8, "eval.limit": 8}
    done = api.convert(None, task="image", overrides=settings, max_steps=1, output_dir=tmp_path / "out")
    assert "drawn" in done.report.evaluation and any("--dataset" in note for note in done.report.notes)
    assert done.report.evaluation.endswith("8 images of 28 x 28 pixels")
    painter = Painter.beside(models.TEACHERS / "image")
    assert painter is not None
    drawn = painter.draw(1100, seed=3)
    assert drawn.shape == (1100, 1, 28, 28) and torch.equal(drawn[:5], painter.draw(5, seed=3))
    assert drawn.float().std(0).mean() > 30 and not torch.equal(drawn[:5], painter.draw(5, seed=4))
    (tmp_path / "painter.safetensors").write_bytes(b"no")
    with pytest.raises(StorageError, match="delete it"):
        Painter.beside(tmp_path)


def test_a_painter_draws_what_it_was_fitted_to():
    """Two kinds of images, each with one direction of its own: means and spreads come back."""
    draw = torch.Generator().manual_seed(0)
    basis = torch.eye(12).view(12, 1, 3, 4)
    x = torch.full((2000, 1, 3, 4), 60.0) + 20 * torch.randn(2000, 1, 1, 1, generator=draw) * basis[2]
    x[1000:] += 90 + 20 * torch.randn(1000, 1, 1, 1, generator=draw) * basis[7]
    made = Painter.fit(x.clamp(0, 255).to(torch.uint8), [torch.arange(1000), torch.arange(1000, 2000)], 4)
    drawn = made.draw(4000, seed=0).float()
    bright = drawn[:, 0, 0, 0] > 100
    assert 0.45 < bright.float().mean() < 0.55
    torch.testing.assert_close(drawn[bright].mean(0), x[1000:].mean(0), atol=2, rtol=0)
    torch.testing.assert_close(drawn[~bright].std(0)[0, 0, 2], torch.tensor(20.0), atol=2, rtol=0)
    assert drawn[~bright].std(0)[0, 1, 3] < 4 < 15 < drawn[bright].std(0)[0, 1, 3]


def test_a_model_in_hand_takes_images_in_hand(vit, images):
    model = models.load_model(vit).model
    data = read_images(images, model.config, label_column="none")
    done = linearize.convert(model, data=data, overrides=SMALL, max_steps=1)
    student = done.report.row("student")
    assert done.folder is None and done.model is model and student is not None
    assert student.accuracy is None and student.retained is None and student.agreement is not None
    done.surgery.detach()


@pytest.mark.parametrize("moment", [("transfer", 3), ("finetune", 4)])
def test_a_stopped_run_ends_with_the_same_bytes(seen, vit, images, tmp_path, moment):
    class Stop(BaseException):
        pass

    def stop(stage: str, step: int) -> None:
        if (stage, step) == moment:
            raise Stop

    settings = {**SMALL, "eval.curve": 600, "data.source": str(images), "output.folder": str(tmp_path / "out")}
    resolved = resolve(vit, overrides=settings)
    with pytest.raises(Stop):
        conversion.run(resolved, on_step=stop)
    assert work_folder(tmp_path / "out").exists() and not (tmp_path / "out").exists()
    conversion.run(resolved, resume=True)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (seen / name).read_bytes()


def command(*words: object, settings: dict = SMALL) -> list[str]:
    said = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "linearize.cli", "convert", *map(str, words), *said]


def environment() -> dict[str, str]:
    here = str(Path(linearize.__file__).parent.parent)
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["transfer-", "finetune-", "scores/student"])
def test_kill_nine_of_a_classifier_then_resume_gives_the_same_bytes(seen, vit, images, tmp_path, moment):
    words = command("--model", vit, "--dataset", images, "-o", tmp_path / "out", settings={**SMALL, "eval.curve": 600})
    work = work_folder(tmp_path / "out")
    with subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(moment in str(p) for p in work.rglob("*")):
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()
    done = subprocess.run([*words, "--resume"], env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (seen / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_processes_convert_an_encoder_as_one_does(bert, texts, tmp_path):
    """The same steps of texts of unlike length: each process has its half of a step, and their losses are one's."""
    found = []
    for name in ("one", "two"):
        words = command("--model", bert, "--dataset", texts, "-o", tmp_path / name, "--json")
        many = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"] if name == "two" else []
        run = [words[0], *many, *words[1:]]
        done = subprocess.run(run, env=environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout)["method"] == "hedgehog"  # one answer, not two
        found.append(models.load(tmp_path / name).state_dict())
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-3) for n in found[0])
    original = AutoModel.from_pretrained(bert).state_dict()
    assert any(not torch.allclose(found[1][n], original[n], atol=1e-3) for n in original)


def test_an_adapter_of_a_classifier_knows_its_base(vit, images, tmp_path):
    settings = {**SMALL, "output.adapter_only": True, "stages.finetune.task": 1.0, "stages.finetune.hidden": 0.1}
    api.convert(vit, data=str(images), overrides=settings, output_dir=tmp_path / "adapter")
    api.merge(tmp_path / "adapter", tmp_path / "full")
    pixels = torch.rand(2, 1, 12, 20)
    with torch.no_grad():
        apart, whole = (linearize.load(tmp_path / name)(pixel_values=pixels).logits for name in ("adapter", "full"))
    torch.testing.assert_close(apart, whole, atol=1e-5, rtol=0)
    other = models.load_model(vit).model
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    with pytest.raises(InputError, match="was made for"):
        linearize.load(other, adapter=tmp_path / "adapter")


def test_lit_and_clear_take_the_same_road(vit, images, tmp_path):
    done = api.convert(vit, "lit", data=str(images), overrides=SMALL, max_steps=2, output_dir=tmp_path / "lit")
    assert [stage.steps for stage in done.report.stages] == [2, 2] and done.report.diagnostics.gazes
    settings = {**SMALL, "method.mixer.radius": 9}
    done = api.convert(vit, "clear", data=str(images), overrides=settings, output_dir=tmp_path / "clear")
    student = done.report.row("student")
    assert student is not None and student.agreement == 1 and done.report.stages == []  # beyond the diagonal
    settings = {**SMALL, "method.mixer.radius": 2, "stages.transfer.far": 0.5, "gate.cosine": 0.01}
    done = api.convert(vit, data=str(images), overrides=settings, max_steps=2, output_dir=tmp_path / "circle")
    assert {"window_off", "linear_off"} <= {row.name for row in done.report.rows}
    assert any("linear branch" in line for line in [done.report.verdict.headline, *done.report.verdict.lines])
    with pytest.raises(InputError, match="may be negative"):
        inline = {**SMALL, "method.mixer.normaliser": "inline", "stages.transfer.map": 1.0}
        api.plan(vit, "lit", overrides=inline)


# -------------------------------------------------------------------------------------------------------- sentences
def test_sentences_are_measured_by_their_vectors(read, bert):
    report = schema.read(read, schema.Report)
    rows = {row.name: row for row in report.rows}
    assert {"teacher", "swapped", "student", "zero-token window", "none"} <= set(rows)
    assert rows["student"].spearman is not None and rows["student"].retained is not None
    assert rows["student"].accuracy is None and rows["student"].documents == 12
    assert all(900 < stage.tokens < 1100 for stage in report.stages)  # counted by what is there, not by the longest
    assert report.task == "sentences" and "12 pairs of pairs.tsv" in report.evaluation and report.sample
    assert (read / "1_Pooling" / "config.json").read_bytes() == (bert / "1_Pooling" / "config.json").read_bytes()
    assert (read / "modules.json").is_file() and "sentence-similarity" in (read / "README.md").read_text()


def test_a_converted_encoder_reloads_the_same(read):
    batch = tokenizer()(["the dog runs .", "a cat"], padding=True, return_tensors="pt")
    ours, theirs = linearize.load(read), AutoModel.from_pretrained(read, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(ours(**batch).last_hidden_state, theirs(**batch).last_hidden_state)


def test_sentences_are_measured_again(read, pairs):
    before = schema.read(read, schema.Report).row("student")
    again = {row.name: row for row in api.evaluate(read).rows}["student"]
    assert before is not None
    assert again.spearman == pytest.approx(before.spearman, abs=1e-4)
    assert again.cosine == pytest.approx(before.cosine, abs=1e-5)


def test_passages_find_their_halves(bert, home, tmp_path):
    (home / "long.txt").write_text(" ".join(prose(60)))
    settings = {**SMALL, "data.length": 24, "data.minimum": 12, "eval.length": 24, "eval.minimum": 12}
    done = api.convert(bert, data=str(home / "long.txt"), overrides=settings, max_steps=2, output_dir=tmp_path / "o")
    teacher = done.report.row("teacher")
    assert teacher is not None and 0 < teacher.mrr <= 1
    assert [stage.steps for stage in done.report.stages] == [2, 2]


def test_classes_of_texts(home, texts, tmp_path):
    torch.manual_seed(0)
    config = pico_config("bert", num_hidden_layers=2, num_labels=2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(home / "classes")
    tokenizer().save_pretrained(home / "classes")
    rows = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(prose(60))]
    (home / "classes.jsonl").write_text("\n".join(rows))
    settings = {**SMALL, "data.label_column": "label", "stages.finetune.kl": 1.0, "stages.finetune.task": 0.5}
    source = str(home / "classes.jsonl")
    done = api.convert(home / "classes", data=source, overrides=settings, output_dir=tmp_path / "o")
    student = done.report.row("student")
    assert student is not None and student.accuracy is not None and student.agreement is not None
    with pytest.raises(InputError, match="the data has no labels"):
        more = {**SMALL, "stages.finetune.task": 1}
        api.convert(home / "classes", data=str(texts), overrides=more, output_dir=tmp_path / "p")
    assert [path.name for path in tmp_path.iterdir()] == ["o"]  # told before anything is trained


def test_a_tower_without_a_classifier(home, images, tmp_path):
    pico("dinov2", image_size=12, num_hidden_layers=2, num_channels=1).save_pretrained(home / "tower")
    done = api.convert(home / "tower", data=str(images), overrides=SMALL, max_steps=2, output_dir=tmp_path / "o")
    student = done.report.row("student")
    assert student is not None and student.cosine is not None and student.kl is None and student.agreement is None


def test_layers_that_share_a_module_are_all_taught(texts, home, tmp_path):
    pico("albert", num_hidden_layers=3).save_pretrained(home / "albert")
    tokenizer().save_pretrained(home / "albert")
    done = api.convert(home / "albert", data=str(texts), overrides=SMALL, max_steps=2, output_dir=tmp_path / "o")
    assert len([key for key in done.report.stages[0].series if key.startswith("layer.")]) == 3


# ---------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "settings, says",
    [
        ({"stages.finetune.lm": 1}, "stages.finetune.lm: no loss for images"),
        ({"data.chat": True}, "data.chat: has no meaning for images"),
        ({"eval.pairs": "x"}, "eval.pairs: scored pairs are of sentences"),
        ({"gate.perplexity_ratio": 1.1}, "gate.perplexity_ratio: is not measured on images"),
        ({"task": "text"}, "is a model for image"),
    ],
)
def test_what_does_not_fit_images_is_told(vit, images, settings, says):
    with pytest.raises(InputError, match=says):
        resolve(vit, overrides={**settings, "data.source": str(images)})


def test_other_data_than_the_model_reads_are_told(vit, bert, images, texts, tmp_path):
    with pytest.raises(InputError, match="feature: no loss for text"):
        resolve(None, overrides={"stages.finetune.feature": 1.0})
    with pytest.raises(InputError):
        api.convert(vit, data=str(texts), output_dir=tmp_path / "a")
    with pytest.raises(InputError):
        api.convert(bert, data=str(images), output_dir=tmp_path / "b")
    with pytest.raises(InputError, match="name images to train on"):
        api.convert(vit, output_dir=tmp_path / "c")
    with pytest.raises(InputError, match="are no images"):
        api.convert(vit, data=Tokens.__new__(Tokens), output_dir=tmp_path / "d")
    assert not list(tmp_path.iterdir())


def test_labels_outside_the_head_and_a_missed_gate(vit, images, home, tmp_path):
    with np.load(images) as kept:
        np.savez(home / "wrong.npz", images=kept["images"], labels=np.arange(80) % 5)
    with pytest.raises(InputError, match="outside the model's head"):
        api.convert(vit, data=str(home / "wrong.npz"), overrides=SMALL, output_dir=tmp_path / "o")
    with pytest.raises(GateError, match="retained"):
        settings = {**SMALL, "gate.retained": 50.0}
        api.convert(vit, data=str(images), overrides=settings, max_steps=1, output_dir=tmp_path / "o")
    assert (tmp_path / "o" / "report.json").is_file()


def test_the_verdict_on_an_encoder():
    teacher = schema.Row(name="teacher", spearman=0.8, cosine=1, mrr=0.5)
    student = schema.Row(name="student", spearman=0.76, retained=0.95, cosine=0.97, mrr=0.45)
    found = verdict.judge([teacher, student], {"retained": 0.94, "cosine": 0.98, "mrr": 0.9})
    assert found.level == "failed" and [gate.passed for gate in found.gates] == [True, False, True]
    assert found.gates[2].got == pytest.approx(0.9)
    assert verdict.judge([teacher, student]).headline == "95.00 % of the teacher's Spearman correlation"
    window = schema.Row(name="zero-token window", spearman=0.77, cosine=0.9)
    assert verdict.judge([teacher, student, window]).level == "weak"
    off = schema.Row(name="linear_off", spearman=0.76, cosine=0.97)
    assert verdict.judge([teacher, student, off]).level == "dead"


def test_a_model_of_two_towers_and_an_encoder_decoder_are_refused():
    for family, says in (("t5", "encoder-decoder"), ("clip", "several towers")):
        with pytest.raises(Unsupported, match=says):
            resolve(None, recipe={"model": {"form": {"model_type": family}}}, offline=True)


def test_a_method_that_does_not_fit_is_refused_with_its_reason(vit, bert, texts, tmp_path):
    for method, model, says in (("clear", bert, "no rows and columns"), ("lit", bert, "text has none")):
        with pytest.raises(Unsupported, match=says) as caught:
            api.convert(model, method, data=str(texts), output_dir=tmp_path / "o")
        assert caught.value.code == 3 and not list(tmp_path.iterdir())


def test_the_task_is_told_by_the_model(vit, bert):
    assert Plan.read(None, {}, "image").task == "image" and resolve(bert).plan.task == "sentences"
    planned = api.plan(vit)
    assert planned.plan.task == "image" and planned.plan.mixer().window == 0
    with pytest.raises(InputError, match="task: sentences was asked for"):
        resolve(vit, task="sentences")
    with pytest.raises(InputError, match="did you mean 'image'"):
        resolve(None, task="images")
