"""The whole road, as a user walks it: convert, reload, interrupt, resume, refuse."""

from __future__ import annotations

import copy
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import linearize
from linearize import api, models
from linearize.conversion import _origin, work_folder
from linearize.types import GateError, InputError, StorageError

ROOT = Path(linearize.__file__).parent.parent
STORY = "once upon a time there was a little dog who loved to run and play with a red ball in the sunny park"
SMALL = {
    "data.length": 64,
    "data.valid_tokens": 512,
    "stages.transfer.tokens": 1536,
    "stages.transfer.batch": 4,
    "stages.finetune.tokens": 1536,
    "stages.finetune.batch": 4,
    "stages.finetune.lora.r": 2,
    "method.mixer.window": 8,
    "eval.window": 8,
    "eval.limit": 6,
    "eval.generate": 8,
    "eval.window_only": False,  # it costs as much as all the rest
}
SET = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
MORE = ["--set", "eval.window_only=true", "--set", "eval.curve=600", "--set", "eval.parts.first=0-2"]
STAGES = {f"stages.{k}.tokens": 512 for k in ("transfer", "finetune")}


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "stories.jsonl"
    lines = []
    for i in range(60):
        words = STORY.split(" ")
        order = torch.randperm(len(words), generator=torch.Generator().manual_seed(i)).tolist()
        lines.append(json.dumps({"text": " ".join(words[j] for j in order * 3).capitalize() + "."}))
    file.write_text("\n".join(lines))
    return file


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "linearize.cli", *map(str, words)]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def run(*words: object, **more) -> subprocess.CompletedProcess:
    return subprocess.run(command(*words), env=environment(), capture_output=True, text=True, timeout=600, **more)


@pytest.fixture(scope="module")
def converted(stories, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "converted"
    done = run("convert", "--dataset", stories, "-o", folder, *SET, *MORE, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["method"] == "hedgehog"
    return folder


def test_a_window_only_student_needs_no_finetune_stage(stories, tmp_path):
    settings = {k: v for k, v in SMALL.items() if "finetune" not in k} | {
        "eval.window_only": True,
        "stages.finetune": None,
    }
    done = linearize.convert(None, data=str(stories), overrides=settings, output_dir=tmp_path / "out")
    assert [stage.name for stage in done.report.stages] == ["transfer"]
    assert "window-only student" in [row.name for row in done.report.rows]


def test_the_folder_holds_what_is_promised(converted):
    names = {p.name for p in converted.iterdir()}
    assert {
        "model.safetensors", "config.json", "tokenizer.json", "resolved_recipe.yaml", "report.json", "report.html",
        "README.md", "modeling_linearized.py",
    } <= names  # fmt: skip
    assert not work_folder(converted).exists()
    report = json.loads((converted / "report.json").read_text())
    assert report["implementations"]["mapped_linear"] == ["torch"]
    assert report["model"]["license"] == "apache-2.0" and "license: apache-2.0" in (converted / "README.md").read_text()
    rows = {row["name"] for row in report["rows"]}
    assert rows >= {
        "teacher", "swapped", "after transfer", "student", "zero-token window", "window-only student", "window_off",
        "linear_off",
    }  # fmt: skip
    assert report["state"]["1024"]["state_bytes"] < report["state"]["1024"]["kv_bytes"]
    assert report["sample"] and report["diagnostics"]["pictures"]
    assert report["curves"]["ratio"]["x"] == [768, 1280, 1536, 2048, 2560, 3072]
    parts = {row["name"]: row["parts"]["first"]["nll"] for row in report["rows"]}
    assert len(parts) == len(rows) and parts["teacher"] != report["rows"][0]["nll"]


def test_it_reloads_and_decodes_the_same_both_ways(converted):
    from transformers import AutoModelForCausalLM

    ours = linearize.load(converted)
    theirs = AutoModelForCausalLM.from_pretrained(converted, trust_remote_code=True)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    more = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(ids, **more), theirs.generate(ids, use_cache=False, **more))


def test_the_other_commands_read_it(converted, stories):
    assert api.generate(converted, "Once upon", max_new_tokens=4).tokens == 4
    measured = api.evaluate(converted, limit=4, length=48)  # on the held-out text in the folder
    again = api.evaluate(converted, data=str(stories), limit=4, length=48)
    assert again.evaluation != measured.evaluation
    assert {row.name for row in measured.rows} >= {"teacher", "student", "linear_off", "zero-token window"}
    assert measured.rows[0].name == "teacher" and measured.rows[0].kl == 0
    out = io.StringIO()
    Console(file=out, width=200).print(measured.render())
    assert "layers." in out.getvalue() and "Repeated 4-grams" in out.getvalue()
    assert measured.as_dict()["generation"]["nll_student"] > 0
    assert len(api.inspect(converted).sites) == 5
    assert api.report(converted).report.method == "hedgehog"


def test_an_adapter_is_small_and_merges_to_the_same_model(stories, tmp_path):
    settings = {**SMALL, **STAGES, "output.adapter_only": True}
    api.convert(None, data=str(stories), overrides=settings, output_dir=tmp_path / "adapter")
    size = sum(p.stat().st_size for p in (tmp_path / "adapter").glob("*.safetensors"))
    assert size < 4_000_000
    api.merge(tmp_path / "adapter", tmp_path / "full")
    assert api.generate(tmp_path / "adapter", "Once upon", max_new_tokens=4).tokens == 4
    assert api.evaluate(tmp_path / "adapter", limit=2, length=48).rows[0].name == "teacher"
    assert api.inspect(tmp_path / "adapter").method == "hedgehog"
    api.export(tmp_path / "adapter", tmp_path / "exported")
    assert weights(tmp_path / "exported") == weights(tmp_path / "full")
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        whole, apart = linearize.load(tmp_path / "full")(ids).logits, linearize.load(tmp_path / "adapter")(ids).logits
    assert torch.allclose(whole, apart, atol=1e-4)


def test_the_teacher_completes_prompts(stories, tmp_path):
    settings = {**SMALL, **STAGES, "data.prompts": str(stories), "data.completion_only": True, "data.length": 256}
    done = linearize.convert(None, overrides=settings, output_dir=tmp_path / "out")
    assert done.report.evaluation.startswith("held-out part of text the teacher wrote")
    with pytest.raises(InputError, match="drop them"):
        linearize.convert(None, data=str(stories), overrides=settings, output_dir=tmp_path / "other")


def test_runs_of_other_seeds_share_what_the_teacher_wrote(tmp_path):
    found = []
    for seed in (0, 1):
        settings = {**SMALL, **STAGES, "seed": seed, "data.self_folder": str(tmp_path / "text"), "data.self_seed": 5}
        done = linearize.convert(None, overrides=settings, output_dir=tmp_path / str(seed))
        index = (tmp_path / "text" / "index.json").read_bytes()
        found.append((index, [p.stat().st_mtime_ns for p in sorted((tmp_path / "text").glob("shard-*"))]))
        assert done.report.seeds == [seed]
    assert found[0] == found[1]
    assert weights(tmp_path / "0") != weights(tmp_path / "1")


def test_two_stages_of_a_kind_both_run(stories, tmp_path):
    transfer = {"kind": "transfer", "tokens": 512, "batch": 4, "lr": 1e-2}
    recipe = {"stages": [transfer, {**transfer, "target": "linear"}]}
    settings = {k: v for k, v in SMALL.items() if "stages" not in k}
    done = linearize.convert(
        None, recipe=recipe, data=str(stories), overrides=settings, output_dir=tmp_path / "out"
    )  # fmt: skip
    assert [(s.name, s.steps) for s in done.report.stages] == [("transfer", 2), ("transfer-2", 2)]


# ------------------------------------------------------------------------------------------------------- surviving
def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["transfer-", "finetune-", "scores/student"])
def test_kill_nine_then_resume_gives_the_same_bytes(converted, stories, tmp_path, moment):
    words = ["convert", "--dataset", stories, "-o", tmp_path / "out", *SET, *MORE]
    work = work_folder(tmp_path / "out")
    with subprocess.Popen(command(*words), env=environment(), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(moment in str(p) for p in work.rglob("*")):
            time.sleep(0.02)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()
    again = run(*words)
    assert again.returncode == 2 and "--resume" in again.stderr
    done = run(*words, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert weights(tmp_path / "out") == weights(converted)
    curves = [json.loads((folder / "report.json").read_text())["curves"] for folder in (tmp_path / "out", converted)]
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_two_processes_convert_once(stories, tmp_path):
    words = [*command("convert", "--dataset", stories, "-o", tmp_path / "out", *SET, "--json")[1:]]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", *words]
    more = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env={**environment(), **more}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)  # one answer, not two
    assert [stage["tokens"] for stage in report["stages"]] == [1536, 1536]
    assert not work_folder(tmp_path / "out").exists()
    assert api.generate(tmp_path / "out", "Once upon", max_new_tokens=4).tokens == 4


@pytest.mark.slow
def test_a_kill_while_the_result_is_written_leaves_one_place(stories, tmp_path):
    words = ["convert", "--dataset", stories, "-o", tmp_path / "out", *SET]
    work = work_folder(tmp_path / "out")
    with subprocess.Popen(command(*words), env=environment(), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (work / "output").exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert {p.name for p in tmp_path.iterdir()} <= {work.name, "out"}
    assert run(*words, "--resume").returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_bad_data_leaves_no_work_folder(stories, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too little")
    with pytest.raises(InputError):
        api.convert(None, data=str(short), overrides=SMALL, output_dir=tmp_path / "out")
    with pytest.raises(InputError, match="eval.parts.late: 90-99 is none of the 6 documents"):
        api.convert(
            None, data=str(stories), overrides={**SMALL, "eval.parts.late": "90-99"}, output_dir=tmp_path / "out"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


def test_control_c_is_130_and_says_how_to_go_on(stories, tmp_path):
    words = ["convert", "--dataset", stories, "-o", tmp_path / "out", *SET, "--set", "stages.transfer.tokens=400000"]
    listening = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a background shell ignores it
    with subprocess.Popen(
        command(*words), env=environment(), stderr=subprocess.PIPE, text=True, **listening
    ) as process:
        while process.poll() is None and not (work_folder(tmp_path / "out") / "scores").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in said
    assert not (tmp_path / "out").exists()


def test_resuming_with_another_plan_is_refused(stories, tmp_path):
    class Stop(BaseException):
        pass

    def stop(stage: str, step: int) -> None:
        raise Stop

    from linearize import conversion
    from linearize.resolve import resolve

    resolved = resolve(None, overrides={**SMALL, "data.source": str(stories), "output.folder": str(tmp_path / "o")})
    with pytest.raises(Stop):
        conversion.run(resolved, on_step=stop)
    other = {**SMALL, "stages.transfer.lr": 1e-3}
    with pytest.raises(InputError, match="another plan"):
        api.convert(None, data=str(stories), overrides=other, output_dir=tmp_path / "o", resume=True)


def test_a_full_disk_leaves_nothing_behind(stories, tmp_path, monkeypatch):
    import errno

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StorageError, match="no space left"):
        api.convert(None, data=str(stories), overrides={**SMALL, **STAGES}, output_dir=tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("method", ["window", "none"])
def test_a_method_without_parameters_is_not_trained(stories, tmp_path, method):
    settings = {k: v for k, v in SMALL.items() if not k.startswith(("method", "stages"))}
    done = api.convert(None, method, data=str(stories), overrides=settings, output_dir=tmp_path / "o")
    assert done.report.stages == [] and any("no parameters" in note for note in done.report.notes)


def test_full_tuning_is_measured_against_the_original(stories):
    loaded = models.load_model()
    base = copy.deepcopy(loaded.model)
    settings = {**SMALL, **STAGES, "stages.finetune.mode": "full", "stages.finetune.lr": 0.01}
    done = linearize.convert(loaded.model, data=str(stories), overrides=settings)
    again = linearize.convert(base, data=str(stories), overrides={**SMALL, **STAGES})
    assert done.report.row("teacher").nll == again.report.row("teacher").nll


def test_a_finished_run_is_not_redone(converted, stories):
    words = ["convert", "--dataset", stories, "-o", converted, *SET, *MORE]
    before = (converted / "report.json").stat().st_mtime_ns
    assert run(*words, "--resume").returncode == 0
    assert (converted / "report.json").stat().st_mtime_ns == before


def test_a_missed_gate_is_written_and_then_raised(stories, tmp_path):
    settings = {**SMALL, **STAGES, "gate.perplexity_ratio": 1e-6}
    with pytest.raises(GateError, match="perplexity_ratio"):
        api.convert(None, data=str(stories), overrides=settings, output_dir=tmp_path / "o")
    assert (tmp_path / "o" / "report.json").is_file()


# ---------------------------------------------------------------------------------------------------------- Python
def test_a_model_in_hand_is_converted_in_place(stories):
    loaded = models.load_model()
    done = linearize.convert(loaded.model, "hedgehog", data=str(stories), overrides={**SMALL, **STAGES})
    assert done.folder is None and done.model is loaded.model
    assert done.report.row("student").perplexity > 0
    done.surgery.detach()


def test_a_pure_method_has_no_branches_and_full_tuning_works(stories):
    loaded = models.load_model()
    settings = {**SMALL, **STAGES, "method.mixer.window": 0, "method.mixer.sinks": 0, "stages.finetune.mode": "full"}
    done = linearize.convert(loaded.model, "hedgehog", data=str(stories), overrides=settings)
    assert done.report.row("linear_off") is None and done.report.row("student") is not None


def test_push_to_hub_uploads_the_folder(converted, monkeypatch):
    from linearize.conversion import Converted
    from linearize.report import schema
    from linearize.surgery.attach import Surgery

    asked = []

    class Hub:
        def create_repo(self, name, **options):
            asked.append((name, options))

        def upload_folder(self, repo_id, folder_path):
            return f"{repo_id}/{folder_path.name}"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model = linearize.load(converted)
    done = Converted(model, Surgery.of(model), schema.read(converted, schema.Report), None, converted)
    assert done.push_to_hub("me/mine", private=True) == "me/mine/converted"
    assert asked == [("me/mine", {"exist_ok": True, "private": True})]
    with pytest.raises(InputError, match="nothing was written"):
        Converted(model, done.surgery, done.report).push_to_hub("me/mine")


@pytest.mark.parametrize("name", ["", "mine", "owner/mine", "my own model!", "/nowhere/at/all"])
def test_a_name_alone_is_no_origin(name):
    """The licence of a model in hand is read where it was loaded from, not from whatever bears its name."""
    assert _origin(SimpleNamespace(name_or_path=name)) is None
    assert _origin(SimpleNamespace(name_or_path=str(models.TEACHERS / "text"))) == models.source(
        models.TEACHERS / "text"
    )
