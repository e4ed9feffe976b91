"""Surgery: the only place that makes subclasses of attention modules, and the handle that undoes it.

A converted module keeps its parameters and its name; its class becomes a made subclass whose forward hands the call's
context to a port; its mixer is the one child `linearize_mixer`. Nothing else in the model changes.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.mixers import base as mixers
from linearize.mixers.base import Mixer, MixerConfig
from linearize.seams import hf, interface, sdpa
from linearize.seams.cache import StateLayer, state_layer
from linearize.surgery.select import find, original_class
from linearize.types import Context, InputError, Rotary, Site, Unsupported

#: the child module that holds a mixer; families own names like `linear_attn` themselves
CHILD = "linearize_mixer"
PORT = "linearize_port"

Watcher = Callable[[Site, Mixer, Tensor, Tensor, Tensor, Context, Tensor], None]


@dataclass
class Call:
    """What one forward of an attention module was given, kept only while it runs."""

    hidden: Tensor | None
    position_embeddings: Any
    positions: Tensor | None
    layer: StateLayer | None


@dataclass
class Port:
    """Between an attention module and its mixer. mode: "student" (the mixer answers), "teacher" (softmax does)."""

    site: Site
    cls: type[nn.Module]
    parameters: tuple[str, ...]
    teacher: str  # implementation name of the family's own softmax
    config: Any  # the module's own config object, to put back
    mode: str = "student"
    watcher: Watcher | None = None
    rotates: bool = True
    rotary_channels: int | None = None  # how many channels of a head the family rotates (None: as many as cos has)
    call: Call | None = None
    fired: int = 0
    seen: list[Any] = field(default_factory=list)
    plain: list[Any] = field(default_factory=list)  # probe: q and k as they are without rotation
    wants_plain: bool = False

    # ------------------------------------------------------------------------------------- around forward
    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Record the call's context."""
        named = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        cross = any(named.get(n) is not None for n in ("key_value_states", "encoder_hidden_states"))
        if cross:
            raise Unsupported(f"{self.site.name} was called as cross-attention (with keys of its own): leave it")
        cache = next((a for a in (*kwargs.values(), *args) if isinstance(a, hf.Cache | hf.EncoderDecoderCache)), None)
        self.call = Call(
            hidden=args[0] if args else named.get("hidden_states"),
            position_embeddings=named.get("position_embeddings"),
            positions=named.get("position_ids"),
            layer=self._layer(module, cache),
        )

    def _layer(self, module: nn.Module, cache: Any) -> StateLayer | None:
        if cache is None or self.site.layer is None:
            return None
        if self.mode == "student" and self.watcher is None:
            return state_layer(cache, self.site.layer) if getattr(module, CHILD).recurrent else None
        own = cache.self_attention_cache if isinstance(cache, hf.EncoderDecoderCache) else cache
        if len(own.layers) > self.site.layer and isinstance(own.layers[self.site.layer], StateLayer):
            raise InputError("this cache holds the student's state; the teacher needs a cache of its own")
        return None

    # ------------------------------------------------------------------------------------- inside forward
    def answer(
        self, module: nn.Module, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, mask: Any, **kwargs: Any
    ) -> Tensor:
        """o_BHTV of this call, from the mixer or from the teacher."""
        assert self.call is not None

        def teacher() -> Tensor:
            return self._softmax(module, q_BHTK, k_BGTK, v_BGTV, mask, kwargs)

        if self.mode == "plain":
            self.plain = [q_BHTK, k_BGTK]
            return teacher()
        self.fired += 1
        if self.mode == "probe":
            self.seen.append((q_BHTK, k_BGTK, v_BGTV, self._rotary()))
            return teacher()
        if self.mode == "teacher":
            return teacher()
        mixer = getattr(module, CHILD)
        ctx = self._context(q_BHTK, k_BGTK, mask, kwargs.get("scaling", kwargs.get("scale")), mixer, teacher)
        if self.watcher is None:
            return mixer(q_BHTK, k_BGTK, v_BGTV, ctx)
        out = teacher()
        self.watcher(self.site, mixer, q_BHTK, k_BGTK, v_BGTV, ctx, out)
        return out

    def _context(self, q_BHTK, k_BGTK, mask, scale, mixer: Mixer, teacher) -> Context:
        call, T = self.call, q_BHTK.shape[2]
        assert call is not None
        valid = segments = None
        if "mask" not in mixer.needs:
            if k_BGTK.shape[2] != T:
                raise RuntimeError(f"{self.site.name}: {k_BGTK.shape[2]} keys for {T} queries: what cache is that?")
            column = call.layer.column if call.layer is not None else 0
            valid, segments = interface.read_mask(mask, T, column, packed=call.layer is None)
        return Context(
            causal=self.site.shape.causal,
            scale=self.site.shape.scale if scale is None else float(scale),
            valid_BT=valid,
            segments_BT=segments,
            positions_BT=call.positions,
            rotary=self._rotary() if mixer.needs_rotary and self.rotates else None,
            hidden_BTD=call.hidden if "hidden" in mixer.needs else None,
            mask=mask if "mask" in mixer.needs else None,
            slot=call.layer.slot if call.layer is not None else None,
            teacher=teacher,
        )

    def _rotary(self) -> Rotary | None:
        assert self.call is not None
        apply = getattr(sys.modules[self.cls.__module__], "apply_rotary_pos_emb", None)
        if self.call.position_embeddings is None or apply is None:
            return None
        cos, sin = self.call.position_embeddings
        return Rotary(cos, sin, apply, self.rotary_channels or cos.shape[-1])

    def _softmax(self, module: nn.Module, q, k, v, mask, kwargs: dict[str, Any]) -> Tensor:
        if self.site.seam == "sdpa":
            with torch._C.DisableTorchFunction():
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, **kwargs)
        function = hf.attention_function(self.cls, self.teacher)
        out_BTHV, _ = function(module, q, k, v, mask, **kwargs)
        return out_BTHV.transpose(1, 2)


def _made_subclass(cls: type[nn.Module], seam: str) -> type[nn.Module]:
    """`cls` with a forward that passes its context to the port, and always clears it."""
    key = (cls, seam)

    def run(module: nn.Module, port: Port, args: tuple, kwargs: dict[str, Any]) -> Any:
        if seam == "interface":
            return cls.forward(module, *args, **kwargs)
        with sdpa.Redirect(lambda q, k, v, mask, **more: port.answer(module, q, k, v, mask, **more)):
            return cls.forward(module, *args, **kwargs)

    if key not in _made:

        class Linearized(cls):  # type: ignore[misc, valid-type]
            linearize_original = cls

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                port: Port = self.__dict__[PORT]
                port.enter(self, args, kwargs)
                try:
                    if port.wants_plain and kwargs.get("position_embeddings") is not None:
                        cos, sin = kwargs["position_embeddings"]
                        unrotated = (torch.ones_like(cos), torch.zeros_like(sin))
                        port.mode = "plain"
                        run(self, port, args, {**kwargs, "position_embeddings": unrotated})
                        port.mode = "probe"
                    return run(self, port, args, kwargs)
                finally:
                    port.call = None

        Linearized.__name__ = f"Linearized{cls.__name__}"
        Linearized.__qualname__ = Linearized.__name__
        _made[key] = Linearized
    return _made[key]


_made: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


@contextlib.contextmanager
def _reclassing(name: str, module: nn.Module) -> Iterator[None]:
    """Around a change of class: a forward in the instance dict would make it silently useless.

    accelerate's hook looks its inner forward up at every call, so it is given the new class's; what a removed hook
    leaves behind is taken away. Raises Unsupported naming whoever else replaced the forward.
    """
    outer = module.__dict__.get("forward")
    owner = getattr(getattr(outer, "func", outer), "__module__", None) or "unknown code"
    hooked = owner == "accelerate.hooks" and "_old_forward" in module.__dict__
    inner = module.__dict__["_old_forward"] if hooked else outer
    if inner is not None:
        function = getattr(inner, "__func__", None)
        if function is None or not any(vars(cls).get("forward") is function for cls in type(module).__mro__):
            owner = getattr(inner, "__module__", None) or owner if hooked else owner
            raise Unsupported(
                f"{name}: its forward was replaced on the instance (by {owner}), so surgery would silently do nothing; "
                "remove that hook, attach, then put the hook back"
            )
        if not hooked:
            del module.__dict__["forward"]
    try:
        yield
    finally:
        if hooked:
            module.__dict__["_old_forward"] = type(module).forward.__get__(module)


def _device(module: nn.Module) -> torch.device:
    """Where `module` computes: its weights' device, or the one that offloading hooks bring them to; else meta."""
    for part in module.modules():
        found = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if found is not None:
            return torch.device(found)
    weights = [p for p in module.parameters() if p.device.type != "meta"]
    return weights[0].device if weights else torch.device("meta")


def method_name(mixer: type[Mixer]) -> str:
    """The name of a mixer's method: that of its file."""
    return mixer.__module__.rpartition(".")[2]


class Surgery:
    """The handle of a converted model. Modes are switched here; `detach` puts everything back, bit-exactly."""

    def __init__(self, model: nn.Module, method: str, config: MixerConfig) -> None:
        self.model = model
        self.method = method
        self.config = config
        self._modules = {n: m for n, m in model.named_modules() if PORT in m.__dict__}

    @staticmethod
    def of(model: nn.Module) -> Surgery | None:
        """The handle of a model that is already converted (loaded, copied), or None."""
        for module in model.modules():
            if PORT in module.__dict__:
                mixer = getattr(module, CHILD)
                return Surgery(model, method_name(type(mixer)), mixer.config)
        return None

    # ----------------------------------------------------------------------------------------------- looking
    @property
    def sites(self) -> list[Site]:
        return [port.site for port in self._ports()]

    @property
    def mixers(self) -> dict[str, Mixer]:
        """Mixers by site name."""
        return {name: getattr(module, CHILD) for name, module in self._modules.items()}

    def parameters(self) -> list[nn.Parameter]:
        """The mixers' parameters, in the order of the sites."""
        return [p for mixer in self.mixers.values() for p in mixer.parameters()]

    def _ports(self) -> list[Port]:
        return [module.__dict__[PORT] for module in self._modules.values()]

    # --------------------------------------------------------------------------------------------- switching
    @contextlib.contextmanager
    def teacher(self) -> Iterator[None]:
        """The model as it was: the family's own softmax at every site, and LoRA off where it was injected."""
        adapters = [m for m in self.model.modules() if hasattr(m, "enable_adapters") and hasattr(m, "lora_A")]
        active = [m for m in adapters if not m.disable_adapters]
        before = [port.mode for port in self._ports()]
        for port in self._ports():
            port.mode = "teacher"
        for module in active:
            module._disable_adapters = True  # peft's own flag; enable_adapters() would also touch requires_grad
        self._sync_masks()
        try:
            yield
        finally:
            for port, mode in zip(self._ports(), before, strict=True):
                port.mode = mode
            for module in active:
                module._disable_adapters = False
            self._sync_masks()

    @contextlib.contextmanager
    def watch(self, watcher: Watcher) -> Iterator[None]:
        """The stream stays the teacher's; each site calls watcher(site, mixer, q, k, v, ctx, teacher's o_BHTV)."""
        for port in self._ports():
            port.watcher = watcher
        self._sync_masks()
        try:
            yield
        finally:
            for port in self._ports():
                port.watcher = None
            self._sync_masks()

    @contextlib.contextmanager
    def ablate(self, branch: str) -> Iterator[None]:
        """Run without one branch, "window_off" or "linear_off". Raises InputError where no mixer has it."""
        having = [m for m in self.mixers.values() if branch in m.branches]
        if not having:
            raise InputError(f"method {self.method!r} as configured has no branch to ablate with {branch!r}")
        for mixer in having:
            mixer.off = branch
        try:
            yield
        finally:
            for mixer in having:
                mixer.off = None

    def _sync_masks(self) -> None:
        """Let the model build token codes instead of T x T masks while only mixers read them."""
        for config, ports in self._hosts():
            original = ports[0].teacher
            only_mixers = all(p.mode == "student" and p.watcher is None for p in ports) and not any(
                "mask" in getattr(m, CHILD).needs for m in self._modules.values()
            )
            everything = only_mixers and self._covers(config)
            hf.set_implementation(config, interface.NAME if everything else original)

    def _hosts(self) -> list[tuple[Any, list[Port]]]:
        """The config objects whose models build masks for converted modules, with their ports."""
        hosts: dict[int, tuple[Any, list[Port]]] = {}
        for port in self._ports():
            if port.site.seam == "interface":
                hosts.setdefault(id(port.config), (port.config, []))[1].append(port)
        return list(hosts.values())

    def _covers(self, config: Any) -> bool:
        """Whether every attention module that reads `config` is converted."""
        for module in self.model.modules():
            kept = PORT not in module.__dict__ and getattr(module, "config", None) is config
            if kept and interface.reaches(original_class(module)):
                return False
        return True

    # ------------------------------------------------------------------------------------------------ undoing
    def detach(self) -> None:
        """Restore classes, configs and implementation names and delete the mixers: the model as it was, bit-exactly."""
        for name, module in self._modules.items():
            if PORT not in module.__dict__:  # detached already, through another handle
                continue
            port: Port = module.__dict__[PORT]
            with _reclassing(name, module):
                module.__class__ = port.cls
                if port.site.seam == "interface":
                    module.config = port.config
                    hf.set_implementation(port.config, port.teacher)
                delattr(module, CHILD)
                del module.__dict__[PORT]
        self._modules = {}


def attach(
    model: nn.Module,
    sites: Sequence[Site] | None,
    method: str | type[Mixer],
    config: MixerConfig | dict[str, Any] | None = None,
    *,
    probe: Callable[[nn.Module], Any] | None | bool = True,
) -> Surgery:
    """Replace softmax at `sites` (None: everywhere) by `method`. Idempotent: an earlier conversion is detached first.

    method: a name, or a Mixer class of your own. config: the mixer's settings. probe: one small forward after the
    surgery proves that every site fired exactly once with the shapes it was planned for; pass a callable for models
    that need special inputs, False to skip (meta).
    Raises Unsupported when the method does not fit, a hook is in the way, or the probe fails; the model is then as it
    was.
    """
    chosen = find(model) if sites is None else list(sites)
    settings = mixers.configure(method, config)
    for site in chosen:
        if site.heads is not None:
            raise Unsupported(f"{site.name}: head-level hybrids (Site.heads) are not built yet; convert whole layers")
    if earlier := Surgery.of(model):
        earlier.detach()
    interface.register()
    surgery = Surgery(model, method_name(mixers.get(method)), settings)
    try:
        for site in chosen:
            module = model.get_submodule(site.name)
            with _reclassing(site.name, module):
                _operate(module, site, method, settings)
            surgery._modules[site.name] = module
        if probe is not False:
            _probe(surgery, probe if callable(probe) else _default_probe)
        surgery._sync_masks()
    except BaseException:
        surgery._modules = {n: m for n, m in model.named_modules() if PORT in m.__dict__}
        surgery.detach()
        raise
    return surgery


def _operate(module: nn.Module, site: Site, method: str | type[Mixer], settings: MixerConfig) -> None:
    cls = type(module)
    mixer = mixers.build(method, site.shape, settings).to(_device(module))
    mixer.warm_start(module)
    mixer.train(module.training)
    own = getattr(module, "config", None)
    port = Port(
        site=site,
        cls=cls,
        parameters=tuple(p for p in inspect.signature(cls.forward).parameters if p != "self"),
        teacher=hf.get_implementation(own) if site.seam == "interface" else "sdpa",
        config=own,
    )
    if site.seam == "interface":
        if port.teacher not in ("sdpa", "eager"):  # flash hands on no documents, flex no mask that can be read
            raise Unsupported(f"masks of {port.teacher} cannot be read; load the model with attn_implementation='sdpa'")
        module.config = copy.copy(own)  # only converted modules are routed to the mixers
        hf.set_implementation(module.config, interface.NAME)
    module.add_module(CHILD, mixer)
    module.__dict__[PORT] = port
    module.__class__ = _made_subclass(cls, site.seam)


def _default_probe(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    device = _device(model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not hasattr(text, "vocab_size"):
        raise InputError("attach cannot make inputs for this model: pass probe=lambda model: model(...)")
    ids = torch.arange(5, device=device)[None] % text.vocab_size
    return model(input_ids=ids, **({"use_cache": False} if hasattr(text, "use_cache") else {}))


def _probe(surgery: Surgery, run: Callable[[nn.Module], Any]) -> None:
    """Run once as the teacher and check what arrives at each site."""
    model, ports = surgery.model, surgery._ports()
    training = model.training
    model.eval()
    try:
        for port, mixer in zip(ports, surgery.mixers.values(), strict=True):
            port.mode, port.wants_plain, port.fired = "probe", mixer.needs_rotary, 0
        with torch.no_grad():
            run(model)
        if missed := [p for p in ports if p.fired != 1]:
            raise Unsupported(
                f"{missed[0].site.name} was reached {missed[0].fired} times by one forward, not once "
                f"({len(missed)} of {len(ports)} sites); a hook or wrapper is in the way"
            )
        for port in ports:
            _check_shapes(port)
            if port.wants_plain:
                _check_rotary(port)
    finally:
        for port in ports:
            port.mode, port.wants_plain = "student", False
            port.seen.clear()
            port.plain.clear()
        model.train(training)


def _check_shapes(port: Port) -> None:
    q, k, v, _ = port.seen[0]
    s = port.site.shape
    found = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    if found != (s.heads, s.kv_heads, s.key_dim, s.value_dim):
        raise Unsupported(
            f"{port.site.name}: planned for (heads, kv heads, key dim, value dim) = "
            f"{(s.heads, s.kv_heads, s.key_dim, s.value_dim)}, but the model computes {found}"
        )


def _check_rotary(port: Port) -> None:
    """Does undoing the rotation give back what the family had before it? Exact on most; layers without RoPE skip it."""
    q, k, _, rotary = port.seen[0]
    if rotary is None or not port.plain:
        raise Unsupported(f"{port.site.name}: rope: undo has nothing to undo, this family has no rotary embedding")
    q_plain, k_plain = port.plain
    if torch.equal(q, q_plain) and torch.equal(k, k_plain):
        port.rotates = False  # a NoPE layer: there is nothing to undo, and q, k are already plain
        return
    for channels in (rotary.channels, 2 * rotary.channels):
        if all(_undoes(replace(rotary, channels=channels), *pair) for pair in ((q, q_plain), (k, k_plain))):
            port.rotary_channels = channels
            return
    raise Unsupported(
        f"{port.site.name}: this family's rotary embedding cannot be undone (it permutes channels or rotates a part of "
        "its own); use rope: keep"
    )


def _undoes(rotary: Rotary, x: Tensor, plain: Tensor) -> bool:
    if rotary.channels > x.shape[-1]:
        return False
    try:
        back = rotary.undo(x)
    except RuntimeError:  # the family's function does not take this many channels
        return False
    return bool((back - plain).abs().max() <= 1e-3 * plain.abs().max().clamp(min=1e-6))
