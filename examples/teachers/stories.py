"""Build the small text teacher that ships with linearize, from stories15M.

    python examples/teachers/stories.py sample    --work WORK    # thousands of stories, as text, in WORK
    python examples/teachers/stories.py tokenizer --work WORK    # byte-level BPE of 2,048 pieces
    python examples/teachers/stories.py train     --work WORK    # 2.6M-parameter LlamaForCausalLM
    python examples/teachers/stories.py check     --work WORK    # perplexities, check.json, the card

stories15M (weights MIT) is read from `$LINEARIZE_ASSETS/stories15M` (default `../shared/assets`). The
sampled text stays in WORK, outside the repository: only the weights, the tokenizer, check.json and the
card are written to `linearize/teachers/text/`. Every step resumes where it was stopped: sampling by
whole shards, training from its last checkpoint. All of it runs on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
ASSETS = Path(os.environ.get("LINEARIZE_ASSETS", ROOT.parent / "shared" / "assets"))
OUT = ROOT / "linearize" / "teachers" / "text"

BOS, EOS, PAD = "<s>", "</s>", "<pad>"  # ids 0, 1, 2 of the teacher's own tokenizer
CONTEXT = 512


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write beside, then rename: a kill leaves the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(part, path)


# ------------------------------------------------------------------------------------------- sample


class Sampler:
    """stories15M in bf16 with a preallocated cache, all rows in lockstep, finished rows dropped.

    `generate` would concatenate its cache at every token and project onto all 32,000 pieces; most of
    those are never seen in a story, so after the first shard the head keeps only `vocab_ids`.
    """

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.config, bf16 = model.config, torch.bfloat16
        self.head_dim = self.config.hidden_size // self.config.num_attention_heads
        self.eps = self.config.rms_norm_eps
        self.embed = model.model.embed_tokens.weight.detach().to(bf16)
        self.head = model.lm_head.weight.detach().to(bf16)
        self.norm = model.model.norm.weight.detach().to(bf16)
        self.vocab_ids = torch.arange(self.config.vocab_size)
        self.layers = []
        for layer in model.model.layers:
            a, m = layer.self_attn, layer.mlp
            self.layers.append(
                (
                    layer.input_layernorm.weight.detach().to(bf16),
                    torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]).detach().to(bf16),
                    a.o_proj.weight.detach().to(bf16),
                    layer.post_attention_layernorm.weight.detach().to(bf16),
                    torch.cat([m.gate_proj.weight, m.up_proj.weight]).detach().to(bf16),
                    m.down_proj.weight.detach().to(bf16),
                )
            )

    def keep_vocab(self, ids: torch.Tensor) -> None:
        self.vocab_ids, self.head = ids, self.head[ids].contiguous()

    def step(self, token_B: torch.Tensor, t: int, cache: list, cos_TD, sin_TD) -> torch.Tensor:
        B, H, D = len(token_B), self.config.num_attention_heads, self.head_dim
        # RoPE is relative, so a story may run past the context if attention keeps to its last tokens.
        low = max(0, t + 1 - self.config.max_position_embeddings)
        x_BE = self.embed[token_B]
        for (norm1, qkv, out, norm2, gate_up, down), (k_BHTD, v_BHTD) in zip(self.layers, cache):
            h_BE = F.rms_norm(x_BE, x_BE.shape[-1:], norm1, self.eps)
            qkv_B3HD = F.linear(h_BE, qkv).view(B, 3, H, D)
            qk_B2HD, half = qkv_B3HD[:, :2], D // 2
            turned_B2HD = torch.cat([-qk_B2HD[..., half:], qk_B2HD[..., :half]], -1)
            qk_B2HD = qk_B2HD * cos_TD[t] + turned_B2HD * sin_TD[t]
            k_BHTD[:, :, t], v_BHTD[:, :, t] = qk_B2HD[:, 1], qkv_B3HD[:, 2]
            # The whole cache, masked: bf16 bmm copies any operand that is not contiguous.
            score_BH1T = (qk_B2HD[:, 0, :, None] * D**-0.5) @ k_BHTD.transpose(-1, -2)
            score_BH1T[..., t + 1 :] = score_BH1T[..., :low] = -math.inf
            y_BE = (score_BH1T.softmax(-1) @ v_BHTD).reshape(B, H * D)
            x_BE = x_BE + F.linear(y_BE, out)
            gate, up = F.linear(F.rms_norm(x_BE, x_BE.shape[-1:], norm2, self.eps), gate_up).chunk(2, -1)
            x_BE = x_BE + F.linear(F.silu(gate) * up, down)
        return F.linear(F.rms_norm(x_BE, x_BE.shape[-1:], self.norm, self.eps), self.head)

    @torch.no_grad()
    def sample(self, batch: int, length: int, temperature: float, top_p: float, generator, seen_V=None):
        """`batch` stories of at most `length` tokens: (text, whether it ended, token count)."""
        cfg, every = self.config, 24
        freq = 1.0 / cfg.rope_parameters["rope_theta"] ** (torch.arange(0, self.head_dim, 2) / self.head_dim)
        angle_TD = (torch.arange(length)[:, None] * freq).repeat(1, 2)
        cos_TD, sin_TD = angle_TD.cos().bfloat16(), angle_TD.sin().bfloat16()
        ids_BT = torch.full((batch, length), cfg.bos_token_id)
        alive_B = torch.ones(batch, dtype=torch.bool)
        empty = torch.zeros(batch, cfg.num_attention_heads, 0, self.head_dim, dtype=torch.bfloat16)
        cache = [[empty, empty] for _ in self.layers]
        done = []
        for t in range(length - 1):
            if t % every == 0:  # drop the finished rows and make room, together: each is a copy
                if not alive_B.any():
                    break
                cache = [[F.pad(side[alive_B], (0, 0, 0, every)) for side in layer] for layer in cache]
                ids_BT, alive_B = ids_BT[alive_B], alive_B[alive_B]
            logit_BV = self.step(ids_BT[:, t], t, cache, cos_TD, sin_TD).float() / temperature
            top_BK, index_BK = logit_BV.topk(96)
            prob_BK = (top_BK - logit_BV.logsumexp(-1, keepdim=True)).exp()
            if seen_V is not None:
                seen_V.scatter_reduce_(0, index_BK.flatten(), prob_BK.flatten(), "amax")
            prob_BK[prob_BK.cumsum(-1) - prob_BK > top_p] = 0  # the piece that crosses top_p stays
            pick_B1 = torch.multinomial(prob_BK, 1, generator=generator)
            token_B = self.vocab_ids[index_BK.gather(1, pick_B1)[:, 0]]
            ids_BT[:, t + 1] = token_B
            end_B = alive_B & ((token_B == cfg.bos_token_id) | (token_B == cfg.eos_token_id))
            done += [(row[1 : t + 1].tolist(), True) for row in ids_BT[end_B]]
            alive_B &= ~end_B
        done += [(row[1:].tolist(), False) for row in ids_BT[alive_B]]
        return self.decode(done)

    def decode(self, done):
        texts = self.tokenizer.batch_decode([ids for ids, _ in done], skip_special_tokens=True)
        return [(text.strip(), ended, len(ids)) for text, (ids, ended) in zip(texts, done)]


def sample(args) -> None:
    """Whole shards of `--batch` stories, each with its own seed, until `--shards` of them exist."""
    torch.set_num_threads(args.threads)
    sampler = Sampler(ASSETS / "stories15M")
    vocab_file = args.work / "vocab.json"
    if not vocab_file.exists():  # a first batch with the whole head says which pieces stories can use
        seen_V = torch.zeros(sampler.config.vocab_size)
        sampler.sample(256, 256, 1.0, 1.0, torch.Generator().manual_seed(args.seed), seen_V)
        write_atomic(vocab_file, json.dumps(seen_V.topk(8192).indices.sort().values.tolist()))
    sampler.keep_vocab(torch.tensor(json.loads(vocab_file.read_text())))
    settings = {"temperature": args.temperature, "top_p": args.top_p, "batch": args.batch, "seed": args.seed}
    write_atomic(args.work / "sample.json", json.dumps(settings))
    worker, workers = map(int, args.worker.split("/"))
    for shard in range(worker, args.shards, workers):
        path = args.work / "stories" / f"{shard:04d}.jsonl"
        if path.exists():
            continue
        start, generator = time.time(), torch.Generator().manual_seed(args.seed + 1 + shard)
        rows = sampler.sample(args.batch, 400, args.temperature, args.top_p, generator)
        tokens = sum(n for *_, n in rows)
        random.Random(shard).shuffle(rows)  # they come shortest first
        write_atomic(path, "".join(json.dumps({"text": t, "ended": e}) + "\n" for t, e, _ in rows))
        print(f"shard {shard}: {len(rows)} stories, {tokens / (time.time() - start):.0f} tokens/s", flush=True)


# ---------------------------------------------------------------------------------------- tokenizer


def stories(work: Path) -> tuple[list, list]:
    """(training, held out) stories; shard 0 is held out, and no text of it is left in the rest."""
    seen, parts = set(), ([], [])
    for path in sorted((work / "stories").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            text = re.sub(r"\n+", "\n\n", row["text"])  # paragraphs, as in TinyStories itself
            # Cut-off stories would teach the model to stop mid-sentence, stray bytes to print them.
            if row["ended"] and len(text) > 100 and text.isascii() and text not in seen:
                seen.add(text)
                parts[path.stem == "0000"].append(text)
    return parts


# The samples are pure ASCII, so the bytes of anything else are never trained and cost 18 nats each. Of the
# real stories every fourth holds curly quotes, most of them as the Windows-1252 reading of their UTF-8.
PLAIN = {
    "â€œ": '"',
    "â€™": "'",
    "â€˜": "'",
    "â€": '"',
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
    "–": "-",
    "—": "-",
    "…": "...",
}


def tokenizer(args) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.Replace(a, b) for a, b in PLAIN.items()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte: no text is out of vocabulary
        show_progress=False,
    )
    bpe.train_from_iterator(stories(args.work)[0], trainer)
    bpe.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
            ),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(args.out)


def load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# -------------------------------------------------------------------------------------------- train


def encode(tok, texts: list) -> list:
    """Each story between its BOS and its EOS."""
    return [torch.tensor(ids + [tok.eos_token_id], dtype=torch.int16) for ids in tok(texts)["input_ids"]]


def pack(docs: list, order: list, length: int) -> torch.Tensor:
    """Rows of `length` tokens, each beginning with the BOS of a story; what overhangs a row is left out.

    A row holds about two stories, one attending to the other, so that all of the context is trained.
    """
    rows, row = [], []
    for i in order:
        row.append(docs[i])
        if sum(map(len, row)) >= length:
            rows.append(torch.cat(row)[:length])
            row = []
    return torch.stack(rows).long()


def new_model(tok, seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        initializer_range=0.04,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # residual branches start small, as in GPT-2
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight /= math.sqrt(2 * config.num_hidden_layers)
    return model


def next_token_loss(model, ids_BT: torch.Tensor, reduction="mean") -> torch.Tensor:
    logits_BTV = model(ids_BT[:, :-1], use_cache=False).logits
    labels_N = ids_BT[:, 1:].flatten()
    pad = model.config.pad_token_id
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_N, ignore_index=pad, reduction=reduction)


def perplexity(model, docs: list, batch: int = 16) -> tuple[float, int]:
    """Token-weighted over whole documents. Padding is on the right, where causal attention never looks."""
    pad, total, count = model.config.pad_token_id, 0.0, 0
    docs = sorted(docs, key=len)
    with torch.no_grad():
        for i in range(0, len(docs), batch):
            part = [doc.long() for doc in docs[i : i + batch]]
            ids_BT = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=pad)
            total += next_token_loss(model, ids_BT, "sum").item()
            count += sum(len(doc) - 1 for doc in part)
    return math.exp(total / count), count


def export(model, out: Path) -> None:
    """The model in fp16, each file replaced whole."""
    model = copy.deepcopy(model).half()
    # What `generate` reads: greedy decoding, the default, repeats itself with so small a model.
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=256)
    part = out / "part"
    model.save_pretrained(part)
    for path in part.iterdir():
        path.chmod(0o644)  # safetensors leaves its file to its owner alone
        os.replace(path, out / path.name)
    part.rmdir()


def train(args) -> None:
    torch.set_num_threads(args.threads)
    tok = load_tokenizer(args.out)
    texts, held = stories(args.work)
    docs, held_docs = encode(tok, texts), [doc[:CONTEXT] for doc in encode(tok, held[:128])]
    print(f"{len(docs)} stories, {sum(map(len, docs))} tokens", flush=True)

    model = new_model(tok, args.seed)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    # Muon needs fewer tokens than AdamW for the matrices, and a CPU gives few; one rate serves both.
    optimizers = [torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)]
    if args.muon:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    else:
        optimizers.append(torch.optim.AdamW(matrices, betas=(0.9, 0.95), weight_decay=0.1))
    step, spent, checkpoint = 0, 0.0, args.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        step, spent = state["step"], state["spent"]
        print(f"resumed at step {step}", flush=True)

    def save() -> None:
        part = checkpoint.with_suffix(".part")
        states = [optimizer.state_dict() for optimizer in optimizers]
        torch.save({"model": model.state_dict(), "optimizers": states, "step": step, "spent": spent}, part)
        os.replace(part, checkpoint)
        export(model, args.out)
        facts = {"stories": len(docs), "distinct_tokens": sum(map(len, docs)), "held_out_stories": len(held)}
        facts |= {"steps": step, "of_steps": args.steps, "tokens_trained": step * args.tokens}
        facts |= {"learning_rate": args.lr, "muon": args.muon, "bf16_autocast": args.bf16, "seed": args.seed}
        write_atomic(args.work / "train.json", json.dumps(facts, indent=1))

    batches, running, start = [], [], time.time()
    while step < args.steps:
        # Attention is half the cost of a row of 512, so most of the training is on rows of half that.
        length = CONTEXT // 2 if step < args.short * args.steps else CONTEXT
        if not batches or batches[-1].shape[1] != length + 1:
            order = list(range(len(docs)))
            random.Random(args.seed + step).shuffle(order)
            rows = args.tokens // length
            batches = list(pack(docs, order, length + 1).split(rows)[:-1])
        warm, done = min(1.0, (step + 1) / 50), step / args.steps
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = next_token_loss(model, batches.pop())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        running.append(loss.item())
        if step % 25 == 0:
            spent, start = spent + time.time() - start, time.time()
            rate = step * args.tokens / spent
            print(f"step {step}  loss {sum(running) / len(running):.4f}  {rate:.0f} tokens/s", flush=True)
            running = []
        if step % 100 == 0 or step == args.steps:
            print(f"step {step}  held-out perplexity {perplexity(model, held_docs)[0]:.3f}", flush=True)
            save()
            start = time.time()


# -------------------------------------------------------------------------------------------- check


def masked_average(module, q_BHTD, k_BHTD, v_BHTD, bias_TT, scaling) -> tuple:
    repeat = q_BHTD.shape[1] // k_BHTD.shape[1]
    k_BHTD, v_BHTD = (x.repeat_interleave(repeat, 1) for x in (k_BHTD, v_BHTD))
    y_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, attn_mask=bias_TT, scale=scaling)
    return y_BHTD.transpose(1, 2).contiguous(), None


def age(q_BHTD) -> torch.Tensor:
    """How many tokens before its query each key lies; negative for the future. Whole sequences only."""
    at_T = torch.arange(q_BHTD.shape[2])
    return at_T[:, None] - at_T


def uniform_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Each query averages every visible value alike: what is left when attention chooses nothing."""
    return masked_average(module, torch.zeros_like(query), key, value, age(query) >= 0, scaling)


def window_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Softmax over the last 32 tokens, the query's own included; no sinks and no other repair."""
    age_TT = age(query)
    return masked_average(module, query, key, value, (age_TT >= 0) & (age_TT < 32), scaling)


def check(args) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    for name, function in (("uniform", uniform_attention), ("window32", window_attention)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, lambda *a, **k: None)  # they make their own
    tok = load_tokenizer(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    facts = json.loads((args.work / "train.json").read_text())
    held = stories(args.work)[1]
    docs = [doc[:CONTEXT] for doc in encode(tok, held)]
    per_token = round(sum(map(len, held)) / sum(len(doc) - 2 for doc in encode(tok, held)), 3)  # less BOS and EOS
    report = {
        "commands": [f"python examples/teachers/stories.py {c} --work WORK" for c in ("sample", "tokenizer", "train")],
        "note": args.note,
        "source": "stories15M",
        "shards": sorted(int(path.stem) for path in (args.work / "stories").glob("*.jsonl")),
        "sampling": json.loads((args.work / "sample.json").read_text()),
        "training": facts,
        "parameters": model.num_parameters(),
        "bytes": (args.out / "model.safetensors").stat().st_size,
        "context": CONTEXT,
        "held_out": {"stories": len(docs), "characters_per_token": per_token},
    }
    report["commands"][2] += f" --steps {facts['of_steps']}"
    report["commands"].append("python examples/teachers/stories.py check --work WORK")
    named = {"softmax": "sdpa", "uniform_attention": "uniform", "window_32": "window32"}
    for key, attention in named.items():
        model.set_attn_implementation(attention)
        ppl, report["held_out"]["tokens"] = perplexity(model, docs)
        report["held_out"][f"perplexity_{key}"] = round(ppl, 3)
        print(f"held-out perplexity, {key}: {ppl:.3f}", flush=True)
    ppl = report["held_out"]
    report["uniform_over_softmax"] = round(ppl["perplexity_uniform_attention"] / ppl["perplexity_softmax"], 2)
    report["window_over_softmax"] = round(ppl["perplexity_window_32"] / ppl["perplexity_softmax"], 3)
    report["uniform_at_least_3x"] = report["uniform_over_softmax"] >= 3
    report["window_costs_at_least_10_percent"] = report["window_over_softmax"] >= 1.1
    real = ASSETS / "text" / "tinystories-192.txt"
    if real.exists():  # never trained on: real stories, cut as this project's other figures on them are
        texts = [text.strip() for text in real.read_text().split("<|endoftext|>")][:120]
        docs = [torch.tensor(ids[:256]) for ids in tok(texts)["input_ids"]]
        report["tinystories_192"] = {"stories": len(docs), "tokens_each": "BOS and the first 255"}
        for key, attention in named.items():
            model.set_attn_implementation(attention)
            value, report["tinystories_192"]["tokens"] = perplexity(model, docs)
            report["tinystories_192"][f"perplexity_{key}"] = round(value, 3)
            print(f"tinystories-192 perplexity, {key}: {value:.3f}", flush=True)
    model.set_attn_implementation("sdpa")
    samples = []
    for i, prompt in enumerate(("Once upon a time", "One day, Tom found a", "Lily and her mom went to the")):
        torch.manual_seed(args.seed + i)
        ids = model.generate(**tok(prompt, return_tensors="pt", return_token_type_ids=False))
        samples.append(tok.decode(ids[0], skip_special_tokens=True))
        print(f"--- {samples[-1]}", flush=True)
    report["samples"] = samples
    write_atomic(args.out / "check.json", json.dumps(report, indent=1) + "\n")
    write_atomic(args.out / "README.md", card(report))
    if not (report["uniform_at_least_3x"] and report["window_costs_at_least_10_percent"]):
        raise SystemExit("this teacher does not use its attention enough: see check.json")


CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# stories-teacher

The text teacher embedded in `linearize`: a small softmax transformer to convert when no other is at hand. A
`LlamaForCausalLM` of {parameters:,} parameters ({megabytes:.1f} MB in fp16) with its own byte-level BPE of 2,048 pieces
and a context of {context} tokens. It writes very short stories in the words of a small child, and nothing else.
Load it with `dtype=torch.float32` on a CPU. Its tokenizer puts `<s>` first by itself, and the model expects it.
It was trained on ASCII alone: the tokenizer turns curly quotes, dashes and ellipses plain, other characters cost dear.

## Data

{stories:,} distinct stories ({distinct_tokens:,} tokens) sampled from stories15M (weights MIT, trained on TinyStories),
temperature {temperature}, top-p {top_p}. The text is not distributed. {held_out:,} further stories were held out.

## Training

{steps:,} steps, {tokens_trained:,} tokens, {optimizer}, cosine schedule, on a CPU, by
`examples/teachers/stories.py`. The commands, the seed and every number of this card are in `check.json`.

## Measured

Perplexity per token of its own tokenizer ({characters:.2f} characters each): compare it only with that of its students.

{table}

So it needs its attention: a uniform average is {uniform:.1f} times worse, and a window of 32 without any repair
costs {window:.0f} %. Stories are short: do not use it for claims about long context.

## A sample

{sample}

## Licence

Apache-2.0, as the rest of `linearize`; derived from samples of stories15M, whose weights are MIT.
"""


def card(report: dict) -> str:
    held, real = report["held_out"], report.get("tinystories_192")
    rows = [
        ["attention, same weights", "held-out stories"] + ["TinyStories, 120 real stories"] * bool(real),
        ["---"] * 3,
    ]
    for key, name in (
        ("softmax", "softmax, as trained"),
        ("window_32", "softmax over the last 32 tokens"),
        ("uniform_attention", "uniform average over the past"),
    ):
        rows.append([name, *(f"{part['perplexity_' + key]:.2f}" for part in (held, real) if part)])
    return CARD.format(
        parameters=report["parameters"],
        megabytes=report["bytes"] / 1e6,
        context=report["context"],
        **{key: report["training"][key] for key in ("stories", "distinct_tokens", "steps", "tokens_trained")},
        optimizer="Muon (AdamW for embeddings and norms)" if report["training"]["muon"] else "AdamW",
        temperature=report["sampling"]["temperature"],
        top_p=report["sampling"]["top_p"],
        held_out=held["stories"],
        characters=held["characters_per_token"],
        table="\n".join("| " + " | ".join(row[: 2 + bool(real)]) + " |" for row in rows),
        uniform=report["uniform_over_softmax"],
        window=100 * (report["window_over_softmax"] - 1),
        sample="\n".join(f"> {line}".rstrip() for line in report["samples"][0].splitlines()),
    )


def main() -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--work", type=Path, required=True, help="folder for text and checkpoints, outside the repo")
    common.add_argument("--out", type=Path, default=OUT)
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--threads", type=int, default=1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("sample", parents=[common])
    p.add_argument("--shards", type=int, default=20)
    p.add_argument("--batch", type=int, default=512)
    p.add_argument("--temperature", type=float, default=0.9)
    p.add_argument("--top-p", type=float, default=0.95)
    p.add_argument("--worker", default="0/1", help="i/n: take every n-th shard, to run n of these side by side")
    p = commands.add_parser("tokenizer", parents=[common])
    p.add_argument("--vocab", type=int, default=2048)
    p = commands.add_parser("train", parents=[common])
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--tokens", type=int, default=4096, help="tokens per step")
    p.add_argument("--short", type=float, default=0.75, help="part of the steps on rows of 256 tokens, not 512")
    p.add_argument("--lr", type=float, default=6e-3)
    p.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True, help="AdamW alone otherwise")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast")
    p = commands.add_parser("check", parents=[common])
    p.add_argument("--note", help="how this run departed from the commands, for check.json")
    args = parser.parse_args()
    globals()[args.command](args)


if __name__ == "__main__":
    main()
