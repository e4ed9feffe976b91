"""A sentence encoder (BERT, MiniLM, ModernBERT, ...) made linear, from sentences without labels.

python examples/encoder.py MODEL SENTENCES [--tokens 500000] [--out FOLDER]
"""

import argparse

import linearize
from linearize.models import load_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="hub id or folder")
parser.add_argument("sentences", help="a text file with one on each line, or a table")
parser.add_argument("--tokens", type=int, default=500_000, help="for each stage")
parser.add_argument("--out", help="folder for the converted model")
arguments = parser.parse_args()

loaded = load_model(arguments.model)
converted = linearize.convert(
    loaded.model,
    "hedgehog",
    data=arguments.sentences,
    tokenizer=loaded.processor,
    output_dir=arguments.out,
    overrides={
        "method.layers": "all",
        "stages.transfer.tokens": arguments.tokens,
        "stages.finetune.tokens": arguments.tokens,
    },
)
for row in converted.report.rows:
    figures = {key: getattr(row, key) for key in ("cosine", "dense_cosine") if getattr(row, key) is not None}
    print(f"{row.name:20}", *(f"{key} {value:.4f}" for key, value in figures.items()))
print(converted.report.verdict.headline)
