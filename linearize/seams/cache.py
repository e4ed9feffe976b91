"""Layers of the model's own cache, so that `generate` works unchanged: a constant-size state, and softmax's own cache
without its copying."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from linearize.seams.hf import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, EncoderDecoderCache, StaticLayer
from linearize.types import Slot, Unsupported


class StateLayer(CacheLayerMixin):
    """Holds a mixer's state in `slot`; keys and values pass through and are only counted.

    `tokens` is the one position counter: columns seen, padding included. `replaced` is the layer that stood here: mask
    sizes of static and sliding caches are the model's business and stay what they were.
    """

    is_compileable = True
    is_croppable = False
    supports_early_init = False

    def __init__(self, replaced: CacheLayerMixin | None = None) -> None:
        super().__init__()
        self.slot = Slot()
        self.tokens = 0
        self.column = 0  # where this call's first token stands in the mask the model built
        self.replaced = replaced
        self.is_sliding = bool(getattr(replaced, "is_sliding", False))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        new = key_states.shape[-2]
        self.column = self.tokens - self.get_mask_sizes(new)[1]
        self._count(self.tokens + new)
        return key_states, value_states

    def resume(self, tokens: int) -> None:
        """Go on after `tokens` tokens, with a state put into `slot`."""
        self.is_initialized = True
        self._count(tokens)

    def _count(self, tokens: int) -> None:
        self.tokens = tokens
        if self.is_sliding:
            static = hasattr(self.replaced, "cumulative_length_int")
            setattr(self.replaced, "cumulative_length_int" if static else "cumulative_length", tokens)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.replaced is not None and (self.is_sliding or isinstance(self.replaced, StaticLayer)):
            return self.replaced.get_mask_sizes(query_length)
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1 if self.replaced is None else self.replaced.get_max_length()

    get_max_cache_shape = get_max_length  # its name before transformers 5.23

    def reset(self) -> None:
        self.slot.state = None
        self.tokens = self.column = 0
        self.is_initialized = False

    def _map(self, change) -> None:
        if self.slot.state is not None:
            self.slot.state = tuple(change(t) for t in self.slot.state)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        """A state is a few kilobytes per head: it stays where it is."""

    def prefetch(self) -> None:
        """See offload."""

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise Unsupported(
            "a recurrent state cannot be rolled back, so assisted and speculative decoding (which crop the cache) do "
            "not work with a linearised model: call generate without assistant_model and prompt_lookup_num_tokens, or "
            "take a snapshot with linearize.prefix before the branch"
        )

    activate_past_recording = crop  # 5.23 announces a later crop this way: refuse before any work is done


def state_layer(cache: Cache | EncoderDecoderCache, layer: int, cross: bool = False) -> StateLayer | None:
    """The StateLayer of `layer` in a model's cache, put there on first use. None for a cross-attention cache.

    Raises Unsupported if the layer already holds keys of the softmax model.
    """
    if isinstance(cache, EncoderDecoderCache):
        if cross:
            return None
        cache = cache.self_attention_cache
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer:
            cache.layers.append(cache.layer_class_to_replicate())
    found: Any = cache.layers[layer]
    if isinstance(found, StateLayer):
        return found
    if int(found.get_seq_length()) > 0:
        raise Unsupported(
            f"layer {layer} of this cache was filled by the softmax model; start the linearised model from a new cache"
        )
    state = StateLayer(found)
    cache.layers[layer] = state
    return state


class GrowingLayer(DynamicLayer):
    """A dynamic layer that writes into room made beforehand: concatenating copies all of the cache at every token,
    which is half of a small model's time."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.views = self.room = ()
        old, new = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        kept = (self.keys, self.values)
        if not self.room or new > self.room[0].shape[-2] or any(a is not b for a, b in zip(kept, self.views)):
            # No room, or somebody (beams, a crop) put other tensors into the layer: start from those.
            self.room = tuple(
                x.new_empty(*x.shape[:2], max(64, 2 * new), x.shape[3]) for x in (key_states, value_states)
            )
            if old:
                for room, x in zip(self.room, kept):
                    room[:, :, :old] = x
        for room, x in zip(self.room, (key_states, value_states)):
            room[:, :, old:new] = x
        self.views = self.keys, self.values = tuple(room[:, :, :new] for room in self.room)
        return self.keys, self.values


def growing_cache(config: Any) -> DynamicCache:
    """An empty cache for a model of this configuration; its unbounded layers do not copy."""
    cache = DynamicCache(config=config)
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
