"""Train the small diffusion teacher that ships with linearize, on Fashion-MNIST (MIT).

    python examples/teachers/diffusion.py train --data FOLDER --work WORK    # class-conditional DiT, 256 patches
    python examples/teachers/diffusion.py check --data FOLDER --work WORK --judge VIT    # check.json, the card

FOLDER holds the four idx.gz files of Fashion-MNIST, VIT a classifier of them (transformers). Images are padded to
32x32; the model predicts the noise in them. Most steps see a random part of the patches. Training resumes from its
last checkpoint in WORK, which is written every few minutes. All of it runs on a CPU.

With --mosaic both are of mosaics of four garments, 64x64 and 1,024 patches, laid out ab/ba: a garment of the class
asked for above on the left, another one below on the right; on the other two places one garment twice, of a class that
nobody named, so that the two have to agree across the mosaic. Training starts from the teacher of single garments.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from garments import ASSETS, HELD, NAMES, ROOT, pixels, read_split, write_atomic

OUT = ROOT / "linearize" / "teachers" / "diffusion"
MOSAICS = ROOT / "examples" / "teachers" / "mosaic"

SIZE, GRID = 32, 16
LAYOUT = "ab/ba"
GAMMA = 5.0  # min-SNR (2303.09556)


def new_model(seed: int, mosaic: bool):
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    if mosaic:
        single = DiTTransformer2DModel.from_pretrained(OUT / "transformer", torch_dtype=torch.float32)
        model = DiTTransformer2DModel.from_config({**single.config, "sample_size": 2 * SIZE})
        model.load_state_dict(single.state_dict())  # positions are sines, in no state dict: 0 to 15 stay what they were
        return model.eval()
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=1,
        num_layers=4,
        sample_size=SIZE,
        patch_size=2,
        num_embeds_ada_norm=len(NAMES),
        norm_num_groups=1,
    )
    for name, parameter in model.named_parameters():  # adaLN-Zero (2212.09748): each block starts as the identity
        if ".norm1.linear." in name:
            torch.nn.init.zeros_(parameter)
    torch.nn.init.zeros_(model.proj_out_2.weight)
    return model.eval()  # in train mode diffusers drops labels, in each block others


def new_scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="leading")


class Softmax(torch.autograd.Function):
    """Attention a few images at a time, so that the weights stay in the cache: the fused one is slower on a CPU."""

    @staticmethod
    def forward(ctx, q_BHTD, k_BHTD, v_BHTD, some):
        ctx.some, ctx.scale = some, q_BHTD.shape[-1] ** -0.5
        out, weights = torch.empty_like(q_BHTD), []
        for q, k, v, o in zip(*(x.split(some) for x in (q_BHTD, k_BHTD, v_BHTD, out))):
            weights.append(((q * ctx.scale) @ k.mT).softmax(-1))
            o.copy_(weights[-1] @ v)
        ctx.save_for_backward(q_BHTD, k_BHTD, v_BHTD, *weights)
        return out

    @staticmethod
    def backward(ctx, *grads):
        q_BHTD, k_BHTD, v_BHTD, *weights = ctx.saved_tensors
        outs = [torch.empty_like(x) for x in (q_BHTD, k_BHTD, v_BHTD)]
        parts = (x.split(ctx.some) for x in (q_BHTD, k_BHTD, v_BHTD, grads[0], *outs))
        for p, q, k, v, g, dq, dk, dv in zip(weights, *parts):
            ds = torch._softmax_backward_data(g @ v.mT, p, -1, p.dtype) * ctx.scale
            dv.copy_(p.mT @ g)
            dq.copy_(ds @ k)
            dk.copy_(ds.mT @ q)
        return *outs, None


class InParts:
    """An attention processor around it."""

    def __call__(self, attn, hidden_states, **_):
        parts = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in parts)
        return attn.to_out[0](Softmax.apply(q, k, v, 4).transpose(1, 2).flatten(2))


def patches(images_BCHW: torch.Tensor) -> torch.Tensor:
    """[B, patches, 4], in the order in which the model writes them."""
    side = images_BCHW.shape[-1] // 2
    return images_BCHW[:, 0].reshape(-1, side, 2, side, 2).transpose(2, 3).flatten(3).flatten(1, 2)


def some_patches(count: int, keep: int, generator: torch.Generator) -> torch.Tensor:
    """Random patches for each of `count` images [count, keep]: one in 13 of the black border, the others within."""
    border = F.pad(torch.zeros(GRID - 2, GRID - 2), (1, 1, 1, 1), value=1.0).flatten().bool()
    parts = []
    for places, many in ((border.nonzero()[:, 0], keep // 13), ((~border).nonzero()[:, 0], keep - keep // 13)):
        parts.append(places[torch.rand(count, len(places), generator=generator).topk(many).indices])
    return torch.cat(parts, 1)


def some_of_mosaics(count: int, keep: int, generator: torch.Generator) -> torch.Tensor:
    """The same random patches of each of the four garments, so that what is alike is seen together."""
    at_BK = some_patches(count, keep // 4, generator)
    row, column = at_BK // GRID, at_BK % GRID
    corners = [(GRID * down, GRID * across) for down in (0, 1) for across in (0, 1)]
    return torch.cat([(row + down) * 2 * GRID + column + across for down, across in corners], 1)


def padded(images_NHW: torch.Tensor) -> torch.Tensor:
    """[N, 1, 32, 32] in -1 ... 1"""
    return F.pad(pixels(images_NHW), (2, 2, 2, 2), value=-1.0)


def mosaics(images_NHW, labels_N, asked_B: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[B, 1, 64, 64], of the classes asked for."""

    def some(kinds_B: torch.Tensor) -> torch.Tensor:
        counts = labels_N.bincount(minlength=len(NAMES))
        order, starts = labels_N.argsort(stable=True), counts.cumsum(0) - counts
        place_B = (torch.rand(len(kinds_B), generator=generator) * counts[kinds_B]).long()
        return padded(images_NHW[order[starts[kinds_B] + place_B]])

    others_B = torch.randint(1, len(NAMES), asked_B.shape, generator=generator)
    twice = some((asked_B + others_B) % len(NAMES))
    upper, lower = torch.cat([some(asked_B), twice], 3), torch.cat([twice, some(asked_B)], 3)
    return torch.cat([upper, lower], 2)


def noise_of_some(model, x_BCHW, t_B, labels_B, chosen_BK):
    """The predicted noise of the chosen patches, [B, K, 4], from them alone; None: all patches."""
    h_BTD = model.pos_embed(x_BCHW)
    if chosen_BK is not None:
        h_BTD = h_BTD.gather(1, chosen_BK[..., None].expand(-1, -1, h_BTD.shape[-1]))
    for block in model.transformer_blocks:
        h_BTD = block(h_BTD, timestep=t_B, class_labels=labels_B)
    c_BD = model.transformer_blocks[0].norm1.emb(t_B, labels_B, hidden_dtype=h_BTD.dtype)
    shift, scale = model.proj_out_1(F.silu(c_BD)).chunk(2, dim=1)
    return model.proj_out_2(model.norm_out(h_BTD) * (1 + scale[:, None]) + shift[:, None])


def noise_loss(model, alphas, x0, labels, keep: int, generator) -> torch.Tensor:
    """Mean squared error of the noise in images [B, 1, H, W], weighted as min-SNR does; timesteps spread evenly over
    the batch."""
    B = len(x0)
    t = ((torch.arange(B) + torch.rand(B, generator=generator)) / B * 1000).long().clamp(max=999)
    noise = torch.randn(x0.shape, generator=generator)
    a = alphas[t][:, None, None, None]
    x = a.sqrt() * x0 + (1 - a).sqrt() * noise
    chosen = None
    target = patches(noise)
    if keep < target.shape[1]:
        chosen = (some_patches if target.shape[1] == GRID * GRID else some_of_mosaics)(B, keep, generator)
        target = target.gather(1, chosen[..., None].expand(-1, -1, 4))
    with torch.autocast("cpu", torch.bfloat16):
        guess = noise_of_some(model, x, t, labels, chosen)
    snr = alphas[t] / (1 - alphas[t])
    return (snr.clamp(max=GAMMA) / snr * (guess.float() - target).square().mean((1, 2))).mean()


def export(model, out: Path) -> None:
    """A pipeline's folder without an autoencoder: transformer in fp16, scheduler, index; each file replaced whole."""
    part = out / "part"
    copy.deepcopy(model).half().save_pretrained(part / "transformer")
    new_scheduler().save_pretrained(part / "scheduler")
    index = {"_class_name": "DiTPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    index |= {"transformer": ["diffusers", "DiTTransformer2DModel"], "id2label": dict(enumerate(NAMES))}
    (part / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for path in sorted(part.rglob("*")):
        if path.is_file():
            path.chmod(0o644)  # safetensors leaves its file to its owner alone
            target = out / path.relative_to(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    for path in (part / "transformer", part / "scheduler", part):
        path.rmdir()


# -------------------------------------------------------------------------------------------- train


def train(args) -> None:
    torch.set_num_threads(args.threads)
    images, labels = read_split(args.data, "train")
    held, images, labels_held, labels = images[-HELD:], images[:-HELD], labels[-HELD:], labels[:-HELD]
    stages = [tuple(map(int, stage.split(":"))) for stage in args.stages.split(",")]
    keeps = [keep for keep, steps in stages for _ in range(steps)]
    work = torch.tensor([0, *keeps]).cumsum(0)

    model = new_model(args.seed, args.mosaic)
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(InParts())  # type: ignore[operator]
    average = copy.deepcopy(model).requires_grad_(False)
    alphas = new_scheduler().alphas_cumprod
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and (".attn1." in n or ".ff." in n)]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and (".attn1." in n or ".ff." in n))]
    # Muon needs fewer images than AdamW for the matrices, and a CPU gives few.
    optimizers = [
        torch.optim.AdamW(others, lr=args.lr / 3, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
    ]
    rates = [args.lr / 3, args.lr]
    step, spent, checkpoint = 0, 0.0, args.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        step, spent = state["step"], state["spent"]
        print(f"resumed at step {step}", flush=True)

    def save() -> None:
        part = checkpoint.with_suffix(".part")
        state = {"model": model.state_dict(), "average": average.state_dict(), "step": step, "spent": spent}
        torch.save(state | {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}, part)
        os.replace(part, checkpoint)
        export(average, args.out)
        facts = {"images": len(images), "held_out": HELD, "steps": step, "of_steps": len(keeps), "batch": args.batch}
        facts |= {"stages": args.stages, "images_seen": step * args.batch, "cpu_seconds": round(spent)}
        facts |= {"learning_rate": args.lr, "optimizer": "Muon, AdamW beside it", "seed": args.seed}
        facts |= {"loss": "noise, min-SNR 5", "weights": "exponential average"}
        write_atomic(args.work / "train.json", json.dumps(facts, indent=1))

    args.work.mkdir(parents=True, exist_ok=True)
    running, per_epoch, start, saved_at = [], len(images) // args.batch, time.process_time(), time.time()
    while step < len(keeps):
        epoch, at = divmod(step, per_epoch)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed + epoch))
        rows = order[at * args.batch :][: args.batch]
        generator = torch.Generator().manual_seed(1_000_003 * (args.seed + 1) + step)
        # The rate falls with the patches seen, not with the steps, and only in the last part of them.
        warm, done = min(1.0, (step + 1) / 100), float(work[step] / work[-1])
        factor = warm * min(1.0, 0.02 + (1 - done) / args.cool)
        for optimizer, rate in zip(optimizers, rates):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        x0 = mosaics(images, labels, labels[rows], generator) if args.mosaic else padded(images[rows])
        loss = noise_loss(model, alphas, x0, labels[rows], keeps[step], generator)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(args.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        step += 1
        running.append(loss.item())
        if step % 50 == 0:
            now = time.process_time()
            rate = len(running) * args.batch / (now - start)
            mean = sum(running) / len(running)
            print(f"step {step}  patches {keeps[step - 1]}  loss {mean:.4f}  {rate:.0f} images/CPU-s", flush=True)
            spent, start, running = spent + now - start, now, []
        last = step == len(keeps)
        if time.time() - saved_at > 120 or last:
            with torch.no_grad():
                fixed = torch.Generator().manual_seed(0)
                asked = labels_held[:128]
                x0 = mosaics(held, labels_held, asked[:32], fixed) if args.mosaic else padded(held[:128])
                loss = noise_loss(average, alphas, x0, asked[: len(x0)], patches(x0).shape[1], fixed)
            print(f"step {step}  held-out loss of the average, all patches {loss:.4f}", flush=True)
            save()
            saved_at = time.time()


# -------------------------------------------------------------------------------------------- check


@torch.no_grad()
def ddim(model, scheduler, labels_B: torch.Tensor, steps: int, seed: int, batch: int = 50) -> torch.Tensor:
    """Images [B, 1, H, W] in -1 ... 1, without guidance."""
    side = model.config.sample_size
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    out = []
    for labels in labels_B.split(batch):
        x = torch.randn(len(labels), 1, side, side, generator=generator)
        for t in scheduler.timesteps:
            guess = model(x, timestep=t.expand(len(x)), class_labels=labels).sample
            x = scheduler.step(guess, t, x).prev_sample
        out.append(x.clamp(-1, 1))
    return torch.cat(out)


@torch.no_grad()
def told(judge, images_BCHW: torch.Tensor) -> torch.Tensor:
    """The class that a classifier of 28x28 images sees in each."""
    return torch.cat([judge(x[..., 2:-2, 2:-2]).logits.argmax(-1) for x in images_BCHW.split(100)])


def check(args) -> None:
    from diffusers import DDIMScheduler, DiTTransformer2DModel
    from transformers import AutoModelForImageClassification

    torch.set_num_threads(args.threads)
    model = DiTTransformer2DModel.from_pretrained(args.out / "transformer", torch_dtype=torch.float32).eval()
    scheduler = DDIMScheduler.from_pretrained(args.out / "scheduler")
    judge = AutoModelForImageClassification.from_pretrained(args.judge, dtype=torch.float32).eval()
    facts = json.loads((args.work / "train.json").read_text())
    parameters = sum(p.numel() for p in model.parameters())
    adaln = sum(p.numel() for n, p in model.named_parameters() if ".norm1." in n)
    labels = torch.arange(args.samples) % len(NAMES)
    start = time.process_time()
    drawn = ddim(model, scheduler, labels, 20, args.seed)
    spent, common = time.process_time() - start, "--data FOLDER --work WORK" + " --mosaic" * args.mosaic
    if args.mosaic:
        held, kinds = (part[-HELD:] for part in read_split(args.data, "train"))
        real = mosaics(held, kinds, labels, torch.Generator().manual_seed(args.seed))
        found, found_real = (looked_at(args.judge, images, labels) for images in (drawn, real))
        right, more = found["top1"], {key: round(values.mean().item(), 4) for key, values in found.items()}
        more = {**more, "of_real": {key: round(values.mean().item(), 4) for key, values in found_real.items()}}
    else:
        right, more = (told(judge, drawn) == labels).float(), {}
    agreement = right.mean().item()
    by_class = {name: round(right[labels == i].mean().item(), 3) for i, name in enumerate(NAMES)}
    report = {
        "commands": [
            f"python examples/teachers/diffusion.py train {common} --stages {facts['stages']}",
            f"python examples/teachers/diffusion.py check {common} --judge VIT --samples {args.samples}",
        ],
        "note": args.note,
        "data": "Fashion-MNIST (MIT)",
        "training": facts,
        "parameters": parameters,
        "parameters_besides_adaln": parameters - adaln,
        "bytes": (args.out / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size,
        "tokens": (model.config.sample_size // 2) ** 2,
        "samples": {
            "images": len(labels),
            "steps": 20,
            "guidance": None,
            "judge": args.judge.name,
            "agreement": round(agreement, 4),
            "agreement_by_class": by_class,
            "cpu_seconds": round(spent, 1),
            **more,
        },
        "at_least_0_80": agreement >= 0.8,
    }
    print(f"a classifier sees the class asked for in {agreement:.1%} of {len(labels)} samples", more, flush=True)
    write_atomic(args.out / "check.json", json.dumps(report, indent=1) + "\n")
    write_atomic(args.out / "README.md", card(report))
    if not report["at_least_0_80"]:
        raise SystemExit("this teacher is weak, less than 80 %: see check.json")


def looked_at(judge: Path, images_BCHW: torch.Tensor, labels_B: torch.Tensor) -> dict[str, torch.Tensor]:
    """What linearize measures of mosaics, against themselves: by figure, a number for each."""
    from linearize.evaluate import mosaics as counted
    from linearize.evaluate.judges import Judge

    layout = counted.Layout(LAYOUT)
    seen, _ = counted.seen(layout.tiles(images_BCHW), Judge(str(judge), 2), 2)
    found = counted.figures(seen, seen, layout, labels_B)
    return {key: found[key] for key in ("top1", "tiles_seen", "pairs_alike")}


CARD = """---
license: apache-2.0
pipeline_tag: unconditional-image-generation
---

# garments-diffusion-teacher

The diffusion teacher embedded in `linearize`: a small softmax diffusion transformer to convert when no other is at
hand. A `DiTTransformer2DModel` of {parameters:,} parameters ({besides:,} besides adaLN, {megabytes:.1f} MB in fp16) on
grey images of 32x32 in patches of 2x2: {tokens} tokens. It draws ten kinds of garments, by class, and nothing else. It
predicts noise on the scheduler's cosine schedule, in pixels: there is no autoencoder. Load it in float32 on a CPU.

## Training

Fashion-MNIST (MIT), {images:,} of its 60,000 training images, padded with black: {steps:,} steps of {batch}, most of
them on a random half of the patches, min-SNR weighting, {optimizer}, an exponential average of the weights, on a CPU,
by `examples/teachers/diffusion.py`. The commands, the seed and every number of this card are in `check.json`.

## Measured

A classifier of Fashion-MNIST sees the class that was asked for in {agreement:.1%} of {samples} samples (DDIM, 20 steps,
no guidance).

## Licence

Apache-2.0, as the rest of `linearize`. Fashion-MNIST is MIT, Copyright (c) 2017 Zalando SE; no image is distributed.
"""


MOSAIC = """---
license: apache-2.0
pipeline_tag: unconditional-image-generation
---

# mosaics-diffusion-teacher

A softmax diffusion transformer for one question: what does a local or linear attention lose that has to hold across a
large image? A `DiTTransformer2DModel` of {parameters:,} parameters ({megabytes:.1f} MB in fp16) on grey images of
64x64 in patches of 2x2: {tokens} tokens. It draws mosaics of four garments, laid out ab/ba: above on the left and below
on the right one garment each of the class asked for, on the other two places one garment twice, of a class that nobody
named: these two have to agree over 22 patches. It predicts noise on the scheduler's cosine schedule. It is not in the
wheel.

    python recipes/measure.py clear/dit-mosaic --model examples/teachers/mosaic --set eval.judge=VIT

## Training

From the embedded teacher of single garments, on mosaics of {images:,} of Fashion-MNIST's (MIT) 60,000 training images:
{steps:,} steps of {batch}, most of them on a random quarter of the patches, min-SNR weighting, {optimizer}, an
exponential average of the weights, on a CPU, by `examples/teachers/diffusion.py --mosaic`. The commands, the seed and
every number of this card are in `check.json`.

## Measured

A classifier of Fashion-MNIST, shown each place by itself, of {samples} mosaics (DDIM, 20 steps, no guidance), and of as
many real ones from images that the training left out:

| | drawn | real |
| --- | ---: | ---: |
| the class asked for stands in its places | {agreement:.1%} | {real[top1]:.1%} |
| garments seen, of 4 | {tiles_seen:.2f} | {real[tiles_seen]:.2f} |
| the two of one class, which nobody named, are of one class | {pairs_alike:.1%} | {real[pairs_alike]:.1%} |

## Licence

Apache-2.0, as the rest of `linearize`. Fashion-MNIST is MIT, Copyright (c) 2017 Zalando SE; no image is distributed.
"""


def card(report: dict) -> str:
    samples = report["samples"]
    more = {key: samples.get(key) for key in ("tiles_seen", "pairs_alike")} | {"real": samples.get("of_real")}
    return (MOSAIC if "of_real" in samples else CARD).format(
        **more,
        parameters=report["parameters"],
        besides=report["parameters_besides_adaln"],
        megabytes=report["bytes"] / 1e6,
        tokens=report["tokens"],
        **{key: report["training"][key] for key in ("images", "steps", "batch", "optimizer")},
        agreement=report["samples"]["agreement"],
        samples=report["samples"]["images"],
    )


def main() -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", type=Path, default=ASSETS / "fashion-mnist", help="the four idx.gz files")
    common.add_argument("--work", type=Path, required=True, help="folder for checkpoints, outside the repo")
    common.add_argument("--mosaic", action="store_true", help="four garments, 64x64")
    common.add_argument("--out", type=Path, help="the teacher's folder")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--threads", type=int, default=1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("train", parents=[common])
    p.add_argument(
        "--stages", help="patches seen:steps, one after the other: 104:3500,256:300 or 256:3000,512:200,1024:60"
    )
    p.add_argument("--batch", type=int, help="64, of mosaics 32")
    p.add_argument("--lr", type=float, default=3e-3, help="of the matrices; a third of it for the rest")
    p.add_argument("--cool", type=float, default=0.4, help="the part of the work in which the rate falls")
    p.add_argument("--ema", type=float, default=0.998)
    p = commands.add_parser("check", parents=[common])
    p.add_argument("--judge", type=Path, default=ASSETS / "vit-fashion-mnist", help="a classifier, for transformers")
    p.add_argument("--samples", type=int, default=500)
    p.add_argument("--note", help="how this run departed from the commands, for check.json")
    args = parser.parse_args()
    args.out = args.out or (MOSAICS if args.mosaic else OUT)
    if args.command == "train":
        args.stages = args.stages or ("256:3000,512:200,1024:60" if args.mosaic else "104:3500,256:300")
        args.batch = args.batch or (32 if args.mosaic else 64)
    globals()[args.command](args)


if __name__ == "__main__":
    main()
