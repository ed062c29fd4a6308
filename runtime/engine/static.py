"""What a decoder of static integers has beside its blocks: a turned stream, and a prefix.

Embeddings and head stay as they were stored. The stream is turned after the embedding and back
before the head; the last norm's gain moves behind the turn, as only its division commutes with it.
The prefix's keys and values are computed once, at load, with activations that are not rounded.
"""

import torch
from torch import Tensor, nn

from optim.runtime.cache.full import LayerCache, StaticCache
from optim.runtime.decoder.decoder import Decoder
from optim.runtime.decoder.layers import RMSNorm
from optim.runtime.decoder.linears.static_int import StaticReader
from optim.runtime.formats.hadamard import Mixing
from optim.runtime.formats.static_int import stream_rotation


class TurnIn(nn.Module):
    """The stream `[..., hidden]` turned."""

    def __init__(self, rotation: Mixing) -> None:
        super().__init__()
        self.rotation = rotation

    def forward(self, h: Tensor) -> Tensor:
        return self.rotation(h)


class TurnBack(nn.Module):
    """The stream turned back, and the last norm's gain."""

    def __init__(self, rotation: Mixing, gain: Tensor) -> None:
        super().__init__()
        self.rotation, self.gain = rotation, gain

    def forward(self, h: Tensor) -> Tensor:
        return self.rotation.inverse(h) * self.gain.to(h.dtype)


@torch.inference_mode()
def complete(decoder: Decoder, reader: StaticReader) -> None:
    """Give a decoder whose blocks `reader` made its turns and its prefix."""
    static = reader.static
    if static.rotated:
        rotation = stream_rotation(decoder.shape.hidden).to(reader.source.device, decoder.dtype)
        norm = decoder.norm
        assert isinstance(norm, RMSNorm)
        decoder.project_in = TurnIn(rotation)
        decoder.project_out = TurnBack(rotation, norm.weight)
        decoder.norm = RMSNorm(torch.ones_like(norm.weight), norm.eps)
    if static.prefix:
        decoder.prefix = prefix_of(decoder, reader)


def prefix_of(decoder: Decoder, reader: StaticReader) -> list[tuple[Tensor, Tensor]]:
    """Keys and values `[1, P, kv_heads, D]` of the prefix, in the compute dtype, for each block."""
    tokens = reader.static.prefix
    layers = decoder.empty_layers(1, reader.source.device, decoder.dtype)
    reader.exact.positions = len(tokens)
    try:
        cache = StaticCache(layers, len(tokens))
        decoder(torch.tensor([tokens], device=reader.source.device), cache, False)
    finally:
        reader.exact.positions = 0
    found = []
    for layer in layers:
        assert isinstance(layer, LayerCache)
        pair = layer.state(len(tokens))
        keys, values = (pair[name][None].transpose(1, 2) for name in ("keys", "values"))
        found.append((keys, values))
    return found
