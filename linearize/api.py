"""The verbs: each a few lines that join plan -> surgery -> stages -> report. Importing this file costs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.answers import (
    Benched,
    Drawn,
    Environment,
    Evaluated,
    Inspected,
    Listing,
    Planned,
    Reported,
    Saved,
    Written,
)
from linearize.resolve import choose, fitting, resolve, short

if TYPE_CHECKING:
    from torch import nn

    from linearize.answers import Layered, Recalled, Scored
    from linearize.conversion import Converted

LISTS = ("methods", "families", "recipes", "embedded")


def plan(
    model: str | Path | nn.Module | None = None,
    method: str | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | Iterable[str | tuple[str, Any]] = (),
    *,
    task: str | None = None,
    max_steps: int | None = None,
    trust_remote_code: bool = False,
) -> Planned:
    """What `convert` would do and what would come of it: sites, parameters, state, FLOPs, break-even lengths.

    From the configuration's shapes: nothing is downloaded but the configuration, and no forward pass is made. Raises
    InputError, Unsupported.
    """
    from linearize import models
    from linearize.surgery.forecast import forecast

    resolved = resolve(
        model, method, recipe, overrides,
        task=task, max_steps=max_steps, trust_remote_code=trust_remote_code, offline=True,
    )  # fmt: skip
    made = resolved.plan
    named = model is None or isinstance(model, str | Path)
    skeleton: Any = models.skeleton(resolved.config, trust_remote_code) if named else model
    sites, chosen, left = choose(made, skeleton)
    lengths: Sequence[int] = sorted({*made.eval.lengths, made.method.target_length})
    made, idle = fitting(made, chosen, resolved.recipe)
    resolved = replace(resolved, plan=made, notes=(*resolved.notes, *idle))
    return Planned(
        resolved,
        forecast(
            skeleton,
            sites,
            chosen,
            left,
            made.method.name,
            made.mixer(),
            lengths,
            made.method.target_length,
        ),
    )


def listing(kind: str) -> Listing:
    """What there is of "methods", "families", "recipes" or "embedded". Raises InputError for another word."""
    from linearize import listings
    from linearize.types import InputError, nearest

    if kind not in LISTS:
        raise InputError(f"there is no list of {kind!r}: {nearest(kind, LISTS)}")
    return Listing(kind, getattr(listings, kind)())


def environment() -> Environment:
    """What a bug report needs."""
    import torch

    from linearize.report import provenance

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Environment(provenance.machine(device).model_dump(), provenance.versions(), provenance.commit().model_dump())


def convert(
    model: str | Path | nn.Module | None = None,
    method: str | None = None,
    *,
    data: Any = None,
    tokenizer: Any = None,
    task: str | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | Iterable[str | tuple[str, Any]] = (),
    output_dir: str | Path | None = None,
    device: str = "auto",
    resume: bool = False,
    max_steps: int | None = None,
    trust_remote_code: bool = False,
) -> Converted:
    """Convert a model: surgery, transfer, fine-tuning, evaluation, report.

    model: a name (hub id, folder, GGUF file; None: the embedded teacher of `task`) or a transformers model, converted
    in place. data: a source as in `data.source`, a list of texts, or Examples (Tokens, Sentences, Images); None: the
    recipe's, else, of text, what the teacher writes. tokenizer: of a model in hand (its image processor, of images),
    where its folder is not known. task: "text", "sentences" or "image", where it has to be that one.
    output_dir: where the result goes; a model given by name gets a folder beside you, one that was handed over none.
    resume: go on where a killed run of the same plan and inputs stopped. Raises InputError, Unsupported, GateError (a
    gate of the recipe was missed, after everything is written; or numerics), StorageError.
    """
    import logging

    from linearize.conversion import run

    items = list(overrides.items()) if isinstance(overrides, Mapping) else list(overrides)
    if isinstance(data, str | Path):
        items.append(("data.source", str(data)))
        data = None
    if output_dir is not None:
        items.append(("output.folder", str(output_dir)))
    named = model is None or isinstance(model, str | Path)
    resolved = resolve(
        model, method, recipe, items, task=task, max_steps=max_steps, trust_remote_code=trust_remote_code
    )
    if named and resolved.plan.output.folder is None:
        folder = f"{short(resolved.plan.model.id)}-{resolved.plan.method.name}"
        output = resolved.plan.output.model_copy(update={"folder": folder})
        resolved = replace(resolved, plan=resolved.plan.model_copy(update={"output": output}))
    return run(
        resolved,
        model=None if named else model,
        processor=tokenizer,
        data=data,
        device=device,
        resume=resume,
        trust_remote_code=trust_remote_code,
        say=logging.getLogger("linearize").info,
    )


def selfgen(
    output_dir: str | Path,
    model: str | Path | nn.Module | None = None,
    *,
    num: int,
    classes: str = "all",
    prompts: str | Path | None = None,
    steps: int = 20,
    guidance: float | None = None,
    seed: int = 0,
    batch: int | None = None,
    device: str = "auto",
    pipeline: Any = None,
    **options: Any,
) -> Drawn:
    """`num` drawings of a diffusion model with their conditions and seeds, in a folder that `convert` trains on.

    classes: "all", or numbers by commas, of class-conditional models; prompts: a file with one on each line, of
    pipelines of texts (`model` names the pipeline; or `pipeline`, one in hand). options: those of the pipeline (height,
    width). The same call goes on where it was interrupted, and writes the same bytes. Raises InputError, Unsupported,
    StorageError.
    """
    from linearize import denoisers, models
    from linearize.data import drawing

    if prompts is not None:
        pipe = pipeline if pipeline is not None else denoisers.load_pipeline(str(model), device)
        lines = [line.strip() for line in Path(prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
        made = drawing.draw_prompts(
            pipe, lines, num, seed=seed, steps=steps, guidance=guidance, batch=batch or 4, folder=output_dir, **options
        )
        return Drawn(Path(output_dir), len(made), made.tokens, made.digest)
    loaded = models.load_model(models.source(model, task="diffusion"), device=device)  # type: ignore[arg-type]
    try:
        chosen = None if classes == "all" else [int(n) for n in classes.split(",")]
    except ValueError:
        from linearize.types import InputError

        raise InputError(f"--classes {classes}: write all, or numbers by commas: 0,3,7") from None
    made = drawing.draw_classes(
        loaded.model, loaded.processor, num, classes=chosen, seed=seed, steps=steps, guidance=guidance or 1.0,
        batch=batch or 32, folder=output_dir,
    )  # fmt: skip
    return Drawn(Path(output_dir), len(made), made.tokens, made.digest)


def evaluate(
    model: str | Path,
    *,
    data: str | None = None,
    split: str | None = None,
    pairs: str | None = None,
    teacher: str | Path | None = None,
    limit: int | None = None,
    length: int | None = None,
    adjust: Mapping[str, Any] | Iterable[str] = (),
    device: str = "auto",
    seed: int | None = None,
    trust_remote_code: bool = False,
) -> Evaluated:
    """Measure a converted folder against its teacher, the zero-token window and its own branches.

    data: a source of what the model reads; None: the recipe's, or the held-out part in the folder. split: of data.
    pairs: scored pairs of sentences. teacher: the model that was converted (None: what the folder's recipe names).
    adjust: settings of the method that may change after training. Raises InputError, StorageError.
    """
    from contextlib import nullcontext
    from functools import partial

    from linearize.evaluate.quality import STUDENT
    from linearize.measuring import open_converted
    from linearize.report import verdict
    from linearize.surgery.twin import twin

    asked = {"source": data, "pairs": pairs, "split": split, "limit": limit, "length": length}
    found = open_converted(
        model, asked, teacher=teacher, adjust=adjust, device=device, seed=seed, trust_remote_code=trust_remote_code
    )
    plan, student, base, surgery, task, exam = found
    zero = [(name, twin(base.model, method, settings, surgery.sites)) for name, method, settings in task.zero]
    branches = sorted({branch for mixer in surgery.mixers.values() for branch in mixer.branches})
    scores = exam.measure(
        student.model,
        [
            (STUDENT, nullcontext),
            *((branch, partial(surgery.ablate, branch)) for branch in branches),
            *((name, partial(nullcontext, other)) for name, other in zero),
        ],
        lambda: nullcontext(base.model),
    )
    table = exam.rows(scores, plan.seed)
    # Text is written in seconds; drawings would be made once more.
    made = task.samples(surgery, exam, lambda: nullcontext(base.model))[1] if plan.task == "text" else None
    return Evaluated(table, exam.words, verdict.judge(table, plan.gate.model_dump()), plan.task, made)


def layers(model: str | Path, *, limit: int | None = None, data: str | None = None, **options: Any) -> Layered:
    """A converted folder layer by layer: errors, attention, and what each layer and group costs alone.

    data: a source of texts (None: what the folder was measured on). options: those of measuring.reopen. Raises
    InputError, Unsupported, StorageError.
    """
    from linearize.answers import Layered
    from linearize.measuring import compare_layers

    return Layered(compare_layers(model, {"source": data, "limit": limit}, **options))


def recall(model: str | Path, **options: Any) -> Recalled:
    """Ask a converted folder, its teacher and windows for what long texts held: passkeys, needles, pairs.

    options: see recalling.recalled. Raises InputError, Unsupported, StorageError.
    """
    from linearize.recalling import recalled

    return recalled(model, **options)


def score(model: str | Path, **options: Any) -> Scored:
    """Score a converted folder, its teacher and windows on standard tasks, through lm-eval.

    options: see standard.scored. Raises InputError, Unsupported, GateError, StorageError.
    """
    from linearize.standard import scored

    return scored(model, **options)


def bench(
    model: str | Path | nn.Module | None = None,
    method: str | None = None,
    *,
    recipe: str | Path | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | Iterable[str | tuple[str, Any]] = (),
    lengths: str | Sequence[int] | None = None,
    batch: int = 1,
    repeats: int = 5,
    device: str = "auto",
    output_dir: str | Path | None = None,
    random_weights: bool = False,
    trust_remote_code: bool = False,
) -> Benched:
    """Time a teacher and its untrained conversion in turns: prefill, decoding, transfer, and the bytes each keeps; of
    images one forward, and the most memory it takes.

    lengths in tokens, of images in pixels of a side. output_dir: a folder for the result file, which bears the name of
    the recipe (without one, of the model) and the method. random_weights: a model of the same form, or of the recipe's
    `model.form`, nothing downloaded. Raises InputError, Unsupported, StorageError.
    """
    import torch

    from linearize import models
    from linearize.evaluate.speed import IMAGE_UNITS, UNITS, speed
    from linearize.plan import TransferPlan
    from linearize.report import provenance, schema
    from linearize.surgery.attach import attach
    from linearize.types import InputError

    resolved = resolve(model, method, recipe, overrides, trust_remote_code=trust_remote_code, offline=random_weights)
    plan = resolved.plan
    try:
        wanted = [int(n) for n in lengths.split(",")] if isinstance(lengths, str) else list(lengths or ())
    except ValueError:
        raise InputError(f"--lengths {lengths}: write numbers of tokens (or pixels), 256,1024,4096") from None
    subject: Any = model
    if random_weights:
        torch.manual_seed(plan.seed)
        subject = type(models.skeleton(resolved.config, trust_remote_code))(resolved.config).eval()
        subject.to("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    elif resolved.source is not None:
        subject = models.load_model(
            resolved.source, dtype=plan.model.dtype, device=device, trust_remote_code=trust_remote_code
        ).model
    surgery = attach(subject, choose(plan, subject)[1], plan.method.name, plan.mixer())
    images = subject.main_input_name == "pixel_values"
    wanted = wanted or ([224, 512, 1024, 2048] if images else [256, 1024, 4096])
    stage = next((stage for stage in plan.stages if isinstance(stage, TransferPlan)), None)
    rows = speed(surgery, wanted, batch=batch, repeats=repeats, stage=stage)
    made = schema.Bench(
        **provenance.gather(device=next(subject.parameters()).device),
        name=f"{short(resolved.recipe or plan.model.id)}-{plan.method.name}",
        settings={"batch": batch, "repeats": repeats, "dtype": str(subject.dtype).removeprefix("torch."),
                  "mixer": plan.mixer().model_dump(mode="json")},
        units=IMAGE_UNITS if images else UNITS,
        rows=[schema.Measure(name=row, metrics=metrics) for row, metrics in rows.items()],
        notes=["random weights of this form"] if random_weights else [],
    )  # fmt: skip
    file = None
    if output_dir is not None:
        file = Path(output_dir) / f"{made.name}.json"
        schema.write(made, file)
    return Benched(made, file)


def generate(
    model: str | Path,
    prompt: str = "",
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Written:
    """Continue a text with a converted model. temperature 0 takes the likeliest token. Raises InputError."""
    import time

    from linearize import models
    from linearize.data.selfgen import end_tokens, sample
    from linearize.data.text import first_token
    from linearize.surgery.attach import Surgery
    from linearize.types import InputError

    loaded = models.load_converted(model, device=device, trust_remote_code=trust_remote_code)
    surgery = Surgery.of(loaded.model)
    assert surgery is not None
    if loaded.task != "text":
        raise InputError(f"generate continues text, and this is a model for {loaded.task}: see linearize eval")
    tokenizer = loaded.tokenizer
    first = first_token(tokenizer)
    ids = ([] if first is None else [first]) + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError("this tokenizer has no first token of its own: give a text with --prompt")
    import torch

    start = time.perf_counter()
    out = sample(
        loaded.model,
        torch.tensor([ids]),
        None,
        max_new_tokens,
        seed=None if temperature == 0 else (seed or 0),
        temperature=temperature or 1.0,
        ends=end_tokens(loaded.model, tokenizer),
    )[0, len(ids) :]
    seconds = time.perf_counter() - start
    kept = sum(mixer.state_bytes(len(ids) + max_new_tokens) for mixer in surgery.mixers.values())
    text = tokenizer.decode(out, skip_special_tokens=True)
    return Written(prompt, text, len(out), len(out) / seconds, kept)


def inspect(
    model: str | Path | nn.Module | None = None,
    *,
    attention: str | Path | None = None,
    data: str | None = None,
    adjust: Mapping[str, Any] | Iterable[str] = (),
    trust_remote_code: bool = False,
) -> Inspected:
    """The attention of a model, from its configuration; of a converted folder also its mixers.

    attention: a folder to write maps of a converted folder's attention into, beside softmax over the same q and k: of
    the first example that it was measured on, or of `data`; adjust: as in `evaluate`. Raises InputError, Unsupported.
    """
    from linearize import models
    from linearize.measuring import write_attention
    from linearize.surgery.attach import Surgery
    from linearize.surgery.files import is_adapter
    from linearize.surgery.select import find

    folder = model
    if isinstance(model, str | Path) and is_adapter(Path(model)):
        model = models.load(model)  # the base's configuration alone does not say what was attached
    named = model is None or isinstance(model, str | Path)
    source = models.source(model) if named else None
    skeleton: Any = models.skeleton(models.config(source, trust_remote_code), trust_remote_code) if source else model
    surgery = Surgery.of(skeleton)
    mixers = surgery.mixers if surgery else {}
    rows = []
    for site in find(skeleton):
        shape = site.shape
        mixer = mixers.get(site.name)
        rows.append(
            {
                "name": site.name,
                "layer": site.layer,
                "heads": f"{shape.heads}/{shape.kv_heads}",
                "dims": f"{shape.key_dim}/{shape.value_dim}",
                "window": shape.window,
                "seam": site.seam,
                "drops": list(site.drops),
                "mixer": None if surgery is None or mixer is None else surgery.method,
                "parameters": 0 if mixer is None else sum(p.numel() for p in mixer.parameters()),
                "state_bytes": None if mixer is None else mixer.state_bytes(1),
            }
        )
    written = [] if attention is None else write_attention(folder, attention, data, adjust, trust_remote_code)
    name = str(source.id or "embedded") if source else type(model).__name__
    settings = surgery.config.model_dump(mode="json") if surgery else {}
    return Inspected(name, surgery.method if surgery else None, settings, rows, written)


def merge(model: str | Path, output_dir: str | Path) -> Saved:
    """Fold an adapter folder's LoRA into its base, in float32, and write the full checkpoint. Raises InputError."""
    from linearize import models
    from linearize.stages.merge import merge as fold
    from linearize.storage import check_target
    from linearize.surgery import files

    check_target(output_dir)
    files.read_adapter(model)
    loaded = models.load_converted(model)
    fold(loaded.model)
    return Saved(_carried(loaded, files.save(loaded.model, output_dir, loaded.processor)), "full checkpoint")


def _carried(loaded: Any, folder: Path) -> Path:
    """`folder`, with the files that belong to the model and that saving it does not write."""
    from linearize import models, tasks
    from linearize.plan import Plan
    from linearize.surgery import files

    home = models.home(loaded.model, loaded.source)
    task = tasks.of(loaded.task)(Plan(), loaded.model, loaded.processor, home)
    files.carry(home, folder, task.carried)
    return folder


def export(model: str | Path, output_dir: str | Path, *, form: str = "safetensors") -> Saved:
    """Write a converted model, LoRA folded in, in another form: "safetensors", "torch-export" or "onnx".

    Raises InputError, Unsupported, GateError, StorageError.
    """
    from linearize import models
    from linearize.stages.export import export as write
    from linearize.stages.merge import merge as fold

    loaded = models.load_converted(model)
    fold(loaded.model)
    return Saved(_carried(loaded, write(loaded.model, output_dir, form, loaded.processor)), form)


def report(model: str | Path | None = None, *, update_readme: bool = False, check: bool = False) -> Reported:
    """Show the report of a converted folder again, or bring the tables of README.md up to date with the result files.

    check: change nothing, and raise GateError where a table is out of date. Raises InputError, StorageError.
    """
    from linearize.report import html, readme, schema
    from linearize.types import InputError

    if update_readme or check:
        return Reported(changed=tuple(readme.update(Path.cwd(), check=check)))
    if model is None:
        raise InputError("name a converted folder with --model, or pass --update-readme")
    found = schema.read(model, schema.Report)
    html.write_html(found, Path(model) / "report.html")
    return Reported(found, Path(model))


def prefix(model: nn.Module, text: Any, tokenizer: Any = None, file: str | Path | None = None, **options: Any) -> Any:
    """`surgery.state.prefix`; tokenizer None: the one beside the model, where that was loaded from. Raises InputError
    where it does not say so."""
    from linearize.models import processor_of_model
    from linearize.surgery import state

    if tokenizer is None and isinstance(text, str):
        tokenizer = processor_of_model(model, "text")
    return state.prefix(model, text, tokenizer, file, **options)
