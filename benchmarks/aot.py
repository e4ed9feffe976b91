"""Shipped kernels compiled ahead of time, without a GPU: registers, spills and shared memory of each.

    python benchmarks/aot.py             compiles what has changed, writes benchmarks/kernels.json
    python benchmarks/aot.py --check     compiles, compares with the file, exits with 4 on a spill or too much memory

At most 40, so that a cold run is short. Left out are kernels that hold little (scans, what adds gates up, what lists
blocks), forward and back_v where back_q and back_k hold more, and `sums` without BACK, the same kernel with less to do.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from linearize.ops import _triton, gated_linear, local2d, mapped_linear, topk, window
from linearize.ops.gated_linear import kernels as gated_kernels
from linearize.ops.gated_linear import triton as gated
from linearize.ops.local2d import kernels as circle_kernels
from linearize.ops.local2d import triton as circles
from linearize.ops.mapped_linear import kernels as mapped_kernels
from linearize.ops.mapped_linear import triton as mapped
from linearize.ops.topk import kernels as block_kernels
from linearize.ops.topk import triton as blocks
from linearize.ops.window import kernels as window_kernels
from linearize.ops.window import triton as windows

FILE = Path(__file__).parent / "kernels.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: bytes of shared memory that a block may have
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
POINTED = {"valid": "*i1", "which": "*i32", "index": "*i32", "counts": "*i32"}
POINTED |= dict.fromkeys(("segments", "codes_q", "codes_k"), "*i64")
STRIDE = re.compile(r"s[qkvgxy]_[bht]$")
NUMBERS = {"size", "chunks", "rows", "columns", "radius", "prefix", "others", "n", "block", "width", "ahead"}
B16, F32 = torch.bfloat16, torch.float32


class Kernel(NamedTuple):
    """One shipped configuration: pointers are of `dtype`, those in `floats` float32. make(roomy, hip): compile-time
    arguments (those the kernel does not have are left out) and warps. without: targets on which it is refused."""

    name: str
    function: Any
    dtype: torch.dtype
    floats: frozenset[str]
    make: Callable[[bool, bool], tuple[dict[str, Any], int]]
    without: tuple[str, ...] = ()


def of_mapped_linear() -> Iterator[Kernel]:
    """The larger heads are refused where shared memory is small, as on sm_80."""
    kernels = [
        ("sums", {"BACK": True}),
        ("forward", {}),
        ("back_q", {}),
        ("back_k", {}),
        ("back_v", {}),
        ("step", {"BV": 16, "GIVEN": True}),
    ]
    floats = {"mass", "d_mass", "states", "new", "added", "first", "before", "last", "b_q", "b_k", "bias"}
    flags = {"MAPPED": True, "BIASED": False, "VALID": True, "DOCUMENTS": True}
    for size in (64, 128):
        for kernel, own in kernels:

            def make(roomy: bool, hip: bool, size=size, own=own, kernel=kernel):
                at = mapped.tiles(size, roomy, hip)
                fixed = mapped.constants("split_softmax", B16, size, size, size, at, hip)
                return {**fixed, **flags, **own}, 4 if kernel == "step" else at.warps

            name = f"mapped_linear {kernel} bfloat16 {size}" + (" backward" if own.get("BACK") else "")
            own_floats = {"sums": {"out"}, "step": {"w_q", "w_k"}}.get(kernel, set())
            without = ("sm_80",) if size == 128 else ()
            yield Kernel(name, getattr(mapped_kernels, kernel), B16, frozenset(floats | own_floats), make, without)


def of_gated_linear() -> Iterator[Kernel]:
    """Tiles of features and of v: sizes change nothing but how many there are."""
    kernels = [
        (B16, "sums", {"BACK": True}),
        (B16, "forward", {}),
        (B16, "back_q", {}),
        (B16, "back_k", {}),
        (B16, "back_v", {}),
        (B16, "step", {"BV": gated.STEPPED, "GIVEN": True, "BF": 128}),
        (F32, "forward", {}),
        (F32, "forward", {"NARROW": True}),
        (F32, "back_q", {}),
        (F32, "back_k", {}),
        (F32, "back_q", {"NARROW": True}),
        (F32, "back_k", {"NARROW": True}),
        (F32, "back_v", {}),
    ]
    floats = {"mass", "g", "states", "d_states", "out", "faded", "added", "first", "before", "last", "num", "new"}
    floats |= {"d_num", "d_mass", "d_g", "passed", "of_q", "of_k"}
    for dtype, kernel, own in kernels:

        def make(roomy: bool, hip: bool, dtype=dtype, own=own, kernel=kernel):
            at = gated.tiles(dtype, roomy or hip)
            fixed = gated.constants(dtype, 128, 128, False, at, hip)
            return {**fixed, "DOCUMENTS": True, **own}, 4 if kernel == "step" else at.warps

        kind = "backward" if own.get("BACK") else "per head" if own.get("NARROW") else ""
        name = f"gated_linear {kernel} {str(dtype).removeprefix('torch.')} 128 {kind}".strip()
        yield Kernel(name, getattr(gated_kernels, kernel), dtype, frozenset(floats), make)


def of_local2d() -> Iterator[Kernel]:
    kernels = [(B16, 128, "forward")]
    kernels += [(dtype, size, name) for dtype, size in ((B16, 128), (F32, 64)) for name in ("back_q", "back_k")]
    floats = frozenset({"lse", "top", "lost", "d_top", "out", "d_out"})
    for dtype, size, kernel in kernels:

        def make(roomy: bool, hip: bool, dtype=dtype, size=size, kernel=kernel):
            at = circles.tiles(kernel, dtype, roomy, hip)
            return {**circles.constants(dtype, size, size, at, hip), "VALID": True, "WHICH": True}, at.warps

        name = f"local2d {kernel} {str(dtype).removeprefix('torch.')} {size}"
        yield Kernel(name, getattr(circle_kernels, kernel), dtype, floats, make)


def of_topk() -> Iterator[Kernel]:
    """Of blocks of 64 and more: smaller ones are smaller tiles."""
    kernels = [(dtype, 128, name) for dtype in (B16, F32) for name in ("back_q", "back_k")]
    kernels += [(B16, 256, "forward"), (B16, 256, "back_k")]
    floats = frozenset({"lse", "lost", "out", "d_out"})
    for dtype, size, kernel in kernels:

        def make(roomy: bool, hip: bool, dtype=dtype, size=size, kernel=kernel):
            at = blocks.tiles(kernel, dtype, size, hip)
            return {**blocks.constants(dtype, size, size, 64, at, hip), "VALID": True, "CAUSAL": True}, at.warps

        name = f"topk {kernel} {str(dtype).removeprefix('torch.')} {size}"
        yield Kernel(name, getattr(block_kernels, kernel), dtype, floats, make)


def of_window() -> Iterator[Kernel]:
    kernels = [(dtype, size, name) for dtype, size in ((B16, 128), (F32, 64)) for name in ("back_q", "back_k")]
    for dtype, size, kernel in kernels:

        def make(roomy: bool, hip: bool, dtype=dtype, size=size, kernel=kernel):
            at = windows.tiles(kernel, dtype, roomy, hip)
            return windows.constants(dtype, size, size, at, hip), at.warps

        name = f"window {kernel} {str(dtype).removeprefix('torch.')} {size}"
        floats = frozenset({"lse", "lost", "d_top", "d_out"})
        yield Kernel(name, getattr(window_kernels, kernel), dtype, floats, make)


#: all that can come near a limit
KERNELS = [*of_mapped_linear(), *of_gated_linear(), *of_local2d(), *of_topk(), *of_window()]


def source_hash() -> str:
    folders = [Path(op.__file__).parent for op in (gated_linear, local2d, mapped_linear, topk, window)]
    files = [folder / name for folder in folders for name in ("kernels.py", "triton.py")]
    texts = [file.read_bytes() for file in (*files, Path(_triton.__file__), Path(__file__))]
    return hashlib.sha256(b"".join([*texts, triton.__version__.encode()])).hexdigest()


def compiled(kernel: Kernel, target: str) -> Any:
    function, names = kernel.function, kernel.function.arg_names
    wanted, warps = kernel.make(target == "sm_90", target.startswith("gfx"))
    fixed = {name: value for name, value in wanted.items() if name in names}

    def kind(name: str) -> str:
        if name in fixed:
            return "constexpr"
        if name in ("eps", "scale") or name in kernel.floats:
            return "*fp32" if name in kernel.floats else "fp32"
        if STRIDE.match(name) or name.isupper() or name in NUMBERS:
            return "i32"
        return POINTED.get(name, POINTERS[kernel.dtype])

    signature = {name: kind(name) for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or STRIDE.match(name)
    }
    places = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=places, attrs=aligned)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": warps, "num_stages": 1})


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
    for kernel in KERNELS:
        for target in TARGETS:
            if target not in kernel.without:
                table[f"{target} {kernel.name}"] = resources(compiled(kernel, target), target)
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
