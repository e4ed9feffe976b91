"""Run recipes and file what came out: recipes/results/<method>/<model>.json, one per recipe. Finished ones are skipped.

    python recipes/measure.py hedgehog/stories15m-window --model FOLDER [--data FILE] --eval FILE [--seeds 0 1 2]
                               [--set key=value]

Every seed is a conversion of its own under --work, resumed where it was killed; several are averaged into one file.
A bar that is missed is filed like one that is met: the verdict in the file says which.
The table of the README is made from these files by `linearize report --update-readme`.
"""

from __future__ import annotations

import argparse
import base64
import logging
import sys
from pathlib import Path

from linearize import api
from linearize.report import schema, verdict
from linearize.storage import write_atomic
from linearize.types import GateError

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
    parser.add_argument("--work", type=Path, default=Path("runs"), help="folder for the conversions")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("linearize").setLevel(logging.INFO)

    target = HERE / "results" / f"{arguments.recipe}.json"
    reports = []
    for seed in arguments.seeds:
        folder = arguments.work / f"{arguments.recipe.replace('/', '-')}-{seed}"
        if (folder / "report.json").is_file():
            reports.append(schema.read(folder, schema.Report))
            continue
        sources = {"data.source": arguments.data, "eval.source": arguments.eval, "eval.pairs": arguments.pairs}
        settings = [f"seed={seed}", *arguments.set, *(f"{key}={file}" for key, file in sources.items() if file)]
        settings += arguments.first if seed == arguments.seeds[0] else []
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
    schema.write(verdict.over_seeds([report.result() for report in reports], gate), target)
    print(target)


if __name__ == "__main__":
    main()
