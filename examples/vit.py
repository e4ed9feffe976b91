"""A vision transformer made linear: the embedded one here, any of transformers with --model.

python examples/vit.py IMAGES [--model NAME] [--method hedgehog|lit|clear] [--tokens 1000000] [--out FOLDER]
"""

import argparse

import linearize
from linearize.models import load_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("images", help="a folder, a table, IDX, CIFAR or npz files; labels are not needed")
parser.add_argument("--model", help="hub id or folder; none: the embedded teacher")
parser.add_argument("--method", default="hedgehog")
parser.add_argument("--tokens", type=int, default=1_000_000, help="patches, for each stage")
parser.add_argument("--out", help="folder for the converted model")
arguments = parser.parse_args()

loaded = load_model(arguments.model, task="image")
stages = ["finetune"] if arguments.method == "clear" else ["transfer", "finetune"]  # clear has nothing to transfer
converted = linearize.convert(
    loaded.model,
    arguments.method,
    data=arguments.images,
    tokenizer=loaded.processor,
    output_dir=arguments.out,
    overrides={f"stages.{stage}.tokens": arguments.tokens for stage in stages},
)
for row in converted.report.rows:
    figures = {key: getattr(row, key) for key in ("accuracy", "agreement", "cosine") if getattr(row, key) is not None}
    print(f"{row.name:20}", *(f"{key} {value:.4f}" for key, value in figures.items()))
print(converted.report.verdict.headline)
