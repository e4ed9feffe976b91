"""Between an attention module and its mixer: the port, and the subclass whose forward hands it the call's context, the
only one that is made of an attention module."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linearize.mixers.base import Mixer
from linearize.seams import dit, hf, interface, sdpa
from linearize.seams.cache import StateLayer, state_layer
from linearize.seams.grid import Grid, Layout
from linearize.surgery.renew import Renewed
from linearize.types import Context, InputError, Rotary, Site, Unsupported

#: modules that are one matrix product
LINEAR = (nn.Linear, hf.Conv1D)

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


class Seen(NamedTuple):
    """What arrived at a port while it was probed; options are the family's keyword arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    rotary: Rotary | None
    mask: Any
    options: dict[str, Any]


@dataclass
class Port:
    """Between an attention module and its mixer. mode: "student" (the mixer answers), "teacher" (softmax does)."""

    site: Site
    cls: type[nn.Module]
    parameters: tuple[str, ...]
    teacher: str  # implementation name of the family's own softmax
    config: Any  # the module's own config object, to put back
    renewed: list[Renewed] = field(default_factory=list)  # projections that the student has of its own
    mode: str = "student"
    watcher: Watcher | None = None
    groups: tuple[int, ...] | None = None  # key/value groups that the mixer answers for (None: all)
    grid: Grid | None = None  # of the tower around it, where its tokens are patches
    prefix: int | None = None  # tokens before the patches, as the probe found them
    rotates: bool = True
    rotary_channels: int | None = None  # how many channels of a head the family rotates (None: as many as cos has)
    call: Call | None = None
    calls: int | None = None  # of one forward of the model, as the probe counted them (None: not probed)
    entered: int = 0
    fired: int = 0
    seen: list[Seen] = field(default_factory=list)
    plain: list[Any] = field(default_factory=list)  # probe: q and k as they are without rotation
    wants_plain: bool = False
    answered: bool = False  # in this forward of a diffusion model's attention

    # ------------------------------------------------------------------------------------- around forward
    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Record the call's context."""
        if not torch.compiler.is_compiling():
            self.entered += 1
        named = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        self.answered = False
        hidden = args[0] if args else named.get("hidden_states")
        keys = [named.get(n) for n in ("key_value_states", "encoder_hidden_states")]
        if not self.site.shape.joint and any(k is not None and k is not hidden for k in keys):
            raise Unsupported(f"{self.site.name} was called as cross-attention (with keys of its own): leave it")
        cache = next((a for a in (*kwargs.values(), *args) if isinstance(a, hf.Cache | hf.EncoderDecoderCache)), None)
        self.call = Call(
            hidden=hidden,
            position_embeddings=named.get("position_embeddings"),
            positions=named.get("position_ids"),
            layer=self._layer(module, cache),
        )

    def _layer(self, module: nn.Module, cache: Any) -> StateLayer | None:
        if cache is None or self.site.layer is None or not self.site.shape.causal:
            return None
        if self.mode == "student" and self.watcher is None:
            return state_layer(cache, self.site.layer) if getattr(module, CHILD).stateful else None
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

        if self.site.owner is not None:
            if self.answered or k_BGTK.shape[2] != q_BHTK.shape[2]:  # an IP-Adapter's call beside: not ours
                return teacher()
            self.answered = True
        if self.mode == "plain":
            self.plain = [q_BHTK, k_BGTK]
            return teacher()
        if not torch.compiler.is_compiling():
            self.fired += 1
        if self.mode == "probe":
            self.seen.append(Seen(q_BHTK, k_BGTK, v_BGTV, self._rotary(), mask, kwargs))
            return teacher()
        if self.mode == "teacher":
            return teacher()
        mixer = getattr(module, CHILD)
        if self.site.shape.joint and isinstance(self.grid, dit.Tokens) and self.grid.starts is not None:
            return self._ragged(mixer, q_BHTK, k_BGTK, v_BGTV, mask, kwargs.get("scale"), teacher)
        ctx = self._context(q_BHTK, k_BGTK, mask, kwargs.get("scaling", kwargs.get("scale")), mixer, teacher)
        if self.watcher is None:
            with _as_written(q_BHTK):
                out = mixer(q_BHTK, k_BGTK, v_BGTV, ctx)
            return out if self.groups is None else self._in_groups(out, teacher())
        out = teacher()
        with _as_written(q_BHTK):
            self.watcher(self.site, mixer, q_BHTK, k_BGTK, v_BGTV, ctx, out)
        return out

    def _in_groups(self, out_BHTV: Tensor, teacher_BHTV: Tensor) -> Tensor:
        assert self.groups is not None
        group_H = torch.arange(out_BHTV.shape[1], device=out_BHTV.device) // self.site.shape.group
        ours_H = torch.isin(group_H, torch.tensor(self.groups, device=group_H.device))
        return torch.where(ours_H[:, None, None], out_BHTV, teacher_BHTV)

    def _context(self, q_BHTK, k_BGTK, mask, scale, mixer: Mixer, teacher) -> Context:
        call, T = self.call, q_BHTK.shape[2]
        assert call is not None
        layout = self.layout(T, mixer)
        valid = segments = None
        if isinstance(self.grid, dit.Tokens):
            if "mask" not in mixer.needs:
                valid = dit.read_mask(self.site.name, mask, q_BHTK.shape[0], T)
        elif "mask" not in mixer.needs:
            if k_BGTK.shape[2] != T:
                raise RuntimeError(f"{self.site.name}: {k_BGTK.shape[2]} keys for {T} queries: what cache is that?")
            column = call.layer.column if call.layer is not None else 0
            valid, segments = (
                x if x is None else x.expand(q_BHTK.shape[0], -1)
                for x in interface.read_mask(mask, T, column, call.layer is None, self.site.shape.causal)
            )
        return Context(
            causal=self.site.shape.causal,
            scale=self.site.shape.scale if scale is None else float(scale),
            valid_BT=valid,
            segments_BT=segments,
            positions_BT=call.positions,
            rotary=self._rotary() if mixer.needs_rotary and self.rotates else None,
            hidden_BTD=call.hidden if "hidden" in mixer.needs else None,
            mask=mask if "mask" in mixer.needs else None,
            grid=layout.grid if layout else None,
            prefix=layout.prefix if layout else 0,
            suffix=layout.suffix if layout else 0,
            slot=call.layer.slot if call.layer is not None else None,
            teacher=teacher,
        )

    def layout(self, tokens: int, mixer: Mixer) -> Layout | None:
        """Where this call's tokens stand. None where there is no grid or they are no whole one; InputError where the
        mixer needs it."""
        if self.grid is None or (self.grid.moved is not None and not mixer.needs_grid):
            return None
        try:
            return self.grid.read(tokens, self.site.name, self.prefix)
        except InputError:
            if mixer.needs_grid:
                raise
            return None

    def _ragged(self, mixer: Mixer, q_BHTK, k_BGTK, v_BGTV, mask, scale, teacher) -> Tensor:
        """Captions of several lengths: each row's image first, what is no image behind it, and back."""
        assert isinstance(self.grid, dit.Tokens)
        ctx = self._context(q_BHTK, k_BGTK, mask, scale, mixer, teacher)
        if "mask" in mixer.needs and self.watcher is None:
            return mixer(q_BHTK, k_BGTK, v_BGTV, ctx)
        order_BT = self.grid.order(q_BHTK.shape[2], q_BHTK.device)
        back_BT = order_BT.argsort(dim=1)

        def moved(x_BHTK: Tensor, to_BT: Tensor) -> Tensor:
            return x_BHTK.gather(2, to_BT[:, None, :, None].expand_as(x_BHTK))

        valid_BT = None if ctx.valid_BT is None else ctx.valid_BT.gather(1, order_BT)
        image_first = replace(ctx, valid_BT=valid_BT, prefix=0, suffix=ctx.prefix + ctx.suffix)
        q, k, v = (moved(x, order_BT) for x in (q_BHTK, k_BGTK, v_BGTV))
        if self.watcher is None:
            return moved(mixer(q, k, v, image_first), back_BT)
        out = teacher()
        self.watcher(self.site, mixer, q, k, v, image_first, moved(out, order_BT))
        return out

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


def made_subclass(cls: type[nn.Module], seam: str) -> type[nn.Module]:
    """`cls` with a forward that passes its context to the port, and always clears it."""
    key = (cls, seam)

    def run(module: nn.Module, original: Callable[..., Any], port: Port, args: tuple, kwargs: dict[str, Any]) -> Any:
        if seam == "interface":
            return original(*args, **kwargs)
        with sdpa.Redirect(lambda q, k, v, mask, **more: port.answer(module, q, k, v, mask, **more)):
            return original(*args, **kwargs)

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
                        run(self, super().forward, port, args, {**kwargs, "position_embeddings": unrotated})
                        port.mode = "probe"
                    out = run(self, super().forward, port, args, kwargs)
                    if port.site.owner is not None and not port.answered:
                        raise Unsupported(
                            f"{port.site.name}: its attention did not come by F.scaled_dot_product_attention with keys "
                            "for its own tokens alone: set_attention_backend('native'), and no cached reference keys"
                        )
                    return out
                finally:
                    port.call = None

            if hasattr(cls, "fuse_projections"):

                def fuse_projections(self, *args: Any, **kwargs: Any) -> None:
                    raise Unsupported(
                        "fuse_qkv_projections is refused on a converted model: it drops an active LoRA silently, and "
                        "in some families swaps processors. Remove the conversion first, or leave them apart"
                    )

        Linearized.__name__ = f"Linearized{cls.__name__}"
        Linearized.__qualname__ = Linearized.__name__
        _made[key] = Linearized
    return _made[key]


def _as_written(like: Tensor) -> AbstractContextManager[Any]:
    """Mixers choose their own precision: autocast would compute their sums in bfloat16."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


_made: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}
