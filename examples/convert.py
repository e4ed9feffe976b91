"""Convert a model in ten lines: the embedded teacher here, any decoder of transformers with --model.

python examples/convert.py [--model NAME] [--tokens 100000] [--out FOLDER]
"""

import argparse

import linearize
from linearize.models import load_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="hub id, folder or GGUF file; none: the embedded teacher")
parser.add_argument("--tokens", type=int, default=100_000, help="for each stage")
parser.add_argument("--out", help="folder for the converted model")
arguments = parser.parse_args()

loaded = load_model(arguments.model)
converted = linearize.convert(
    loaded.model,
    "hedgehog",
    tokenizer=loaded.tokenizer,
    output_dir=arguments.out,
    overrides={
        "stages.transfer.tokens": arguments.tokens,
        "stages.finetune.tokens": arguments.tokens,
        "data.self_tokens": arguments.tokens,
    },
)
for row in converted.report.rows:
    print(f"{row.name:20} perplexity {row.perplexity:7.3f}   KL {row.kl:.4f}")
print(converted.report.verdict.headline)
