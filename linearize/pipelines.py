"""The plug-in for diffusers: one line puts a method into a pipeline, one takes it out without a trace.

handle = linearize.pipelines.apply(pipe, "clear", radius=8)
print(handle.report(grid=(128, 128)))
with handle.disabled():
    pipe(prompt)                                    # the base model
handle.save("clear-r8"); handle.remove()
handle = linearize.pipelines.load(pipe, "clear-r8")
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from linearize.mixers import base as mixers
from linearize.mixers.base import MixerConfig
from linearize.seams import dit, hooks
from linearize.storage import atomic_folder
from linearize.surgery import plugin
from linearize.surgery.attach import Surgery, attach
from linearize.surgery.plugin import named as _named
from linearize.surgery.port import CHILD, PORT
from linearize.surgery.select import find, parse_layers
from linearize.types import InputError, Site, Unsupported

log = logging.getLogger("linearize")

#: where pipelines keep what denoises
_COMPONENTS = ("transformer", "transformer_2", "unet")
#: how much fewer FLOPs a step must take to be faster. CLEAR on FLUX, radius 8: 1.1 times fewer at 1,024^2 and no gain
#: in time, 1.5 at 2,048^2 and 1.3 times faster (times: 2412.16112, table 7).
WORTH = 1.2


# ----------------------------------------------------------------------------------------------------------- the report
@dataclass(frozen=True)
class Report:
    """What a plug-in replaced, and what that saves at one size. FLOPs are of one forward at batch 1.

    replaced: names of layers. skipped: name -> why. attention: (before, after) of the replaced layers; rest: everything
    else. crossover: the smallest square grid (its side, in tokens) from which a step saves WORTH (None: never).
    """

    method: str
    settings: dict[str, Any]
    grid: tuple[int, ...]
    text: int
    replaced: tuple[str, ...]
    skipped: dict[str, str]
    attention: tuple[float, float]
    rest: float
    crossover: int | None

    @property
    def saving(self) -> float:
        """FLOPs of a step before, over those after: what its time can win at most."""
        return (self.attention[0] + self.rest) / (self.attention[1] + self.rest)

    @property
    def gain(self) -> bool:
        """Whether a step is predicted to be faster at this size."""
        return self.saving >= WORTH

    def __str__(self) -> str:
        size = " x ".join(map(str, self.grid))
        before, after = (x / 1e12 for x in self.attention)
        far = "at no size" if self.crossover is None else f"from {self.crossover} x {self.crossover} tokens on"
        lines = [
            f"{self.method} {json.dumps(self.settings, sort_keys=True)}",
            f"{len(self.replaced)} layers replaced, {len(self.skipped)} left alone",
            *(f"  left alone: {name}: {why}" for name, why in self.skipped.items()),
            f"one step at {size} tokens and {self.text} of text: attention {before:.3g} -> {after:.3g} TFLOPs, "
            f"all {before + self.rest / 1e12:.3g} -> {after + self.rest / 1e12:.3g} ({self.saving:.2f}x)",
            f"a gain in time is predicted {far}" + ("" if self.gain else f": none at {size}"),
        ]
        return "\n".join(lines)


def _attention_flops(surgery: Surgery, grid: tuple[int, ...], text: int) -> tuple[float, float]:
    before = after = 0.0
    for mixer in surgery.mixers.values():
        shape, others = mixer.shape, text if mixer.shape.joint else 0
        tokens = math.prod(grid) + others
        before += 2.0 * tokens**2 * shape.heads * (shape.key_dim + shape.value_dim)
        after += mixer.cost_of(grid, others).flops
    return before, after


def _other_flops(model: nn.Module, tokens: int) -> float:
    """Products with weights that every token passes; those of the time's and size's embeddings are passed once."""
    parts = [
        m.in_features * m.out_features for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and not any(word in n for word in ("norm", "emb", "modulation"))
    ]  # fmt: skip
    return 2.0 * tokens * sum(parts)


# ----------------------------------------------------------------------------------------------------------- the handle
@dataclass
class Handle:
    """A plug-in: all that one `apply` or `load` put into a pipeline. As a context manager it removes itself. lora: the
    name of the one that came with it. ropes: modules whose base is stretched by `ntk`, and the base they had.
    """

    surgeries: dict[str, Surgery]
    method: str
    settings: MixerConfig
    skipped: dict[str, str] = field(default_factory=dict)
    lora: str | None = None
    ropes: dict[Any, float] = field(default_factory=dict)
    ntk: float | None = None

    @property
    def enabled(self) -> bool:
        return all(port.mode == "student" for s in self.surgeries.values() for port in s._ports())

    def enable(self) -> None:
        """The method's attention answers again."""
        self._switch(True)

    def disable(self) -> None:
        """The base model's own softmax answers; LoRA stays as it is, but for the plug-in's own."""
        self._switch(False)

    def _switch(self, on: bool) -> None:
        if not any(surgery.mixers for surgery in self.surgeries.values()):
            raise InputError("this plug-in was removed: apply or load it again")
        for surgery in self.surgeries.values():
            surgery.switch(on)
            for layer in plugin.lora_layers(surgery.model, self.lora).values() if self.lora else ():
                layer.set_scale(self.lora, 1.0 if on else 0.0)
        self._stretch(on)

    def _stretch(self, on: bool) -> None:
        for rope, theta in self.ropes.items():
            rope.theta = theta * self.ntk if on and self.ntk is not None else theta

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, for one call."""
        before = self.enabled
        self.disable()
        try:
            yield
        finally:
            self._switch(before)

    def remove(self) -> None:
        """Take it out: the same classes, processor objects, state-dict keys and hooks as before, bit for bit."""
        for surgery in self.surgeries.values():
            if self.lora and surgery.mixers:
                plugin.eject_lora(surgery.model, self.lora)
            surgery.detach()
        self._stretch(False)
        self.ropes = {}

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def parameters(self) -> list[nn.Parameter]:
        """What the method brought along and can be trained (CLEAR: nothing)."""
        return [p for surgery in self.surgeries.values() for p in surgery.parameters()]

    def report(self, grid: tuple[int, ...] | None = None, text: int = 512) -> Report:
        """What was replaced, and what a step costs at `grid` tokens (rows, columns) or (frames, rows, columns).

        grid: by default the model's own size. text: tokens of the prompt in joint attention.
        """
        first = next(iter(self.surgeries.values())).model
        size = grid or _usual_grid(first)
        joint = any(m.shape.joint for s in self.surgeries.values() for m in s.mixers.values())
        text = text if joint else 0

        def costs(size: tuple[int, ...]) -> tuple[float, float, float]:
            pairs = [_attention_flops(s, size, text) for s in self.surgeries.values()]
            rest = sum(_other_flops(s.model, math.prod(size) + text) for s in self.surgeries.values())
            return sum(p[0] for p in pairs), sum(p[1] for p in pairs), rest

        def saves(side: int) -> bool:
            before, after, rest = costs((*size[:-2], side, side))
            return before + rest >= WORTH * (after + rest)

        before, after, rest = costs(size)
        return Report(
            method=self.method,
            settings=self.settings.model_dump(mode="json"),
            grid=size,
            text=text,
            replaced=tuple(_named(part, n) for part, s in self.surgeries.items() for n in s.mixers),
            skipped=dict(self.skipped),
            attention=(before, after),
            rest=rest,
            crossover=next((side for side in range(8, 2049, 8) if saves(side)), None),
        )

    # ---------------------------------------------------------------------------------------------------------- files
    def save(self, folder: str | Path, overwrite: bool = False, *, lora: str | None = None) -> Path:
        """Write it: the method's tensors as one safetensors file, everything else as json. Returns the folder.

        lora: the name of a LoRA to keep along, one that was trained with the method (None: the one it was loaded with);
        others are saved as LoRA of the pipeline. Base weights are not in it. Raises InputError for a folder that is not
        empty (without `overwrite`) or an unknown LoRA, StorageError.
        """
        with atomic_folder(folder, overwrite) as part:
            plugin.write(part, self.surgeries, self.method, self.settings, lora=lora or self.lora, ntk=self.ntk)
        return Path(folder)


def _usual_grid(model: Any) -> tuple[int, ...]:
    config = model.config
    size, patch = getattr(config, "sample_size", None), getattr(config, "patch_size", 1) or 1
    if isinstance(size, int) and isinstance(patch, int):
        return size // patch, size // patch
    return 64, 64  # 1,024 x 1,024 pixels in latents of an eighth, two by two


# ------------------------------------------------------------------------------------------------------------- plugging
def apply(
    pipe_or_model: Any,
    method: str = "clear",
    *,
    layers: str = "all",
    probe: Callable[[nn.Module], Any] | bool = True,
    ntk: float | None = None,
    **settings: Any,
) -> Handle:
    """Put `method` in the place of softmax in a pipeline's transformer(s) or UNet, or in one such model.

    settings: the method's own (`radius=8`). layers: "all", "0-11", "every:2", ... of the attentions that can be
    replaced. probe: see `attach`. ntk: for images larger than those of training, the base of RoPE times this (CLEAR,
    2412.16112, has 10 at four times the side, with `proportional=4608` for FLUX). Idempotent: the same again returns
    the same. Raises InputError where other methods hold these layers, naming the first, Unsupported where a model or
    method cannot be converted; the models are then as they were.
    """
    config = mixers.configure(method, settings)
    chosen: dict[str, list[Site]] = {}
    skipped: dict[str, str] = {}
    models = _denoisers(pipe_or_model)
    for part, model in models.items():
        sites = find(model)
        chosen[part] = parse_layers(layers, sites)
        skipped |= {_named(part, name): why for name, why in _skipped(model, sites, chosen[part]).items()}
    handles = [_standing(part, models[part], sites, method, config) for part, sites in chosen.items()]
    if all(handles):
        if ntk is not None:
            raise InputError("this plug-in is in its place already: remove() it first, then apply it with ntk")
        return Handle({part: s for part, s in zip(chosen, handles) if s is not None}, method, config, skipped)
    ropes = {part: _rope(model) for part, model in models.items()} if ntk is not None else {}
    done: dict[str, Surgery] = {}
    try:
        for part, sites in chosen.items():
            done[part] = attach(models[part], sites, method, config, probe=probe, beside=True)
    except BaseException:
        for surgery in done.values():
            surgery.detach()
        raise
    handle = Handle(done, method, config, skipped, ropes={rope: rope.theta for rope in ropes.values()}, ntk=ntk)
    handle._stretch(True)
    return handle


def _rope(model: nn.Module) -> Any:
    """The module that makes RoPE's angles from its `theta` at each forward. Raises Unsupported for other families."""
    rope = getattr(model, "pos_embed", None)
    if not isinstance(getattr(rope, "theta", None), int | float) or not hasattr(rope, "axes_dim"):
        raise Unsupported(f"{type(model).__name__} computes no RoPE from a base of its own: leave ntk out")
    return rope


def _denoisers(pipe_or_model: Any) -> dict[str, nn.Module]:
    """component -> model; "" for a model that stands alone. Raises InputError."""
    inner = getattr(pipe_or_model, "_orig_mod", pipe_or_model)
    if isinstance(inner, nn.Module):
        return {"": inner}
    found = {name: getattr(inner, name, None) for name in _COMPONENTS}
    models = {n: getattr(m, "_orig_mod", m) for n, m in found.items()}
    models = {n: m for n, m in models.items() if isinstance(m, nn.Module)}
    if not models:
        raise InputError(f"{type(inner).__name__} has none of {', '.join(_COMPONENTS)}: pass the model itself")
    return models


def _skipped(model: nn.Module, sites: list[Site], chosen: list[Site]) -> dict[str, str]:
    kept = {site.name for site in sites} - {site.name for site in chosen}
    out = dict.fromkeys(sorted(kept), "not among the layers asked for")
    for name, module, owner in dit.attentions(model):
        row = dit.family(model.get_submodule(owner))
        if row is not None and (why := dit.left_alone(row, name, module)):
            out[name] = why
    return out


def _standing(part: str, model: nn.Module, sites: list[Site], method: str, config: MixerConfig) -> Surgery | None:
    """The surgery of a plug-in that stands on exactly these layers already. Raises InputError where another does."""
    here = [site for site in sites if PORT in model.get_submodule(site.name).__dict__]
    if not here:
        return None
    mixer = getattr(model.get_submodule(here[0].name), CHILD)
    same = all(_carries(model.get_submodule(site.name), method, config) for site in here)
    if not same or len(here) != len(sites):
        first = f"{mixers.name_of(type(mixer))} {mixer.config.model_dump_json(exclude_defaults=True)}"
        raise InputError(
            f"{_named(part, here[0].name)} is held by another plug-in, {first}: remove() that first, or choose other "
            "layers"
        )
    surgery = Surgery(model, method, config)
    surgery._modules = {site.name: model.get_submodule(site.name) for site in here}
    return surgery


def _carries(module: nn.Module, method: str, config: MixerConfig) -> bool:
    mixer = getattr(module, CHILD, None)
    return mixer is not None and mixers.name_of(type(mixer)) == method.replace("-", "_") and mixer.config == config


def load(pipe_or_model: Any, folder: str | Path, *, revision: str | None = None) -> Handle:
    """Put a saved plug-in (a folder, or a repository's id on the hub) into the base it was made for.

    The base is recognised by its answers on stored noise, so that other precisions and devices are taken, with a
    warning where they are far off. A LoRA saved along is put in as well. Raises InputError for another base, which
    stays as it was; Unsupported for a newer format; StorageError for a damaged folder.
    """
    folder = _fetched(folder, revision)
    said = plugin.read(folder)
    if (folder / plugin.WHOLE).is_file():
        raise InputError(f"{folder} is a whole model, no plug-in: linearize.load({str(folder)!r})")
    tensors = plugin.tensors_of(folder)
    models = _denoisers(pipe_or_model)
    if set(models) != set(said["components"]):
        if len(models) != 1 or len(said["components"]) != 1:
            raise InputError(f"{folder} is for {_list(said['components'])}, this has {_list(models)}")
        models = {next(iter(said["components"])): next(iter(models.values()))}  # a bare model for a pipeline's
    config = mixers.configure(said["method"], said["mixer"])
    chosen, lora = {}, said.get("lora")
    for part, model in models.items():
        there = said["components"][part]
        plugin.recognise(folder, model, there)
        sites = {site.name: site for site in find(model)}
        if missing := [name for name in there["sites"] if name not in sites]:
            raise InputError(f"{folder} converts {missing[0]}, but {type(model).__name__} has no attention there")
        chosen[part] = [sites[name] for name in there["sites"]]
        _standing(part, model, chosen[part], said["method"], config)
        if lora and plugin.lora_layers(model, lora):
            raise InputError(f"{_named(part, lora)}: a LoRA of this name is in the model already: take it out first")
    done: dict[str, Surgery] = {}
    skipped: dict[str, str] = {}
    try:
        for part, sites in chosen.items():
            skipped |= {_named(part, n): why for n, why in _skipped(models[part], find(models[part]), sites).items()}
            done[part] = attach(models[part], sites, said["method"], config, beside=True)
            if lora:
                _inject(models[part], lora, said["components"][part]["lora"])
        here = {_named(part, n): getattr(*place) for part, s in done.items() for n, place in plugin.own(s).items()}
        for part, surgery in done.items() if lora else ():
            here |= {_named(part, n): t for n, t in plugin.lora_tensors(surgery.model, lora).items()}
        plugin.fill(folder, here, tensors)
    except BaseException:
        for surgery in done.values():
            if lora:
                plugin.eject_lora(surgery.model, lora)
            surgery.detach()
        raise
    ropes = {rope: rope.theta for rope in map(_rope, models.values())} if said.get("ntk") else {}
    handle = Handle(done, said["method"], config, skipped, lora, ropes, said.get("ntk"))
    handle._stretch(True)
    return handle


def _inject(model: Any, name: str, settings: Mapping[str, Any]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    training = model.training
    before = {n: list(m.active_adapters) for n, m in model.named_modules() if hasattr(m, "lora_A")}
    inject_adapter_in_model(LoraConfig(**settings), model, adapter_name=name)
    model.train(training)
    for place, layer in plugin.lora_layers(model, name).items():
        hooks.lora_choose(layer, [*before.get(place, ()), name])  # beside the user's own
    for place in before.keys() - plugin.lora_layers(model, name).keys():
        hooks.lora_choose(model.get_submodule(place), before[place])
    for parameter in plugin.lora_tensors(model, name).values():
        parameter.requires_grad_(False)


def _list(names: Any) -> str:
    return ", ".join(sorted(n or "a model alone" for n in names))


def _fetched(folder: str | Path, revision: str | None) -> Path:
    if Path(folder).is_dir():
        return Path(folder)
    text = str(folder)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise InputError(f"no folder {folder}, and no repository's id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=[plugin.CONFIG, plugin.WEIGHTS]))
    except Exception as error:  # offline, absent, private: the hub has a class for each
        raise InputError(f"{text} is no folder here, and could not be fetched from the hub: {error}") from None
