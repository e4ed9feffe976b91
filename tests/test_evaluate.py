"""Evaluation: laws on tiny random models, and the published figures on a real one."""

import math
import os
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import linearize
from linearize.data.text import documents, read_texts
from linearize.evaluate import quality
from linearize.evaluate.quality import Score, Targets, baseline, compare, copy_from_beyond, measure, table, verdict
from linearize.report.schema import Row as ReportRow
from linearize.testing.pico import pico
from linearize.types import GateError, InputError

ASSETS = Path(os.environ.get("LINEARIZE_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))


def make_documents(sizes, vocabulary=97, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (n,), generator=g) for n in sizes]


@pytest.fixture
def model():
    return pico("llama")


# ------------------------------------------------------------------------------------------------- measuring
def test_perplexity_is_transformers_own_loss(model):
    docs = make_documents([40, 17, 3, 2])
    with torch.no_grad():
        losses = [model(d[None], labels=d[None]).loss.item() * (len(d) - 1) for d in docs]
    row = compare(model, docs, [])[0]
    assert row.name == "teacher" and row.tokens == 58 and row.documents == 4
    assert row.nll == pytest.approx(sum(losses) / 58, abs=1e-6)
    assert row.perplexity == pytest.approx(math.exp(sum(losses) / 58), rel=1e-6)
    assert row.kl == 0.0 and row.top1 == 1.0 and row.ratio == 1.0


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_batching_and_padding_change_nothing(family):
    model = pico(family)
    docs = make_documents([40, 17, 3, 2, 33, 9])
    half = [("half", lambda: half_of(model))]
    for one, many in zip(measure(model, docs, half, batch=1), measure(model, docs, half, batch=4), strict=True):
        for name in ("nll_N", "kl_N"):
            torch.testing.assert_close(getattr(one, name), getattr(many, name), atol=2e-6, rtol=2e-6)
        assert one.residual == many.residual


@contextmanager
def half_of(model):
    head = model.get_output_embeddings().weight
    kept = head.data.clone()
    head.data.mul_(0.5)
    try:
        yield
    finally:
        head.data.copy_(kept)


def test_kl_and_agreement_from_the_definition(model):
    docs = make_documents([12, 20])
    _, score = measure(model, docs, [("half", lambda: half_of(model))])
    kl, agree = [], []
    with torch.no_grad():
        for d in docs:
            logits = model(d[None]).logits[0, :-1].double()
            p, q = logits.softmax(-1), (logits / 2).softmax(-1)
            kl.append((p * (p / q).log()).sum(-1))
            agree.append(p.argmax(-1) == q.argmax(-1))
    torch.testing.assert_close(score.kl_N, torch.cat(kl), atol=1e-5, rtol=1e-4)
    assert torch.equal(score.agree_N, torch.cat(agree).double())


def test_a_variant_that_is_the_teacher_scores_as_the_teacher(model):
    teacher, same = compare(model, make_documents([30, 20]), [("same", nullcontext)])
    assert same.kl == 0.0 and same.nll == teacher.nll and same.residual_error == [0.0] * 4


def test_a_variant_may_bring_a_module_of_its_own(model):
    other = pico("llama", seed=1)
    docs = make_documents([30, 20])
    row = compare(model, docs, [("other", lambda: nullcontext(other))])[1]
    assert row.nll == pytest.approx(compare(other, docs, [])[0].nll, abs=1e-6)
    assert row.kl > 0 and all(error > 0.1 for error in row.residual_error)


def test_the_models_mode_is_left_as_it_was(model):
    model.train()
    compare(model, make_documents([8]), [("same", nullcontext)])
    assert model.training


@pytest.mark.parametrize(("docs", "names"), [([], ["a"]), ([torch.tensor([1])], ["a"]), (None, ["a", "a"])])
def test_unusable_input_is_refused(model, docs, names):
    docs = make_documents([5]) if docs is None else docs
    with pytest.raises(InputError):
        compare(model, docs, [(name, nullcontext) for name in names])


def test_logits_that_are_not_finite_name_the_row(model):
    other = pico("llama")
    other.lm_head.weight.data[5] = torch.nan
    with pytest.raises(GateError, match="row 'broken': logits are not finite"):
        compare(model, make_documents([5]), [("broken", lambda: nullcontext(other))])


def test_copy_from_beyond_from_the_definition():
    for seed, window in [(0, 1), (1, 4), (2, 32)]:
        ids = make_documents([100], vocabulary=30, seed=seed)[0]
        want = [
            ids[t] in ids[: max(0, t - window)] and ids[t] not in ids[max(0, t - window) : t] for t in range(1, 100)
        ]
        assert copy_from_beyond(ids, window).tolist() == want


# ------------------------------------------------------------------------------------------------- the table
def make_scores(**nats):
    """Scores of 40 documents of 50 tokens; every fifth token is a copy. nats: (nll on copies, nll on others)."""
    g = torch.Generator().manual_seed(0)
    doc = torch.arange(40).repeat_interleave(50)
    copies = torch.arange(2000) % 5 == 0
    targets = Targets(doc, torch.arange(50).repeat(40) + 1, copies, 40, 32)
    noise = torch.rand(2000, generator=g) * 0.2 + torch.rand(40, generator=g)[doc]
    one = torch.ones(2000)
    names = {"window": "zero-token window"}
    return [
        Score(names.get(n, n), targets, torch.where(copies, *torch.tensor(v)).double() + noise, one, one)
        for n, v in nats.items()
    ]


def test_gap_closed_and_marginal_gain():
    scores = make_scores(teacher=(1.0, 1.0), window=(2.0, 1.1), student=(1.4, 1.0), linear_off=(1.9, 1.1))
    teacher, window, student, off = table(scores)
    assert student.gap_closed == pytest.approx(0.6) and off.gap_closed == pytest.approx(0.1)
    assert teacher.gap_closed is window.gap_closed is teacher.marginal is None
    assert student.copy_share == pytest.approx(0.2) and window.copy_nll - teacher.copy_nll == pytest.approx(1.0)
    assert student.marginal == pytest.approx(0.5 / 5 + 0.1 * 4 / 5)
    assert student.marginal_copy == pytest.approx(0.5) and student.marginal_share == pytest.approx(0.5)
    assert student.ratio == pytest.approx(math.exp(0.4 / 5))
    # The noise of a document is common to all rows: paired intervals of differences have no width.
    assert student.intervals["marginal"] == pytest.approx((0.18, 0.18), abs=1e-6)
    low, high = student.intervals["nll"]
    assert low < student.nll < high and high - low == pytest.approx(2 * 1.96 * 0.29 / math.sqrt(40), rel=0.3)
    assert set(student.buckets) == {"1-15", "16-31", "32-50"} and len(student.by_position) == 50


def test_a_part_of_the_documents():
    scores = make_scores(teacher=(1.0, 1.0), window=(2.0, 1.1))
    part = table([score.take(range(10, 20)) for score in scores])
    assert part[0].documents == 10 and part[0].tokens == 500
    assert part[0].nll == pytest.approx(float(scores[0].nll_N[500:1000].mean()))
    one = table([score.take([3]) for score in scores])
    assert one[1].intervals == {}
    with pytest.raises(InputError):
        scores[0].take([40])


def test_rows_fit_the_report():
    for row in table(make_scores(teacher=(1.0, 1.0), window=(2.0, 1.1), student=(1.4, 1.0), linear_off=(1.9, 1.1))):
        kept = ReportRow.model_validate(row.as_dict())
        assert kept.nll == pytest.approx(row.nll, rel=1e-5)


@pytest.mark.parametrize(
    ("off", "dead", "words"),
    [
        ((1.9, 1.1), False, "works"),
        ((1.4, 1.0), True, "DOES NOTHING"),
        ((1.3, 1.0), True, "DOES NOTHING"),
    ],
)
def test_the_verdict_on_the_linear_branch(off, dead, words):
    found = verdict(table(make_scores(teacher=(1.0, 1.0), window=(2.0, 1.1), student=(1.4, 1.0), linear_off=off)))
    assert found.dead is dead and words in found.words
    assert found.interval[0] <= found.gain <= found.interval[1]


def test_no_verdict_without_the_branch_switched_off():
    assert verdict(table(make_scores(teacher=(1.0, 1.0), student=(1.4, 1.0)))).dead is None


# -------------------------------------------------------------------------------------------- with surgery
def test_a_converted_models_teacher_is_the_model_before(model):
    docs = make_documents([60, 33, 12])
    before = compare(model, docs, [])[0]
    surgery = linearize.attach(model, None, "hedgehog", {"window": 8, "sinks": 2})
    variants = [
        ("swapped", nullcontext),
        ("window_off", lambda: surgery.ablate("window_off")),
        ("linear_off", lambda: surgery.ablate("linear_off")),
        ("same", surgery.teacher),
    ]
    rows = {row.name: row for row in compare(model, docs, variants, teacher=surgery.teacher)}
    assert rows["teacher"].nll == before.nll and rows["same"].kl == 0.0
    assert len({round(row.kl, 6) for row in rows.values()}) == 4


def test_a_baseline_shares_the_weights_and_leaves_the_conversion(model):
    docs = make_documents([60, 33, 12])
    alone = compare(model, docs, [("w", lambda: nullcontext(baseline(model, "window", {"window": 8, "sinks": 2})))])[1]
    surgery = linearize.attach(model, None, "hedgehog", {"window": 8, "sinks": 2})
    student = compare(model, docs, [("student", nullcontext)], teacher=surgery.teacher)[1]
    twin = baseline(model, "window", {"window": 8, "sinks": 2})
    assert {p.data_ptr() for p in twin.parameters()} <= {p.data_ptr() for p in model.parameters()}
    rows = compare(
        model, docs, [("w", lambda: nullcontext(twin)), ("student", nullcontext)], teacher=surgery.teacher
    )
    assert rows[1].nll == alone.nll and rows[2].nll == student.nll
    # The window's own branch, alone, is the zero-token window: the same softmax by another way.
    off = compare(model, docs, [("off", lambda: surgery.ablate("linear_off"))], teacher=surgery.teacher)[1]
    assert off.kl == pytest.approx(alone.kl, abs=1e-5)
    everything = baseline(model, "window", {"window": 64, "sinks": 0})
    assert compare(model, docs, [("w", lambda: nullcontext(everything))], teacher=surgery.teacher)[1].kl < 1e-9


# ----------------------------------------------------------------------------------------------- real model
@pytest.fixture(scope="module")
def stories():
    folder = ASSETS / "stories15M"
    if not folder.exists():
        pytest.skip(f"no stories15M in {ASSETS} ($LINEARIZE_ASSETS)")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
def test_published_figures_of_stories15m(stories):
    model, tokenizer = stories
    docs = documents(read_texts(ASSETS / "text" / "tinystories-192.txt", limit=120), tokenizer, 255)
    assert len(docs) == 120 and len(docs[0]) <= 255 and docs[0][0] == 1
    narrow, wide = {"window": 32, "sinks": 0}, {"window": 64, "sinks": 4}
    windows = {quality.WINDOW: baseline(model, "window", narrow), "wide": baseline(model, "window", wide)}
    rows = compare(model, docs, [(n, lambda m=m: nullcontext(m)) for n, m in windows.items()], residual=2)
    teacher, narrow, wide = rows
    assert teacher.perplexity == pytest.approx(5.74, abs=0.006)
    assert narrow.perplexity == pytest.approx(7.20, abs=0.01)
    assert wide.perplexity == pytest.approx(6.26, abs=0.01)
    assert teacher.copy_share == pytest.approx(0.20, abs=0.02)
    assert math.exp(narrow.copy_nll - teacher.copy_nll) == pytest.approx(2.34, abs=0.05)

