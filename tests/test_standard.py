"""Standard tasks through lm-eval: the same requests for every row, scored as by hand; and what is said without it.

What runs lm-eval is skipped where it is not installed (pip install 'linearize[eval]').
"""

from __future__ import annotations

import json
import re
from contextlib import nullcontext

import pytest
import torch

from linearize import api, cli, models
from linearize.evaluate import harness
from linearize.report import standard, tables
from linearize.report.schema import read
from linearize.surgery.attach import attach
from linearize.types import GateError, InputError

RIDDLES = [
    ("Once upon a time there was a little", [" girl", " zebra named Q"], 0),
    ("The dog ran to the", [" of", " park"], 1),
    ("She was very happy and", [" smiled", " table", " the"], 0),
    ("They went to the park to", [" play", " blue"], 0),
    ("The cat sat on the", [" ran", " mat"], 1),
    ("Mom said it was time for", [" bed", " is"], 0),
    ("He picked up the red", [" and", " ball"], 1),
]
TASKS = {
    "riddles": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
    "doc_to_target: '{{answer}}'\ntarget_delimiter: ''\n"
    "metric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}\n",
    "prose": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
    "metric_list:\n- {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}\n",
    "went-on": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{choices[answer]}}'\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 4, do_sample: false}\n"
    "metric_list:\n- {metric: exact_match, aggregation: mean, higher_is_better: true}\n",
}


@pytest.fixture
def folder(tmp_path):
    """Tasks and their data, as a user would have them."""
    lines = [json.dumps({"question": q, "choices": c, "answer": a}) for q, c, a in RIDDLES]
    (tmp_path / "tasks" / "data").mkdir(parents=True)
    (tmp_path / "tasks" / "data" / "riddles.jsonl").write_text("\n".join(lines))
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: data/riddles.jsonl}}}}\n"
        (tmp_path / "tasks" / f"{name}.yaml").write_text(head + "test_split: test\n" + text)
    return tmp_path / "tasks"


@pytest.fixture
def lm_eval():
    return pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'linearize[eval]'")


# ------------------------------------------------------------------------------------------------- without lm-eval
def test_without_lm_eval_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape("pip install 'linearize[eval]'")):
        api.score("nowhere", tasks="riddles")
    assert cli._run(["eval", "-m", "nowhere", "--suite", "lm-eval", "--tasks", "riddles"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == "error: --suite lm-eval needs lm-eval: pip install 'linearize[eval]'\n"


def test_task_files_are_for_one_suite(capsys):
    assert cli._run(["eval", "-m", "nowhere", "--suite", "recall", "--task-files", "here"]) == 2
    assert "--suite lm-eval" in capsys.readouterr().err


def _scores(value):
    one = {"task": "riddles", "metric": "acc", "asked": 7, "shots": 2}
    other = {"task": "prose", "metric": "bits_per_byte", "higher_is_better": False, "asked": 7}
    return [standard.Score(**one, value=value, stderr=0.125), standard.Score(**other, value=1.5)]


def test_the_table_says_what_is_better_and_of_how_many():
    rows = [
        standard.Row(name="teacher", scores=_scores(0.75)),
        standard.Row(name="student", scores=_scores(0.5)[:1], state_bytes=2048),
    ]
    table = standard.table(standard.Standard.model_construct(rows=rows, lm_eval="0.4.13"))
    assert table.columns == ["", "riddles acc", "prose bits_per_byte ↓", "state"]
    assert table.rows == [["teacher", "0.750 ± 0.125", "1.500", "–"], ["student", "0.500 ± 0.125", "–", "2 KiB"]]
    assert "riddles 7 at 2 shots, prose 7 at 0 shots" in table.notes[-1]


# ---------------------------------------------------------------------------------------------------- with lm-eval
def test_tasks_that_cannot_be_asked_are_named(lm_eval, folder, tmp_path):
    with pytest.raises(InputError, match="did you mean 'riddles'"):
        harness.load(["ridles"], folder)
    with pytest.raises(InputError, match="--tasks"):
        harness.load([], folder)
    with pytest.raises(InputError, match="no folder with YAML files"):
        harness.load(["riddles"], tmp_path / "nothing")
    (folder / "data" / "riddles.jsonl").unlink()
    with pytest.raises(InputError, match="riddles: not loaded: .*riddles.jsonl"):
        harness.load(["riddles"], folder)


@pytest.fixture
def pair():
    """(teacher, student, tokenizer): the text teacher, and a window of four tokens in its place."""
    teacher, student = models.load_model(None), models.load_model(None)
    attach(student.model, None, "window", {"window": 4, "sinks": 1})
    return teacher.model.eval(), student.model.eval(), teacher.processor


@torch.no_grad()
def _nll(model, tokenizer, text):
    """Nats of `text` behind the token that begins a text. That token, where the tokenizer adds it, counts as well: so
    it is in lm-eval."""
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    logp = model(ids).logits[0, :-1].log_softmax(-1)
    return -logp.gather(1, ids[0, 1:, None]).sum().item()


@torch.no_grad()
def _choice(model, tokenizer, question, choice):
    """Nats of a choice behind its question."""
    ids = torch.tensor([tokenizer(question + choice)["input_ids"]])
    logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return -logp[len(tokenizer(question)["input_ids"]) - 1 :].sum().item()


def test_scores_are_those_counted_by_hand(lm_eval, folder, pair, capsys):
    teacher, student, tokenizer = pair
    loaded = harness.load(["riddles", "prose", "went-on"], folder)
    found, digest = harness.measure(
        student, tokenizer, loaded, [("student", nullcontext)], teacher=lambda: nullcontext(teacher)
    )
    assert list(found) == ["teacher", "student"] and len(digest) == 64
    assert capsys.readouterr().out == ""  # stdout is the answer's
    for name, model in (("teacher", teacher), ("student", student)):
        scores = {(s.task, s.metric): s for s in found[name]}
        assert set(scores) >= {("riddles", "acc"), ("prose", "bits_per_byte"), ("went-on", "exact_match")}
        nats = sum(_nll(model, tokenizer, question) for question, _, _ in RIDDLES)
        size = sum(len(question.encode()) for question, _, _ in RIDDLES)
        bits = scores["prose", "bits_per_byte"]
        assert bits.value == pytest.approx(nats / size / 0.6931471805599453, rel=1e-4)
        assert bits.higher_is_better is False and bits.stderr is None  # lm-eval has none for it
        right = [
            min(range(len(choices)), key=lambda n: _choice(model, tokenizer, question, choices[n])) == answer
            for question, choices, answer in RIDDLES
        ]
        assert scores["riddles", "acc"].value == pytest.approx(sum(right) / len(right))
        assert scores["riddles", "acc"].asked == len(RIDDLES) and scores["riddles", "acc"].shots == 0
        assert scores["riddles", "acc"].stderr is not None
    values = [next(s.value for s in found[name] if s.metric == "bits_per_byte") for name in found]
    assert values[1] > values[0]  # four tokens say less than all
    few, other = harness.measure(student, tokenizer, loaded, [], teacher=lambda: nullcontext(teacher), limit=2)
    assert {s.asked for s in few["teacher"]} == {2} and other != digest


def test_logits_that_are_not_finite_end_it(lm_eval, folder, pair):
    teacher, student, tokenizer = pair
    torch.nn.init.constant_(student.lm_head.weight, float("nan"))
    with pytest.raises(GateError, match="'student'.*not finite"):
        harness.measure(
            student, tokenizer, harness.load(["riddles"], folder), [("student", nullcontext)],
            teacher=lambda: nullcontext(teacher),
        )  # fmt: skip


def test_the_suite_of_a_converted_folder(lm_eval, folder, tmp_path, capsys):
    settings = ["method.mixer={window: 8, sinks: 2}", "eval.limit=2", "eval.generate=0", "data.valid_tokens=600"]
    texts = ["Once upon a time there was a dog who liked to sing and dance. " * 40] * 30
    out = tmp_path / "out"
    api.convert(None, "lawcat", data=texts, overrides=settings, output_dir=out, max_steps=2)
    capsys.readouterr()
    words = ["eval", "-m", str(out), "--suite", "lm-eval", "--tasks", "riddles,prose", "--task-files", str(folder)]
    assert cli._run([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = read(out / "lm-eval.json", standard.Standard)
    assert said == found.model_dump(mode="json") and found.lm_eval == lm_eval.__version__
    names = [row.name for row in found.rows]
    assert names == ["teacher", "zero-token window", "window of equal bytes", "student", "linear_off", "window_off"]
    assert [bool(row.state_bytes) for row in found.rows] == [False, True, True, True, False, False]
    assert str(tmp_path) not in (out / "lm-eval.json").read_text()
    assert "zero-token window" in tables.render(standard.table(found), "markdown")
    assert not list(out.glob("*.tmp*"))
    assert cli._run([*words[:6], "went-on", *words[7:], "--limit", "2"]) == 0  # a task that writes, one token at a time
    written = read(out / "lm-eval.json", standard.Standard)
    assert [row.name for row in written.rows] == names[:4] and "went-on" in written.notes[0]
