"""Causal Hedgehog attention with its map (8 heads of 64) against every peer, side by side in one run.

    python benchmarks/ops.py [--what forward,both,decode] [--lengths 256,512,...] [--dtype float32] [--device cpu]

Forward, forward and backward, and one decoded token. Writes benchmarks/results/ops-DEVICE-DTYPE[-WHAT].json and draws
it beside it (.png), and exits with 4 where one of the bars below is missed. No time is given for a contestant whose
answer is wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from linearize.answers import Benched
from linearize.evaluate import kernels
from linearize.mixers import base as mixers
from linearize.report import provenance, races, schema
from linearize.storage import write_atomic
from linearize.surgery.forecast import break_even_tokens
from linearize.types import SiteShape

HEADS, DIM = 8, 64
SHAPE = SiteShape(heads=HEADS, kv_heads=HEADS, key_dim=DIM, value_dim=DIM, width=HEADS * DIM, scale=DIM**-0.5)
#: on a CPU in float32, times SDPA's speed by tokens; times the floor at most, by the row's first word, from FLOOR_FROM
FASTER, DECODE = {1024: 1.0, 8192: 6.0, 32768: 25.0}, {65536: 200.0}
FLOOR, FLOOR_FROM = {"forward": 1.8, "both": 2.2}, 8192
#: how far the break-even length may be from the one that `linearize plan` predicts
WITHIN = 0.3


def judge(rows: dict[str, dict[str, float]], even: float | None) -> tuple[bool, list[str]]:
    """(whether all bars are met, a line for each)."""
    met, lines = True, []

    def bar(ok: bool, line: str) -> None:
        nonlocal met
        met &= ok
        lines.append(f"{line}: {'met' if ok else 'MISSED'}")

    for name, row in rows.items():
        word, who, length = name.split()[0], name.split()[1:-1], int(name.split()[-1])
        if who != ["mapped_linear"]:
            continue
        wanted = (DECODE if word == "decode" else FASTER if word == "forward" else {}).get(length)
        if wanted is not None and "times_sdpa" in row:
            bar(row["times_sdpa"] >= wanted, f"{name}: {row['times_sdpa']:.3g} x SDPA, at least {wanted:g} wanted")
        if word in FLOOR and length >= FLOOR_FROM:
            bar(row["floor"] <= FLOOR[word], f"{name}: {row['floor']:.3g} x the floor, at most {FLOOR[word]:g} wanted")
    predicted = break_even_tokens(mixers.build("hedgehog", SHAPE), SHAPE)
    if even is None or predicted is None:
        lines.append(f"break-even: `linearize plan` says {predicted}, which is not between lengths measured here")
    else:
        ok = abs(even / predicted - 1) <= WITHIN
        bar(ok, f"break-even: {even:.0f} tokens, `linearize plan` says {predicted}, within {WITHIN:.0%} wanted")
    return met, lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="256,512,1024,2048,8192,32768,65536")
    parser.add_argument("--what", default="forward,both,decode")
    parser.add_argument("--without", default="", help="contestants that stay out, by commas")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch; none: its own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--flex", action="store_true", help="flex_attention too, which compiles for each length")
    parser.add_argument("--out", type=Path, help="none: benchmarks/results/ops-....json")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype, lengths = getattr(torch, arguments.dtype), [int(n) for n in arguments.lengths.split(",")]
    given = {"heads": HEADS, "dim": DIM, "dtype": dtype, "device": arguments.device}
    what, without = arguments.what.split(","), arguments.without.split(",")
    more = {"repeats": arguments.repeats, "flex": arguments.flex, "without": without, **given}
    tables = []
    for word in what:
        if word == "decode":
            tables.append(kernels.decode([n for n in lengths if n >= 1024], **given))
        else:
            tables.append(kernels.compare(lengths, backward=word == "both", **more))
    rows = {name: row for table in tables for name, row in table.rows.items()}
    even = kernels.crossing(kernels.Table(rows))
    met, lines = judge(rows, even)
    if arguments.device != "cpu" or dtype != torch.float32:
        met = True  # the bars are those of a CPU in float32
    gathered = provenance.gather(device=arguments.device)
    place = Path(arguments.device).name if arguments.device == "cpu" else torch.cuda.get_device_name().replace(" ", "-")
    name = "-".join(["ops", place.lower(), arguments.dtype, *(what if len(what) < 3 else [])])
    made = schema.Bench(
        **gathered,
        name=name,
        settings={"batch": 1, "heads": HEADS, "head_dim": DIM, "dtype": arguments.dtype, "repeats": arguments.repeats},
        units=kernels.UNITS,
        rows=[schema.Measure(name=row, metrics=metrics) for row, metrics in rows.items()],
        headline=[row for row in rows if row.split()[1:-1] == ["mapped_linear"]],
        notes=[*lines, *(note for table in tables for note in table.notes)],
    )
    out = arguments.out or Path(__file__).parent / "results" / f"{name}.json"
    schema.write(made, out)
    if drawn := next((word for word in what if word != "decode"), None):
        write_atomic(out.with_suffix(".png"), races.race(made, drawn, even if drawn == "forward" else None))
    from rich.console import Console

    Console().print(Benched(made, out).render(), *lines, sep="\n")
    return 0 if met else 4


if __name__ == "__main__":
    sys.exit(main())
