"""Train on your own text, and measure on a part of it that was held out.

python examples/own_data.py notes.txt more.jsonl   (text, JSONL, CSV or parquet files, or folders of them)
"""

import sys

import linearize
from linearize.data.text import read_texts
from linearize.models import load_model

texts = [text for source in sys.argv[1:] for text in read_texts(source)]
loaded = load_model()  # or load_model("your/model")
converted = linearize.convert(
    loaded.model,
    "hedgehog",
    tokenizer=loaded.tokenizer,
    data=texts,
    overrides={
        "method.mixer.window": 32,
        "data.length": 64,
        "data.valid_tokens": 256,
        "stages.transfer.tokens": 2_000,
        "stages.finetune.tokens": 2_000,
    },
)
print(converted.report.evaluation)
print(converted.report.verdict.headline)
