"""Surgery: where attention modules change their class, and the handle that undoes it.

A converted module keeps its parameters and its name; its class becomes a subclass made in port.py (nowhere else),
whose forward hands the call's context to a port; its mixer is the one child `linearize_mixer`. Nothing else in the
model changes.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from linearize.mixers import base as mixers
from linearize.mixers.base import Mixer, MixerConfig
from linearize.seams import dit, grid, hf, hooks, interface
from linearize.surgery.port import CHILD, PORT, Port, Watcher, made_subclass
from linearize.surgery.probe import probe as check
from linearize.surgery.probe import reach, small_forward
from linearize.surgery.renew import renew
from linearize.surgery.select import BIAS, WINDOWED, find, original_class
from linearize.types import InputError, Site, Unsupported, nearest

log = logging.getLogger(__name__)


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
                return Surgery(model, mixers.name_of(type(mixer)), mixer.config)
        return None

    # ----------------------------------------------------------------------------------------------- looking
    @property
    def sites(self) -> list[Site]:
        return [port.site for port in self._ports()]

    @property
    def mixers(self) -> dict[str, Mixer]:
        """Mixers by site name (none where another handle detached them)."""
        return {name: getattr(module, CHILD) for name, module in self._modules.items() if PORT in module.__dict__}

    @property
    def calls(self) -> int | None:
        """How often one forward of the model calls its mixers (layers may share one); None where that was not
        counted."""
        counted = [port.calls for port in self._ports()]
        return None if None in counted else sum(n for n in counted if n is not None)

    def parameters(self) -> list[nn.Parameter]:
        """The mixers' parameters, in the order of the sites, and projections that started afresh."""
        new = [r.aside if port.mode == "teacher" else r.present for port in self._ports() for r in port.renewed]
        return [*(p for mixer in self.mixers.values() for p in mixer.parameters()), *new]

    def _ports(self) -> list[Port]:
        return [module.__dict__[PORT] for module in self._modules.values() if PORT in module.__dict__]

    # --------------------------------------------------------------------------------------------- switching
    @contextlib.contextmanager
    def teacher(self) -> Iterator[None]:
        """The model as it was: the family's own softmax at every site, and LoRA off where it was injected."""
        before = [port.mode for port in self._ports()]
        for port in self._ports():
            _turn(port, "teacher")
        layers = hooks.lora_off(self.model)
        self._sync_masks()
        try:
            yield
        finally:
            for port, mode in zip(self._ports(), before, strict=True):
                _turn(port, mode)
            hooks.lora_on(layers)
            self._sync_masks()

    @contextlib.contextmanager
    def alone(self, name: str, groups: tuple[int, ...] | None = None) -> Iterator[None]:
        """The teacher, but with the mixer at one site, or for some of its key/value groups: what that costs by itself.

        Raises InputError for a site that is not converted, or groups of one whose projections started afresh.
        """
        if name not in self._modules:
            raise InputError(f"{name} is not converted: {nearest(name, list(self._modules))}")
        port: Port = self._modules[name].__dict__[PORT]
        if groups is not None and port.renewed:
            raise InputError(f"{name}: its projections started afresh, so that its groups are not the teacher's")
        with self.teacher():
            _turn(port, "student")
            port.groups = groups
            self._sync_masks()
            try:
                yield
            finally:
                port.groups = None
                _turn(port, "teacher")

    @contextlib.contextmanager
    def watch(self, watcher: Watcher) -> Iterator[None]:
        """The stream stays the teacher's; each site calls watcher(site, mixer, q, k, v, ctx, teacher's o_BHTV). Raises
        InputError where the projections started afresh: there is no teacher of the same q, k, v then."""
        if any(port.renewed for port in self._ports()):
            raise InputError(
                f"{self.method}: with start: afresh teacher and student share no q, k, v: leave transfer out, or set "
                "start: inherit"
            )
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

    def reach(self) -> None:
        """One small forward as the teacher: every call of a converted module comes by its mixer. For surgery that a
        file repeats: what arrives there was checked when it was made. Raises Unsupported."""
        with self.teacher():
            try:
                reach(self.model, self._ports(), small_forward)
            except InputError as error:  # it was attached with inputs of the user's own
                log.warning("not probed after loading: %s", error)

    def adjust(self, settings: dict[str, Any]) -> None:
        """Change settings of all mixers after training. Raises InputError for one that parameters depend on."""
        kind = mixers.get(self.method)
        for key in settings:
            if key not in kind.adjustable:
                ways = f"only {', '.join(sorted(kind.adjustable))} can" if kind.adjustable else "no setting of it can"
                raise InputError(f"method {self.method!r}: {key} cannot change after training: {ways}")
        changed = mixers.configure(kind, {**self.config.model_dump(), **settings})
        before = self.config
        try:
            for mixer in self.mixers.values():
                mixer.adjust(changed)
        except InputError:
            for mixer in self.mixers.values():
                mixer.config = before
            raise
        self.config = changed

    def switch(self, on: bool) -> None:
        """The mixers answer (on), or the family's own softmax does; LoRA stays as it is."""
        for port in self._ports():
            _turn(port, "student" if on else "teacher")
        self._sync_masks()

    def _sync_masks(self) -> None:
        """Let the model build token codes instead of T x T masks while only mixers read them."""
        for config, ports in self._hosts():
            original = ports[0].teacher
            only_mixers = all(p.mode == "student" and p.watcher is None for p in ports) and not any(
                "mask" in getattr(m, CHILD).needs for m in self._modules.values()
            )
            added = any(BIAS in p.site.drops for p in ports)  # to the mask, by the model: it must stay a mask
            everything = only_mixers and not added and self._covers(config)
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
            _turn(port, "teacher")
            with hooks.reclassing(name, module):
                module.__class__ = port.cls
                if port.site.seam == "interface":
                    module.config = port.config
                    hf.set_implementation(port.config, port.teacher)
                delattr(module, CHILD)
                del module.__dict__[PORT]
        self._modules = {}
        ports = [m.__dict__[PORT] for m in self.model.modules() if PORT in m.__dict__]
        grid.forget(self.model, [port.grid for port in ports if port.grid is not None])


def attach(
    model: nn.Module,
    sites: Sequence[Site] | None,
    method: str | type[Mixer],
    config: MixerConfig | dict[str, Any] | None = None,
    *,
    probe: Callable[[nn.Module], Any] | None | bool = True,
    beside: bool = False,
    renewing: bool = True,
) -> Surgery:
    """Replace softmax at `sites` (None: everywhere) by `method`. Idempotent: an earlier conversion is detached first,
    unless it is to stay `beside` this one, on other sites.

    method: a name, or a Mixer class of your own. config: the mixer's settings. probe: one small forward after the
    surgery proves that every site fires at each of its calls, with what it was planned for; pass a callable for models
    that need special inputs, False to skip (meta). renewing: False where weights are loaded afterwards, so that what a
    method starts afresh is among them.
    Raises Unsupported when the method does not fit, a hook is in the way, or the probe fails; the model is then as it
    was.
    """
    chosen = find(model) if sites is None else list(sites)
    settings = mixers.configure(method, config)
    for site in chosen:
        if site.heads is not None:
            raise Unsupported(f"{site.name}: head-level hybrids (Site.heads) are not built yet; convert whole layers")
    earlier = Surgery.of(model)
    if (
        taken := next((s.name for s in chosen if PORT in model.get_submodule(s.name).__dict__), None)
        if beside
        else None
    ):
        raise InputError(f"{taken} is converted already, by {earlier.method if earlier else ''}: detach that first")
    if earlier is not None and not beside:
        log.warning("the model is converted already (%s): those mixers are dropped", earlier.method)
        earlier.detach()
    if windowed := [site for site in chosen if WINDOWED in site.drops]:
        log.warning(
            "%d layers attend inside shifted windows of an image: the %s is dropped",
            len(windowed),
            " and the ".join(windowed[0].drops),
        )
    interface.register()
    surgery = Surgery(model, mixers.name_of(mixers.get(method)), settings)
    surgery._modules = {}
    try:
        for site in chosen:
            module = model.get_submodule(site.name)
            with hooks.reclassing(site.name, module):
                _operate(model, module, site, method, settings, renewing)
            surgery._modules[site.name] = module
        if probe is not False:
            check(model, surgery._ports(), probe if callable(probe) else small_forward)
        surgery._sync_masks()
    except BaseException:
        own = {site.name for site in chosen}
        surgery._modules = {n: m for n, m in model.named_modules() if PORT in m.__dict__ and n in own}
        surgery.detach()
        raise
    return surgery


def _turn(port: Port, mode: str) -> None:
    """Change the mode, and with it whose projections are in their place."""
    if (port.mode == "teacher") != (mode == "teacher"):
        for renewed in port.renewed:
            renewed.swap()
    port.mode = mode


def _operate(
    model: nn.Module,
    module: nn.Module,
    site: Site,
    method: str | type[Mixer],
    settings: MixerConfig,
    renewing: bool,
) -> None:
    cls = type(module)
    mixer = mixers.build(method, site.shape, settings).to(hooks.device(module))
    patches: grid.Grid | None = None
    if site.owner is not None:
        patches = dit.watch(model.get_submodule(site.owner))
    elif site.shape.image:
        patches = grid.watch(model, site.name)
    if mixer.needs_grid and patches is None:
        why = "has no patch convolution around it" if site.shape.image else "reads no image"
        raise Unsupported(
            f"{site.name} {why}, and {mixers.name_of(mixers.get(method))!r} needs the grid that its tokens stand on"
        )
    if WINDOWED in site.drops and mixer.needs_grid:
        raise Unsupported(
            f"{site.name} attends inside windows of its image, so that a call has no grid of its own, which "
            f"{mixers.name_of(mixers.get(method))!r} needs: use hedgehog with radius: 0"
        )
    mixer.warm_start(module)
    mixer.train(module.training)
    own = getattr(module, "config", None)
    port = Port(
        site=site,
        cls=cls,
        parameters=tuple(p for p in inspect.signature(cls.forward).parameters if p != "self"),
        teacher=hf.get_implementation(own) if site.seam == "interface" else "sdpa",
        config=own,
        grid=patches,
    )
    if site.seam == "interface":
        if port.teacher not in ("sdpa", "eager"):  # flash hands on no documents, flex no mask that can be read
            raise Unsupported(f"masks of {port.teacher} cannot be read; load the model with attn_implementation='sdpa'")
        module.config = copy.copy(own)  # only converted modules are routed to the mixers
        hf.set_implementation(module.config, interface.NAME)
    if mixer.starts_afresh and renewing:
        port.renewed = renew(site.name, module)
    module.add_module(CHILD, mixer)
    module.__dict__[PORT] = port
    module.__class__ = made_subclass(cls, site.seam)
