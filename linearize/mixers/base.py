"""What a mixer is: softmax's place, between (q, k, v) and the output projection.

A mixer owns no projections: the pretrained q, k, v and o stay where they are, LoRA names stay valid, and a
checkpoint is the base plus the mixer's own keys. Head is axis 0 of every parameter.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from linearize.types import Context, Cost, InputError, SiteShape, State, StateSpec, Unsupported, nearest


class MixerConfig(BaseModel):
    """Base of every `Mixer.Config`: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Mixer(nn.Module, ABC):
    """A token-mixing layer. Subclass this for methods without a recurrent form, RecurrentMixer otherwise.

    paper: where it comes from. kinds: what it can replace, of "causal", "bidirectional", "joint".
    needs: of "hidden", "grid", "rotary", "mask". refuses: why it does not fit one of HOMES, where `kinds` does not say
    it all. Config: its fields are the recipe's `mixer:` keys.
    """

    paper: ClassVar[str]
    kinds: ClassVar[frozenset[str]]
    needs: ClassVar[frozenset[str]] = frozenset()
    refuses: ClassVar[Mapping[str, str]] = {}
    recurrent: bool = False
    #: whether its bidirectional form tells tokens apart by their order alone
    ordered: bool = False
    Config: ClassVar[type[MixerConfig]] = MixerConfig
    #: names of the branches that `Surgery.ablate` can switch off; `off` is the one that is off now
    branches: tuple[str, ...] = ()
    off: str | None = None
    #: query heads that are one head of this mixer
    joined: int = 1
    #: whether it has losses of its own: then it answers `taught`
    teaches: ClassVar[bool] = False
    #: settings that may change after training, no parameter depending on them
    adjustable: ClassVar[frozenset[str]] = frozenset()
    #: of the state's layout: one more wherever a state of the same settings would be read wrongly by its last readers
    state_version: ClassVar[int] = 1

    def __init__(self, shape: SiteShape, config: MixerConfig) -> None:
        super().__init__()
        self.shape = shape
        self.config = config

    def warm_start(self, attention: nn.Module) -> None:
        """Initialise from the attention module being replaced. Default: nothing to inherit."""

    @abstractmethod
    def parallel(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> Tensor:
        """Whole sequences -> o_BHTV, in q's dtype: the training form."""

    def taught(
        self,
        q_BHTK: Tensor,
        k_BGTK: Tensor,
        v_BGTV: Tensor,
        ctx: Context,
        target: Callable[[slice], Tensor],
        chunk: int,
        output: bool,
    ) -> tuple[Tensor | None, Tensor]:
        """(o_BHTV, the loss that this method brings, summed over real queries and heads), where it `teaches`.

        target(rows): the teacher's weights [B, H, rows, T] for these queries; ask for no more than `chunk` at once.
        output: whether the first is wanted at all.
        """
        raise NotImplementedError

    def adjust(self, config: MixerConfig) -> None:
        """Take on settings that differ in `adjustable` ones. Raises InputError where they do not fit the layer."""
        self.config = config

    def maps(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> dict[str, Tensor]:
        """Further maps of one call, by name, [B, H, T, any], for pictures. Default: none."""
        return {}

    @abstractmethod
    def dense(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, rows: slice = slice(None)) -> Tensor:
        """Attention weights [B, H, T, T] with o = weights @ v + beside(v), from the definition: test oracle, map
        losses, pictures. rows: the queries wanted, so that long maps can be made piece by piece."""

    def beside(self, v_BGTV: Tensor, ctx: Context) -> Tensor:
        """What a method adds to weights @ v, [B, H, T, V], from the definition. Default: nothing."""
        return torch.zeros_like(v_BGTV).repeat_interleave(self.shape.group, 1)

    @property
    def signed(self) -> bool:
        """Whether weights can be negative, so that they are no distribution and losses on maps make no sense."""
        return False

    @property
    def leaks(self) -> bool:
        """Whether the weights of a row may add up to less than 1."""
        return False

    @property
    def stateful(self) -> bool:
        """Whether decoding keeps a state in a slot: of constant size, or one that grows with the tokens."""
        return self.recurrent

    @abstractmethod
    def state_spec(self) -> list[StateSpec]:
        """The state's tensors in order: stable, and versioned by `state_version`, since serving reads it. Empty where
        there is none."""

    @abstractmethod
    def cost(self, tokens: int) -> Cost:
        """Forward cost of one sequence of `tokens`."""

    def cost_of(self, grid: tuple[int, ...], others: int) -> Cost:
        """Forward cost of one image of `grid` tokens beside `others` (text, CLS). Default: `cost` of them all."""
        return self.cost(math.prod(grid) + others)

    def state_bytes(self, tokens: int) -> int:
        """Bytes kept per sequence after `tokens` tokens; constant for a recurrent mixer."""
        return sum(spec.nbytes() for spec in self.state_spec())

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> Tensor:
        """One attention call, with or without a slot; a recurrent mixer writes its new state into the slot."""
        return self.parallel(q_BHTK, k_BGTK, v_BGTV, ctx)

    @property
    def starts_afresh(self) -> bool:
        """Whether the projections of the attention module start anew (attach keeps the teacher's aside)."""
        return False

    @property
    def needs_rotary(self) -> bool:
        """Whether this mixer, as configured, takes q and k apart from their rotary embedding."""
        return "rotary" in self.needs

    @property
    def needs_grid(self) -> bool:
        """Whether this mixer, as configured, must know the rows and columns that its tokens stand on."""
        return "grid" in self.needs

    def _apply(self, fn, recurse=True):
        # `.to(bfloat16)` and `.half()` must not round the mixer: its parameters and states stay float32.
        def keep_precision(t: Tensor) -> Tensor:
            out = fn(t)
            if out.is_floating_point() and out.dtype.itemsize < 4:
                return t.to(device=out.device) if t.dtype.itemsize >= 4 else t.to(out.device, torch.float32)
            return out

        return super()._apply(keep_precision, recurse)


class RecurrentMixer(Mixer):
    """A mixer with a constant-size state on causal layers.

    Laws: chunked over any split == parallel; step repeated == parallel; the state is float32 whatever the
    activations. On a bidirectional layer there is nothing to carry on: it is not recurrent, its `state_spec` is empty
    and `chunked` is given whole sequences.
    """

    recurrent = True

    def __init__(self, shape: SiteShape, config: MixerConfig) -> None:
        super().__init__(shape, config)
        self.recurrent = shape.causal

    @abstractmethod
    def chunked(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, state: State
    ) -> tuple[Tensor, State]:
        """The next T tokens after `state` -> (o_BHTV, new state)."""

    def empty_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        """The state before the first token. dtype is that of keys and values, for the parts that keep them."""
        return tuple(
            torch.zeros(
                [batch if n == -1 else n for n in spec.shape],
                dtype=dtype if spec.name.startswith("kept_") else spec.dtype,
                device=device,
            )
            for spec in self.state_spec()
        )

    def step(self, q_BH1K: Tensor, k_BG1K: Tensor, v_BG1V: Tensor, ctx: Context, state: State) -> tuple[Tensor, State]:
        """One token. The same as `chunked` with T = 1 unless a mixer has something cheaper."""
        return self.chunked(q_BH1K, k_BG1K, v_BG1V, ctx, state)

    def parallel(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> Tensor:
        state = self.empty_state(q_BHTK.shape[0], q_BHTK.device, k_BGTK.dtype)
        return self.chunked(q_BHTK, k_BGTK, v_BGTV, ctx, state)[0]

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> Tensor:
        if ctx.slot is None:
            return self.parallel(q_BHTK, k_BGTK, v_BGTV, ctx)
        state = ctx.slot.state
        if state is None:
            state = self.empty_state(q_BHTK.shape[0], q_BHTK.device, k_BGTK.dtype)
        advance = self.step if q_BHTK.shape[2] == 1 else self.chunked
        out, ctx.slot.state = advance(q_BHTK, k_BGTK, v_BGTV, ctx, state)
        return out


# ------------------------------------------------------------------------------------------- methods by name
_NOT_METHODS = {"base", "documents", "estimate", "parts", "patches"}
_GROUP = "linearize.mixers"


def names() -> list[str]:
    """Every method's name: the files of this folder, and entry points of third parties."""
    here = [m.name for m in pkgutil.iter_modules(importlib.import_module("linearize.mixers").__path__)]
    return sorted({n for n in here if n not in _NOT_METHODS} | {e.name for e in entry_points(group=_GROUP)})


def get(name: str | type[Mixer]) -> type[Mixer]:
    """The mixer class called `name` (a class is itself). A method's name is its file's name; nothing is registered.

    Raises InputError naming the nearest method.
    """
    if isinstance(name, type):
        return name
    name = name.replace("-", "_")
    if name not in names():
        raise InputError(f"unknown method {name!r}: {nearest(name, names())}")
    for point in entry_points(group=_GROUP):
        if point.name == name:
            return point.load()
    module = importlib.import_module(f"linearize.mixers.{name}")
    found = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Mixer) and c.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise AssertionError(f"{module.__name__} must define exactly one Mixer, found {len(found)}")
    return found[0]


def name_of(cls: type[Mixer]) -> str:
    """The name that `get` finds `cls` by: its entry point's where it has one, else that of its file."""
    place = f"{cls.__module__}:{cls.__qualname__}"
    own = next((point.name for point in entry_points(group=_GROUP) if point.value == place), None)
    return own or cls.__module__.rpartition(".")[2]


def configure(name: str | type[Mixer], settings: MixerConfig | dict[str, Any] | None) -> MixerConfig:
    """`settings` as the method's own Config. Raises InputError naming the offending key and the nearest valid one."""
    cls = get(name)
    if isinstance(settings, cls.Config):
        return settings
    raw = settings.model_dump() if isinstance(settings, MixerConfig) else dict(settings or {})
    for key in raw:
        if key not in cls.Config.model_fields:
            raise InputError(f"method {name!r} has no setting {key!r}: {nearest(key, list(cls.Config.model_fields))}")
    try:
        return cls.Config(**raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "mixer"
        raise InputError(f"method {name!r}, setting {where!r}: {first['msg']}") from None


def build(name: str | type[Mixer], shape: SiteShape, settings: MixerConfig | dict[str, Any] | None = None) -> Mixer:
    """A new mixer for a layer of `shape`, in float32. Raises Unsupported when the method does not fit the layer."""
    cls = get(name)
    if why := refusal(cls, home(shape)):
        raise Unsupported(f"method {name!r} does not fit {home(shape)} attention: {why}")
    return cls(shape, configure(name, settings))


# ------------------------------------------------------------------------------------------ which method fits what
#: where attention is converted, and its kind there: the columns of the table of methods
HOMES = {
    "LLM": "causal",
    "encoder": "bidirectional",
    "ViT": "bidirectional",
    "DiT": "bidirectional",
    "joint DiT": "joint",
}


def home(shape: SiteShape) -> str:
    """Which of HOMES a layer belongs to. A diffusion transformer that attends to its image alone is like a ViT."""
    if shape.causal:
        return "LLM"
    return "joint DiT" if shape.joint else "ViT" if shape.image else "encoder"


def refusal(name: str | type[Mixer], where: str) -> str | None:
    """Why a method does not fit one of HOMES (None: it does): what the table says, and `build`."""
    cls, kind = get(name), HOMES[where]
    if where in cls.refuses:
        return cls.refuses[where]
    if kind not in cls.kinds:
        return f"it replaces {' or '.join(sorted(cls.kinds))} attention, and this is {kind}"
    return None
