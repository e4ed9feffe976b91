"""What the wheel says of itself: everything that its code imports is among its requirements."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def plain(requirement: str) -> str:
    """ "PyYAML>=6.0; ..." -> "pyyaml"."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Third-party packages that a file imports, and whether that happens as soon as the file is."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"linearize"}:
            yield name, node.col_offset == 0


def test_every_import_is_required():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {plain(line) for line in project["dependencies"]}
    extras = {plain(line) for lines in project["optional-dependencies"].values() for line in lines}
    owners = packages_distributions()
    seen = set()
    for path in sorted(path for folder in ("linearize", "recipes") for path in (ROOT / folder).rglob("*.py")):
        for name, at_once in imported(path):
            owned = {plain(owner) for owner in owners.get(name, [name])}
            seen |= owned
            assert owned & (required | extras), f"{path.relative_to(ROOT)}: {name} is in no requirement"
            # Files of kernels are imported where triton is; all else of the extras only inside functions.
            optional = not owned & required
            assert not (at_once and optional) or name == "triton", f"{path.relative_to(ROOT)}: {name} is an extra"
    assert {"torch", "numpy", "pyyaml", "pillow"} <= seen, "nothing was looked at"
