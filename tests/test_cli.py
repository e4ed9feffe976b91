"""The command line from outside: speed of --help, exit codes, one clear line, nothing left behind."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass

import pytest

from linearize import api, cli

LLAMA = ["--recipe", "hedgehog/lolcats-llama-3-8b"]


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys, monkeypatch):
    """The command line in this process; an error that is a bug is raised."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments):
        code = cli._run(list(arguments))
        return Done(code, *capsys.readouterr())

    return run


def shell(*arguments, code=None):
    """The command line, or some code, in a process of its own."""
    command = ["-c", code] if code else ["-m", "linearize.cli", *arguments]
    path = os.pathsep.join(p for p in [os.getcwd(), *sys.path] if p)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, env=environment)
    return Done(done.returncode, done.stdout, done.stderr)


def test_help_is_quick_and_loads_nothing_heavy():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = shell("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "Turn a pretrained transformer" in done.stdout
    # Processor time: other tests share the machine.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1.0
    code = "import sys, linearize.cli; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    assert "torch" not in (loaded := shell(code=code).stdout) and "transformers" not in loaded


def test_exit_codes_from_outside():
    bad = shell("plan", "--recipe", "hedgehog/gpt3")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: unknown recipe 'hedgehog/gpt3': did you mean 'hedgehog/gpt2'?\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["plan", "--recipe", "hedgehog/gpt3"], 2, "did you mean 'hedgehog/gpt2'?"),
        (["plan", "--recipe", "none.yaml"], 2, "no recipe file none.yaml"),
        ([*["plan", *LLAMA], "--method", "hedgehgo"], 2, "did you mean 'hedgehog'?"),
        ([*["plan", *LLAMA], "--set", "stages.transfer.lrr=1"], 2, "did you mean 'lr'?"),
        ([*["plan", *LLAMA], "--set", "method.mixer.windo=1"], 2, "did you mean 'window'?"),
        ([*["plan", *LLAMA], "--layers", "evry:4"], 2, "is no layer list"),
        ([*["plan", *LLAMA], "--layers", "0-40"], 2, "0-31"),
        ([*["plan", *LLAMA], "--dtype", "int4"], 2, "model.dtype"),
        ([*["plan", *LLAMA], "--max-steps", "0"], 2, "--max-steps"),
        ([*["plan", *LLAMA], "--set", "data.length=9000"], 2, "--allow-longer"),
        (["plan", "--model", "./nowhere"], 2, "no model at ./nowhere"),
        (["plan", "--model", "nobody/nothing"], 2, "nobody/nothing"),
        (["plan", "--unknown"], 2, "--unknown"),
        (["list", "things"], 2, "choose from: embedded, families, methods, recipes"),
        ([*["plan", *LLAMA], "--set", "model.form.model_type=lama", "--set", "model.id=null"], 3, "'lama'"),
        (["plan", "--recipe", "encoder.yaml"], 3, "set sinks: 0"),
        (["plan", "--recipe", "sides.yaml"], 3, "is an encoder-decoder"),
        (["plan", "--recipe", "short.yaml"], 3, "--layers all"),
    ],
)
def test_mistakes_have_their_exit_code_and_one_line(run, tmp_path, monkeypatch, arguments, code, said):
    forms = {
        "encoder": "{model: {form: {model_type: bert, num_hidden_layers: 1}}, method: {mixer: {window: 8, sinks: 4}}}",
        "sides": "{model: {form: {model_type: t5}}}",
        "short": "{model: {form: {model_type: llama, num_hidden_layers: 1}}, method: {target_length: 16}}",
    }
    for name, text in forms.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and done.stdout == "" and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "Error: "))]
    assert len(errors) == 1
    assert sorted(p.stem for p in tmp_path.iterdir()) == sorted(forms)


def test_plan_prints_sites_parameters_state_and_break_even(run):
    done = run("plan", *LLAMA, "--layers", "keep:0,31", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    forecast, (group,) = answer["forecast"], answer["forecast"]["groups"]
    assert group["layers"] == list(range(1, 31)) and len(forecast["kept"]) == 2
    # Maps of 128 x 64 for q and k of 32 heads (LoLCATs counts 16.8M in all 32 layers), and the window's gates.
    assert abs(forecast["new_parameters"] / 30 - 2 * 32 * 128 * 64) < 200
    window = 64 * 8 * 256 * 2
    assert group["state_bytes"] == pytest.approx(32 * 128 * 129 * 4 + window, rel=1e-3)  # and a mark per kept key
    lengths = {row["tokens"]: row for row in forecast["lengths"]}
    assert lengths[65536]["kv_bytes"] == 32 * 8 * 256 * 2 * 65536
    assert lengths[65536]["student_flops"] < lengths[65536]["teacher_flops"]
    assert answer["plan"]["published"] and len(answer["digest"]) == 64


def test_plan_break_even_of_the_pure_layer_is_the_known_one(run):
    """Llama-3-8B with square maps in float32 against a bf16 cache: 1,032 tokens with maps per query head."""
    pure = ["--set", "method.mixer={window: 0, sinks: 0}", "--json"]
    answer = json.loads(run("plan", *LLAMA, *pure).stdout)
    (group,) = answer["forecast"]["groups"]
    assert group["break_even_memory"] == 4 * 32 * 256 * 129 // (8 * 256 * 2) == 1032
    assert answer["forecast"]["break_even_memory"] == 1032


def test_underscores_and_dashes_are_alike(run):
    done = run("plan", "--recipe", "gpt2", "--max_steps", "3", "--allow_longer")
    assert done.returncode == 0, done.stderr
    assert "in 3 steps" in done.stdout and "memory breaks even at 130 tokens" in done.stdout


@pytest.mark.parametrize("kind", ["methods", "families", "recipes", "embedded"])
def test_lists(run, kind):
    rows = json.loads(run("list", kind, "--json").stdout)[kind]
    names = [row["name"] for row in rows]
    expected = {
        "methods": {"hedgehog", "window", "none", "lit", "clear"},
        "recipes": {"hedgehog/demo"},
        "families": {"llama", "falcon"},
    }
    assert expected.get(kind, set()) <= set(names)
    if kind == "methods":  # a reason for every empty cell
        assert all(len(row["fits"]) + len(row["refuses"]) == 5 and all(row["refuses"].values()) for row in rows)
    if kind != "families":  # asks every family again: slow
        assert run("list", kind).returncode == 0


def test_env(run):
    answer = json.loads(run("env", "--json").stdout)
    assert answer["versions"]["torch"] and answer["machine"]["cores"] >= 1


def test_interrupt_is_130(run, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "environment", stop)
    done = run("env")
    assert done.returncode == 130 and done.stderr.startswith("interrupted")


def test_a_full_disk_is_5_and_a_bug_is_raised(run, monkeypatch):
    def fail():
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(api, "environment", fail)
    done = run("env")
    assert done.returncode == 5 and done.stderr.startswith("error: x: no space left")
    monkeypatch.setattr(api, "environment", lambda: [][0])
    with pytest.raises(IndexError):
        run("env")
