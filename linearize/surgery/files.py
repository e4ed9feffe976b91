"""Converted models on disk: a full checkpoint that transformers reloads, and an adapter for a base that stays apart.

A full checkpoint is the base's own layout plus the mixers' tensors, under a model type of its own
(`linearized_<base>`), with a small module file that imports linearize. So it reloads identically with
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` or `linearize.load(folder)`, and fails loudly
without either: a plain softmax model of the same weights would be silently wrong.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import linearize
from linearize.mixers.base import Mixer
from linearize.seams import hf
from linearize.storage import atomic_folder, write_atomic
from linearize.surgery.attach import Surgery, attach
from linearize.surgery.port import CHILD, PORT
from linearize.surgery.recognise import PREFIX, fingerprint, form, recognise
from linearize.surgery.select import find
from linearize.surgery.state import state_version
from linearize.types import InputError, StorageError, Unsupported

log = logging.getLogger("linearize")

#: of the `linearize` block in config.json and of linearize_config.json; a newer one is refused
FORMAT = 1
MODULE = "modeling_linearized"

_TEMPLATE = '''"""Loads this checkpoint: a model whose attention was linearised. It needs `pip install linearize`."""

from linearize.surgery.files import classes

{config}, {model} = classes("{model_type}", "{architecture}")
'''


# ------------------------------------------------------------------------------------- what the files say
def describe(surgery: Surgery) -> dict[str, Any]:
    """The `linearize` block: how to repeat this surgery. state_version is for who reads states; weights do not depend
    on it."""
    ports = [surgery.model.get_submodule(name).__dict__[PORT] for name in surgery.mixers]
    return {
        "format": FORMAT,
        "version": linearize.__version__,
        "method": surgery.method,
        "state_version": state_version(surgery),
        "mixer": surgery.config.model_dump(mode="json"),
        "sites": [
            {"name": p.site.name, "layer": p.site.layer, "rotates": p.rotates, "rotary_channels": p.rotary_channels}
            for p in ports
        ],
    }


def repeat(model: nn.Module, block: Mapping[str, Any]) -> Surgery:
    """The surgery that a `linearize` block describes, on a model of the same base. Works on the meta device, so without
    a probe: `Surgery.reach` follows once the weights are there.

    Raises Unsupported for a block of a newer linearize, StorageError where a site is missing.
    """
    _check_format(block, "this checkpoint")
    here = {site.name: site for site in find(model)}
    if missing := [s["name"] for s in block["sites"] if s["name"] not in here]:
        raise StorageError(f"the checkpoint converts {missing[0]}, but {type(model).__name__} has no attention there")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # mixers are float32 whatever the base is built in
    try:
        chosen = [here[s["name"]] for s in block["sites"]]
        surgery = attach(model, chosen, block["method"], dict(block["mixer"]), probe=False, renewing=False)
    finally:
        torch.set_default_dtype(before)
    for site in block["sites"]:
        port = model.get_submodule(site["name"]).__dict__[PORT]
        port.rotates, port.rotary_channels = site["rotates"], site["rotary_channels"]
    return surgery


def _check_format(said: Mapping[str, Any], where: Any) -> None:
    if said["format"] > FORMAT:
        raise Unsupported(
            f"{where} was written by linearize {said['version']}; this is {linearize.__version__}: "
            "pip install --upgrade linearize"
        )


def _surgery(model: nn.Module | Surgery) -> Surgery:
    found = model if isinstance(model, Surgery) else Surgery.of(model)
    if found is None or not found.mixers:
        raise InputError("this model is not converted: attach a method first, or save it with model.save_pretrained")
    return found


# ------------------------------------------------------------------------------------- classes that reload
def classes(model_type: str, architecture: str) -> tuple[type[Any], type[Any]]:
    """(configuration class, model class) of a converted `architecture`; both are subclasses of the base's.

    The module file of every checkpoint calls this. Raises Unsupported where transformers lacks the base.
    """
    base = hf.base_classes(model_type, architecture)
    if base is None:
        raise Unsupported(f"this version of transformers has no {architecture} of type {model_type!r}: upgrade it")
    return _classes(*base)


@functools.cache
def _classes(base_config: type[Any], base_model: type[Any]) -> tuple[type[Any], type[Any]]:
    def ignore(cls: type[Any], auto_class: Any = None) -> None:
        """The checkpoint has its own module file: transformers must not copy the file these classes are made in."""

    config = type(base_config)(
        f"Linearized{base_config.__name__}",
        (base_config,),
        {
            "__module__": __name__,
            "model_type": PREFIX + base_config.model_type,
            "register_for_auto_class": classmethod(ignore),
        },
    )

    class Linearized(hf.keeping(base_model, CHILD, Mixer)):  # type: ignore[misc]
        config_class = config
        linearize_base = base_model
        register_for_auto_class = classmethod(ignore)

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            repeat(self, config.linearize)

        @classmethod
        def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
            _complete(model, info, args[0] if args else "the checkpoint")
            _surgery(model).reach()
            return (model, info) if output_loading_info else model

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            with _dressed(self):
                super().save_pretrained(save_directory, *args, **kwargs)
            if kwargs.get("is_main_process", True):
                _write_module(self, Path(save_directory))

    Linearized.__name__ = Linearized.__qualname__ = f"Linearized{base_model.__name__}"
    hf.register_subclass(config, Linearized, base_model, base_config.model_type)
    return config, Linearized


def _complete(model: nn.Module, info: Mapping[str, Any], where: Any) -> None:
    """Raises StorageError where a checkpoint lacks tensors, or holds some that the model has no place for."""
    quantised = getattr(model, "hf_quantizer", None) is not None  # its own tensors beside the weights are not ours
    said = {"missing_keys": "lacks", "unexpected_keys": "holds unknown", "mismatched_keys": "has other sizes for"}
    for problem, verb in said.items():
        keys = sorted(str(k) for k in info[problem] if not quantised or CHILD in str(k))
        if keys:
            raise StorageError(f"{where} {verb} {keys[0]} ({len(keys)} such tensors): it is damaged or was edited")


def _original(model: nn.Module) -> tuple[str, type[Any]]:
    """(model type, class) of the base of a converted model. Raises Unsupported where reloading could not find it."""
    cls = getattr(type(model), "linearize_base", type(model))
    config: Any = getattr(model, "config", None)
    if not isinstance(model, hf.PreTrainedModel) or config is None:
        raise Unsupported(f"{type(model).__name__} is no transformers model: save its state_dict yourself")
    model_type = config.model_type.removeprefix(PREFIX)
    base = hf.base_classes(model_type, cls.__name__)
    if base is None or base[1] is not cls:
        raise Unsupported(
            f"{cls.__name__} is not transformers' own code, so a checkpoint could not find it again: save an adapter "
            "(--adapter-only)"
        )
    return model_type, cls


@contextlib.contextmanager
def _dressed(model: nn.Module) -> Iterator[None]:
    """Give the model the class and configuration it will be reloaded with, for as long as it is written."""
    surgery = _surgery(model)
    model_type, base = _original(model)
    config_class, model_class = classes(model_type, base.__name__)
    config: Any = model.config
    before, config_before, model_before = dict(config.__dict__), type(config), type(model)
    config.__class__, model.__class__ = config_class, model_class
    config.linearize = describe(surgery)
    config.auto_map = {
        "AutoConfig": f"{MODULE}.{config_class.__name__}",
        hf.auto_class(base.config_class, base).__name__: f"{MODULE}.{model_class.__name__}",
    }
    try:
        yield
    finally:
        config.__dict__.clear()
        config.__dict__.update(before)
        config.__class__, model.__class__ = config_before, model_before


def _write_module(model: nn.Module, folder: Path) -> None:
    model_type, base = _original(model)
    config_class, model_class = classes(model_type, base.__name__)
    text = _TEMPLATE.format(
        config=config_class.__name__, model=model_class.__name__, model_type=model_type, architecture=base.__name__
    )
    (folder / f"{MODULE}.py").write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------ full checkpoint
def write(
    model: nn.Module | Surgery, folder: str | Path, tokenizer: Any = None, *, max_shard_size: int | str = "5GB"
) -> None:
    """Write a full checkpoint into `folder`, file by file: for a caller that makes the folder appear whole itself
    (storage.atomic_folder). Raises InputError where LoRA is not merged yet, Unsupported for foreign model code."""
    model = model.model if isinstance(model, Surgery) else model
    folder = Path(folder)
    if lora := next((n for n, _ in model.named_parameters() if "lora_" in n), None):
        raise InputError(f"{lora} is still apart from its weight: merge first (linearize merge), or save an adapter")
    with _dressed(model):
        hf.PreTrainedModel.save_pretrained(model, folder, max_shard_size=max_shard_size)  # type: ignore[arg-type]
    _write_module(model, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def carry(origin: Path | None, folder: Path, names: Sequence[str]) -> None:
    """Copy what there is of `names` (files, folders) from the folder a model came from."""
    for name in names if origin is not None else ():
        assert origin is not None
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise InputError(f"modules.json of {origin} names {name}, outside of its folder: mend it")
        for file in [origin / name] if (origin / name).is_file() else sorted((origin / name).rglob("*")):
            if file.is_file():
                write_atomic(folder / file.relative_to(origin), file.read_bytes())


def save(
    model: nn.Module | Surgery,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a converted model as a full checkpoint, whole or not at all; returns the folder.

    Raises InputError (folder not empty, LoRA not merged, model not converted), Unsupported (model code that is not
    transformers' own), StorageError.
    """
    with atomic_folder(folder, overwrite) as part:
        write(model, part, tokenizer, max_shard_size=max_shard_size)
    return Path(folder)


def load(folder: str | Path, **options: Any) -> Any:
    """A converted model from the folder `save` wrote; options are those of `from_pretrained` (dtype, device_map, ...).

    Raises InputError where the folder holds no converted model, StorageError where it is incomplete or damaged.
    """
    folder = Path(folder)
    config = read_config(folder)
    cls = reload_class(config)
    if cls is None:
        raise InputError(f"{folder} holds no converted model (no `linearize` block in its config.json)")
    check_weights(folder)
    return cls.from_pretrained(folder, use_safetensors=True, **options)


def reload_class(config: Mapping[str, Any]) -> type[Any] | None:
    """The model class of a converted checkpoint's config.json (now known to the auto classes); None for any other."""
    if "linearize" not in config:
        return None
    model_type = config["model_type"].removeprefix(PREFIX)
    return classes(model_type, config["architectures"][0].removeprefix("Linearized"))[1]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. Raises InputError where there is none, or it cannot be read."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} holds no model: there is no config.json in it") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}/config.json cannot be read: {error}") from None


def check_weights(folder: Path) -> None:
    """Are the weights of a folder safetensors files, and whole? Reads headers only.

    Raises InputError where there are none (pickle files are never opened), StorageError for a damaged file.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise StorageError(f"{index} is damaged ({error!r}): download or save it again") from None
    else:
        names = [path.name for path in sorted(folder.glob("*.safetensors"))]
    if not names:
        pickled = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(kind))
        if pickled:
            raise InputError(
                f"{folder} holds only {pickled[0]}, a pickle file, which may run code when opened: turn it "
                "into safetensors yourself (safetensors.torch.save_file), where you trust it"
            )
        raise InputError(f"{folder} holds no weights: there is no *.safetensors in it")
    for name in names:
        if said := _damage(folder / name):
            raise StorageError(f"{folder / name} is damaged: {said}; download or save it again")


def _damage(path: Path) -> str | None:
    """What is wrong with a safetensors file, by its header and its length."""
    if not path.is_file():
        return "it is missing, though the index names it"
    size = path.stat().st_size
    with path.open("rb") as file:
        head = int.from_bytes(file.read(8), "little")
        if size < 8 or head > size - 8:
            return f"it ends inside its header, at {size:,} bytes"
        try:
            header = json.loads(file.read(head))
            end = max((t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, AttributeError):
            return "its header cannot be read"
    wanted = 8 + head + end
    return None if size == wanted else f"it has {size:,} of {wanted:,} bytes"


# ------------------------------------------------------------------------------------------------- adapter only
ADAPTER_CONFIG = "linearize_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_LORA_KEYS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "bias", "fan_in_fan_out",
    "rank_pattern", "alpha_pattern",
)  # fmt: skip


def write_adapter(
    model: nn.Module | Surgery,
    folder: str | Path,
    *,
    base: str | None,
    revision: str | None = None,
    task: str = "text",
    plan: Mapping[str, Any] | None = None,
) -> None:
    """Write what surgery and LoRA added into `folder`, file by file (see `write`). base: the name that the model was
    loaded by (None: the embedded teacher of `task`); its weights must be those that name stands for, not fine-tuned in
    full.

    Raises InputError where the model is not converted, Unsupported for LoRA that cannot be written.
    """
    from safetensors.torch import save as to_bytes

    surgery = _surgery(model)
    model, folder = surgery.model, Path(folder)
    if any(mixer.starts_afresh for mixer in surgery.mixers.values()):
        raise InputError("projections that started afresh are no part of an adapter: save the whole model")
    tensors = {name: t.detach().cpu().contiguous() for name, t in _added(model).items()}
    said = {
        "format": FORMAT,
        "version": linearize.__version__,
        "base": {
            "id": base,
            "revision": revision,
            "task": task,
            "form": form(model),
            "fingerprint": fingerprint(model),
        },
        "linearize": describe(surgery),
        "lora": _lora(model),
        "plan": dict(plan) if plan is not None else None,
    }
    write_atomic(folder / ADAPTER_WEIGHTS, to_bytes(tensors, {"format": "pt"}))
    write_atomic(folder / ADAPTER_CONFIG, json.dumps(said, indent=1) + "\n")


def save_adapter(
    model: nn.Module | Surgery,
    folder: str | Path,
    *,
    base: str | None,
    revision: str | None = None,
    task: str = "text",
    plan: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """`write_adapter`, whole or not at all; returns the folder. Raises StorageError too."""
    with atomic_folder(folder, overwrite) as part:
        write_adapter(model, part, base=base, revision=revision, task=task, plan=plan)
    return Path(folder)


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """linearize_config.json of an adapter folder. Raises InputError, or Unsupported for a newer format."""
    path = Path(folder) / ADAPTER_CONFIG
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} is no adapter of linearize: there is no {ADAPTER_CONFIG} in it") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    _check_format(said, folder)
    return said


def load_adapter(
    model: nn.Module, folder: str | Path, *, name: str | None = None, revision: str | None = None
) -> Surgery:
    """Convert `model`, the base that an adapter was made for, and load the adapter into it.

    name: what to call the model in messages. revision: its commit, where the hub gave one. The base is recognised by
    its sizes and its logits on stored prompts, so a bf16 or quantised copy is taken, with a warning where it is far off
    or of another commit. Raises InputError for another model (which stays as it was), Unsupported where a mixer is not
    reached, StorageError where tensors are missing, unknown or damaged.
    """
    from safetensors.torch import load_file

    said, folder = read_adapter(folder), Path(folder)
    if Surgery.of(model) is not None:
        raise InputError("this model is converted already: detach it, or load the base again")
    recognise(model, said["base"], name or getattr(model, "name_or_path", "") or type(model).__name__, revision)
    if problem := _damage(folder / ADAPTER_WEIGHTS):
        raise StorageError(f"{folder / ADAPTER_WEIGHTS} is damaged: {problem}; download or save it again")
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    surgery = repeat(model, said["linearize"])
    try:
        surgery.reach()
        if said["lora"] is not None:
            from peft import LoraConfig, inject_adapter_in_model

            inject_adapter_in_model(LoraConfig(**said["lora"]), model)
        here = _added(model)
        for names, verb in ((here.keys() - tensors.keys(), "lacks"), (tensors.keys() - here.keys(), "holds unknown")):
            if names:
                raise StorageError(
                    f"{folder} {verb} {min(names)} ({len(names)} such tensors): it was damaged or edited"
                )
        for key, tensor in here.items():
            if tensor.shape != tensors[key].shape:
                raise StorageError(f"{folder}: {key} has shape {tuple(tensors[key].shape)}, not {tuple(tensor.shape)}")
    except BaseException:
        surgery.detach()
        raise
    with torch.no_grad():
        for key, tensor in here.items():
            if tensor.dtype != tensors[key].dtype and "lora_" in key:
                tensor.data = tensor.data.to(tensors[key].dtype)  # peft makes it in the base's own dtype
            tensor.copy_(tensors[key])
    model.eval()
    return surgery


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of a transformers model (one of diffusers has components)."""
    path = folder / ADAPTER_CONFIG
    return path.is_file() and '"components"' not in path.read_text(encoding="utf-8", errors="replace")


def _added(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that surgery and LoRA brought, each once."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: t for name, t in named if f".{CHILD}." in name or "lora_" in name}


def _lora(model: nn.Module) -> dict[str, Any] | None:
    """The settings of the LoRA in the model; None without one. Raises Unsupported for several, or another kind."""
    if not any("lora_" in name for name, _ in model.named_parameters()):
        return None
    configs: dict[str, Any] = dict(getattr(model, "peft_config", None) or {})
    if list(configs) != ["default"]:
        raise Unsupported(f"an adapter holds one LoRA named 'default', this model has {sorted(configs)}: merge them")
    raw = configs["default"].to_dict()
    found = {key: raw[key] for key in _LORA_KEYS if raw.get(key) is not None}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in found.items()}
