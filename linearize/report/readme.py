"""The tables of README.md, recipes/README.md and docs/methods.md, regenerated between two comments: from result files,
and from the methods themselves.

    <!-- results:begin -->    language models of recipes/results/**/*.json   <!-- results:end -->
    <!-- encoders:begin -->   encoders and vision transformers of them       <!-- encoders:end -->
    <!-- diffusion:begin -->  diffusion models of them                       <!-- diffusion:end -->
    <!-- benchmarks:begin --> tables of benchmarks/results/*.json            <!-- benchmarks:end -->
    <!-- methods:begin -->    which method fits what, and why not            <!-- methods:end -->

The same files give the same text, to the byte.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from linearize.report import tables
from linearize.report.schema import Bench, read, read_results
from linearize.storage import write_atomic
from linearize.types import GateError, InputError, StorageError

#: each with the blocks that it cannot be without
FILES = {"README.md": ("results",), "recipes/README.md": ("encoders", "diffusion"), "docs/methods.md": ("methods",)}
EMPTY = "No result file yet: the table appears with the first one in `recipes/results`."
LEGEND = (
    "Perplexity of the teacher, of the student before training (swapped) and after, and of sliding windows without a "
    "linear branch, untrained (0) and trained with the student's tokens. KL(teacher || student) in nats per token. "
    "Copy gap: the share of the window's loss on copied tokens that is won back. Linear branch: nats per token lost "
    "when it is switched off. State / KV at the longest length measured. ±: standard deviation over seeds. Each run "
    "leads to its file, with commit, machine and every other number."
)
ENCODERS = (
    "Top-1 on the labels, or Spearman's rank correlation with the scores people gave to pairs; of the teacher, of the "
    "student before training (swapped) and after, of an untrained window (on images a circle), and without any "
    "attention. At least: lower end of the 95 % interval of the student's share. Feature cosine: to the teacher's "
    "pooled feature. MRR: halves of a passage finding each other. Tokens of images are patches. ±: standard deviation "
    "over seeds."
)

DRAWINGS = (
    "Distance: root mean square between drawings from the same noise, pixels in -1 ... 1, of the student before "
    "training (swapped) and after, and of the teacher's own from other noise. Class seen: a classifier sees the class "
    "that was asked for. Fréchet distance of that classifier's features to the teacher's drawings: no FID. Tokens are "
    "patches."
)


def update(root: str | Path, *, check: bool = False) -> list[str]:
    """Brings the generated parts under `root` up to date; returns the names of the files that changed.

    check: nothing is written. Raises GateError (exit code 4) where a file differs, InputError where a result file or
    the comments are broken.
    """
    root = Path(root)
    changed = []
    for name in FILES:
        path = root / name
        if not path.exists() and name != "README.md":
            continue
        try:
            old = path.read_text(encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}; run it in a checkout of linearize") from None
        new = _filled(old, path, root, FILES[name])
        if new != old:
            changed.append(name)
            if not check:
                write_atomic(path, new)
    if check and changed:
        raise GateError(
            f"{' and '.join(changed)} out of step with the result files: run `linearize report --update-readme` and "
            "commit what it writes"
        )
    return changed


def _filled(text: str, path: Path, root: Path, needed: tuple[str, ...]) -> str:
    blocks = {
        **{name: results_block(name) for name in RESULTS},
        "benchmarks": benchmarks_block,
        "methods": methods_block,
    }
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if (text.count(begin), text.count(end)) == (0, 0) and name not in needed:
            continue
        if (text.count(begin), text.count(end)) != (1, 1) or text.index(begin) > text.index(end):
            raise InputError(f"{path} needs the lines {begin!r} and {end!r}, once each and in this order")
        body = f"{begin}\n{block(root, path.parent)}{end}"
        text = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _, body=body: body, text, flags=re.DOTALL)
    return text


def methods_block(root: Path, here: Path) -> str:
    """Which method fits what, asked of the methods; the reasons below the table."""
    from linearize.mixers import base

    numbers: dict[str, int] = {}
    lines = [f"| method | {' | '.join(base.HOMES)} |", f"| --- |{' --- |' * len(base.HOMES)}"]
    for method in base.names():
        cells = []
        for where in base.HOMES:
            why = base.refusal(method, where)
            cells.append("yes" if why is None else f"no ({numbers.setdefault(why, len(numbers) + 1)})")
        lines.append(f"| [{method}]({base.get(method).paper}) | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {why}" for why, number in numbers.items())]) + "\n"


#: by block: how its table is made, the words under it, and of which tasks it holds the results
RESULTS = {
    "results": (tables.results_table, LEGEND, ("text",)),
    "encoders": (tables.encoder_results, ENCODERS, ("sentences", "image")),
    "diffusion": (tables.drawing_results, DRAWINGS, ("diffusion",)),
}


def results_block(name: str) -> Callable[[Path, Path], str]:
    """What makes the block `name` of RESULTS: a table of the files under a root, its links relative to a folder."""
    make, legend, tasks = RESULTS[name]

    def block(root: Path, here: Path) -> str:
        folder = root / "recipes" / "results"
        chosen = [(path, run) for path, run in read_results(folder) if run.task in tasks]
        if not chosen:
            return EMPTY + "\n"

        def link(path: str) -> str:
            return Path(os.path.relpath(folder / path, here)).as_posix()

        return f"{tables.render(make(chosen, link), 'markdown')}\n{tables.escape_markdown(legend)}\n"

    return block


def benchmarks_block(root: Path, here: Path) -> str:
    """One table per benchmark file."""
    parts = []
    for path in sorted((root / "benchmarks" / "results").glob("*.json")):
        bench = read(path, Bench)
        link = Path(os.path.relpath(path, here)).as_posix()
        title = f"[{tables.escape_markdown(bench.name)}]({link}), {tables.escape_markdown(bench.machine.device)}"
        parts.append(f"{title}:\n\n{tables.render(tables.bench_table(bench, headline=True), 'markdown')}")
    return "\n".join(parts) if parts else "No benchmark file yet.\n"
