"""Finding attention: which modules, of what shape, reached how; and choosing among them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from linearize.mixers import base as mixers
from linearize.seams import dit, grid, hf, interface, sdpa
from linearize.types import InputError, Site, SiteShape, Unsupported

log = logging.getLogger("linearize")

#: in Site.drops: an additive bias by the distance of two tokens
BIAS = "relative position bias"

#: and what keeps apart the regions that a shifted window of an image wraps together
WINDOWED = "mask of shifted windows"


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before surgery."""
    return getattr(type(module), "linearize_original", type(module))


def find(model: nn.Module) -> list[Site]:
    """Every self-attention of `model` that can be replaced, in the order of its modules; no forward pass.

    Discovery is by the code of a module's forward (it dispatches through transformers' attention interface, or calls
    SDPA), never by lists of names. Raises Unsupported, naming the module, where there is none or softmax is written by
    hand.
    """
    sites, by_hand, known = _of_diffusion(model), [], []
    for name, module in [] if sites else model.named_modules():
        cls = original_class(module)
        if interface.reaches(cls):
            seam = "interface"
        elif sdpa.reaches(cls):
            seam = "sdpa"
        else:
            if sdpa.writes_softmax(cls) and _is_attention(cls):
                by_hand.append(f"{name} ({cls.__name__})")
                known.append(module)
            continue
        known.append(module)
        if not is_cross(module) and not _is_given_keys(model, name):
            sites.append(_site(name, module, seam, _owners(model, name)))
    if not sites:
        if by_hand:
            raise Unsupported(
                f"{by_hand[0]} writes its softmax by hand, out of reach of surgery; linearize reaches attention that "
                "uses transformers' attention interface or F.scaled_dot_product_attention"
            )
        raise Unsupported(f"no softmax attention found in {type(model).__name__}")
    if by_hand:
        log.warning("left alone: %s and %d more write softmax by hand", by_hand[0], len(by_hand) - 1)
    if missed := _without_attention(model, sites, known):
        log.warning(
            "left alone: %s: surgery reaches no attention there, and the configuration names no other kind of layer",
            ", ".join(missed),
        )
    return sites


#: kinds of layers that configurations name and that have no softmax attention
_OTHER_KINDS = {"linear_attention", "mamba", "mamba2", "recurrent", "conv", "moe", "mlp"}


def _without_attention(model: nn.Module, sites: Sequence[Site], known: Sequence[nn.Module]) -> list[str]:
    """Layers without attention that is `known`, counted against the configuration: of every list of as many layers as
    it says, where some hold sites."""
    found, seen = [], {id(module) for module in known}  # layers may share a module, which has one name
    for path, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList) or not any(site.name.startswith(f"{path}.") for site in sites):
            continue
        configs = [getattr(owner, "config", None) for owner in _owners(model, f"{path}.0")]
        config = next((c for c in configs if hasattr(c, "num_hidden_layers")), None)
        if config is None or config.num_hidden_layers != len(layers):
            continue
        kinds = _first((config,), "layer_types", "layers_block_type") or [None] * len(layers)
        for index, kind in zip(range(len(layers)), kinds, strict=True):
            if kind not in _OTHER_KINDS and not any(id(module) in seen for module in layers[index].modules()):
                found.append(f"{path}.{index}")
    return found


def _of_diffusion(model: nn.Module) -> list[Site]:
    """The sites of a diffusion model. Raises Unsupported where its attention is linear already or out of reach."""
    sites = []
    for name, module, owner in dit.attentions(model):
        row = dit.family(model.get_submodule(owner))
        assert row is not None
        if row.linear:
            raise Unsupported(f"{row.linear}: there is no softmax over its tokens to replace")
        if reason := dit.refusal(name, module):
            raise Unsupported(reason)
        if dit.left_alone(row, name, module) is None:
            sites.append(Site(name, None, dit.shape(row, name, module), "sdpa", owner=owner))
    if not sites and (unknown := dit.unknown(model)):
        raise Unsupported(f"{unknown} has no self-attention that linearize knows: see FAMILIES in seams/dit.py")
    return sites


def is_cross(module: nn.Module) -> bool:
    """Cross-attention by the module's own flag (a call with keys of its own is caught at run time)."""
    return bool(getattr(module, "is_cross_attention", False)) or "CrossAttention" in original_class(module).__name__


def _is_given_keys(model: nn.Module, name: str) -> bool:
    """Cross-attention by how the module that owns it calls it."""
    owner, _, child = name.rpartition(".")
    return child in interface.given_keys(original_class(model.get_submodule(owner)))


def _owners(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules around `name`, from the inside out, up to the nearest transformers model (one tower of several)."""
    owners, parts = [], name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        owners.append(model.get_submodule(".".join(parts[:end])))
        if isinstance(owners[-1], hf.PreTrainedModel):
            break
    return owners


def _is_causal(module: nn.Module, owners: Sequence[nn.Module]) -> bool:
    """The module's own flag, or that of whoever makes masks for it (CLIP's text tower says so in the call alone)."""
    if getattr(module, "is_causal", False):
        return True
    made = [kind for owner in owners if (kind := hf.masks(original_class(owner)))]
    return bool(made) and made[0] == "causal"


def _is_attention(cls: type[nn.Module]) -> bool:
    return re.search(r"attention|attn", cls.__name__, re.I) is not None


def _first(objects: Sequence[Any], *names: str) -> Any:
    for owner in objects:
        for name in names:
            value = getattr(owner, name, None)
            if value is not None:
                return value
    return None


def _site(name: str, module: nn.Module, seam: Any, owners: Sequence[nn.Module]) -> Site:
    config = getattr(module, "config", None)
    layer = getattr(module, "layer_idx", None)
    heads = _first((module, config), "num_heads", "num_attention_heads", "n_heads")
    if heads is None:
        raise Unsupported(f"{name} ({type(module).__name__}): the number of heads is nowhere to be read")
    width = _first((config, module), "hidden_size", "embed_dim", "hidden_dim")
    key_dim = _first((module, config), "qk_head_dim", "head_dim") or width // heads
    value_dim = _first((module,), "v_head_dim") or key_dim
    kv_heads = _kv_heads(module, config, heads)
    scale = _first((module,), "scaling", "scale", "inv_norm_factor")
    rank = getattr(module, "kv_lora_rank", None)  # MLA caches the latent, not K and V
    return Site(
        name=name,
        layer=layer,
        seam=seam,
        drops=_drops(name, module, config, owners[-1]),
        cache_dims=None if rank is None else rank + module.qk_rope_head_dim,
        shape=SiteShape(
            heads=heads,
            kv_heads=kv_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            width=width,
            scale=float(scale) if isinstance(scale, (int, float)) else key_dim**-0.5,
            causal=_is_causal(module, owners),
            window=_teacher_window(module, config, layer),
            image=getattr(owners[-1], "main_input_name", None) == "pixel_values" or grid.is_timm(owners[-1]),
        ),
    )


def _kv_heads(module: nn.Module, config: Any, heads: int) -> int:
    group = getattr(module, "num_key_value_groups", None)
    if isinstance(group, int):
        return heads // group
    if getattr(config, "new_decoder_architecture", False):  # falcon repeats k and v to all heads before attention
        return heads
    if getattr(config, "multi_query", False):
        return 1
    for owner, name in ((module, "num_kv_heads"), (module, "num_key_value_heads"), (config, "num_kv_heads")):
        value = getattr(owner, name, None)
        if isinstance(value, int):
            return value
    return heads


def _teacher_window(module: nn.Module, config: Any, layer: int | None) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and layer is not None and layer < len(kinds):
        if kinds[layer] == "sliding_attention":
            # Bidirectional windows count the tokens on either side, causal ones the token itself too.
            return config.sliding_window + (not getattr(module, "is_causal", True))
        if kinds[layer] == "chunked_attention":
            return config.attention_chunk_size
        return None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    window = getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)
    return window if isinstance(window, int) else None


def _drops(name: str, module: nn.Module, config: Any, tower: nn.Module) -> tuple[str, ...]:
    drops = []
    if getattr(config, "window_size", None) and getattr(tower, "main_input_name", None) == "pixel_values":
        drops.append(WINDOWED)
    if getattr(config, "alibi", False):
        raise Unsupported(
            f"{name}: attention with ALiBi (config.alibi) is refused: the bias is the model's only position signal and "
            "no mixer keeps it"
        )
    if cap := getattr(config, "attn_logit_softcapping", None):
        drops.append(f"soft-cap {cap:g} on the logits")
    if getattr(module, "sinks", None) is not None:
        drops.append("learned sink logits")
    # Added by whoever owns the layers, or handed from the first layer to the others.
    if any(re.search(r"relative_(position|attention)_bias", n) for n, _ in tower.named_parameters()):
        drops.append(BIAS)
    if window := _teacher_window(module, config, getattr(module, "layer_idx", None)):
        causal = getattr(module, "is_causal", False)
        size = f"{window} tokens" if causal else f"{window - 1} tokens on either side"
        drops.append(f"the teacher's own window of {size}")
    return tuple(drops)


# -------------------------------------------------------------------------------------------------- choosing
def parse_layers(spec: str, sites: Sequence[Site]) -> list[Site]:
    """Sites named by a layer spec: "all", "0-11", "0,2,5-7", "every:4" (0, 4, 8, ...), "keep:3,7" (all but these).

    Numbers are layer indices (positions among the sites where layers are not numbered). Raises InputError.
    """
    numbers = [i if s.layer is None else s.layer for i, s in enumerate(sites)]

    def listed(text: str) -> set[int]:
        out: set[int] = set()
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            if not match:
                raise InputError(f"layers: cannot read {part!r}; write all, 0-11, 0,2,5-7, every:4 or keep:3,7")
            low, high = int(match[1]), int(match[2] or match[1])
            out |= set(range(low, high + 1))
        if missing := out - set(numbers):
            raise InputError(f"layers: the model has no layer {min(missing)}; it has {min(numbers)}-{max(numbers)}")
        return out

    spec = spec.strip()
    if spec == "all":
        chosen = set(numbers)
    elif spec.startswith("every:"):
        if not (step := spec.removeprefix("every:")).isdigit() or int(step) < 1:
            raise InputError(f"layers: {spec!r} needs a number above 0, for instance every:4")
        chosen = {n for n in numbers if n % int(step) == 0}
    elif spec.startswith("keep:"):
        chosen = set(numbers) - listed(spec.removeprefix("keep:"))
    else:
        chosen = listed(spec)
    if not chosen:
        raise InputError(f"layers: {spec!r} selects no layer")
    return [site for site, number in zip(sites, numbers, strict=True) if number in chosen]


def worthwhile(
    sites: Sequence[Site], method: str, config: Any, target_length: int
) -> tuple[list[Site], dict[str, str]]:
    """(sites to convert by default, {site name: why it is left alone}).

    A site is left alone when its float32 state would exceed the teacher's own bf16 cache at `target_length` tokens:
    sliding-window, chunked and MLA layers, or a large state on a short context. Bidirectional layers keep neither, and
    a method whose own state grows like a cache is not taken for its memory.
    """
    chosen, left = [], {}
    states: dict[SiteShape, int] = {}
    for site in sites:
        if site.shape not in states:
            mixer = _on_meta(method, config, site.shape)
            states[site.shape] = 0 if mixer.stateful and not mixer.recurrent else mixer.state_bytes(target_length)
        state, kept = states[site.shape], site.kv_bytes(target_length)
        if state > kept:
            left[site.name] = (
                f"its state of {state:,} bytes would exceed the teacher's own cache of {kept:,} bytes at "
                f"{target_length:,} tokens"
            )
        else:
            chosen.append(site)
    return chosen, left


def _on_meta(method: str, config: Any, shape: SiteShape) -> mixers.Mixer:
    import torch

    with torch.device("meta"):
        return mixers.build(method, shape, config)


def break_even(site: Site, method: str, config: Any) -> int | None:
    """Tokens from which the state is smaller than the teacher's cache (None: never, the cache is bounded, or the state
    grows as well)."""
    mixer = _on_meta(method, config, site.shape)
    if mixer.stateful and not mixer.recurrent:
        return None
    state = mixer.state_bytes(1)
    per_token = site.kv_bytes(1)
    tokens = -(-state // per_token)
    return None if site.kv_bytes(tokens) < state else tokens
