"""Does a linear model still find a passkey? Convert the recall teacher, and ask at 1 and 8 times its data's length."""

import argparse
import tempfile
from pathlib import Path

from linearize import api
from linearize.evaluate.recall.lessons import lessons
from linearize.models import load_model

parser = argparse.ArgumentParser()
parser.add_argument("--tokens", type=int, default=300_000, help="of fine-tuning")
parser.add_argument("--trials", type=int, default=51)
arguments = parser.parse_args()

teacher, length = Path(__file__).parent / "teachers" / "recall", 128
tokenizer = load_model(teacher).processor
data = lessons(tokenizer, arguments.tokens + 8192, length, mix={"passkey": 1.0})  # texts with a question at their end
folder = Path(tempfile.mkdtemp()) / "lawcat"
settings = [
    "method.layers=all", "method.mixer.features=16", "data.valid_tokens=4096", "eval.generate=0", "eval.limit=8",
    f"data.length={length}", f"stages.transfer.tokens={max(512, arguments.tokens // 10)}",
    f"stages.finetune.tokens={arguments.tokens}",
    "stages.finetune.mode=full", "stages.finetune.lr=2e-3", "stages.finetune.mixer_lr=5e-3",
]  # fmt: skip
api.convert(teacher, "lawcat", data=data, overrides=settings, output_dir=folder)

found = api.recall(folder, tasks="passkey", lengths=[length, 8 * length], trials=arguments.trials).recall
for row in found.rows:
    shares = [row.share("passkey", n) for n in (length, 8 * length)]
    print(f"{row.name:<24}" + "  ".join("" if s is None else f"{s:.0%}" for s in shares))
