"""Run recipes and file what came out: recipes/results/<method>/<model>.json, one per recipe.

    python recipes/measure.py hedgehog/stories15m-window --model FOLDER [--data FILE] --eval FILE [--seeds 0 1 2]
                               [--set key=value] [--again]

A file that holds these seeds is left as it is, unless --again.

    python recipes/measure.py RECIPE --window-only ...         the same options: one more row for a file that is there

Every seed is a conversion of its own under --work, resumed where it was killed; several are averaged into one file.
A bar that is missed is filed like one that is met: the verdict in the file says which.
The table of the README is made from these files by `linearize report --update-readme`.
"""

from __future__ import annotations

import argparse
import base64
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linearize import api
from linearize.evaluate.quality import STUDENT, TEACHER, WINDOW_ONLY
from linearize.plan import Plan
from linearize.recipe import pairs
from linearize.report import schema, verdict
from linearize.storage import write_atomic
from linearize.types import GateError, InputError

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="its name, as in `linearize list recipes`")
    parser.add_argument("--model", help="folder, GGUF file or hub id; none: the recipe's")
    parser.add_argument("--data", help="what to train on; none: the recipe's, else (text) the teacher writes it")
    parser.add_argument("--eval", help="what the table is measured on; none: a held-out part of the data")
    parser.add_argument("--pairs", help="scored pairs of sentences; none: no Spearman correlation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], help="further recipe keys")
    parser.add_argument("--first", nargs="*", default=[], help="further keys for the first seed alone: dear baselines")
    parser.add_argument(
        "--window-only", action="store_true", help="train a window by as many tokens, and add it to the recipe's file"
    )
    parser.add_argument("--again", action="store_true", help="measure what is filed already")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="folder for the conversions")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("linearize").setLevel(logging.INFO)

    target = HERE / "results" / f"{arguments.recipe}.json"
    if arguments.window_only:
        window_only(arguments, target)
        print(target)
        return
    filed = schema.read(target, schema.Result) if target.is_file() else None
    if filed is not None and set(arguments.seeds) <= set(filed.seeds) and not arguments.again:
        print(f"{target} is there, by {filed.command} at {filed.commit}: --again measures anew")
        return
    reports = []
    for seed in arguments.seeds:
        folder = arguments.work / f"{arguments.recipe.replace('/', '-')}-{seed}"
        settings = settings_of(arguments, seed) + (arguments.first if seed == arguments.seeds[0] else [])
        try:
            converted = api.convert(
                arguments.model, recipe=arguments.recipe, overrides=settings, output_dir=folder, resume=True
            )
        except GateError as error:  # a bar that was missed is a result as well: its file says so
            if error.answer is None:
                raise
            converted = error.answer
        reports.append(converted.report)
    gate = reports[0].plan["gate"]  # the recipe's, or --set's
    if reports[0].diagnostics.grid is not None:
        write_atomic(target.with_suffix(".png"), base64.b64decode(reports[0].diagnostics.grid))
    result = verdict.over_seeds([report.result() for report in reports], gate)
    row = None if filed is None or result.row(WINDOW_ONLY) else filed.row(WINDOW_ONLY)
    alike = filed and (filed.evaluation, filed.trained_tokens) == (result.evaluation, result.trained_tokens)
    if filed is not None and row is not None and alike:
        result = with_window(result, row, [note for note in filed.notes if note.startswith(WINDOW_ONLY)], gate)
    schema.write(result, target)
    print(target)


def with_window(result: schema.Result, row: schema.Row, notes: Sequence[str], gate: Mapping[str, Any]) -> schema.Result:
    """The result with a row of a trained window that was measured by itself, in place of another such row."""
    rows = [*(r for r in result.rows if r.name != WINDOW_ONLY), row]
    seen = [note for note in result.notes if not note.startswith(WINDOW_ONLY)]
    update = {"rows": rows, "verdict": verdict.judge(rows, gate), "notes": [*seen, *notes]}
    return result.model_copy(update=update)


def settings_of(arguments: argparse.Namespace, seed: int) -> list[str]:
    sources = {"data.source": arguments.data, "eval.source": arguments.eval, "eval.pairs": arguments.pairs}
    return [f"seed={seed}", *arguments.set, *(f"{key}={file}" for key, file in sources.items() if file)]


def window_only(arguments: argparse.Namespace, target: Path) -> None:
    """The row of `eval.window_only` for students who were measured without it: the window is trained as there, by the
    tokens of all their stages. Raises InputError where that table was measured on something else."""
    result, seed = schema.read(target, schema.Result), arguments.seeds[0]
    settings = settings_of(arguments, seed)
    plan = Plan.read(arguments.recipe, settings)
    last = plan.stage("finetune") or Plan.read({"task": plan.task}).stage("finetune")
    assert last is not None
    stage = last.model_dump() | {"tokens": result.trained_tokens, "batch": plan.stages[-1].batch, "mixer_lr": None}
    window = {"window": plan.eval.window, "sinks": plan.eval.sinks}
    instead = {"method.name": "window", "method.mixer": window, "stages": [stage], "gate": {}}
    report = api.convert(
        arguments.model, recipe=arguments.recipe,
        overrides=[*pairs(settings), *instead.items(), ("eval.curve", None), ("eval.window_only", False)],
        output_dir=arguments.work / f"{arguments.recipe.replace('/', '-')}-window-only", resume=True,
    ).report  # fmt: skip
    row, teachers = report.row(STUDENT), [r.row(TEACHER) for r in (report, result)]
    losses = [t.nll for t in teachers if t is not None and t.nll is not None]
    assert row is not None
    if report.evaluation != result.evaluation or len(losses) < 2 or not math.isclose(*losses, rel_tol=1e-4):
        raise InputError(f"{target.name} is of another teacher or another text ({result.evaluation}): give the same")
    row = row.model_copy(update={"name": WINDOW_ONLY, "marginal": None})
    cost = f"seed {seed}, {report.trained_tokens:,} tokens in {stage['precision']}"
    notes = [f"{WINDOW_ONLY}: {cost}, a run of its own at {report.commit}"]
    schema.write(with_window(result, row, notes, plan.gate.model_dump()), target)


if __name__ == "__main__":
    main()
