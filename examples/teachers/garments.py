"""Train the small vision teacher that ships with linearize, on Fashion-MNIST (MIT).

    python examples/teachers/garments.py train --data FOLDER --work WORK    # 0.4M-parameter ViT, 196 patches
    python examples/teachers/garments.py check --data FOLDER --work WORK    # top-1, check.json, the card
    python examples/teachers/garments.py paint --data FOLDER --work WORK    # what draws images where none are named

FOLDER holds the four idx.gz files of Fashion-MNIST (Debian: package dataset-fashion-mnist). Most steps see a
random part of the patches only, which is cheaper by more than that part; the last see all of them. Training
resumes from its last checkpoint in WORK. It keeps the last thousand training images for itself and never
opens t10k: `check` alone does. All of it runs on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
ASSETS = Path(os.environ.get("LINEARIZE_ASSETS", ROOT.parent / "shared" / "assets"))
OUT = ROOT / "linearize" / "teachers" / "image"

NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
HELD = 1000  # training images kept back
GRID = 14


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write beside, then rename: a kill leaves the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(part, path)


def read_idx(path: Path) -> torch.Tensor:
    """An idx.gz of unsigned bytes: two zeros, type 8, number of axes, each length big-endian, the bytes."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is no idx file of unsigned bytes")
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    return torch.frombuffer(bytearray(data[4 + 4 * len(shape) :]), dtype=torch.uint8).view(shape)


def read_split(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(images_NHW uint8, labels_N int64) of "train" or "t10k"."""
    images, labels = (read_idx(folder / f"{split}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    return images, labels.long()


def pixels(images_BHW: torch.Tensor) -> torch.Tensor:
    """[B, 1, H, W] in -1 ... 1, as preprocessor_config.json says."""
    return (images_BHW[:, None].float() / 255 - 0.5) / 0.5


# -------------------------------------------------------------------------------------------- train


def new_model(seed: int):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=28,
        patch_size=2,
        num_channels=1,
        encoder_stride=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
    )
    return ViTForImageClassification(config)


def export(model, out: Path) -> None:
    """The model in fp16 and what an image processor reads, each file replaced whole."""
    part = out / "part"
    copy.deepcopy(model).half().save_pretrained(part)
    for path in part.iterdir():
        path.chmod(0o644)  # safetensors leaves its file to its owner alone
        os.replace(path, out / path.name)
    part.rmdir()
    processor = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 28, "width": 28}}
    processor |= {"resample": 2, "do_rescale": True, "rescale_factor": 1 / 255}
    processor |= {"do_normalize": True, "image_mean": [0.5], "image_std": [0.5]}
    write_atomic(out / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")


def logits_of_some(model, images_BHW: torch.Tensor, keep: int, generator: torch.Generator) -> torch.Tensor:
    """Logits from the class token and `keep` patches of each image, another choice for each."""
    h_BTD = model.vit.embeddings(pixels(images_BHW))
    if keep < GRID * GRID:
        chosen_BK = torch.rand(len(h_BTD), GRID * GRID, generator=generator).topk(keep).indices + 1
        chosen_BT = F.pad(chosen_BK, (1, 0))
        h_BTD = h_BTD.gather(1, chosen_BT[..., None].expand(-1, -1, h_BTD.shape[-1]))
    for layer in model.vit.layers:
        h_BTD = layer(h_BTD, None)
    return model.classifier(model.vit.layernorm(h_BTD)[:, 0])


@torch.no_grad()
def right(model, images_NHW: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Whether each image is told right [N]."""
    parts = zip(images_NHW.split(250), labels_N.split(250))
    return torch.cat([model(pixels(x)).logits.argmax(-1) == y for x, y in parts])


def train(args) -> None:
    torch.set_num_threads(args.threads)
    images, labels = read_split(args.data, "train")
    held_images, held_labels = images[-HELD:], labels[-HELD:]
    images, labels = images[:-HELD], labels[:-HELD]
    stages = [tuple(map(int, stage.split(":"))) for stage in args.stages.split(",")]
    keeps = [keep for keep, steps in stages for _ in range(steps)]
    work = torch.tensor([0, *keeps]).cumsum(0)

    model = new_model(args.seed)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    # Muon needs fewer images than AdamW for the matrices, and a CPU gives few; one rate serves both.
    optimizers = [
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
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
        facts = {"images": len(images), "held_out": HELD, "steps": step, "of_steps": len(keeps), "batch": args.batch}
        facts |= {"stages": args.stages, "images_seen": step * args.batch, "seconds": round(spent)}
        facts |= {"learning_rate": args.lr, "optimizer": "Muon, AdamW beside it", "seed": args.seed}
        write_atomic(args.work / "train.json", json.dumps(facts, indent=1))

    args.work.mkdir(parents=True, exist_ok=True)
    running, per_epoch, start = [], len(images) // args.batch, time.time()
    while step < len(keeps):
        epoch, at = divmod(step, per_epoch)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed + epoch))
        rows = order[at * args.batch :][: args.batch]
        generator = torch.Generator().manual_seed(1_000_003 * (args.seed + 1) + step)
        batch = images[rows]
        flip = torch.rand(len(batch), generator=generator) < 0.5
        batch = torch.where(flip[:, None, None], batch.flip(-1), batch)
        # The rate falls with the patches seen, not with the steps: the last, dear ones have their share of it.
        warm, done = min(1.0, (step + 1) / 100), float(work[step] / work[-1])
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        logits = logits_of_some(model, batch, keeps[step], generator)
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        running.append(loss.item())
        if step % 50 == 0:
            mean, rate = sum(running) / len(running), len(running) * args.batch / (time.time() - start)
            print(f"step {step}  patches {keeps[step - 1]}  loss {mean:.4f}  {rate:.0f} images/s", flush=True)
            spent, start, running = spent + time.time() - start, time.time(), []
        if step % 200 == 0 or step == len(keeps):
            print(
                f"step {step}  held-out top-1 {right(model, held_images, held_labels).float().mean():.4f}", flush=True
            )
            save()
            start = time.time()


# -------------------------------------------------------------------------------------------- paint


def paint(args) -> None:
    """A Gaussian for each of --looks looks of each kind of garment, in the space of --axes principal axes."""
    from linearize.data.painter import FILE, Painter

    torch.set_num_threads(args.threads)
    images, labels = (part[:-HELD] for part in read_split(args.data, "train"))
    x_NP, draw = images.flatten(1).float(), torch.Generator().manual_seed(args.seed)
    groups = []
    for kind in range(len(NAMES)):
        rows = (labels == kind).nonzero().flatten()
        centres = x_NP[rows[torch.randperm(len(rows), generator=draw)[: args.looks]]]
        nearest = torch.cdist(x_NP[rows], centres).argmin(1)
        for _ in range(19):  # k-means
            centres = torch.stack([x_NP[rows[nearest == n]].mean(0) for n in range(args.looks)])
            nearest = torch.cdist(x_NP[rows], centres).argmin(1)
        groups += [rows[nearest == n] for n in range(args.looks)]
    Painter.fit(images[:, None], groups, args.axes).save(args.out)
    print(f"{len(groups)} looks, {(args.out / FILE).stat().st_size / 1e6:.2f} MB", flush=True)


# -------------------------------------------------------------------------------------------- check


def uniform_attention(module, query, key, value, attention_mask, **_):
    """Each token averages all values alike: what is left when attention chooses nothing."""
    return value.mean(2, keepdim=True).expand_as(value).transpose(1, 2).contiguous(), None


def circle_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Softmax over the patches less than 3 from the query's own and the class token, which sees all."""
    at = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).float()
    near = F.pad(torch.cdist(at, at) < 3, (1, 0, 1, 0), value=True)
    y_BHTD = F.scaled_dot_product_attention(query, key, value, attn_mask=near, scale=scaling)
    return y_BHTD.transpose(1, 2).contiguous(), None


def check(args) -> None:
    from transformers import AttentionInterface, AutoModelForImageClassification

    torch.set_num_threads(args.threads)
    AttentionInterface.register("uniform", uniform_attention)
    AttentionInterface.register("circle3", circle_attention)
    model = AutoModelForImageClassification.from_pretrained(args.out, dtype=torch.float32).eval()
    facts = json.loads((args.work / "train.json").read_text())
    images, labels = read_split(args.data, "t10k")
    common = "--data FOLDER --work WORK"
    report = {
        "commands": [
            f"python examples/teachers/garments.py train {common} --stages {facts['stages']}",
            f"python examples/teachers/garments.py check {common}",
        ],
        "note": args.note,
        "data": "Fashion-MNIST (MIT)",
        "training": facts,
        "parameters": model.num_parameters(),
        "bytes": (args.out / "model.safetensors").stat().st_size,
        "tokens": GRID * GRID + 1,
        "t10k": {"images": len(images)},
    }
    for key, attention in {"softmax": "sdpa", "circle_3": "circle3", "uniform_attention": "uniform"}.items():
        model.set_attn_implementation(attention)
        report["t10k"][f"top1_{key}"] = round(right(model, images, labels).float().mean().item(), 4)
        print(f"t10k top-1, {key}: {report['t10k'][f'top1_{key}']}", flush=True)
    top1 = report["t10k"]
    report["at_least_0_88"] = top1["top1_softmax"] >= 0.88
    report["uniform_costs_at_least_10_points"] = top1["top1_softmax"] - top1["top1_uniform_attention"] >= 0.1
    write_atomic(args.out / "check.json", json.dumps(report, indent=1) + "\n")
    write_atomic(args.out / "README.md", card(report))
    if not (report["at_least_0_88"] and report["uniform_costs_at_least_10_points"]):
        raise SystemExit("this teacher is too weak, or does not use its attention enough: see check.json")


CARD = """---
license: apache-2.0
pipeline_tag: image-classification
---

# garments-teacher

The vision teacher embedded in `linearize`: a small softmax vision transformer to convert when no other is at hand. A
`ViTForImageClassification` of {parameters:,} parameters ({megabytes:.1f} MB in fp16) on grey images of 28x28 in patches
of 2x2: {tokens} tokens with the class token. It tells ten kinds of garments apart and nothing else.
Load it with `dtype=torch.float32` on a CPU.

## Training

Fashion-MNIST (MIT), {images:,} of its 60,000 training images, flipped at random: {steps:,} steps of {batch}, most of
them on a random part of the patches, {optimizer}, on a CPU, by `examples/teachers/garments.py`. The
commands, the seed and every number of this card are in `check.json`.

## Measured

Top-1 on the 10,000 images of t10k, which the training never read.

| attention, same weights | top-1 |
| --- | ---: |
| softmax, as trained | {softmax:.4f} |
| softmax within a circle of radius 3 | {circle:.4f} |
| uniform average | {uniform:.4f} |

## Licence

Apache-2.0, as the rest of `linearize`. Fashion-MNIST is MIT, Copyright (c) 2017 Zalando SE; no image is distributed.
"""


def card(report: dict) -> str:
    return CARD.format(
        parameters=report["parameters"],
        megabytes=report["bytes"] / 1e6,
        tokens=report["tokens"],
        **{key: report["training"][key] for key in ("images", "steps", "batch", "optimizer")},
        softmax=report["t10k"]["top1_softmax"],
        circle=report["t10k"]["top1_circle_3"],
        uniform=report["t10k"]["top1_uniform_attention"],
    )


def main() -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", type=Path, default=ASSETS / "fashion-mnist", help="the four idx.gz files")
    common.add_argument("--work", type=Path, required=True, help="folder for checkpoints, outside the repo")
    common.add_argument("--out", type=Path, default=OUT)
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--threads", type=int, default=1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("train", parents=[common])
    p.add_argument("--stages", default="49:3300,98:350,196:400", help="patches seen:steps, one after the other")
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--lr", type=float, default=3e-3)
    p = commands.add_parser("check", parents=[common])
    p.add_argument("--note", help="how this run departed from the commands, for check.json")
    p = commands.add_parser("paint", parents=[common])
    p.add_argument("--looks", type=int, default=4)
    p.add_argument("--axes", type=int, default=80)
    args = parser.parse_args()
    globals()[args.command](args)


if __name__ == "__main__":
    main()
