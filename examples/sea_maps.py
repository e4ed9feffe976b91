"""What SEA expects of attention before it reads, beside softmax; and one model that reads more keys, or fewer.

python examples/sea_maps.py [--model NAME] [--tokens 100000] [--out sea]
"""

import argparse
from pathlib import Path

import linearize
from linearize import api

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="hub id, folder or GGUF file; none: the embedded teacher")
parser.add_argument("--tokens", type=int, default=100_000, help="for each stage")
parser.add_argument("--keys", type=int, nargs="+", default=[8, 32, 128], help="that a query reads per head")
parser.add_argument("--out", default="sea", help="folder for the converted model and its maps")
arguments = parser.parse_args()

model = Path(arguments.out) / "model"
linearize.convert(
    arguments.model,
    "sea",
    output_dir=model,
    overrides={
        "stages.transfer.tokens": arguments.tokens,
        "stages.finetune.tokens": arguments.tokens,
        "data.self_tokens": arguments.tokens,
    },
)
maps = Path(arguments.out) / "maps"
print("maps:", *api.inspect(model, attention=maps).written)
for k in arguments.keys:
    rows = {row.name: row for row in api.evaluate(model, adjust={"k": k}, limit=20).rows}
    print(f"{k:4} keys: perplexity {rows['student'].perplexity:.3f}, the teacher's {rows['teacher'].perplexity:.3f}")
