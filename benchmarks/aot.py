"""Every shipped kernel compiled ahead of time, without a GPU: registers, spills and shared memory of each.

    python benchmarks/aot.py             compiles what has changed, writes benchmarks/kernels.json
    python benchmarks/aot.py --check     compiles, compares with the file, exits with 4 on a spill or too much memory

Compiled kernels are kept by Triton's cache, which knows the source (TRITON_CACHE_DIR names its folder).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from linearize.ops.mapped_linear import kernels
from linearize.ops.mapped_linear.triton import SCANNED, constants, tiles

FILE = Path(__file__).parent / "kernels.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: bytes of shared memory that a block may have
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
#: pointers that are always of one type; others are of the inputs' type
FLOATS = {"mass", "d_mass", "states", "new", "added", "first", "before", "last", "b_q", "b_k", "bias"}
NUMBERS = {"T", "H", "J", "R", "E", "size", "chunks"}
STRIDE = re.compile(r"s[qkvxy]_[bht]$")
#: (kernel, its own settings)
KERNELS: list[tuple[str, dict[str, Any]]] = [
    ("sums", {"BACK": False}),
    ("sums", {"BACK": True}),
    ("scan", {"BACK": False, "GIVEN": True, "BLOCK": SCANNED}),
    ("forward", {}),
    ("back_q", {}),
    ("back_k", {}),
    ("back_v", {}),
    ("step", {"BV": 16, "GIVEN": True}),
]
#: (type, head size); the larger one is refused where shared memory is small, as on sm_80
SHAPES = [(torch.bfloat16, 64), (torch.bfloat16, 128)]
REFUSED = {("sm_80", 128)}


def configurations() -> list[tuple[str, str, torch.dtype, int, dict[str, Any]]]:
    """(name, kernel, type, head size, settings) of all that is shipped."""
    found = []
    for dtype, size in SHAPES:
        for kernel, own in KERNELS:
            name = " ".join(["mapped_linear", kernel, str(dtype).removeprefix("torch."), str(size)])
            found.append((name + (" backward" if own.get("BACK") else ""), kernel, dtype, size, own))
    return found


def source_hash() -> str:
    folder = Path(kernels.__file__).parent
    texts = [(folder / name).read_bytes() for name in ("kernels.py", "triton.py")]
    return hashlib.sha256(b"".join([*texts, Path(__file__).read_bytes(), triton.__version__.encode()])).hexdigest()


def compiled(kernel: str, dtype: torch.dtype, size: int, own: dict[str, Any], target: str) -> Any:
    function, hip = getattr(kernels, kernel), target.startswith("gfx")
    at = tiles(size, target != "sm_80", hip)
    flags = {"MAPPED": True, "BIASED": False, "VALID": True, "DOCUMENTS": True}
    wanted = {**constants("split_softmax", dtype, size, size, size, at, hip), **flags, **own}
    fixed = {name: value for name, value in wanted.items() if name in function.arg_names}

    def kind(name: str) -> str:
        if name in fixed:
            return "constexpr"
        if name in NUMBERS or STRIDE.match(name):
            return "i32"
        if name == "eps" or name in FLOATS or (name == "out" and kernel == "sums"):
            return "fp32" if name == "eps" else "*fp32"
        if kernel == "step" and name in ("w_q", "w_k"):
            return "*fp32"
        return {"valid": "*i1", "segments": "*i64"}.get(name, POINTERS[dtype])

    signature = {name: kind(name) for name in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or STRIDE.match(name)
    }
    places = {(function.arg_names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=places, attrs=aligned)
    return triton.compile(
        source, target=TARGETS[target], options={"num_warps": at.warps if kernel != "step" else 4, "num_stages": 1}
    )


def resources(made: Any, target: str) -> dict[str, int]:
    """registers of a thread, bytes it spills, bytes of shared memory of a block."""
    shared = int(made.metadata.shared)
    if target.startswith("gfx"):
        text = made.asm["amdgcn"]
        found = [int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")]
        return {"registers": found[0], "spilled": 4 * found[1], "shared": shared}
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(tools / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "spilled": stack + local, "shared": shared}


def problems(table: dict[str, dict[str, int]]) -> list[str]:
    """A line for each kernel that spills or takes more shared memory than there is."""
    lines = []
    for name, row in table.items():
        target = name.split()[0]
        if row["spilled"]:
            lines.append(f"{name}: spills {row['spilled']} bytes of registers")
        if row["shared"] > SHARED[target]:
            lines.append(f"{name}: {row['shared']} bytes of shared memory, and a block has {SHARED[target]}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, start, table = parser.parse_args().check, time.perf_counter(), {}
    for name, kernel, dtype, size, own in configurations():
        for target in TARGETS:
            if (target, size) not in REFUSED:
                table[f"{target} {name}"] = resources(compiled(kernel, dtype, size, own, target), target)
    lines = problems(table)
    made = {"triton": triton.__version__, "source": source_hash(), "kernels": table}
    if check and json.loads(FILE.read_text()) != made:
        lines.append(f"{FILE.name} is not what these sources compile to: run python benchmarks/aot.py")
    if not check:
        FILE.write_text(json.dumps(made, indent=1) + "\n")
    print(*lines, f"{len(table)} kernels in {time.perf_counter() - start:.0f} s", sep="\n")
    return 4 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
