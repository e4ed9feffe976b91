"""Stages: what they learn, that a killed run resumes to the same bits, that two processes equal one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import linearize
from linearize.data.text import Tokens
from linearize.mixers.base import build
from linearize.plan import FinetunePlan, LoraPlan, TransferPlan
from linearize.stages.base import Job
from linearize.stages.finetune import Finetune, finetune, lora_targets
from linearize.stages.head import logit_losses
from linearize.stages.loop import Order, rate
from linearize.stages.transfer import Transfer, map_divergence, transfer
from linearize.testing.pico import pico
from linearize.types import Context, GateError, InputError, SiteShape

LENGTH, BATCH, STEPS = 16, 4, 5
TRANSFER = TransferPlan(kind="transfer", tokens=LENGTH * BATCH * STEPS, batch=BATCH, lr=1e-2)
FINETUNE = FinetunePlan(
    kind="finetune", tokens=LENGTH * BATCH * STEPS, batch=BATCH, lr=1e-3, mixer_lr=1e-3, lora={"r": 2, "dropout": 0.1}
)


def sequences(count: int = 12, seed: int = 0) -> Tokens:
    ids = torch.randint(3, 97, (count * LENGTH,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    offsets = torch.arange(count + 1) * LENGTH
    starts = torch.zeros(count * LENGTH, dtype=torch.bool)
    starts[offsets[:-1]] = True
    starts[5::LENGTH] = True  # two documents per sequence
    return Tokens(ids, offsets, starts, ~starts, {"length": LENGTH})


def job(mixer: dict | None = None, family: str = "llama", method: str = "hedgehog", **more) -> Job:
    model = pico(family)
    surgery = linearize.attach(model, None, method, mixer or {})
    return Job(model=model, surgery=surgery, data=sequences(), progress=False, digest="d", **more)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------ learning
@pytest.mark.parametrize(
    ("mixer", "losses"),
    [
        ({}, {"output": 1.0}),
        ({}, {"output": 0.0, "map": 1.0}),
        ({"window": 4}, {"output": 1.0}),
        ({"window": 4, "sinks": 1}, {"output": 0.0, "far": 1.0, "mass": 1.0}),
        ({"window": 4}, {"far_weight": True}),
        ({"window": 4}, {"target": "linear"}),
    ],
    ids=["output", "map", "hybrid", "far", "far-weight", "linear-alone"],
)
def test_transfer_lowers_its_loss_and_touches_only_mixers(mixer, losses):
    made = job(mixer)
    before = weights(made.model)
    plan = TRANSFER.model_copy(update={"tokens": LENGTH * BATCH * 60, **losses})
    report = transfer(made, plan)
    assert sum(report.series["loss"][-5:]) < 0.9 * sum(report.series["loss"][:5])
    after = weights(made.model)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and all("linearize_mixer" in n for n in changed)


@pytest.mark.parametrize("stage", ["transfer", "lora", "full"])
def test_bfloat16_is_for_products_outside_the_mixers(stage):
    found, seen = {}, []
    for precision in ("float32", "bfloat16"):
        made = job()
        for mixer in made.surgery.mixers.values():
            mixer.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        if stage == "transfer":
            report = transfer(made, TRANSFER.model_copy(update={"precision": precision}))
        else:
            report = finetune(made, FINETUNE.model_copy(update={"precision": precision, "mode": stage}))
        assert seen and not any(seen)
        assert {p.dtype for p in made.model.parameters()} == {torch.float32}
        found[precision] = torch.tensor(report.series["loss"])
    assert not torch.equal(found["float32"], found["bfloat16"])
    assert torch.allclose(found["float32"], found["bfloat16"], rtol=0.05)


@pytest.mark.parametrize("mixer", [{"window": 4}, {"window": 4, "sinks": 2}])
def test_a_map_in_pieces_is_the_map(mixer):
    made = job(mixer)
    found = []
    for chunk in (512, 5):
        plan = TRANSFER.model_copy(update={"output": 0.0, "map": 1.0, "map_chunk": chunk})
        objective = Transfer(made.surgery, plan)
        loss = objective.loss({k: made.data[0][k][None] for k in ("input_ids", "position_ids")}, 0)["loss"]
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in made.surgery.parameters()]))
        for parameter in made.surgery.parameters():
            parameter.grad = None
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for whole, pieces in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(whole, pieces, atol=1e-7)


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)), 0)
        return out


@pytest.mark.parametrize(
    ("method", "mixer"), [("hedgehog", {}), ("hedgehog", {"decay": "gated"}), ("lawcat", {"gate": "constant"})]
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_map_in_pieces_never_makes_the_whole(method, mixer, packed):
    """Forward or backward, with the sinks that a document has of its own."""
    shape, T, chunk = SiteShape(heads=2, kv_heads=1, key_dim=4, value_dim=4, width=8, scale=0.5), 256, 4
    mixer = build(method, shape, {"window": 4, "sinks": 4, "rope": "keep", **mixer})
    q, k, v = (torch.randn(1, heads, T, 4) for heads in (2, 1, 1))
    ctx = Context(causal=True, scale=0.5, segments_BT=torch.arange(T)[None] // 100 if packed else None)
    with _Largest() as largest:
        map_divergence(mixer, q, k, v, ctx, chunk).backward()
    assert chunk * T < largest.elements < T * T
    with _Largest() as largest:
        map_divergence(mixer, q, k, v, ctx, T)
    assert largest.elements >= T * T


def test_transfer_leaves_the_stream_and_skips_the_head():
    made = job()
    calls = []
    made.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    Transfer(made.surgery, TRANSFER).loss({"input_ids": torch.randint(3, 97, (2, 8))}, 0)
    assert not calls


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_finetune_approaches_the_teacher(mode):
    made = job()
    before = weights(made.model)
    batch = {k: torch.stack([made.data[i][k] for i in range(12)]) for k in ("input_ids", "position_ids")}

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return made.model(**batch, use_cache=False).logits

    def distance() -> float:
        with made.surgery.teacher():
            goal = logits()
        return float(logit_losses(logits(), goal, batch["input_ids"]).kl.mean())

    with made.surgery.teacher():
        goal = logits()
    start = distance()
    longer = {"tokens": LENGTH * BATCH * 60, "mode": mode, "lora": LoraPlan(r=2)}
    report = finetune(made, FINETUNE.model_copy(update=longer))
    assert sum(report.series["loss"][-5:]) < 0.9 * sum(report.series["loss"][:5])
    if mode == "lora":
        assert distance() < start
        base = {n.replace(".base_layer", ""): p for n, p in weights(made.model).items() if "lora_" not in n}
        frozen = [n for n in before if "linearize_mixer" not in n]
        assert all(torch.equal(before[n], base[n]) for n in frozen)
        with made.surgery.teacher():
            assert torch.equal(logits(), goal)


def batch_of(data: Tokens, count: int = 4) -> dict[str, torch.Tensor]:
    return data.collate([data[i] for i in range(count)])


@pytest.mark.parametrize("losses", [{"kl": 1.0}, {"kl": 0.0, "lm": 1.0}, {"kl": 0.5, "lm": 0.3, "hidden": 0.2}])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_losses_in_blocks_are_the_losses(losses, share, monkeypatch):
    monkeypatch.setattr("linearize.stages.head.BLOCK", 97 * 5)  # five rows at a time
    found = []
    for plain in (True, False):
        made = job({"window": 4})
        objective = Finetune(made, FINETUNE.model_copy(update={**losses, "share": share, "lora": LoraPlan(r=2)}))
        objective.targets.looked = not plain  # looked and found nothing: whole logits
        torch.manual_seed(0)
        values = objective.loss(batch_of(made.data), 0)
        values["loss"].backward()
        assert (objective.targets.head is not None) == plain
        grads = {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}
        found.append(({k: v.detach() for k, v in values.items()}, grads))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)
    assert any("lora_B" in n and g.any() for n, g in found[0][1].items())


def test_a_soft_cap_is_never_skipped():
    made = job(family="gemma2")
    objective = Finetune(made, FINETUNE)
    objective.loss(batch_of(made.data), 0)
    assert objective.targets.looked and objective.targets.head is None


def test_lora_never_enters_a_mixer():
    made = job({"window": 4})
    with pytest.raises(InputError, match="no linear module"):
        lora_targets(made.model, [s.name for s in made.surgery.sites], ["nothing"])
    found = lora_targets(made.model, [s.name for s in made.surgery.sites], "attention")
    assert len(found) == 16 and not any("linearize_mixer" in n for n in found)


def test_a_share_of_positions_is_an_estimate_of_all():
    made = job()
    plan = FINETUNE.model_copy(update={"share": 0.25})
    report = finetune(made, plan)
    assert report.steps == STEPS


def test_not_a_number_names_the_parameter_and_keeps_the_checkpoint(tmp_path):
    def poison(stage: str, step: int) -> None:
        if step == 3:
            with torch.no_grad():
                made.surgery.mixers["model.layers.1.self_attn"].map_q.weight_HKC.fill_(float("nan"))

    made = job(work=tmp_path, checkpoint_steps=2, on_step=poison)
    with pytest.raises(GateError, match=r"layers.1.self_attn.linearize_mixer"):
        transfer(made, TRANSFER)
    assert [p.name for p in tmp_path.iterdir()] == ["transfer-00000002"]


# ------------------------------------------------------------------------------------------------------ resuming
class Killed(BaseException):
    """Nothing in the package may catch it."""


def _both(made: Job) -> dict[str, torch.Tensor]:
    transfer(made, TRANSFER)
    finetune(made, FINETUNE)
    return weights(made.model)


POINTS = [(stage, step) for stage in ("transfer", "finetune") for step in range(1, STEPS + 1)]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, torch.Tensor]:
    return _both(job())


@pytest.mark.parametrize(("stage", "step"), POINTS)
def test_killed_after_a_step_resumes_to_the_same_bits(tmp_path, undisturbed, stage, step):
    def kill(at: str, now: int) -> None:
        if (at, now) == (stage, step):
            raise Killed

    with pytest.raises(Killed):
        _both(job(work=tmp_path, checkpoint_steps=2, on_step=kill))
    resumed = _both(job(work=tmp_path, checkpoint_steps=2, resume=True))
    assert all(torch.equal(undisturbed[n], resumed[n]) for n in undisturbed)


SAVING = ["safetensors.torch.save_file", "os.fsync", "os.rename", "shutil.rmtree"]


@pytest.mark.parametrize("inside", SAVING)
@pytest.mark.parametrize("call", [1, 3])
def test_killed_inside_saving_resumes_to_the_same_bits(tmp_path, undisturbed, monkeypatch, inside, call):
    owner, _, name = inside.rpartition(".")
    module = sys.modules[owner]
    original, count = getattr(module, name), 0

    def kill(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, kill)
        with pytest.raises(Killed):
            _both(job(work=tmp_path, checkpoint_steps=1))
    resumed = _both(job(work=tmp_path, checkpoint_steps=1, resume=True))
    assert all(torch.equal(undisturbed[n], resumed[n]) for n in undisturbed)


def test_finished_stages_are_not_redone(tmp_path):
    _both(job(work=tmp_path))
    steps = []
    _both(job(work=tmp_path, resume=True, on_step=lambda stage, step: steps.append(step)))
    assert steps == []


def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    transfer(job(work=tmp_path), TRANSFER)
    other = job(work=tmp_path, resume=True)
    other.digest = "another"
    with pytest.raises(InputError, match="another plan"):
        transfer(other, TRANSFER)


def test_an_estimate_learns_from_its_own_losses_alone():
    """Transfer without the output leaves the gates alone; fine-tuning then moves the gates and leaves the estimate."""
    made = job({"k": 4, "width": 16}, method="sea")
    before = weights(made.model)
    report = transfer(made, TRANSFER.model_copy(update={"tokens": LENGTH * BATCH * 40, "output": 0.0}))
    assert sum(report.series["loss"][-5:]) < 0.9 * sum(report.series["loss"][:5])
    between = weights(made.model)
    changed = {n for n in before if not torch.equal(before[n], between[n])}
    assert changed == {n for n in before if "linearize_mixer" in n and "estimator.gate" not in n}
    finetune(made, FINETUNE.model_copy(update={"tokens": LENGTH * BATCH * 3}))
    after = weights(made.model)
    changed = {n for n in between if n in after and not torch.equal(between[n], after[n])}
    assert changed == {n for n in between if "estimator.gate" in n}


# ------------------------------------------------------------------------------------------------------- the loop
def test_order_continues_where_it_stopped():
    whole = list(Order(7, seed=3, first=0, last=15, batch=2))
    assert whole[12:] == list(Order(7, seed=3, first=6, last=15, batch=2))
    assert sorted(whole[:7]) == list(range(7)) and whole[:7] != whole[7:14]


def test_steps_hold_examples_of_like_length_and_an_epoch_all_of_them():
    sizes = torch.randint(5, 500, (1024,), generator=torch.Generator().manual_seed(0))
    whole = torch.tensor(list(Order(1024, seed=3, first=0, last=512, batch=4, sizes=sizes))).view(512, 4)
    assert whole.flatten().bincount().eq(2).all()
    assert whole.flatten()[280:].tolist() == list(Order(1024, 3, 70, 512, 4, sizes))
    padded = (sizes[whole].amax(1) * 4).sum() / sizes[whole].sum()
    mixed = torch.tensor(list(Order(1024, seed=3, first=0, last=256, batch=4))).view(256, 4)
    assert padded < 1.02 < 1.4 < (sizes[mixed].amax(1) * 4).sum() / sizes[mixed].sum()
    firsts = sizes[whole[:64, 0]]
    assert not firsts.equal(firsts.sort().values)  # steps of a stretch come in no order of length


def test_rates():
    plan = TRANSFER.model_copy(update={"warmup": 0.1, "schedule": "cosine"})
    shares = [rate(plan, step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and max(shares) == 1.0 and shares[-1] < 0.01


SCRIPT = """
import json, sys, torch
sys.path.insert(0, {tests!r})
from test_stages import TRANSFER, FINETUNE, LoraPlan, job
from linearize.stages.transfer import transfer
from linearize.stages.finetune import finetune
made = job(method={method!r})
losses = transfer(made, TRANSFER).series["loss"]
losses += finetune(made, FINETUNE.model_copy(update={{"lora": LoraPlan(r=2)}})).series["loss"]
import os
with open(f"{out}-{{os.environ.get('RANK', 'one')}}.json", "w") as file:
    json.dump(losses, file)
"""


@pytest.mark.parametrize("method", ["hedgehog", pytest.param("sea", marks=pytest.mark.slow)])
def test_two_processes_equal_one(method, tmp_path):
    """torchrun, gloo: the mean of both processes' losses is the loss of one."""
    script = tmp_path / "two.py"
    out = tmp_path / "losses"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), out=out, method=method))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    here = str(Path(linearize.__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, str(script)], check=True, env=environment, timeout=300)
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    subprocess.run(run, check=True, env=environment, timeout=300)
    one, first, second = (json.loads((tmp_path / f"losses-{n}.json").read_text()) for n in ("one", "0", "1"))
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert mean == pytest.approx(one, rel=2e-3)
