"""Diffusion transformers by name: a pipeline's folder or hub id, a transformer's folder, or what linearize wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.seams import dit
from linearize.surgery import plugin
from linearize.types import InputError, StorageError, Unsupported

#: settings of a transformer that recipes name its form by
SIZES = (
    "num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels",
    "sample_size", "patch_size", "num_embeds_ada_norm", "joint_attention_dim", "cross_attention_dim",
    "caption_channels", "pooled_projection_dim", "caption_projection_dim", "guidance_embeds",
    "dual_attention_layers", "qk_norm", "pos_embed_max_size", "norm_type", "interpolation_scale",
)  # fmt: skip


class Form:
    """A transformer's configuration as the rest of the house reads one: attributes, `to_dict`, `model_type`, its class.
    root: the folder that its weights are in, relative to the pipeline's; scheduler: the same of its scheduler."""

    def __init__(self, model_type: str, settings: Mapping[str, Any], root: str = "", scheduler: str = "") -> None:
        if getattr(_diffusers(), model_type, None) is None or model_type not in dit.FAMILIES:
            raise Unsupported(f"{model_type} is no diffusion transformer that linearize knows (see seams/dit.py)")
        self.model_type, self.root, self.scheduler = model_type, root, scheduler
        self.settings = {k: v for k, v in settings.items() if not k.startswith("_")}
        self.architectures = [model_type]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["settings"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def form(self) -> dict[str, Any]:
        """The sizes, as `model.form` holds them."""
        kept = {key: self.settings[key] for key in SIZES if isinstance(self.settings.get(key), int | str)}
        return {"model_type": self.model_type, **kept}

    def to_dict(self) -> dict[str, Any]:
        return {**self.settings, "model_type": self.model_type}

    def make_config(self) -> dict[str, Any]:
        """All settings, those that were not named at their defaults."""
        import inspect

        known = inspect.signature(getattr(_diffusers(), self.model_type).__init__).parameters
        if odd := sorted(self.settings.keys() - known.keys()):
            raise InputError(f"model.form: {self.model_type} has no setting {odd[0]!r}")
        return {n: p.default for n, p in known.items() if p.default is not p.empty} | self.settings

    def make(self) -> Any:
        """The transformer, weights at random."""
        cls = getattr(_diffusers(), self.model_type)
        return cls.from_config(self.settings)


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise InputError("diffusion models need diffusers: pip install 'linearize[diffusion]'") from None
    return diffusers


def is_folder(path: Path) -> bool:
    """Whether a folder holds a pipeline, a transformer of diffusers, or a converted one."""
    if (path / "model_index.json").is_file() or plugin.is_one(path):
        return True
    return "_class_name" in _json(path / "config.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def form_of(name: str, revision: str | None = None) -> Form:
    """The configuration behind a folder or hub id. Raises InputError, Unsupported."""
    diffusers, folder = _diffusers(), Path(name)
    if folder.is_dir() and plugin.is_one(folder):
        there = next(iter(plugin.read(folder)["components"].values()))
        if "config" not in there:
            raise InputError(f"{name} is a plug-in: name the model it is for, and load it with linearize.pipelines")
        return Form(there["class"], there["config"])
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        said = _json(folder / "config.json")
        return Form(said.get("_class_name", ""), said, scheduler="")
    try:
        index = dict(diffusers.DiffusionPipeline.load_config(name, revision=revision, local_files_only=folder.is_dir()))
        part = "transformer" if "transformer" in index else "unet"
        kind = index[part][1]
        said = dict(getattr(diffusers, kind).load_config(name, subfolder=part, revision=revision))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{name} holds no pipeline of diffusers: {str(error).splitlines()[0]}") from error
    return Form(kind, said, part, "scheduler")


def form_of_model(model: Any) -> Form:
    """Of a model in hand. Raises Unsupported for a family that is not in seams/dit.py."""
    return Form(type(model).__name__, dict(model.config))


def load(name: str, form: Form, dtype: Any, revision: str | None = None, **options: Any) -> Any:
    """The transformer with its weights. Raises StorageError for missing or damaged ones, InputError for pickle."""
    folder = Path(name)
    if folder.is_dir() and plugin.is_one(folder):
        model = load_whole(folder)
        return model if model.dtype == dtype else model.to(dtype)
    cls = getattr(_diffusers(), form.model_type)
    more: dict[str, Any] = {"subfolder": form.root} if form.root else {}
    try:
        return cls.from_pretrained(
            name, **more, revision=revision, torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False, **options
        )
    except OSError as error:
        raise InputError(f"{name}: no safetensors weights to read: {str(error).splitlines()[0]}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise StorageError(f"the weights of {name} are damaged ({error}): download them again") from error


def load_scheduler(name: str, form: Form, revision: str | None = None) -> Any:
    """What the pipeline draws with, as the deterministic sampler of its kind: DDIM, or Euler's steps of a flow. Raises
    InputError where the folder has none."""
    diffusers = _diffusers()
    more = {"subfolder": form.scheduler} if form.scheduler else {}
    try:
        said = dict(diffusers.DDIMScheduler.load_config(name, revision=revision, **more))
    except (OSError, ValueError):
        raise InputError(
            f"{name} has no scheduler_config.json, which says how noise is mixed in: put the pipeline's there"
        ) from None
    flow = "Flow" in said.get("_class_name", "") or said.get("prediction_type") == "flow_prediction"
    cls = diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.DDIMScheduler
    return cls.from_config(said)


def load_pipeline(name: str, device: str = "auto") -> Any:
    """A whole pipeline, for drawing from prompts. Raises InputError."""
    import torch

    try:
        pipe = _diffusers().DiffusionPipeline.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{name} holds no pipeline of diffusers: {str(error).splitlines()[0]}") from error
    if not hasattr(pipe, "transformer"):
        raise InputError(f"{name} has no transformer: prompts are drawn by pipelines of diffusion transformers")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))


def load_whole(folder: str | Path) -> Any:
    """A converted model that was written whole, mixers in place. Raises InputError for a plug-in, StorageError."""
    import torch

    from linearize.mixers import base as mixers
    from linearize.surgery.attach import attach
    from linearize.surgery.select import find

    folder = Path(folder)
    said = plugin.read(folder)
    (there,) = said["components"].values()
    model = Form(there["class"], there["config"]).make().eval()
    tensors = plugin.tensors_of(folder, plugin.WHOLE)
    sites = {site.name: site for site in find(model)}
    if missing := [name for name in there["sites"] if name not in sites]:
        raise StorageError(f"{folder} converts {missing[0]}, but a {there['class']} has no attention there")
    config = mixers.configure(said["method"], said["mixer"])
    attach(model, [sites[name] for name in there["sites"]], said["method"], config, renewing=False)
    plugin.fill(folder, model.state_dict(), tensors)
    with torch.no_grad():
        return model.eval()
