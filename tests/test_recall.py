"""Texts that ask for what they held: made right, scored right, learned from, and shown."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from linearize import api
from linearize.evaluate.layers import effective_rank
from linearize.evaluate.recall import suite, tasks
from linearize.evaluate.recall.lessons import lessons
from linearize.models import TEACHERS
from linearize.report import recall, tables
from linearize.report.layers import table as layer_table
from linearize.report.schema import read
from linearize.surgery.attach import attach
from linearize.testing.pico import pico
from linearize.testing.tolerance import close
from linearize.types import InputError, Unsupported

TEXT = tasks.sentences("It was late. The rain, at last, had stopped! Who knew? Nobody did. " * 8)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TEACHERS / "text")


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_texts_hold_what_they_ask_for(name, tokenizer):
    one = tasks.trial(tasks.TASKS[name], tokenizer, 460, depth=0.5, pairs=4, text=TEXT, first=0)
    assert 400 < len(one.ids_T) <= 460 and one.ids_T[0] == 0
    text = tokenizer.decode(one.ids_T[1:])
    for start, stop in one.answers:
        answer = tokenizer.decode(one.ids_T[start:stop]).strip()
        assert len(answer) > 3 and text.count(answer) >= 2  # hidden once, and given at the end
    assert len(one.answers) == (4 if name == "mqar" else 1)
    again = tasks.trial(tasks.TASKS[name], tokenizer, 460, depth=0.5, pairs=4, text=TEXT, first=0)
    other = tasks.trial(tasks.TASKS[name], tokenizer, 460, depth=0.5, pairs=4, text=TEXT, first=0, seed=1)
    assert torch.equal(one.ids_T, again.ids_T) and not torch.equal(one.ids_T, other.ids_T)


def test_a_needle_stands_at_its_depth(tokenizer):
    found = []
    for depth in (0.0, 0.5, 1.0):
        one = tasks.trial(tasks.TASKS["passkey"], tokenizer, 400, depth=depth)
        text = tokenizer.decode(one.ids_T)
        found.append(text.index("Remember it.") / text.index("What is the pass key"))
    assert found[0] < 0.2 and 0.4 < found[1] < 0.65 and found[2] > 0.9


def _held(tokenizer, name, length, text, **options):
    """(the whole text, its answer) of one trial."""
    one = tasks.trial(tasks.TASKS[name], tokenizer, length, text=text, **options)
    ((start, stop),) = one.answers
    return tokenizer.decode(one.ids_T), tokenizer.decode(one.ids_T[start:stop]).strip()


def test_s_niah_is_rulers(tokenizer):
    """niah_single_1 to _3 of RULER: noise and a number, an essay and a number, an essay and a UUID."""
    for name, straw, value in (
        ("s-niah-1", "The grass is green. The sky is blue.", r"[1-9]\d{6}"),
        ("s-niah-2", "had stopped! Who knew? Nobody did.", r"[1-9]\d{6}"),
        (
            "s-niah-3",
            "had stopped! Who knew? Nobody did.",
            r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
        ),
    ):
        for depth in (0.0, 0.5, 1.0):
            text, answer = _held(tokenizer, name, 460, TEXT, depth=depth)
            assert re.fullmatch(value, answer), (name, answer)
            kind = "uuid" if name == "s-niah-3" else "number"
            assert len(re.findall(f"The special magic {kind} for \\w+ is: ?{answer}", text)) == 2 and straw in text
            place = text.index(answer) / text.rindex(answer)
            assert abs(place - depth) < 0.35, (name, depth, place)


def test_real_text_fills_a_length_whatever_its_sentences(tokenizer):
    prose = tasks.sentences("and the dog ran on to the sea and sang of it " * 300)  # not one full stop
    assert max(len(sentence.split()) for sentence in prose) == tasks.LONGEST
    for length in (300, 500):
        for seed in range(3):
            one = tasks.trial(tasks.TASKS["s-niah-2"], tokenizer, length, text=prose, seed=seed)
            assert length - 8 < len(one.ids_T) <= length
    with pytest.raises(InputError, match="text with blanks"):
        tasks.trial(tasks.TASKS["s-niah-2"], tokenizer, 400, text=tasks.sentences("x" * 4000))
    starts = {_held(tokenizer, "s-niah-2", 300, TEXT, seed=seed)[0][30:60] for seed in range(6)}
    assert len(starts) > 1  # from a place of its own each time


def test_what_does_not_fit_is_refused(tokenizer):
    with pytest.raises(InputError, match="needs at least"):
        tasks.trial(tasks.TASKS["s-niah-3"], tokenizer, 40, text=TEXT)
    with pytest.raises(InputError, match="--haystack"):
        tasks.trial(tasks.TASKS["s-niah-2"], tokenizer, 400)
    with pytest.raises(InputError, match="1 to 254 pairs"):
        tasks.trial(tasks.TASKS["mqar"], tokenizer, 4000, pairs=300)
    with pytest.raises(InputError, match="s-niah-1"):
        suite.Settings(tasks=("s-niah1",))
    with pytest.raises(InputError, match="1024,2048"):
        suite.Settings.read(lengths="1k")
    assert suite.Settings.read(tasks="needle, s-niah-2,mqar").tasks == ("s-niah-2", "mqar")  # one task of two names


class Knows(nn.Module):
    """Says the next token, but for every n-th question."""

    def __init__(self, trials, wrong):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.wrong = {t.answers[i][1] - 1 for t in trials for i in range(0, len(t.answers), wrong)}

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        said = input_ids.roll(-1, 1)
        for column in self.wrong:
            said[:, column - 1] = 0
        return SimpleNamespace(logits=nn.functional.one_hot(said, 2048).float())


def test_an_answer_is_right_when_all_of_it_is(tokenizer):
    trials = [tasks.trial(tasks.TASKS["mqar"], tokenizer, 200, pairs=4, seed=n) for n in range(1)]
    assert suite.answered(Knows(trials, 2), trials) == [False, True, False, True]
    assert suite.answered(Knows(trials, 9), trials) == [False, True, True, True]


def test_lessons_are_learned_from_answers_alone(tokenizer):
    data = lessons(tokenizer, 3000, 300, seed=1, mix={"mqar": 1.0}, pairs=6)
    assert (
        data.length <= 300 and data.digest == lessons(tokenizer, 3000, 300, seed=1, mix={"mqar": 1.0}, pairs=6).digest
    )
    item = data[0]
    said = tokenizer.decode(item["labels"][item["labels"] != -100])
    assert any(value in said for value in tasks.VALUES) and not any(key in said for key in tasks.KEYS)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recall") / "out"
    settings = ["method.mixer={window: 8, sinks: 2}", "eval.limit=2", "eval.generate=0", "data.valid_tokens=600"]
    texts = ["Once upon a time there was a dog who liked to sing and dance. " * 40] * 30
    api.convert(None, "lawcat", data=texts, overrides=settings, output_dir=folder, max_steps=2)
    return folder


def test_the_suite_of_a_converted_folder(converted, tmp_path):
    haystack = tmp_path / "real.txt"
    haystack.write_text(" ".join(TEXT))
    done = api.recall(
        converted, tasks="passkey,s-niah-2,s-niah-3,mqar", lengths="200,600", depths=2, trials=2, pairs=[2, 4],
        haystack=haystack, output_dir=tmp_path,
    )  # fmt: skip
    found = read(tmp_path / "recall.json", recall.Recall)
    assert found == done.recall and found.rows[0].name == "teacher"
    names = [row.name for row in found.rows]
    assert names[1:] == ["zero-token window", "window of equal bytes", "student", "linear_off", "window_off"]
    student = found.rows[3]
    assert len(student.cells) == 2 * (2 + 2 + 2 + 2) and student.state_bytes and student.buckets
    # The teacher's 512 positions are fewer than 600 tokens; and two questions are no evidence.
    assert {c.length for c in found.rows[0].cells} == {200}
    assert not any(found.counts(*place) for place in found.places())
    page = (tmp_path / "recall.html").read_text()
    for task in ("passkey", "s-niah-2", "s-niah-3"):
        assert f"{task}: depth against length" in page
    assert page.count("data:image/png") == 4 and str(tmp_path) not in page
    with pytest.raises(InputError, match="recall, layers and lm-eval"):
        api.recall(converted, suite="remember")


def test_without_a_haystack(converted, tmp_path):
    few = {"lengths": "200", "depths": 1, "trials": 1, "pairs": [2], "output_dir": tmp_path}
    left_out = api.recall(converted, **few).recall
    assert left_out.notes == ["s-niah-2, s-niah-3 left out: no --haystack"]
    assert {c.task for c in left_out.rows[0].cells} == {"passkey", "s-niah-1", "mqar"}
    with pytest.raises(InputError, match="s-niah-3: .*--haystack"):  # asked for by name: never left out
        api.recall(converted, tasks="passkey,s-niah-3", **few)


def test_layers_one_by_one(converted):
    found = api.layers(converted).layers
    assert [layer.layer for layer in found] == [0, 1, 2, 3, 4]
    for layer in found:
        assert layer.error > 0 and layer.kl > 0 and len(layer.groups) == 6
        assert layer.kl > max(layer.groups) * 0.2
        teacher, student = layer.rank
        assert 1 < teacher < 256 and 1 < student < 256
    assert "worst group alone" in tables.render(layer_table(found), "markdown")


def test_a_layer_alone_is_the_teacher_elsewhere():
    model = pico("llama")
    ids = torch.arange(40)[None] % 100
    with torch.no_grad():
        softmax = model(ids).logits
        surgery = attach(model, None, "softmax", {})
        names = [site.name for site in surgery.sites]
        with surgery.alone(names[0]):
            close(model(ids).logits, softmax, 1e-5)  # softmax by definition changes nothing
        surgery.detach()
        surgery = attach(model, None, "hedgehog", {"window": 0, "sinks": 0})
        student = model(ids).logits
        groups = surgery.sites[0].shape.kv_heads
        with surgery.alone(names[0]):
            one = model(ids).logits
        with surgery.alone(names[0], tuple(range(groups))):
            close(model(ids).logits, one, 1e-6)
        with surgery.alone(names[0], (0,)):
            part = model(ids).logits
        with surgery.alone(names[0], ()):
            close(model(ids).logits, softmax, 1e-5)
        assert torch.equal(model(ids).logits, student)
    assert (one - softmax).norm() > (part - softmax).norm() > 0
    with pytest.raises(InputError, match="not converted"), surgery.alone("nothing"):
        pass


def test_effective_rank_of_what_is_known():
    uniform = torch.full((1, 1, 8, 8), 1 / 8)
    assert effective_rank(uniform).item() == pytest.approx(1)
    assert effective_rank(torch.eye(8)[None, None]).item() == pytest.approx(8)


def _run(shares, asked=60, name="student"):
    cells = [
        recall.Cell(task="mqar", length=256, pairs=n, asked=asked, right=round(asked * s)) for n, s in shares.items()
    ]
    return recall.Row(name=name, cells=cells)


def test_where_the_teacher_is_weak_nothing_is_claimed():
    rows = [_run({4: 1.0, 16: 0.92, 64: 0.6}, name="teacher"), _run({4: 1.0, 16: 0.95, 64: 0.97})]
    found = recall.Recall.model_construct(rows=rows)
    assert [found.counts("mqar", 256, n) for n in (4, 16, 64)] == [True, True, False]
    assert recall.table(found).rows[1][1:4] == ["100 %", "95 %", "(97 %)"]
    assert found.knee("student") == 64 and found.knee("teacher") == 16
    found.rows[1] = _run({4: 0.5, 16: 0.95})
    assert found.knee("student") is None
    found.rows[0] = _run({4: 1.0}, asked=49, name="teacher")
    assert not found.counts("mqar", 256, 4)


def test_result_files_are_read():
    folder = Path(__file__).parent.parent / "recipes" / "recall"
    for path in folder.glob("*.json"):
        found = read(path, recall.Recall)
        assert found.name == path.stem and found.rows[0].name == "teacher" and found.commit.dirty is False


def test_an_encoder_is_not_asked(monkeypatch):
    plan = SimpleNamespace(task="sentences")
    monkeypatch.setattr("linearize.recalling.reopen", lambda *a, **k: SimpleNamespace(plan=plan))
    with pytest.raises(Unsupported, match="language models"):
        api.recall("anything")


def test_a_teacher_longer_than_it_can_be_is_left_out(tokenizer):
    trial = tasks.trial(tasks.TASKS["passkey"], tokenizer, 100, depth=0.0, seed=0)
    model = Knows([trial], 1)
    settings = suite.Settings(tasks=("passkey",), lengths=(100, 150), depths=1, trials=1)
    found = suite.measure(
        model, tokenizer, settings, [("same", nullcontext)], teacher=nullcontext, longest=100, progress=False
    )
    assert [c.length for c in found["teacher"]] == [100] and [c.length for c in found["same"]] == [100, 150]
