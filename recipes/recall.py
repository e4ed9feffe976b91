"""Students of the recall teacher, measured on what they still find: recipes/recall/<name>.json, one per run.

    python recipes/recall.py [NAME ...] --work FOLDER [--seeds 0 1 2]    none: all of RUNS
    python recipes/recall.py --figure                                    recipes/recall/pairs.png and the table of knees

Every student learns from the same texts of LENGTH tokens and is asked at 1, 8 and 22 times that length. A name whose
file is there is skipped. The teacher is examples/teachers/recall.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from linearize import api, models
from linearize.evaluate.recall.lessons import lessons
from linearize.report import recall, schema
from linearize.report.tables import MISSING, Table, percent, render, size
from linearize.storage import write_atomic

HERE = Path(__file__).parent
TEACHER = HERE.parent / "examples" / "teachers" / "recall"
LENGTH = 128
STAGES = {"transfer": 30_000, "finetune": 300_000}
LAWCAT: dict[str, Any] = {"features": 16}
#: name: (method, its settings). Features per head are 32 everywhere: the state of a head has as many bytes.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "lawcat": ("lawcat", LAWCAT),
    "hedgehog": ("hedgehog", {"window": 0, "sinks": 0, "features": 16}),
    "hedgehog-gated": ("hedgehog", {"window": 0, "sinks": 0, "features": 16, "decay": "gated", "rope": "undo"}),
    "lawcat-rope": ("lawcat", {**LAWCAT, "rope": "keep"}),
    "lawcat-half-life-16": ("lawcat", {**LAWCAT, "half_life": 16}),
    "lawcat-no-convolution": ("lawcat", {**LAWCAT, "conv": 1}),
    "lawcat-no-gates": ("lawcat", {**LAWCAT, "gate": "open"}),
}


def run(name: str, seed: int, work: Path) -> None:
    """Convert, ask, file. Resumed where it was killed."""
    method, mixer = RUNS[name]
    folder, title = work / f"{name}-{seed}", name if seed == 0 else f"{name}-{seed}"
    tokenizer = models.load_model(TEACHER).processor
    overrides = {
        "seed": seed, "method.layers": "all", "method.mixer": mixer, "data.length": LENGTH, "data.valid_tokens": 4096,
        "eval.limit": 16, "eval.length": LENGTH, "eval.generate": 0, "eval.window": 32, "eval.sinks": 4,
        "stages.transfer.tokens": STAGES["transfer"], "stages.transfer.batch": 2,
        "stages.finetune.tokens": STAGES["finetune"], "stages.finetune.batch": 4, "stages.finetune.mode": "full",
        "stages.finetune.lr": 2e-3, "stages.finetune.mixer_lr": 5e-3,
    }  # fmt: skip
    if not (folder / "report.json").is_file():
        data = lessons(tokenizer, STAGES["finetune"] + 8192, LENGTH, mix={"passkey": 0.6, "mqar": 0.4}, seed=seed)
        api.convert(TEACHER, method, data=data, overrides=overrides, output_dir=folder, resume=True)
    api.recall(
        folder, tasks="passkey,mqar", lengths=[LENGTH, 8 * LENGTH, 22 * LENGTH], depths=3, trials=51,
        pairs=[2, 4, 8, 16], teacher=TEACHER, allow_longer=True, seed=seed, output_dir=work / f"{title}-asked",
    )  # fmt: skip
    found = schema.read(work / f"{title}-asked" / "recall.json", recall.Recall)
    schema.write(found.model_copy(update={"name": title}), HERE / "recall" / f"{title}.json")


def figure() -> None:
    """The students' answers by MQAR pairs as a picture, and the knees as a table."""
    files = sorted((HERE / "recall").glob("*.json"))
    runs = [(path.stem, schema.read(path, recall.Recall)) for path in files]
    write_atomic(HERE / "recall" / "pairs.png", recall.pairs_figure(runs, LENGTH))
    cells = []
    for name, found in runs:
        student = next(row for row in found.rows if row.name == "student")
        passkeys = [student.share("passkey", n * LENGTH) for n in (1, 8, 22)]
        asked = any(task == "mqar" for task, *_ in found.places())
        knees = [str(found.knee("student", LENGTH, share) or "none") if asked else MISSING for share in (0.9, 0.5)]
        cells.append([name, size(student.state_bytes), *map(percent, passkeys), *knees])
    passkeys = (f"passkey at {n * LENGTH:,}" for n in (1, 8, 22))
    columns = ["", "state", *passkeys, "MQAR pairs held at 90 %", "at 50 %"]
    write_atomic(HERE / "recall" / "README.md", render(Table("", columns, cells), "markdown"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", type=Path, default=Path("runs"), help="folder for the conversions")
    parser.add_argument("--figure", action="store_true", help="only draw what is there")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("linearize").setLevel(logging.INFO)
    for name in () if arguments.figure else arguments.names or RUNS:
        for seed in arguments.seeds:
            title = name if seed == 0 else f"{name}-{seed}"
            if not (HERE / "recall" / f"{title}.json").exists():
                run(name, seed, arguments.work)
    figure()


if __name__ == "__main__":
    main()
