"""Who may import whom: read from the source, so that a lazy import counts as well (annotations do not).

cli -> api -> conversion -> stages, evaluate -> surgery -> { mixers -> ops, seams } -> types
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import linearize

PACKAGE = Path(linearize.__file__).parent

#: what each part may import of the others
MAY_IMPORT = {
    "types": set(),
    "progress": set(),
    "storage": {"types"},
    "ops": {"types"},
    "mixers": {"ops", "types"},
    "seams": {"types"},
    "surgery": {"mixers", "seams", "storage", "types"},
    "recipe": {"types"},
    "problems": set(),
    "plan": {"mixers", "problems", "recipe", "types"},
    "data": {"progress", "seams", "storage", "types"},
    "models": {"data", "denoisers", "seams", "surgery", "types"},
    "denoisers": {"mixers", "seams", "surgery", "types"},
    "report": {"mixers", "storage", "types"},
    "stages": {"data", "mixers", "plan", "problems", "progress", "storage", "surgery", "types"},
    "evaluate": {"data", "mixers", "ops", "plan", "progress", "seams", "stages", "surgery", "types"},
    "testing": {"mixers", "ops", "types"},
    "tasks": {"data", "evaluate", "mixers", "plan", "report", "stages", "storage", "surgery", "types"},
    "answers": {"report"},
    "pipelines": {"mixers", "seams", "storage", "surgery", "types"},
    "resolve": {"answers", "mixers", "models", "plan", "recipe", "surgery", "types"},
}
#: the top joins everything below it
TOP = ("measuring", "recalling", "standard", "conversion", "listings", "api", "cli", "__init__")
#: where code of models and pipelines may be imported from third parties. seams/hooks knows accelerate's hooks by name
#: alone, and api turns down transformers' logging: neither is model code.
MODEL_CODE = {"transformers", "diffusers", "timm", "peft"}
MAY_KNOW_MODELS = (
    "models",
    "denoisers",
    "seams",
    "surgery.files",
    "data",
    "stages",
    "evaluate",
    "pipelines",
    "testing.pico",
)
NOT_MODEL_CODE = {"transformers.utils"}
#: parts of transformers that are not its public face, besides what seams/hf.py imports
PUBLIC_PARTS = {"transformers", "transformers.utils", "transformers.pytorch_utils"}


def modules() -> list[str]:
    """Dotted names inside the package: "ops.linear.torch", "cli", ..."""
    return sorted(".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py"))


def imports(module: str) -> Iterator[tuple[str, int, bool]]:
    """(full dotted name imported, line, whether at the top of the file), without what only annotations need."""
    tree = ast.parse((PACKAGE / Path(*module.split("."))).with_suffix(".py").read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, node in tree.body
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno, node in tree.body


def part(dotted: str) -> str:
    return dotted.split(".")[0]


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module):
    here = part(module)
    if here in TOP:
        return
    assert here in MAY_IMPORT, f"linearize/{here} is new: say in MAY_IMPORT what it may import"
    for name, line, _ in imports(module):
        if not name.startswith("linearize.") or name == "linearize.__version__":
            continue
        there = part(name.removeprefix("linearize."))
        assert there == here or there in MAY_IMPORT[here], f"linearize/{module}:{line} imports {name}"


def test_the_direction_has_no_circle():
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {p for p, needs in MAY_IMPORT.items() if p not in done and needs <= done}
        assert ready, f"a circle among {set(MAY_IMPORT) - done}"
        done |= ready


@pytest.mark.parametrize("module", modules())
def test_model_code_stays_in_its_places(module):
    allowed = any(module == place or module.startswith(f"{place}.") for place in MAY_KNOW_MODELS)
    for name, line, _ in imports(module):
        if part(name) in MODEL_CODE and not any(name.startswith(p) for p in NOT_MODEL_CODE):
            assert allowed, f"linearize/{module}:{line} imports {name}"


@pytest.mark.parametrize("module", modules())
def test_private_names_of_transformers_are_in_one_file(module):
    if module == "seams.hf":
        return
    for name, line, _ in imports(module):
        if part(name) == "transformers":
            source, _, what = name.rpartition(".")
            assert source in PUBLIC_PARTS and not what.startswith("_"), f"linearize/{module}:{line} imports {name}"


@pytest.mark.parametrize("module", [m for m in modules() if part(m) == "ops"])
def test_ops_know_no_module(module):
    tree = ast.parse((PACKAGE / Path(*module.split("."))).with_suffix(".py").read_text())
    for name, line, _ in imports(module):
        inner = name.startswith("torch.nn") and not name.startswith("torch.nn.functional")
        assert not inner, f"linearize/{module}:{line} imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("Module", "Parameter"):
            raise AssertionError(f"linearize/{module}:{node.lineno} knows {ast.unparse(node)}")


def test_plan_imports_mixers_lazily():
    for name, line, at_top in imports("plan"):
        assert not (at_top and name.startswith("linearize.mixers")), f"linearize/plan:{line}"


@pytest.mark.parametrize(
    "statement, absent",
    [
        ("import linearize", ["torch", "transformers", "pydantic"]),
        ("import linearize.cli", ["torch", "transformers", "matplotlib"]),
        ("import linearize.plan", ["transformers"]),
        ("from linearize.mixers import hedgehog", ["transformers", "peft", "accelerate"]),
    ],
)
def test_what_an_import_costs(statement, absent):
    code = f"import sys; {statement}; print([m for m in {absent} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
