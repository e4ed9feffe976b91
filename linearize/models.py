"""A name becomes a model: hub id, folder, GGUF file, or nothing for the embedded teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.types import InputError, Unsupported

TEACHERS = Path(__file__).parent / "teachers"


@dataclass(frozen=True)
class Source:
    """Where a model comes from. name: what transformers loads it by (hub id or folder). gguf: file in that folder."""

    name: str
    kind: str  # "embedded", "folder", "gguf" or "hub"
    gguf: str | None = None
    revision: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for every `from_pretrained` of transformers."""
        found: dict[str, Any] = {} if self.kind == "hub" else {"local_files_only": True}
        if self.gguf:
            found["gguf_file"] = self.gguf
        if self.revision and self.kind == "hub":
            found["revision"] = self.revision
        return found


def embedded() -> list[str]:
    """Names of the teachers that are shipped with the package."""
    return sorted(path.parent.name for path in TEACHERS.glob("*/config.json"))


def source(model: str | Path | None = None, revision: str | None = None) -> Source:
    """What a `--model` means. Raises InputError where a path leads to no model."""
    if model is None:
        if not embedded():
            raise InputError("this copy of linearize has no embedded teacher: name a model with --model")
        return Source(str(TEACHERS / embedded()[0]), "embedded")
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"no GGUF file {path}")
        return Source(str(path.parent), "gguf", path.name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return Source(str(path), "folder")
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return Source(str(path), "gguf", files[0].name)
        many = f": name one of its {len(files)} GGUF files" if files else ": no config.json in it, and no GGUF file"
        raise InputError(f"folder {path} holds no model{many}")
    text = str(model)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise InputError(f"no model at {model}: give a hub id, a folder or a GGUF file")
    return Source(text, "hub", revision=revision)


def config(where: Source, trust_remote_code: bool = False) -> Any:
    """The model's transformers configuration. Raises InputError for an unknown model, Unsupported for an unknown
    architecture."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(where.name, trust_remote_code=trust_remote_code, **where.arguments())
    except (OSError, ValueError, KeyError) as error:
        raise _refusal(where, error) from error


def config_of_form(form: Mapping[str, Any]) -> Any:
    """A configuration from a recipe's `model.form`. Raises Unsupported for an unknown model type."""
    from transformers import AutoConfig

    sizes = {key: value for key, value in form.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(form["model_type"], **sizes)
    except ValueError:
        raise Unsupported(f"model.form: transformers knows no model type {form['model_type']!r}") from None


def skeleton(config: Any, trust_remote_code: bool = False) -> Any:
    """The model of a configuration on the meta device: its modules and shapes, no weights, no memory.

    Raises Unsupported where it is no causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise Unsupported(
            f"a {config.model_type} model is no decoder of text: linearize converts causal language models"
        ) from None


def _refusal(where: Source, error: Exception) -> InputError | Unsupported:
    """A one-line reason for what transformers said in many."""
    said = str(error)
    if "trust_remote_code" in said:
        return InputError(f"{where.name} brings code of its own: read it, then pass --trust-remote-code")
    if "does not recognize this architecture" in said or "not supported yet" in said:
        return Unsupported(f"{where.name}: this version of transformers does not know its architecture")
    if where.kind != "hub":
        return InputError(f"{where.name} holds no readable model: {said.splitlines()[0]}")
    if "connect" in said or "offline" in said.lower():
        return InputError(f"no folder {where.name!r}, and the hub cannot be reached to look for a model of that name")
    return InputError(f"unknown model {where.name!r}: no such folder, and the hub has no (public) model of that name")
