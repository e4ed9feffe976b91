"""Attention of one SmolLM2-135M layer (9 query and 3 key/value heads of 64, float32, batch 1): LAWCAT against SDPA.

    python benchmarks/smollm2_layer.py [--tokens 512,2048,8192,32768] [--repeats 3] [--threads 1] [--clock cpu]

Prefill, between the projections, in turns in one run: from rotated q, k and v to the output; LAWCAT undoes RoPE and
computes convolutions, maps, gates and sums; untrained. Writes benchmarks/results/smollm2-layer.json, and exits with 4
where one of WANTED is not met by the median of the pairs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from linearize.answers import Benched
from linearize.evaluate.speed import LAYER_UNITS, layer
from linearize.report import provenance, schema
from linearize.types import Rotary, SiteShape

WANTED = {2048: 1.0, 8192: 1.0, 32768: 12.0}  # times SDPA's speed, by tokens
SHAPE = SiteShape(heads=9, kv_heads=3, key_dim=64, value_dim=64, width=576, scale=0.125)


def beside(tokens: int) -> dict[str, Any]:
    """The layer's input, for the gates, and the rotary embedding of q and k."""
    config = LlamaConfig(hidden_size=SHAPE.width, num_attention_heads=9, max_position_embeddings=tokens)
    hidden_BTD = torch.randn(1, tokens, SHAPE.width, generator=torch.Generator().manual_seed(1))
    cos, sin = LlamaRotaryEmbedding(config)(hidden_BTD, torch.arange(tokens)[None])
    return {"hidden_BTD": hidden_BTD, "rotary": Rotary(cos, sin, apply_rotary_pos_emb, SHAPE.key_dim)}


def judge(rows: dict[str, dict[str, float]]) -> tuple[bool, list[str]]:
    """(whether all bars are met, one line for each)."""
    met, lines = True, []
    for name, metrics in rows.items():
        wanted = WANTED.get(int(name.split()[1]))
        if wanted is not None:
            ok = metrics["ratio"] >= wanted
            lines.append(f"{name}: {metrics['ratio']:.3g} x, at least {wanted:g} wanted: {'met' if ok else 'MISSED'}")
            met &= ok
    return met, lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="512,1024,2048,8192,32768")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch; none: its own choice")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: seconds that others do not share"
    )
    parser.add_argument("--out", type=Path, help="none: benchmarks/results/smollm2-layer[-cpu-seconds].json")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    name = "smollm2-layer-cpu-seconds" if arguments.clock == "cpu" else "smollm2-layer"
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    lengths = [(1, int(n)) for n in arguments.tokens.split(",")]
    rows = layer(SHAPE, {"lawcat": {"rope": "undo"}}, lengths, repeats=arguments.repeats, beside=beside, clock=clock)
    met, lines = judge(rows)
    made = schema.Bench(
        **provenance.gather(device="cpu"),
        name=name,
        settings={
            "batch": 1,
            "repeats": arguments.repeats,
            "clock": arguments.clock,
            "heads": 9,
            "kv_heads": 3,
            "head_dim": 64,
            "dtype": "float32",
        },
        units=LAYER_UNITS,
        rows=[schema.Measure(name=name, metrics=metrics) for name, metrics in rows.items()],
        notes=lines,
    )
    out = arguments.out or Path(__file__).parent / "results" / f"{name}.json"
    schema.write(made, out)
    from rich.console import Console

    Console().print(Benched(made, out).render(), *lines, sep="\n")
    return 0 if met else 4


if __name__ == "__main__":
    sys.exit(main())
