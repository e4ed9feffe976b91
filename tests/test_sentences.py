"""Sentences, passages and pairs; pooling and the figures of encoders, from their definitions."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, ViTForImageClassification

from linearize.data.sentences import Form, Pairs, Sentences, positions, read_pairs, read_sentences, sentences
from linearize.evaluate import encoders
from linearize.evaluate.encoders import (
    Sample,
    Score,
    embed,
    joined,
    measure,
    outputs,
    retrieval,
    similarity,
    spearman,
    table,
)
from linearize.evaluate.pooling import Pooling
from linearize.testing.pico import pico, pico_config
from linearize.types import GateError, InputError, StorageError, Unsupported

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", ".", "!", "once", "upon", "the", "time"]


def make_tokenizer(types=True):
    vocab = {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    inner.enable_truncation(4)  # as all-MiniLM-L6-v2's file does: nothing may be cut by it
    inner.enable_padding()
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]
    marks = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=names, model_max_length=64, **marks)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def prose(count=5, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(n, high):
        return torch.randint(high, (n,), generator=g).tolist()

    return [" ".join(" ".join(WORDS[i] for i in draw(n + 2, 8)) + "." for n in draw(12, 7)) for _ in range(count)]


# --------------------------------------------------------------------------------------------------------- reading
def test_a_text_file_is_read_line_by_line_or_whole(tmp_path):
    (tmp_path / "a.txt").write_text("a b\n\n c \n")
    assert read_sentences(tmp_path / "a.txt") == (["a b", "c"], None)
    assert read_sentences(tmp_path / "a.txt", lines=False) == (["a b\n\n c \n"], None)
    assert read_sentences(tmp_path / "a.txt", split="[1:]") == (["c"], None)


def test_tables_give_texts_and_labels(tmp_path):
    (tmp_path / "a.tsv").write_text("text\tlabel\na b\tgood\n \tbad\nc\tbad\n")
    assert read_sentences(tmp_path / "a.tsv", label_column="label") == (["a b", "c"], ["good", "bad"])
    assert read_sentences(tmp_path / "a.tsv", label_column="none") == (["a b", "c"], None)
    (tmp_path / "b.jsonl").write_text('{"text": 3}')
    (tmp_path / "c.txt").write_text("a")
    for name, options, match in [
        ("a.tsv", {"label_column": "labels"}, "no column 'labels'; did you mean 'label'"),
        ("b.jsonl", {}, "the text column holds int"),
        ("c.txt", {"label_column": "label"}, "plain text has no labels"),
    ]:
        with pytest.raises(InputError, match=match):
            read_sentences(tmp_path / name, **options)
    (tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(InputError, match="no text in it"):
        read_sentences(tmp_path / "c.txt")


STS = 'main\tMSRvid\t2012\t1\t2.5\tA "girl.\tB, b\nmain\tMSRvid\t2012\t2\t0\tc\td\tsource\n\n'


def test_pairs_in_every_form(tmp_path):
    rows = [('A "girl.', "B, b", 2.5), ("c", "d", 0.0)]
    names = ("sentence1", "sentence2", "score")
    (tmp_path / "sts.csv").write_text(STS)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(dict(zip(names, row))) for row in rows))
    (tmp_path / "a.csv").write_text('sentence1,sentence2,score\n"A ""girl.","B, b",2.5\nc,d,0\n')
    for name in ("sts.csv", "a.jsonl", "a.csv"):
        pairs = read_pairs(tmp_path / name)
        assert list(zip(pairs.first, pairs.second, pairs.scores.tolist())) == rows, name
    assert pairs.texts == [rows[0][0], "c", "B, b", "d"] and len(pairs) == 2
    assert read_pairs(tmp_path / "a.csv", columns=("sentence2", "sentence1", "score")).first == ["B, b", "d"]


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("a.csv", STS + "x\ty", "line 4: 2 fields, 7 separated by tabs"),
        ("a.csv", "sentence1,sentence2,scores\na,b,1", "no column 'score' for pairs; did you mean 'scores'"),
        ("a.csv", "sentence1,sentence2,score\na,b,1\na,b,high", "pair 2: two texts and a number .* 'high'"),
        ("a.csv", "sentence1,sentence2,score\na,b,nan\na,b,1", "pair 1: two texts and a number"),
        ("a.csv", "sentence1,sentence2,score\na,b,-1\nc,d,-1", "2 pairs with one score"),
        ("a.txt", "a\nb", "plain text holds no pairs"),
        ("a.jsonl", '{"sentence1": null, "sentence2": "b", "score": 1}', "pair 1: two texts"),
    ],
)
def test_bad_pairs_are_one_clear_line(tmp_path, name, data, match):
    (tmp_path / name).write_text(data)
    with pytest.raises(InputError, match=match) as caught:
        read_pairs(tmp_path / name)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------- sequences
@pytest.mark.parametrize("types", [True, False])
def test_a_sentence_is_what_the_tokenizer_makes_of_it(types):
    tokenizer = make_tokenizer(types)
    texts = ["a b c d e f", "g", "once upon the time!", "nothing known"]
    data = sentences(texts, tokenizer, pico_config("bert"))
    batch = data.collate([data[i] for i in range(4)])
    wanted = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch.keys() == wanted.keys() and all(torch.equal(batch[k], wanted[k]) for k in wanted)
    assert data.sizes.tolist() == wanted["attention_mask"].sum(1).tolist() == [8, 3, 7, 4]
    assert (data.tokens, data.length, data.notes) == (22, 8, ())
    with pytest.raises(IndexError):
        data[4]


def test_what_is_cut_off_is_told(tokenizer):
    data = sentences(["a b c d e f", "g"], tokenizer, pico_config("bert"), length=5)
    assert data[0]["input_ids"].tolist() == [1, 4, 5, 6, 2]
    assert data.notes == ("1 of 2 texts are longer than 5 tokens: their ends are left out",)
    assert sentences(["a " * 100], tokenizer, pico_config("bert")).length == 64  # the tokenizer's
    assert sentences(["a " * 100], tokenizer, pico_config("bert", max_position_embeddings=20)).length == 20
    assert positions(pico_config("roberta", max_position_embeddings=20, pad_token_id=1)) == 18


def test_passages_lose_only_short_ends_and_stop_at_sentences(tokenizer):
    texts = prose()
    data = sentences(texts, tokenizer, pico_config("bert"), length=20, minimum=10, cut=True)
    assert int(data.sizes.min()) >= 10 and data.length <= 20 and len(data) > len(texts)
    stop, full_stop = data.stops, tokenizer.convert_tokens_to_ids(".")
    assert (data.ids[stop - 1] == full_stop).all()  # sentences are shorter than the room between 10 and 20
    whole = [i for text in texts for i in tokenizer(text, add_special_tokens=False, truncation=False).input_ids]
    assert data.ids.tolist() == whole
    left = len(whole) - int((data.stops - data.starts).sum())
    assert 0 <= left < 8 * len(texts) and (left == 0) == (not data.notes)
    one = sentences([" ".join("abcdefgh" * 5)], tokenizer, pico_config("bert"), length=20, minimum=10, cut=True)
    assert one.sizes.tolist() == [20, 20]  # no sentence ends: words do; the last four tokens are too few
    assert one.notes == ("the ends of 1 of 1 texts are shorter than a passage and left out",)


def test_halves(tokenizer):
    data = sentences(["a b c d e", "f g"], tokenizer, pico_config("bert"))
    first, second = data.halves()
    assert [i["input_ids"].tolist() for i in first] == [[1, 4, 5, 2], [1, 9, 2]]
    assert [i["input_ids"].tolist() for i in second] == [[1, 6, 7, 8, 2], [1, 10, 2]]
    with pytest.raises(InputError, match="no halves"):
        sentences(["a"], tokenizer, pico_config("bert")).halves()


def test_views_and_digests(tokenizer):
    texts = prose(20)
    data = sentences(texts, tokenizer, pico_config("bert"), labels=["x", "y"] * 10)
    train, valid = data.hold_out(200)
    assert valid.tokens >= 200 > valid.take(1).tokens and len(train) + len(valid) == 20
    assert torch.equal(valid[0]["input_ids"], data[len(train)]["input_ids"])
    assert data.collate([data[0], data[1]])["labels"].tolist() == [0, 1] and valid.labels is not None
    assert data.digest == sentences(texts, tokenizer, pico_config("bert"), labels=["x", "y"] * 10).digest
    others = [sentences(texts, tokenizer, pico_config("bert"), seed=seed) for seed in (None, 0, 1)]
    assert len({d.digest for d in (data, train, valid, data.take(1), *others)}) == 7
    assert data.take(0).digest == data.digest
    with pytest.raises(InputError, match="too few to hold out"):
        data.hold_out(data.tokens)
    with pytest.raises(InputError, match="no texts between"):
        data.take(20)


def test_limits_of_the_model(tokenizer):
    data = sentences(["a b c d"], tokenizer, pico_config("bert"), labels=[3])
    data.check(pico_config("bert"))
    short = pico_config("bert", max_position_embeddings=5)
    with pytest.raises(InputError, match="texts of 6 tokens are longer than the model's 5 positions"):
        data.check(short)
    data.check(short, allow_longer=True)
    with pytest.raises(InputError, match="use the tokenizer that came with the model"):
        data.check(pico_config("bert", vocab_size=7))
    with pytest.raises(InputError, match="label 3 is outside the model's head"):
        data.check(pico_config("bert", architectures=["BertForSequenceClassification"], num_labels=3))
    for options in ({"length": 3}, {"length": 8, "minimum": 9, "cut": True}):
        with pytest.raises(InputError, match="leave no room"):
            sentences(["a"], tokenizer, pico_config("bert"), **options)
    with pytest.raises(InputError, match="no text has 10 tokens"):
        sentences(["a"], tokenizer, pico_config("bert"), length=20, cut=True)
    with pytest.raises(InputError, match="labels are of whole texts"):
        sentences(["a"], tokenizer, pico_config("bert"), cut=True, labels=[0])


def test_a_tokenizer_that_frames_otherwise_is_refused(tokenizer):
    inner = tokenizer.backend_tokenizer
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS]:1 $A:1", pair="$A $B", special_tokens=[("[CLS]", 1)]
    )
    with pytest.raises(Unsupported, match="does not frame a text by ids"):
        Form.of(tokenizer)


# ---------------------------------------------------------------------------------------------------------- pooling
HIDDEN = torch.tensor([[[1.0, -4], [3, -2], [90, 90]], [[2, 0], [4, 1], [6, 5]]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("cls", [[1, -4], [2, 0]]),
        ("max", [[3, -2], [6, 5]]),
        ("mean", [[2, -3], [4, 2]]),
        ("mean_sqrt_len_tokens", [[4 / 2**0.5, -6 / 2**0.5], [12 / 3**0.5, 6 / 3**0.5]]),
        ("weightedmean", [[7 / 3, -8 / 3], [28 / 6, 17 / 6]]),
        ("lasttoken", [[3, -2], [6, 5]]),
    ],
)
def test_pooling_by_hand(mode, wanted):
    torch.testing.assert_close(Pooling((mode,))(HIDDEN.half(), MASK), torch.tensor(wanted).float())


def folder(path, *modules, pooling=None):
    listed = [{"path": f"{i}", "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(modules)]
    (path / "modules.json").write_text(json.dumps(listed))
    for i, name in enumerate(modules):
        (path / f"{i}").mkdir(exist_ok=True)
        if name == "Pooling" and pooling is not None:
            (path / f"{i}" / "config.json").write_text(json.dumps(pooling))
    return path


def test_pooling_as_the_folder_says(tmp_path):
    assert Pooling.of(tmp_path).modes == ("mean",) and "no modules.json" in Pooling.of(tmp_path).notes[0]
    both = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": False}
    pooling = Pooling.of(folder(tmp_path, "Transformer", "Pooling", "Normalize", pooling=both))
    wanted = torch.tensor([[1.0, -4, 2, -3], [2, 0, 4, 2]])
    torch.testing.assert_close(pooling(HIDDEN, MASK), wanted / wanted.norm(dim=-1, keepdim=True))
    assert Pooling.of(folder(tmp_path, "Transformer", "Pooling", pooling={"pooling_mode": "lasttoken"})).modes == (
        "lasttoken",
    )


def test_a_dense_layer_behind_the_pooling(tmp_path):
    folder(tmp_path, "Transformer", "Pooling", "Dense", pooling={"pooling_mode": "mean"})
    settings = {"activation_function": "torch.nn.modules.activation.Tanh"}
    (tmp_path / "2" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="names 2/model.safetensors, which is not there"):
        Pooling.of(tmp_path)
    weights = {"linear.weight": torch.tensor([[0.5, 0.25]]), "linear.bias": torch.tensor([0.1])}
    save_file(weights, tmp_path / "2" / "model.safetensors")
    wanted = torch.tensor([[0.5 * 2 - 0.25 * 3 + 0.1], [0.5 * 4 + 0.25 * 2 + 0.1]]).tanh()
    torch.testing.assert_close(Pooling.of(tmp_path)(HIDDEN, MASK), wanted)
    (tmp_path / "2" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(StorageError, match="is damaged"):
        Pooling.of(tmp_path)


def test_modules_that_are_not_understood(tmp_path):
    with pytest.raises(InputError, match="names 1/config.json, which is not there"):
        Pooling.of(folder(tmp_path, "Transformer", "Pooling"))
    with pytest.raises(Unsupported, match="pooling .* is not known"):
        Pooling.of(folder(tmp_path, "Transformer", "Pooling", pooling={"pooling_mode": "attention"}))
    with pytest.raises(Unsupported, match="module 'WordWeights'"):
        Pooling.of(folder(tmp_path, "Transformer", "WordWeights"))
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(InputError, match="not readable as JSON"):
        Pooling.of(tmp_path)


# ---------------------------------------------------------------------------------------------------------- figures
def test_spearman_by_hand():
    x, y = torch.tensor([1.0, 2, 2, 4, 9]), torch.tensor([10.0, 30, 20, 20, 50])
    # ranks 1 2.5 2.5 4 5 and 1 4 2.5 2.5 5: sum of products of the centred 7.25, sums of squares 9.5 and 9.5
    assert float(spearman(x, y)) == pytest.approx(7.25 / 9.5, abs=1e-12)
    assert float(spearman(-x, y)) == pytest.approx(-7.25 / 9.5, abs=1e-12)
    assert float(spearman(x.exp(), y**3)) == pytest.approx(7.25 / 9.5, abs=1e-12)
    assert float(spearman(torch.ones(5), y)) == 0.0
    both = torch.stack([x, y])
    torch.testing.assert_close(spearman(both, y.expand(2, 5)), torch.tensor([7.25 / 9.5, 1]).double())


def shifted(model, by):
    """A variant: the last layer norm's bias moved for its time."""
    from contextlib import contextmanager

    @contextmanager
    def enter():
        weights = [p for n, p in model.named_parameters() if n.lower().endswith("norm.bias")][-1]
        kept = weights.data.clone()
        weights.data += by * torch.linspace(-1, 1, len(weights))
        try:
            yield
        finally:
            weights.data.copy_(kept)

    return enter


def test_batching_and_padding_change_nothing_and_the_teacher_is_itself(tokenizer):
    model = pico("bert")
    data = sentences(prose(9)[:5] + ["a", "b c", "d"], tokenizer, model.config)
    variants = [("moved", shifted(model, 0.5))]
    one, many = (measure(model, data, variants, pool=Pooling(), batch=size) for size in (1, 4))
    for a, b in zip(one, many, strict=True):
        for key in ("cosine", "token_cosine"):
            torch.testing.assert_close(a.samples[key].values_N, b.samples[key].values_N, atol=1e-6, rtol=0)
    assert set(one[0].samples) == {"cosine", "token_cosine"}
    assert one[0].samples["token_cosine"].values_N.allclose(torch.ones(8).double(), atol=1e-6)
    assert one[1].samples["token_cosine"].values_N.max() < 0.999
    batch = data.collate([data[5]])
    with torch.no_grad():
        teacher = model(**batch).last_hidden_state[0]
        with shifted(model, 0.5)():
            other = model(**batch).last_hidden_state[0]
    wanted = torch.nn.functional.cosine_similarity(teacher, other, dim=-1).mean()
    assert float(one[1].samples["token_cosine"].values_N[5]) == pytest.approx(float(wanted), abs=1e-6)


def test_classifiers_of_images_by_definition():
    from linearize.data.images import Images, Processing, Tower

    torch.manual_seed(0)
    model = ViTForImageClassification(pico_config("vit", num_labels=3)).eval()
    pixels = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(7) % 3
    data = Images(pixels, labels, Processing.of(3), Tower.of(model.config))
    found = measure(model, data, [("moved", shifted(model, 2.0))], batch=3)
    batch = data.collate([data[i] for i in range(7)])
    with torch.no_grad():
        one = model(**batch, output_hidden_states=True)
        feature = model.vit(batch["pixel_values"]).last_hidden_state
        with shifted(model, 2.0)():
            other = model(batch["pixel_values"]).logits
            moved = model.vit(batch["pixel_values"]).last_hidden_state
    p, q = one.logits.log_softmax(-1), other.log_softmax(-1)
    samples = found[1].samples
    torch.testing.assert_close(samples["kl"].values_N.float(), (p.exp() * (p - q)).sum(-1), atol=1e-6, rtol=1e-5)
    assert samples["agreement"].values_N.tolist() == (p.argmax(-1) == q.argmax(-1)).double().tolist()
    assert samples["top1"].values_N.tolist() == (q.argmax(-1) == labels).double().tolist()
    cosine = torch.nn.functional.cosine_similarity(feature, moved, dim=-1).double()
    torch.testing.assert_close(samples["cosine"].values_N, cosine[:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(samples["token_cosine"].values_N, cosine[:, 1:].mean(1), atol=1e-6, rtol=0)
    row = table(found)[0]
    assert row.figures["kl"] == 0 and row.figures["agreement"] == 1 and row.figures["top1_ratio"] == 1


def test_embeddings_come_back_in_order(tokenizer):
    model = pico("bert")
    data = sentences(["a b c d e f", "g", "once upon"], tokenizer, model.config)
    vectors = embed(model, data, [], pool=Pooling(), batch=2)["teacher"]
    for i in range(3):
        with torch.no_grad():
            alone = outputs(model, data.collate([data[i]]), Pooling()).features[0]
        torch.testing.assert_close(vectors[i], alone, atol=1e-6, rtol=1e-6)


def fake(monkeypatch, *vectors):
    """What `embed` answers, call by call."""
    answers = iter(vectors)
    monkeypatch.setattr(encoders, "embed", lambda *args, **more: next(answers))


def test_retrieval_by_hand(tokenizer, monkeypatch):
    data = sentences(["a b", "c d", "e f"], tokenizer, pico_config("bert"))
    eye = torch.eye(3)
    first = torch.stack([eye[0], eye[1], eye[0] + 0.5 * eye[2]])
    fake(monkeypatch, {"teacher": first, "same": torch.ones(3, 3)}, {"teacher": eye, "same": torch.ones(3, 3)})
    teacher, same = retrieval(None, data, [], pool=Pooling())
    # forward ranks 1, 1, 2 (the third is nearer to the first); backward 1, 1, 1
    assert teacher.samples["mrr"].values_N.tolist() == [1, 1, 0.75]
    assert same.samples["mrr"].values_N.tolist() == [1 / 3] * 3  # one vector for all finds nothing
    with pytest.raises(InputError, match="at least two passages"):
        retrieval(None, data.take(1, 2), [], pool=Pooling())


def test_similarity_by_hand(tokenizer, monkeypatch):
    pairs = Pairs(["a", "b", "c"], ["d", "e", "f"], torch.tensor([3.0, 2, 1]).double())
    data = sentences(pairs.texts, tokenizer, pico_config("bert"))
    eye = torch.eye(2)
    second = torch.stack([eye[0], eye[0] + eye[1], eye[1]])
    fake(monkeypatch, {"teacher": torch.cat([eye[:1].expand(3, 2), second])})
    sample = similarity(None, data, pairs, [], pool=Pooling())[0].samples["spearman"]
    assert sample.values_N.tolist() == pytest.approx([1, 0.5**0.5, 0]) and float(sample.figure()) == 1.0
    with pytest.raises(InputError, match="data must be pairs.texts"):
        similarity(None, data.take(1), pairs, [], pool=Pooling())


def test_intervals_are_of_examples_and_shares_are_paired():
    g = torch.Generator().manual_seed(0)
    right = (torch.rand(400, generator=g) < 0.8).double()
    worse = right.clone()
    worse[:20] = 0
    gold = torch.rand(50, generator=g).double()
    noisy = gold + 0.2 * torch.rand(50, generator=g)

    def make(name, top1, spearman):
        return joined([Score(name, {"top1": Sample(top1)})], [Score(name, {"spearman": Sample(spearman, gold)})])

    teacher, student, twin = table(
        [*make("teacher", right, gold), *make("student", worse, noisy), *make("t", right, noisy)]
    )
    assert teacher.figures == pytest.approx(
        {"top1": float(right.mean()), "top1_ratio": 1, "spearman": 1, "spearman_ratio": 1}
    )
    assert teacher.examples == {"top1": 400, "spearman": 50}
    low, high = teacher.intervals["top1"]
    spread = 1.96 * (0.8 * 0.2 / 400) ** 0.5
    assert low == pytest.approx(float(right.mean()) - spread, abs=0.012) and high > float(right.mean())
    assert twin.intervals["top1_ratio"] == (1.0, 1.0)  # the same examples on both sides
    low, high = student.intervals["top1_ratio"]
    assert low < student.figures["top1_ratio"] < high < 1
    low, high = student.intervals["spearman"]
    assert student.figures["spearman"] == pytest.approx(float(spearman(noisy, gold)))
    assert low < student.figures["spearman"] < high < 1


def test_outputs_that_are_not_finite_stop_the_evaluation(tokenizer):
    model = pico("bert")
    data = sentences(["a b"], tokenizer, model.config)
    for run in (measure, embed):
        with pytest.raises(GateError, match="row 'broken': outputs are not finite"):
            run(model, data, [("broken", shifted(model, float("nan")))], pool=Pooling())
    with pytest.raises(InputError, match="two rows of one name"):
        measure(model, data, [("teacher", shifted(model, 0.0))], pool=Pooling())


@pytest.mark.slow
def test_minilm_at_its_published_figure(assets):
    where = assets / "minilm-l6-v2"
    model = AutoModel.from_pretrained(where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(where)
    pairs = read_pairs(assets / "sts-b-test" / "sts-test.csv")
    data = sentences(pairs.texts, tokenizer, model.config)
    assert len(pairs) == 1379 and isinstance(data, Sentences) and not data.notes
    row = table(similarity(model, data, pairs, [], pool=Pooling.of(where)))[0]
    assert row.figures["spearman"] == pytest.approx(0.8205, abs=5e-5)
    texts, _ = read_sentences(assets / "text" / "sotu.jsonl", limit=2)
    passages = sentences(texts, tokenizer, model.config, length=256, minimum=128, cut=True)
    assert len(passages) == 19 and int(passages.sizes.min()) >= 128 and passages.length <= 256
    found = table(retrieval(model, passages, [], pool=Pooling.of(where)))[0].figures["mrr"]
    first, second = ([tokenizer.decode(h["input_ids"], skip_special_tokens=True) for h in x] for x in passages.halves())
    vectors = []
    for half in (first, second):
        coded = tokenizer(half, padding=True, return_tensors="pt")
        mask = coded["attention_mask"][..., None]
        with torch.no_grad():
            vectors.append((model(**coded).last_hidden_state * mask).sum(1) / mask.sum(1))
    cosine = torch.nn.functional.cosine_similarity(vectors[0][:, None], vectors[1], dim=-1)
    places = [1 + (c > c.diagonal()[:, None]).sum(1) for c in (cosine, cosine.T)]
    assert found == pytest.approx(float(sum(1 / p for p in places).mean() / 2), abs=1e-6)
    assert found > 2 * sum(1 / n for n in range(1, 20)) / 19  # twice what chance finds
