"""Attention of one ViT-B layer (12 heads of 64, float32, batch 1): linear mixers against SDPA, side by side in one run.

    python benchmarks/vit_b_layer.py [--methods hedgehog,lit] [--tokens 1024,4096,16384] [--repeats 5]

Between the projections: q, k and v to the output, untrained mixers. Writes benchmarks/results/vit-b-layer.json, and
exits with 4 where one of WANTED is not met by the median of the pairs, or memory grows faster than tokens.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

from linearize.answers import Benched
from linearize.evaluate.speed import LAYER_UNITS, layer
from linearize.report import provenance, schema
from linearize.types import SiteShape

WANTED = {4096: 6.0, 16384: 20.0}  # times SDPA's speed, by tokens
SHAPE = SiteShape(heads=12, kv_heads=12, key_dim=64, value_dim=64, width=768, scale=0.125, causal=False, image=True)


def judge(rows: dict[str, dict[str, float]]) -> tuple[bool, list[str]]:
    """(whether all bars are met, one line for each)."""
    met, lines = True, []
    sizes = {name: int(name.split()[1]) for name in rows}
    for name, metrics in rows.items():
        wanted = WANTED.get(sizes[name])
        if wanted is not None:
            ok = metrics["ratio"] >= wanted
            lines.append(f"{name}: {metrics['ratio']:.3g} x, at least {wanted:g} wanted: {'met' if ok else 'MISSED'}")
            met &= ok
    for method in dict.fromkeys(name.split()[0] for name in rows):
        grown = sorted((sizes[n], m["mixer_peak_bytes"]) for n, m in rows.items() if n.split()[0] == method)
        (first, few), (last, many) = grown[0], grown[-1]
        if first < last:
            ok = many / few <= 1.05 * last / first
            lines.append(
                f"{method}: {last / first:g} x the tokens, {many / few:.3g} x the memory: {'met' if ok else 'MISSED'}"
            )
            met &= ok
    return met, lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="hedgehog,lit")
    parser.add_argument("--tokens", default="1024,4096,16384", help="squares: of patches in rows and columns")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch; none: its own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "vit-b-layer.json")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sides = [math.isqrt(int(n)) for n in arguments.tokens.split(",")]
    methods = {name: {} for name in arguments.methods.split(",")}
    grids = [(side, side) for side in sides]
    rows = layer(SHAPE, methods, grids, repeats=arguments.repeats, device=arguments.device)
    met, lines = judge(rows)
    made = schema.Bench(
        **provenance.gather(device=arguments.device),
        name="vit-b-layer",
        settings={"batch": 1, "repeats": arguments.repeats, "heads": 12, "head_dim": 64, "dtype": "float32"},
        units=LAYER_UNITS,
        rows=[schema.Measure(name=name, metrics=metrics) for name, metrics in rows.items()],
        notes=lines,
    )
    schema.write(made, arguments.out)
    from rich.console import Console

    Console().print(Benched(made, arguments.out).render(), *lines, sep="\n")
    return 0 if met else 4


if __name__ == "__main__":
    sys.exit(main())
