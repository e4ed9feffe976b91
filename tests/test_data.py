"""Reading, tokenising, packing; self-generated data."""

import json
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from linearize.data import selfgen as module
from linearize.data import text
from linearize.data.selfgen import _prompt_ids, frequent_tokens, selfgen
from linearize.data.text import Tokens, check_length, documents, first_token, read_chats, read_texts, tokenize
from linearize.seams.cache import GrowingLayer, growing_cache
from linearize.testing.pico import pico
from linearize.types import InputError, StorageError

SENTENCE = "once upon a time there was little girl and boy who saw big red dog in the park"
WORDS = SENTENCE.split()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def make_tokenizer(bos="<s>", chat=None):
    marks = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant"]
    vocab = {w: i for i, w in enumerate(marks + WORDS)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token="</s>", unk_token="<unk>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = chat
    return made


def make_texts(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 30, (count,), generator=g).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=g)) for n in sizes]


def make_model(vocab, **over):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes | over)).eval()


@pytest.fixture
def tokenizer():
    return make_tokenizer()


# ------------------------------------------------------------------------------------------------- reading
def test_every_kind_of_file_gives_the_same_texts(tmp_path):
    import pyarrow as arrow
    from pyarrow import parquet

    want = ["One day, a boy.", 'He said "hi"\nand left.', "Größe\u2028 x"]
    rows = [{"id": str(i), "text": t} for i, t in enumerate(want)]
    (tmp_path / "a.txt").write_bytes("<|endoftext|>".join(want).encode())
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    quoted = "\n".join('{},"{}"'.format(r["id"], r["text"].replace('"', '""')) for r in rows)
    (tmp_path / "a.csv").write_text("id,text\n" + quoted, encoding="utf-8-sig")
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet"):
        assert read_texts(tmp_path / name) == want, name
    assert len(read_texts(tmp_path)) == 15
    assert len(read_texts(tmp_path, limit=4)) == 4
    assert read_texts(tmp_path / "a.txt", split="[1:]") == want[1:]
    assert read_texts(tmp_path / "a.jsonl", split="train[:34%]") == want[:1]


def test_a_text_file_without_a_mark_is_one_document(tmp_path):
    (tmp_path / "w.txt").write_text(" = Title = \n\n Text .\n")
    assert read_texts(tmp_path / "w.txt") == [" = Title = \n\n Text .\n"]


def test_a_split_picks_files_of_a_folder(tmp_path):
    (tmp_path / "train-0.txt").write_text("a")
    (tmp_path / "valid.txt").write_text("b")
    assert read_texts(tmp_path, split="valid") == ["b"]
    with pytest.raises(InputError, match=r"no file of split 'test'.*train-0.txt"):
        read_texts(tmp_path, split="test")


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "options", "match"),
    [
        ("a.txt", b"", {}, "no text in it"),
        ("a.txt", b" \n<|endoftext|> ", {}, "no text in it"),
        ("a.txt", b"ab\xff", {}, "not UTF-8 at byte 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', {}, "line 2: not JSON"),
        ("a.jsonl", b"17", {}, "line 1: expected an object or a string"),
        ("a.jsonl", b'{"story": "a", "text_": "b"}', {"text_column": "text"}, "no column 'text'; did you mean 'text_'"),
        ("a.jsonl", b'{"title": "a", "story": "b"}', {}, "which column is the text"),
        ("a.csv", b"title,story\na,b", {}, "which column is the text"),
        ("a.parquet", b"PAR1", {}, "not a readable parquet file"),
        ("a.bin", b"x", {}, "unknown kind of file"),
        ("a.txt", b"x", {"split": "test"}, "no split 'test'"),
    ],
)
def test_bad_sources_are_one_clear_line(tmp_path, name, data, options, match):
    with pytest.raises(InputError, match=match) as caught:
        read_texts(write(tmp_path / name, data), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["no/such/file.txt", "./nothing", "/nowhere", "nope.jsonl", "a b"])
def test_a_missing_path_is_not_asked_of_the_hub(source):
    with pytest.raises(InputError, match="no such file or folder"):
        read_texts(source)


def test_a_hub_dataset_that_cannot_be_reached(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no net")))
    with pytest.raises(InputError, match="dataset 'me/stories' could not be loaded .*no net"):
        read_texts("me/stories")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [{"text": f"{a} {k['split']}"}])
    assert read_texts("me/stories:small", split="test") == ["('me/stories', 'small') test"]


def test_chats_in_three_forms(tmp_path):
    want = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"messages": want},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "input": "", "output": "b"},
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_chats(tmp_path / "c.jsonl") == [want] * 3
    (tmp_path / "d.jsonl").write_text('{"text": "a"}')
    with pytest.raises(InputError, match="column 'messages'.*has columns text"):
        read_chats(tmp_path / "d.jsonl")


# ------------------------------------------------------------------------------------------------- packing
def test_packing_loses_nothing_but_the_tail(tokenizer):
    texts = make_texts(40)
    data = tokenize(texts, tokenizer, 16)
    flat = [i for t in texts for i in tokenizer(t).input_ids]
    out = []
    for item in data:
        assert len(item["input_ids"]) == 16
        starts = item["position_ids"] == 0
        assert (item["input_ids"][starts] == tokenizer.bos_token_id).all() and starts[0]
        assert (item["labels"][starts] == -100).all()
        assert (item["labels"][~starts] == item["input_ids"][~starts]).all()
        out += item["input_ids"][~starts].tolist()
    assert out == flat[: len(out)] and len(flat) - len(out) < 16
    assert data.tokens == 16 * len(data)


def test_without_packing_each_sequence_is_of_one_document(tokenizer):
    texts = make_texts(40)
    sizes = [len(tokenizer(t).input_ids) for t in texts]
    data = tokenize(texts, tokenizer, 16, pack=False)
    assert len(data) == sum(n // 15 for n in sizes)
    short = tokenize(texts, tokenizer, 16, pack=False, minimum=4)
    assert {len(item["input_ids"]) for item in short} == set(range(4, 17))
    for item in short:
        assert torch.equal(item["position_ids"], torch.arange(len(item["input_ids"])))


def test_documents_in_one_sequence_do_not_see_each_other(tokenizer):
    model = make_model(len(tokenizer))
    data = tokenize(make_texts(40), tokenizer, 48)
    batch = data.collate([data[i] for i in range(3)])
    assert "attention_mask" not in batch and batch["position_ids"].eq(0).sum() > 4
    with torch.no_grad():
        together = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for ids, places, logits in zip(batch["input_ids"], batch["position_ids"], together, strict=True):
            edges = (places == 0).nonzero().flatten().tolist() + [48]
            for a, b in zip(edges, edges[1:], strict=False):
                alone = model(ids[None, a:b], use_cache=False).logits[0]
                torch.testing.assert_close(alone, logits[a:b], atol=1e-5, rtol=1e-5)


def test_collate_pads_on_the_right_and_says_so(tokenizer):
    data = tokenize(make_texts(40), tokenizer, 16, pack=False, minimum=4)
    batch = data.collate([data[i] for i in range(len(data))])
    sizes = batch["attention_mask"].sum(1)
    assert sizes.min() < sizes.max() == batch["input_ids"].shape[1]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_the_digest_is_of_ids_and_settings(tokenizer, tmp_path):
    texts = make_texts(40)
    a = tokenize(texts, tokenizer, 16)
    assert a.digest == tokenize(texts, tokenizer, 16).digest
    assert a.digest != tokenize(texts, tokenizer, 16, seed=1).digest
    assert a.digest != tokenize(texts[1:], tokenizer, 16).digest
    assert a.digest != a.take(1).digest
    a.save(tmp_path / "a")
    a.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    b = Tokens.open(tmp_path / "a")
    assert b.digest == a.digest and all(torch.equal(a[5][k], b[5][k]) for k in a[5])
    assert Tokens.join([a.take(0, 3), a.take(3)], a.settings).digest == a.digest
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes()[:100])
    with pytest.raises(StorageError, match="not a readable file of tokens"):
        Tokens.open(tmp_path / "b")


def test_hold_out(tokenizer):
    data = tokenize(make_texts(40), tokenizer, 16)
    train, valid = data.hold_out(33)
    assert len(valid) == 3 and len(train) == len(data) - 3
    with pytest.raises(InputError, match="too few to hold out"):
        data.hold_out(data.tokens)


def test_documents_for_evaluation(tokenizer):
    docs = documents(["once upon a time", "", "once"], tokenizer, 4)
    assert [d.tolist() for d in docs] == [[0, 7, 8, 9], [0, 7]]
    with pytest.raises(InputError, match="at least two tokens"):
        documents([""], tokenizer, 4)


def test_one_long_text_is_evaluated_piece_by_piece(tokenizer):
    whole = documents([SENTENCE], tokenizer, 7)
    assert [len(d) for d in whole] == [7, 7, 7]
    assert torch.cat([d[1:] for d in whole]).tolist() == tokenizer(SENTENCE).input_ids
    assert all(d[0] == 0 for d in whole)
    assert len(documents([SENTENCE], tokenizer, 7, limit=2)) == 2
    assert len(documents([SENTENCE], tokenizer, 7, cut=False)) == 1
    assert len(documents([SENTENCE] * 2, tokenizer, 7)) == 2
    assert len(documents([SENTENCE] * 2, tokenizer, 7, cut=True)) == 6


def test_limits_of_the_model(tokenizer):
    data = tokenize(make_texts(40), tokenizer, 16)
    data.check(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=16))
    with pytest.raises(InputError, match="use the tokenizer that came with the model"):
        data.check(LlamaConfig(vocab_size=10))
    with pytest.raises(InputError, match="--allow-longer"):
        check_length(17, LlamaConfig(max_position_embeddings=16))
    check_length(17, LlamaConfig(max_position_embeddings=16), allow_longer=True)
    with pytest.raises(InputError, match="shorter than one sequence"):
        tokenize(["once upon"], tokenizer, 16)


# ---------------------------------------------------------------------------------------------------- chat
CHATS = [
    [
        {"role": "user", "content": "who saw the dog"},
        {"role": "assistant", "content": "a girl"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "a boy in the park"},
    ],
] * 3


def test_completion_only_learns_the_assistants_turns():
    tokenizer = make_tokenizer(chat=CHATML)
    data = tokenize(CHATS, tokenizer, 31, pack=False, minimum=2, chat=True, completion_only=True)
    for item in data:
        learned = item["labels"][item["labels"] != -100]
        assert tokenizer.decode(learned) == "a girl <|im_end|> a boy in the park <|im_end|>"
    everything = tokenize(CHATS, tokenizer, 31, pack=False, minimum=2, chat=True)
    assert (everything[0]["labels"][1:] != -100).all()


def test_chat_needs_a_template_and_turns(tokenizer):
    with pytest.raises(InputError, match="no chat template"):
        tokenize(CHATS, tokenizer, 8, chat=True)
    with pytest.raises(InputError, match="not plain text"):
        tokenize(["a"], make_tokenizer(chat=CHATML), 8, chat=True)
    with pytest.raises(InputError, match="needs data.chat"):
        tokenize(["a"], tokenizer, 8, completion_only=True)


def test_a_token_that_opens_turns_does_not_open_documents():
    assert first_token(make_tokenizer(bos="<|im_start|>", chat=CHATML)) is None
    assert first_token(make_tokenizer(chat="{{ bos_token }}" + CHATML)) == 0
    assert first_token(make_tokenizer(bos=None)) is None


def test_cut_documents_begin_with_the_first_token_again(tokenizer):
    data = tokenize([" ".join(WORDS * 3)], tokenizer, 10)
    assert all(item["input_ids"][0] == 0 for item in data)
    assert text.tokenize([" ".join(WORDS * 3)], tokenizer, 10, bos=False)[1]["input_ids"][0] != 0


# ------------------------------------------------------------------------------------------------- selfgen
@pytest.fixture
def writer(tokenizer):
    return make_model(len(tokenizer), bos_token_id=0, eos_token_id=1), tokenizer


def items(data):
    return [item for i in range(len(data)) for item in data[i].values()]


def test_selfgen_is_seeded_and_a_longer_call_continues_a_shorter_one(writer):
    a, b, more, other = (
        selfgen(*writer, tokens, 16, seed=seed, batch=4) for tokens, seed in [(100, 3), (100, 3), (200, 3), (100, 4)]
    )
    assert a.digest == b.digest != other.digest
    assert 100 <= a.tokens < 116 and len(more) == 13
    assert all(torch.equal(x, y) for x, y in zip(items(a), items(more), strict=False))
    assert (a.ids.view(-1, 16)[:, 0] == 0).all()


def test_selfgen_starts_a_new_document_behind_an_end(writer):
    data = selfgen(*writer, 2000, 32, seed=0, batch=32)
    ids = data.ids.view(-1, 32)
    ended = ids[:, :-1] == 1
    assert ended.any() and (ids[:, 1:][ended] == 0).all()
    for item in data:
        assert torch.equal(item["position_ids"] == 0, item["input_ids"] == 0)


def test_selfgen_ignores_the_models_own_sampling_settings_and_leaves_random_state_alone(writer):
    model, tokenizer = writer
    want = selfgen(model, tokenizer, 64, 16, batch=4).digest
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 3.0
    model.train()
    state = torch.get_rng_state()
    assert selfgen(model, tokenizer, 64, 16, batch=4).digest == want
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and model.generation_config.top_k == 1


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_selfgen_samples_what_the_model_says(writer, top_p):
    model, tokenizer = writer
    data = selfgen(model, tokenizer, 40000, 2, batch=5000, temperature=1.5, top_p=top_p)
    with torch.no_grad():
        want = (model(torch.tensor([[0]])).logits[0, 0] / 1.5).softmax(-1)
    high, order = want.sort(descending=True)
    kept = order[: int((high.cumsum(0) < top_p).sum()) + 1]
    want = torch.zeros_like(want).index_copy(0, kept, want[kept])
    got = data.ids.view(-1, 2)[:, 1].bincount(minlength=len(want)) / len(data)
    torch.testing.assert_close(got, want / want.sum(), atol=0.01, rtol=0)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("when", ["sampling", "shard", "index"])
def test_an_interrupted_run_ends_with_the_same_bytes(writer, tmp_path, monkeypatch, when):
    whole = selfgen(*writer, 200, 16, batch=4, folder=tmp_path / "whole")
    target = {"sampling": (module, "sample"), "shard": (Tokens, "save"), "index": (module, "write_atomic")}[when]
    real, calls = getattr(*target), []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise Stopped
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(*target, stop)
        selfgen(*writer, 200, 16, batch=4, folder=tmp_path / "cut")
    again = selfgen(*writer, 200, 16, batch=4, folder=tmp_path / "cut")
    assert again.digest == whole.digest
    assert whole.made is not None and again.made is not None and again.made.tokens == whole.made.tokens == whole.tokens
    assert whole.made.steps == 4 and whole.made.seconds > 0 and not whole.made.notes  # 4 x 16 tokens a shard
    files = sorted(f.name for f in (tmp_path / "whole").iterdir())
    assert len(files) == 6 and files == sorted(f.name for f in (tmp_path / "cut").iterdir())
    (tmp_path / "cut" / module.TIMES).unlink()  # as older folders have none
    older = selfgen(*writer, 200, 16, batch=4, folder=tmp_path / "cut").made
    assert older is not None and older.seconds != older.seconds and "4 of 4 shards" in older.notes[0]
    for name in set(files) - {module.TIMES}:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_finished_shards_are_read_and_a_damaged_one_is_made_again(writer, tmp_path, monkeypatch):
    want = selfgen(*writer, 200, 16, batch=4, folder=tmp_path / "a").digest
    (tmp_path / "a" / "shard-00001.safetensors").write_bytes(b"torn")
    made, real = [], module.sample
    monkeypatch.setattr(module, "sample", lambda *a, **k: made.append(1) or real(*a, **k))
    assert selfgen(*writer, 200, 16, batch=4, folder=tmp_path / "a").digest == want
    assert len(made) == 1


def test_a_folder_of_other_data_is_refused(writer, tmp_path):
    model, tokenizer = writer
    selfgen(model, tokenizer, 64, 16, batch=4, folder=tmp_path / "a")
    with pytest.raises(InputError, match=r"made otherwise \(seed\)"):
        selfgen(model, tokenizer, 64, 16, seed=1, batch=4, folder=tmp_path / "a")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(InputError, match=r"made otherwise \(model\)"):
        selfgen(model, tokenizer, 64, 16, batch=4, folder=tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    with pytest.raises(InputError, match="not empty"):
        selfgen(model, tokenizer, 64, 16, batch=4, folder=tmp_path / "b")
    with pytest.raises(InputError, match="longer than the model's 64 positions"):
        selfgen(model, tokenizer, 64, 65)


def test_without_a_first_token_texts_begin_with_common_words():
    tokenizer = make_tokenizer(bos=None)
    model = make_model(len(tokenizer), bos_token_id=None, eos_token_id=1)
    data = selfgen(model, tokenizer, 2000, 16, batch=16)
    first = data.ids.view(-1, 16)[:, 0]
    assert set(first.tolist()) <= set(frequent_tokens(tokenizer)) and len(first.unique()) > 5
    for item in data:
        begins = (item["position_ids"] == 0).nonzero().flatten()[1:]
        assert (item["input_ids"][begins - 1] == 1).all()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("more", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}], ids=["greedy", "beams"])
def test_a_cache_that_does_not_copy_is_the_cache(family, more):
    model = pico(family)
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    cache = growing_cache(model.config)
    found = model.generate(ids, max_new_tokens=90, past_key_values=cache, **more)
    assert torch.equal(found, model.generate(ids, max_new_tokens=90, **more))
    assert any(isinstance(layer, GrowingLayer) for layer in cache.layers)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_selfgen_completes_prompts(kind):
    tokenizer = make_tokenizer(chat="{{ bos_token }}" + CHATML)
    model = make_model(len(tokenizer), bos_token_id=0, eos_token_id=1)
    model.generation_config.eos_token_id = [1, 4]
    prompts = ["once upon a time", "the red dog in", "boy who saw"]
    if kind == "chat":
        prompts = [[{"role": "user", "content": p}, {"role": "assistant", "content": "x"}] for p in prompts]
    data = selfgen(model, tokenizer, 600, 32, batch=7, prompts=prompts, completion_only=True)
    assert data.digest == selfgen(model, tokenizer, 600, 32, batch=7, prompts=prompts, completion_only=True).digest
    asked = _prompt_ids(prompts, tokenizer, 32)
    whole = 0
    for item in data:
        begins = (item["position_ids"] == 0).nonzero().flatten().tolist() + [32]
        for a, b in zip(begins, begins[1:], strict=False):
            for prompt in asked:
                if item["input_ids"][a:b][: len(prompt)].tolist() == prompt:
                    learned = item["labels"][a:b] != -100
                    assert not learned[: len(prompt)].any() and learned[len(prompt) :].all()
                    whole += 1
    assert whole > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories15M", "stories260K"])
def test_stories_models_write_stories(name):
    folder = Path(os.environ.get("LINEARIZE_ASSETS", Path(__file__).parents[2] / "shared" / "assets")) / name
    if not folder.exists():
        pytest.skip(f"no {name} in {folder.parent} ($LINEARIZE_ASSETS)")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = selfgen(model, tokenizer, 1500, 96, batch=16, seed=1)
    batch = data.collate([data[i] for i in range(len(data))])
    with torch.no_grad():
        loss = model(**batch, use_cache=False).loss
    assert (batch["input_ids"][:, 0] == 1).all() and 0.8 < loss < 2.0  # its own text, as likely as it finds stories
    assert sum("once upon a time" in tokenizer.decode(row).lower() for row in batch["input_ids"]) > 4
