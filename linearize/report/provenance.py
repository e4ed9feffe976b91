"""Where a number comes from: command, commit, machine, library versions. No host name, no path of the machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from linearize import __version__
from linearize.report.schema import Commit, Machine

LIBRARIES = (
    "torch", "transformers", "tokenizers", "huggingface_hub", "peft", "accelerate", "datasets", "safetensors", "numpy",
    "triton", "fla",
)  # fmt: skip
_HERE = Path(__file__).resolve().parents[1]


def gather(arguments: list[str] | None = None, device: Any = None) -> dict[str, Any]:
    """The keys of schema.Provenance. arguments: sys.argv where None; device: a torch device, the CPU where None."""
    return {
        "command": command(arguments),
        "commit": commit(),
        "machine": machine(device),
        "versions": versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def command(arguments: list[str] | None = None) -> str:
    """The command line as typed; absolute paths become relative to the working folder, or are cut to their name."""
    first, *rest = arguments or sys.argv or ["python"]
    name = Path(first).name
    if name == "__main__.py":
        name = f"python -m {Path(first).parent.name}"
    return shlex.join([*name.split(), *(_shorten(word) for word in rest)])


def _shorten(word: str) -> str:
    key, equals, value = word.partition("=")
    if equals and not os.path.isabs(key):  # --output-dir=/a/b, and data.source=/a/b
        return f"{key}={_shorten(value)}"
    if not os.path.isabs(word):
        return word
    path = Path(word)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


@cache
def commit() -> Commit:
    """The checkout this package was imported from, or its version alone.

    A repository that merely surrounds an installed package is not its checkout.
    """
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != _HERE.parent:
        return Commit(id=None, dirty=None, package=__version__)
    # Results and documents are written by runs: they do not make the code another one.
    changes = _git(
        "status",
        "--porcelain",
        "--",
        "linearize",
        "recipes",
        "pyproject.toml",
        ":!recipes/results",
        ":!recipes/recall",
        ":!recipes/*.md",
    )
    dirty = None if changes is None else bool(changes)
    return Commit(id=_git("rev-parse", "HEAD"), dirty=dirty, package=__version__)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_HERE), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def machine(device: Any = None) -> Machine:
    """This machine, as far as it can be asked."""
    import torch

    kind = torch.device(device or "cpu").type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        cpu=_cpu(),
        cores=cores,
        threads=torch.get_num_threads(),
        memory=_memory(),
        device=name,
        system=f"{platform.system()} {platform.machine()}",
    )


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def _memory() -> int | None:
    """Bytes of memory, or of the container's limit where that is smaller."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def versions() -> dict[str, str]:
    """python and the libraries that matter, where they are installed."""
    found = {"python": platform.python_version(), "linearize": __version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
