"""Recipes as files: found by name, read as YAML, laid over the defaults, changed by `--set`. What they mean: plan.py"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from linearize.types import InputError, nearest


def folder() -> Path:
    """Where the recipes are: inside the package once installed, at the top of a checkout."""
    here = Path(__file__).parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


def recipes() -> list[str]:
    """Names of all recipes, `method/model`."""
    root = folder()
    return sorted(
        path.relative_to(root).with_suffix("").as_posix()
        for path in root.glob("*/**/*.yaml")
        if path.relative_to(root).parts[0] != "results"
    )


def defaults(task: str) -> dict[str, Any]:
    """What every recipe of a task starts from: `defaults.yaml`, and over it what is different for the task."""
    own = folder() / f"defaults-{task}.yaml"
    common = load(folder() / "defaults.yaml")
    return merge(common, load(own)) if own.is_file() else common


def locate(name: str | Path) -> Path:
    """The file of a recipe given by path or by name: `hedgehog/demo`, or `demo` where only one is called so, or one is
    the default method's."""
    path, text = Path(name), str(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise InputError(f"no recipe file {path}; built-in ones: linearize list recipes")
        return path
    known = recipes()
    own = f"{load(folder() / 'defaults.yaml')['method']['name']}/{text}"
    hits = [n for n in known if n in (text, own)] or [n for n in known if n.split("/", 1)[1] == text]
    if len(hits) == 1:
        return folder() / f"{hits[0]}.yaml"
    if hits:
        raise InputError(f"recipe {text!r} is {' or '.join(hits)}: write one of them out")
    raise InputError(f"unknown recipe {text!r}: {nearest(text, known)}")


def recipe_for(config: Mapping[str, Any], method: str = "hedgehog") -> str | None:
    """The recipe of `method` marked `auto` whose `model.form` agrees with a model's configuration: the one that says
    most about it, or None (then the defaults serve)."""
    best: tuple[int, str] | None = None
    for name in recipes():
        if name.split("/")[0] != method.replace("-", "_"):
            continue
        model = load(folder() / f"{name}.yaml").get("model") or {}
        form = model.get("form") or {}
        if model.get("auto") and form and all(config.get(k) == v for k, v in form.items()):
            best = max(best or (0, ""), (len(form), name))
    return best[1] if best else None


# ------------------------------------------------------------------------------------------------ YAML and merging
class _Loader(yaml.SafeLoader):
    """YAML with 1e-3 as a number (YAML 1.1 asks for 1.0e-3), and duplicate keys refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            word = self.construct_object(key, deep=True)
            if word in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {word!r} stands twice", key.start_mark)
            seen.add(word)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _yaml(text: str, title: str) -> Any:
    try:
        # A subclass of SafeLoader: builds plain values only.
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{title}{at}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def load(path: Path) -> dict[str, Any]:
    stamp = path.stat()
    return deepcopy(_parsed(path, stamp.st_mtime_ns, stamp.st_size))


@functools.lru_cache(maxsize=256)
def _parsed(path: Path, _modified: int, _size: int) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"recipe {path} is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"recipe {path} cannot be read: {error.strerror}") from None
    raw = _yaml(text, f"recipe {path}")
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise InputError(f"recipe {path} must be a mapping (version: 1, model: ..., method: ...)")
    return raw


def raw(source: str | Path | Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """What to call a recipe in messages, and its content."""
    if source is None:
        return "plan", {}
    if isinstance(source, Mapping):
        return "plan", deepcopy(dict(source))
    path = locate(source)
    return f"recipe {source}", load(path)


def merge(defaults: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """`recipe` over `defaults`: mappings key by key, everything else replaced. Each stage is laid over the default
    stage of its kind; the recipe says which there are. Another method drops the default method's settings."""
    base = deepcopy(dict(defaults))
    theirs = (recipe.get("method") or {}) if isinstance(recipe.get("method"), Mapping) else {}
    ours = base.get("method", {})
    if theirs.get("name", ours.get("name")) != ours.get("name"):
        ours.pop("mixer", None)
    stages = recipe.get("stages")
    out = _over(base, {k: v for k, v in recipe.items() if k != "stages"})
    if isinstance(stages, list):
        known = {s["kind"]: s for s in reversed(base.get("stages", []))}
        out["stages"] = [
            _over(deepcopy(known.get(s.get("kind"), {})), s) if isinstance(s, Mapping) else s for s in stages
        ]
    elif stages is not None:
        out["stages"] = stages
    return out


def _over(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in top.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _over(base[key], value)
        else:
            base[key] = deepcopy(value)
    return base


def pairs(overrides: Any) -> list[tuple[str, Any]]:
    """Overrides in any of the forms that `Plan.read` takes, as (dotted path, value). Raises InputError."""
    items = overrides.items() if isinstance(overrides, Mapping) else overrides
    return [parse_override(item) if isinstance(item, str) else item for item in items]


def parse_override(text: str) -> tuple[str, Any]:
    """("a.b", value) of `a.b=value`; the value is YAML. Raises InputError."""
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise InputError(f"--set {text!r}: write a.b=c, for example stages.transfer.lr=1e-3")
    return path.strip(), _yaml(value, f"--set {text}")


def assign(raw: dict[str, Any], path: str, value: Any) -> None:
    """Sets a dotted path in place; `stages.<kind or number>` names a stage, and null there removes it."""
    keys: list[Any] = path.replace("-", "_").split(".")
    node: Any = raw
    if keys[0] == "stages" and len(keys) > 1:
        stages = raw.setdefault("stages", [])
        index = _stage_index(stages, keys[1], path)
        if len(keys) == 2 and value is None:
            del stages[index]
            return
        if len(keys) == 2:
            stages[index] = value
            return
        node, keys = stages[index], keys[2:]
    elif keys == ["method", "name"] and (raw.get("method") or {}).get("name") != str(value).replace("-", "_"):
        raw.setdefault("method", {}).pop("mixer", None)  # settings of the recipe's own method
    for key in keys[:-1]:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise InputError(f"--set {path}: {key} is a value, not a group of settings")
    node[keys[-1]] = value


def _stage_index(stages: list[Any], word: str, path: str) -> int:
    kinds = [s.get("kind") if isinstance(s, dict) else None for s in stages]
    hits = [i for i, kind in enumerate(kinds) if kind == word]
    if word.isdigit() and int(word) < len(stages):
        hits = [int(word)]
    if len(hits) == 1:
        return hits[0]
    there = ", ".join(f"{i} ({kind})" for i, kind in enumerate(kinds)) or "none"
    many = "more than one stage is called so" if hits else "no such stage"
    raise InputError(f"--set {path}: {many}; stages are {there}")
