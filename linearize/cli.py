"""The command line: each command is one call of linearize.api, and this file is light to import.

Results go to stdout, everything else to stderr. Exit codes: 0 ok, 2 bad input, recipe or data, 3 model or method
unsupported, 4 numerics or a quality gate, 5 I/O, 130 interrupted; 1 is a bug, with its traceback.
"""

from __future__ import annotations

import json as jsonlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize import api

app = typer.Typer(
    name="linearize",
    help="Turn a pretrained transformer into a linear-attention one, and measure what that cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda word: word.replace("_", "-"),
    },
)

Model = Annotated[str | None, typer.Option("--model", "-m", help="Hub id, folder, GGUF file; none: the embedded one.")]
Converted = Annotated[str, typer.Option("--model", "-m", help="Folder or hub id of a converted model.")]
Task = Annotated[
    str | None, typer.Option("--task", help="text, sentences, image or diffusion: of the embedded model, or to check.")
]
Method = Annotated[str | None, typer.Option("--method", help="What replaces softmax; see: list methods.")]
Recipe = Annotated[str | None, typer.Option("--recipe", "-r", help="Name or file; none: the best for the model.")]
Dataset = Annotated[str | None, typer.Option("--dataset", help="Hub id, files or a folder: text, images; or 'self'.")]
Layers = Annotated[str | None, typer.Option("--layers", help="auto, all, 0-11, every:4, keep:3,7 or 0,2,5-7.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any recipe key: stages.transfer.lr=1e-3. Repeatable.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Of all random numbers.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16; mixers are float32.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", help="At most so many steps in each stage.")]
Output = Annotated[Path | None, typer.Option("--output-dir", "-o", help="Folder to write; must be empty or absent.")]
Longer = Annotated[bool, typer.Option("--allow-longer", help="Sequences beyond the model's positions.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Adjust = Annotated[
    list[str] | None, typer.Option("--adjust", help="A setting that may change after training: k=16. Repeatable.")
]
Adapter = Annotated[bool, typer.Option("--adapter-only", help="Save what was learned, without the base.")]
Json = Annotated[bool, typer.Option("--json", help="The answer as JSON on stdout.")]


def _show(answer: Any, json: bool) -> None:
    """Prints what a verb answered: `as_dict()` for machines, `render()` for eyes."""
    if os.environ.get("RANK", "0") != "0":  # torchrun: once is enough
        return
    if json:
        print(jsonlib.dumps(answer.as_dict(), indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    Console().print(answer.render())


def _overrides(set_: list[str] | None, **flags: Any) -> list[str | tuple[str, Any]]:
    """Flags as recipe keys, where given; then --set, which wins."""
    paths = {
        "dataset": "data.source",
        "layers": "method.layers",
        "seed": "seed",
        "dtype": "model.dtype",
        "output_dir": "output.folder",
        "allow_longer": "data.allow_longer",
        "skip_bad": "data.skip_bad",
        "adapter_only": "output.adapter_only",
    }
    given = [
        (paths[key], str(v) if isinstance(v, Path) else v)
        for key, v in flags.items()
        if v is not None and v is not False
    ]
    return [*given, *(set_ or [])]


def convert(
    model: Model = None,
    method: Method = None,
    recipe: Recipe = None,
    dataset: Dataset = None,
    task: Task = None,
    output_dir: Output = None,
    layers: Layers = None,
    set_: Set = None,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = "auto",
    max_steps: MaxSteps = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run stopped.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same as: linearize plan.")] = False,
    allow_longer: Longer = False,
    skip_bad: SkipBad = False,
    trust_remote_code: Trust = False,
    adapter_only: Adapter = False,
    json: Json = False,
) -> None:
    """Convert a model: plan, surgery, transfer, fine-tuning, evaluation, report."""
    overrides = _overrides(
        set_,
        dataset=dataset,
        layers=layers,
        seed=seed,
        dtype=dtype,
        output_dir=output_dir,
        allow_longer=allow_longer,
        skip_bad=skip_bad,
        adapter_only=adapter_only,
    )
    common: Any = {"task": task, "max_steps": max_steps, "trust_remote_code": trust_remote_code}
    if dry_run:
        _show(api.plan(model, method, recipe, overrides, **common), json)
        return
    from linearize.types import GateError

    try:
        done = api.convert(model, method, recipe=recipe, overrides=overrides, device=device, resume=resume, **common)
    except GateError as error:
        if error.answer is not None:
            _show(error.answer, json)
        raise
    _show(done, json)


def plan(
    model: Model = None,
    method: Method = None,
    recipe: Recipe = None,
    dataset: Dataset = None,
    task: Task = None,
    output_dir: Output = None,
    layers: Layers = None,
    set_: Set = None,
    seed: Seed = None,
    dtype: Dtype = None,
    max_steps: MaxSteps = None,
    allow_longer: Longer = False,
    skip_bad: SkipBad = False,
    trust_remote_code: Trust = False,
    adapter_only: Adapter = False,
    json: Json = False,
) -> None:
    """Show what convert would do and cost, from the configuration's shapes alone."""
    overrides = _overrides(
        set_,
        dataset=dataset,
        layers=layers,
        seed=seed,
        dtype=dtype,
        output_dir=output_dir,
        allow_longer=allow_longer,
        skip_bad=skip_bad,
        adapter_only=adapter_only,
    )
    common: Any = {"task": task, "max_steps": max_steps, "trust_remote_code": trust_remote_code}
    _show(api.plan(model, method, recipe, overrides, **common), json)


def evaluate(
    model: Converted,
    dataset: Annotated[str | None, typer.Option("--dataset", help="What to measure on; none: the recipe's.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="The part of it: test, t10k, [:500].")] = None,
    pairs: Annotated[str | None, typer.Option("--pairs", help="Scored pairs of sentences (STS).")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Documents, sentences or images.")] = None,
    length: Annotated[int | None, typer.Option("--length", min=2, help="Positions of each document.")] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="What it was converted from, if moved.")] = None,
    adjust: Adjust = None,
    suite: Annotated[str | None, typer.Option("--suite", help="recall (of long texts), layers or lm-eval.")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Of recall: passkey,mqar,...; of lm-eval: any.")] = None,
    task_files: Annotated[
        Path | None, typer.Option("--task-files", help="Of lm-eval: a folder of task YAML files and their data.")
    ] = None,
    lengths: Annotated[str | None, typer.Option("--lengths", help="Of recall: tokens, 1024,2048,4096.")] = None,
    depths: Annotated[int | None, typer.Option("--depths", min=1, help="Of recall: places of the needle.")] = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Of recall: questions each.")] = None,
    mqar_pairs: Annotated[str | None, typer.Option("--mqar-pairs", help="Of recall: 4,16,64.")] = None,
    haystack: Annotated[str | None, typer.Option("--haystack", help="Of recall: real text to hide in.")] = None,
    allow_longer: Longer = False,
    output_dir: Output = None,
    device: Device = "auto",
    seed: Seed = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Measure a converted model against its teacher, its window and its own branches."""
    if task_files is not None and suite != "lm-eval":
        raise typer.BadParameter("is for --suite lm-eval", param_hint="--task-files")
    if suite == "lm-eval":
        which: Any = {"tasks": tasks, "task_files": task_files, "limit": limit, "output_dir": output_dir}
        how: Any = {"teacher": teacher, "adjust": adjust or (), "device": device, "seed": seed}
        _show(api.score(model, **which, **how, trust_remote_code=trust_remote_code), json)
        return
    if suite == "layers":
        _show(
            api.layers(
                model,
                data=dataset,
                limit=limit,
                teacher=teacher,
                adjust=adjust or (),
                device=device,
                seed=seed,
                trust_remote_code=trust_remote_code,
            ),
            json,
        )
        return
    if suite is not None:
        asked: Any = {"tasks": tasks, "lengths": lengths, "depths": depths, "trials": trials, "pairs": mqar_pairs}
        more: Any = {"haystack": haystack, "allow_longer": allow_longer, "output_dir": output_dir, "teacher": teacher}
        common: Any = {"adjust": adjust or (), "device": device, "trust_remote_code": trust_remote_code}
        _show(api.recall(model, suite=suite, seed=seed, **asked, **more, **common), json)
        return
    _show(
        api.evaluate(
            model,
            data=dataset,
            split=split,
            pairs=pairs,
            teacher=teacher,
            limit=limit,
            length=length,
            adjust=adjust or (),
            device=device,
            seed=seed,
            trust_remote_code=trust_remote_code,
        ),
        json,
    )


def bench(
    model: Model = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="Tokens, by commas; of images pixels of a side: 224,512,1024,2048.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences or images at a time.")] = 1,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Times each, in turns.")] = 5,
    method: Method = None,
    recipe: Recipe = None,
    set_: Set = None,
    dtype: Dtype = None,
    device: Device = "auto",
    output_dir: Output = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="A model of this form, nothing downloaded.")
    ] = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Time teacher and student side by side: prefill, decoding, transfer, bytes kept; of images forward and memory."""
    _show(
        api.bench(
            model,
            method,
            recipe=recipe,
            overrides=_overrides(set_, dtype=dtype),
            lengths=lengths,
            batch=batch,
            repeats=repeats,
            device=device,
            output_dir=output_dir,
            random_weights=random_weights,
            trust_remote_code=trust_remote_code,
        ),
        json,
    )


def selfgen(
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of drawings; goes on where it ended.")],
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="How many drawings.")],
    model: Model = None,
    classes: Annotated[str, typer.Option("--classes", help="all, or numbers by commas.")] = "all",
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A file with a prompt on each line.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Denoising steps of each.")] = 20,
    guidance: Annotated[float | None, typer.Option("--guidance", help="None: the pipeline's own; classes: 1.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Drawing n depends on it and n alone.")] = 0,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Drawings at a time, and in a file.")] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Let a diffusion model draw its own training data: latents, conditions and seeds."""
    _show(
        api.selfgen(
            output_dir,
            model,
            num=num,
            classes=classes,
            prompts=prompts,
            steps=steps,
            guidance=guidance,
            seed=seed,
            batch=batch,
            device=device,
        ),
        json,
    )


def generate(
    model: Converted,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to go on from.")] = "",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0: the likeliest token.")] = 0.0,
    seed: Seed = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Continue a text with a converted model, from a state of constant size."""
    _show(
        api.generate(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
        ),
        json,
    )


def inspect(
    model: Model = None,
    attention: Annotated[
        Path | None, typer.Option("--attention", help="Folder to write one example's maps to.")
    ] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", help="Maps of its first example instead.")] = None,
    adjust: Adjust = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Show a model's attention layers, or what a converted folder holds; write maps of its attention."""
    options: Any = {"attention": attention, "data": dataset, "adjust": adjust or ()}
    _show(api.inspect(model, **options, trust_remote_code=trust_remote_code), json)


def merge(
    model: Converted,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder to write.")],
    json: Json = False,
) -> None:
    """Fold LoRA into the weights, in float32."""
    _show(api.merge(model, output_dir), json)


def export(
    model: Converted,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder to write.")],
    form: Annotated[str, typer.Option("--format", help="safetensors, torch-export or onnx.")] = "safetensors",
    json: Json = False,
) -> None:
    """Write a converted model in another form."""
    _show(api.export(model, output_dir, form=form), json)


def report(
    model: Annotated[str | None, typer.Option("--model", "-m", help="A converted folder.")] = None,
    update_readme: Annotated[bool, typer.Option("--update-readme", help="Rewrite the README's table.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail if the README's table is old.")] = False,
    json: Json = False,
) -> None:
    """Show a conversion's report again, or rebuild the README's table from the result files."""
    _show(api.report(model, update_readme=update_readme, check=check), json)


def listing(
    kind: Annotated[str, typer.Argument(help="methods, families, recipes or embedded.")],
    json: Json = False,
) -> None:
    """List methods, families, recipes or embedded teachers."""
    _show(api.listing(kind), json)


def environment(json: Json = False) -> None:
    """Show this machine and the versions that matter: what a bug report needs."""
    _show(api.environment(), json)


_NAMES = {"evaluate": "eval", "listing": "list", "environment": "env"}
_VERBS: tuple[Callable[..., None], ...] = (
    convert, plan, selfgen, evaluate, bench, generate, inspect, merge, export, report, listing, environment,
)  # fmt: skip
for _verb in _VERBS:
    if hasattr(api, _verb.__name__):  # not before its api exists
        app.command(_NAMES.get(_verb.__name__, _verb.__name__))(_verb)


def main() -> None:
    """Runs the command line and exits; the one place where errors become exit codes."""
    log = logging.getLogger("linearize")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of transformers and datasets, read when they are imported
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    try:
        code = app(arguments, prog_name="linearize", standalone_mode=False) or 0
        sys.stdout.flush()
        if code == 130:  # typer's own name for Ctrl-C
            raise KeyboardInterrupt
        return code
    except BrokenPipeError:  # `linearize ... | head`: what Python flushes at its end must go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; a convert goes on with --resume", file=sys.stderr)
        return 130
    except Exception as error:
        code = _code(error)
        if code is None:
            raise
        return code


def _code(error: Exception) -> int | None:
    """Tells an error that a user can mend in one line and gives its exit code; None for a bug."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if show and code is not None:  # usage, from typer
        show()
        return code
    from linearize.storage import reason
    from linearize.types import LinearizeError

    if isinstance(error, LinearizeError):
        print(f"error: {error}", file=sys.stderr)
        return error.code
    if isinstance(error, OSError) and error.errno and (why := reason(error)):
        print(f"error: {f'{error.filename}: ' if error.filename else ''}{why}", file=sys.stderr)
        return 5
    return None


if __name__ == "__main__":
    main()
