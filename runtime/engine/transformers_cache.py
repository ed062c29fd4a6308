"""Our KV caches in transformers: `model.generate(..., past_key_values=packed_cache(config, 4))`.

A layer of a transformers cache gives attention whole keys and values, so the packed one saves
memory between steps and spreads a layer's codes at each; our own engine reads them as they are.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.rope import Rope, ropes
from optim.runtime.architecture.shape import resolve
from optim.runtime.architecture.table import FAMILIES
from optim.runtime.cache.quantized import PackedLayer, packed_layers
from optim.runtime.cache.streaming import SINKS, SMALLEST


class PackedCacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of 8 or 4 bits (cache/quantized.py)."""

    is_croppable = True

    def __init__(self, bits: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bits, self.length = bits, 0
        self.packed: PackedLayer | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        (layer,) = packed_layers(1, batch, heads, dim, key_states.device, self.bits)
        assert isinstance(layer, PackedLayer)
        self.packed, self.is_initialized = layer, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store `[B, kv, T, D]`; all keys and values so far, as they were rounded."""
        if self.packed is None:
            self.lazy_initialization(key_states, value_states)
        assert self.packed is not None
        batch, heads, count, _ = key_states.shape
        end = self.length + count
        self.packed.grow(-(-end // 128) * 128)
        self.packed.write(key_states.transpose(1, 2), value_states.transpose(1, 2), self.length)
        self.length = end
        keys, values = (
            x.view(batch, heads, end, -1).to(key_states.dtype) for x in self.packed.whole(end)
        )
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier 5.x

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        self.length = max(0, self.length - abs(tokens_to_remove))

    def reset(self) -> None:
        self.packed, self.length, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the texts `beam_idx` of the batch."""
        if self.packed is None:
            return
        heads = self.packed.rows // len(beam_idx)
        places = torch.arange(heads, device=beam_idx.device)
        rows = (beam_idx[:, None] * heads + places).flatten()
        for x in (
            self.packed.keys,
            self.packed.values,
            self.packed.old_keys,
            self.packed.old_values,
        ):
            x.codes, x.grid = x.codes[rows], x.grid[rows]

    def offload(self) -> None:
        """Codes stay where they are: they are small already."""

    def prefetch(self) -> None:
        """See `offload`."""


class StreamCacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The first tokens and the latest ones of one text (cache/streaming.py).

    transformers counts positions on without end; the sinks' keys are turned on to stay right
    before the window.
    """

    def __init__(self, capacity: int, rope: Rope | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity, self.rope = capacity, rope
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.shape[0] != 1:
            raise OptimError("a streaming cache holds one text", "generate one at a time", USAGE)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.sinks, self.is_initialized = self.keys, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store `[1, kv, T, D]`; the keys and values of the sinks and the window."""
        if self.keys is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self._forget(self._surplus(key_states.shape[2]))
        self.keys = torch.cat((self.keys, key_states), 2)
        self.values = torch.cat((self.values, value_states), 2)
        if self.sinks.shape[2] < SINKS:
            self.sinks = self.keys[:, :, :SINKS].clone()
        self.length += key_states.shape[2]
        return self.keys, self.values

    def _surplus(self, count: int) -> int:
        """How many positions must go before `count` more come; the sinks stay."""
        held = self.length - self.gone
        return max(0, min(held + count - self.capacity, held - SINKS))

    def _forget(self, count: int) -> None:
        if not count:
            return
        assert self.keys is not None
        assert self.values is not None
        self.gone += count
        sinks = self.sinks
        if self.rope is not None:
            sinks = self.rope.turn(sinks.float(), self.gone, self.capacity).to(sinks.dtype)
        self.keys = torch.cat((sinks, self.keys[:, :, SINKS + count :]), 2)
        kept = self.values[:, :, :SINKS], self.values[:, :, SINKS + count :]
        self.values = torch.cat(kept, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        gone = self.gone + self._surplus(query_length)
        return self.length - gone + query_length, gone

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier 5.x

    def reset(self) -> None:
        self.keys = self.values = None
        self.sinks, self.is_initialized = torch.empty(0), False
        self.length = self.gone = 0


def packed_cache(config: Any, bits: int) -> Cache:
    """A transformers cache of `bits` 8 or 4 for the model of `config`."""
    if bits not in (4, 8):
        raise OptimError(f"no packed cache has {bits} bits", "4 or 8", USAGE)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    return Cache(layers=[PackedCacheLayer(bits) for _ in range(layers)])


def stream_cache(config: Any, capacity: int) -> Cache:
    """A transformers cache of at most `capacity` positions for one text of any length.

    Raises OptimError (2) for a family that is not in the table or has learned positions.
    """
    if capacity < SMALLEST:
        what = f"a streaming cache of {capacity} tokens is too small"
        raise OptimError(what, f"{SMALLEST} or more", USAGE)
    config = config.get_text_config(decoder=True)
    family = FAMILIES.get(config.model_type)
    if family is None or family.decoder.positions:
        raise OptimError(f"{config.model_type} cannot stream here", "use another cache", USAGE)
    shape = resolve(config, family.decoder)
    kinds = ropes(config, family.decoder, shape.head_dim)
    made = [kinds[layer.rope] if layer.rope else None for layer in shape.layers]
    return Cache(layers=[StreamCacheLayer(capacity, rope) for rope in made])
