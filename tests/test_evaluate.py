"""Evaluation: laws on tiny random models, and the published figures on a real one."""

import math
import os
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import linearize
from linearize.data.text import documents, read_texts
from linearize.evaluate import quality
from linearize.evaluate.diagnostics import dense_maps, diagnose, spearman, teacher_weights
from linearize.evaluate.generation import distinct, generation, prompts, repetition
from linearize.evaluate.quality import Score, Targets, compare, copy_from_beyond, measure, table
from linearize.report.looks import Diagnostics as ReportDiagnostics
from linearize.report.schema import Generation as ReportGeneration
from linearize.report.schema import Row as ReportRow
from linearize.report.verdict import judge
from linearize.surgery.twin import twin
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
        kept = ReportRow.model_validate(asdict(row))
        assert kept.nll == pytest.approx(row.nll, rel=1e-5)


@pytest.mark.parametrize(("off", "level"), [((1.9, 1.1), "good"), ((1.4, 1.0), "dead"), ((1.3, 1.0), "dead")])
def test_the_verdict_on_the_linear_branch(off, level):
    rows = table(make_scores(teacher=(1.0, 1.0), window=(2.0, 1.1), student=(1.4, 1.0), linear_off=off))
    assert judge([ReportRow(**asdict(row)) for row in rows]).level == level


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
    alone = compare(model, docs, [("w", lambda: nullcontext(twin(model, "window", {"window": 8, "sinks": 2})))])[1]
    surgery = linearize.attach(model, None, "hedgehog", {"window": 8, "sinks": 2})
    student = compare(model, docs, [("student", nullcontext)], teacher=surgery.teacher)[1]
    made = twin(model, "window", {"window": 8, "sinks": 2})
    assert {p.data_ptr() for p in made.parameters()} <= {p.data_ptr() for p in model.parameters()}
    rows = compare(model, docs, [("w", lambda: nullcontext(made)), ("student", nullcontext)], teacher=surgery.teacher)
    assert rows[1].nll == alone.nll and rows[2].nll == student.nll
    # The window's own branch, alone, is the zero-token window: the same softmax by another way.
    off = compare(model, docs, [("off", lambda: surgery.ablate("linear_off"))], teacher=surgery.teacher)[1]
    assert off.kl == pytest.approx(alone.kl, abs=1e-5)
    everything = twin(model, "window", {"window": 64, "sinks": 0})
    assert compare(model, docs, [("w", lambda: nullcontext(everything))], teacher=surgery.teacher)[1].kl < 1e-7


# ------------------------------------------------------------------------------------------------ generation
class Letters:
    """A stand-in for a tokenizer: one letter per id."""

    eos_token_id = 2

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(33 + i) for i in ids if i > 2)


def test_both_write_the_same_where_they_are_the_same(model):
    given = [d[:n] for d, n in zip(make_documents([20, 20, 20]), [7, 3, 5], strict=True)]
    for greedy in (True, False):
        found = generation(model, Letters(), given, new=12, greedy=greedy, batch=2)
        assert found.nll_teacher == found.nll_student and found.repetition_teacher == found.repetition_student
        assert [s.teacher for s in found.samples] == [s.student for s in found.samples]
        assert found.samples[0].prompt == Letters().decode(given[0].tolist())
    again = generation(model, Letters(), given, new=12, batch=2)
    assert again == found != generation(model, Letters(), given, new=12, batch=2, seed=1)


def test_the_nll_of_a_continuation_is_the_teachers(model):
    given = [d[:6] for d in make_documents([9, 9])]
    found = generation(model, Letters(), given, new=10, greedy=True)
    nats, count = 0.0, 0
    with torch.no_grad():
        for prompt in given:
            ids = prompt[None]
            for _ in range(10):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
                if ids[0, -1] == 2:
                    break
            labels = ids.clone()
            labels[:, :6] = -100
            nats += model(ids, labels=labels).loss.item() * (ids.shape[1] - 6)
            count += ids.shape[1] - 6
    assert found.nll_teacher == pytest.approx(nats / count, abs=1e-5)


def test_a_student_of_its_own_writes_from_its_state(model):
    surgery = linearize.attach(model, None, "hedgehog", {"window": 4, "sinks": 1})
    given = [d[:6] for d in make_documents([9, 9])]
    found = generation(model, Letters(), given, new=16, teacher=surgery.teacher, greedy=True)
    surgery.detach()
    assert found.nll_teacher == generation(model, Letters(), given, new=16, greedy=True).nll_teacher
    assert found.nll_student != found.nll_teacher
    assert set(found.as_dict()) == set(ReportGeneration.model_fields)


def test_repetition_and_distinct_n_grams():
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4, 1]]) == pytest.approx(2 / 6)
    assert repetition([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0.0 and repetition([[1]]) == 0.0
    assert distinct([[1, 1, 2], [1, 1]], 1) == pytest.approx(2 / 5)
    assert distinct([[1, 1, 2], [1, 1]], 2) == pytest.approx(2 / 3)
    with pytest.raises(InputError):
        prompts(make_documents([4]), 4, 1)


# ----------------------------------------------------------------------------------------------- diagnostics
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_weights_of_the_teacher_give_its_output(family):
    model = pico(family, **({"sliding_window": 6} if family == "mistral" else {}))
    surgery = linearize.attach(model, None, "softmax")

    def look(site, mixer, q, k, v, ctx, out):
        group = site.shape.group
        weights = teacher_weights(site, q, k, ctx).float()
        torch.testing.assert_close(weights @ v.repeat_interleave(group, 1), out, atol=1e-5, rtol=1e-4)

    with surgery.watch(look), torch.no_grad():
        model(make_documents([30])[0][None], use_cache=False)


def test_a_student_that_is_the_teacher_has_the_same_diagnostics(model):
    surgery = linearize.attach(model, None, "softmax")
    found = diagnose(surgery, make_documents([40, 20]))
    assert found.layers == [0, 1, 2, 3] and found.ranges == ["1-15", "16-31", "32-63"]
    for pair in (found.entropy, found.normalised, found.reach, found.entropy_by_position):
        torch.testing.assert_close(torch.tensor(pair["teacher"]), torch.tensor(pair["student"]), atol=1e-5, rtol=1e-4)
    assert torch.tensor(found.monotonicity["teacher"]).min() > 0.9999
    ReportDiagnostics.model_validate(found.as_dict())


def test_uniform_attention_is_known(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.zero_()
    surgery = linearize.attach(model, None, "hedgehog", {"window": 0})
    found = diagnose(surgery, make_documents([33]))
    seen = torch.arange(2, 34).double()
    for side in ("teacher", "student"):
        torch.testing.assert_close(torch.tensor(found.normalised[side]), torch.ones(4, 4), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.tensor(found.entropy["teacher"]), seen.log().mean().float().expand(4, 4))
    torch.testing.assert_close(torch.tensor(found.reach["teacher"]), ((seen - 1) / 2).mean().float().expand(4, 4))
    assert found.monotonicity["teacher"] == [[0.0] * 4] * 4


def test_spearman_from_the_definition():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 20, 20, generator=g), torch.randint(5, (2, 20, 20), generator=g).float()

    def ranks(values):
        return torch.stack([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])

    got = spearman(x, y)
    for h in range(2):
        for t in range(3, 20):
            want = torch.corrcoef(torch.stack([ranks(x[h, t, : t + 1]), ranks(y[h, t, : t + 1])]))[0, 1]
            assert got[h, t] == pytest.approx(float(want), abs=1e-6)


def test_dense_maps_for_pictures(model):
    surgery = linearize.attach(model, None, "hedgehog", {"window": 8, "sinks": 2})
    document = make_documents([20])[0]
    maps = dense_maps(surgery, document, {1: [0, 3], 7: [0]})
    assert set(maps) == {(1, 0), (1, 3)} and set(dense_maps(surgery, document)) == {(0, 0), (2, 0), (3, 0)}
    for pair in maps.values():
        for weights in pair.values():
            assert weights.shape == (20, 20)
            torch.testing.assert_close(weights.sum(-1), torch.ones(20))
            assert not weights.triu(1).any()


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
    windows = {quality.WINDOW: twin(model, "window", narrow), "wide": twin(model, "window", wide)}
    rows = compare(model, docs, [(n, lambda m=m: nullcontext(m)) for n, m in windows.items()], residual=2)
    teacher, narrow, wide = rows
    assert teacher.perplexity == pytest.approx(5.74, abs=0.006)
    assert narrow.perplexity == pytest.approx(7.20, abs=0.01)
    assert wide.perplexity == pytest.approx(6.26, abs=0.01)
    assert teacher.copy_share == pytest.approx(0.187, abs=0.002)
    assert math.exp(narrow.copy_nll - teacher.copy_nll) == pytest.approx(2.40, abs=0.02)
