"""Build a teacher that can recall: a small LlamaForCausalLM that finds passkeys, needles and pairs in 2,048 tokens.

    python examples/teachers/recall.py tokenizer --work WORK    # words of the tasks, and characters for all others
    python examples/teachers/recall.py train     --work WORK    # 2 layers, an induction circuit laid out, then trained
    python examples/teachers/recall.py check     --work WORK    # exact match by task and length, check.json, the card

Everything it reads is made by `linearize.evaluate.recall.tasks`, with other seeds than `check` and `linearize eval
--suite recall` take. It learns answers alone. Training resumes from its last checkpoint. All of it runs on one core of
a CPU. The teacher stands beside this script, in `recall/`: it is not part of the package.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from stories import export, write_atomic  # the script beside this one

from linearize.evaluate.recall import suite, tasks

OUT = Path(__file__).resolve().parent / "recall"
CONTEXT = 2048
PAD, UNKNOWN = "<pad>", "<unk>"
#: share of each task in training
MIX = {"mqar": 0.6, "passkey": 0.2, "s-niah-1": 0.1, "niah-words": 0.07, "niah-words-uuid": 0.03}


# ---------------------------------------------------------------------------------------- tokenizer


def words() -> list[str]:
    """Every word of the tasks that is no number."""
    rng, texts = random.Random(0), [" ".join((*tasks.NOISE, *tasks.KEYS, *tasks.VALUES, *tasks.WORDS))]
    for name in MIX:
        quiz = tasks.TASKS[name].write(rng, 1)
        texts.append("".join((quiz.head, quiz.needle, *(question for question, _ in quiz.questions))))
    texts.append(" ".join(word.capitalize() for word in tasks.WORDS))
    return sorted(set(re.findall(r"[A-Za-z]{2,}", " ".join(texts))) - set(re.findall(r"[0-9a-f]+", " ".join(texts))))


def tokenizer(args) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(33, 127)]
    pieces = [PAD, UNKNOWN, *characters, *("##" + c for c in characters), *words()]
    model = models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token=UNKNOWN)
    fast = Tokenizer(model)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece(cleanup=False)
    PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token=PAD, unk_token=UNKNOWN, padding_side="left", model_max_length=CONTEXT
    ).save_pretrained(args.out)


def load_tokenizer(folder: Path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


# -------------------------------------------------------------------------------------------- train


def new_model(tok, args):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=132,
        intermediate_size=256,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        # Slow rotations leave most of the few channels to what a token is; the fastest two say what is next to it.
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=tok.pad_token_id,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config)
    if args.circuit:
        lay_circuit(model)
    return model


@torch.no_grad()
def lay_circuit(model) -> None:
    """Start with an induction circuit (Olsson et al., 2209.11895), rough: most of a training would go into finding it.

    The stream is a constant, 63 channels of what a token is, and a slot for each head of the first layer. Those heads
    look 1 to 6 tokens back, by RoPE, and copy the code of what stands there into their slots. In the second layer half
    of the heads look for slots that hold the token they stand at, the others for its two predecessors as well; both
    copy what stands there.
    """
    E, D, slot = model.model.embed_tokens.weight, 16, 64
    first, second = (layer.self_attn for layer in model.model.layers)
    for layer in model.model.layers:
        for p in layer.parameters():
            if p.ndim == 2:
                p.mul_(0.1)
    slow = torch.tensor([3, 4, 5, 6, 7, 11, 12, 13, 14, 15])  # channels that hardly turn in 2,048 tokens
    codes, size = spread_out(len(E), len(slow)), len(slow)
    E[:, 0], E[:, slot:] = 0.8, 0.0  # all rows of one length: no token is louder than the others
    for part in (codes, torch.randn(len(E), slot - 1 - size)):
        width = part.shape[1]
        E[:, 1 + size * (width != size) :][:, :width] = 0.2 * width**0.5 * F.normalize(part, dim=-1)
    constant = 0.8 / E.square().mean(-1).sqrt().mean()  # after the norm
    speed = model.config.rope_parameters["rope_theta"] ** (-torch.arange(4) * 2 / D)
    some = torch.arange(size)
    for head in range(model.config.num_attention_heads):
        rows, place = slice(head * D, (head + 1) * D), slot + head * size + some
        q, k = first.q_proj.weight[rows], first.k_proj.weight[rows]  # softmax over how far back, sharply
        q[:4, 0] += 15 / constant
        k[:4, 0] += 15 * (speed * (head + 1)).cos() / constant
        k[8:12, 0] += 15 * (speed * (head + 1)).sin() / constant
        first.v_proj.weight[head * D + some, 1 + some] += 1
        first.o_proj.weight[place, head * D + some] += 0.2
        q, k = second.q_proj.weight[rows], second.k_proj.weight[rows]
        if head < 3:
            q[slow, 1 + some] += 5.5
            k[slow, slot + some] += 5.5
        else:  # three tokens at once, each by a part of its code
            one, two, three = slow[:4], slow[4:7], slow[7:]
            q[one, 1 + some[:4]] += 6
            k[one, slot + some[:4]] += 6
            for channels, n in ((two, 1), (three, 2)):
                part = some[4:7] if n == 1 else some[7:]
                q[channels, slot + (n - 1) * size + part] += 6
                k[channels, slot + n * size + part] += 6
        channels = 1 + head % 3 * D + torch.arange(D)
        second.v_proj.weight[rows, channels] += torch.eye(D)
        second.o_proj.weight[channels, rows] += torch.eye(D) * (0.7 if head < 3 else 0.55)


def spread_out(count: int, size: int, steps: int = 300) -> torch.Tensor:
    """Unit vectors that keep away from each other."""
    codes = torch.randn(count, size)
    with torch.enable_grad():
        for _ in range(steps):
            codes = F.normalize(codes.detach(), dim=-1).requires_grad_()
            near = (codes @ codes.T - 2 * torch.eye(count)) * 12
            codes = codes - 0.5 * torch.autograd.grad(near.logsumexp(-1).mean() / 12 * count, codes)[0] / 10
    return F.normalize(codes.detach(), dim=-1)


def batch_of(tok, length: int, count: int, rng: random.Random) -> list[tasks.Trial]:
    trials = []
    while len(trials) < count:
        name = rng.choices(list(MIX), list(MIX.values()))[0]
        most = min(len(tasks.KEYS), length // 4)
        pairs = rng.randint(most // 2, most) if rng.random() < 0.7 else rng.randint(1, most)
        try:
            trials.append(
                tasks.trial(tasks.TASKS[name], tok, length, depth=rng.random(), pairs=pairs, seed=rng.getrandbits(62))
            )
        except tasks.InputError:  # this task does not fit into so few tokens
            continue
    return trials


def answers(model, trials: list[tasks.Trial]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, wanted tokens, trial) of every token of every answer. Padding is on the right, where nobody looks."""
    rows = [(n, t) for n, trial in enumerate(trials) for start, stop in trial.answers for t in range(start, stop)]
    row_N, column_N = torch.tensor(rows).T
    ids_BT = torch.nn.utils.rnn.pad_sequence([trial.ids_T for trial in trials], batch_first=True)
    hidden_BTD = model.model(ids_BT, use_cache=False).last_hidden_state
    return model.lm_head(hidden_BTD[row_N, column_N - 1]).float(), ids_BT[row_N, column_N], row_N


def exact(model, tok, name: str, length: int, count: int, pairs: int | None = None, seed: int = -1) -> float:
    """Share of answers that greedy decoding would give whole, needles at `count` depths."""
    trials = [
        tasks.trial(tasks.TASKS[name], tok, length, depth=(n + 0.5) / count, pairs=pairs, seed=seed - n)
        for n in range(count)
    ]
    with torch.no_grad():
        right = suite.answered(model, trials)
    return sum(right) / len(right)


def train(args) -> None:
    torch.set_num_threads(args.threads)
    tok = load_tokenizer(args.out)
    stages = [tuple(map(int, stage.split(":"))) for stage in args.stages.split(",")]
    lengths = [length for length, steps in stages for _ in range(steps)]
    model = new_model(tok, args)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    optimizers = [
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    step, spent, checkpoint = 0, 0.0, args.work / "checkpoint.pt"
    args.work.mkdir(parents=True, exist_ok=True)
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
        part.replace(checkpoint)
        export(model, args.out)
        facts = {"steps": step, "of_steps": len(lengths), "stages": args.stages, "tokens_per_step": args.tokens}
        facts |= {"seconds": round(spent), "learning_rate": args.lr, "optimizer": "Muon, AdamW beside it", "mix": MIX}
        facts |= {"circuit": args.circuit, "bf16_autocast": args.bf16, "seed": args.seed}
        write_atomic(args.work / "train.json", json.dumps(facts, indent=1))

    running, seen, start = [], 0, time.time()
    while step < len(lengths):
        rng = random.Random(f"{args.seed} {step}")
        length = lengths[step]
        if rng.random() < 0.2 and length > 64:  # short ones are not forgotten
            length = rng.choice([n for n in (64, 128, 256, 512, 1024) if n < length])
        trials = batch_of(tok, length, max(1, args.tokens // length), rng)
        # Warm, then flat: as long as it takes; the rate falls over the last fifth.
        rate = args.lr * min(1.0, (step + 1) / 20, (len(lengths) - step) / (0.2 * len(lengths)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits_NV, wanted_N, row_N = answers(model, trials)
        nll_N = F.cross_entropy(logits_NV, wanted_N, reduction="none")
        size_B = torch.zeros(len(trials)).index_add_(0, row_N, torch.ones(len(row_N)))
        loss = (nll_N / size_B[row_N]).sum() / len(trials)  # a passkey counts as much as many pairs
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step, seen = step + 1, seen + sum(len(trial.ids_T) for trial in trials)
        running.append(loss.item())
        if step % 10 == 0:
            took = time.time() - start
            mean = sum(running) / len(running)
            print(f"step {step}  length {length}  loss {mean:.4f}  {seen / took:.0f} tokens/s", flush=True)
            spent, start, running, seen = spent + took, time.time(), [], 0
        if step % 20 == 0 or step == len(lengths):
            L = lengths[step - 1]
            found = {"mqar": exact(model, tok, "mqar", L, 8, pairs=min(250, L // 8))}
            found["passkey"] = exact(model, tok, "passkey", L, 32)
            print(f"step {step}  " + "  ".join(f"{k} {v:.3f}" for k, v in found.items()) + f" at {L}", flush=True)
            save()
            start = time.time()


# -------------------------------------------------------------------------------------------- check


def window_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Softmax over the last 64 tokens and the first 4."""
    at_T = torch.arange(query.shape[2])
    age_TT = at_T[:, None] - at_T
    seen = (age_TT >= 0) & ((age_TT < 64) | (at_T < 4))
    y_BHTD = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return y_BHTD.transpose(1, 2).contiguous(), None


def check(args) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    AttentionInterface.register("window64", window_attention)
    AttentionMaskInterface.register("window64", lambda *a, **k: None)
    tok = load_tokenizer(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    facts = json.loads((args.work / "train.json").read_text())
    report = {
        "commands": [f"python examples/teachers/recall.py {c} --work WORK" for c in ("tokenizer", "train", "check")],
        "note": args.note,
        "training": facts,
        "parameters": model.num_parameters(),
        "bytes": (args.out / "model.safetensors").stat().st_size,
        "context": CONTEXT,
        "exact_match": {},
    }
    report["commands"][1] += f" --stages {facts['stages']}"
    for key, attention in {"softmax": "sdpa", "window_64": "window64"}.items():
        model.set_attn_implementation(attention)
        rows = report["exact_match"][key] = {}
        for name, pairs in [("passkey", None), *(("mqar", n) for n in (16, 64, 250)), *((n, None) for n in NIAH)]:
            for length in (256, 1024, CONTEXT) if key == "softmax" else (CONTEXT,):
                if pairs and 4 * pairs > length:
                    continue
                count = args.trials if not pairs else max(2, -(-args.trials // pairs))
                value = exact(model, tok, name, length, count, pairs=pairs, seed=-(10**6))
                rows[f"{name} {pairs or ''}".strip() + f" at {length}"] = round(value, 4)
                print(f"{key} {name} {pairs or ''} at {length}: {value:.3f}", flush=True)
    found = report["exact_match"]["softmax"]
    asked = [value for name, value in found.items() if name.startswith(("passkey", "mqar")) and str(CONTEXT) in name]
    report["at_least_0_95"] = min(asked) >= 0.95
    write_atomic(args.out / "check.json", json.dumps(report, indent=1) + "\n")
    write_atomic(args.out / "README.md", card(report, model.config))
    if not report["at_least_0_95"]:
        raise SystemExit("this teacher recalls too little: see check.json")


NIAH = ("s-niah-1", "niah-words", "niah-words-uuid")
CARD = """---
license: apache-2.0
pipeline_tag: text-generation
---

# recall-teacher

A softmax transformer that finds again what its text held, to measure what linear attention forgets. A
`LlamaForCausalLM` of {parameters:,} parameters ({megabytes:.1f} MB in fp16): {layers} layers, {heads} heads of 16, a
context of {context:,} tokens. Its tokenizer knows the words of the recall tasks and spells all others. It can do
nothing else. Load it with `dtype=torch.float32` on a CPU. It stands beside its script, not in the package.

## Training

An induction circuit is laid out by hand, roughly, and then trained: {steps:,} steps of {tokens:,} tokens, {optimizer},
loss on the answers alone, on a CPU, by `examples/teachers/recall.py`. All texts are made by
`linearize.evaluate.recall.tasks`. The commands, the seed and every number of this card are in `check.json`.

## Measured

Exact match of whole answers, by greedy decoding, over all depths. MQAR: by the number of pairs.

{table}

## Licence

Apache-2.0, as the rest of `linearize`.
"""


def card(report: dict, config) -> str:
    softmax, near = report["exact_match"]["softmax"], report["exact_match"]["window_64"]
    rows = ["| task | softmax | softmax over the last 64 tokens and the first 4 |", "| --- | ---: | ---: |"]
    rows += [f"| {n} | {v:.3f} | {f'{near[n]:.3f}' if n in near else '–'} |" for n, v in softmax.items()]
    return CARD.format(
        parameters=report["parameters"],
        megabytes=report["bytes"] / 1e6,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        context=report["context"],
        steps=report["training"]["steps"],
        tokens=report["training"]["tokens_per_step"],
        optimizer=report["training"]["optimizer"],
        table="\n".join(rows),
    )


def main() -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--work", type=Path, required=True, help="folder for checkpoints, outside the repo")
    common.add_argument("--out", type=Path, default=OUT)
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--threads", type=int, default=1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tokenizer", parents=[common])
    p = commands.add_parser("train", parents=[common])
    p.add_argument("--stages", default="256:30,1024:30,2048:60,1024:50", help="length:steps, in turn")
    p.add_argument("--tokens", type=int, default=8192, help="per step")
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--heads", type=int, default=6)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--circuit", action=argparse.BooleanOptionalAction, default=True, help="start with induction heads")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast")
    p = commands.add_parser("check", parents=[common])
    p.add_argument("--trials", type=int, default=60, help="questions for each line")
    p.add_argument("--note", help="how this run departed from the commands, for check.json")
    args = parser.parse_args()
    globals()[args.command](args)


if __name__ == "__main__":
    main()
