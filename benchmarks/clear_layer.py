"""CLEAR's attention of one layer (1 head of 64, float32, batch 1), forward and backward: tile gather against full SDPA.

    python benchmarks/clear_layer.py [--tokens 4096,16384] [--radii 8,16] [--repeats 3]

Between the projections, in turns in one run; one head, because on a CPU they are done one after the other. Writes
benchmarks/results/clear-layer.json, and exits with 4 where one of WANTED is not met by the median of the pairs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from linearize.answers import Benched
from linearize.ops.local2d import local2d_output
from linearize.report import provenance, schema

DIM = 64
#: times SDPA's speed, by (radius, tokens)
WANTED = {(8, 4096): 2.5, (8, 16384): 8.0, (16, 16384): 1.0}
UNITS = {"sdpa": "ms", "clear": "ms", "ratio": "x", "low": "x", "high": "x"}


def seconds(run, tensors) -> float:
    for tensor in tensors:
        tensor.grad = None
    start = time.perf_counter()
    run(*tensors).sum().backward()
    return time.perf_counter() - start


def pairs(side: int, radius: int, repeats: int) -> dict[str, float]:
    """Medians over `repeats` pairs, the contestants in turns; the first pair warms up."""
    generator = torch.Generator().manual_seed(side)
    tensors = [torch.randn(1, 1, side * side, DIM, generator=generator).requires_grad_() for _ in range(3)]
    more = {"grid": (side, side), "radius": radius, "scale": DIM**-0.5, "valid_BT": None, "prefix": 0, "suffix": 0}
    found = []
    for _ in range(repeats + 1):
        full = seconds(F.scaled_dot_product_attention, tensors)
        near = seconds(lambda q, k, v: local2d_output(q, k, v, **more), tensors)
        found.append((full, near, full / near))
    full, near, ratio = zip(*found[1:])
    return {
        "sdpa": 1e3 * statistics.median(full),
        "clear": 1e3 * statistics.median(near),
        "ratio": statistics.median(ratio),
        "low": min(ratio),
        "high": max(ratio),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="4096,16384", help="squares: of patches in rows and columns")
    parser.add_argument("--radii", default="8,16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch; none: its own choice")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "clear-layer.json")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows, lines, met = {}, [], True
    for radius in map(int, arguments.radii.split(",")):
        for tokens in map(int, arguments.tokens.split(",")):
            rows[f"radius {radius}, {tokens}"] = found = pairs(math.isqrt(tokens), radius, arguments.repeats)
            if (wanted := WANTED.get((radius, tokens))) is not None:
                ok = found["ratio"] >= wanted
                met &= ok
                said = "met" if ok else "MISSED"
                lines.append(f"radius {radius}, {tokens}: {found['ratio']:.3g} x, {wanted:g} wanted: {said}")
    made = schema.Bench(
        **provenance.gather(device="cpu"),
        name="clear-layer",
        settings={"batch": 1, "repeats": arguments.repeats, "heads": 1, "head_dim": DIM, "dtype": "float32"},
        units=UNITS,
        rows=[schema.Measure(name=name, metrics=metrics) for name, metrics in rows.items()],
        notes=lines,
    )
    schema.write(made, arguments.out)
    from rich.console import Console

    Console().print(Benched(made, arguments.out).render(), *lines, sep="\n")
    return 0 if met else 4


if __name__ == "__main__":
    sys.exit(main())
