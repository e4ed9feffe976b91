"""A name becomes a model: hub id, folder, GGUF file, or nothing for the embedded teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize import denoisers
from linearize.seams import dit
from linearize.types import GateError, InputError, StorageError, Unsupported

if TYPE_CHECKING:
    import torch
    from torch import nn

TEACHERS = Path(__file__).parent / "teachers"
#: what a model is for: causal language models, encoders of text, encoders of images (with or without a classifier),
#: denoisers of images
TASKS = ("text", "sentences", "image", "diffusion")


@dataclass(frozen=True)
class Source:
    """Where a model comes from. name: what transformers loads it by (hub id or folder). gguf: file in that folder."""

    name: str
    kind: str  # "embedded", "folder", "gguf" or "hub"
    gguf: str | None = None
    revision: str | None = None
    diffusion: bool = False  # of diffusers

    @property
    def id(self) -> str | None:
        """What a user calls it: hub id, folder or file; None for the embedded teacher."""
        if self.kind == "embedded":
            return None
        return str(Path(self.name) / self.gguf) if self.gguf else self.name

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
    return sorted(
        path.parent.name for name in ("config.json", "model_index.json") for path in TEACHERS.glob(f"*/{name}")
    )


def source(model: str | Path | None = None, revision: str | None = None, task: str = "text") -> Source:
    """What a `--model` means; None is the embedded teacher of `task`. Raises InputError where a path leads to no
    model."""
    if model is None:
        if task not in embedded():
            raise InputError(f"this copy of linearize has no embedded {task} teacher: name a model with --model")
        return Source(str(TEACHERS / task), "embedded", diffusion=task == "diffusion")
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"no GGUF file {path}")
        return Source(str(path.parent), "gguf", path.name)
    if path.is_dir():
        if denoisers.is_folder(path):
            return Source(str(path), "folder", diffusion=True)
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
    return Source(text, "hub", revision=revision, diffusion=task == "diffusion")


def config(where: Source, trust_remote_code: bool = False) -> Any:
    """The model's transformers configuration (of diffusers a `Form`). Raises InputError for an unknown model,
    Unsupported for an unknown architecture."""
    from transformers import AutoConfig, PreTrainedConfig

    if where.diffusion:
        return denoisers.form_of(where.name, where.revision)
    try:
        if where.gguf is None:
            raw, _ = PreTrainedConfig.get_config_dict(where.name, **where.arguments())
            if "linearize" in raw:
                from linearize.surgery import files

                files.reload_class(raw)  # makes the auto classes know it
        return AutoConfig.from_pretrained(where.name, trust_remote_code=trust_remote_code, **where.arguments())
    except (OSError, ValueError, KeyError) as error:
        raise _refusal(where, error) from error


def config_of_form(form: Mapping[str, Any]) -> Any:
    """A configuration from a recipe's `model.form`. Raises Unsupported for an unknown model type."""
    from transformers import AutoConfig

    sizes = {key: value for key, value in form.items() if key != "model_type"}
    if form["model_type"] in dit.FAMILIES:
        return denoisers.Form(form["model_type"], denoisers.Form(form["model_type"], sizes).make_config())
    try:
        return AutoConfig.for_model(form["model_type"], **sizes)
    except ValueError:
        raise Unsupported(f"model.form: transformers knows no model type {form['model_type']!r}") from None


def kind(config: Any) -> tuple[str, Any]:
    """(task, the auto class that makes the model), by the architecture that a configuration names, else by what
    transformers has for its type.

    Raises Unsupported for what is none of the tasks: encoder-decoders, models of several towers, sound.
    """
    from linearize.seams import hf
    from linearize.surgery import files

    if isinstance(config, denoisers.Form):
        return "diffusion", None
    name = (getattr(config, "architectures", None) or [None])[0]
    said = name or config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported(
            f"{said} is an encoder-decoder: convert reaches decoders and encoders alone (attach does both)"
        )
    if hasattr(config, "vision_config"):
        raise Unsupported(
            f"{said} has several towers: attach to one of them (linearize.attach(model.vision_tower, ...))"
        )
    remote = [k for k in getattr(config, "auto_map", None) or {} if k.startswith("AutoModel")]
    if hasattr(config, "linearize"):
        cls = files.reload_class(config.to_dict())
    elif remote and hf.named(name) is None:
        auto: Any = hf.named("AutoModelForCausalLM" if "AutoModelForCausalLM" in remote else remote[0])
        image = "Image" in auto.__name__ or hasattr(config, "patch_size")
        return ("text" if "CausalLM" in auto.__name__ else "image" if image else "sentences"), auto
    elif name is None:
        cls = _plainest(config)
    else:
        cls = hf.named(name)
    if cls is None:
        raise Unsupported(f"{said} is no model of this version of transformers: linearize does not know how to make it")
    entrance = getattr(cls, "main_input_name", None)
    if entrance not in ("input_ids", "pixel_values"):
        raise Unsupported(f"{said} reads {entrance}: convert reaches models of text and of images")
    causal = any(part in cls.__name__ for part in ("ForCausalLM", "LMHeadModel"))
    task = "image" if entrance == "pixel_values" else "text" if causal else "sentences"
    return task, hf.auto_class(type(config), cls)


def task_of(model: Any) -> str:
    """The task of a model in hand, by its class."""
    if dit.family(model) is not None:
        return "diffusion"
    if getattr(model, "main_input_name", None) == "pixel_values":
        return "image"
    return "text" if any(part in type(model).__name__ for part in ("ForCausalLM", "LMHeadModel")) else "sentences"


def classifies(what: Any) -> bool:
    """Whether a model, or that of a configuration, ends in a classifier."""
    names = getattr(what, "architectures", None) or [type(what).__name__]
    return "Classification" in names[0]


def _plainest(config: Any) -> Any:
    """The class of a configuration that names none: a language model for decoders, no head for encoders."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    from linearize.seams import hf

    def made(auto: Any) -> Any:
        found = hf.mapped(auto, type(config))
        return found[0] if found else None

    bare, decoder = made(AutoModel), made(AutoModelForCausalLM)
    masked = made(AutoModelForMaskedLM) is not None and not getattr(config, "is_decoder", False)
    encodes = masked or getattr(bare, "main_input_name", None) == "pixel_values"
    return bare if encodes or decoder is None else decoder


def skeleton(config: Any, trust_remote_code: bool = False) -> Any:
    """The model of a configuration on the meta device: its modules and shapes, no weights, no memory.

    Raises Unsupported where it is of no task that can be converted.
    """
    import torch

    _, auto = kind(config)
    with torch.device("meta"):
        if auto is None:
            return config.make()
        return auto.from_config(config, trust_remote_code=trust_remote_code)


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


# --------------------------------------------------------------------------------------------------- with weights
@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, and what belongs to it.

    processor: the tokenizer, or the image processor (None where images need none but what the configuration says).
    id: hub id, folder or file (None: the embedded teacher). revision: the commit, where the hub gave one. task: what
    it is for, of TASKS. notes: what a user may not have expected.
    """

    model: Any
    processor: Any
    id: str | None
    revision: str | None
    task: str
    source: Source
    notes: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> Any:
        return None if self.task in ("image", "diffusion") else self.processor


def load_model(
    name: str | Path | Source | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    need_tokenizer: bool = True,
    task: str = "text",
    **options: Any,
) -> Loaded:
    """The model of a name: hub id, folder (also one that linearize wrote), GGUF file; None is the embedded teacher of
    `task`.

    dtype "auto" is the stored one (float16 becomes float32 on a CPU). device "auto" is the GPU where there is one.
    options go to `from_pretrained` (device_map, quantization_config, attn_implementation, ...). Only safetensors and
    GGUF are read. Raises InputError (unknown, no config, no tokenizer, pickle only), Unsupported (of no task that can
    be converted), StorageError (damaged or incomplete files), GateError (NaN or infinity in the weights).
    """
    import torch

    where = name if isinstance(name, Source) else source(name, revision, task)
    settings = config(where, trust_remote_code)
    if where.diffusion:
        return _denoiser(where, settings, dtype, device, **options)
    task, auto = kind(settings)
    local = Path(where.name) if where.kind in ("folder", "embedded") else None
    if local is not None:
        from linearize.surgery.files import check_weights

        check_weights(local)
    # First, because it is cheap and is missing more often than anything else.
    processor = processor_of(where, task, trust_remote_code) if need_tokenizer else None
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    precision, notes = _dtype(dtype, settings, torch.device(device))
    try:
        loaded: Any = auto.from_pretrained(
            where.name,
            **({} if where.gguf else {"use_safetensors": True}),
            **where.arguments(),
            config=settings,
            dtype=precision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
        model, info = loaded
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _weights_refusal(where, error) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise StorageError(f"the weights of {where.name} are damaged ({error}): download them again") from error
    spare = {k for k in info["missing_keys"] if "pooler." in k and task != "text"}
    if missing := sorted(set(info["missing_keys"]) - spare):
        raise StorageError(f"{where.name} lacks {missing[0]} ({len(missing)} such tensors): it is damaged")
    if spare:  # left out by many encoders, and used by nothing here; transformers would fill it at random
        notes.append("the checkpoint has no pooler (its output is not used): zeros")
        with torch.no_grad():
            for key in spare:
                model.get_parameter(key).zero_()
    if where.gguf:
        model = _plain(model)
    if not options.get("device_map") and not options.get("quantization_config"):
        model = model.to(device)
    check_finite(model)
    if task != "image" and processor is not None:
        rows = model.get_input_embeddings().weight.shape[0]
        if len(processor) > rows:
            raise InputError(
                f"{where.name}: its tokenizer has {len(processor):,} pieces but the model only {rows:,} embeddings: "
                "they do not belong together"
            )
    return Loaded(model.eval(), processor, where.id, _commit(where), task, where, tuple(notes))


def _denoiser(where: Source, form: Any, dtype: Any, device: Any, **options: Any) -> Loaded:
    import torch

    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    precision, _ = _dtype("float32" if dtype == "auto" else dtype, form, torch.device(device))
    model = denoisers.load(where.name, form, precision, where.revision, **options).to(device)
    check_finite(model)
    scheduler = denoisers.load_scheduler(where.name, form, where.revision)
    return Loaded(model.eval(), scheduler, where.id, _commit(where), "diffusion", where)


def load_converted(
    where: str | Path | nn.Module | None = None, adapter: str | Path | None = None, **options: Any
) -> Loaded:
    """A converted model with its tokenizer: from the folder of a full checkpoint, or from a base and an adapter folder.

    where: folder or hub id of a converted model, or an adapter folder; with `adapter` its base (a model, a name, or
    None for the one that the adapter names). options: those of `load_model`. Raises InputError where nothing is
    converted or the base is another model than the adapter's, and what `load_model` raises.
    """
    from linearize.surgery import files
    from linearize.surgery.attach import Surgery

    if adapter is None and isinstance(where, str | Path) and files.is_adapter(Path(where)):
        where, adapter = None, where
    if adapter is not None and where is None:
        base = files.read_adapter(adapter)["base"]
        where, options = base["id"], {"revision": base["revision"], "task": base.get("task", "text"), **options}
    if where is None or isinstance(where, str | Path):
        loaded = load_model(where, **options)
        name = loaded.id or "the embedded teacher"
    else:
        loaded, name = Loaded(where, None, None, None, task_of(where), Source("", "object")), None
    if adapter is not None:
        files.load_adapter(loaded.model, adapter, name=name, revision=loaded.revision)
    elif Surgery.of(loaded.model) is None:
        raise InputError(f"{where or 'the embedded teacher'} is not a converted model: convert it first")
    return loaded


def load(where: str | Path | nn.Module | None = None, adapter: str | Path | None = None, **options: Any) -> Any:
    """`linearize.load`: the model alone of `load_converted`."""
    return load_converted(where, adapter, **{"need_tokenizer": False, **options}).model


def config_of(model: Any) -> Any:
    """The configuration of a model in hand, as `config` gives that of a name."""
    return denoisers.form_of_model(model) if dit.family(model) is not None else model.config


def type_of(model: Any) -> str:
    """What its makers call the architecture of a model in hand."""
    return getattr(model.config, "model_type", None) or type(model).__name__.removeprefix("Linearized")


def check_finite(model: nn.Module) -> None:
    """Raises GateError naming the first weight that holds NaN or infinity."""
    import torch

    for name, weight in model.named_parameters():
        if weight.device.type != "meta" and weight.is_floating_point() and not torch.isfinite(weight).all():
            raise GateError(f"weight {name} holds NaN or infinity: the checkpoint is broken, take another copy")


def _dtype(wanted: str | torch.dtype, config: Any, device: torch.device) -> tuple[torch.dtype | str, list[str]]:
    """(the dtype to load in, notes). Raises InputError for an unknown word."""
    import torch

    if isinstance(wanted, torch.dtype):
        return wanted, []
    if wanted != "auto":
        found = getattr(torch, wanted, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise InputError(f"dtype {wanted!r} is none: choose from auto, float32, bfloat16, float16")
        return found, []
    if getattr(config, "dtype", None) in (torch.float16, "float16") and device.type == "cpu":
        return torch.float32, ["the weights are stored in float16, which a CPU hardly computes in: loaded as float32"]
    return "auto", []


#: one of these is in the folder of every tokenizer; transformers makes an empty one where there is none
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def processor_of(where: Source, task: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, or its image processor; None for images where the folder holds none (configurations
    say enough then). Raises InputError for text without a tokenizer."""
    if task != "image":
        return _tokenizer(where, trust_remote_code)
    from linearize.data.images import image_processor

    return image_processor(where.name, trust_remote_code=trust_remote_code, **where.arguments())


def _tokenizer(where: Source, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    advice = f"{where.name} has no tokenizer: put tokenizer.json and tokenizer_config.json beside its config.json"
    if where.kind in ("folder", "embedded"):
        folder = Path(where.name)
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES) and not any(folder.glob("*.tiktoken")):
            raise InputError(advice)
    try:
        return AutoTokenizer.from_pretrained(where.name, trust_remote_code=trust_remote_code, **where.arguments())
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{advice} ({str(error).splitlines()[0]})") from error


def processor_of_model(model: Any, task: str) -> Any:
    """The tokenizer or image processor of a model in hand, from where the model came; for images None where that is
    not known. Raises InputError for text."""
    name = getattr(model, "name_or_path", "")
    if task == "diffusion":
        raise InputError(
            "a transformer says nothing of its noise: pass its scheduler, convert(..., tokenizer=scheduler)"
        )
    if not name and task == "image":
        return None
    if not name:
        raise InputError("this model does not say where it came from: pass its tokenizer, (..., tokenizer=...)")
    return processor_of(source(name), task)


def home(model: Any, where: Source | None = None) -> Path | None:
    """The folder that a model came from, where it is on this disk."""
    name = where.name if where is not None else getattr(model, "name_or_path", "")
    folder = Path(name) if name else None
    return folder if folder is not None and folder.is_dir() else None


def _plain(model: Any) -> Any:
    """A GGUF file's model as an ordinary one: transformers refuses to save what it has de-quantised itself."""
    from transformers import AutoModelForCausalLM

    settings = model.config.__class__.from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    fresh = AutoModelForCausalLM.from_config(settings, dtype=model.dtype)
    fresh.load_state_dict(model.state_dict())
    fresh.tie_weights()
    return fresh


def _commit(where: Source) -> str | None:
    """The commit that a hub model was loaded from, by the path of the cached file."""
    if where.kind != "hub":
        return None
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", "model_index.json"):
        path = try_to_load_from_cache(where.name, file, revision=where.revision or "main")
        if isinstance(path, str):
            return Path(path).parent.name
    return where.revision


def _weights_refusal(where: Source, error: Exception) -> InputError | Unsupported:
    said = str(error)
    if isinstance(error, ImportError):
        return InputError(said.strip().splitlines()[0])
    if "Unrecognized configuration class" in said:
        return Unsupported(f"{where.name}: transformers has no model of this kind for its configuration")
    if "safetensors" in said and where.kind == "hub":
        return InputError(
            f"{where.name} has no safetensors on the hub (other formats may run code when opened and never are): "
            "convert it, or name another copy"
        )
    return _refusal(where, error)
